"""Corrections: the contract for every registered one, closed forms, products, and scopes under micro-batching."""

from __future__ import annotations

import importlib
import math
import textwrap
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import agents  # noqa: F401  registers the components
from agents.corrections import SCOPES, Correction, Product, exp, log_rho, traits, weigh
from agents.rollout import Rollout
from benchmarks.estimators.contract import CHECKS, example, relative_bias
from registry import Registry, UsageError, corrections

PRODUCTS = [
    "truncated-is*ppo-clip",
    "sequence-is*gspo",
    "defensive*sapo",
    "token-is*geometric-mask",
    "none*retrace",
    "opsm*base",
]
ZOO = """
    none token-is prefix-is suffix-is sequence-is truncated-is masked-is geometric-mask retrace retrace-product
    v-trace tempered ess-adaptive self-normalised defensive decoupled-ppo ppo-clip gspo gmpo cispo sapo topr
    base practical vespo luspo dppo-tv dppo-kl opsm trm acr minpro a-3po m2po
    mix-ppo first-tokens
"""


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("id", corrections.ids() + PRODUCTS)
def test_contract(id, check):
    fault = CHECKS[check](corrections.make(id))
    assert not fault, f"{id}: {fault}"


@pytest.mark.parametrize("check", CHECKS)
def test_contract_of_the_dual_clip(check):
    fault = CHECKS[check](corrections.make("ppo-clip", dual_clip=1.5))
    assert not fault, fault


def test_zoo_is_complete():
    assert set(ZOO.split()) <= set(corrections.ids())


def rollout_of(log_ratios: list[list[float]], group: list[int] | None = None) -> tuple[Tensor, Rollout]:
    """log pi and a rollout with these log(pi/mu), ragged, pi = pi_old."""
    width = max(map(len, log_ratios))
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in log_ratios])
    ratio = torch.tensor([row + [0.0] * (width - len(row)) for row in log_ratios], dtype=torch.float64)
    logp = torch.full_like(ratio, -1.0)
    count = len(log_ratios)
    rollout = Rollout(
        prompts=(torch.zeros(1, dtype=torch.long),) * count,
        tokens=torch.zeros(mask.shape, dtype=torch.long),
        mask=mask,
        behavior_logp=logp - ratio,
        reward=torch.zeros(count),
        group=torch.tensor(group or [0] * count),
        old_logp=logp.clone(),
    )
    return logp, rollout


def weight_of(id: str, log_ratios: list[list[float]], advantage: list[float] | None = None, **fields: object) -> Tensor:
    logp, rollout = rollout_of(log_ratios)
    a = torch.tensor(advantage or [1.0] * len(log_ratios), dtype=torch.float64)
    return weigh(corrections.make(id, **fields), logp, rollout, a)


