"""What measured in the first iterations tells how a run will end, read from finished runs.

    python -m benchmarks.compare --preset depth --runs runs/depth
    python -m benchmarks.early_signs runs/depth --fit 'nested-reft/uniform/*'

A run collapses where it gains less than half of what the baseline gains with the same seed in as many iterations. Each
sign is the mean over the first iterations of a metric; its threshold is fitted to some arms (``--fit``) and judged on
the others, which did not make it. A sign that ranks runs by chance has an AUC of .5.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from registry import UsageError
from registry.command import command
from registry.paths import ReadFolder, WriteFile, WritePicture


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.early_signs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("runs", nargs="+", action=ReadFolder, help="run folders, or folders of them")
    options.add_argument("--baseline", default="reft", help="whose gain is the measure (default: reft)")
    options.add_argument(
        "--fit", nargs="+", default=["nested-reft/uniform/*"], help="patterns of the arms that make the thresholds"
    )
    options.add_argument("--iterations", type=int, default=3, help="how many first iterations are read (default 3)")
    options.add_argument("--json", action=WriteFile, help="write the signs and the runs here")
    options.add_argument("--picture", action=WritePicture, help="write a picture of the best sign here (png, svg)")
    return options


@command()
def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 for bad input."""
    given = parser().parse_args(arguments)
    if given.iterations < 1:
        raise UsageError(f"--iterations {given.iterations}: give at least 1")
    from benchmarks.comparison.signs import draw, early, judge, table
    from benchmarks.comparison.stored import read
    from benchmarks.measuring.durable import json_text
    from benchmarks.measuring.table import console

    runs = early(read(given.runs).arms, given.baseline, given.fit, given.iterations)
    signs = judge(runs)
    console().print(table(signs))
    if given.json:
        said: dict[str, Any] = {"signs": [vars(sign) for sign in signs], "runs": [vars(run) for run in runs]}
        given.json.write_text(json_text(said, indent=1) + "\n")
    if given.picture:
        draw(runs, signs[0], given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
