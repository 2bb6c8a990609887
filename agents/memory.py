"""A plan of the memory that a run will need, before it starts: where it does not suffice the kernel kills a process
without a word.

Throughout there are copies of the weights for rollouts, gradients and AdamW's moments. Beside them come, in turn, a
rollout (keys and values of the slots, and logits where no compiled kernel draws) and an update (what a micro-batch's
layers keep for the backward, and the gradients of head and embedding before they are added up). Split over processes
(``policies.sharding``), weights, gradients and moments are a part each, and the copy for rollouts is gone during an
update. What is checked is the memory of the device that computes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
from torch import distributed

from envs.task import Task
from policies import Policy
from policies.model.compute import decode_kernels, drawing_head_kernels, product_dtype, scoring_head_kernels
from policies.model.head import KEPT, chunk_logits
from policies.pretrained.architecture import Architecture
from policies.sharding import shape_of
from registry import UsageError
from registry.memory import available_bytes

LOGIT_COPIES = 3  # of a step's logits, where they are in memory
CHUNK_COPIES = (2, 4)  # float32, of a chunk of an update's logits: with exponentials; and rounded slopes and operands
LEAST_TOKENS = (2_048, 4_096)  # of a micro-batch, on a CPU and on a GPU
MOST_TOKENS = 65_536  # of one on a GPU: launches are a small part of its time by then
GB = 1e9


def peak_bytes() -> int:
    """The most resident memory that this process has held."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a run depends on, known before a weight is loaded.

    Attributes:
        architecture: shapes.
        weights, trained: how many numbers all weights have, and those that get a gradient.
        dtype: of the matrix products.
        device: that computes.
        gradient_checkpointing: whether an update keeps only each layer's input.
        processes: how many the matrices are split over; 1 where each has all.
        functional: whether the project's own layers are used.
        copies: further sets of the trained weights that are kept: references, older ones that write, an average.
    """

    architecture: Architecture
    weights: int
    trained: int
    dtype: torch.dtype
    device: torch.device
    gradient_checkpointing: bool = False
    processes: int = 1
    functional: bool = True
    copies: int = 0

    @staticmethod
    def of(policy: Policy) -> ModelSize:
        """A policy's."""
        return ModelSize(
            policy.architecture,
            sum(shape_of(parameter).numel() for parameter in policy.model.parameters()),
            sum(shape_of(parameter).numel() for parameter in policy.parameters()),
            policy.dtype,
            policy.device,
            policy.gradient_checkpointing,
            distributed.get_world_size() if policy.sharded else 1,
            policy.functional,
        )

    @property
    def multiplied(self) -> int:
        """Bytes of a weight as rollouts multiply by it: 4 for a bfloat16 one where the processor has no such
        products."""
        return max(self.dtype.itemsize, product_dtype(self.device, self.dtype).itemsize)

    @property
    def copy(self) -> int:
        """Bytes of the weights as rollouts read them, whole in every process; beside the embedding of its own that a
        split model's needs, in float32."""
        embedding = self.architecture.vocabulary * self.architecture.width * 4 if self.processes > 1 else 0
        return self.weights * self.multiplied + embedding

    @property
    def largest(self) -> int:
        """Numbers of the largest map."""
        a = self.architecture
        return max(
            a.vocabulary * a.width, 2 * a.inner * a.width, (a.query_heads + 2 * a.key_heads) * a.head_dim * a.width
        )

    @property
    def adapted(self) -> bool:
        """Whether low-rank adapters are trained, and not the weights."""
        return self.trained < self.weights

    def slot(self, prompt: int, completion: int) -> int:
        """Bytes of one slot whose completion uses its whole budget. Prompts are remembered, one a slot; compiled
        kernels read them where they are, the torch path copies them. A head that is not compiled to draw holds its
        logits."""
        a = self.architecture
        copies = 1 if decode_kernels(a, self.device) is not None else 2
        cache = a.layers * a.kv_width * (completion + copies * prompt) * self.dtype.itemsize if self.functional else 0
        kernels = drawing_head_kernels(self.device, a.vocabulary, a.width, self.dtype)
        return cache + (0 if self.functional and kernels is not None else LOGIT_COPIES * a.vocabulary * 4)

    def update(self, tokens: int) -> int:
        """Bytes of a forward and backward over ``tokens`` tokens, with the gradients that are not yet in their place,
        and of a split model with the map in use, whole."""
        a, size = self.architecture, self.dtype.itemsize
        gemma = 1 if a.gemma else 0
        kept = 4 * a.width * (2 + 2 * gemma)  # the residual stream, float32, as norms keep it
        kept += size * (2 * a.width + 2 * (a.query_heads + a.key_heads) * a.head_dim + (3 + gemma) * a.inner)
        whole = 1 if self.gradient_checkpointing else a.layers
        layers = tokens * (whole * kept + (a.layers - whole) * 4 * a.width)
        logits = tokens * a.vocabulary
        chunk, weight = min(chunk_logits(self.device), logits), a.vocabulary * a.width
        if scoring_head_kernels(self.device, self.dtype, a.width) is not None:
            # slopes, and turned for their product; exponentials; the weight rounded, and packed
            head = size * (2 * chunk + min(KEPT, logits) + 2 * weight)
        else:
            rounds = self.device.type != "cpu" or self.dtype != torch.float32
            head = 4 * CHUNK_COPIES[rounds] * chunk
            head += (4 + size) * weight if rounds and self.device.type == "cpu" else 0  # rounded, and that in float32
        unplaced = 0 if self.adapted else 2 * weight * 4
        in_use = 4 * weight + (4 + size) * self.largest if self.processes > 1 else 0
        return layers + head + unplaced + in_use


