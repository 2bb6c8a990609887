"""Sources of problems as components: what can be chosen about a source is its fields, and ``load(split)`` loads it.

``registry.problem_sources`` holds the ones with a name of their own: the generator and the published data sets. A
source of yours is registered in the same way; most are rows of a table and need no more than ``RowSource.rows``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Protocol

from envs.problem import Problem, Problems
from envs.problems.columns import Columns, to_problem
from envs.problems.listed import ListedProblems, list_problems
from envs.problems.readers import Row, read_hub, read_path
from envs.problems.scenes import DEFAULT_LEVELS
from registry import UsageError, did_you_mean, problem_sources

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


def check_limit(limit: Any) -> None:
    """Raise ``UsageError`` unless ``limit`` is None or a positive integer."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise UsageError(f"limit={limit!r} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Rows of a table, one a problem; a subclass says where they are. Which rows are taken: ``shuffle``, then
    ``subset``, then ``limit``.

    Attributes:
        question: name of the question's column; None to find it.
        answer: name of the answer's column; None to find it.
        subset: ``"start:stop"``, either side may be empty.
        shuffle: seed of a permutation; None for the order of the source.
        limit: at most this many rows.
    """

    question: str | None = None
    answer: str | None = None
    subset: str | None = None
    shuffle: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)
        self._bounds()

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
        """Those of ``rows`` that the fields choose, as problems."""
        name, columns = f"{self.name}/{split}", Columns(self.question, self.answer)
        problems = [
            row if isinstance(row, Problem) else to_problem(row, name, index, columns) for index, row in enumerate(rows)
        ]
        chosen = self._choose(problems)
        if not chosen:
            raise UsageError(
                f"{name} has no rows{' in the chosen subset' if problems else ''}; choose another split or subset"
            )
        return list_problems(name, chosen)

    def _choose(self, problems: list[Problem]) -> list[Problem]:
        if self.shuffle is not None:
            problems = list(problems)
            Random(self.shuffle).shuffle(problems)
        return problems[self._bounds()][: self.limit]

    def _bounds(self) -> slice:
        if self.subset is None:
            return slice(None)
        try:
            start, stop = (int(part) if part.strip() else None for part in self.subset.split(":"))
        except (ValueError, AttributeError):
            raise UsageError(f"subset={self.subset!r} is not of the form 'start:stop', such as '0:100'") from None
        return slice(start, stop)


@dataclass(frozen=True, kw_only=True)
class PublishedSet(RowSource):
    """A data set of the literature, by its name: from files below ``data_dir`` if they are there, else from the hub.

    Attributes:
        data_dir: folder of the files; None for the environment variable NESTED_REFT_DATA, if that is set.
        files: for each split, paths below ``data_dir``, tried in order; ``path#key`` is a split of an Arrow folder.
        hub: hub id, and its configuration if it has several.
        hub_splits: for each split, its name on the hub where that differs.
        default_split: what the environment id ``MathReason/<name>-v0`` serves.
    """

    data_dir: str | None = None

    name: ClassVar[str]  # type: ignore[assignment, misc]
    files: ClassVar[dict[str, tuple[str, ...]]]
    hub: ClassVar[tuple[str, str | None]]
    hub_splits: ClassVar[dict[str, str]] = {}
    default_split: ClassVar[str] = "test"

    def rows(self, split: str) -> list[Row]:
        """All rows of a split."""
        if split not in self.files:
            raise UsageError(f"{self.name} has no split {split!r}: {did_you_mean(split, self.files)}")
        folder = self.data_dir or os.environ.get(DATA_VARIABLE)
        if folder is not None:
            if not Path(folder).is_dir():
                raise UsageError(f"data_dir={folder!r} is not a folder; give the one that holds {self.files[split][0]}")
            for file in self.files[split]:
                path, _, key = file.partition("#")
                if (Path(folder) / path).exists():
                    return self.file_rows(Path(folder) / path, key, split)
        hub_id, config = self.hub
        return read_hub(hub_id, self.hub_splits.get(split, split), config)

    def file_rows(self, path: Path, key: str, split: str) -> list[Row]:
        """The rows of a split in one of ``files``."""
        return read_path(path, key or split)


PUBLISHED: dict[str, type[PublishedSet]] = {}
"""The published sets by name."""


def _published(component: type[PublishedSet]) -> type[PublishedSet]:
    PUBLISHED[component.name] = component
    return problem_sources.register(component.name)(component)


def _files(name: str, *splits: str) -> dict[str, tuple[str, ...]]:
    return {split: (f"{name}/{split}.jsonl", f"{name}/{split}.parquet", f"{name}_{split}.jsonl") for split in splits}


@_published
class GSM8K(PublishedSet):
    """8,792 grade-school word problems with worked solutions (arXiv 2110.14168)."""

    name = "gsm8k"
    default_split = "train"
    files = _files("gsm8k", "train", "test")
    hub = ("openai/gsm8k", "main")


@_published
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


@_published
class MATH(PublishedSet):
    """12,500 competition problems with worked solutions (arXiv 2103.03874)."""

    name = "math"
    default_split = "train"
    files = _files("math", "train", "test")
    hub = ("DigitalLearningGmbH/MATH-lighteval", None)


@_published
class ASDiv(PublishedSet):
    """2,305 diverse elementary word problems (arXiv 2106.15772); ``test`` alone."""

    name = "asdiv"
    files: ClassVar = {"test": ("asdiv/test.jsonl", "asdiv.jsonl")}
    hub = ("EleutherAI/asdiv", None)
    hub_splits: ClassVar = {"test": "validation"}


@_published
class MAWPS(PublishedSet):
    """Elementary word problems of several earlier collections (N16-1136)."""

    name = "mawps"
    files = _files("mawps", "train", "test")
    hub = ("MU-NLPC/Calc-mawps", None)


@_published
class MATH500(PublishedSet):
    """500 test problems of MATH (arXiv 2305.20050)."""

    name = "math500"
    files: ClassVar = {"test": ("math500.jsonl", "evaluation_suite#math")}
    hub = ("HuggingFaceH4/MATH-500", None)


@_published
class AIME24(PublishedSet):
    """30 problems of the American Invitational Mathematics Examination of 2024."""

    name = "aime24"
    files: ClassVar = {"test": ("aime24.jsonl", "evaluation_suite#aime")}
    hub = ("HuggingFaceH4/aime_2024", None)
    hub_splits: ClassVar = {"test": "train"}


@_published
class AMC23(PublishedSet):
    """40 problems of the American Mathematics Competitions of 2023."""

    name = "amc23"
    files: ClassVar = {"test": ("amc23.jsonl", "evaluation_suite#amc")}
    hub = ("math-ai/amc23", None)


@_published
class Minerva(PublishedSet):
    """272 undergraduate problems in science and mathematics (arXiv 2206.14858)."""

    name = "minerva"
    files: ClassVar = {"test": ("minerva.jsonl", "evaluation_suite#minerva")}
    hub = ("math-ai/minervamath", None)


@_published
class OlympiadBench(PublishedSet):
    """675 olympiad problems in English with one final answer (arXiv 2402.14008)."""

    name = "olympiad"
    files: ClassVar = {"test": ("olympiad.jsonl", "evaluation_suite#olympiad_bench")}
    hub = ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP")
    hub_splits: ClassVar = {"test": "train"}
