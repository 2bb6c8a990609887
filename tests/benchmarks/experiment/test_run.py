"""A run is a function of its spec: repeated, interrupted, killed, damaged, it ends in the same numbers or says why."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.compare import main as compare
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec
from benchmarks.experiment.training import Training, run
from benchmarks.measuring.durable import in_use, locked, read_rows, write_whole
from benchmarks.run import main
from registry import UsageError
from tests.oracles.small_world import AGENT, SMALL, numbers, small


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[RunSpec, Path]:
    """An uninterrupted run."""
    runs = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    spec = small()
    run(spec, runs)
    return spec, runs / spec.hash


def test_run_writes_its_folder(whole):
    spec, folder = whole
    assert {"spec.json", "provenance.json", "metrics.jsonl", "result.json", "model"} <= set(os.listdir(folder))
    assert not (folder / "checkpoint").exists()
    assert RunSpec.read(folder / "spec.json") == spec and RunSpec.read(folder / "spec.json").hash == folder.name
    result = json.loads((folder / "result.json").read_text())
    assert [point["iteration"] for point in result["curve"]] == [0, 3, 6]
    assert len(result["right_after"]) == 8 and len(result["sampled_right_after"]) == 8
    assert result["curve"][-1]["greedy"] == result["right_after"].count("1") / 8


def test_run_trains(whole):
    rows = [row for row in numbers(whole[1]) if "evaluation" not in row]
    assert all(row["grad_norm"] > 0 for row in rows)


def test_saved_model_loads_in_transformers(whole):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole[1] / "model")
    assert model.config.num_hidden_layers == 12


def test_spec_file_repeats_the_run(whole, tmp_path):
    spec, folder = whole
    assert main(["--spec", str(folder / "spec.json"), "--runs", str(tmp_path), "--quiet", "--threads", "1"]) == 0
    assert numbers(tmp_path / spec.hash) == numbers(folder)


def test_rows_do_not_stay_in_memory(tmp_path):
    """Else memory grows with a run's length: 45 MB in 3,600 iterations were seen."""
    spec, kept = small(iterations=6), []
    for _ in Training(spec, tmp_path):
        kept.append(sum(isinstance(one, dict) and "time/cpu" in one and "layers" in one for one in gc.get_objects()))
    assert len(kept) > 6 and max(kept) <= 2, kept


def test_finished_run_is_not_done_again(whole, monkeypatch):
    monkeypatch.setattr(Training, "__iter__", lambda self: pytest.fail("trained again"))
    assert run(whole[0], whole[1].parent)["hash"] == whole[0].hash


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_interrupted_after_any_row_resumes_to_the_same_numbers(whole, tmp_path, rows):
    spec, folder = whole
    training = iter(Training(spec, tmp_path))
    for _ in range(rows):
        next(training)
    training.close()
    for _ in Training(spec, tmp_path):
        pass
    assert numbers(tmp_path) == numbers(folder)


