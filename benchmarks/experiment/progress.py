"""Progress of one run: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.experiment.spec import RunSpec

SECONDS_BETWEEN_LINES = 10


class RunProgress:
    """Context; ``show`` takes the rows of metrics.jsonl as they are written."""

    def __init__(self, spec: RunSpec, quiet: bool) -> None:
        self.spec = spec
        self.quiet = quiet
        console = Console(stderr=True)
        self.live = console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.told = time.monotonic()
        self.seconds = 0.0

    def __enter__(self) -> RunProgress:
        self.bar.start()
        name = f"{self.spec.agent['id']} seed {self.spec.seed}"
        self.job = self.bar.add_task(name, total=1.0, note="")
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Tell of one row."""
        if "evaluation" in row:
            note = f"held-out accuracy {row['evaluation']['greedy']:.1%}"
        elif "rollout_accuracy" in row:
            note = f"rollout accuracy {row['rollout_accuracy']:.1%}, {row['rollout_tokens_per_second']:.0f} tokens/s"
        elif "loss" not in row:
            note = "nothing written"
        else:
            note = f"loss {row['loss']:.3f}, {row['trained_tokens_per_second']:.0f} tokens/s"
        self.seconds += row.get("time/iteration", 0.0)
        note = f"iteration {iteration_text(row['iteration'], self.spec.iterations)}: {note}"
        used = self.spec.used(row["iteration"], row["timesteps"], self.seconds)
        self.bar.update(self.job, completed=min(1.0, used), note=note)
        due = time.monotonic() - self.told > SECONDS_BETWEEN_LINES or "evaluation" in row
        if not self.quiet and not self.live and due:
            self.told = time.monotonic()
            print(note, file=sys.stderr, flush=True)


def iteration_text(iteration: int, most: int | None) -> str:
    """Such as ``3/20``, or ``3`` where another budget decides."""
    return f"{iteration}/{most}" if most is not None else str(iteration)
