"""A plan of the memory that a run will need, before it starts: where it does not suffice the kernel kills a process
without a word.

Throughout there are copies of the weights for rollouts, gradients and AdamW's moments. Beside them come, in turn, a
rollout (keys and values of the slots, and logits where no compiled kernel draws) and an update (what a micro-batch's
layers keep for the backward, and the gradients of head and embedding before they are added up). A GPU has errors of its
own; the plan is of the host's memory.
"""

from __future__ import annotations

import sys

import torch

from envs.task import Task
from policies import Policy
from policies.model.compute import decode_kernels, drawing_head_kernels, product_dtype
from policies.model.head import CHUNK_LOGITS, KEPT
from registry import UsageError
from registry.memory import available_bytes

LOGIT_COPIES = 3  # of a step's logits, where they are in memory
CHUNK_COPIES = 4  # float32, of a chunk of an update's logits: with their exponentials, slopes and a product's operand
GB = 1e9


def peak_bytes() -> int:
    """The most resident memory that this process has held."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def slot_bytes(policy: Policy, task: Task) -> int:
    """Of one slot whose completion uses its whole budget. Prompts are remembered, one a slot; compiled kernels read
    them where they are, the torch path copies them. A head that is not compiled to draw holds its logits."""
    shape = policy.architecture
    copies = 1 if decode_kernels(shape, policy.device) is not None else 2
    tokens = task.spec.max_new_tokens + copies * task.spec.max_prompt_tokens
    cache = shape.layers * shape.kv_width * tokens * policy.dtype.itemsize if policy.functional else 0
    draws = policy.functional and drawing_head_kernels(policy.model.lm_head, policy.dtype) is not None
    return cache + (0 if draws else LOGIT_COPIES * shape.vocabulary * 4)


def update_bytes(policy: Policy, tokens: int) -> int:
    """Of a forward and backward over ``tokens`` tokens, with the gradients that are not yet in their place."""
    a, size = policy.architecture, policy.dtype.itemsize
    gemma = 1 if a.gemma else 0
    kept = 4 * a.width * (2 + 2 * gemma)  # the residual stream, float32, as norms keep it
    kept += size * (2 * a.width + 2 * (a.query_heads + a.key_heads) * a.head_dim + (3 + gemma) * a.inner)
    whole = 1 if policy.gradient_checkpointing else a.layers
    layers = tokens * (whole * kept + (a.layers - whole) * 4 * a.width)
    logits = tokens * a.vocabulary
    head = 4 * CHUNK_COPIES * min(CHUNK_LOGITS, logits) + (size * min(KEPT, logits) if size < 4 else 0)
    unplaced = 0 if policy.adapter_rank else 2 * a.vocabulary * a.width * 4
    return layers + head + unplaced


def lasting_bytes(policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Of what is not there yet and will be throughout: the weights as rollouts read them, gradients, moments."""
    weights = sum(parameter.numel() for parameter in policy.model.parameters())
    trained = sum(parameter.numel() for parameter in policy.parameters())
    return weights * _multiplied_size(policy) + trained * 4 * (1 if optimizer.state else 3)


def _multiplied_size(policy: Policy) -> int:
    """Bytes of a weight as rollouts multiply by it: 4 for a bfloat16 one where the processor has no such products."""
    return max(policy.dtype.itemsize, product_dtype(policy.device, policy.dtype).itemsize)


def layout_bytes(policy: Policy) -> int:
    """Of the largest map's weights in their plain order, while they are brought into the order of rollouts."""
    a = policy.architecture
    maps = (a.vocabulary * a.width, 2 * a.inner * a.width, (a.query_heads + 2 * a.key_heads) * a.head_dim * a.width)
    return max(maps) * _multiplied_size(policy) if policy.functional else 0


def fitting_slots(policy: Policy, task: Task, optimizer: torch.optim.Optimizer, wanted: int) -> int:
    """As many of ``wanted`` slots as memory holds; all of them on a GPU, or where the system tells nothing."""
    free = available_bytes()
    if free is None or policy.device.type != "cpu":
        return wanted
    room = free - lasting_bytes(policy, optimizer) - layout_bytes(policy)
    return max(0, min(wanted, room // max(slot_bytes(policy, task), 1)))


class NotEnoughMemory(UsageError):
    """So many slots do not fit, ``slots`` do; 0 where no number of them does."""

    def __init__(self, message: str, slots: int) -> None:
        super().__init__(message)
        self.slots = slots


def check_memory(
    policy: Policy,
    task: Task,
    optimizer: torch.optim.Optimizer,
    slots: int,
    behaviors: int = 1,
    microbatch_tokens: int = 0,
) -> None:
    """Raise NotEnoughMemory where ``slots`` slots of each of ``behaviors``, or an update of ``microbatch_tokens``
    tokens, do not fit, before anything is killed for it."""
    free = available_bytes()
    if free is None or policy.device.type != "cpu":
        return
    lasting = lasting_bytes(policy, optimizer)
    throughout = f"gradients, optimizer and the weights of rollouts need {lasting / GB:.3g} GB"
    tokens = max(microbatch_tokens, task.max_length)
    update = update_bytes(policy, tokens)
    if lasting + update > free:
        smaller = "" if policy.gradient_checkpointing else "gradient_checkpointing=true, "
        fewer = f"microbatch_tokens={task.max_length}, " if tokens > task.max_length else ""
        raise NotEnoughMemory(
            f"not enough memory: {throughout}, an update of {tokens} tokens {update / GB:.3g} GB, and "
            f"{free / GB:.3g} GB are free. Take {fewer}{smaller}dtype=bfloat16 or lora_rank=16, or a smaller model",
            0,
        )
    fitting = fitting_slots(policy, task, optimizer, slots * behaviors) // behaviors
    if fitting >= slots:
        return
    needed = (slots * behaviors * slot_bytes(policy, task) + layout_bytes(policy)) / GB
    remedy = f"Take slots={fitting} or fewer" if fitting else "Take a smaller model"
    raise NotEnoughMemory(
        f"not enough memory: {slots} slots with max_new_tokens={task.spec.max_new_tokens} need up to {needed:.3g} GB, "
        f"{throughout}, and {free / GB:.3g} GB are free. {remedy}, "
        "lower max_new_tokens, or take dtype=bfloat16 or lora_rank=16",
        fitting,
    )
