"""Fair speed ratios on a noisy machine: ABBA blocks in one process, the median of paired ratios with an interval.

A lone absolute time says little where other programs share the machine: its speed drifts by a factor of two within
minutes. Two blocks that follow each other see nearly the same machine, so their ratio is measured far better than
either of them; the order A B B A cancels a linear drift within a pair of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring.statistics import Interval, percentile_interval


@dataclass(frozen=True)
class Block:
    """One timed piece of work.

    Attributes:
        tokens: how many completion tokens it wrote.
        seconds: wall-clock.
        processor: seconds of all threads of the process that wrote, where they were counted: what other programs take
            is no part of them, and what threads spend in waiting for one another is.
    """

    tokens: int
    seconds: float
    processor: float | None = None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def abba(ours: Callable[[], Block], theirs: Callable[[], Block], pairs: int) -> list[tuple[Block, Block]]:
    """``pairs`` pairs of blocks (ours, theirs), run in the order A B, B A, A B, ..."""
    blocks = []
    for number in range(pairs):
        if number % 2 == 0:
            first = ours()
            blocks.append((first, theirs()))
        else:
            second = theirs()
            blocks.append((ours(), second))
    return blocks


def processor_ratio(pairs: list[tuple[Block, Block]]) -> float | None:
    """Median over pairs of ours / theirs in tokens per processor second, where both were counted."""
    counted = [
        (ours.tokens / ours.processor) / (theirs.tokens / theirs.processor)
        for ours, theirs in pairs
        if ours.processor and theirs.processor
    ]
    return float(np.median(counted)) if counted else None


def median_ratio(pairs: list[tuple[Block, Block]], resamples: int = 4000, seed: int = 0) -> Interval:
    """Median over pairs of ours / theirs in tokens per second, with a 95 % percentile bootstrap interval."""
    ratios = np.array([ours.rate / theirs.rate for ours, theirs in pairs])
    rng = np.random.default_rng(seed)
    drawn = ratios[rng.integers(len(ratios), size=(resamples, len(ratios)))]
    return percentile_interval(float(np.median(ratios)), np.median(drawn, axis=1))
