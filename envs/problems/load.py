"""From a name and options to problems: registered sources, files, the hub, reasoning-gym tasks and functions.

Every gold answer is checked when it is loaded: one that the verifier cannot read is an error, not a reward of 0.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs.problem import Problem, Problems
from envs.problems.readers import (
    Row,
    arrow_rows,
    check_distinct,
    check_exists,
    dataset_rows,
    is_file_name,
    is_one_table,
    read_hub,
    read_path,
    shortest,
    unreadable,
)
from envs.problems.reasoning_gym import ReasoningGymSource
from envs.problems.sources import ProblemSource, RowSource
from registry import UnknownField, UnknownName, UsageError, did_you_mean, fields_of, problem_sources


def load_problems(problems: Any, /, split: str = "train", **options: Any) -> Problems:
    """The problems that a name stands for, or those in a table in memory.

    Args:
        problems: a registered source (``arithmetic``, ``gsm8k``, ...); a ``.json``, ``.jsonl``, ``.csv`` or
            ``.parquet`` file, perhaps with ``.gz``; a folder; a hub id; ``reasoning_gym:<task>``; or
            ``module:function``. ``list_sources`` lists all. Or the rows themselves: a ``datasets.Dataset``, a
            ``DatasetDict``, a pandas ``DataFrame``, or a list of dicts.
        split: the split. A single file or table has only one, which is taken whatever ``split`` says.
        options: fields of the source. Rows, whatever they come from, have ``question`` and ``answer`` (column names;
            found if not given), ``subset``, ``shuffle``, ``omit`` and ``limit``, see
            ``envs.problems.sources.RowSource``.

    Raises:
        UsageError: no such file, set, split, option or column; the hub cannot be reached; no rows; a gold answer that
            the verifier cannot read.

    >>> problems = load_problems("arithmetic", split="test", level=1, limit=100)
    >>> problems.size, problems[0].question
    (100, 'Ana has 6 fewer than Leo. Leo has 9 books. How many books do both have in all?')
    >>> problems[0].answer, problems[0].solution
    ('12', ' 9 - 6 = 3. 9 + 3 = 12. #### 12')
    """
    if isinstance(problems, str) and not problems:
        raise UsageError("'' names no problems: give a set's name, a file, a folder or a hub id ('.' for this folder)")
    if isinstance(problems, str | os.PathLike):
        return source_of(os.fspath(problems), options).load(split)
    return _configure(TableSource, "a table", options, table=problems).load(split)


@dataclass(frozen=True, kw_only=True)
class PathSource(RowSource):
    """A .json, .jsonl, .csv or .parquet file, or a folder of such files, of ``datasets.save_to_disk`` or of the hub.

    Attributes:
        path: of the file or folder.
    """

    path: str

    @property
    def name(self) -> str:
        """The path as given."""
        return self.path

    def rows(self, split: str) -> list[Row]:
        """All rows of the file, or of a split of the folder."""
        return read_path(_expand(self.path), split)


@dataclass(frozen=True, kw_only=True)
class HubSource(RowSource):
    """A data set of the Hugging Face hub.

    Attributes:
        id: ``owner/name``.
        config: its configuration, if it has several.
    """

    id: str
    config: str | None = None

    @property
    def name(self) -> str:
        """The hub id."""
        return self.id

    def rows(self, split: str) -> list[Row]:
        """All rows of a split."""
        return read_hub(self.id, split, self.config)


@dataclass(frozen=True, kw_only=True)
class TableSource(RowSource):
    """Rows in memory.

    Attributes:
        table: a ``datasets.Dataset``, a ``DatasetDict``, a pandas ``DataFrame``, or dicts or problems in a list.
    """

    table: Any

    @property
    def name(self) -> str:
        """What all such sources are called."""
        return "table"

    def rows(self, split: str) -> Sequence[Row | Problem]:
        """All rows of the table, or of the split of a ``DatasetDict``."""
        table = self.table
        if isinstance(table, Mapping):
            if split not in table:
                raise UsageError(f"the table has no split {split!r}: {did_you_mean(split, map(str, table))}")
            table = table[split]
        return rows_of_table(table)


_SHORT: dict[str, type[np.floating]] = {
    **dict.fromkeys(("float16", "Float16", "halffloat[pyarrow]"), np.float16),
    **dict.fromkeys(("float32", "Float32", "float[pyarrow]"), np.float32),
}
"""What pandas calls numbers of fewer bits than Python's."""


def rows_of_table(table: Any) -> Sequence[Row | Problem]:
    """The rows of a table in memory. Raises ``UsageError`` for what is none."""
    with unreadable("the rows of the data set cannot be read"):
        if hasattr(table, "with_format") and hasattr(table, "num_rows"):  # datasets.Dataset
            return dataset_rows(table)
        if hasattr(table, "to_pylist") and hasattr(table, "column_names"):  # pyarrow.Table
            check_distinct(table.column_names)
            return arrow_rows(table)
    if hasattr(table, "to_dict") and hasattr(table, "columns"):  # pandas.DataFrame
        with unreadable("the rows of the data frame cannot be read"):
            check_distinct([str(name) for name in table.columns])
            rows = table.to_dict(orient="records")
            for column, kind in table.dtypes.items():
                short = _SHORT.get(str(kind))
                for row in rows:
                    if short and isinstance(row[column], float):  # not pandas' NA
                        row[column] = shortest(row[column], short)
            return rows
    if isinstance(table, str | bytes) or not isinstance(table, Iterable):
        raise UsageError(
            f"problems={str(table)[:80]!r} is {type(table).__name__}: give a name, a path, a datasets.Dataset or a "
            "list of rows with a question and an answer"
        )
    return list(table)


