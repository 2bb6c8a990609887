"""What every registered skip sampler must do, tested on all of them: a new one is tested by being registered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from policies import check_subset
from policies.nested import Block, halves
from policies.skipping.samplers import inner_layers
from registry import UsageError, skip_samplers

LAYERS = 12
VARIANTS = [
    *((id, {}) for id in skip_samplers),
    ("lowest-kl", {"joint": True}),
    ("softmax", {"score": "influence"}),
    ("attention-only", {"by": "kl"}),
    ("mlp-only", {"by": "kl"}),
]
WITH_RATIO = [(id, fields) for id, fields in VARIANTS if "ratio" in skip_samplers.fields(id)]
DIAGNOSTICS = {"kl_k1": 0.11, "kl_k3": 0.1, "D": 2.2, "mean_length": 20.0, "tokens": 640.0, "sequences": 32.0}


class StubProbe:
    """Scores without a model: layer n costs 0.01 (1 + n mod 5), halves less; sets cost their sum."""

    num_layers = LAYERS
    longest = 40

    def kl(self, half: str | None = None) -> list[float]:
        share = {None: 1.0, "attention": 0.3, "mlp": 0.6}[half]
        return [0.01 * share * (1 + n % 5) for n in range(self.num_layers)]

    def set_kl(self, skipped: Iterable[Block]) -> float:
        return sum(0.005 * (1 + half // 2 % 5) for half in halves(skipped))

    @property
    def influence(self) -> list[float]:
        return [1.0 / (1 + n) for n in range(self.num_layers)]


def made(id: str, **fields: Any) -> Any:
    """The sampler, prepared as ReFT prepares it."""
    sampler = skip_samplers.make(id, **fields)
    sampler.check(LAYERS)
    if not sampler.ready:
        sampler.prepare(StubProbe())
    return sampler


def draws(sampler: Any, seeds: Iterable[int]) -> list[Any]:
    """One subset per iteration, with diagnostics after each, as ReFT gives them."""
    found = []
    for seed in seeds:
        found.append(sampler.sample(LAYERS, np.random.default_rng(seed)))
        sampler.observe(found[-1], DIAGNOSTICS if len(found[-1]) < LAYERS else {"mean_length": 20.0})
    return found


@pytest.mark.parametrize(("id", "fields"), VARIANTS)
def test_subsets_are_valid_and_follow_from_the_generator_alone(id, fields):
    first, second = (draws(made(id, **fields), range(20)) for _ in range(2))
    assert first == second
    for kept in first:
        assert check_subset(kept, LAYERS) == kept
        assert json.loads(json.dumps(kept)) == list(kept)


@pytest.mark.parametrize(("id", "fields"), VARIANTS)
def test_saved_state_goes_on_to_the_same_subsets(id, fields):
    straight = made(id, **fields)
    draws(straight, range(5))
    resumed = skip_samplers.make(id, **fields)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert resumed.ready
    assert draws(resumed, range(5, 20)) == draws(straight, range(5, 20))


@pytest.mark.parametrize(("id", "fields"), WITH_RATIO)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 10 / 12])
@pytest.mark.parametrize("border", [0, 1, 3])
def test_a_ratio_becomes_a_rounded_count_of_inner_layers_or_an_error(id, fields, ratio, border):
    fields = {**fields, "ratio": ratio, "border": border}
    count, inner = round(ratio * LAYERS), inner_layers(border, LAYERS)
    if count > len(inner):
        with pytest.raises(UsageError, match="largest possible ratio"):
            made(id, **fields).sample(LAYERS, np.random.default_rng(0))
        return
    for kept in draws(made(id, **fields), range(5)):
        gone = set(range(2 * LAYERS)) - set(halves(kept))
        assert len(gone) == count * (1 if id in ("attention-only", "mlp-only") else 2)
        assert {half // 2 for half in gone} <= set(inner.tolist())


@pytest.mark.parametrize(("id", "fields"), WITH_RATIO)
def test_what_cannot_work_is_refused_before_anything_is_measured(id, fields):
    for bad in ({"ratio": 1.0}, {"ratio": -0.1}, {"border": -1}, {"ratio": 0.9, "border": 3}):
        sampler = skip_samplers.make(id, **{**fields, **bad})
        with pytest.raises(UsageError):
            sampler.check(LAYERS)


def test_samplers_with_measured_scores_say_that_they_lack_them():
    for id, fields in VARIANTS:
        sampler = skip_samplers.make(id, **fields)
        if not getattr(sampler, "ready", True) and id != "budget":
            with pytest.raises(UsageError, match="prepare"):
                sampler.sample(LAYERS, np.random.default_rng(0))
