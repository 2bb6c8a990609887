"""The warm-up command: its steps against transformers' loss, what it writes, and that no kill changes a number."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from agents.held_out import HeldOut
from agents.supervised import demonstrations
from agents.warm_up import HELP, SupervisedWarmup, Warmup, main
from envs.task import Task
from policies import Policy
from registry import UsageError, fields_of


def task_of(**arguments) -> Task:
    return gym.make("MathReason-v0", **arguments).unwrapped.task


@pytest.fixture(scope="module")
def source(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with its tokenizer."""
    made = tmp_path_factory.mktemp("source")
    Policy.load(folder).save(made)
    task_of().tokenizer.save_pretrained(made)
    return str(made)


@pytest.fixture
def settings(source: str) -> SupervisedWarmup:
    return SupervisedWarmup(
        source,
        epochs=2,
        batch_size=5,
        learning_rate=1e-3,
        problems=30,
        skip=0.5,
        seed=4,
        evaluation_problems=6,
        evaluation_every=4,
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(out: Path) -> Any:
    """Everything that a warm-up says but its times, and its weights."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(out)]
    result = json.loads((out / "warm_up.json").read_text())["result"]
    clocked = ("seconds", "seconds_evaluation", "tokens_per_second", "peak_bytes")
    weights = {name: value.numpy().tobytes() for name, value in load_file(out / "model.safetensors").items()}
    return rows, {name: value for name, value in result.items() if name not in clocked}, weights


@pytest.fixture(scope="module")
def whole(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed warm-up of ``settings``."""
    out = tmp_path_factory.mktemp("whole") / "out"
    given = SupervisedWarmup(source, "MathReason-v0", {}, 2, 5, 1e-3, 30, 0.5, 4)
    Warmup(replace(given, evaluation_problems=6, evaluation_every=4), out, checkpoint_every=3).run()
    return out


# --- numbers ------------------------------------------------------------------------------------------------------


def test_its_steps_are_those_of_transformers_own_loss(source: str, tmp_path: Path) -> None:
    given = SupervisedWarmup(
        source, epochs=2, batch_size=5, learning_rate=1e-3, problems=10, seed=4, evaluation_problems=0
    )
    result = Warmup(given, tmp_path / "out").run()
    model = AutoModelForCausalLM.from_pretrained(source)
    pairs, rng = demonstrations(task_of(), 10), np.random.default_rng(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    expected, rates = [], (1e-3, 1e-3, 2 / 3 * 1e-3, 1 / 3 * 1e-3)  # a tenth of 4 steps, at least one, rises
    for step in range(4):
        if step % 2 == 0:
            halves = np.array_split(rng.permutation(10), 2)
        total, count = torch.zeros(()), 0
        for index in halves[step % 2]:
            prompt, completion = pairs[index]
            labels = torch.cat((torch.full_like(prompt, -100), completion))[None]
            loss = model(torch.cat((prompt, completion))[None], labels=labels).loss
            total, count = total + loss * len(completion), count + len(completion)
        rng.random()  # whether layers are left out
        optimizer.zero_grad()
        (total / count).backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        expected.append((float(total.detach() / count), float(norm), rates[step], count))
    rows = rows_of(tmp_path / "out")
    for row, (loss, norm, rate, count) in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-4) and row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert row["learning_rate"] == pytest.approx(rate) and row["tokens"] == count
    trained = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-5)
    assert (result["loss_first"], result["loss_last"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert result["tokens"] == sum(one[3] for one in expected)
    assert result["accuracy_before"] is None


def test_what_it_writes_and_measures(whole: Path, settings: SupervisedWarmup) -> None:
    rows = rows_of(whole)
    evaluated = [row for row in rows if "evaluation" in row]
    steps = [row for row in rows if "evaluation" not in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in evaluated] == [0, 4, 8, 12]
    held_out = HeldOut(task_of(), 6, split="test")
    assert evaluated[0]["evaluation"] == held_out(Policy.load(settings.policy)).summary()
    assert evaluated[-1]["evaluation"] == held_out(Policy.load(str(whole))).summary()
    result = json.loads((whole / "warm_up.json").read_text())["result"]
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in steps))
    assert result["seconds_evaluation"] == pytest.approx(sum(row["seconds"] for row in evaluated))
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(result["tokens"] + result["prompt_tokens"])
    assert result["peak_bytes"] > 1e8
    assert not (whole / "checkpoint").exists()
    assert len(task_of(tokenizer=str(whole)).tokenizer) == Policy.load(str(whole)).vocab_size


