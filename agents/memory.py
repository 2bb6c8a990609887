"""A plan of the memory that a run will need, before it starts: where it does not suffice the kernel kills a process
without a word.

The plan is of the large parts: copies of the weights for rollouts, gradients and AdamW's moments, keys and values of
the slots, and logits where no compiled kernel draws. It leaves out the activations of an update, which
``microbatch_tokens`` bounds and which come when the slots are free again. A GPU has errors of its own; the plan is of
the host's memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from envs.task import Task
from policies import Policy
from policies.native import kernels
from registry import UsageError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
LOGIT_COPIES = 3  # of a step's logits, where they are in memory
GB = 1e9


def available_bytes() -> int | None:
    """What this process may still take: free memory, or less in a container with a limit; None where nothing tells."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((CGROUP / "memory.max").read_text())
        cache = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        return min(free, limit - int((CGROUP / "memory.current").read_text()) + int(cache))
    except (OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        return free


def peak_bytes() -> int:
    """The most resident memory that this process has held."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def slot_bytes(policy: Policy, task: Task) -> int:
    """Of one slot whose completion uses its whole budget. Compiled kernels share a prompt's keys and values between
    slots and hold no logits; the torch path copies them and does."""
    shape = policy.architecture
    compiled = kernels() is not None
    tokens = task.spec.max_new_tokens if compiled else task.max_length
    cache = shape.layers * shape.kv_width * tokens * policy.dtype.itemsize if policy.functional else 0
    return cache + (0 if compiled else LOGIT_COPIES * shape.vocabulary * 4)


def lasting_bytes(policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Of what is not there yet and will be throughout: the weights as rollouts read them, gradients, moments."""
    weights = sum(parameter.numel() for parameter in policy.model.parameters())
    trained = sum(parameter.numel() for parameter in policy.parameters())
    return weights * policy.dtype.itemsize + trained * 4 * (1 if optimizer.state else 3)


def fitting_slots(policy: Policy, task: Task, optimizer: torch.optim.Optimizer, wanted: int) -> int:
    """As many of ``wanted`` slots as memory holds; all of them on a GPU, or where the system tells nothing."""
    free = available_bytes()
    if free is None or policy.device.type != "cpu":
        return wanted
    return max(0, min(wanted, (free - lasting_bytes(policy, optimizer)) // max(slot_bytes(policy, task), 1)))


def check_memory(policy: Policy, task: Task, optimizer: torch.optim.Optimizer, slots: int, behaviors: int = 1) -> None:
    """Raise UsageError where ``slots`` slots of each of ``behaviors`` do not fit, before anything is killed for it."""
    fitting = fitting_slots(policy, task, optimizer, slots * behaviors) // behaviors
    if fitting >= slots:
        return
    free, lasting = (available_bytes() or 0) / GB, lasting_bytes(policy, optimizer) / GB
    needed = slots * behaviors * slot_bytes(policy, task) / GB
    remedy = f"Take slots={fitting} or fewer" if fitting else "Take a smaller model"
    raise UsageError(
        f"not enough memory: {slots} slots with max_new_tokens={task.spec.max_new_tokens} need up to {needed:.3g} GB, "
        f"gradients, optimizer and the weights of rollouts {lasting:.3g} GB, and {free:.3g} GB are free. {remedy}, "
        "lower max_new_tokens, or take dtype=bfloat16 or lora_rank=16"
    )
