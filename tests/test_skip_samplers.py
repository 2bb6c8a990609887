"""Skip samplers: what they may skip, how much, how often."""

from __future__ import annotations

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
