"""The figures of a model card: ``python -m benchmarks.model_card [MODEL]``.

Of a finished run's folder, the card that the run makes; ``--push org/name`` uploads the run's model with it. Of any
other model, held-out accuracy of the generated problems, by level, greedy and sampled; and how usable the model is with
layers skipped: accuracy and KL divergence per token, averaged over uniformly drawn subsets with the first and the last
layer kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from registry import UsageError
from registry.command import command


@command()
def main(argv: list[str] | None = None) -> int:
    """Print a model's figures, or a run's card."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card", description=main.__doc__)
    parser.add_argument(
        "model",
        nargs="?",
        default="tiny",
        help="tiny, a folder, a hub id, or a finished run's folder (default %(default)s)",
    )
    parser.add_argument("--push", metavar="ORG/NAME", help="upload a run's model and card to the hub")
    parser.add_argument("--private", action="store_true", help="the repository that is made is private")
    parser.add_argument("--problems", type=int, default=512, help="test problems (default %(default)s)")
    args = parser.parse_args(argv)
    if args.problems < 1:
        raise UsageError(f"--problems {args.problems} must be at least 1")
    from benchmarks.experiment.training import RESULT
    from benchmarks.report.card import push_or_print, report
    from policies import Policy

    if (Path(args.model) / RESULT).is_file():
        print(push_or_print(Path(args.model), args.push, args.private))
        return 0
    if args.push:
        raise UsageError(f"--push takes the folder of a finished run, and {args.model!r} has no {RESULT}")
    print(report(Policy.load(args.model), args.problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
