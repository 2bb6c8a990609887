"""The command that shows which layers to skip: its rows, its tables and picture, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.divergence import main
from benchmarks.layers.report import against_uniform, arms, pareto, ratio_interval, recommend
from benchmarks.layers.sets import default_samplers, sampler_of
from policies import Policy, check_subset
from policies.nested import halves
from registry import UsageError
from tests.oracles.byte_checkpoints import byte_tokenizer, write_checkpoint

FIELDS = ("sampler", "patch", "skipped", "num_layers", "layers", "kl_per_token", "tv", "speedup_ideal")
SMALL = ["--prompts", "4", "--choose-prompts", "3", "--fit-prompts", "8", "--new-tokens", "8", "--threads", "1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("divergence")
    samplers = ["uniform", "lowest-kl:joint=true", "attention-only:by=kl"]
    chosen = ["--samplers", *samplers, "--skips", "2", "3", "--draws", "2", "--pairs", "1"]
    files = ["--json", str(folder / "rows.json"), "--picture", str(folder / "picture.png")]
    assert main([*SMALL, *chosen, *files]) == 0
    assert (folder / "picture.png").stat().st_size > 10_000
    return json.loads((folder / "rows.json").read_text())


def half_weights(policy: Policy, half: int) -> int:
    """How many matrix weights of the checkpoint the half layer of that number has."""
    part = f"layers.{half // 2}.{('self_attn', 'mlp')[half % 2]}."
    return sum(weight.numel() for name, weight in policy.model.state_dict().items() if part in name)


def test_rows_hold_what_they_promise(rows: list[dict]) -> None:
    policy = Policy.load("tiny")
    read = sum(half_weights(policy, half) for half in range(24)) + policy.model.lm_head.weight.numel()
    for row in rows:
        assert set(FIELDS) <= set(row)
        layers = check_subset(row["layers"], 12)
        assert row["skipped"] == policy.layers_skipped(layers)
        gone = set(range(24)) - set(halves(layers))
        assert gone == set(halves(row["layers_skipped"]))
        assert row["kl_per_token"] >= 0
        assert 0 <= row["tv"] <= 1
        # Pinsker's inequality holds of the means, since the square root is concave
        assert row["tv"] <= (row["kl_per_token"] / 2) ** 0.5 + 1e-6
        assert row["D"] == pytest.approx(row["kl_per_token"] * row["mean_length"])
        assert row["speedup_measured"] > 0
        gone_weights = sum(half_weights(policy, half) for half in halves(row["layers_skipped"]))
        assert row["speedup_ideal"] == pytest.approx(read / (read - gone_weights))
    single = [row for row in rows if row["written_by"] == "full model"]
    assert [row["skipped"] for row in single[:12]] == [1.0] * 12
    assert len(single) == 36
    assert "command" in rows[0]["provenance"]


def test_patches_are_one_more_axis_over_the_same_sets(rows: list[dict]) -> None:
    plain = {(row["sampler"], tuple(row["layers"])): row for row in rows if row["patch"] == "none"}
    healed = [row for row in rows if row["patch"] == "heal"]
    assert {row["sampler"] for row in healed} == {"uniform", "lowest-kl:joint=true"}
    for row in healed:
        before = plain[row["sampler"], tuple(row["layers"])]
        assert row["speedup_measured"] == before["speedup_measured"]
        assert row["fit_seconds"] > 0
        assert row["kl_per_token"] != before["kl_per_token"]


def test_products_on_bytes_are_compared_too(rows: list[dict]) -> None:
    found = [row for row in rows if row["patch"] == "int8"]
    assert {row["sampler"] for row in found} == {"full", "uniform", "lowest-kl:joint=true"}
    full = found[0]
    assert (full["sampler"], full["skipped"], full["speedup_ideal"]) == ("full", 0, 1.0)
    assert 0 < full["kl_per_token"] < min(row["kl_per_token"] for row in rows if row["skipped"] >= 2)
    plain = {(row["sampler"], tuple(row["layers"])): row["kl_per_token"] for row in rows if row["patch"] == "none"}
    for row in found[1:]:
        assert row["kl_per_token"] == pytest.approx(plain[row["sampler"], tuple(row["layers"])], rel=0.5)


def test_fits_have_texts_of_their_own(tmp_path: Path, capsys) -> None:
    file = tmp_path / "rows.json"
    sets = ["--samplers", "fixed:layers=2,5,border=0", "uniform", "--skips", "2", "--no-layers", "--pairs", "0"]
    fits = ["--patches", "heal:ridge=0.5", "--patched", "fixed:layers=2,5,border=0", "--fits", "2", "--both-texts"]
    assert main([*SMALL, *sets, *fits, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    plain, patched = ([row for row in rows if row["patch"] == patch] for patch in ("none", "heal:ridge=0.5"))
    assert [row["sampler"] for row in plain] == ["fixed:layers=2,5,border=0", "uniform", "uniform"]
    assert [(row["layers_skipped"], row["fit"]) for row in patched] == [([2, 5], 0), ([2, 5], 1)]
    assert patched[0]["kl_per_token"] != patched[1]["kl_per_token"]
    for row in rows:
        assert len(row["kl_of_prompts"]) == len(row["tokens_of_prompts"]) == 4
        assert sum(row["kl_of_prompts"]) / sum(row["tokens_of_prompts"]) == pytest.approx(row["kl_per_token"], rel=1e-4)
    said = " ".join(capsys.readouterr().out.split())
    assert "KL per token of fixed:layers=2,5,border=0, patch heal:ridge=0.5, at 2 layers:" in said


def test_the_interval_of_a_ratio_covers_the_planted_one() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(100):
        difficulty, tokens = rng.gamma(4, 0.25, 60), rng.integers(5, 40, 60)

        def row(sampler: str, kl: float, of=difficulty, length=tokens) -> dict:
            sums = kl * of * length * rng.gamma(8, 1 / 8, 60)
            own = {"sampler": sampler, "patch": "none", "ratio": 0.1, "skipped": 3.0}
            found = {"kl_of_prompts": sums.tolist(), "tokens_of_prompts": length.tolist()}
            return own | found | {"kl_per_token": sums.sum() / length.sum()}

        ours, theirs = [row("ours", 0.2) for _ in range(8)], [row("uniform", x) for x in rng.gamma(16, 1 / 16, 24)]
        value, low, high = ratio_interval(ours, theirs, resamples=500, seed=trial)
        assert low < value < high
        covered += low < 0.2 < high
    assert covered >= 85
    lines = against_uniform([*ours, *theirs])
    assert len(lines) == 1
    assert f"ours, patch none, at 3 layers: {value:.3f}" in lines[0]


def test_speeds_are_shared_by_sets_of_one_shape(rows: list[dict]) -> None:
    two = [row for row in rows if row["skipped"] == 2 and row["written_by"] == "nested policy"]
    for int8 in (False, True):
        assert len({row["speedup_measured"] for row in two if (row["patch"] == "int8") == int8}) == 1


def test_the_front_and_the_recommendation_follow_the_rows() -> None:
    def row(sampler: str, skipped: float, divergence: float, ratio: float = 0.1) -> dict:
        zero = dict.fromkeys(("kl_per_token", "kl_reverse", "tv", "acceptance"), 0.0)
        own = {
            "sampler": sampler,
            "patch": "none",
            "skipped": skipped,
            "ratio": ratio,
            "num_layers": 10,
            "D": divergence,
        }
        speed = {"speedup_ideal": 1 + skipped / 10, "speedup_measured": None}
        return {**zero, **own, **speed, "D": divergence, "mean_length": 20.0, "layers_skipped": [1]}

    given = [row("a", 1, 0.1), row("b", 1, 0.2), row("b", 1, 0.4), row("c", 2, 0.25, 0.2), row("d", 3, 0.2, 0.3)]
    found = arms(given)
    assert [(arm["sampler"], arm["sets"]) for arm in found] == [("a", 1), ("d", 1), ("c", 1), ("b", 2)]
    assert [arm["sampler"] for arm in pareto(found)] == ["a", "d"]
    assert "d at 3 of 10 layers" in recommend(found, 0.3)
    assert "a at 1 of 10 layers" in recommend(found, 0.15)
    assert "keep all layers" in recommend(found, 0.05)


def test_what_stays_within_the_budget_without_being_faster_is_not_called_outside_of_it() -> None:
    """Such as rollout_dtype=int8 where nothing was timed: it skips no weights."""
    row = {"sampler": "full", "patch": "int8", "num_layers": 10, "mean_length": 20.0, "D": 0.22, "ratio": 0.1}
    row |= {"skipped": 0, "speedup_ideal": 1.0, "speedup_measured": None}
    said = recommend([row], 0.3)
    assert "Nothing here stays" not in said and "--pairs" in said and "D 0.22" in said
    said = recommend([row | {"speedup_measured": 0.9}], 0.3)
    assert "keep all layers" in said and "is faster than the full model" in said
    assert "Nothing here stays" in recommend([row], 0.1)


def test_every_sampler_with_a_ratio_is_compared() -> None:
    assert {"uniform", "even", "early-exit", "block-influence", "lowest-kl", "softmax"} < set(default_samplers())
    assert sampler_of("softmax:score=influence,temperature=2", 0.25, 2).temperature == 2.0


@pytest.mark.parametrize(("skips", "words"), [("11", "largest possible"), ("12", "12 layers, and one has to stay")])
def test_too_many_layers_are_refused_before_anything_is_measured(skips, words, capsys) -> None:
    assert main([*SMALL, "--skips", "2", skips]) == 2
    error = capsys.readouterr().err
    assert words in error and "nats per token" not in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "no-such-folder"], "no-such-folder"),
        (["--problems", "no-such-set"], "no-such-set"),
        (["--samplers", "unifrom"], "uniform"),
        (["--samplers", "full"], "has no ratio"),
        (["--samplers", "softmax:temprature=2"], "temprature"),
        (["--skips", "0"], "--skips 0"),
        (["--patches", "hael"], "heal"),
        (["--prompts", "0"], "--prompts 0"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--threads", "-1"], "--threads -1"),
        (["--budget", "nan"], "--budget nan"),
        (["--patched", "unifrm"], "did you mean 'uniform'"),
        (["--problems", "svamp", "--prompts", "5000"], "lower --prompts"),
    ],
)
def test_errors_name_the_value_and_what_to_do(arguments, words, capsys, monkeypatch, tmp_path: Path) -> None:
    data = tmp_path / "svamp"
    data.mkdir()
    row = {"ID": "1", "Body": "One apple.", "Question": "How many apples?", "Equation": "1", "Answer": 1.0, "Type": "x"}
    (data / "SVAMP.json").write_text(json.dumps([{**row, "ID": str(n)} for n in range(1000)]))
    monkeypatch.setenv("NESTED_REFT_DATA", str(tmp_path))
    small = [a for a in SMALL if "--prompts" not in arguments or a not in ("--prompts", "4")]
    assert main([*small, "--no-layers", "--pairs", "0", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_an_unknown_field_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="layers"):
        sampler_of("fixed:layer=3", 0.2, 1)


def test_patches_that_the_layers_do_not_take_are_left_out_before_anything_is_measured(tmp_path, capsys) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    kinds = ["sliding_attention", "full_attention"] * 2
    write_checkpoint(
        tmp_path,
        "gemma3_text",
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=64,
        head_dim=16,
        query_pre_attn_scalar=16,
        rope_parameters=rope,
    )
    out = tmp_path / "rows.json"
    given = ["--policy", str(tmp_path), "--samplers", "uniform", "--skips", "1", "--pairs", "0", "--json", str(out)]
    assert main([*SMALL, *given]) == 0
    said = capsys.readouterr().err
    assert "no rows of patch heal: Gemma norms" in said
    assert said.index("no rows of patch heal") < said.index("nats per token")
    assert {row["patch"] for row in json.loads(out.read_text())} <= {"none", "int8"}