def test_interrupted_with_adapters_resumes_to_the_same_numbers(tmp_path):
    pytest.importorskip("peft")
    settings = {"lora_rank": 2, "gradient_checkpointing": True, "minibatches": 2}
    spec = resolve(AGENT, settings=SMALL | settings | {"iterations": 4, "evaluation.every": 0})
    assert spec.agent["lora_rank"] == 2 and spec.agent["gradient_checkpointing"] is True
    for _ in Training(spec, tmp_path / "whole"):
        pass
    training = iter(Training(spec, tmp_path / "parts"))
    for _ in range(5):  # the evaluation at the start, then four iterations; the last checkpoint is of the second
        next(training)
    training.close()
    assert (tmp_path / "parts" / "checkpoint" / "adapters.safetensors").is_file()
    for _ in Training(spec, tmp_path / "parts"):
        pass
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def in_child(spec: RunSpec, folder: Path) -> int:
    """Train in a forked child (no imports to wait for); returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in Training(spec, folder):
                pass
            status = 0
        finally:
            os._exit(status)
    return child


def killed_at_random(spec: RunSpec, folder: Path, rng: random.Random) -> None:
    """Run to the end in spite of kills, each some rows and moments after the last, until three of them left a
    checkpoint to resume from. A run that ended before is begun anew."""
    resumed = 0
    while resumed < 3:
        if (folder / "result.json").exists():
            shutil.rmtree(folder)
        child = in_child(spec, folder)
        wanted = len(read_rows(folder / "metrics.jsonl")[0]) + rng.randrange(3)
        while len(read_rows(folder / "metrics.jsonl")[0]) < wanted and not (folder / "result.json").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        resumed += (folder / "checkpoint" / "agent.json").is_file()
    assert os.waitpid(in_child(spec, folder), 0)[1] == 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_moments_resumes_to_the_same_numbers(whole, tmp_path, seed):
    spec, folder = whole
    killed = tmp_path / "killed"
    killed_at_random(spec, killed, random.Random(seed))
    assert numbers(killed) == numbers(folder)
    assert not list(killed.glob("*partial*")) and not list(killed.glob("*.old-*"))


@pytest.mark.parametrize("when", ["before the old checkpoint moves", "between the two renames"])
def test_killed_while_a_checkpoint_is_replaced(whole, tmp_path, monkeypatch, when):
    spec, folder = whole
    rename = Path.rename

    def die(path: Path, target):
        target = Path(target)
        if when.startswith("before") and ".old-" in target.name:
            raise KeyboardInterrupt
        if when.startswith("between") and target.name == "checkpoint" and list(tmp_path.glob("checkpoint.old-*")):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", die)
        list(Training(spec, tmp_path))
    assert list(tmp_path.glob("checkpoint.partial-*"))
    list(Training(spec, tmp_path))
    assert numbers(tmp_path) == numbers(folder)
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_disk_too_full_for_checkpoints_is_refused_before_the_first_row(whole, tmp_path, monkeypatch):
    spec, folder = whole
    training = Training(spec, tmp_path / "run")
    written = sum(file.stat().st_size for file in (folder / "model").iterdir())
    free = [written // 2]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free[0]))
    with pytest.raises(UsageError, match=r"run' lies on a disk with [0-9]+ MB free.*--runs"):
        list(training)
    assert not (tmp_path / "run").exists()
    free[0] = 4 * written
    for _ in zip(range(5), training, strict=False):
        pass
    assert (tmp_path / "run" / "checkpoint").is_dir()
    rows, free[0] = training.rows, written // 2
    with pytest.raises(UsageError, match="--runs"):
        list(Training(spec, tmp_path / "run"))
    assert training.rows[: spec.checkpoint_every] == rows[: spec.checkpoint_every]
    monkeypatch.undo()
    torch.set_num_threads(1)
    list(Training(spec, tmp_path / "run"))
    assert numbers(tmp_path / "run") == numbers(folder)


@pytest.mark.parametrize("damage", ["half a line", "a line in the middle", "rows lost"])
def test_damaged_metrics_of_an_unfinished_run(whole, tmp_path, damage):
    spec, folder = whole
    training = iter(Training(spec, tmp_path))
    for _ in range(7):
        next(training)
    training.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    if damage == "half a line":
        path.write_text("\n".join([*lines, lines[-1][:40]]))
    elif damage == "a line in the middle":
        path.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    else:
        path.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    if damage == "half a line":
        list(Training(spec, tmp_path))
    else:
        with pytest.warns(UserWarning, match="starts again from the beginning"):
            list(Training(spec, tmp_path))
    assert numbers(tmp_path) == numbers(folder)


@pytest.fixture(scope="module")
def interrupted(whole, tmp_path_factory) -> Path:
    """A run that ended between two checkpoints."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    training = iter(Training(whole[0], path))
    for _ in range(7):
        next(training)
    training.close()
    return path


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _not_a_number(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", _cut),
        ("model.safetensors", _not_a_number),
        ("optimizer.safetensors", Path.unlink),
        ("agent.json", _cut),
        ("config.json", lambda path: path.write_bytes(b"")),
    ],
)
def test_a_run_whose_checkpoint_is_damaged_starts_again(whole, interrupted, tmp_path, name, harm):
    spec, folder = whole
    path = tmp_path / "run"
    shutil.copytree(interrupted, path)
    harm(path / "checkpoint" / name)
    with pytest.warns(UserWarning, match=rf"{name}.*starts again from the beginning"):
        list(Training(spec, path))
    assert numbers(path) == numbers(folder)


