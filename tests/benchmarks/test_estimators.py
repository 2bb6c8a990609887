"""The exact lab: against brute force, against closed forms, against sampling, and its command line."""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import agents  # noqa: F401  registers the components
from agents.corrections import Product
from benchmarks.estimators import transformer
from benchmarks.estimators.__main__ import main
from benchmarks.estimators.adviser import read_means
from benchmarks.estimators.contract import relative_bias
from benchmarks.estimators.families import families
from benchmarks.estimators.mdp import Cell, add_noise, random_reward, random_target, tree
from benchmarks.estimators.moments import (
    Moments,
    advantage_table,
    all_groups,
    enumerate_moments,
    moments,
    sample_moments,
    success_counts,
)
from benchmarks.estimators.report import group_equal
from benchmarks.estimators.settings import Grouping, Sweep
from benchmarks.estimators.sweep import cell_rows, crossover, noisy_cell, quality
from registry import UsageError, advantages, corrections


def cell_of(vocabulary: int, horizon: int, seed: int = 0, success: float = 0.4) -> Cell:
    """mu is another random policy."""
    generator = torch.Generator().manual_seed(seed)
    shape = tree(vocabulary, horizon)
    pi, mu = (random_target(shape, generator, eos=-0.5) for _ in range(2))
    return Cell(shape, pi, pi, mu, random_reward(shape, pi, success, generator), None, {})


@pytest.mark.parametrize(("vocabulary", "horizon", "count", "states"), [(2, 1, 2, 1), (3, 2, 7, 3), (4, 6, 1093, 364)])
def test_the_tree_is_whole(vocabulary, horizon, count, states):
    shape = tree(vocabulary, horizon)
    assert (len(shape.tokens), shape.states) == (count, states)
    cell = cell_of(vocabulary, horizon)
    assert float(cell.probability(cell.log_pi).sum()) == pytest.approx(1, abs=1e-12)
    assert len({tuple(row.tolist()) for row in shape.tokens.masked_fill(~shape.mask, -1)}) == count


def test_the_true_gradient_is_that_of_the_expected_reward():
    cell = cell_of(3, 4)
    logits = cell.log_pi.clone().requires_grad_()
    (cell.probability(logits.log_softmax(1)) * cell.reward).sum().backward()
    torch.testing.assert_close(cell.true_gradient(), logits.grad)


