"""Where problems come from: generators, files, hub sets and other libraries. What a verdict is does not belong here."""

from envs.problems.listed import ListedProblems, duplicates, overlap
from envs.problems.load import check_source, has_one_split, list_sources, load_problems, source_of
from envs.problems.sources import ProblemSource, PublishedSet, RowSource

__all__ = [
    "ListedProblems",
    "ProblemSource",
    "PublishedSet",
    "RowSource",
    "check_source",
    "duplicates",
    "has_one_split",
    "list_sources",
    "load_problems",
    "overlap",
    "source_of",
]