def test_budget_of_tokens_ends_the_run(tmp_path):
    spec = small()
    spec = RunSpec(**{**spec.__dict__, "tokens": 60, "iterations": 50})
    result = run(spec, tmp_path)
    rows = [row for row in numbers(tmp_path / spec.hash) if "evaluation" not in row]
    assert result["tokens"] >= 60 and result["tokens"] - rows[-1]["tokens"] < 60
    assert result["curve"][-1]["iteration"] == len(rows) < 50


def test_a_budget_of_seconds_suffices(tmp_path):
    settings = {name: value for name, value in SMALL.items() if name != "iterations"}
    spec = resolve(AGENT, settings=settings, seconds=1.0)
    assert spec.iterations is None
    result = run(spec, tmp_path)
    rows = [row for row in read_rows(tmp_path / spec.hash / "metrics.jsonl")[0] if "evaluation" not in row]
    assert result["seconds"] >= 1.0 > result["seconds"] - rows[-1]["time/iteration"]
    assert RunSpec.read(tmp_path / spec.hash / "spec.json") == spec


def test_a_run_needs_a_budget():
    with pytest.raises(UsageError, match="needs a budget"):
        RunSpec(agent={"id": "reft"}, iterations=None)


def test_full_disk_says_what_to_do_and_loses_nothing(whole, tmp_path, capfd):
    spec, folder = whole
    child = os.fork()
    if child == 0:
        # A limit on file size fails a write just as a full disk does: after some bytes, anywhere.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        os._exit(main(["--spec", str(folder / "spec.json"), "--runs", str(tmp_path), "--quiet"]))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    message = capfd.readouterr().err
    assert "error: run folder" in message and "cannot be written" in message and "goes on" in message
    assert "Traceback" not in message
    assert not list((tmp_path / spec.hash).glob("*.partial-*"))  # else a full disk stays full of it
    run(spec, tmp_path)
    assert numbers(tmp_path / spec.hash) == numbers(folder)


