"""Our problems as a taskset of verifiers, and the tasks of a taskset of verifiers as our problems (verifiers 0.4).

In Python a taskset is ``MathTaskset(MathTasksetConfig(problems="gsm8k"))``. For the library's commands, whose ids are
modules of one name, put a line into a file ``math_reason.py``:

    from integrations.verifiers import MathTaskset; __all__ = ["MathTaskset"]

and choose it by ``--env.taskset.id math_reason --env.taskset.problems gsm8k``. The other way round,
``problems="integrations.verifiers:problems"`` with ``problem_options={"taskset": ID}`` serves a taskset's tasks
wherever this project takes problems.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from envs.problem import Problem
from envs.text import finite_problems, golds_of, submit
from envs.verifier.gold import read_gold
from registry import UsageError, templates

try:
    import verifiers.v1 as vf
    from pydantic import Field
    from verifiers.v1.utils.loaders import load_taskset, taskset_config_type
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "integrations.verifiers needs verifiers: pip install verifiers", name=error.name
    ) from error

__all__ = ["MathTaskset"]  # the library's loader wants one taskset here

TEMPLATE = "chat"
GOLD_FIELDS = ("answer", "gold", "solution", "target", "ground_truth")


class MathData(vf.TaskData):
    """A problem: its prompt asks for the answer in a box."""

    answer: list[str]
    """All accepted answers."""
    scorer: str = ""
    """Who judges instead of a comparison (``envs.problem.Problem.scorer``)."""


class MathTask(vf.Task[MathData, vf.State, vf.TaskConfig]):
    """A math problem that is answered in the last reply."""

    @vf.reward
    async def verified(self, trace: vf.Trace) -> float:
        """1.0 if the answer is right, else 0.0; a comparison has a deadline of its own."""
        future = submit(trace.last_reply, self.data.answer, TEMPLATE, self.data.scorer)
        return (await asyncio.wrap_future(future)).reward


class MathTasksetConfig(vf.TasksetConfig):
    """Which problems: what ``envs.problems.load_problems`` takes."""

    problems: str = "arithmetic"
    split: str = "train"
    problem_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the source: ``{"limit": 1000}``, which one without an end needs."""


class MathTaskset(vf.Taskset[MathTask, MathTasksetConfig]):
    """Math problems with our verdicts as the reward."""

    def load(self) -> Iterator[MathTask]:
        """A task for each problem. Raises ``UsageError``: what ``load_problems`` refuses, or a source without an
        end."""
        config, template = self.config, templates.make(TEMPLATE)
        problems = finite_problems(config.problems, config.split, **config.problem_options)
        for index in range(problems.size or 0):
            problem = problems[index]
            (message,) = template.messages(problem.question)
            data = MathData(id=problem.id, prompt=message["content"], answer=golds_of(problem), scorer=problem.scorer)
            yield MathTask(data, config.task)


def problems(split: str = "train", *, taskset: str, answer: str = "", **config: Any) -> list[Problem]:
    """The tasks of a taskset of verifiers as problems, which our verifier judges: a source for
    ``problems="integrations.verifiers:problems"``.

    Args:
        split: passed on where the taskset's configuration has a ``split``.
        taskset: the taskset's id, of an installed package.
        answer: the field of the tasks' data that holds the gold answer; by default the first one of ``answer``,
            ``gold``, ``solution``, ``target`` and ``ground_truth`` that is there.
        config: of the taskset.

    Raises:
        UsageError: no such taskset, one without an end, or tasks without a gold answer or a prompt.
    """
    try:
        kind = taskset_config_type(taskset)
        own = {"split": split} if "split" in kind.model_fields else {}
        loaded = load_taskset(kind(id=taskset, **{**own, **config}))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"taskset {taskset!r} of verifiers: {error}") from error
    if not loaded.bounded:
        raise UsageError(f"taskset {taskset!r} of verifiers has no end, so it cannot be listed")
    return [_problem(task.data, taskset, split, answer) for task in loaded]


def _problem(data: vf.TaskData, taskset: str, split: str, field: str) -> Problem:
    where = f"task {data.idx} of {taskset}"
    there = [name for name in ([field] if field else GOLD_FIELDS) if getattr(data, name, None) is not None]
    if not there:
        known = ", ".join(sorted(set(type(data).model_fields) - set(vf.TaskData.model_fields))) or "none of its own"
        raise UsageError(f"{where} has no gold answer: name its field with answer=... (fields: {known})")
    if not data.prompt_text:
        raise UsageError(f"{where} has no prompt: it is no problem with one question")
    first, *others = read_gold(getattr(data, there[0]), where)
    name = data.id or str(data.idx)
    return Problem(data.prompt_text, first, f"{taskset}/{split}", name, alternatives=tuple(others))
