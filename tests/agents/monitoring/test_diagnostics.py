"""Diagnostics: closed forms of Gaussian log ratios, collapse that is seen, padding that is not."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.corrections import weigh
from agents.monitoring.diagnostics import (
    BySubset,
    CollapsedRatios,
    by_length,
    collapse,
    design_weights,
    diagnostics,
    ess,
    noise_floor,
    warn_collapse,
    weight_diagnostics,
)
from agents.objective.advantages import DownSampled, DrGRPO
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
    assert found["overlap_q05"] == found["overlap_token_q05"] == pytest.approx(1)
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
    found = diagnostics(logp, rollout) | weight_diagnostics(weight, logp, rollout)
    clamped = log_ratio.sum(1).clamp(-math.log(2), math.log(2))
    assert ess(clamped) >= 0.64 > 0.1 > found["ess_sequence"]
    assert 0 < found["weight_shrunk"] < 1 and found["weight_zero"] == 0
    with pytest.warns(CollapsedRatios, match="Skip fewer layers"):
        message = warn_collapse(found)
    assert message is not None and f"D = {found['D']:.2g}" in message


@pytest.mark.parametrize(("gap", "shrunk"), [(0.01, 0.0), (0.2, 1.0)])
def test_rounding_between_engine_and_trainer_shrinks_no_weight(gap, shrunk):
    """A weight of 1 where the ratio of one model to itself is not quite 1, as in bfloat16."""
    logp, rollout = rollout_of(torch.full((4, 5), gap))
    assert weight_diagnostics(torch.ones(4, 5), logp, rollout)["weight_shrunk"] == shrunk


def test_near_policies_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_collapse(diagnostics(*rollout_of(gaussian(64, 20, 0.05)))) is None
        assert warn_collapse({}) is None


def test_a_step_without_weight_is_a_collapse():
    logp, rollout = rollout_of(gaussian(8, 4, 0.01))
    assert "every token the weight 0" in str(collapse(weight_diagnostics(torch.zeros(8, 4), logp, rollout)))


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
    assert weight_diagnostics(weight, logp, mixed)["weight_zero"] == 0
    design = design_weights(torch.zeros(8), mixed, 1.0, np.random.default_rng(0))
    assert torch.equal(design, (~by_target).double())
    assert noise_floor(logp, mixed) == {}


def test_noise_floor_is_the_gap_on_the_same_layers():
    gap = torch.tensor([[0.01, -0.03], [0.02, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    found = noise_floor(*rollout_of(gap, mask))
    assert found["noise_mean"] == pytest.approx(0.02) and found["noise_max"] == pytest.approx(0.03)
    assert found["noise_kl"] == pytest.approx((0.01**2 + 0.03**2 + 0.02**2) / 2 / 3, rel=0.02)


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


def rewarded(problems: int, seed: int, group: int = 4) -> tuple[torch.Tensor, Rollout, torch.Tensor]:
    """Completions whose reward depends on their own log ratio and on a problem's difficulty, as in a nested rollout:
    what the target would not have written is mostly wrong. Their lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(problems * group, 6, generator=generator, dtype=torch.float64) * 0.4 - 0.08
    length = torch.randint(1, 7, (problems * group,), generator=generator)
    mask = torch.arange(6) < length[:, None]
    logp, rollout = rollout_of(torch.where(mask, drawn, 0.0), mask)
    ease = torch.randn(problems, generator=generator, dtype=torch.float64).repeat_interleave(group) * 3
    noise = torch.randn(problems * group, generator=generator, dtype=torch.float64)
    reward = ((drawn * mask).sum(1) * 3 + ease + 3 + noise > 0).float()
    rollout = replace(rollout, reward=reward)
    return logp, rollout, DrGRPO()(reward, rollout.group)


def test_estimates_are_of_all_completions_and_not_of_those_with_a_signal():
    """Problems are mostly solved, so that those without a signal are nearer to the target. A false alarm of one of
    seven figures at three standard errors has a probability of 2 %; the seeds are fixed."""
    names = ("D", "kl_k1", "kl_k3", "tv", "ess_token", "chi2_token", "log_ratio_q50")

    def errors(share: float) -> np.ndarray:
        """[rollouts, names]: estimates from a share of the completions, minus the figures of all of them."""
        found = []
        for seed in range(300):
            logp, rollout, advantage = rewarded(problems=64, seed=seed)
            design = design_weights(advantage, rollout, share, np.random.default_rng(seed))
            measured, whole = diagnostics(logp, rollout, design), diagnostics(logp, rollout)
            found.append([measured[name] - whole[name] for name in names])
        return np.array(found)

    sampled, used = errors(1 / 8), errors(0.0)
    limit = 3 * sampled.std(0) / math.sqrt(len(sampled))
    assert (abs(sampled.mean(0)) < limit).all()
    assert (abs(used.mean(0)) > limit * [5, 5, 1, 5, 1, 1, 1]).all()


