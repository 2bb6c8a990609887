"""Every weight against the loss it comes from: autograd of the published formula, and TRL's loss where installed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import agents  # noqa: F401  registers the components
from agents.corrections import weigh
from agents.rollout import Rollout
from registry import aggregations, corrections

MAX_TOKENS = 11
LENGTHS = torch.tensor([9, 4, 1, 7, 9, 2, 6, 9])


def setting(seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Rollout, Tensor]:
    """log pi, a rollout whose ratios lie on both sides of every clip, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < LENGTHS[:, None]

    def random(scale: float) -> Tensor:
        return scale * torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    logp = -random(1.0).abs() - 0.01
    group = torch.arange(8) // 4
    rollout = Rollout(
        prompts=(torch.zeros(1, dtype=torch.long),) * 8,
        tokens=torch.zeros(mask.shape, dtype=torch.long),
        mask=mask,
        behavior_logp=logp + random(0.5),
        reward=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]),
        group=group,
        old_logp=logp + random(spread),
    )
    return logp, rollout, torch.tensor([1.3, -0.7, -0.9, 0.4, -0.2, -1.1, 0.8, -0.3], dtype=torch.float64)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[kept].mean() for row, kept in zip(values, mask, strict=True)]).mean()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].mean()


def clipped(r: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def ppo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    return -token_mean(clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.2), rollout.mask)


def grpo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    return -sequence_mean(clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.2), rollout.mask)


def dapo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    return -token_mean(clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.28), rollout.mask)


def dual_clip(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """Arxiv 1912.09729, eq. 5, which bounds the loss of a negative advantage: max(min(r A, clip(r) A), c A)."""
    surrogate = clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.2)
    return -token_mean(torch.where(a < 0, torch.maximum(surrogate, 1.5 * a), surrogate), rollout.mask)


def dr_grpo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    value = clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.2)
    return -(value * rollout.mask).sum() / (len(a) * MAX_TOKENS)


def gspo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    log_ratio = ((logp - rollout.old_logp) * rollout.mask).sum(1) / rollout.mask.sum(1)
    return -clipped(log_ratio.exp(), a[:, 0], 0.05, 0.08).mean()


def luspo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """GSPO's surrogate of every completion times its length."""
    length = rollout.mask.sum(1)
    s = (((logp - rollout.old_logp) * rollout.mask).sum(1) / length).exp()
    return -(clipped(s, a[:, 0], 0.05, 0.08) * length).mean()


def gmpo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(a)):
        kept = rollout.mask[row]
        r = (logp[row][kept] - rollout.old_logp[row][kept]).exp()
        bounded = torch.minimum(r * a[row], r.clamp(torch.tensor(-0.4).exp(), torch.tensor(0.4).exp()) * a[row])
        total = total - torch.sign(a[row, 0]) * bounded.abs().prod() ** (1 / int(kept.sum()))
    return total / len(a)


def cispo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    r = (logp - rollout.old_logp).exp().detach()
    return -token_mean(r.clamp(1 - 0.3, 1 + 0.2) * a * logp, rollout.mask)


def sapo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    r = (logp - rollout.old_logp).exp()
    tau = torch.where(a > 0, 1.0, 1.05)
    return -sequence_mean(torch.sigmoid(tau * (r - 1)) * 4 / tau * a, rollout.mask)


def decoupled(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    staleness = (rollout.old_logp - rollout.behavior_logp).exp()
    return -token_mean(staleness * clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.2), rollout.mask)


def topr(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    whole = torch.where(rollout.mask, logp - rollout.behavior_logp, 0.0).sum(1, keepdim=True)
    failures = whole.clamp(max=0).exp().detach()
    return -(torch.where(a > 0, a, a * failures) * logp * rollout.mask).sum() / len(a)


def truncated_grpo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    truncated = (rollout.old_logp - rollout.behavior_logp).exp().clamp(max=1.5)
    return -sequence_mean(truncated * clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.2), rollout.mask)


