"""The sampler under a divergence budget, in simulated worlds where the true costs are known and drift."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from policies import BudgetAllowsNothing
from policies.skipping.costs import LayerCosts
from registry import UsageError, skip_samplers

LAYERS, TOKENS = 20, 30.0
CHEAP = [4, 9, 13, 16]


class World:
    """KL(S) = n ** gamma * sum of costs, observed with noise; costs drift by ``trend`` per batch."""

    def __init__(self, gamma: float = 0.4, trend: float = 0.0, noise: float = 0.15, dear: float = 0.05) -> None:
        self.costs = np.full(LAYERS, dear)
        self.costs[CHEAP] = 0.0006
        self.gamma, self.trend, self.noise = gamma, trend, noise
        self.rng = np.random.default_rng(7)

    def kl(self, skipped: list[int]) -> float:
        return float(len(skipped) ** self.gamma * self.costs[skipped].sum())

    def truth(self, skipped: list[int]) -> float:
        """D."""
        return self.kl(skipped) * TOKENS if skipped else 0.0

    def measured(self, skipped: list[int]) -> dict[str, float]:
        return {name: self.kl(skipped) * np.exp(self.noise * self.rng.normal()) for name in ("kl_k1", "kl_k3")}

    def run(self, sampler, batches: range) -> list[tuple[list[int], float]]:
        """Each batch's skipped layers and their ``truth``."""
        drawn = []
        for batch in batches:
            kept = sampler.sample(LAYERS, np.random.default_rng([1, batch]))
            skipped = [n for n in range(LAYERS) if n not in kept]
            sampler.observe(kept, {"mean_length": TOKENS, **(self.measured(skipped) if skipped else {})})
            drawn.append((skipped, self.truth(skipped)))
            self.costs *= np.exp(self.trend)
        return drawn


def test_a_batch_of_few_tokens_moves_the_belief_less() -> None:
    """The KL of n tokens varies as 1/n: below 300 the noise grows with what is missing, above it does not shrink."""

    def expected(tokens: float) -> float:
        sampler = skip_samplers.make("budget")
        kept = sampler.sample(LAYERS, np.random.default_rng(0))
        before = sampler._state["costs"].predict([4])[0]
        kept = tuple(n for n in range(LAYERS) if n != 4)
        sampler.observe(kept, {"mean_length": TOKENS, "kl_k1": 0.5, "kl_k3": 0.5, "tokens": tokens})
        return abs(sampler._state["costs"].predict([4])[0] - before)

    assert expected(3) < expected(30) < expected(300) == expected(30_000)


class WorldProbe:
    num_layers, longest = LAYERS, int(TOKENS)

    def __init__(self, world: World) -> None:
        self.world = world

    def kl(self, half=None):
        return self.world.costs.tolist()

    def set_kl(self, skipped):
        return self.world.kl(list(skipped))


@pytest.mark.parametrize("prepared", [True, False])
def test_planted_cheap_layers_are_found_and_the_budget_is_kept(prepared):
    world, sampler = World(), skip_samplers.make("budget", budget=0.2)
    if prepared:
        sampler.prepare(WorldProbe(world))
    found = world.run(sampler, range(120))
    late = found[60:]
    usual = max(map(tuple, (s for s, _ in late)), key=[tuple(s) for s, _ in late].count)
    assert set(usual) <= set(CHEAP)
    assert len(usual) >= 3
    if prepared:
        assert list(usual) == CHEAP
    divergence = np.array([d for _, d in late])
    assert np.median(divergence) < 0.2
    assert (divergence <= 0.2).mean() > 0.9  # the others are trials of layers that nothing is known of


@pytest.mark.parametrize("trend", [0.02, -0.02])
def test_the_budget_is_kept_while_the_target_moves(trend):
    """Costs change by a factor of 11 in 120 batches; the set follows, and so does what is saved."""
    world, sampler = World(trend=trend, dear=0.01), skip_samplers.make("budget", budget=0.2)
    world.costs[CHEAP] = 0.0004 if trend > 0 else 0.004
    sampler.prepare(WorldProbe(world))
    found = world.run(sampler, range(120))
    divergence = np.array([d for _, d in found])
    assert divergence.mean() < 0.2
    assert (divergence <= 0.2 * 1.25).mean() > 0.9
    first, last = (np.mean([len(s) for s, _ in part]) for part in (found[:20], found[-20:]))
    assert last < first - 1 if trend > 0 else last > first + 1


def test_a_resumed_sampler_goes_on_to_the_same_sets():
    world, sampler = World(), skip_samplers.make("budget", budget=0.2)
    sampler.prepare(WorldProbe(world))
    world.run(sampler, range(10))
    saved = json.loads(json.dumps(sampler.state_dict()))
    resumed = skip_samplers.make("budget", budget=0.2)
    resumed.load_state_dict(saved)
    first, second = World(), World()
    assert first.run(resumed, range(10, 40)) == second.run(sampler, range(10, 40))
    assert json.loads(json.dumps(resumed.state_dict())) == json.loads(json.dumps(sampler.state_dict()))


