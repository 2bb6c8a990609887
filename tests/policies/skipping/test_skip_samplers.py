"""Skip samplers: what they may skip, how much, how often."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import check_subset
from registry import UsageError, skip_samplers


@given(
    ratio=st.floats(0, 0.99), border=st.integers(0, 4), num_layers=st.integers(1, 40), seed=st.integers(0, 2**32 - 1)
)
def test_uniform_keeps_its_promises_or_says_the_largest_ratio(ratio, border, num_layers, seed):
    sampler = skip_samplers.make("uniform", ratio=ratio, border=border)
    largest = min(max(0, num_layers - 2 * border), num_layers - 1)
    if round(ratio * num_layers) > largest:
        with pytest.raises(
            UsageError, match=f"at most {largest}.*largest possible ratio is {largest / num_layers:.3f}"
        ):
            sampler.sample(num_layers, np.random.default_rng(seed))
        return
    kept = sampler.sample(num_layers, np.random.default_rng(seed))
    assert check_subset(kept, num_layers) == kept
    assert len(kept) == num_layers - round(ratio * num_layers)
    protected = {*range(min(border, num_layers)), *range(max(0, num_layers - border), num_layers)}
    assert protected <= set(kept)
    assert kept == sampler.sample(num_layers, np.random.default_rng(seed))


def test_uniform_skips_every_unprotected_layer_equally_often_and_redraws():
    sampler, rng = skip_samplers.make("uniform", ratio=0.25, border=2), np.random.default_rng(0)
    draws = [sampler.sample(12, rng) for _ in range(3000)]
    skipped = np.array([[layer not in kept for layer in range(12)] for kept in draws]).mean(0)
    assert (skipped[[0, 1, 10, 11]] == 0).all()
    np.testing.assert_allclose(skipped[2:10], 3 / 8, atol=0.04)
    assert len(set(draws)) == 56  # 8 choose 3


def test_full_keeps_all():
    assert skip_samplers.make("full").sample(5, np.random.default_rng(0)) == (0, 1, 2, 3, 4)


def skipped(id, num_layers=12, **fields):
    kept = skip_samplers.make(id, **fields).sample(num_layers, np.random.default_rng(0))
    return [n for n in range(num_layers) if n not in kept]


def test_fixed_patterns_skip_where_they_say():
    assert skipped("even", ratio=4 / 12) == [2, 4, 7, 9]
    assert skipped("even", ratio=1 / 12) == [6]
    assert skipped("middle", ratio=4 / 12) == [4, 5, 6, 7]
    assert skipped("middle", ratio=4 / 12, center=1.0) == [7, 8, 9, 10]
    assert skipped("middle", ratio=4 / 12, center=0.0) == [1, 2, 3, 4]
    assert skipped("early-exit", ratio=3 / 12) == [8, 9, 10]
    assert skipped("early-exit", ratio=3 / 12, border=0) == [9, 10, 11]


class PlantedProbe:
    """Layer 7 and 2 are cheapest, neighbours cost ten times as much together; influence says otherwise."""

    num_layers = 12
    longest = 32

    def kl(self, half=None):
        alone = np.linspace(0.5, 0.6, 12)
        alone[[7, 8, 2]] = (0.1, 0.11, 0.12)
        return (alone if half is None else alone[::-1]).tolist()

    def set_kl(self, gone):
        gone = sorted(gone)
        return sum(self.kl()[n] for n in gone) * (10 if any(b - a == 1 for a, b in itertools.pairwise(gone)) else 1)

    @property
    def influence(self):
        return [1.0 - 0.01 * n for n in range(12)]


def prepared(id, **fields):
    sampler = skip_samplers.make(id, **fields)
    sampler.prepare(PlantedProbe())
    return sampler


def test_measured_scores_choose_the_layers():
    def gone(sampler):
        return sorted(set(range(12)) - set(sampler.sample(12, np.random.default_rng(0))))

    assert gone(prepared("lowest-kl", ratio=2 / 12)) == [7, 8]
    assert gone(prepared("lowest-kl", ratio=2 / 12, joint=True)) == [2, 7]
    assert gone(prepared("block-influence", ratio=2 / 12)) == [9, 10]
    assert gone(prepared("block-influence", ratio=2 / 12, border=0)) == [10, 11]
    half = prepared("attention-only", ratio=2 / 12, by="kl").sample(12, np.random.default_rng(0))
    assert half == (0, 1, 2, "3.mlp", "4.mlp", 5, 6, 7, 8, 9, 10, 11)


def test_softmax_draws_layers_by_their_scores_and_every_one_sometimes():
    """The first draw of Gumbel top-k is the softmax itself."""
    rng, sampler = np.random.default_rng(0), prepared("softmax", ratio=1 / 12, temperature=1.0, border=0)
    drawn = [next(iter(set(range(12)) - set(sampler.sample(12, rng)))) for _ in range(6000)]
    wanted = 1 / np.array(PlantedProbe().kl())
    np.testing.assert_allclose(np.bincount(drawn, minlength=12) / 6000, wanted / wanted.sum(), atol=0.015)
    cold = prepared("softmax", ratio=3 / 12, temperature=1e-3)
    assert {cold.sample(12, rng) for _ in range(20)} == {prepared("lowest-kl", ratio=3 / 12).sample(12, rng)}


def test_fixed_skips_the_named_layers_or_one_drawn_set():
    rng = np.random.default_rng(0)
    assert skip_samplers.make("fixed", layers=(3, 1)).sample(5, rng) == (0, 2, 4)
    drawn = skip_samplers.make("fixed", ratio=0.3, seed=4)
    assert len({drawn.sample(10, rng) for _ in range(5)}) == 1
    assert drawn.sample(10, rng) != skip_samplers.make("fixed", ratio=0.3, seed=5).sample(10, rng)
    with pytest.raises(UsageError, match="outside the model's layers 0 to 4"):
        skip_samplers.make("fixed", layers=(5,)).sample(5, rng)
    with pytest.raises(UsageError, match="skips all 2 layers"):
        skip_samplers.make("fixed", layers=(0, 1)).sample(2, rng)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_ratio_that_leaves_no_layer_is_refused(ratio):
    with pytest.raises(UsageError, match="outside"):
        skip_samplers.make("uniform", ratio=ratio).sample(12, np.random.default_rng(0))


def test_importing_policies_registers_samplers_without_loading_models():
    code = (
        "import policies, sys, registry; assert 'transformers' not in sys.modules;"
        "print([registry.skip_samplers.get(name) for name in ('full', 'uniform', 'fixed')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(name in done.stdout for name in ("FullDepth", "UniformSkip", "FixedSkip"))