LOG2, LOG3 = math.log(2), math.log(3)
HAND = [  # rho = 2, 1/3, 3, by hand
    ("none", {}, [1, 1, 1]),
    ("token-is", {}, [2, 1 / 3, 3]),
    ("prefix-is", {}, [2, 2 / 3, 2]),
    ("suffix-is", {}, [2, 1, 3]),
    ("minpro", {}, [2, 2 / 3, 1]),
    ("sequence-is", {}, [2, 2, 2]),
    ("truncated-is", {}, [2, 1 / 3, 2]),
    ("truncated-is", {"cap": 1.5, "level": "sequence"}, [1.5, 1.5, 1.5]),
    ("masked-is", {}, [2, 0, 3]),
    ("masked-is", {"low": 0.1, "high": 2.5}, [2, 1 / 3, 0]),
    ("masked-is", {"level": "sequence", "high": 1.9}, [0, 0, 0]),
    ("geometric-mask", {}, [1, 1, 1]),
    ("geometric-mask", {"high": 1.2}, [0, 0, 0]),  # 2 ** (1/3) = 1.26
    ("retrace", {"lam": 0.9}, [0.9, 0.3, 0.9]),
    ("retrace-product", {}, [2 / 3, 1 / 3, 3]),
    ("retrace-product", {"lam": 0.5}, [2 * 0.5 / 3 * 0.5, 0.5 / 3, 3]),
    ("v-trace", {}, [1 / 3, 1 / 3, 1]),
    ("v-trace", {"rho_bar": 2.5, "c_bar": 1.5}, [2 / 3 * 2.5, 2.5 / 3, 2.5]),
    ("tempered", {}, [2**0.5] * 3),
    ("tempered", {"level": "token"}, [2**0.5, 3**-0.5, 3**0.5]),
    ("topr", {}, [1, 1, 1]),
    ("self-normalised", {}, [1, 1, 1]),
    ("ess-adaptive", {}, [2, 2, 2]),
    ("trm", {}, [0, 0, 0]),
    ("trm", {"delta": 1.1}, [1, 1, 1]),  # log 3 = 1.0986 both ways
    ("acr", {}, [2, 1 / 3, 2]),
    ("a-3po", {}, [0, 1 / 3, 0]),  # A > 0
    ("a-3po", {"alpha": 0.25}, [2, 1 / 3, 0]),  # 2 ** .25 = 1.19 is within 1.2
    ("luspo", {}, [3, 3, 3]),
    ("mix-ppo", {}, [2, 1 / 3, 3]),
    ("first-tokens", {"tokens": 2}, [1, 1, 0]),
    ("first-tokens", {"tokens": 2, "whole": 3}, [1, 1, 1]),  # of group 0
    ("vespo", {}, [4 * math.exp(-3)] * 3),
    ("vespo", {"k_pos": 1.0, "lam_pos": 0.5}, [2 * math.exp(-0.5)] * 3),
    ("decoupled-ppo", {}, [2, 1 / 3, 3]),
    ("decoupled-ppo", {"cap": 2.5}, [2, 1 / 3, 2.5]),
]


@pytest.mark.parametrize(("id", "fields", "expected"), HAND, ids=[f"{id}-{fields}" for id, fields, _ in HAND])
def test_by_hand(id, fields, expected):
    found = weight_of(id, [[LOG2, -LOG3, LOG3]], **fields)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_topr_holds_failures_to_what_the_target_would_write():
    found = weight_of("topr", [[LOG2, 0.0], [-LOG2, 0.0], [-LOG2]], [-1.0, -1.0, 1.0])
    torch.testing.assert_close(found, torch.tensor([[1, 1], [0.5, 0.5], [1, 0]], dtype=torch.float64))


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_minpro_stands_for_the_prefix_ratio(log_ratios):
    """It is that ratio at the first two tokens; where all ratios are at least 1, factors left out only lower it."""
    minpro, prefix = (weight_of(id, [log_ratios])[0] for id in ("minpro", "prefix-is"))
    torch.testing.assert_close(minpro[:2], prefix[:2])
    favoured = [abs(x) for x in log_ratios]
    minpro, prefix = (weight_of(id, [favoured])[0] for id in ("minpro", "prefix-is"))
    assert bool((minpro <= prefix * (1 + 1e-12)).all())


def test_vespo_peaks_at_k_over_lam_on_both_sides_of_one():
    log_w = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for advantage, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        w = weight_of("vespo", [[float(x)] for x in log_w], [advantage] * len(log_w))[:, 0]
        assert float(log_w[w.argmax()].exp()) == pytest.approx(peak, rel=0.01)
        assert float(w[0]) < 0.1 and float(w[-1]) < 0.1


