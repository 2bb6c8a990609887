"""Sources of problems as components: what can be chosen about a source is its fields, and ``load(split)`` loads it.

``registry.problem_sources`` holds the ones with a name of their own: the generator and the published data sets. A
source of yours is registered in the same way; most are rows of a table and need no more than ``RowSource.rows``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Protocol

from envs.problem import Problem, Problems
from envs.problems.columns import Columns, find_columns, to_problem
from envs.problems.listed import ListedProblems, list_problems
from envs.problems.readers import Row, has_split, read_hub, read_path
from envs.problems.scenes import DEFAULT_LEVELS
from registry import UsageError, check_at_least, did_you_mean, problem_sources

DATA_VARIABLE = "NESTED_REFT_DATA"
SVAMP_TRAIN = 700


class ProblemSource(Protocol):
    """Where problems come from. Its fields are the options that ``load_problems`` takes for it."""

    def load(self, split: str) -> Problems:
        """The problems of a split; raises ``UsageError`` where they cannot be had."""
        ...


@problem_sources.register("arithmetic")
@dataclass(frozen=True)
class ArithmeticSource:
    """Generated word problems, unlimited, with worked solutions; ``train`` and ``test`` are disjoint.

    Attributes:
        level: a difficulty from 1 to 4, or several, mixed evenly (see ``envs.problems.arithmetic``).
        seed: of the stream of problems.
        limit: that many problems, the first ones; None for no limit.
    """

    level: int | tuple[int, ...] = DEFAULT_LEVELS
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def load(self, split: str) -> Problems:
        """The generator of a split, or its first ``limit`` problems."""
        from envs.problems.arithmetic import Arithmetic

        problems = Arithmetic(split=split, level=self.level, seed=self.seed)
        if self.limit is None:
            return problems
        return ListedProblems(problems.name, (problems[index] for index in range(self.limit)))


def check_limit(limit: Any, name: str = "limit") -> None:
    """Raise ``UsageError`` unless ``limit``, called ``name``, is None or a positive integer."""
    if limit is not None:
        check_at_least(limit, 1, name)


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Rows of a table, one a problem; a subclass says where they are. Which rows are taken: ``shuffle``, then
    ``subset``, then ``omit``, then ``limit``; no other row is looked at.

    Attributes:
        question: name of the question's column; None to find it. A dot leads into an object.
        answer: name of the answer's column, likewise: ``reward_model.ground_truth``.
        subset: ``"start:stop"``, either side may be empty.
        shuffle: seed of a permutation; None for the order of the source.
        omit: rows by their numbers from 0 in the source, as errors name them: ``"3,17,40:45"``, or a list.
        limit: at most this many rows.
    """

    question: str | None = None
    answer: str | None = None
    subset: str | None = None
    shuffle: int | None = None
    omit: str | int | tuple[int, ...] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if self.shuffle is not None and not isinstance(self.shuffle, Integral):
            raise UsageError(f"shuffle={self.shuffle!r} must be the seed of a permutation, an integer")
        self._bounds()
        self._omitted()

    @property
    def name(self) -> str:
        """What the problems say they come from, before the split."""
        raise NotImplementedError

    def rows(self, split: str) -> Iterable[Row | Problem]:
        """All rows of a split, as mappings from column to value or as problems."""
        raise NotImplementedError

    def load(self, split: str) -> Problems:
        """The problems of a split. Raises ``UsageError``: no rows, a missing column, an unreadable gold answer."""
        return self.list_rows(self.rows(split), split)

    def list_rows(self, rows: Iterable[Row | Problem], split: str) -> ListedProblems:
        """Those of ``rows`` that the fields choose, as problems. Raises ``UsageError`` naming all that are none."""
        name, table = f"{self.name}/{split}", list(rows)
        chosen = self._choose(len(table), name)
        if not chosen:
            raise UsageError(
                f"{name} has no rows{' in the chosen subset' if table else ''}; choose another split or subset"
            )
        columns = None
        if any(isinstance(table[index], Mapping) for index in chosen):
            columns = find_columns(table, name, self.question, self.answer)
        problems, errors = [], {}
        for index in chosen:
            try:
                problems.append(_problem(table[index], name, index, columns))
            except UsageError as error:
                errors[index] = error
        if errors:
            raise _bad_rows(name, errors, len(chosen))
        _warn_damaged(name, chosen, problems)
        return list_problems(name, problems, chosen)

    def _choose(self, size: int, name: str) -> list[int]:
        indices, omitted = list(range(size)), self._omitted()
        if any(rows.stop > size for rows in omitted):
            raise UsageError(f"omit={self.omit!r} names rows beyond those of {name}, which are 0..{size - 1}")
        if self.shuffle is not None:
            Random(int(self.shuffle)).shuffle(indices)
        kept = [index for index in indices[self._bounds()] if not any(index in rows for rows in omitted)]
        return kept[: self.limit]

    def _bounds(self) -> slice:
        if self.subset is None:
            return slice(None)
        try:
            start, stop = (int(part) if part.strip() else None for part in self.subset.split(":"))
        except (ValueError, AttributeError):
            raise UsageError(f"subset={self.subset!r} is not of the form 'start:stop', such as '0:100'") from None
        return slice(start, stop)

    def _omitted(self) -> list[range]:
        given: Any = () if self.omit is None else self.omit
        parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
        omitted = []
        for part in parts:
            match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", str(part))
            if match is None:
                raise UsageError(f"omit={self.omit!r} is not a list of rows from 0, such as '3,17,40:45'")
            omitted.append(range(int(match[1]), int(match[2] or int(match[1]) + 1)))
        return omitted


