"""What an agent's arguments must satisfy."""

from __future__ import annotations

import torch

from registry import UsageError


def check_device(device: str) -> None:
    """Raise UsageError unless ``device`` is one that torch finds; an index is left to the one that uses it."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"device={device!r} is not a torch device: use 'cpu' or 'cuda'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device!r}, but torch finds no CUDA device: use 'cpu'")


def check_counts(
    group_size: int, problems_per_batch: int, minibatches: int, epochs: int, target_written: int, temperature: float
) -> None:
    """Raise UsageError for the first argument out of its range."""
    for name, value in (("group_size", group_size), ("problems_per_batch", problems_per_batch)):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")
    if not 1 <= minibatches <= problems_per_batch or epochs < 1:
        raise UsageError(
            f"minibatches={minibatches} must be 1..problems_per_batch={problems_per_batch} (whole groups), "
            f"epochs={epochs} at least 1"
        )
    if temperature <= 0:
        raise UsageError(f"temperature={temperature} must be positive: a rollout has to explore")
    if not 0 <= target_written <= group_size:
        raise UsageError(f"target_written={target_written} must be 0..group_size={group_size}")


def check_rollout_dtype(name: str | None) -> bool:
    """Whether rollouts are by int8 products. Raises UsageError for a name that is not known."""
    if name not in (None, "int8"):
        raise UsageError(f"rollout_dtype={name!r} is unknown: use 'int8', or leave it out to roll out in dtype")
    return name == "int8"
