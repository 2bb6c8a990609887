"""Supervised descent: the optimizer steps that both warm-ups take (``agents.warm_up``, ``agents.train_tiny``).

The learning rate rises linearly over the first steps, then falls linearly; gradients are clipped to norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from registry import UsageError

SHOWN_EVERY = 100  # steps


def linear_warmup_and_decay(steps: int, rise: int, last: float) -> Callable[[int], float]:
    """The factor of the peak learning rate at each of ``steps`` steps: up to 1 over ``rise`` steps (at least one), then
    down to ``last``."""
    rise = max(1, rise)

    def factor(step: int) -> float:
        return min((step + 1) / rise, 1 - (1 - last) * max(0, step - rise) / max(1, steps - rise))

    return factor


def descend(
    losses: Iterable[Tensor],
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    *,
    steps: int,
    rise: int,
    last: float,
) -> list[float]:
    """Take an optimizer step on each of ``losses``, showing their running mean; returns them in nats per token.

    Args:
        losses: scalars, each computed when it is asked for, with the weights that the step before has left.
        parameters: what is trained; their gradients are clipped together.
        optimizers: of ``parameters``, at their peak learning rates.
        steps: how many losses there are.
        rise, last: of ``linear_warmup_and_decay``.

    Raises:
        UsageError: before a step whose gradient is not finite.
    """
    factor = linear_warmup_and_decay(steps, rise, last)
    schedules = [LambdaLR(optimizer, factor) for optimizer in optimizers]
    seen: list[float] = []
    mean = 0.0
    with Progress(transient=True) as progress:
        job = progress.add_task("supervised warm-up", total=steps)
        for loss in losses:
            loss.backward()
            norm = float(clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(norm):
                raise UsageError(
                    f"warm-up step {len(seen) + 1}: loss {float(loss.detach()):g}, gradient norm {norm:g}. The weights "
                    "are those of before that step, and nothing is saved: lower the learning rate or take float32"
                )
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            seen.append(float(loss.detach()))
            mean += (seen[-1] - mean) * max(0.02, 1 / len(seen))
            progress.update(job, advance=1, description=f"supervised warm-up: {mean:.3f} nats/token")
            if len(seen) % SHOWN_EVERY == 0:
                progress.console.print(f"step {len(seen)}: {mean:.4f} nats per completion token")
    return seen
