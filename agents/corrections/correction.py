"""What a correction is: a detached weight W on every completion token.

Every policy loss of this field has the gradient ``sum W * A * grad log pi`` with W detached, so the update has one
form, and an off-policy correction or a trust region is a function from log-probabilities to W. Notation, throughout
this package: pi the current target (all layers), pi_old the target when the rollout was written, mu the distribution a
completion was sampled from (a layer subset; pi_old itself for completions the target wrote),

    rho_t = pi(y_t) / mu(y_t)      r_t = pi(y_t) / pi_old(y_t)      w_{a:b} = rho_a * ... * rho_b

Ratios are formed in log space and in float64; only what is exponentiated is clamped.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from agents.rollout import Rollout
from registry import UsageError, corrections

Scope = Literal["token", "sequence", "group", "batch"]
SCOPES: tuple[str, ...] = get_args(Scope)
Level = Literal["token", "sequence"]
Geometry = Literal["token", "prefix", "suffix", "sequence", "group", "batch"]
GEOMETRIES: tuple[str, ...] = get_args(Geometry)
Operator = Literal["none", "weight", "truncate", "mask", "clip", "gate", "temper", "normalise", "mix"]
OPERATORS: tuple[str, ...] = get_args(Operator)

MAX_LOG_WEIGHT = 80.0  # exp(80) = 5.5e34 leaves float32 room for the product with an advantage and a sum over tokens


class Correction:
    """Optional base class: what a correction declares of itself.

    A class without it (or with some of the attributes only) is a correction all the same, if calling it as below
    gives the weight; ``traits`` fills in the safe defaults written here.

    Attributes:
        scope: what has to be in one call for the weight to be right: one token, its whole sequence, its whole group,
            or the whole minibatch. The undeclared default is the widest, which no micro-batching can make wrong.
        unbiased: whether the expected gradient is exactly the policy gradient of the reward, with a terminal reward,
            a sum over tokens with a constant divisor, an advantage whose baseline does not depend on the completion,
            and pi = pi_old. The exact lab holds every declaration to 1e-10.
        on_policy: the weight of every token where pi = pi_old = mu; None where it depends on the position.
        needs_old_logp: whether ``rollout.old_logp`` must be there.
        trust_region: whether the weight holds the ratio r = pi / pi_old itself. In a product the other factors then
            correct pi_old against mu, so that the ratio of the update is not counted twice.
        corrects_mu: whether the weight holds a ratio to mu. A product takes one such factor: two would correct twice.
            Undeclared: whether it is no trust region. A mask, which only drops, declares False.
        at_pi: whether a product evaluates it at pi beside a trust region too, where the other factors are evaluated at
            pi_old. Only for a mask, which holds no ratio that could be counted twice.
        operator: what it does to its ratio: leaves it (weight), bounds it (truncate), gives up what is out of bounds
            (mask) and A pushes further out (clip), does so smoothly (gate), takes a power (temper), divides by a mean
            (normalise), divides by a mixture of the writers (mix), or has none.
        geometry: what a token's weight is made of. Undeclared: the scope; a narrower one of it is the tokens up to this
            one (prefix) or from it on (suffix).
        is_identity: whether it is no correction at all, W = 1: in a product it counts for nothing.
        mixed: whether it expects groups of which the target wrote some completions (``rollout.by_target``), and
            depends on the other completions only through how many of them the target wrote.
    """

    scope: ClassVar[Any] = "batch"
    unbiased: ClassVar[Any] = False
    on_policy: ClassVar[Any] = 1.0
    needs_old_logp: ClassVar[Any] = False
    trust_region: ClassVar[Any] = False
    corrects_mu: ClassVar[Any] = None
    at_pi: ClassVar[Any] = False
    operator: ClassVar[Any] = "weight"
    geometry: ClassVar[Any] = None
    mixed: ClassVar[Any] = False
    is_identity: ClassVar[Any] = False

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        """W, detached.

        Args:
            logp: [B, T] detached log pi of every token.
            rollout: B sequences; what they hold where ``rollout.mask`` is false must not matter.
            advantage: [B].

        Returns:
            [B, T], finite, zero on padding.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Traits:
    """What a correction declares, with the defaults of ``Correction`` where it is silent."""

    scope: Scope
    unbiased: bool
    on_policy: float | None
    needs_old_logp: bool
    trust_region: bool
    corrects_mu: bool
    at_pi: bool
    operator: Operator
    geometry: Geometry
    mixed: bool
    is_identity: bool

    @property
    def edge(self) -> str:
        """Which ratio it is a function of, masks too. In a product with a trust region, pi / mu becomes pi_old / mu."""
        if not self.trust_region:
            return "none" if self.operator == "none" else "pi / mu"
        return "pi_old / mu and pi / pi_old" if self.corrects_mu else "pi / pi_old"