def _problem(row: Any, source: str, index: int, columns: Columns | None) -> Problem:
    if not isinstance(row, Problem):
        row = to_problem(row, source, index, columns or Columns("question", "answer"))
    if not row.scorer:
        from envs.verifier import check_gold  # with the first row, rather than by import envs

        check_gold([row.answer, *row.alternatives], f"row {index} of {source}")
    return row


def _bad_rows(name: str, errors: dict[int, UsageError], count: int) -> UsageError:
    """One error for all rows that are no problems: which they are, what is wrong with the first, how to go on."""
    first = next(iter(errors.values()))
    if len(errors) == count:
        return first if count == 1 else UsageError(f"none of the {count} rows of {name} is a problem: {first}")
    rows = ",".join(_ranges(sorted(errors)))
    what = "1 row" if len(errors) == 1 else f"{len(errors)} of {count} rows"
    return UsageError(f"{what} of {name} cannot be used: {first}. To leave out all such rows: omit={rows!r}")


def _warn_damaged(name: str, chosen: list[int], problems: list[Problem]) -> None:
    from envs.verifier.gold import is_damaged  # with the first rows, rather than by import envs

    texts = [(one.question, one.solution) for one in problems]
    damaged = sorted(index for index, pair in zip(chosen, texts, strict=True) if any(map(is_damaged, pair)))
    if damaged:
        warnings.warn(
            f"{len(damaged)} of {len(problems)} rows of {name} have characters in a question or solution that a "
            f"backslash of LaTeX may have become (in JSON write \\\\frac for \\frac): to leave them out, "
            f"omit={','.join(_ranges(damaged))!r}",
            stacklevel=4,
        )


