"""Where problems come from: generators, files, hub sets and other libraries. What a verdict is does not belong here."""

from envs.problems.load import ListedProblems, duplicates, load_problems, overlap

__all__ = ["ListedProblems", "duplicates", "load_problems", "overlap"]
