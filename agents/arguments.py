"""What an agent's arguments must satisfy."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from policies import Policy
from registry import UsageError, check_number, fields_of

PRETRAINED = 10_000_000  # trainable weights from which on a model is taken for a pretrained one
HIGHEST_RATE, LOWEST_RATE = 1e-4, 1e-8  # of AdamW on all weights of such a model; published runs lie far within


class UnusualLearningRate(UserWarning):
    """The learning rate does not suit a model of that size."""


def settle_device(policy: str | Policy, device: str) -> str:
    """Where an agent computes: ``device``, or where a policy that is loaded already is. Raises UsageError for another
    one than ``cpu``, the default, beside such a policy."""
    if isinstance(policy, str | os.PathLike):
        return device
    if not isinstance(policy, Policy):
        raise UsageError(
            f"policy={type(policy).__name__}(...) is neither a name nor a Policy: give a folder, a hub id or "
            "Policy.load's; a transformers model goes by the folder that its save_pretrained writes"
        )
    own = str(policy.device)
    if device not in ("cpu", own, policy.device.type):
        raise UsageError(f"device={device!r}, but the policy given is on {own}: leave device out, or load it there")
    return own


RANGES = {
    **dict.fromkeys(("weight_decay", "consistency", "entropy_bonus", "adam_eps"), (0, math.inf)),
    **dict.fromkeys(("ent_coef", "vf_coef", "beta", "epsilon"), (0, math.inf)),
    **dict.fromkeys(("gamma", "gae_lambda"), (0, 1)),
    "microbatch_tokens": (1, math.inf),
}
"""What some numbers must lie between; an infinite one is none of them."""
LARGEST = 10**9


def check_numbers(cls: type, scope: Mapping[str, Any]) -> None:
    """Raise UsageError for the first argument of ``cls`` in ``scope`` that is no such number as its annotation says, or
    beyond its range."""
    for name, field in fields_of(cls).items():
        if name != "adam_betas":  # check_adam says more
            check_number(scope[name], field.type, name)
        if name != "seed" and field.type in (int, int | None) and (scope[name] or 0) > LARGEST:
            raise UsageError(f"{name}={scope[name]} must be at most {LARGEST}")
        if name == "max_grad_norm":
            check_grad_norm(scope[name])
        low, high = RANGES.get(name, (-math.inf, math.inf))
        value = scope[name]
        if name in RANGES and value is not None and not (low <= value <= high and abs(value) < math.inf):
            limit = f"a finite number of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UsageError(f"{name}={value!r} must be {limit}")


def scheduled(schedule: Callable[[float], Any], remaining: float, name: str) -> float:
    """What a schedule of stable-baselines3 gives where ``remaining`` of the run is left, 1 to 0.

    Raises:
        UsageError: it gives no finite number of at least 0.
    """
    try:
        value = float(schedule(remaining))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the schedule of {name} gives no number at progress_remaining={remaining:g}: {error}"
        ) from error
    if not 0 <= value < math.inf:
        raise UsageError(
            f"the schedule of {name} gives {value} where {remaining:g} of the run remain; it must give a finite number "
            "of at least 0"
        )
    return value


def check_groups(group_size: int, problems_per_batch: int) -> None:
    """Raise UsageError for a batch that has no groups, or groups that have no completions."""
    for name, value in (("group_size", group_size), ("problems_per_batch", problems_per_batch)):
        check_number(value, int, name)
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")


def check_counts(
    group_size: int,
    problems_per_batch: int,
    refill_tokens: int,
    minibatches: int,
    epochs: int,
    target_written: int,
    temperature: float,
) -> None:
    """Raise UsageError for the first argument that is no number, or out of its range."""
    counts = {"refill_tokens": refill_tokens, "minibatches": minibatches, "epochs": epochs}
    for name, value in (counts | {"target_written": target_written}).items():
        check_number(value, int, name)
    check_groups(group_size, problems_per_batch)
    if not 1 <= minibatches <= problems_per_batch or epochs < 1:
        raise UsageError(
            f"minibatches={minibatches} must be 1..problems_per_batch={problems_per_batch} (whole groups), "
            f"epochs={epochs} at least 1"
        )
    if refill_tokens < 0:
        raise UsageError(f"refill_tokens={refill_tokens} must be at least 0, which is without refill")
    if refill_tokens and group_size < 2:
        raise UsageError(
            f"refill_tokens={refill_tokens} with group_size={group_size}: one completion is no signal; raise group_size"
        )
    if not isinstance(temperature, Real) or not 0 < temperature < float("inf"):
        raise UsageError(f"temperature={temperature!r} must be a finite positive number: a rollout has to explore")
    if not 0 <= target_written <= group_size:
        raise UsageError(f"target_written={target_written} must be 0..group_size={group_size}")


def check_learning_rate(rate: float, trainable: int) -> None:
    """Warn where a learning rate is far from what ``trainable`` weights of a pretrained model bear.

    Raises:
        UsageError: a rate that is none.
    """
    if not 0 <= rate < math.inf:
        raise UsageError(f"learning_rate={rate} must be a finite number of at least 0")
    if trainable > PRETRAINED and not LOWEST_RATE <= rate <= HIGHEST_RATE:
        what = "will likely ruin it within a few steps" if rate > HIGHEST_RATE else "will hardly move it"
        warnings.warn(
            f"learning_rate={rate:g} {what}: a pretrained model of {trainable / 1e6:.0f} M weights wants 1e-6 to 2e-5",
            UnusualLearningRate,
            stacklevel=2,
        )


def check_seed(seed: Any) -> int | None:
    """``seed`` as an integer of Python's. Raises UsageError for what numpy's generators do not take."""
    if seed is not None and (not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32):
        raise UsageError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1, or None")
    return None if seed is None else int(seed)


def check_grad_norm(limit: float) -> None:
    """Raise UsageError for a gradient norm that no gradient may have; an infinite one clips nothing."""
    if not limit > 0:
        raise UsageError(f"max_grad_norm={limit} must be above 0: no step would move a weight")


def number_or_schedule(given: Any, name: str) -> Any:
    """A float of Python's, or the function that gives one. Raises UsageError for anything else."""
    if callable(given):
        return given
    if not isinstance(given, Real) or isinstance(given, bool):
        raise UsageError(f"{name}={given!r} must be a number, or a function from the progress remaining to one")
    if not 0 <= float(given) < math.inf:
        raise UsageError(f"{name}={given} must be a finite number of at least 0")
    return float(given)