def test_where_nothing_fits_the_full_model_writes_and_that_is_said_once():
    world, sampler = World(), skip_samplers.make("budget", budget=0.006)
    sampler.prepare(WorldProbe(world))
    with pytest.warns(BudgetAllowsNothing, match="allows no layer") as caught:
        found = world.run(sampler, range(3))
    assert len(caught) == 1
    assert [skipped for skipped, _ in found] == [[], [], []]
    assert sampler.metrics() == {"sampler/predicted_D": 0.0, "sampler/trial": 0.0, "sampler/off": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later = world.run(sampler, range(3, 200))
    trials = [s for s, _ in later if s]
    assert 0 < len(trials) < 20  # what drifts is looked at again, seldom, one layer at a time
    assert all(len(s) == 1 for s in trials)


def test_predictions_are_those_of_the_model_and_observations_narrow_them():
    costs = LayerCosts.measured([0.1, 0.2, 0.4])
    costs.mean[-1] = 0.5
    assert costs.predict([0, 2])[0] == pytest.approx(np.log(2**0.5 * 0.5))
    _, before = costs.predict([0, 2])
    costs.update([0, 2], 2.0, noise=0.1)
    expected, after = costs.predict([0, 2])
    assert after < before / 2
    assert expected == pytest.approx(np.log(2.0), abs=0.25)
    assert costs.mean[1] == pytest.approx(np.log(0.2))  # nothing was learned of the layer left in
    assert np.linalg.eigvalsh(costs.covariance).min() > 0


def test_the_filter_agrees_with_linear_regression_where_one_layer_is_skipped_at_a_time():
    """Then the model is linear: the posterior mean is the precision-weighted mean of prior and observations."""
    costs, seen = LayerCosts.measured([0.1, 0.3]), [0.2, 0.15, 0.4]
    for kl in seen:
        costs.update([1], kl, noise=0.5)
    precision = 1 / 0.3**2 + len(seen) / 0.5**2
    wanted = (np.log(0.3) / 0.3**2 + np.log(seen).sum() / 0.5**2) / precision
    assert costs.mean[1] == pytest.approx(wanted)
    assert costs.covariance[1, 1] == pytest.approx(1 / precision)


def test_settings_that_cannot_work_are_refused():
    for bad in ({"budget": 0.0}, {"most": 1.0}, {"caution": -1.0}, {"explore": 2.0}, {"drift": -0.1}, {"noise": 0.0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            skip_samplers.make("budget", **bad).check(LAYERS)
    assert skip_samplers.make("budget", border=9).sample(18, np.random.default_rng(0)) == tuple(range(18))


class TailedWorld(World):
    """Where the 5th percentile of the completions' agreement is 1 - sqrt(c KL), within a few percent."""

    def __init__(self, c: float, **given: float) -> None:
        super().__init__(**given)
        self.c = c

    def truth(self, skipped: list[int]) -> float:
        """Overlap of the worst completions."""
        return 1 - min(1.0, np.sqrt(self.c * self.kl(skipped))) if skipped else 1.0

    def measured(self, skipped: list[int]) -> dict[str, float]:
        lost = (1 - self.truth(skipped)) * np.exp(0.05 * self.rng.normal())
        return {**super().measured(skipped), "overlap_q05": 1 - lost}


@pytest.mark.parametrize("c", [0.5, 2.0, 6.0])
def test_the_tail_is_held_whatever_it_is_to_the_mean(c: float) -> None:
    """A budget of D that would let all cheap layers go; the worst completions allow fewer where their c is large."""
    world, sampler = TailedWorld(c), skip_samplers.make("budget", budget=5.0, tail=0.94, explore=0.0)
    world.costs = np.linspace(0.0002, 0.004, LAYERS)
    sampler.prepare(WorldProbe(world))
    late = world.run(sampler, range(80))[30:]
    overlap = np.array([value for _, value in late])
    assert (overlap >= 0.94 - 0.015).mean() > 0.9
    skipped = np.mean([len(s) for s, _ in late])
    best = max(n for n in range(LAYERS // 2) if world.truth(list(range(1, n + 1))) >= 0.94)
    assert best - 2 <= skipped <= best, "as many as it allows, nearly"
    assert sampler.metrics()["sampler/predicted_overlap"] == pytest.approx(overlap[-1], abs=0.02)
    free = skip_samplers.make("budget", budget=5.0, explore=0.0)
    free.prepare(WorldProbe(world))
    assert np.mean([len(s) for s, _ in world.run(free, range(20))]) > skipped


def test_without_a_tail_nothing_of_it_is_heard() -> None:
    tailed = skip_samplers.make("budget", budget=0.2)
    tailed.prepare(WorldProbe(World()))
    TailedWorld(3.0).run(tailed, range(30))
    assert "tail_ratio" not in tailed.state_dict() and "sampler/predicted_overlap" not in tailed.metrics()


@pytest.mark.parametrize("tail", [-0.1, 1.0])
def test_a_tail_that_cannot_be_is_refused(tail: float) -> None:
    with pytest.raises(UsageError, match=f"tail={tail}"):
        skip_samplers.make("budget", tail=tail).check(LAYERS)