@pytest.mark.parametrize(
    ("id", "pi", "pi_old", "kept"),  # kept: for A > 0 and for A < 0
    [
        ("dppo-tv", 1e-3, 1e-5, (True, True)),  # a ratio of 100 on a rare token is no distance
        ("dppo-tv", 0.8, 0.99, (True, False)),  # a ratio of .81 on a sure one is
        ("dppo-tv", 0.6, 0.4, (False, True)),
        ("dppo-kl", 1e-3, 1e-5, (True, True)),
        ("dppo-kl", 0.8, 0.99, (True, False)),
        ("dppo-kl", 0.6, 0.4, (False, True)),
    ],
)
def test_dppo_measures_probabilities_not_their_ratio(id, pi, pi_old, kept):
    logp, rollout = rollout_of([[0.0], [0.0]])
    rollout = replace(rollout, old_logp=torch.full_like(logp, math.log(pi_old)))
    found = weigh(corrections.make(id), torch.full_like(logp, math.log(pi)), rollout, torch.tensor([1.0, -1.0]))
    expected = [min(pi / pi_old, 20) * side for side in kept]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_opsm_drops_failures_that_the_target_would_not_write():
    found = weight_of("opsm", [[-0.3, 0.0], [-0.3, 0.0], [-0.1, 0.0], [0.3, 0.3]], [1.0, -1.0, -1.0, -1.0])
    assert found.tolist() == [[1, 1], [0, 0], [1, 1], [1, 1]]