@pytest.mark.parametrize("advantage_of", [DrGRPO(), DownSampled(keep=2)])
def test_every_completion_without_an_advantage_is_drawn_with_the_same_probability(advantage_of):
    _, rollout, _ = rewarded(problems=20, seed=3)
    advantage = advantage_of(rollout.reward, rollout.group)
    silent = advantage == 0
    draws = [design_weights(advantage, rollout, 1 / 8, np.random.default_rng(n)) for n in range(4_000)]
    scored = {int((design[silent] > 0).sum()) for design in draws}
    assert scored == {max(2, math.ceil(int(silent.sum()) / 8))}
    for design in draws:
        assert float(design.sum()) == pytest.approx(len(rollout))  # so a mean of ones is 1
        assert (design[~silent] == 1).all()
    mean = torch.stack(draws).mean(0)
    ratio = int(silent.sum()) / scored.pop()
    assert (mean - 1).abs().max() < 5 * math.sqrt((ratio - 1) / len(draws))


def test_the_whole_share_and_none_are_all_and_those_used():
    logp, rollout, advantage = rewarded(problems=16, seed=1)
    every = design_weights(advantage, rollout, 1.0, np.random.default_rng(0))
    assert torch.equal(every, torch.ones(len(rollout), dtype=torch.float64))
    assert diagnostics(logp, rollout, every) == diagnostics(logp, rollout)
    none = design_weights(advantage, rollout, 0.0, np.random.default_rng(0))
    assert torch.equal(none > 0, advantage != 0)
    few = design_weights(torch.zeros(2), rollout.select(torch.arange(2)), 0.01, np.random.default_rng(0))
    assert torch.equal(few, torch.ones(2, dtype=torch.float64))


def test_a_weight_is_as_many_copies():
    """Every figure of weighted completions is that of a rollout that holds each of them so many times, but for how many
    stand behind it: that is Kish's number."""
    logp, rollout, _ = rewarded(problems=3, seed=5)
    design = torch.tensor([1, 0, 3, 2] * 3, dtype=torch.float64)
    copies = torch.arange(12).repeat_interleave(design.long())
    found = diagnostics(logp, rollout, design)
    wanted = diagnostics(logp[copies], replace(rollout, by_target=None).select(copies))
    counts, tokens = ("sequences", "tokens", "mean_length"), rollout.mask.sum(1)
    for name in found.keys() - {*counts}:
        assert found[name] == pytest.approx(wanted[name]), name
    assert found["sequences"] == pytest.approx(design.sum() ** 2 / (design**2).sum())
    assert found["tokens"] == pytest.approx((design * tokens).sum() ** 2 / (design**2 * tokens).sum())
    assert found["mean_length"] == float(tokens.double().mean())


def test_the_overlap_of_two_distributions_and_its_tail():
    """Enumerated: every token of a vocabulary once, standing for as many as mu draws of it."""
    generator = torch.Generator().manual_seed(0)
    mu, pi = torch.randn(2, 9, generator=generator, dtype=torch.float64).softmax(1)
    found = diagnostics(*rollout_of((pi / mu).log()[:, None]), design=1_000 * mu)
    assert 1 - found["tv"] == pytest.approx(float(torch.minimum(mu, pi).sum()))
    assert found["kl_k1"] == pytest.approx(float((mu * (mu / pi).log()).sum()))
    # a hundred completions of two tokens that agree by n % and wholly; one in twenty is at the lowest five
    agreement = torch.arange(1, 101, dtype=torch.float64) / 100
    log_ratio = torch.stack([agreement.log(), agreement + 1], 1)
    tail = diagnostics(*rollout_of(log_ratio))
    assert tail["overlap_q05"] == pytest.approx((0.05 + 1) / 2)
    assert tail["overlap_token_q05"] == pytest.approx(0.10)


def test_by_length_parts_the_completions_and_adds_up_to_the_whole():
    """With every completion measured the mean of D over the quarters is D; the longest are the farthest."""
    lengths = torch.tensor([1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9])
    mask = torch.arange(9) < lengths[:, None]
    log_ratio = torch.where(mask, gaussian(12, 9, 0.3), 0.0)
    logp, rollout = rollout_of(log_ratio, mask)
    right = [n % 3 == 0 for n in range(12)]
    ends = ["length" if n > 9 else "eos" for n in range(12)]
    infos = tuple({"is_success": r, "finish_reason": e} for r, e in zip(right, ends, strict=True))
    found = by_length(logp, replace(rollout, episodes=infos), torch.ones(12))
    quarters = [range(3), range(3, 6), range(6, 9), range(9, 12)]
    for n, rows in enumerate(quarters, 1):
        part = diagnostics(*rollout_of(log_ratio[list(rows)], mask[list(rows)]))
        assert found[f"length_{n}/D"] == pytest.approx(part["D"])
        assert found[f"length_{n}/ess_sequence"] == pytest.approx(part["ess_sequence"])
        assert found[f"length_{n}/mean_length"] == pytest.approx(float(lengths[list(rows)].double().mean()))
        assert found[f"length_{n}/right"] == pytest.approx(1 / 3)
        assert found[f"length_{n}/cut_off"] == pytest.approx(2 / 3 if n == 4 else 0)
    mean = np.mean([found[f"length_{n}/D"] for n in range(1, 5)])
    assert mean == pytest.approx(diagnostics(logp, rollout)["D"])
    equal = by_length(*rollout_of(gaussian(8, 5, 0.3)), torch.ones(8))
    assert {name.partition("/")[0] for name in equal} == {"length_1"}, "equal lengths are not parted"
