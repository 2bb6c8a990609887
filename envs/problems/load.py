"""Problem sets by name: generated, from a file, from a folder, from the hub, from reasoning-gym or from a function.

    load_problems("arithmetic", split="test", level=2)
    load_problems("gsm8k", split="train", limit=1000, shuffle=0)
    load_problems("questions.csv", question="text", answer="key")

Every gold answer is checked when it is loaded: one that the verifier cannot read is an error, not a reward of 0.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from envs.problem import Problem, Problems
from envs.problems.columns import Columns, to_problem
from envs.problems.sources import KNOWN, read_known, read_path, read_reference
from envs.verifier import settle_in_process
from envs.verifier.notation import normalise
from registry import UsageError
from registry.errors import UnknownField

OPTIONS = ("question", "answer", "subset", "shuffle", "limit", "data_dir", "config")


class ListedProblems:
    """A finite source, held in memory. Supports ``len``, indexing and iteration."""

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.name = name
        self.problems = tuple(problems)
        self.size: int | None = len(self.problems)

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are taken, in this order: shuffle, subset, limit.

    Attributes:
        subset: ``"start:stop"``, either side may be empty.
        shuffle: seed of a permutation, None for the order of the source.
        limit: at most this many rows.
    """

    subset: str | None = None
    shuffle: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit={self.limit!r} must be at least 1")

    def of(self, rows: list[Any]) -> list[Any]:
        if self.shuffle is not None:
            rows = list(rows)
            Random(self.shuffle).shuffle(rows)
        if self.subset is not None:
            try:
                start, stop = (int(part) if part.strip() else None for part in self.subset.split(":"))
            except ValueError:
                raise UsageError(f"subset={self.subset!r} is not of the form 'start:stop', such as '0:100'") from None
            rows = rows[start:stop]
        return rows[: self.limit]


def load_problems(name: str, split: str = "train", **kwargs: Any) -> Problems:
    """The problems that ``name`` stands for.

    Args:
        name: ``arithmetic`` (options ``level`` and ``seed``); a known set (``sources.KNOWN``); a ``.json``, ``.jsonl``,
            ``.csv`` or ``.parquet`` file; a folder written by ``datasets.save_to_disk``;
            ``reasoning_gym:<task>`` (options ``size``, ``seed`` and the task's own); ``module:function``, which is
            called with ``split`` and the options and returns problems or rows; or else a hub id.
        split: the split. A single file has only one, which is taken whatever ``split`` says.
        kwargs: ``question`` and ``answer`` (column names; found if not given), ``subset``, ``shuffle`` and ``limit``
            (see ``Selection``), ``data_dir`` (the folder of the known sets' files, by default the environment variable
            NESTED_REFT_DATA) and ``config`` (of a hub id).

    Raises:
        UsageError: no such file, set, split or column; the hub cannot be reached; no rows; a gold answer that the
            verifier cannot read.
    """
    if name == "arithmetic":
        return _arithmetic(split, kwargs)
    if name.startswith("reasoning_gym:"):
        from envs.problems.reasoning_gym import reasoning_gym_problems

        return reasoning_gym_problems(name.partition(":")[2], split, kwargs)
    if ":" in name and "/" not in name and "\\" not in name:
        return _from_function(name, split, kwargs)
    for key in kwargs:
        if key not in OPTIONS:
            raise UnknownField(f"the problem set {name!r}", key, OPTIONS)
    selection = Selection(*(kwargs.get(key) for key in ("subset", "shuffle", "limit")))
    columns = Columns(kwargs.get("question"), kwargs.get("answer"))
    rows = _rows(name, split, kwargs)
    return _checked(f"{name}/{split}", rows, columns, selection)


def _rows(name: str, split: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    if name in KNOWN:
        return read_known(name, split, options.get("data_dir"))
    rows = read_path(name, split)
    return read_reference(name, split, options.get("config")) if rows is None else rows


def _checked(name: str, rows: Iterable[Any], columns: Columns, selection: Selection) -> ListedProblems:
    problems = [
        row if isinstance(row, Problem) else to_problem(row, name, index, columns) for index, row in enumerate(rows)
    ]
    taken = selection.of(problems)
    if not taken:
        raise UsageError(
            f"{name} has no rows{' in the chosen subset' if problems else ''}; choose another split or subset"
        )
    for problem in taken:
        check_gold(problem)
    listed = ListedProblems(name, _unique_ids(taken))
    repeated = len(listed) - len({question_key(problem) for problem in listed})
    if repeated:
        warnings.warn(f"{repeated} of {len(listed)} problems of {name} repeat an earlier question", stacklevel=3)
    return listed


def _unique_ids(problems: list[Problem]) -> list[Problem]:
    if len({problem.id for problem in problems}) == len(problems):
        return problems
    return [replace(problem, id=f"{problem.id}#{index}") for index, problem in enumerate(problems)]


def check_gold(problem: Problem) -> None:
    """Raise ``UsageError`` unless the gold answer verifies against itself."""
    gold = normalise(problem.answer)
    if settle_in_process(gold, gold) != "right":
        raise UsageError(
            f"problem {problem.id} of {problem.source}: the verifier cannot read the gold answer "
            f"{problem.answer[:80]!r}; mend or leave out that row, or name the answer column"
        )


def question_key(problem: Problem) -> str:
    """What makes two questions the same: their words and numbers, whatever the case and spacing."""
    return " ".join(problem.question.split()).casefold()


def overlap(first: Problems, second: Problems) -> list[tuple[int, int]]:
    """Index pairs of equal questions in two finite sources."""
    places = {question_key(first[index]): index for index in range(_size(first))}
    keys = ((question_key(second[index]), index) for index in range(_size(second)))
    return [(places[key], index) for key, index in keys if key in places]


def duplicates(problems: Problems) -> list[tuple[int, int]]:
    """Index pairs (first occurrence, repetition) of equal questions in a finite source."""
    seen: dict[str, int] = {}
    found = []
    for index in range(_size(problems)):
        first = seen.setdefault(question_key(problems[index]), index)
        if first != index:
            found.append((first, index))
    return found


def _size(problems: Problems) -> int:
    if problems.size is None:
        raise UsageError(f"{problems.name} is unlimited, so it cannot be searched for repeated questions")
    return problems.size


def _arithmetic(split: str, options: dict[str, Any]) -> Problems:
    from envs.problems.arithmetic import Arithmetic

    options = dict(options)
    limit = options.pop("limit", None)
    for key in options:
        if key not in ("level", "seed"):
            raise UnknownField("the problem set 'arithmetic'", key, ("level", "seed", "limit"))
    source = Arithmetic(split=split, **options)
    if limit is None:
        return source
    return ListedProblems(source.name, (source[index] for index in range(limit)))


def _from_function(name: str, split: str, options: dict[str, Any]) -> Problems:
    module, _, attribute = name.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"problems={name!r}: {error}; the form is 'module:function', importable from here") from error
    options = dict(options)
    selection = Selection(*(options.pop(key, None) for key in ("subset", "shuffle", "limit")))
    columns = Columns(options.pop("question", None), options.pop("answer", None))
    made = function(split=split, **options)
    if hasattr(made, "size") and hasattr(made, "__getitem__"):
        return made
    return _checked(f"{name}/{split}", made, columns, selection)