def traits(correction: Any) -> Traits:
    """The declarations of any correction, of a third party's plain class too."""
    declared = {name: getattr(correction, name, getattr(Correction, name)) for name in Traits.__dataclass_fields__}
    declared["geometry"] = declared["geometry"] or declared["scope"]
    for name, known in (("scope", SCOPES), ("operator", OPERATORS), ("geometry", GEOMETRIES)):
        if declared[name] not in known:
            raise UsageError(f"{type(correction).__name__}.{name}={declared[name]!r} is not one of {', '.join(known)}")
    if declared["corrects_mu"] is None:
        declared["corrects_mu"] = not declared["trust_region"]
    if declared["at_pi"] and declared["corrects_mu"]:
        raise UsageError(f"{type(correction).__name__}: at_pi is for a mask; declare corrects_mu = False too")
    return Traits(**declared)


class ZeroWeights(UserWarning):
    """A correction gave every token of a minibatch the weight zero: the step learns nothing, without an error."""


def warn_zero(correction: Any) -> None:
    """Say that a minibatch with advantages has no weight other than zero."""
    warnings.warn(
        f"{type(correction).__name__} gave every token of a minibatch the weight 0, and nothing is learned from it. "
        "Skip fewer layers, widen its bounds, or take a correction that truncates instead of masking",
        ZeroWeights,
        stacklevel=2,
    )