def test_folder_that_cannot_be_made(whole, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert main(["--spec", str(whole[1] / "spec.json"), "--runs", str(tmp_path / "runs"), "--quiet"]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err


def test_two_processes_on_one_folder(whole, tmp_path, capsys):
    with locked(tmp_path):
        assert in_use(tmp_path)
        with pytest.raises(UsageError, match="in use by another process"), locked(tmp_path):
            pass
    assert not in_use(tmp_path)
    spec = whole[0]
    (tmp_path / spec.hash).mkdir()
    with locked(tmp_path / spec.hash):
        assert main(["--spec", str(whole[1] / "spec.json"), "--runs", str(tmp_path), "--quiet"]) == 2
    assert "in use" in capsys.readouterr().err


def test_damaged_result_is_named(whole, tmp_path):
    folder = tmp_path / whole[0].hash
    folder.mkdir()
    (folder / "result.json").write_text('{"agent": ')
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
        run(whole[0], tmp_path)


def test_write_whole_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agent", "reftt"], "did you mean 'reft'"),
        (["--agent", "nested-reft/uniform/retrase"], "did you mean 'retrace'"),
        (["--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["--set", "learning_rate"], "no assignment"),
        (["--set", "learning_rate=fast"], "not a valid float"),
        (["--set", "evaluation.problem=3"], "did you mean 'problems'"),
        (["--set", "evaluation.sets=gms8k"], "did you mean 'gsm8k'"),
        (["--set", "problems_per_batch=0"], "problems_per_batch=0 must be at least 1"),
        (["--set", "group_size=1"], "raise group_size"),
        (["--set", "writer=vllm", "--set", "writer.python=/no/python"], "writer.python='/no/python' cannot be started"),
        (["--env", "MathReason/swamp-v0"], "MathReason"),
        (["--policy", "/nowhere"], "/nowhere"),
        (["--iterations", "0"], "must be positive"),
        (["--seconds", "-1"], "must be positive"),
        (["--tokens", "0"], "must be positive"),
        (["--spec", "/nowhere.json"], "cannot be read"),
        (["--spec", __file__, "--seed", "1"], "leave out"),
    ],
)
def test_bad_input_exits_2_says_what_to_do_and_leaves_no_run(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "held-out accuracy" not in error
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.slow
def test_a_whole_process_killed_in_mid_run(whole, tmp_path):
    spec, folder = whole
    command = [sys.executable, "-m", "benchmarks.run", "--spec", str(folder / "spec.json"), "--quiet"]
    command += ["--runs", str(tmp_path), "--threads", "1"]
    process = subprocess.Popen(command)
    metrics = tmp_path / spec.hash / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / spec.hash / "result.json").exists()
    subprocess.run(command, check=True)
    assert numbers(tmp_path / spec.hash) == numbers(folder)


def test_another_budget_is_another_run_and_says_so(whole, capsys, tmp_path):
    """Of a run of before its agent had all of today's arguments, too."""
    spec, folder = whole[0], tmp_path / whole[1].name
    folder.mkdir()
    stored = json.loads((whole[1] / "spec.json").read_text())
    del stored["agent"]["trained_layers"]
    (folder / "spec.json").write_text(json.dumps(stored))
    run(replace(spec, iterations=2), tmp_path, quiet=False)
    assert f"{folder} is this run with another budget (iterations=6)" in capsys.readouterr().err
    run(replace(spec, iterations=1, seed=9), tmp_path, quiet=False)
    assert "another budget" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--set", "dtype=fp16"], "dtype='fp16' is unknown"),
        (["--set", "group_size=0"], "group_size=0 must be at least 1"),
        (["--set", "temperature=0"], "temperature=0.0 must be"),
        (["--set", "adam_betas=0.9"], "must be two numbers"),
        (["--set", "env.max_new_tokens=0"], "max_new_tokens=0 must be"),
        (["--set", "env.max_new_tokens=100000000"], "go beyond the 512 positions"),
        (["--set", "env.tokenizer=./nowhere"], "no such folder"),
        (["--set", "evaluation.split=tset"], "did you mean 'test'"),
        (["--seed", "-1"], "seed=-1 must be"),
        (["--agent", "sb3-ppo", "--set", "n_steps=1"], "n_steps=1 is less than"),
        (["--agent", "sft", "--set", "batch_size=0"], "batch_size=0 must be"),
        (["--agent", ""], "unknown agent ''"),
        (["--agent", "nested-reft/even/none", "--set", "sampler.ratio=1.5"], "skip ratio 1.5 is outside [0, 1)"),
        (["--set", "trained_layers=0,99"], "trained_layers=[0, 99] must be different numbers of layers, 0 to 11"),
        (["--policy", "tinny"], "no model 'tinny': did you mean 'tiny'?"),
        (["--env", "TextMathReason-v0"], "env='TextMathReason-v0' has no vector env: take MathReason-v0"),
    ],
)
def test_what_a_run_would_refuse_its_plan_refuses(line, message, tmp_path, capsys):
    assert main([*line, "--dry-run", "--runs", str(tmp_path)]) == 2
    planned = capsys.readouterr().err
    assert message in planned and planned.count("\n") == 1
    assert main([*line, "--quiet", "--runs", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("trl", ["--agent", "trl-grpo"]),
        ("peft", ["--set", "lora_rank=2"]),
        ("vllm", ["--set", "writer=vllm"]),
    ],
)
def test_a_plan_misses_the_packages_that_the_run_would(tmp_path, capsys, monkeypatch, package, line):
    """Before the start of all arms is trained, not after."""
    if package == "vllm" and find_spec("vllm") is not None:
        pytest.skip("it is installed")
    monkeypatch.setitem(sys.modules, package, None)
    others = [word.replace("--agent", "--agents") for word in line]
    for command, words in ((main, line), (compare, others)):
        assert command([*words, "--dry-run", "--runs", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "pip install" in error and package in error and error.count("\n") == 1
    assert compare([*others, "--start", "sft", "--start-set", "problems=4", "--runs", str(tmp_path)]) == 2
    assert "pip install" in capsys.readouterr().err and not list(tmp_path.iterdir())


WITHOUT_POSIX = """
import os, sys
fork, register = os.fork, os.register_at_fork
del os.fork, os.register_at_fork
sys.modules["fcntl"] = sys.modules["resource"] = None
import envs, gymnasium as gym
gym.make("MathReason-v0").reset(seed=0)
os.fork, os.register_at_fork = fork, register  # torch's own, on a system that has them
from benchmarks.run import main
sys.exit(main(["--runs", sys.argv[1]]))
"""


def test_a_system_without_file_locks_has_environments_and_is_told_that_runs_need_more(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Linux, macOS or WSL" in done.stderr
