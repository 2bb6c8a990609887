"""Our problems and verdicts in TRL: rows for ``train_dataset`` and a function for ``reward_funcs``.

    from integrations.trl import problem_rows, verified
    from trl import GRPOTrainer

    rows = problem_rows("gsm8k", template="chat")
    GRPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=verified, train_dataset=rows).train()

``verified`` judges the completions of any data set that has an ``answer`` or a ``solution`` column. ``MathTool`` is for
models that answer by a call of a tool (``environment_factory``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from envs.text import finite_problems, golds_of, opens_thought, prompt_of, submit, verify_answer
from registry import UsageError, templates

if TYPE_CHECKING:
    from datasets import Dataset


def problem_rows(
    problems: Any, template: str = "plain", split: str = "train", tokenizer: str | None = None, **options: Any
) -> Dataset:
    """Problems as a data set for TRL's trainers.

    Columns: ``prompt``, text or, with the template ``chat``, messages to which TRL applies the model's own chat
    template; ``answer``, all accepted answers; ``question``, ``template``, ``scorer``, ``opens_thought`` and ``id``.

    Args:
        problems: what ``envs.problems.load_problems`` takes: a known set, a file, a hub id, a table; or loaded ones.
        template: a name of ``registry.templates``. TRL does not know its stop strings, if it has any.
        split, options: of the problems (``limit=1000``).
        tokenizer: the model's, a folder or a hub id: with ``chat`` it says whether prompts open a thought, as those of
            some reasoning models do. An unclosed thought has no answer.

    Raises:
        UsageError: what ``load_problems`` refuses, a source without an end, an unknown template.
    """
    from datasets import Dataset

    chosen, loaded = templates.make(template), finite_problems(problems, split, **options)
    opened = opens_thought(chosen, tokenizer)
    rows = []
    for index in range(loaded.size or 0):
        problem = loaded[index]
        rows.append(
            {
                "prompt": prompt_of(chosen, problem.question),
                "question": problem.question,
                "answer": golds_of(problem),
                "template": template,
                "scorer": problem.scorer,
                "opens_thought": opened,
                "id": problem.id,
            }
        )
    return Dataset.from_list(rows)


def verified(
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    template: Sequence[str] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for every completion whose answer is right, else 0.0: a reward function for TRL's trainers.

    Verdicts have a deadline and a memory limit of their own, so that no completion stops the training; symbolic ones
    run in worker processes, from any thread. The table of logged completions has each verdict's ``status`` and
    ``extracted``.

    Args:
        completions: texts or lists of messages.
        prompts: a text that ends within ``<think>`` has opened a thought.
        answer: gold answers: text, a number, a worked solution, or a list of accepted answers.
        solution: instead of ``answer``, or in rows without one.
        template: where answers stand (default ``plain``: the last box, else ``####``, else "the answer is").
        log_extra: TRL's.
        **columns: ``scorer`` and ``opens_thought`` of ``problem_rows``; others are ignored.

    Raises:
        UsageError: no column of gold answers, or one that the verifier cannot read; ``problem_rows(dataset)`` finds
            those before the training.

    >>> verified(["It is \\\\boxed{1/2}.", "It is 0.5"], answer=["0.5", "0.5"])
    [1.0, 0.0]
    """
    count = len(completions)
    if answer is None and solution is None:
        there = ", ".join(sorted(columns)) or "none"
        raise UsageError(
            f"the reward 'verified' needs a column 'answer' or 'solution' of gold answers; there are: {there}. "
            "Rename yours (dataset.rename_column), or make the data set by problem_rows"
        )
    given = {"answer": answer, "solution": solution, "template": template, "prompts": prompts}
    given |= {name: columns.get(name) for name in ("scorer", "opens_thought")}
    rows = {name: _column(name, column, count) for name, column in given.items()}
    futures = [
        submit(
            completion,
            rows["solution"][n] if rows["answer"][n] is None else rows["answer"][n],
            rows["template"][n] or "plain",
            rows["scorer"][n] or "",
            bool(rows["opens_thought"][n]) or _opens(rows["prompts"][n]),
        )
        for n, completion in enumerate(completions)
    ]
    verdicts = [future.result() for future in futures]
    if log_extra is not None:
        log_extra("status", [verdict.status for verdict in verdicts])
        log_extra("extracted", [verdict.extracted for verdict in verdicts])
    return [verdict.reward for verdict in verdicts]


def _column(name: str, column: Any, count: int) -> Sequence[Any]:
    """A value of each row; None where there is none, as in data sets that were joined."""
    if column is None:
        return [None] * count
    if isinstance(column, str) or len(column) != count:
        got = repr(column) if isinstance(column, str) else f"{len(column)}"
        raise UsageError(f"the reward 'verified' got {count} completions and {got} of {name!r}: one each")
    return column


def _opens(prompt: Any) -> bool:
    return isinstance(prompt, str) and prompt.rfind("<think>") > prompt.rfind("</think>")


class MathTool:
    """A problem that is answered by a call of a tool, for TRL's ``environment_factory=MathTool``. The data set is
    ``problem_rows(..., template="chat")``; the reward is 1.0 if the last answer given is right, else 0.0."""

    def __init__(self) -> None:
        self._row: dict[str, Any] = {}
        self._reward = 0.0

    def reset(self, **row: Any) -> None:
        """Begin with the problem of a row, whose prompt is the whole observation."""
        if row.get("answer") is None:
            raise UsageError("MathTool needs a column 'answer' of gold answers: make the data set by problem_rows")
        self._row, self._reward = row, 0.0

    def give_answer(self, answer: str) -> str:
        """
        Give the final answer to the problem.

        Args:
            answer: The answer alone, such as 42 or \\frac{1}{2}.

        Returns:
            That the answer was noted.
        """
        if not self._row:
            raise UsageError("MathTool has no problem yet: call reset(answer=...) first, as TRL does with every row")
        self._reward = verify_answer(str(answer), self._row["answer"], self._row.get("scorer") or "").reward
        return "noted"

    def get_reward(self) -> float:
        """1.0 or 0.0."""
        return self._reward