# --- going on -----------------------------------------------------------------------------------------------------


def in_child(settings: SupervisedWarmup, out: Path) -> int:
    """Warm up in a forked child (no imports to wait for); returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            Warmup(settings, out, checkpoint_every=3).run()
            status = 0
        finally:
            os._exit(status)
    return child


def is_finished(out: Path) -> bool:
    return (out / "warm_up.json").is_file() and "result" in json.loads((out / "warm_up.json").read_text())


def lines(out: Path) -> int:
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").is_file() else 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_moments_goes_on_to_the_same_numbers(
    whole: Path, settings: SupervisedWarmup, tmp_path: Path, seed: int
) -> None:
    rng, out, resumed = random.Random(seed), tmp_path / "out", 0
    while resumed < 3 and not is_finished(out):
        child = in_child(settings, out)
        wanted = lines(out) + rng.randrange(4)
        while lines(out) < wanted and not is_finished(out):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        resumed += (out / "checkpoint" / "agent.json").is_file()
    assert os.waitpid(in_child(settings, out), 0)[1] == 0
    assert resumed
    assert numbers(out) == numbers(whole)
    assert not list(out.glob("*partial*")) and not list(out.glob("checkpoint*"))


@pytest.mark.parametrize("when", ["before the old checkpoint moves", "between the two renames"])
def test_killed_while_a_checkpoint_is_replaced(
    whole: Path, settings: SupervisedWarmup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    rename, out = Path.rename, tmp_path / "out"

    def die(path: Path, target: Any) -> Path:
        target = Path(target)
        if when.startswith("before") and ".old-" in target.name:
            raise KeyboardInterrupt
        if when.startswith("between") and target.name == "checkpoint" and list(out.glob("checkpoint.old-*")):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", die)
        Warmup(settings, out, 3).run()
    assert list(out.glob("checkpoint.partial-*"))
    Warmup(settings, out, 3).run()
    assert numbers(out) == numbers(whole)
    assert not list(out.glob("checkpoint*"))


@pytest.mark.parametrize("damage", ["weights cut off", "no optimizer", "rows lost", "half a row", "state"])
def test_damage_is_told_and_begun_again(
    whole: Path, settings: SupervisedWarmup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    out = tmp_path / "out"
    interrupted(settings, out, 8, monkeypatch)
    saved, metrics = out / "checkpoint", out / "metrics.jsonl"
    written = metrics.read_text().splitlines(keepends=True)
    if damage == "weights cut off":
        os.truncate(saved / "model.safetensors", 1000)
    elif damage == "no optimizer":
        (saved / "optimizer.safetensors").unlink()
    elif damage == "rows lost":
        metrics.write_text("".join([*written[:2], *written[3:]]))
    elif damage == "half a row":  # after the last checkpoint: what a kill leaves
        metrics.write_text("".join(written) + written[-1][:30])
    else:
        (saved / "agent.json").write_text("{")
    if damage == "half a row":
        Warmup(settings, out, 3).run()
    else:
        with pytest.warns(UserWarning, match="starts again from the beginning"):
            Warmup(settings, out, 3).run()
    assert numbers(out) == numbers(whole)


def interrupted(settings: SupervisedWarmup, out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a warm-up as an interruption after ``step`` steps does."""
    write = Warmup._write

    def stop(self: Warmup, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Warmup, "_write", stop)
        Warmup(settings, out, 3).run()
    assert (out / "checkpoint").is_dir()