def test_divergences_by_hand():
    """One step, two tokens: mu = (1/2, 1/2), pi = (1/4, 3/4)."""
    shape = tree(2, 1)
    pi, mu = torch.tensor([[0.25, 0.75]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    found = Cell(shape, pi, pi, mu, torch.tensor([0.0, 1.0]).double(), None, {}).divergence()
    assert found["d"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found["tv"] == found["tv_sequence"] == pytest.approx(0.25)
    assert found["chi2"] == pytest.approx(0.25) and found["ess"] == pytest.approx(0.8)
    assert found["mean_length"] == 1


def test_one_step_bandit_by_hand():
    """Reward 1 for token 1: the score of token 1 is (-1/4, 1/4), so g = 3/4 of it; none under mu = 1/2 gives 1/2."""
    shape = tree(2, 1)
    pi, mu = torch.tensor([[0.25, 0.75]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    cell = Cell(shape, pi, pi, mu, torch.tensor([0.0, 1.0]).double(), None, {})
    score = torch.tensor([[-0.25, 0.25]]).double()
    reinforce = advantages.make("reinforce")
    torch.testing.assert_close(cell.true_gradient(), 0.75 * score)
    for id, mean, second in (("none", 0.5, 0.5), ("token-is", 0.75, 0.5 * 1.5**2), ("retrace", 0.5, 0.5)):
        found = moments(cell, corrections.make(id), reinforce, Grouping())
        torch.testing.assert_close(found.mean, mean * score)
        assert found.variance == pytest.approx((second - mean**2) * 0.125)


def test_what_retrace_keeps_is_one_minus_the_total_variation():
    """E_mu[min(1, rho)] = 1 - TV, so the credit that a product of T traces keeps falls as (1 - TV)^T."""
    cell = cell_of(4, 1, seed=2)
    index = torch.arange(len(cell.reward))
    weight = corrections.make("retrace")(cell.logp(cell.log_pi), cell.rollout(index, index), cell.reward)
    kept = float((cell.probability(cell.log_mu) * weight[:, 0]).sum())
    assert kept == pytest.approx(1 - cell.divergence()["tv"], abs=1e-12)


@pytest.mark.parametrize("advantage", ["reinforce", "rloo", "dr-grpo", "grpo", "whitened"])
@pytest.mark.parametrize("id", ["none", "token-is", "sequence-is", "topr", "v-trace", "masked-is"])
def test_binomial_groups_equal_brute_force(id, advantage):
    cell = add_noise(cell_of(3, 2, seed=3), 0.1, torch.Generator().manual_seed(1))
    correction, made = corrections.make(id), advantages.make(advantage)
    exact, brute = enumerate_moments(cell, correction, made, Grouping(3, 1)), all_groups(cell, correction, made, 3)
    torch.testing.assert_close(exact.mean, brute.mean, rtol=1e-10, atol=1e-14)
    assert exact.variance == pytest.approx(brute.variance, rel=1e-9)


@pytest.mark.parametrize("advantage", ["reinforce", "rloo", "grpo"])
def test_defensive_groups_equal_brute_force(advantage):
    """Every ordered group of 3 whose first completion is the target's, weighted by its probability."""
    cell, made = cell_of(3, 2, seed=5), advantages.make(advantage)
    correction = corrections.make("defensive")
    count = len(cell.reward)
    by_target = torch.tensor([True, False, False])
    pi, mu = cell.probability(cell.log_pi), cell.probability(cell.log_mu)
    mean, second = torch.zeros_like(cell.log_pi), 0.0
    for members in torch.cartesian_prod(*[torch.arange(count)] * 3):
        a = made(cell.reward[members], torch.zeros(3, dtype=torch.long))
        rollout = cell.rollout(members, torch.zeros(3, dtype=torch.long), by_target)
        weight = correction(cell.logp(cell.log_pi)[members], rollout, a) * a[:, None]
        summed = torch.zeros(count, 2, dtype=torch.float64).index_add_(0, members, weight)
        gradient = cell.vector(summed) / 3
        probability = float(pi[members[0]] * mu[members[1]] * mu[members[2]])
        mean = mean + probability * gradient
        second += probability * float(gradient.square().sum())
    found = enumerate_moments(cell, correction, made, Grouping(3, 1))
    torch.testing.assert_close(found.mean, mean)
    assert found.variance == pytest.approx(3 * (second - float(mean.square().sum())))


def test_success_counts_are_the_law_of_a_sum():
    law = success_counts([2, 1], [0.3, 0.9], [])
    torch.testing.assert_close(
        law, torch.tensor([0.49 * 0.1, 0.42 * 0.1 + 0.49 * 0.9, 0.09 * 0.1 + 0.42 * 0.9, 0.09 * 0.9]).double()
    )
    torch.testing.assert_close(success_counts([2, 1], [0.3, 0.9], [0, 1]), torch.tensor([0.7, 0.3]).double())


def test_advantage_table_calls_the_registered_advantage():
    torch.testing.assert_close(
        advantage_table(advantages.make("rloo"), 3), torch.tensor([[0, -0.5, -1], [1, 0.5, 0]]).double()
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("id", ["sequence-is", "defensive", "sequence-is*ppo-clip"])
def test_unbiased_to_1e_10(id, seed):
    for cell in (cell_of(3, 4, seed), noisy_cell(4, 3, 0.3, 1.0, seed)):
        found = moments(cell, corrections.make(id), advantages.make("reinforce", baseline=0.3), Grouping(8, 1))
        truth = cell.true_gradient()
        assert float((found.mean - truth).norm() / truth.norm()) < 1e-10


def test_rloo_keeps_sequence_is_unbiased_and_not_defensive():
    """Leaving one out of a mixed group changes the mix of what is left: a bias of order 1/G, documented."""
    cell = cell_of(3, 4)
    truth, rloo = cell.true_gradient(), advantages.make("rloo")

    def bias(id: str, size: int) -> float:
        mean = moments(cell, corrections.make(id), rloo, Grouping(size, size // 4)).mean
        return float((mean - truth).norm() / truth.norm())

    assert bias("sequence-is", 8) < 1e-10
    assert 1e-4 < bias("defensive", 16) < 0.6 * bias("defensive", 8)


def test_known_biases_order():
    """Of the three variants as we read them none is unbiased; correcting more lowers the bias."""
    found = {
        id: relative_bias(corrections.make(id)) for id in ("practical", "base", "retrace", "suffix-is", "sequence-is")
    }
    assert found["sequence-is"] < 1e-10 < found["suffix-is"] < found["base"] < found["practical"]
    assert found["retrace"] > 0.01


def test_variance_grows_with_the_divergence():
    variance = []
    for d in (0.03, 0.3, 1.0):
        rows = cell_rows(noisy_cell(4, 3, 0.5, d, 0), Sweep(), {"sequence-is": corrections.make("sequence-is")})
        variance += [row["variance_ratio"] for row in rows]
    assert 1 < variance[0] < variance[1] < variance[2]


@pytest.mark.parametrize("id", ["token-is", "sequence-is", "retrace-product", "defensive", "self-normalised"])
@pytest.mark.parametrize("advantage", ["reinforce", "grpo"])
def test_sampled_rollouts_converge_to_the_enumerated_moments(id, advantage):
    """Completions are drawn, grouped and weighed as in training. The deviation of the sampled mean from the enumerated
    one, along three fixed directions, is within 5 standard errors: a false alarm below 1e-5 in all (the seed is fixed
    besides). ``self-normalised`` is compared with brute force over its groups."""
    cell = cell_of(3, 2, seed=7)
    correction, made = corrections.make(id), advantages.make(advantage)
    size, groups = 3, 20_000
    mixed = id == "defensive"
    exact = all_groups(cell, correction, made, size) if id == "self-normalised" else None
    exact = exact or enumerate_moments(cell, correction, made, Grouping(size, 1))
    generator = torch.Generator().manual_seed(11)

    def draw(table: Tensor, count: int) -> Tensor:
        return torch.multinomial(cell.probability(table), count, replacement=True, generator=generator)

    members = draw(cell.log_mu, groups * size).view(groups, size)
    if mixed:
        members[:, 0] = draw(cell.log_pi, groups)
    by_target = (torch.arange(size) == 0).repeat(groups) if mixed else None
    index, group = members.flatten(), torch.arange(groups).repeat_interleave(size)
    rollout = cell.rollout(index, group, by_target)
    a = made(rollout.reward, group)
    coefficient = correction(cell.logp(cell.log_pi)[index], rollout, a) * a[:, None]
    for direction in torch.randn(3, *cell.log_pi.shape, generator=generator, dtype=torch.float64):
        along = direction - (direction * cell.log_pi.exp()).sum(1, keepdim=True)  # the score times the direction
        score = torch.where(cell.tree.mask, along[cell.tree.state, cell.tree.tokens], 0.0)
        value = (coefficient * score[index]).sum(1).view(groups, size).mean(1)
        error = float(value.std()) / math.sqrt(groups)
        assert abs(float(value.mean()) - float((exact.mean * direction).sum())) < 5 * error


def test_sampling_in_the_lab_agrees_with_enumeration():
    cell, made = cell_of(3, 2, seed=7), advantages.make("rloo")
    correction = corrections.make("self-normalised")
    found, exact = sample_moments(cell, correction, made, Grouping(3, 1), 96), all_groups(cell, correction, made, 3)
    assert found.samples and float((found.mean - exact.mean).norm()) < 5 * math.sqrt(found.mean_error)
    assert found.variance == pytest.approx(exact.variance, rel=0.05)


def test_an_advantage_that_depends_on_the_order_is_sampled_and_not_enumerated():
    """PODS keeps by a stable sort: of equally rewarded completions the first of a group."""
    cell, made = cell_of(3, 2, seed=7), advantages.make("down-sampled", keep=2)
    correction = corrections.make("token-is")
    found, exact = moments(cell, correction, made, Grouping(4, 1), 96), all_groups(cell, correction, made, 4)
    assert found.samples and float((found.mean - exact.mean).norm()) < 5 * math.sqrt(found.mean_error)
    assert found.variance == pytest.approx(exact.variance, rel=0.05)
    for id in ("token-is", "defensive"):
        with pytest.raises(UsageError, match="DownSampled depends on the order"):
            enumerate_moments(cell, corrections.make(id), made, Grouping(4, 1))
    assert moments(cell, correction, advantages.make("down-sampled", keep=4), Grouping(4, 1)).samples is None


def test_a_mixed_factor_beside_one_that_looks_at_the_others_is_refused():
    class GroupMask:
        scope = "group"
        corrects_mu = False

        def __call__(self, logp, rollout, advantage):
            return torch.ones_like(logp)

    cell, made = cell_of(3, 2), advantages.make("reinforce")
    with pytest.raises(UsageError, match="Defensive beside GroupMask"):
        moments(cell, Product((corrections.make("defensive"), GroupMask())), made, Grouping(3, 1))
    assert moments(cell, corrections.make("defensive*geometric-mask"), made, Grouping(3, 1)).samples is None


def test_undeclared_scope_is_measured():
    class Plain:
        def __call__(self, logp, rollout, advantage):
            ratio = torch.where(rollout.mask, logp - rollout.behavior_logp, 0.0)
            return ratio.sum(1, keepdim=True).exp().expand(logp.shape)

    class Grouped(Plain):
        def __call__(self, logp, rollout, advantage):
            weight = super().__call__(logp, rollout, advantage)
            return weight / weight.mean()

    cell, made = cell_of(3, 3), advantages.make("reinforce")
    assert moments(cell, Plain(), made, Grouping()).samples is None
    assert moments(cell, Grouped(), made, Grouping()).samples is not None


def test_quality_and_crossover_are_consistent():
    """At N = N* the two estimators have the same efficiency; below it the biased one is better."""
    cell = noisy_cell(4, 6, 0.5, 1.0, 0)
    made, truth = advantages.make("reinforce", baseline=0.5), cell.true_gradient()
    biased, unbiased = (moments(cell, corrections.make(id), made, Grouping()) for id in ("v-trace", "sequence-is"))
    star = crossover(cell, truth, biased, unbiased)
    assert star is not None and star > 1

    def efficiency(found: Moments, n: float) -> float:
        return quality(cell, truth, found, n)["efficiency"]

    assert efficiency(biased, star) == pytest.approx(efficiency(unbiased, star), rel=1e-9)
    assert efficiency(biased, star / 2) > efficiency(unbiased, star / 2)
    perfect = Moments(3 * truth, 0.0)
    assert quality(cell, truth, perfect, 1) == pytest.approx(
        {"relative_bias": 2.0, "bias_error": 0.0, "cosine": 1.0, "efficiency": 1.0}
    )


def test_defensive_is_bounded_by_the_share_of_the_target():
    """Its second moment is at most G/n0 times the on-policy one, however far mu is."""
    cell = noisy_cell(4, 3, 0.5, 2.0, 0)
    rows = list(cell_rows(cell, Sweep(), {id: corrections.make(id) for id in ("defensive", "sequence-is")}))
    assert rows[0]["variance_ratio"] < 8 < rows[1]["variance_ratio"]


def test_trust_regions_are_idle_at_the_first_step_and_not_after():
    cell = noisy_cell(4, 3, 0.5, 0.3, 0)
    made = advantages.make("reinforce", baseline=0.3)
    idle = moments(cell, corrections.make("ppo-clip"), made, Grouping()).mean
    torch.testing.assert_close(idle, moments(cell, corrections.make("none"), made, Grouping()).mean)
    moved = replace(cell, log_old=cell.log_mu)  # the target has moved away from where it wrote
    assert not torch.allclose(moments(moved, corrections.make("ppo-clip"), made, Grouping()).mean, idle)


class TestMini:
    def test_all_layers_is_the_target(self):
        cell = transformer.skipping_cell(3, 3, 0.4, 0, ())
        assert cell.divergence()["d"] == pytest.approx(0, abs=1e-12)

    def test_the_gram_is_the_parameters_inner_product(self):
        cell = transformer.skipping_cell(3, 3, 0.4, 0, (3, 7))
        assert cell.divergence()["d"] > 1e-3
        model = transformer.fit(3, 3, 0)
        parameters = {name: p.clone().requires_grad_() for name, p in model.named_parameters()}

        def gradient(coefficient: Tensor) -> Tensor:
            table = torch.func.functional_call(_Table(model), {f"model.{n}": p for n, p in parameters.items()}, ())
            total = (coefficient * cell.logp(table)).sum()
            return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(parameters.values()))])

        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, *cell.tree.tokens.shape, generator=generator, dtype=torch.float64)
        expected = float(gradient(a) @ gradient(b))
        assert cell.inner(cell.vector(a), cell.vector(b)) == pytest.approx(expected, rel=1e-8)
        kernel = cell.kernel()[5]
        alone = torch.zeros_like(a)
        alone[5] = a[5]
        assert float(a[5] @ kernel @ a[5]) == pytest.approx(float(gradient(alone).square().sum()), rel=1e-8)

    def test_unbiased_with_shared_weights(self):
        cell = transformer.skipping_cell(3, 3, 0.4, 0, (3, 7))
        row = next(iter(cell_rows(cell, Sweep(), {"sequence-is": corrections.make("sequence-is")})))
        assert row["relative_bias"] < 1e-10

    def test_subsets_keep_the_borders(self):
        for subset in transformer.subsets(3, 5, 0):
            assert len(set(subset)) == 3 and min(subset) >= 1 and max(subset) <= transformer.LAYERS - 2
        with pytest.raises(UsageError, match="cannot skip"):
            transformer.subsets(transformer.LAYERS, 1, 0)


class _Table(torch.nn.Module):
    def __init__(self, model: transformer.Mini) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return transformer.log_probabilities(self.model, 3, 3)


SMALL = ["--d", "0.3", "--horizon", "3", "--success", "0.5", "--skip", "--seeds", "1"]
FIELDS = "correction tv ess d horizon relative_bias variance_ratio cosine efficiency declared_unbiased crossover"


def test_command_line_writes_rows_tables_and_picture(tmp_path, capsys):
    files = {name: tmp_path / f"lab.{name}" for name in ("json", "md", "png")}
    status = main(
        [*SMALL, "--json", str(files["json"]), "--markdown", str(files["md"]), "--picture", str(files["png"])]
    )
    assert status == 0
    rows = json.loads(files["json"].read_text())
    assert {row["correction"] for row in rows} == set(corrections.ids())
    assert all(name in row for row in rows for name in FIELDS.split())
    assert all(row["relative_bias"] < 1e-10 for row in rows if row["declared_unbiased"])
    printed = capsys.readouterr().out
    assert "cannot tell" in printed and "our reading" in printed
    assert "| correction |" in files["md"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_equal_corrections_are_merged():
    chosen = {id: corrections.make(id) for id in ("none", "ppo-clip", "token-is", "base")}
    rows = list(cell_rows(noisy_cell(4, 3, 0.5, 0.3, 0), Sweep(), chosen))
    assert group_equal(rows) == {"none": ["none", "ppo-clip"], "base": ["base", "token-is"]}


def test_patterns_products_and_settings(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["--correction", "truncated-is*ppo-clip", "--correction", "retrace*", "--set", "correction.lam=0.9"]
    assert main([*SMALL, *arguments, "--json", str(out)]) == 0
    assert {row["correction"] for row in json.loads(out.read_text())} == {
        "truncated-is*ppo-clip",
        "retrace",
        "retrace-product",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--correction", "retrase"], "did you mean 'retrace"),
        (["--correction", "*-iss"], "'*-iss' matches none: "),
        (["--correction", "retrase*"], "'retrase*' matches none: did you mean 'retrace"),
        (["--set", "lamm=1"], "none of"),
        (["--set", "lam"], "no assignment"),
        (["--advantage", "gpro"], "did you mean 'grpo'"),
        (["--d", "-1"], "--d must be above 0"),
        (["--d", "nan"], "--d must be above 0, and a number"),
        (["--d", "inf"], "--d must be above 0, and a number"),
        (["--success", "nan"], "--success must be above 0, and a number"),
        (["--check", ""], "MODULE:CLASS"),
        (["--horizon", "30"], "1 to 7"),
        (["--d", "900", "--skip"], "cannot be reached"),
        (["--skip", "12", "--d", "0.1"], "cannot skip 12"),
        (["--batch", "4"], "at least one group"),
        (["--by-target", "8"], "8 of 8"),
        (["--check", "nothing"], "MODULE:CLASS"),
        (["--check", "no_such_module:X"], "cannot import"),
        (["--check", "agents.corrections:Nothing"], "has no 'Nothing'"),
        (["--run", "no/such/run"], "no/such/run' cannot be read"),
        (["--run", str(Path(__file__).parent)], "metrics.jsonl"),
    ],
)
def test_bad_input_exits_with_2_and_says_why(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


PLUGIN = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Good:
        power: float = 0.5
        scope = "token"

        def __call__(self, logp, rollout, advantage):
            return (self.power * (logp - rollout.behavior_logp)).clamp(max=80).exp()

    class Bad(Good):
        unbiased = True
"""


def test_check_of_a_third_party_file(tmp_path, capsys, monkeypatch):
    path = tmp_path / "lab_plugin.py"
    path.write_text(textwrap.dedent(PLUGIN))
    assert main(["--check", f"{path}:Good"]) == 0
    assert "sequence-is" in capsys.readouterr().out
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["--check", "lab_plugin:Bad"]) == 1
    assert "the exact relative bias is" in capsys.readouterr().out.replace("\n", " ")


def write_run(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_adviser_reads_a_run(tmp_path, capsys):
    row = {"mean_length": 20.0, "kl_k1": 0.02, "chi2": 1.2, "ess_sequence": 0.45, "skip_ratio": 0.2}
    row |= {"kl_k3": 0.02, "D": 0.4, "tv": 0.1, "ess_token": 0.9, "tokens": 1280.0}
    row |= {"sequences_used": 64.0, "sequences": 90.0}
    rows = [
        {"iteration": 0, "evaluation": {"greedy": 0.1}},
        {**row, "layers": [0, 1, 3]},
        {**row, "kl_k1": 0.06, "layers": [0, 2, 3]},
        {"iteration": 3, "mean_length": 20.0},
    ]
    run = write_run(tmp_path / "run", rows)
    found = read_means(run)
    assert (
        found.d == pytest.approx(0.8)
        and found.batch == 64
        and found.by_subset[(0, 1, 3)]["kl_k1"] == pytest.approx(0.02)
    )
    assert main(["--run", str(run), "--correction", "*-is", "--correction", "defensive"]) == 0
    said = capsys.readouterr().out
    assert "D = 0.8" in said and "defensive" in said and "KL per token of at most 0.015" in said
    assert "[0, 1, 3]" in said and "7.5%" in said


def test_adviser_beyond_its_reach_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "run", [{"mean_length": 300.0, "kl_k1": 0.5, "chi2": 1e9, "ess_sequence": 0.02}])
    assert main(["--run", str(run), "--correction", "truncated-is", "--correction", "none"]) == 0
    assert "beyond" in capsys.readouterr().out


def test_adviser_without_figures_says_what_is_missing(tmp_path, capsys):
    run = write_run(tmp_path / "run", [{"iteration": 1, "mean_length": 3.0}])
    assert main(["--run", str(run)]) == 2
    assert "kl_k1" in capsys.readouterr().err


def test_sweep_advantage_with_exact_groups(tmp_path):
    out = tmp_path / "rows.json"
    assert main([*SMALL, "--advantage", "grpo", "--correction", "*-is", "--json", str(out)]) == 0
    assert {row["advantage"] for row in json.loads(out.read_text())} == {"grpo"}


def test_lab_beside_training(tmp_path, capsys):
    """Three corrections whose gains are in the lab's order, and one whole disagreement is seen in the ranks."""
    gains = {"defensive": 0.3, "truncated-is": 0.2, "token-is": 0.1}
    for n, (id, gain) in enumerate(gains.items()):
        for seed in range(2):
            folder = write_run(tmp_path / f"{n}-{seed}", [])
            spec = {"agent": {"id": "nested-reft", "correction": {"id": id, **({"cap": 2.0} if "tru" in id else {})}}}
            (folder / "spec.json").write_text(json.dumps(spec))
            result = {"accuracy_before": 0.1, "accuracy_after": 0.1 + gain + 0.01 * seed}
            (folder / "result.json").write_text(json.dumps({**result, "means": {"D": 1.0, "skip_ratio": 0.25}}))
    write_run(tmp_path / "unfinished", [])
    out = tmp_path / "rows.json"
    folders = [str(path) for path in sorted(tmp_path.iterdir()) if path.is_dir()]
    assert main(["--json", str(out), "--seeds", "1", "--against", *folders]) == 0
    rows = {row["correction"]: row for row in json.loads(out.read_text())}
    assert {id: row["gain_rank"] for id, row in rows.items()} == {"defensive": 1, "truncated-is": 2, "token-is": 3}
    assert all(row["spearman"] == 1 and row["lab_rank"] == row["gain_rank"] for row in rows.values())
    assert rows["token-is"]["gain"] == pytest.approx(0.105) and rows["token-is"]["gain_error"] == pytest.approx(0.005)
    assert "25.0% of the layers skipped" in capsys.readouterr().out
    assert main(["--against", str(tmp_path / "unfinished")]) == 2


def test_the_table_of_families_is_that_of_the_registry(capsys):
    """ARCHITECTURE.md holds what the command prints."""
    assert main(["--families"]) == 0
    printed = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert page.partition("<!-- families -->\n")[2].partition("<!-- end of families -->")[0] == f"\n{printed}\n"
    cells = [cell for row in families().rows for cell in row[2:]]
    assert sorted(id for cell in cells for id in re.findall("`(.*?)`", cell)) == sorted(corrections)