def weigh(correction: Any, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
    """The weight [B, T] of any correction, checked: detached, zero on padding, in float32 (float64 for a float64
    ``logp``). Call it with all that the correction's scope needs."""
    weight = correction(logp.detach(), rollout, advantage)
    name = type(correction).__name__
    if not isinstance(weight, Tensor):
        raise UsageError(f"{name} returned a {type(weight).__name__}; return a tensor [B, T] = {tuple(logp.shape)}")
    if weight.shape != logp.shape:
        raise UsageError(f"{name} returned shape {tuple(weight.shape)}; return [B, T] = {tuple(logp.shape)}")
    weight = torch.where(rollout.mask, weight.detach(), 0.0).to(_weight_dtype(logp))
    if not torch.isfinite(weight).all():
        raise UsageError(f"{name} returned a weight that is not finite; clamp the exponent, as corrections.exp does")
    return weight


def log_rho(logp: Tensor, rollout: Rollout) -> Tensor:
    """[B, T] float64: log pi - log mu, 0 on padding. mu is what each completion was sampled from."""
    return torch.where(rollout.mask, logp.double() - sampled_logp(rollout).double(), 0.0)


def sampled_logp(rollout: Rollout) -> Tensor:
    """[B, T]: log-probabilities under the policy that wrote each completion: ``behavior_logp``, and ``full_logp`` where
    the target wrote it (there ``behavior_logp`` is the nested policy's score of another's completion)."""
    if rollout.by_target is None or not rollout.by_target.any():
        return rollout.behavior_logp
    full_logp = rollout.full_logp
    if full_logp is None:
        raise UsageError("completions written by the target need rollout.old_logp, their log-probabilities")
    return torch.where(rollout.by_target[:, None], full_logp, rollout.behavior_logp)


def log_r(logp: Tensor, rollout: Rollout) -> Tensor:
    """[B, T] float64: log pi - log pi_old, 0 on padding."""
    if rollout.old_logp is None:
        raise UsageError("this correction needs rollout.old_logp, the target's log-probabilities at rollout time")
    return torch.where(rollout.mask, logp.double() - rollout.old_logp.double(), 0.0)


def exp(log_weight: Tensor, logp: Tensor, rollout: Rollout) -> Tensor:
    """exp of [B, T] or [B, 1] log weights, clamped above, zero on padding, in the dtype of a weight for ``logp``."""
    weight = log_weight.clamp(max=MAX_LOG_WEIGHT).exp().expand(logp.shape)
    return torch.where(rollout.mask, weight, 0.0).to(_weight_dtype(logp))


def _weight_dtype(logp: Tensor) -> torch.dtype:
    return torch.float64 if logp.dtype == torch.float64 else torch.float32


def at_level(log_ratio: Tensor, level: str) -> Tensor:
    """Token ratios as they are ([B, T]), or their product over the sequence ([B, 1])."""
    return log_ratio if level == "token" else log_ratio.sum(1, keepdim=True)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: the mean of [B, T] over each sequence's completion tokens (0 for an empty one)."""
    return torch.where(mask, values, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def check_level(owner: Any) -> None:
    """Raise ``UsageError`` unless ``owner.level`` is a level."""
    if owner.level not in get_args(Level):
        raise UsageError(f"{type(owner).__name__}.level={owner.level!r} is not 'token' or 'sequence'")


def check_positive(owner: Any, *names: str) -> None:
    """Raise ``UsageError`` unless each named field is above 0."""
    for name in names:
        if not getattr(owner, name) > 0:
            raise UsageError(f"{type(owner).__name__}.{name}={getattr(owner, name)!r} must be above 0")


@dataclass(frozen=True)
class Product(Correction):
    """The product of several corrections, of which at most one is a trust region and at most one corrects mu: what an
    id such as ``truncated-is*ppo-clip`` makes. Beside a trust region, which carries pi / pi_old, the other factors are
    evaluated at pi_old: they correct pi_old / mu, as in decoupled PPO (arXiv 2110.00641). A mask may ask for pi.

    No ratio is counted twice: two clips of pi / pi_old, such as ``ppo-clip*gspo``, would weigh by about its square,
    which is the gradient of no loss. Masks hold no ratio, so that any number of them may stand beside the others.
    """

    factors: tuple[Any, ...]

    def __post_init__(self) -> None:
        for trait, ratio in (("trust_region", "pi / pi_old"), ("corrects_mu", "the ratio to mu")):
            holders = [type(factor).__name__ for factor in self.factors if getattr(traits(factor), trait)]
            if len(holders) > 1:
                raise UsageError(
                    f"a product counts a ratio once, but {' and '.join(holders)} each hold {ratio}: keep one of them "
                    f"(a mask of your own, which only drops, declares {trait} = False)"
                )

    @property
    def scope(self) -> str:  # type: ignore[override]
        return max((traits(factor).scope for factor in self.factors), key=SCOPES.index)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        others = [f for f in self.factors if not traits(f).trust_region and not traits(f).is_identity]
        correcting = others or [f for f in self.factors if traits(f).corrects_mu]
        return len(correcting) == 1 and traits(correcting[0]).unbiased

    @property
    def corrects_mu(self) -> bool:  # type: ignore[override]
        return any(traits(factor).corrects_mu for factor in self.factors)

    @property
    def on_policy(self) -> float | None:  # type: ignore[override]
        values = [traits(factor).on_policy for factor in self.factors]
        product = 1.0
        for value in values:
            if value is None:
                return None
            product *= value
        return product

    @property
    def needs_old_logp(self) -> bool:  # type: ignore[override]
        return any(traits(factor).needs_old_logp for factor in self.factors)

    @property
    def trust_region(self) -> bool:  # type: ignore[override]
        return any(traits(factor).trust_region for factor in self.factors)

    @property
    def mixed(self) -> bool:  # type: ignore[override]
        return any(traits(factor).mixed for factor in self.factors)

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        at_old = logp
        if self.trust_region:
            log_r(logp, rollout)  # raises where old_logp is missing
            assert rollout.old_logp is not None
            at_old = rollout.old_logp
        weight = torch.ones_like(logp, dtype=torch.float64)
        for factor in self.factors:
            point = logp if traits(factor).trust_region or traits(factor).at_pi else at_old
            weight = weight * factor(point.double(), rollout, advantage).double()
        weight = weight.clamp(max=torch.tensor(MAX_LOG_WEIGHT).exp().item())
        return torch.where(rollout.mask, weight, 0.0).to(_weight_dtype(logp))


@corrections.combine_with
def product(factors: tuple[Any, ...]) -> Product:
    """``a*b`` of the registry."""
    return Product(factors)