@dataclass(frozen=True)
class Plan:
    """Bytes that one process of a run needs, by what needs them.

    Attributes:
        weights, gradients, moments: float32, this process's part of them.
        copies: further sets of what is trained, likewise.
        copy: the weights as rollouts read them.
        slots: keys, values and logits of all slots.
        update: what a micro-batch takes for a while.
        drops_copy: whether ``copy`` is gone before an update begins.
    """

    weights: int
    gradients: int
    moments: int
    copies: int
    copy: int
    slots: int
    update: int
    drops_copy: bool = False

    @property
    def total(self) -> int:
        """At the worst moment."""
        lasting = self.weights + self.gradients + self.moments + self.copies
        if self.drops_copy:
            return lasting + max(self.copy + self.slots, self.update)
        return lasting + self.copy + max(self.slots, self.update)


def plan(size: ModelSize, slots: int, prompt: int, completion: int, tokens: int) -> Plan:
    """What a run needs whose ``slots`` write completions of ``completion`` tokens to prompts of ``prompt``, and whose
    micro-batches have ``tokens`` tokens."""
    part = -(-4 * size.weights // size.processes)
    trained = 4 * size.trained if size.adapted else part  # adapters are not split
    return Plan(
        weights=part,
        gradients=trained,
        moments=2 * trained,
        copies=size.copies * trained,
        copy=size.copy,
        slots=slots * size.slot(prompt, completion),
        update=size.update(tokens),
        drops_copy=size.processes > 1,
    )


def slot_bytes(policy: Policy, task: Task) -> int:
    """See ``ModelSize.slot``."""
    return ModelSize.of(policy).slot(task.spec.max_prompt_tokens, task.spec.max_new_tokens)


def update_bytes(policy: Policy, tokens: int) -> int:
    """See ``ModelSize.update``."""
    return ModelSize.of(policy).update(tokens)


def lasting_bytes(policy: Policy, optimizer: torch.optim.Optimizer | None) -> int:
    """Of what is not there yet and will be throughout: the weights as rollouts read them, and where an ``optimizer``
    trains, gradients and moments."""
    if optimizer is None:
        return ModelSize.of(policy).copy
    trained = sum(parameter.numel() for parameter in policy.parameters())
    return ModelSize.of(policy).copy + trained * 4 * (1 if optimizer.state else 3)


def layout_bytes(policy: Policy) -> int:
    """Of the largest map's weights in their plain order, while they are brought into the order of rollouts."""
    size = ModelSize.of(policy)
    return size.largest * size.multiplied if policy.functional else 0


def _free_bytes(device: torch.device) -> int | None:
    """What the machine, or a GPU, leaves to this process, of those of a run that are on it."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = available_bytes()
    shared = distributed.is_available() and distributed.is_initialized()
    return free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if free is not None and shared else free


def microbatch_budget(wanted: int | None, size: ModelSize) -> int:
    """Most tokens of a forward and backward: ``wanted``, or where nobody has said how many few on a CPU, where more is
    no faster. A GPU waits for the host while they are few: there it is as many as a quarter of the card holds, or half
    of what others leave of it."""
    if wanted is not None:
        return wanted
    tokens = LEAST_TOKENS[size.device.type == "cuda"]
    if size.device.type == "cuda" and torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info(size.device)
        while tokens < MOST_TOKENS and size.update(2 * tokens) <= min(whole // 4, free // 2):
            tokens *= 2
    return tokens


def fitting_slots(policy: Policy, task: Task, optimizer: torch.optim.Optimizer | None, wanted: int) -> int:
    """As many of ``wanted`` slots as memory holds beside what an ``optimizer`` needs, if one trains; all of them where
    the system tells nothing."""
    free = _free_bytes(policy.device)
    if free is None:
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
    free = _free_bytes(policy.device)
    if free is None:
        return
    lasting = lasting_bytes(policy, optimizer)
    throughout = f"gradients, optimizer and the weights of rollouts need {lasting / GB:.3g} GB"
    tokens = max(microbatch_tokens, task.max_length)
    update = update_bytes(policy, tokens)
    if lasting - (ModelSize.of(policy).copy if policy.sharded else 0) + update > free:
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