def test_a_mask_may_look_at_the_update_inside_a_product():
    """pi = pi_old / e has drifted by a nat a token from what mu wrote, of which pi_old shows nothing."""
    logp, rollout = rollout_of([[0.0, 0.0], [0.0, 0.0]])
    a = torch.tensor([1.0, -1.0])
    found = weigh(corrections.make("opsm*ppo-clip", eps_low=1.0), logp - 1, rollout, a)
    torch.testing.assert_close(found, math.exp(-1) * torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    both = weigh(corrections.make("geometric-mask*ppo-clip", eps_low=1.0), logp - 1, rollout, a)
    torch.testing.assert_close(both, torch.full_like(logp, math.exp(-1)))


def test_only_a_mask_may_ask_for_pi():
    class Ratio:
        at_pi = True

        def __call__(self, logp, rollout, advantage):
            return exp(log_rho(logp, rollout), logp, rollout)

    with pytest.raises(UsageError, match="at_pi is for a mask"):
        traits(Ratio())


def test_acr_leaves_a_truncated_success_its_room():
    """w = 4 under a cap of 2 halves a weight, so the clip is at 2.4; w = 1 leaves it at 1.2."""
    old_logp, rollout = rollout_of([[2 * LOG2], [2 * LOG2], [2 * LOG2], [0.0]])
    r = torch.tensor([[2.3], [2.5], [0.7], [1.3]], dtype=torch.float64)
    found = weigh(corrections.make("acr"), old_logp + r.log(), rollout, torch.tensor([1.0, 1.0, -1.0, 1.0]))
    torch.testing.assert_close(found[:, 0], torch.tensor([4.6, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("lam", [0.3, 1.0, 4.0])
def test_token_is_is_the_mean_of_budgeted_rejection(lam):
    """Of a whole distribution: what OBRS keeps of mu, min(mu, lam pi) / Z, weighed by pi over it, and then averaged."""
    generator = torch.Generator().manual_seed(0)
    pi, mu = (torch.randn(50, generator=generator, dtype=torch.float64).softmax(0) for _ in range(2))
    z = torch.minimum(mu, lam * pi).sum()
    mean = torch.minimum(torch.ones(()), lam * pi / mu) * pi / (torch.minimum(mu, lam * pi) / z)
    ours = weight_of("token-is", [[x] for x in (pi / mu).log().tolist()])[:, 0]
    torch.testing.assert_close(z * ours, mean)


def test_self_normalised_divides_by_its_group():
    logp, rollout = rollout_of([[LOG2], [0.0], [LOG3], [LOG3]], [5, 5, 1, 1])
    found = weigh(corrections.make("self-normalised"), logp, rollout, torch.ones(4))
    torch.testing.assert_close(found[:, 0], torch.tensor([4 / 3, 2 / 3, 1, 1], dtype=torch.float64))
    whole = weigh(corrections.make("self-normalised", over="batch"), logp, rollout, torch.ones(4))
    torch.testing.assert_close(whole[:, 0], torch.tensor([8, 4, 12, 12], dtype=torch.float64) / 9)


def test_defensive_is_the_balance_heuristic():
    # groups of 4 and of 2, one by the target in the first: W = rho / (n0/n rho + n1/n) with pi = pi_old
    logp, rollout = rollout_of([[LOG3], [LOG3, 0.0], [-LOG2], [0.0], [LOG2], [0.0]], [0, 0, 0, 0, 1, 1])
    rollout = replace(rollout, by_target=torch.tensor([True, False, False, False, False, False]))
    found = weigh(corrections.make("defensive"), logp, rollout, torch.ones(6))[:, 0]
    expected = [3 / (3 / 4 + 3 / 4), 3 / (3 / 4 + 3 / 4), 0.5 / (0.5 / 4 + 3 / 4), 1, 2, 1]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@given(st.integers(1, 7), st.floats(-80, 80), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_defensive_is_bounded(by_target, log_ratio, length):
    logp, rollout = rollout_of([[log_ratio] * length] * 8)
    rollout = replace(rollout, by_target=torch.arange(8) < by_target)
    found = weigh(corrections.make("defensive"), logp, rollout, torch.ones(8))
    assert float(found.max()) <= 8 / by_target * (1 + 1e-9)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=12), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_v_trace_is_retrace_with_the_first_ratio_truncated(log_ratios):
    rho = torch.tensor([row + [0.0] * (12 - len(row)) for row in log_ratios], dtype=torch.float64).exp()
    retrace = weight_of("retrace-product", log_ratios)
    rho = rho[:, : retrace.shape[1]]
    expected = retrace / rho * rho.clamp(max=1)
    torch.testing.assert_close(weight_of("v-trace", log_ratios), expected)


def test_m2po_drops_only_what_the_advantage_pushes_away():
    """.1, .3, -.5 and -.1 are pushed outward; without .5 the mean square of the rest is (.01 + .09 + .01) / 3 < .04."""
    found = weight_of("m2po", [[0.1, 0.3, -2.0], [-0.5, -0.1, 2.0]], [1.0, -1.0])
    kept = torch.tensor([[1, 1, 1], [0, 1, 1]])
    expected = kept * torch.tensor([[0.1, 0.3, -2.0], [-0.5, -0.1, 2.0]], dtype=torch.float64).exp()
    torch.testing.assert_close(found, expected)
    ties = weight_of("m2po", [[0.5], [0.5], [0.1]], moment=0.15)[:, 0]
    torch.testing.assert_close(ties, torch.tensor([0, 0, math.exp(0.1)], dtype=torch.float64))


def test_ess_adaptive_keeps_the_effective_sample_size():
    generator = torch.Generator().manual_seed(0)
    log_w = 2 * torch.randn(500, generator=generator, dtype=torch.float64)
    for ess in (0.2, 0.5, 0.9):
        w = weight_of("ess-adaptive", [[float(x)] for x in log_w], ess=ess)[:, 0]
        assert float(w.sum() ** 2 / w.square().sum() / 500) == pytest.approx(ess, abs=1e-6)
    assert torch.equal(weight_of("ess-adaptive", [[0.1], [0.0]]), weight_of("sequence-is", [[0.1], [0.0]]))


def test_ratios_of_completions_by_the_target_are_their_own():
    logp, rollout = rollout_of([[LOG2], [LOG2]])
    rollout = replace(rollout, by_target=torch.tensor([True, False]))
    weight = weigh(corrections.make("token-is"), logp, rollout, torch.ones(2))
    torch.testing.assert_close(weight[:, 0], torch.tensor([1.0, 2.0], dtype=torch.float64))
    with pytest.raises(UsageError, match="old_logp"):
        weigh(corrections.make("token-is"), logp, replace(rollout, old_logp=None), torch.ones(2))


def test_product_counts_the_update_ratio_once():
    logp, rollout, advantage = example(corrections.make("none"))
    r = (logp - rollout.old_logp).exp()
    whole = (logp - rollout.behavior_logp).exp()
    weight = weigh(corrections.make("token-is*cispo", eps_high=1e9), logp, rollout, advantage)
    torch.testing.assert_close(weight[rollout.mask], whole[rollout.mask])
    assert not torch.allclose(r[rollout.mask], torch.ones(()).double())


@pytest.mark.parametrize(
    ("id", "scope", "unbiased"),
    [
        ("sequence-is*ppo-clip", "sequence", True),
        ("truncated-is*ppo-clip", "token", False),
        ("defensive*gspo", "group", True),
        ("ess-adaptive*ppo-clip", "batch", False),
        ("sequence-is*geometric-mask", "sequence", False),
        ("geometric-mask*base", "sequence", False),
        ("sequence-is*none", "sequence", True),
    ],
)
def test_product_declares_the_widest_scope(id, scope, unbiased):
    found = traits(corrections.make(id))
    assert (found.scope, found.unbiased) == (scope, unbiased)


@pytest.mark.parametrize(
    ("id", "named"),
    [
        ("token-is*base", "TokenIS and DecoupledPPO each hold the ratio to mu"),
        ("vespo*acr", "VESPO and ACR each hold the ratio to mu"),
        ("sequence-is*token-is", "SequenceIS and TokenIS each hold the ratio to mu"),
        ("topr*retrace*ppo-clip", "TOPR and Retrace each hold the ratio to mu"),
        ("ppo-clip*gspo", "PPOClip and GSPO each hold pi / pi_old"),
        ("truncated-is*dppo-tv*luspo", "DPPOTV and LUSPO each hold pi / pi_old"),
        ("base*sapo", "DecoupledPPO and SAPO each hold pi / pi_old"),
    ],
)
def test_a_product_refuses_to_count_a_ratio_twice(id, named):
    with pytest.raises(UsageError, match=f"counts a ratio once, but {named}: keep one of them") as refused:
        corrections.make(id)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("id", ["opsm*trm*geometric-mask*base", "trm*ppo-clip", "m2po*ppo-clip", "defensive*dppo-kl"])
def test_masks_and_one_ratio_of_each_kind_multiply(id):
    logp, rollout, advantage = example(corrections.make(id))
    weight = weigh(corrections.make(id), logp, rollout, advantage)
    assert 0 < int((weight != 0).sum()) < int(rollout.mask.sum())


def test_an_undeclared_factor_counts_as_a_correction_and_a_declared_mask_does_not():
    class Plain:
        def __call__(self, logp, rollout, advantage):
            return torch.ones_like(logp)

    class Mask(Plain):
        corrects_mu = False

    with pytest.raises(UsageError, match="TokenIS and Plain"):
        Product((corrections.make("token-is"), Plain()))
    assert not traits(Product((corrections.make("token-is"), Mask()))).unbiased


@pytest.mark.parametrize("id", [id for id in corrections.ids() if traits(corrections.make(id)).unbiased])
@pytest.mark.parametrize("other", ["none", "geometric-mask", "ppo-clip", "base", "gspo"])
def test_a_product_that_declares_unbiased_is(id, other):
    try:
        made = corrections.make(f"{id}*{other}")
    except UsageError:
        return
    if traits(made).unbiased:
        assert relative_bias(made) < 1e-10


@pytest.mark.parametrize("id", corrections.ids())
def test_micro_batches_of_the_scope_change_nothing(id):
    """Groups dealt to micro-batches in any order, as the update does for every scope up to the group."""
    correction = corrections.make(id)
    if traits(correction).scope == "batch":
        pytest.skip("the update calls it on whole minibatches")
    logp, rollout, advantage = example(correction)
    whole = weigh(correction, logp, rollout, advantage)
    for groups in ((2,), (0, 1)):
        index = torch.isin(rollout.group, torch.tensor(groups)).nonzero()[:, 0].flip(0)
        part = rollout.select(index)
        width = part.mask.shape[1]
        torch.testing.assert_close(
            weigh(correction, logp[index][:, :width], part, advantage[index]), whole[index, :width]
        )


@pytest.mark.parametrize("id", [id for id in corrections.ids() if traits(corrections.make(id)).needs_old_logp])
def test_missing_old_logp_is_said(id):
    logp, rollout, advantage = example(corrections.make(id))
    with pytest.raises(UsageError, match="old_logp"):
        weigh(corrections.make(id), logp, replace(rollout, old_logp=None), advantage)


@pytest.mark.parametrize(
    ("id", "fields"),
    [
        ("truncated-is", {"cap": 0}),
        ("truncated-is", {"level": "word"}),
        ("masked-is", {"low": 2.0}),
        ("retrace", {"lam": 0.0}),
        ("retrace-product", {"lam": 1.5}),
        ("v-trace", {"c_bar": -1.0}),
        ("tempered", {"beta": 2.0}),
        ("ess-adaptive", {"ess": 0.0}),
        ("self-normalised", {"over": "token"}),
        ("ppo-clip", {"eps_low": 1.5}),
        ("ppo-clip", {"dual_clip": 1.2}),
        ("gmpo", {"log_clip": 0.0}),
        ("sapo", {"tau_pos": 0.0}),
        ("vespo", {"lam_neg": 0.0}),
        ("dppo-tv", {"delta_low": 0.0}),
        ("opsm", {"delta": 0.0}),
        ("trm", {"delta": -1.0}),
        ("m2po", {"moment": 0.0}),
        ("a-3po", {"alpha": 0.0}),
        ("acr", {"cap": 0.0}),
        ("dppo-kl", {"cap": 0.0}),
    ],
)
def test_bad_fields_are_usage_errors(id, fields):
    with pytest.raises(UsageError):
        corrections.make(id, **fields)


THIRD_PARTY = """
    from dataclasses import dataclass
    from registry import corrections

    @corrections.register("half-is")
    @dataclass(frozen=True)
    class HalfIS:
        power: float = 0.5

        def __call__(self, logp, rollout, advantage):
            return (self.power * (logp - rollout.behavior_logp)).clamp(max=80).exp()
"""


def test_a_plain_class_is_a_correction(monkeypatch, tmp_path):
    monkeypatch.setattr(corrections, "_known", dict(corrections._known))
    (tmp_path / "half_is_plugin.py").write_text(textwrap.dedent(THIRD_PARTY))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("half_is_plugin")
    made = corrections.make("half-is", power=1.0)
    assert traits(made).scope == "batch"
    logp, rollout, advantage = example(made)
    torch.testing.assert_close(
        weigh(made, logp, rollout, advantage), weigh(corrections.make("token-is"), logp, rollout, advantage)
    )
    assert all(CHECKS[name](corrections.make("half-is")) == "" for name in CHECKS)
    assert len(textwrap.dedent(THIRD_PARTY).strip().splitlines()) < 20


@dataclass(frozen=True)
class Lying(Correction):
    """A correction that breaks every promise, one at a time."""

    how: str = ""

    @property
    def scope(self) -> str:  # type: ignore[override]
        return "token" if self.how == "scope" else "sequence"

    @property
    def geometry(self) -> str | None:  # type: ignore[override]
        return "suffix" if self.how == "geometry" else None  # it is made of a prefix

    @property
    def corrects_mu(self) -> bool:  # type: ignore[override]
        return self.how != "mask"

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.how == "bias"

    def __call__(self, logp: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
        ratio = log_rho(logp, rollout)
        if self.how == "padding":
            return exp((logp - rollout.behavior_logp).sum(1, keepdim=True), logp, rollout)
        if self.how == "permutation":
            return exp(ratio, logp, rollout) * torch.linspace(1, 1 + 1e-6, len(logp))[:, None]
        if self.how == "finite":
            return (ratio.to(logp.dtype) * 2).exp()
        if self.how == "on-policy":
            return exp(ratio + 0.1, logp, rollout)
        if self.how == "detached":
            return exp(ratio, logp, rollout) * torch.ones((), requires_grad=True)
        return exp(ratio.cumsum(1), logp, rollout)


@pytest.mark.parametrize("how", CHECKS)
def test_every_check_catches_its_fault(how):
    assert CHECKS[how](Lying(how))


def test_scopes_are_ordered():
    assert SCOPES == ("token", "sequence", "group", "batch")
    assert isinstance(corrections, Registry)
