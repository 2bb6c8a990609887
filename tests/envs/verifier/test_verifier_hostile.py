"""Hostile completions: verdict 0, no exception, within time and memory, and the next ordinary request answers 1."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest

import envs
from envs.problem import Problem
from envs.verifier import Verifier, verify
from envs.verifier import verdicts as verifier

ORDINARY = ("\\boxed{\\sqrt{18}}", "3\\sqrt{2}")
MAX_TOKENS = 400


def hostile_cases(shared_dir: Path, marker: Path) -> list[dict[str, Any]]:
    rows = []
    for line in (shared_dir / "reward_cases" / "hostile.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "gen" in row:
            prefix, unit, count, suffix = row["gen"]
            row["completion"] = prefix + unit * count + suffix
        row["completion"] = row["completion"].replace("@MARKER@", str(marker))
        rows.append(row)
    return rows


class Watch(threading.Thread):
    """The largest resident memory of any child of this process, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            for child in psutil.Process().children(recursive=True):
                try:
                    self.peak = max(self.peak, child.memory_info().rss / 2**20)
                except psutil.NoSuchProcess:
                    continue


def test_every_case_is_survived(shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    watch = Watch()
    watch.start()
    own = psutil.Process().memory_info().rss
    for row in hostile_cases(shared_dir, marker):
        start = time.perf_counter()
        verdict = verify(row["completion"], row["gold"])
        assert time.perf_counter() - start < row["max_seconds"], row["id"]
        assert verdict.reward == row["expected"] == 0, row["id"]
        monkeypatch.setattr(verifier, "_SETTLED", {})
        assert verify(*ORDINARY).reward == 1.0, f"after {row['id']}"
        assert watch.peak < row["max_rss_mb"], row["id"]
    watch.done.set()
    assert not marker.exists()
    assert psutil.Process().memory_info().rss - own < 200 << 20


@pytest.mark.parametrize(
    "answer",
    ["\\sum_{i=1}^{10^8} i^i", "\\int_0^\\infty \\sin(x^x) e^{-x^{x}} dx", "9^{9^{9^{9}}}", "((9!)!)!", "\\frac{1}{0}"],
)
def test_a_gold_that_needs_math_verify_is_no_way_in(answer: str) -> None:
    judge = Verifier(deadline=1.0)
    start = time.perf_counter()
    assert judge.verify(f"\\boxed{{{answer}}}", "\\sum_{k=1}^{n} k^3").reward == 0.0
    assert time.perf_counter() - start < 30
    assert judge.verify(*ORDINARY).reward == 1.0


@pytest.mark.parametrize(
    "unit",
    [
        "answer to ",
        "the answer would be ",
        "answer, then, hence,",
        "answer for we ",
        "answer is **",
        "answer is the total of ",
        '"answer": "',
        "'answer' would be \"",
        "#### Step 1: the answer\n",
        "####_answer_: ",
    ],
)
def test_statements_are_found_in_linear_time(unit: str) -> None:
    start = time.process_time()
    assert verify(unit * (500_000 // len(unit)), "42").reward == 0.0
    assert time.process_time() - start < 2.0


def hostile_problems(split: str, path: str) -> list[Problem]:
    """One problem per gold answer of the file, for ``load_problems``."""
    golds = sorted({json.loads(line)["gold"] for line in Path(path).read_text(encoding="utf-8").splitlines()})
    return [Problem(f"q{n}", gold, "hostile", str(n)) for n, gold in enumerate(golds)]


def short_episodes(shared_dir: Path, tokenizer: Any, marker: Path) -> list[tuple[str, list[int]]]:
    """(gold, tokens) of the cases that fit an episode."""
    rows = [row for row in hostile_cases(shared_dir, marker) if len(row["completion"]) < 4 * MAX_TOKENS]
    encoded = [(row["gold"], tokenizer(row["completion"], add_special_tokens=False)["input_ids"]) for row in rows]
    return [(gold, ids) for gold, ids in encoded if 0 < len(ids) < MAX_TOKENS]


def environment(shared_dir: Path) -> dict[str, Any]:
    return {
        "problems": "tests.envs.verifier.test_verifier_hostile:hostile_problems",
        "problem_options": {"path": str(shared_dir / "reward_cases" / "hostile.jsonl")},
        "max_new_tokens": MAX_TOKENS,
    }


def test_through_the_env(shared_dir: Path, tmp_path: Path) -> None:
    env = gym.make("MathReason-v0", **environment(shared_dir), disable_env_checker=True)
    task = env.unwrapped.task  # type: ignore[attr-defined]
    golds = {task.problem(n).answer: n for n in range(task.problems.size)}
    (eos,) = task.stop_token_ids
    episodes = short_episodes(shared_dir, task.tokenizer, tmp_path / "marker")
    assert len(episodes) > 40
    right = task.tokenizer(ORDINARY[0], add_special_tokens=False)["input_ids"]
    for gold, ids in [*episodes, (ORDINARY[1], right)]:
        env.reset(options={"problem_index": golds[gold]})
        for token in [*ids, eos]:
            _, reward, terminated, truncated, info = env.step(np.int64(token))
        assert terminated and not truncated
        assert float(reward) == float(ids is right), (gold, info)
        assert info["status"] in envs.problem.STATUSES
    assert not (tmp_path / "marker").exists()


def test_through_the_vector_env(shared_dir: Path, tmp_path: Path) -> None:
    venv = gym.make_vec("MathReason-v0", num_envs=8, **environment(shared_dir))
    task = venv.unwrapped.task  # type: ignore[attr-defined]
    golds = {task.problem(n).answer: n for n in range(task.problems.size)}
    (eos,) = task.stop_token_ids
    episodes = short_episodes(shared_dir, task.tokenizer, tmp_path / "marker")
    right = (ORDINARY[1], task.tokenizer(ORDINARY[0], add_special_tokens=False)["input_ids"])
    for start in range(0, len(episodes), 7):
        batch = [*episodes[start : start + 7], right]
        batch += [right] * (8 - len(batch))
        venv.reset(options={"problem_indices": np.array([golds[gold] for gold, _ in batch])})
        rewards = np.zeros(8)
        over = np.zeros(8, dtype=bool)
        for step in range(max(len(ids) for _, ids in batch) + 1):
            actions = np.array([ids[step] if step < len(ids) else eos for _, ids in batch])
            _, reward, terminated, truncated, _ = venv.step(actions)
            rewards += np.where(over, 0.0, reward)
            over |= terminated | truncated
        assert over.all()
        assert rewards.tolist() == [float(pair is right) for pair in batch]
    venv.close()
    assert not (tmp_path / "marker").exists()