def _ranges(rows: list[int]) -> list[str]:
    """Sorted numbers in the notation of ``omit``: 3, 4, 5, 9 are ``3:6`` and ``9``."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    return [f"{start}:{stop}" if stop > start + 1 else str(start) for start, stop in runs]


@dataclass(frozen=True, kw_only=True)
class PublishedSet(RowSource):
    """A data set of the literature, by its name: from files below ``data_dir``, which may be downloads of the hub's
    folder, or else from the hub.

    Attributes:
        data_dir: folder of the files; None for the environment variable NESTED_REFT_DATA, if that is set, and then for
            the hub where it holds none of them.
        files: for each split, paths below ``data_dir``, tried in order; ``path#key`` is a split of an Arrow folder.
        hub: hub id, and its configuration if it has several.
        hub_splits: for each split, its name on the hub where that differs.
        default_split: what the environment id ``MathReason/<name>-v0`` serves.
        max_prompt_tokens: of that id, enough for the longest question with the built-in tokenizer, whose tokens are
            short, and any template.
    """

    data_dir: str | None = None

    name: ClassVar[str]  # type: ignore[assignment, misc]
    files: ClassVar[dict[str, tuple[str, ...]]]
    hub: ClassVar[tuple[str, str | None]]
    hub_splits: ClassVar[dict[str, str]] = {}
    default_split: ClassVar[str] = "test"
    max_prompt_tokens: ClassVar[int] = 1024

    def rows(self, split: str) -> list[Row]:
        """All rows of a split."""
        if split not in self.files:
            raise UsageError(f"{self.name} has no split {split!r}: {did_you_mean(split, self.files)}")
        given = self.data_dir or os.environ.get(DATA_VARIABLE)
        hub_id, config = self.hub
        hub_split = self.hub_splits.get(split, split)
        if not given:
            return read_hub(hub_id, hub_split, config)
        folder = Path(str(given)).expanduser()
        origin = "data_dir" if self.data_dir else DATA_VARIABLE
        if not folder.is_dir():
            raise UsageError(f"{origin}={given!r} is not a folder; give the one that holds {self.files[split][0]}")
        for file in self.files[split]:
            path, _, key = file.partition("#")
            if (folder / path).exists():
                return self.file_rows(folder / path, key, split)
        downloads = [folder / place for place in dict.fromkeys((self.name, hub_id.rpartition("/")[2], hub_id))]
        for download in downloads:
            inner = download / config if config and (download / config).is_dir() else download
            for name in dict.fromkeys((hub_split, split)):
                if has_split(inner, name):
                    return read_path(inner, name)
        looked = ", ".join([*self.files[split], *(f"{place.relative_to(folder)}/{hub_split}-*" for place in downloads)])
        nothing = f"{origin}={given!r} holds no {self.name}/{split} (looked for {looked})"
        if self.data_dir:
            raise UsageError(f"{nothing}; put one of these there, or name the hub id {hub_id!r} as the problem set")
        try:
            return read_hub(hub_id, hub_split, config)
        except UsageError as error:
            raise UsageError(f"{nothing}; {error}") from error

    def file_rows(self, path: Path, key: str, split: str) -> list[Row]:
        """The rows of a split in one of ``files``."""
        return read_path(path, key or split)


PUBLISHED: dict[str, type[PublishedSet]] = {}
"""The published sets by name."""


def _publish(component: type[PublishedSet]) -> type[PublishedSet]:
    PUBLISHED[component.name] = component
    return problem_sources.register(component.name)(component)


def _files(name: str, *splits: str) -> dict[str, tuple[str, ...]]:
    return {split: (f"{name}/{split}.jsonl", f"{name}/{split}.parquet", f"{name}_{split}.jsonl") for split in splits}


@_publish
class GSM8K(PublishedSet):
    """8,792 grade-school word problems with worked solutions (arXiv 2110.14168)."""

    name = "gsm8k"
    default_split = "train"
    files = _files("gsm8k", "train", "test")
    hub = ("openai/gsm8k", "main")


@_publish
class SVAMP(PublishedSet):
    """1,000 short word problems in varied wording (arXiv 2103.07191); its first 700 are ``train``."""

    name = "svamp"
    default_split = "train"
    files = dict.fromkeys(("train", "test"), ("svamp/SVAMP.json", "SVAMP.json"))
    hub = ("ChilleD/SVAMP", None)

    def file_rows(self, path: Path, key: str, split: str) -> list[Row]:
        """SVAMP.json is one list of 1000. Its first 700 rows are the training split here and the last 300 the test
        split: the published sizes, and variations of one story, which stand side by side, stay together."""
        rows = super().file_rows(path, key, split)
        return rows[:SVAMP_TRAIN] if split == "train" else rows[SVAMP_TRAIN:]


@_publish
class MATH(PublishedSet):
    """12,500 competition problems with worked solutions (arXiv 2103.03874)."""

    name = "math"
    default_split = "train"
    max_prompt_tokens = 4096
    files = _files("math", "train", "test")
    hub = ("DigitalLearningGmbH/MATH-lighteval", None)


@_publish
class ASDiv(PublishedSet):
    """2,305 diverse elementary word problems (arXiv 2106.15772); ``test`` alone."""

    name = "asdiv"
    files: ClassVar = {"test": ("asdiv/test.jsonl", "asdiv.jsonl")}
    hub = ("EleutherAI/asdiv", None)
    hub_splits: ClassVar = {"test": "validation"}


@_publish
class MAWPS(PublishedSet):
    """Elementary word problems of several earlier collections (N16-1136)."""

    name = "mawps"
    files = _files("mawps", "train", "test")
    hub = ("MU-NLPC/Calc-mawps", None)


@_publish
class MATH500(PublishedSet):
    """500 test problems of MATH (arXiv 2305.20050)."""

    name = "math500"
    max_prompt_tokens = 2048
    files: ClassVar = {"test": ("math500.jsonl", "evaluation_suite#math")}
    hub = ("HuggingFaceH4/MATH-500", None)


@_publish
class AIME24(PublishedSet):
    """30 problems of the American Invitational Mathematics Examination of 2024."""

    name = "aime24"
    files: ClassVar = {"test": ("aime24.jsonl", "evaluation_suite#aime")}
    hub = ("HuggingFaceH4/aime_2024", None)
    hub_splits: ClassVar = {"test": "train"}


@_publish
class AMC23(PublishedSet):
    """40 problems of the American Mathematics Competitions of 2023."""

    name = "amc23"
    files: ClassVar = {"test": ("amc23.jsonl",)}
    hub = ("math-ai/amc23", None)


@_publish
class Minerva(PublishedSet):
    """272 undergraduate problems in science and mathematics (arXiv 2206.14858)."""

    name = "minerva"
    files: ClassVar = {"test": ("minerva.jsonl", "evaluation_suite#minerva")}
    hub = ("math-ai/minervamath", None)


@_publish
class OlympiadBench(PublishedSet):
    """675 olympiad problems in English with one final answer (arXiv 2402.14008)."""

    name = "olympiad"
    max_prompt_tokens = 4096
    files: ClassVar = {"test": ("olympiad.jsonl", "evaluation_suite#olympiad_bench")}
    hub = ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP")
    hub_splits: ClassVar = {"test": "train"}
