"""Our problems as a taskset of verifiers and theirs as our problems, by the library's own loader, tasks and traces."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from envs.problems import load_problems
from registry import UsageError, templates

vf = pytest.importorskip("verifiers.v1")
adapter = pytest.importorskip("integrations.verifiers")

THEIRS = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str | None = None
    key: str | None = None

class Theirs(vf.Taskset[vf.Task[Data, vf.State, vf.TaskConfig], vf.TasksetConfig]):
    def load(self):
        for n in range(3):
            yield vf.Task(Data(prompt=f"What is {n} doubled?", answer=f"#### {2 * n}", key=str(n)), self.config.task)

__all__ = ["Theirs"]
"""


def reward(task: Any, reply: str) -> float:
    """What the library records for a reply, in a trace of its own."""
    trace = vf.Trace(
        task={"type": type(task).__name__, "data": task.data},
        agent={"config": vf.AgentConfig()},
        nodes=[{"message": {"role": "assistant", "content": reply}, "sampled": True}],
    )
    asyncio.run(task.score(trace))
    return trace.rewards["verified"].value


class TestOursInTheirs:
    def test_prompts_answers_and_rewards(self) -> None:
        problems = load_problems("arithmetic", split="test", limit=4)
        config = adapter.MathTasksetConfig(split="test", problem_options={"limit": 4})
        tasks = list(adapter.MathTaskset(config))
        assert [task.data.idx for task in tasks] == [0, 1, 2, 3]
        for n, task in enumerate(tasks):
            (message,) = templates.make("chat").messages(problems[n].question)
            assert (task.data.prompt, task.data.id) == (message["content"], problems[n].id)
            assert reward(task, f"So \\boxed{{{problems[n].answer}}}") == 1.0
            assert reward(task, "\\boxed{-1}") == 0.0
            assert reward(task, problems[n].answer) == 0.0

    def test_a_hang_is_a_zero(self, tmp_path: Path) -> None:
        file = tmp_path / "hard.jsonl"
        file.write_text(json.dumps({"question": "?", "answer": "\\sum_{k=1}^{n} k"}) + "\n")
        (task,) = adapter.MathTaskset(adapter.MathTasksetConfig(problems=str(file)))
        assert reward(task, "\\boxed{\\sum_{i=1}^{10^8} i^i}") == 0.0

    def test_the_librarys_loader_takes_a_file_of_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        line = (adapter.__doc__ or "").partition("    from integrations")[2].partition("\n")[0]
        (tmp_path / "math_reason.py").write_text(f"from integrations{line}\n")
        monkeypatch.syspath_prepend(tmp_path)
        from verifiers.v1.utils.loaders import load_taskset, taskset_config_type

        config = taskset_config_type("math_reason")(id="math_reason", problem_options={"limit": 2})
        assert len(list(load_taskset(config))) == 2
        monkeypatch.delitem(sys.modules, "math_reason")

    def test_a_source_without_an_end_asks_for_a_limit(self) -> None:
        with pytest.raises(UsageError, match="limit="):
            list(adapter.MathTaskset(adapter.MathTasksetConfig()))


class TestTheirsInOurs:
    @pytest.fixture(autouse=True)
    def theirs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        (tmp_path / "their_sums.py").write_text(THEIRS)
        monkeypatch.syspath_prepend(tmp_path)
        yield
        sys.modules.pop("their_sums", None)

    def test_an_environment_serves_them(self) -> None:
        env = gym.make(
            "TextMathReason-v0",
            problems="integrations.verifiers:problems",
            problem_options={"taskset": "their_sums"},
        )
        observation, _ = env.reset(options={"problem_index": 2})
        assert observation == "Question: What is 2 doubled?\nAnswer:"
        assert env.step("#### 4")[1] == 1.0
        env.reset(options={"problem_index": 2})
        assert env.step("#### 2")[1] == 0.0

    def test_the_field_of_the_gold_answer_may_be_named(self) -> None:
        assert [problem.answer for problem in adapter.problems(taskset="their_sums")] == ["0", "2", "4"]
        assert [problem.answer for problem in adapter.problems(taskset="their_sums", answer="key")] == ["0", "1", "2"]

    def test_errors(self) -> None:
        with pytest.raises(UsageError, match=r"no gold answer.*fields: answer, key"):
            adapter.problems(taskset="their_sums", answer="gold")
        with pytest.raises(UsageError, match="no_such"):
            adapter.problems(taskset="no_such")
