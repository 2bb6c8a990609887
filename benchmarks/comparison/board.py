"""The live table of a comparison: phase, iteration, accuracy, speed and time left of every run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmarks.comparison.launch import Watched
from benchmarks.experiment.progress import iteration_text

HEADS = ("agent", "seed", "phase", "iteration", "accuracy", "tokens/s", "left")
MOST_LINES = 30
MOST_NAME = 40
SECONDS_BETWEEN_LINES = 15.0
STYLES = {"failed": "red", "finished": "green", "waiting": "dim"}


class Board:
    """Context; ``show`` takes the runs' states. Live on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, labels: dict[str, str], jobs: int, quiet: bool) -> None:
        self.labels = labels
        self.jobs = jobs
        self.quiet = quiet
        console = Console(stderr=True)
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal and not quiet else None
        self.told: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> Board:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, runs: Sequence[Watched]) -> None:
        """Tell of the present state."""
        if self.live is not None:
            self.live.update(self._table(runs))
        elif not self.quiet:
            self._lines(runs)

    def _table(self, runs: Sequence[Watched]) -> Table:
        table = Table(title=headline(runs, self.jobs), title_justify="left", box=None, pad_edge=False)
        for name in HEADS:
            left = name in ("agent", "seed", "phase")
            # Where room is short, a long name goes on below and no number is cut.
            table.add_column(
                name, no_wrap=name != "agent", overflow="fold", justify="left" if left else "right", max_width=MOST_NAME
            )
        order = sorted(runs, key=lambda run: (run.phase == "waiting", run.over and run.phase != "failed"))
        for run in runs if len(runs) <= MOST_LINES else order[:MOST_LINES]:
            table.add_row(*cells(run, self.labels[run.spec.hash]), style=STYLES.get(run.phase, ""))
        return table

    def _lines(self, runs: Sequence[Watched]) -> None:
        """A line when a run's phase changes in kind, and one now and then while it trains."""
        now = time.monotonic()
        for run in runs:
            kind = run.phase if run.phase != "evaluating" else "training"
            last, when = self.told.get(run.spec.hash, ("waiting", 0.0))
            due = kind == "training" and now - when > SECONDS_BETWEEN_LINES
            if kind == last and not due:
                continue
            self.told[run.spec.hash] = (kind, now)
            accuracy = f", accuracy {run.accuracy:.1%}" if run.accuracy is not None else ""
            text = f"{self.labels[run.spec.hash]} seed {run.spec.seed}: {'finished before' if run.reused else kind}"
            text += f" {iteration_text(run.iteration, run.spec.iterations)}{accuracy}"
            print(text + (f": {run.error}" if run.error else ""), file=sys.stderr, flush=True)


def headline(runs: Sequence[Watched], jobs: int) -> str:
    """How many runs are done, and for how long the others will take."""
    over, left = sum(run.over for run in runs), seconds_left(runs, jobs)
    return f"{over} of {len(runs)} runs done" + (f", about {clock(left)} left" if left is not None else "")


def cells(run: Watched, label: str) -> list[str]:
    """What is said of a run under each of ``HEADS``."""
    own = _left(run)
    return [
        label,
        str(run.spec.seed),
        "reused" if run.reused else run.phase,
        iteration_text(run.iteration, run.spec.iterations),
        f"{run.accuracy:.1%}" if run.accuracy is not None else "",
        f"{run.tokens_per_second:.0f}" if run.tokens_per_second and not run.over else "",
        clock(own) if own is not None and not run.over and run.process is not None else "",
    ]


def _left(run: Watched) -> float | None:
    """Seconds until the first of a run's budgets is used up; None before its pace is known."""
    pace, spec = run.seconds_an_iteration, run.spec
    if pace is None:
        return None
    spent, tokens = pace * run.iteration, run.tokens / run.iteration if run.iteration else 0.0
    left = [] if spec.iterations is None else [pace * (spec.iterations - run.iteration)]
    left += [] if spec.seconds is None else [spec.seconds - spent]
    left += [] if spec.tokens is None or not tokens else [pace * (spec.tokens - run.tokens) / tokens]
    return max(0.0, min(left)) if left else None


def seconds_left(runs: Sequence[Watched], jobs: int) -> float | None:
    """Seconds until all runs are over, from the pace of those seen; None before any pace is known."""
    seen = [(run, left) for run in runs if (left := _left(run)) is not None]
    if not seen:
        return None
    usual = sum((run.seconds_an_iteration or 0.0) * run.iteration + left for run, left in seen) / len(seen)
    todo = [usual if (left := _left(run)) is None else left for run in runs if not run.over]
    return max([sum(todo) / jobs, *todo], default=0.0)


def clock(seconds: float) -> str:
    """Such as ``3:07`` or ``2:15:00``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