def check_adam(betas: Any, eps: float) -> tuple[tuple[float, float], float]:
    """AdamW's decays of the moments and its epsilon. Raises UsageError for what they cannot be."""
    try:
        first, second = map(float, betas)
    except (TypeError, ValueError):
        raise UsageError(f"adam_betas={betas!r} must be two numbers, such as (0.9, 0.95)") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise UsageError(f"adam_betas={betas!r} must each be in [0, 1)")
    if not eps > 0:
        raise UsageError(f"adam_eps={eps} must be above 0: a weight without a gradient would be divided by 0")
    return (first, second), eps


def check_ema(decay: float) -> float:
    """The decay of the averaged weights. Raises UsageError outside of [0, 1)."""
    if not 0 <= decay < 1:
        raise UsageError(f"ema_decay={decay} must be in [0, 1): 0 keeps no average, 0.99 one over about 100 steps")
    return decay


def check_lora_rank(rank: int) -> None:
    """Raise UsageError for a rank below 0."""
    if rank < 0:
        raise UsageError(f"lora_rank={rank} must be at least 0: 0 trains the weights themselves, 8 or 16 is usual")


def check_rollout_dtype(name: str | None) -> bool:
    """Whether rollouts are by int8 products. Raises UsageError for a name that is not known."""
    if name not in (None, "int8"):
        raise UsageError(f"rollout_dtype={name!r} is unknown: use 'int8', or leave it out to roll out in dtype")
    return name == "int8"


def check_parameters(given: Any, cls: type) -> None:
    """Raise UsageError unless ``given`` is a dictionary such as ``get_parameters`` makes."""
    if not isinstance(given, Mapping):
        raise UsageError(
            f"set_parameters takes what get_parameters gives, not {given!r}: a saved agent is opened by "
            f"{cls.__name__}.load"
        )
