"""The throughput comparison: its arithmetic, its rows, its command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import gpu, throughput
from benchmarks.measuring.pairing import Block, abba, median_ratio, processor_ratio
from benchmarks.speed import limits, rows
from benchmarks.speed.iteration import OurIteration
from benchmarks.speed.limits import update_seconds
from benchmarks.speed.ours import Engine, Parts
from benchmarks.speed.process import BlockProcess, EngineProcess
from benchmarks.speed.rows import COLUMNS
from benchmarks.speed.transformers_generate import ContinuousBatching, Generate
from benchmarks.speed.trl import TrlIteration, TrlProcess
from benchmarks.speed.work import kept_layers, make_work
from policies import Policy
from registry import UsageError


def test_abba_alternates_and_keeps_who_is_who():
    order: list[str] = []

    def runs(name: str, seconds: float):
        def run() -> Block:
            order.append(name)
            return Block(10, seconds)

        return run

    pairs = abba(runs("ours", 1.0), runs("theirs", 2.0), 4)
    assert order == ["ours", "theirs", "theirs", "ours"] * 2
    assert all((ours.seconds, theirs.seconds) == (1.0, 2.0) for ours, theirs in pairs)
    ratio = median_ratio(pairs)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_processor_time_is_compared_where_both_counted_it():
    ours, theirs, uncounted = Block(10, 5.0, 2.0), Block(30, 3.0, 18.0), Block(30, 3.0)
    assert processor_ratio([(ours, theirs), (ours, uncounted)]) == pytest.approx(5 / (30 / 18))
    assert processor_ratio([(ours, uncounted), (uncounted, theirs)]) is None


def test_the_interval_covers_the_ratio_of_a_drifting_noisy_machine():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        speed = np.exp(np.cumsum(rng.normal(0, 0.2, 12)))  # the machine drifts; both blocks of a pair see it
        noise = np.exp(rng.normal(0, 0.05, (12, 2)))
        pairs = [(Block(100, s * a), Block(100, 1.3 * s * b)) for s, (a, b) in zip(speed, noise, strict=True)]
        ratio = median_ratio(pairs, resamples=400, seed=trial)
        covered += ratio.low <= 1.3 <= ratio.high
    assert covered >= 180


@pytest.fixture(scope="module")
def policy():
    return Policy.load("tiny")


def options(**changes) -> argparse.Namespace:
    found = throughput.parser().parse_args(["--prompts", "2", "--group-size", "2", "--slots", "3", "--new-tokens", "5"])
    found.skips = (2,)
    found.pairs = 1
    return argparse.Namespace(**{**vars(found), "batch": 2, **changes})


def test_forced_length_writes_exactly_that_many_tokens(policy):
    work = make_work(options(), policy, natural=False)
    engine = Engine(policy, work, kept_layers(policy, 2))
    assert engine().tokens == 2 * 2 * 5
    assert engine.parts.tokens == 20 and engine.parts.steps == 10  # 3 slots and 4 episodes: a wave of 3, a wave of 1
    assert engine.parts.occupancy == pytest.approx(20 / 30)
    assert engine.parts.prompt_tokens == sum(len(work.prompt(problem)) for problem in (0, 1))
    assert 0 < engine.parts.head + engine.parts.layers < engine.parts.total
    assert Generate(policy, work, batch=3)().tokens == 3 * 5


def test_continuous_batching_writes_as_many(policy):
    work = make_work(options(), policy, natural=False)
    assert ContinuousBatching(policy, work, batch=3)().tokens == 3 * 5


def test_natural_length_counts_up_to_the_stop(policy):
    work = make_work(options(new_tokens=40), policy, natural=True)
    assert work.stop
    generate = Generate(policy, work, batch=2)
    stop = work.stop[0]
    assert generate.count_tokens(torch.tensor([[5, stop, 0, 0], [5, 6, 7, 8], [stop, stop, 0, 0]])) == 2 + 4 + 1
    assert 2 <= generate().tokens <= 80
    assert 4 <= Engine(policy, work, kept_layers(policy, 0))().tokens <= 160


def test_kept_layers_are_spread_and_never_the_borders(policy):
    for skips in range(policy.num_layers - 1):
        kept = kept_layers(policy, skips)
        assert len(kept) == policy.num_layers - skips
        assert {0, policy.num_layers - 1} <= set(kept)


def test_the_bandwidth_limit_is_to_read_the_weights_and_each_row_s_cache_once(policy, monkeypatch):
    """At a byte a second a step takes as many seconds as transformers' weights and keys and values have bytes."""
    monkeypatch.setattr(limits, "bandwidth", lambda device: 1.0)
    rows, context = 3, 7
    with torch.no_grad():
        cache = policy.model(torch.ones(rows, context, dtype=torch.long), use_cache=True).past_key_values
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    weights = sum(weight.nbytes for weight in policy.model.parameters())
    assert rows / limits.bandwidth_limit(policy, rows, context) == pytest.approx(weights + held)
    assert rows / limits.bandwidth_limit(policy, rows, context, int8=True) == pytest.approx(weights / 4 + held)