def test_with_adapters_it_goes_on_to_the_same_numbers(
    settings: SupervisedWarmup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    low = replace(settings, lora_rank=2, dtype="bfloat16", evaluation_problems=0, evaluation_every=0)
    Warmup(low, tmp_path / "whole", 3).run()
    interrupted(low, tmp_path / "parts", 7, monkeypatch)
    Warmup(low, tmp_path / "parts", 3).run()
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")


# --- the folder ---------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_taken_as_it_is_or_refused(
    whole: Path, settings: SupervisedWarmup, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedWarmup, "agent", None)  # nothing is loaded
        assert Warmup(settings, whole).run() == json.loads((whole / "warm_up.json").read_text())["result"]
    for changes, needle in (({"epochs": 3}, r"epochs=2 \(now 3\)"), ({"lora_rank": 1}, r"lora_rank=0 \(now 1\)")):
        with pytest.raises(UsageError, match=f"other settings: {needle};"):
            Warmup(replace(settings, **changes), whole).run()
    other = tmp_path / "model"
    shutil.copytree(source, other)
    out = tmp_path / "out"
    given = replace(settings, policy=str(other), epochs=1, evaluation_problems=0)
    Warmup(given, out).run()
    shutil.copy(out / "model.safetensors", other)
    with pytest.raises(UsageError, match="other settings: weights="):
        Warmup(given, out).run()
    with pytest.raises(UsageError, match="holds something else"):
        Warmup(settings, Path(source)).run()


def test_a_second_process_and_a_full_disk_are_errors_of_one_line(
    settings: SupervisedWarmup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with Warmup(settings, out)._storage():
        out.mkdir()
    with Warmup(settings, out)._locked(), pytest.raises(UsageError, match="in use by another process"):
        Warmup(settings, out).run()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
        with pytest.raises(UsageError, match=r"GB for model and checkpoints.*--out"):
            Warmup(settings, out).run()
    assert not (out / "warm_up.json").exists()

    def full(self: Any, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agents.checkpoint.save_file", full)
        with pytest.raises(UsageError, match=r"No space left on device.*goes on from the last checkpoint"):
            Warmup(settings, out, 3).run()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        Warmup(settings, tmp_path / "file" / "out").run()


def test_held_out_problems_are_never_those_trained_on(source: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} plus 1?", "answer": str(n + 1), "solution": f"#### {n + 1}"} for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    env = {"problems": str(tmp_path / "mine.jsonl"), "problem_options": {"subset": ":15"}}
    given = SupervisedWarmup(source, env_arguments=env, epochs=1, evaluation_subset="15:")
    Warmup(given, tmp_path / "out").run()
    assert all(len(row["evaluation"]["right"]) == 5 for row in rows_of(tmp_path / "out") if "evaluation" in row)
    with pytest.raises(UsageError, match=r"also trained on.*--evaluation-subset"):
        Warmup(replace(given, evaluation_subset=":15"), tmp_path / "other").run()


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_that_agents_take(source: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "warm"
    given = ["--policy", source, "--out", str(out), "--epochs", "1", "--batch", "4", "--problems", "8"]
    given += ["--learning-rate", "1e-3", "--evaluation-problems", "3", "--env-set", "max_new_tokens=38"]
    assert main(given) == 0
    said = capsys.readouterr()
    for word in ("2 steps", "nats per token", "held-out accuracy", "tokens/s", "peak memory", str(out)):
        assert word in said.out
    assert "step 2/2" in said.err
    before, after = Policy.load(source), Policy.load(str(out))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert main(given) == 0
    assert main([*given, "--epochs", "2"]) == 2
    assert "epochs=1 (now 2)" in capsys.readouterr().err


def test_help_says_what_every_setting_is(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in set(fields_of(SupervisedWarmup)) - {"env_arguments"}:
        assert f"--{name.replace('_', '-')}" in said and HELP[name].split(";")[0] in said
    assert "(None)" not in said and "(2e-05)" in said


@pytest.mark.parametrize(
    ("wrong", "needle"),
    [
        (["--epochs", "0"], "epochs=0"),
        (["--learning-rate", "0"], "learning_rate=0"),
        (["--problems", "0"], "problems=N"),
        (["--problems", "two"], "problems='two' is not a valid int"),
        (["--env", "MathReason-v7"], "MathReason-v7"),
        (["--env-set", "problem=arithmetic"], "did you mean 'problems'"),
        (["--env-set", "problem_options.levle=2"], "levle"),
        (["--env-set", "max_new_tokens=2"], "max_new_tokens=2"),
        (["--policy", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--checkpoint-every", "0"], "checkpoint_every=0"),
        (["--threads", "0"], "--threads 0"),
        (["--skip", "2"], "skip=2"),
    ],
)
def test_bad_input_is_an_error_of_one_line_before_training(
    source: str, tmp_path: Path, capsys, wrong: list[str], needle: str
) -> None:
    assert main(["--policy", source, "--out", str(tmp_path / "out"), "--problems", "8", *wrong]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and needle in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
