"""Finished and running runs as TensorBoard logs: ``python -m benchmarks.tensorboard runs --out logs``.

One log a run, named by agent, seed and hash, against rollout tokens. Runs write no such logs themselves: everything in
them is in metrics.jsonl, and can be made at any time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from registry import UsageError
from registry.command import command
from registry.paths import ReadFolder, WriteFolder


@command()
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (2 on bad input)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tensorboard", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", action=ReadFolder, help="a run's folder, or a folder of runs")
    parser.add_argument("--out", action=WriteFolder, default=Path("tensorboard"), help="where the logs are made")
    given = parser.parse_args(arguments)
    folders = sorted(path.parent for path in [*given.runs.glob("metrics.jsonl"), *given.runs.glob("*/metrics.jsonl")])
    if not folders:
        raise UsageError(f"{given.runs} holds no run: give a folder made by benchmarks.run or benchmarks.compare")
    for folder in folders:
        print(export(folder, given.out))
    return 0


def export(folder: Path, out: Path) -> Path:
    """Write one run's log anew; returns its folder. Scalars are named as in metrics.jsonl, accuracies as
    ``evaluation/``."""
    from torch.utils.tensorboard import SummaryWriter

    from benchmarks.experiment.logs import run_name
    from benchmarks.experiment.spec import RunSpec
    from benchmarks.experiment.summary import scalars
    from benchmarks.measuring.durable import read_rows

    spec = RunSpec.read(folder / "spec.json")
    target = out / run_name(spec)
    rows, _ = read_rows(folder / "metrics.jsonl")
    for earlier in target.glob("events.out.tfevents.*"):  # of a shorter run: each point stands in the log once
        earlier.unlink()
    writer = SummaryWriter(str(target))
    for row in rows:
        for name, value in scalars(row).items():
            writer.add_scalar(name, value, global_step=row["timesteps"])
    writer.close()
    return target


if __name__ == "__main__":
    sys.exit(main())
