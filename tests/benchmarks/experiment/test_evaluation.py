"""What is measured: the sets that a run names, each with its own options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiment.evaluation import Evaluator
from benchmarks.experiment.spec import EvaluationSpec
from envs.task import Task, TaskSpec
from registry import UsageError


def rows(path: Path, numbers: range, bad: int | None = None) -> str:
    """A file whose columns have names of their own."""
    table = [{"text": f"What is {n} + 2?", "key": None if n == bad else str(n + 2), "n": n} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return str(path)


def evaluator(task_options: dict[str, Any], file: str, **evaluation: Any) -> Evaluator:
    columns = {"question": "text", "answer": "key"}
    task = Task(TaskSpec(problems=file, problem_options={**columns, **task_options}))
    return Evaluator(task, EvaluationSpec(**evaluation))


def test_source_and_sets_have_column_names_of_their_own(tmp_path: Path) -> None:
    columns = {"question": "text", "answer": "key"}
    train, held, more = (rows(tmp_path / f"{n}.jsonl", range(10 * n, 10 * n + 5)) for n in range(3))
    options = {held: columns, more: {**columns, "limit": 2}}
    both = evaluator({}, train, source=held, sets=(more,), problem_options=options)
    assert both.own.task.problem(0).answer == "12"
    assert len(both.further[more].problems) == 2 and both.further[more].task.problem(1).answer == "23"
    with pytest.raises(UsageError, match="no question column"):
        evaluator({}, train, source=held)
    with pytest.raises(UsageError, match="which is not measured"):
        evaluator({}, train, source=held, problem_options={more: columns})


def test_rows_left_out_are_those_of_the_split_that_they_number(tmp_path: Path) -> None:
    single = rows(tmp_path / "one.jsonl", range(8), bad=6)
    held = evaluator({"subset": ":4", "omit": "6"}, single, subset="4:")
    assert [held.own.task.problem(n).answer for n in held.own.problems] == ["6", "7", "9"]
    folder = tmp_path / "folder"
    folder.mkdir()
    rows(folder / "train.jsonl", range(5), bad=3)
    rows(folder / "test.jsonl", range(10, 15))
    held = evaluator({"omit": "3"}, str(folder))
    assert [held.own.task.problem(n).answer for n in held.own.problems] == ["12", "13", "14", "15", "16"]
