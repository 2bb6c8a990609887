"""What memory a run needs in each of its processes, from its model's shapes alone: no weight is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from agents import ReFT
from agents.environments import slots_of
from agents.memory import GB, ModelSize, microbatch_budget, plan
from benchmarks.experiment.spec import RunSpec, agent_arguments
from benchmarks.measuring.table import Table
from envs.task import TaskSpec
from policies.dtype import DTYPES
from policies.pretrained.architecture import read_architecture
from policies.pretrained.load import BUILT_IN, load_config
from registry import anchors, batches

PROCESSES = (1, 2, 4, 8)
CARDS = (24, 80)  # GB of a GPU
CONTEXT = 1.5e9  # bytes of a GPU that no plan has: CUDA's own, and what its allocator leaves between
PROCESS = 0.5e9  # bytes of a process with its libraries on a CPU


def has_plan(spec: RunSpec) -> bool:
    """Whether a plan is of that run's agent: of ``reft``'s loop with its own writer."""
    component, agent = agent_arguments(spec.agent)
    return issubclass(component, ReFT) and agent["writer"] == {"id": "own"}


def planned_bytes(spec: RunSpec) -> float | None:
    """The most that a run needs of the memory that its device has, where one process trains; None without a plan, or
    where its model's config is not at hand."""
    if not has_plan(spec) or not (spec.policy in BUILT_IN or Path(spec.policy).is_dir()):
        return None
    size, prompt, completion, tokens = _settings(spec)
    slots = slots_of(None, spec.agent["slots"], spec.agent["group_size"] * spec.agent["problems_per_batch"])
    own = CONTEXT if size.device.type == "cuda" else PROCESS
    return plan(size, slots, prompt, completion, tokens).total + own


def memory_of(spec: RunSpec) -> Table:
    """``memory_table`` of a run's settings."""
    return memory_table(*_settings(spec))


def _settings(spec: RunSpec) -> tuple[ModelSize, int, int, int]:
    """Of a run: its model's size, the longest prompt and completion, and the tokens of a micro-batch."""
    _, agent = agent_arguments(spec.agent)
    task = {"max_prompt_tokens": TaskSpec.max_prompt_tokens, "max_new_tokens": TaskSpec.max_new_tokens} | spec.env
    size = size_of(
        load_config(spec.policy),
        dtype=DTYPES[agent.get("dtype") or "float32"],
        device=torch.device(spec.device),
        lora_rank=agent.get("lora_rank") or 0,
        trained_layers=len(agent.get("trained_layers") or ()),
        gradient_checkpointing=bool(agent.get("gradient_checkpointing")),
        copies=_copies(agent),
    )
    tokens = microbatch_budget(agent.get("microbatch_tokens"), size)
    prompt, completion = task["max_prompt_tokens"], task["max_new_tokens"]
    return size, prompt, completion, max(tokens, prompt + completion)


def _copies(agent: dict[str, Any]) -> int:
    """How many further sets of the trained weights an agent keeps: references, older ones that write, an average."""
    references = anchors.build(agent["anchor"]).renews(0)
    return len(references) + int(batches.build(agent["batch"]).lag) + bool(agent["ema_decay"])


def size_of(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    lora_rank: int = 0,
    trained_layers: int = 0,
    gradient_checkpointing: bool = False,
    copies: int = 0,
) -> ModelSize:
    """Of the model that a transformers config describes, of which so many ``trained_layers`` are trained, 0 for all
    weights, and ``copies`` kept beside; norms are counted, biases are too few to matter."""
    a = read_architecture(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    weights = a.layers * a.layer_weights + (1 if tied else 2) * a.vocabulary * a.width + (2 * a.layers + 1) * a.width
    queries, keys = a.query_heads * a.head_dim, a.key_heads * a.head_dim
    both_sides = 2 * (a.width + queries) + 2 * (a.width + keys) + 3 * (a.width + a.inner)  # of a layer's seven maps
    if lora_rank:
        trained = (trained_layers or a.layers) * lora_rank * both_sides
    else:
        trained = trained_layers * (a.layer_weights + 2 * a.width) or weights
    held = weights + (trained if lora_rank else 0)
    return ModelSize(a, held, trained, dtype, device, gradient_checkpointing, copies=copies)


def memory_table(size: ModelSize, prompt: int, completion: int, tokens: int) -> Table:
    """A row for each number of processes that the weights are split over: GB of one process by what needs them, and for
    GPUs how many slots fit beside that. The row of one process is that of all where weights are whole.

    Args:
        size: of the model, not split.
        prompt, completion: the longest, in tokens.
        tokens: of a micro-batch.
    """
    slot = size.slot(prompt, completion)
    cards = CARDS if size.device.type == "cuda" else ()
    rows = []
    for count in PROCESSES:
        one = plan(replace(size, processes=count), 0, prompt, completion, tokens)
        copies = (one.copies,) if size.copies else ()
        numbers = (one.weights, one.gradients, one.moments, *copies, one.copy, one.update, one.total)
        row = [str(count), *(f"{number / GB:.3g}" for number in numbers)]
        for card in cards:
            free = card * GB - CONTEXT
            room = free - one.weights - one.gradients - one.moments - one.copies - one.copy
            row.append(f"{room // slot:.0f}" if one.total <= free and room >= slot else "none")
        rows.append(row)
    kept = ["copies"] if size.copies else []
    heads = ["split over", "weights", "gradients", "moments", *kept, "rollout copy", "update", "most"]
    heads += [f"slots in {card} GB" for card in cards]
    title = f"GB of one process: {size.weights / 1e9:.3g} G weights, products in {str(size.dtype).partition('.')[2]}"
    note = (
        f"A slot of {prompt} + {completion} tokens takes {slot / 1e6:.3g} MB; an update is of {tokens} tokens"
        f"{', with gradient checkpointing' if size.gradient_checkpointing else ''}."
    )
    return Table(heads, rows, title=title, note=note)
