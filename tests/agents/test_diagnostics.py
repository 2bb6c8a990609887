"""Diagnostics: closed forms of Gaussian log ratios, collapse that is seen, padding that is not."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from agents.corrections import weigh
from agents.diagnostics import (
    BySubset,
    CollapsedRatios,
    collapse,
    diagnostics,
    ess,
    noise_floor,
    warn_collapse,
)
from agents.rollout import Rollout
from registry import corrections


def rollout_of(log_ratio: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, Rollout]:
    """log pi and a rollout with these log(pi/mu) [B, T]."""
    count, width = log_ratio.shape
    logp = torch.full((count, width), -2.0, dtype=torch.float64)
    rollout = Rollout(
        prompts=(torch.zeros(1, dtype=torch.long),) * count,
        tokens=torch.zeros(count, width, dtype=torch.long),
        mask=torch.ones(count, width, dtype=torch.bool) if mask is None else mask,
        behavior_logp=logp - log_ratio,
        reward=torch.zeros(count),
        group=torch.arange(count) // 4,
        old_logp=logp,
    )
    return logp, rollout


def gaussian(count: int, width: int, sigma: float) -> torch.Tensor:
    """log(pi/mu) under mu whose exponential has mean 1: normal with mean -sigma^2/2, so KL = sigma^2/2 per token."""
    generator = torch.Generator().manual_seed(0)
    return sigma * torch.randn(count, width, generator=generator, dtype=torch.float64) - sigma**2 / 2


def test_gaussian_ratios_have_their_closed_forms():
    sigma, width, count = 0.2, 10, 20_000
    found = diagnostics(*rollout_of(gaussian(count, width, sigma)))
    kl = sigma**2 / 2
    # tolerances: five standard errors of each mean, so a false alarm is below 1e-6 per figure (the seed is fixed)
    error = 5 / math.sqrt(count * width)
    assert found["kl_k1"] == pytest.approx(kl, abs=error * sigma)
    assert found["kl_k3"] == pytest.approx(kl, abs=error * 2 * sigma**2)
    assert found["D"] == pytest.approx(width * kl, abs=5 * sigma * math.sqrt(width / count))
    assert found["ess_token"] == pytest.approx(math.exp(-(sigma**2)), abs=0.01)
    assert found["ess_sequence"] == pytest.approx(math.exp(-2 * width * kl), abs=0.03)
    assert found["chi2_token"] == pytest.approx(math.expm1(sigma**2), abs=0.01)
    assert found["tv"] == pytest.approx(math.erf(sigma / 2 / math.sqrt(2)), abs=error)
    assert found["log_ratio_q99"] == pytest.approx(-kl + 2.3263 * sigma, abs=0.02)
    assert found["log_ratio_q01"] <= found["log_ratio_q50"] <= found["log_ratio_q99"]
    assert found["mean_length"] == width and found["sequences"] == count and found["tokens"] == count * width


def test_nested_equals_target_is_zero_everywhere():
    found = diagnostics(*rollout_of(torch.zeros(8, 5, dtype=torch.float64)))
    for name in ("kl_k1", "kl_k3", "D", "chi2", "chi2_token", "tv", "tv_sequence", "log_ratio_q99"):
        assert found[name] == pytest.approx(0, abs=1e-12)
    assert found["ess_sequence"] == pytest.approx(1) and found["ess_token"] == pytest.approx(1)
    assert collapse(found) is None


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_finite_at_extreme_ratios(sign):
    log_ratio = torch.full((6, 50), 80.0 * sign, dtype=torch.float64)
    log_ratio[0] = -80.0
    found = diagnostics(*rollout_of(log_ratio))
    assert all(math.isfinite(value) for value in found.values())


def test_collapse_is_seen_although_the_weights_were_truncated():
    log_ratio = gaussian(64, 100, 0.6)
    logp, rollout = rollout_of(log_ratio)
    weight = weigh(corrections.make("truncated-is"), logp, rollout, torch.ones(64))
    found = diagnostics(logp, rollout, weight)
    clamped = log_ratio.sum(1).clamp(-math.log(2), math.log(2))
    assert ess(clamped) >= 0.64 > 0.1 > found["ess_sequence"]
    assert 0 < found["weight_shrunk"] < 1 and found["weight_zero"] == 0
    with pytest.warns(CollapsedRatios, match="Skip fewer layers"):
        message = warn_collapse(found)
    assert message is not None and f"D = {found['D']:.2g}" in message


def test_near_policies_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_collapse(diagnostics(*rollout_of(gaussian(64, 20, 0.05)))) is None
        assert warn_collapse({}) is None


def test_a_step_without_weight_is_a_collapse():
    logp, rollout = rollout_of(gaussian(8, 4, 0.01))
    assert "every token the weight 0" in str(collapse(diagnostics(logp, rollout, torch.zeros(8, 4))))


def test_padding_changes_nothing():
    log_ratio = gaussian(6, 8, 0.5)
    mask = torch.arange(8) < torch.tensor([8, 3, 1, 5, 8, 2])[:, None]
    logp, rollout = rollout_of(log_ratio, mask)
    junk = torch.where(mask, 0.0, 9.0)
    disturbed = replace(rollout, behavior_logp=rollout.behavior_logp - junk)
    assert diagnostics(logp, rollout) == diagnostics(logp + junk, disturbed)
    assert diagnostics(logp, rollout)["D"] == pytest.approx(float(-(log_ratio * mask).sum() / 6))


def test_completions_by_the_target_say_nothing_of_the_nested_policy():
    logp, rollout = rollout_of(gaussian(8, 4, 0.5))
    by_target = torch.arange(8) % 4 == 0
    mixed = replace(rollout, by_target=by_target)
    own = (~by_target).nonzero()[:, 0]
    assert diagnostics(logp, mixed)["kl_k1"] == diagnostics(logp[own], rollout.select(own))["kl_k1"]
    weight = torch.where(by_target[:, None], 0.0, torch.ones(8, 4))
    assert diagnostics(logp, replace(mixed, old_logp=None), weight)["weight_zero"] == 0
    assert noise_floor(logp, mixed) == {}


def test_noise_floor_is_the_gap_on_the_same_layers():
    gap = torch.tensor([[0.01, -0.03], [0.02, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    found = noise_floor(*rollout_of(gap, mask))
    assert found["noise_mean"] == pytest.approx(0.02) and found["noise_max"] == pytest.approx(0.03)


def test_an_empty_rollout_has_no_divergence():
    logp, rollout = rollout_of(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool))
    assert diagnostics(logp, rollout) == {"mean_length": 0.0}


def test_by_subset_weights_by_tokens():
    table = BySubset()
    one = diagnostics(*rollout_of(torch.full((2, 3), -0.1, dtype=torch.float64)))
    two = diagnostics(*rollout_of(torch.full((6, 3), -0.5, dtype=torch.float64)))
    table.add((0, 2), one)
    table.add((0, 2), two)
    table.add((0, 1), one)
    table.add((0, 1), {})
    assert table.table()[(0, 2)]["kl_k1"] == pytest.approx(0.4)
    assert table.table()[(0, 2)]["rollouts"] == 2 and table.table()[(0, 1)]["tokens"] == 6