def test_the_command_writes_rows_and_a_picture(tmp_path, capsys):
    table, picture = tmp_path / "deep" / "rows.json", tmp_path / "rows.png"
    words = "--quick --prompts 2 --group-size 2 --slots 4 --new-tokens 4 --batch 2 --pairs 1 --workload forced"
    assert throughput.main([*words.split(), "--json", str(table), "--picture", str(picture)]) == 0
    rows = json.loads(table.read_text())
    assert [row["name"] for row in rows][:2] == ["engine, again (A/A)", "engine"]
    assert rows[1]["outside"] < 1  # below zero where another process had the processor while the limit was timed
    for row in rows:
        assert set(COLUMNS) <= set(row) and row["provenance"]["packages"]["torch"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["workload"] == "forced"
    assert picture.stat().st_size > 1000
    assert "2 of 12 skipped" in capsys.readouterr().out


def test_alone_the_engine_is_measured_by_its_depths(tmp_path):
    table = tmp_path / "rows.json"
    words = "--alone --prompts 2 --group-size 2 --slots 4 --new-tokens 4 --pairs 1 --workload forced --skips 2 5"
    assert throughput.main([*words.split(), "--json", str(table)]) == 0
    rows = json.loads(table.read_text())
    names = ["engine, again (A/A)", "engine, 2 of 12 skipped", "engine, 5 of 12 skipped"]
    assert [row["name"] for row in rows] == names and all(row["against"] == "engine" for row in rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_quick_comparison_of_a_models_folder_writes_few_tokens(monkeypatch, capsys, device):
    """At what two cores with AVX2 write of a model of 135M parameters, 300 tokens a second and 100 by generate, under
    two and a half minutes of writing."""
    written = {"engine": 0, "generate": 0}

    class Counted:
        def __init__(self, policy, work, *_):
            self.work, self.parts = work, Parts()

        def __call__(self):
            self.parts.total, self.parts.layers = 1.0, 0.5
            tokens = len(self.work.problems) * self.work.group_size * self.work.new_tokens
            written["engine"] += tokens
            return Block(tokens, 1.0)

    class CountedGenerate(Counted):
        def __call__(self):
            tokens = 64 * self.work.new_tokens
            written["generate"] += tokens
            return Block(tokens, 4.0)

    monkeypatch.setattr(rows, "Engine", Counted)
    monkeypatch.setattr(rows, "Generate", CountedGenerate)
    monkeypatch.setattr(rows, "engine_figures", lambda *_, **__: {})
    given = throughput.parser().parse_args(["--quick", "--policy", "a/model"])
    throughput.settle_work(given)
    policy = SimpleNamespace(num_layers=30, vocab_size=512, device=torch.device(device))
    work = SimpleNamespace(
        problems=range(given.prompts), group_size=given.group_size, new_tokens=given.new_tokens, env=SimpleNamespace()
    )
    work.env.num_envs = given.slots
    given.skips = throughput.chosen_skips(given, policy.num_layers)
    found = list(rows.measure(policy, work, "forced", given, {}))
    by_bytes = [row for row in found if row["name"] == "engine, int8"]
    assert bool(by_bytes) == (device == "cpu") and ("no int8 rows" in capsys.readouterr().err) == (device == "cuda")
    if device == "cuda":
        return
    assert [row["against"] for row in found] == [
        "engine",
        "generate (batch 64)",
        "engine",
        "engine",
        "engine",
        "engine",
    ]
    assert given.workload == "forced" and given.pairs == 3 and given.prompts * given.group_size == given.slots
    assert written["engine"] / 300 + written["generate"] / 100 < 150


def test_what_is_given_stays_in_a_quick_comparison():
    given = throughput.parser().parse_args(
        ["--quick", "--policy", "a/model", "--prompts", "3", "--workload", "natural"]
    )
    throughput.settle_work(given)
    assert (given.prompts, given.new_tokens, given.workload) == (3, 16, "natural")
    whole = throughput.parser().parse_args(["--policy", "a/model"])
    throughput.settle_work(whole)
    assert (whole.prompts, whole.new_tokens, whole.workload, whole.pairs) == (32, 64, "both", 8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--slots 0", "--slots 0: give at least 1"),
        ("--threads 0", "--threads 0: give at least 1"),
        ("--threads -1", "--threads -1: give at least 1"),
        ("--policy ./no", "no such"),
        ("--skips 11", "--skips 11: give 1 to 10"),
        ("--problems gsm9k", "gsm8k"),
        ("--alone --batch 32", "leave out one of it and --batch"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(words, said, capsys):
    assert throughput.main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_a_whole_iteration_writes_all_its_completions(policy):
    work = make_work(options(), policy, natural=False, reward="random")
    iteration = OurIteration(policy, work)
    before = policy.version
    assert [iteration().tokens for _ in range(2)] == [2 * 2 * 5] * 2
    assert policy.version > before  # it updates


def test_a_whole_iteration_s_row_says_how_much_is_not_products(policy):
    (line,) = rows.iteration_rows(policy, options(device="cpu", dtype=None, pairs=2))
    assert line["against"] == "itself" and line["ratio_low"] <= line["ratio"] <= line["ratio_high"]
    assert line["outside"] < 1  # below zero where another process had the processor while the products were timed


def test_outside_is_what_the_products_leave_of_the_median_iteration():
    class Iteration:
        seconds = iter([9.0, 4.0, 4.0, 3.0])

        def __call__(self) -> Block:
            return Block(10, next(self.seconds))

        def product_seconds(self) -> float:
            return 1.0

    assert rows.iteration_row("iteration", Iteration(), lambda: Block(10, 8.0), 4, "")["outside"] == 0.75


def test_an_update_s_products_take_longer_for_more_tokens(policy):
    few, many = (update_seconds(policy, tokens, tokens, 2048) for tokens in (100, 4000))
    assert 0 < few < many


def test_a_whole_iteration_of_trl(policy):
    pytest.importorskip("trl", reason="TRL is not installed")
    work = make_work(options(), policy, natural=False, reward="random")
    block = TrlIteration(policy, work)()
    assert block.tokens == 20 and block.seconds > 0


def test_without_trl_its_row_says_what_to_install(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UsageError, match="pip install"):
        TrlIteration(policy, make_work(options(), policy, natural=False))


def test_trl_steps_in_a_process_of_its_own(policy):
    theirs = TrlProcess(options(device="cpu", dtype=None))
    try:
        if importlib.util.find_spec("trl"):
            assert [theirs().tokens for _ in range(2)] == [8 * 2 * 5] * 2
        else:
            with pytest.raises(UsageError, match="pip install"):
                theirs()
    finally:
        theirs.close()


@pytest.mark.parametrize(("python", "said"), [("./no", "cannot be started"), (sys.executable, "needs vllm")])
def test_an_environment_without_vllm_is_named_before_trl_s_step(python, said):
    if said == "needs vllm" and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is in this environment")
    with pytest.raises(UsageError, match=said):
        TrlProcess(options(device="cpu", dtype=None, vllm=python))


def child(code: str) -> BlockProcess:
    return BlockProcess("peer", [sys.executable, "-c", code], {"OF_IT_ALONE": "7"})


def test_a_child_works_off_a_block_a_line_with_variables_of_its_own():
    block = """print('{"tokens": %s, "seconds": 2}' % os.environ["OF_IT_ALONE"], flush=True)"""
    peer = child(f"import os, sys\nfor _ in sys.stdin: {block}")
    try:
        assert [peer().rate for _ in range(2)] == [3.5, 3.5]
        assert "OF_IT_ALONE" not in os.environ
    finally:
        peer.close()
    assert peer.child.returncode is not None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "peer's process ended with exit code 3; its messages"),
        ("import os; os.kill(os.getpid(), 9)", "it ran out of memory"),
        ("""print('{"error": "no such model"}')""", "^no such model$"),
    ],
)
def test_what_ends_a_child_is_said(code, said):
    peer = child(code)
    try:
        with pytest.raises(UsageError, match=said):
            peer()
    finally:
        peer.close()


@pytest.mark.parametrize(("engine", "module"), [("vllm", "vllm"), ("openvino", "openvino_genai")])
def test_an_environment_without_the_engine_says_what_to_install(policy, engine, module):
    work = make_work(options(), policy, natural=False)
    with pytest.raises(UsageError, match=f"--{engine} ./no/python: no such program"):
        EngineProcess(engine, "./no/python", policy, work)
    if importlib.util.find_spec(module):
        pytest.skip(f"this environment has {module}")
    peer = EngineProcess(engine, sys.executable, policy, work)
    try:
        with pytest.raises(UsageError, match=f"has no {engine} .*: pip install"):
            peer()
        assert peer.folder.is_dir()
    finally:
        peer.close()
    assert not peer.folder.exists()


@pytest.mark.vllm
@pytest.mark.parametrize("engine", ["vllm", "openvino"])
@pytest.mark.parametrize("natural", [False, True])
def test_another_engine_writes_as_many_tokens(policy, engine, natural):
    python = os.environ.get(f"NESTED_REFT_{engine.upper()}")
    if python is None:
        pytest.skip(f"NESTED_REFT_{engine.upper()} names no interpreter")
    peer = EngineProcess(engine, python, policy, make_work(options(new_tokens=40), policy, natural))
    try:
        for _ in range(2):
            assert (4 <= peer().tokens < 160) if natural else (peer().tokens == 160)
    finally:
        peer.close()


def test_the_gpu_command_says_that_there_is_none(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_gpu_command_s_random_model_is_a_checkpoint(tmp_path):
    gpu.random_model(tmp_path, gpu.SMALL)
    loaded = Policy.load(str(tmp_path), dtype="bfloat16")
    work = make_work(options(policy=str(tmp_path)), loaded, natural=False)
    assert Engine(loaded, work, kept_layers(loaded, 1))().tokens == 20


def test_the_gpu_command_reports_a_step_that_fails_or_hangs(capsys):
    failed = gpu.run([sys.executable, "-c", "print('so far'); raise SystemExit(3)"], 20)
    assert failed["status"] == 3 and "so far" in str(failed["output"])
    hung = gpu.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2)
    assert "stopped after 2 s" in str(hung["status"]) and "begun" in str(hung["output"])