def vespo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    w = torch.where(rollout.mask, logp - rollout.behavior_logp, 0.0).sum(1, keepdim=True).exp().detach()
    gate = torch.where(a >= 0, w**2 * torch.exp(3 * (1 - w)), w**3 * torch.exp(2 * (1 - w)))
    return -token_mean(gate * a * logp, rollout.mask)


def dppo(divergence: str, logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """Arxiv 2602.04879: truncated importance weights on the tokens inside the region, by torch's own Bernoulli."""
    now, old = logp.detach(), rollout.old_logp
    p, q = torch.distributions.Bernoulli(now.exp()), torch.distributions.Bernoulli(old.exp().clamp(max=1))
    apart = {"tv": (p.probs - q.probs).abs(), "kl": torch.distributions.kl_divergence(q, p)}[divergence]
    outward = (now > old) == (a > 0)
    kept = ~(outward & (apart > 0.1)).detach()
    return -token_mean((now - old).exp().clamp(max=1.6) * kept * a * logp, rollout.mask)


def opsm(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """Arxiv 2512.02556: GRPO's surrogate without the failures that have drifted from what wrote them."""
    values = clipped((logp - rollout.old_logp).exp(), a, 0.2, 0.2)
    drift = torch.stack(
        [row[kept].mean() for row, kept in zip(rollout.behavior_logp - logp, rollout.mask, strict=True)]
    )
    return -sequence_mean(values * ((a >= 0) | (drift[:, None] <= 0.05)).detach(), rollout.mask)


def acr(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """Arxiv 2602.13953: what truncation scales a weight by widens the upper clip."""
    r, w = (logp - rollout.old_logp).exp(), (rollout.old_logp - rollout.behavior_logp).exp()
    scale = (1.2 / w).clamp(max=1)
    bounded = torch.minimum(r.clamp(min=0.8), 1.2 / scale)
    return -token_mean(w * scale * torch.minimum(r * a, bounded * a), rollout.mask)


def a3po(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """Arxiv 2512.06547 at a lag of 3 updates: decoupled PPO about a proximal policy that carries no gradient."""
    proximal = rollout.behavior_logp / 3 + logp.detach() * 2 / 3
    staleness = (proximal - rollout.behavior_logp).exp()
    return -token_mean(staleness * clipped((logp - proximal).exp(), a, 0.1, 0.1), rollout.mask)


def m2po(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """Arxiv 2510.01161, algorithm 1: the farthest token leaves until the mean square of the rest is low enough."""
    log_ratio = (logp - rollout.behavior_logp).detach()
    places = [(i, t) for i, t in rollout.mask.nonzero().tolist() if float(log_ratio[i, t] * a[i, 0]) > 0]
    kept = torch.ones_like(logp)
    while sum(float(log_ratio[p]) ** 2 for p in places) > 0.1 * len(places):
        worst = max(places, key=lambda p: abs(float(log_ratio[p])))
        kept[worst] = 0.0
        places.remove(worst)
    return -token_mean(kept * (logp - rollout.behavior_logp).exp() * a, rollout.mask)


def mix_ppo(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """ReMix, arXiv 2507.06892: PPO's pessimistic surrogate in pi / pi_{k-i}, clipped about pi_k / pi_{k-i}."""
    ratio, centre = (logp - rollout.behavior_logp).exp(), (rollout.old_logp - rollout.behavior_logp).exp()
    bounded = torch.minimum(torch.maximum(ratio, centre - 0.2), centre + 0.2)
    return -token_mean(torch.minimum(ratio * a, bounded * a), rollout.mask)


def upft(logp: Tensor, rollout: Rollout, a: Tensor) -> Tensor:
    """UPFT, arXiv 2503.02875: cross-entropy of the first tokens, here 3, of every completion; a is 1 there."""
    return -token_mean(logp * (torch.arange(logp.shape[1]) < 3) * a, rollout.mask)


PUBLISHED: list[tuple[Callable[[Tensor, Rollout, Tensor], Tensor], str, dict[str, float], str, dict[str, int]]] = [
    (ppo, "ppo-clip", {}, "token-mean", {}),
    (grpo, "ppo-clip", {}, "sequence-mean", {}),
    (grpo, "practical", {}, "sequence-mean", {}),
    (dapo, "ppo-clip", {"eps_high": 0.28}, "token-mean", {}),
    (dual_clip, "ppo-clip", {"dual_clip": 1.5}, "token-mean", {}),
    (dr_grpo, "ppo-clip", {}, "constant", {"max_tokens": MAX_TOKENS}),
    (gspo, "gspo", {"eps_low": 0.05, "eps_high": 0.08}, "sequence-mean", {}),
    (gmpo, "gmpo", {}, "sequence-mean", {}),
    (cispo, "cispo", {"eps_low": 0.3, "eps_high": 0.2}, "token-mean", {}),
    (sapo, "sapo", {}, "sequence-mean", {}),
    (decoupled, "decoupled-ppo", {}, "token-mean", {}),
    (decoupled, "base", {}, "token-mean", {}),
    (decoupled, "token-is*ppo-clip", {}, "token-mean", {}),
    (topr, "topr", {}, "constant", {}),
    (truncated_grpo, "truncated-is*ppo-clip", {"cap": 1.5}, "sequence-mean", {}),
    (vespo, "vespo", {}, "token-mean", {}),
    (partial(dppo, "tv"), "dppo-tv", {"delta_low": 0.1, "delta_high": 0.1, "cap": 1.6}, "token-mean", {}),
    (partial(dppo, "kl"), "dppo-kl", {"delta_low": 0.1, "delta_high": 0.1, "cap": 1.6}, "token-mean", {}),
    (opsm, "opsm*ppo-clip", {"delta": 0.05}, "sequence-mean", {}),
    (acr, "acr", {"cap": 1.2}, "token-mean", {}),
    (a3po, "a-3po", {"alpha": 1 / 3, "eps_low": 0.1, "eps_high": 0.1}, "token-mean", {}),
    (m2po, "m2po", {"moment": 0.1}, "token-mean", {}),
    (luspo, "luspo", {"eps_low": 0.05, "eps_high": 0.08}, "sequence-mean", {}),
    (mix_ppo, "mix-ppo", {}, "token-mean", {}),
    (upft, "first-tokens", {"tokens": 3}, "token-mean", {}),
]


def gradient(loss: Callable[[Tensor], Tensor], logp: Tensor) -> Tensor:
    leaf = logp.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def ours(id: str, fields: dict[str, float], aggregation: str, options: dict[str, int], case: tuple) -> Tensor:
    logp, rollout, advantage = case
    weight = weigh(corrections.make(id, **fields), logp, rollout, advantage)
    coef = aggregations.make(aggregation, **options)(rollout.mask).double()
    return gradient(lambda leaf: -((coef * weight * advantage[:, None]).detach() * leaf).sum(), logp)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "case", PUBLISHED, ids=[f"{getattr(case[0], 'func', case[0]).__name__}-{case[1]}" for case in PUBLISHED]
)
def test_gradient_equals_the_published_loss(case, seed):
    published, id, fields, aggregation, options = case
    logp, rollout, advantage = setting(seed)
    expected = gradient(lambda leaf: published(leaf, rollout, advantage[:, None]), logp)
    # float32 coefficients of the aggregation are the limit
    torch.testing.assert_close(
        ours(id, fields, aggregation, options, (logp, rollout, advantage)), expected, rtol=1e-6, atol=1e-12
    )


def test_the_setting_reaches_every_branch():
    logp, rollout, advantage = setting()
    r = (logp - rollout.old_logp).exp()[rollout.mask]
    a = advantage[:, None].expand(rollout.mask.shape)[rollout.mask]
    branches = [
        (a > 0) & (r > 1.28),
        (a > 0) & (r < 0.8),
        (a < 0) & (r > 1.2) & (r < 1.5),
        (a < 0) & (r > 1.5),
        (a < 0) & (r < 0.8),
        (r - 1).abs() < 0.2,
    ]
    assert all(int(branch.sum()) >= 2 for branch in branches)


TRL = [
    ("grpo", {}, "ppo-clip", {}, "sequence-mean", {}),
    ("bnpo", {}, "ppo-clip", {}, "token-mean", {}),
    ("dapo", {"epsilon_high": 0.28}, "ppo-clip", {"eps_high": 0.28}, "token-mean", {}),
    ("dr_grpo", {}, "ppo-clip", {}, "constant", {"max_tokens": MAX_TOKENS}),
    ("grpo", {"delta": 1.5}, "ppo-clip", {"dual_clip": 1.5}, "sequence-mean", {}),
    ("cispo", {"epsilon_high": 1.2}, "cispo", {"eps_high": 0.2}, "token-mean", {}),
    ("sapo", {}, "sapo", {}, "sequence-mean", {}),
    ("grpo", {"importance_sampling_level": "sequence"}, "gspo", {"eps_low": 0.2, "eps_high": 0.2}, "sequence-mean", {}),
    ("grpo", {"use_vllm": True}, "truncated-is*ppo-clip", {"cap": 1.5}, "sequence-mean", {}),
    ("vespo", {"cap": math.inf}, "vespo", {}, "token-mean", {}),
    ("grpo", {"off_policy_mask_threshold": 0.05}, "opsm*ppo-clip", {"delta": 0.05}, "sequence-mean", {}),
    (
        "luspo",
        {"importance_sampling_level": "sequence"},
        "luspo",
        {"eps_low": 0.2, "eps_high": 0.2},
        "sequence-mean",
        {},
    ),
]


@pytest.mark.parametrize("case", TRL, ids=[f"{case[0]}-{case[2]}" for case in TRL])
def test_gradient_equals_trl(case):
    trainer = pytest.importorskip("trl", reason="TRL is not installed").GRPOTrainer
    loss_type, settings, id, fields, aggregation, options = case
    logp, rollout, advantage = setting()
    functions = {name: getattr(trainer, name) for name in ("get_gamma_weights", "get_off_policy_mask")}
    settings = {"cap": 1.5, **functions, **settings}
    staleness = torch.where(rollout.mask, rollout.old_logp - rollout.behavior_logp, 0.0).exp()
    truncated = staleness.clamp(max=settings.pop("cap"))
    inputs = {
        "prompt_ids": torch.zeros(8, 1, dtype=torch.long),
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": rollout.tokens,
        "completion_mask": rollout.mask.long(),
        "advantages": advantage,
        "old_per_token_logps": rollout.old_logp,
        "sampling_per_token_logps": rollout.behavior_logp,
        "num_items_in_batch": rollout.mask.sum(),
        "importance_sampling_ratio": truncated,
    }
    expected = gradient(lambda leaf: trainer._compute_loss(trl_stand_in(leaf, loss_type, settings), None, inputs), logp)
    found = ours(id, fields, aggregation, options, (logp, rollout, advantage))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def trl_stand_in(logp: Tensor, loss_type: str, settings: dict[str, object]) -> SimpleNamespace:
    """What TRL's loss reads of its trainer; the log-probabilities are given instead of computed by a model."""
    arguments = SimpleNamespace(
        delta=None,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        use_bias_correction_kl=False,
        steps_per_generation=1,
    )
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    known = {
        "args": arguments,
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "loss_type": loss_type,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logp, torch.zeros_like(logp), None),
    }
    arguments.delta = settings.get("delta")
    return SimpleNamespace(**{**known, **settings})