@dataclass(frozen=True, kw_only=True)
class FunctionSource(RowSource):
    """A function of yours, called with ``split`` and its own options; it returns problems or rows.

    Attributes:
        function: ``module:function``.
        options: further arguments of the function.
    """

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name as given."""
        return self.function

    def load(self, split: str) -> Problems:
        """What the function returns; rows are checked as those of a file are."""
        result = self._callable()(split=split, **self.options)
        if not all(hasattr(result, name) for name in ("name", "size", "__getitem__")):
            return self.list_rows(TableSource(table=result).rows(split), split)
        chosen = [name for name in fields_of(RowSource) if getattr(self, name) is not None]
        if chosen:
            raise UsageError(
                f"problems={self.function!r} returns problems, not rows, so {chosen[0]!r} does not apply to it; "
                "return a list, or give the function an option of its own"
            )
        return result

    def _callable(self) -> Callable[..., Any]:
        module, _, attribute = self.function.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(
                f"problems={self.function!r}: {error}; the form is 'module:function', importable from here"
            ) from error
        if not callable(function):
            raise UsageError(f"problems={self.function!r} is {str(function)[:60]!r}, not a function")
        parameters = inspect.signature(function).parameters
        if "split" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise UsageError(
                f"problems={self.function!r} takes no 'split': give it that parameter ('train' or 'test'), and have it "
                "return the rows or problems of that split"
            )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            for option in self.options:
                if option not in parameters:
                    own = [name for name in parameters if name != "split"]
                    raise UnknownField(f"problem source {self.function!r}", option, [*own, *fields_of(RowSource)])
        return function


FORMS: dict[str, type[ProblemSource]] = {
    "FILE or FOLDER": PathSource,
    "OWNER/NAME": HubSource,
    "reasoning_gym:TASK": ReasoningGymSource,
    "MODULE:FUNCTION": FunctionSource,
}
"""The forms of a name that is not registered."""


def source_of(name: str, options: Mapping[str, Any] | None = None) -> ProblemSource:
    """The source that a name stands for, with ``options`` for its fields; nothing is loaded.

    Raises:
        UsageError: the name is a word that is neither registered nor a path here; an unknown option, or one out of its
            range.
    """
    options = options or {}
    head, colon, tail = name.partition(":")
    if colon and head == "reasoning_gym":
        return _configure(ReasoningGymSource, name, options, task=tail)
    if colon and "/" not in name and "\\" not in name:
        return _configure(FunctionSource, name, options, function=name)
    path = _expand(name)
    is_path = is_file_name(path) or path.is_absolute() or name.startswith((".", "~"))
    if not is_path and "/" not in name:
        if _is_registered(name):
            return problem_sources.make(name, **options)
        if not _exists(path):
            raise UsageError(
                f"unknown problem set {name!r}, which is no file and no hub id of the form 'owner/name' either: "
                + did_you_mean(name, problem_sources)
            )
    if is_path or _exists(path) or name.count("/") > 1:
        return _configure(PathSource, name, options, path=name)
    return _configure(HubSource, name, options, id=name)


def _expand(path: str) -> Path:
    with unreadable(f"{path!r} is no path", "write the whole path"):
        return Path(path).expanduser()


def _exists(path: Path) -> bool:
    with suppress(OSError, ValueError):  # a name that no file can have
        return path.exists()
    return False


def _is_registered(name: str) -> bool:
    try:
        problem_sources.check(name)
    except UnknownName:
        return False
    return True


def _configure(component: type, name: str, options: Mapping[str, Any], **by_name: Any) -> Any:
    """A source whose name sets some of its fields; options that are no fields go to its ``options``, if it has them."""
    known = [field for field in fields_of(component) if field not in (*by_name, "options")]
    own = {option: value for option, value in options.items() if option in known}
    others = {option: value for option, value in options.items() if option not in known}
    if others and "options" not in fields_of(component):
        raise UnknownField(f"problem source {name!r}", next(iter(others)), known)
    return component(**by_name, **own, **({"options": others} if others else {}))


def check_source(name: str, options: Mapping[str, Any] | None = None, here: bool = True) -> None:
    """Raise ``UsageError`` for a name or an option that ``load_problems`` would refuse, without loading anything.
    ``here=False``: the problems will be loaded on another machine, which may have other files."""
    source = source_of(name, options)
    if here and isinstance(source, PathSource):
        check_exists(_expand(source.path))


def has_one_split(name: str) -> bool:
    """Whether a source is known to give the same rows for every split, as a single file does."""
    source = source_of(name)
    return isinstance(source, PathSource) and is_one_table(_expand(source.path))


def list_sources() -> dict[str, str]:
    """Every registered source and every other form of a name, with a line on each."""
    sources = {name: problem_sources.get(name) for name in problem_sources} | FORMS
    return {name: (inspect.getdoc(source) or "").partition("\n")[0] for name, source in sources.items()}
