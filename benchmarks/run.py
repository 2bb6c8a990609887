"""Train one agent: ``python -m benchmarks.run --agent nested-reft/uniform/retrace --seed 3 --set correction.lam=0.9``.

The run lives in ``runs/<hash>/``: spec.json (every default resolved), provenance.json, metrics.jsonl (a line an
iteration and an evaluation), checkpoint/, model/ and, last, result.json. The same command resumes a killed run to the
same numbers; ``--spec FILE`` repeats a run exactly; ``--list`` shows what can be chosen by name. Several processes or
GPUs share one run under torchrun: ``torchrun --nproc-per-node 2 -m benchmarks.run ...``, to the same numbers up to the
order of sums.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiment import TRACKERS, follows
from registry import UsageError
from registry.command import assignment, command
from registry.paths import ReadFile, WriteFolder

if TYPE_CHECKING:
    from benchmarks.experiment.spec import RunSpec


@command(interrupted="the same command goes on from the last checkpoint")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 2 on bad input, 130 when interrupted."""
    given = _parser().parse_args(arguments)
    if given.list:
        from benchmarks.comparison.catalogue import catalogue

        print("\n\n".join("\n".join(kind.lines()) for kind in catalogue()))
        return 0
    try:
        # After the arguments: --help and typos in options need no torch.
        from agents.monitoring.trackers import check_trackers
        from benchmarks.experiment.training import run

        spec = _spec(given)
        check_trackers(given.log)
        if given.dry_run:
            _rehearse(spec)
            return 0
        result = run(spec, given.runs, given.quiet, given.threads, given.parent, given.log)
    except UsageError as error:
        if follows():
            raise UsageError(f"process {os.environ['RANK']}: {error}") from error
        raise
    if not given.quiet and not follows():
        _print_result(result, given.runs / spec.hash)
    return 0


def _rehearse(spec: Any) -> None:
    """Say what can be seen to be wrong with a run, and what memory it needs."""
    from benchmarks.comparison.rehearse import rehearse_run
    from benchmarks.experiment.memory import has_plan, memory_of
    from benchmarks.measuring.table import console

    rehearse_run(spec)
    if not has_plan(spec):
        print(
            f"note: no plan of memory: it is of reft's loop and its own writer, and not of {spec.agent['id']}",
            file=sys.stderr,
        )
        return
    console().print(memory_of(spec))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="show all names: of agents, components, presets, ...")
    parser.add_argument("--agent", help="agent id, such as nested-reft/uniform/truncated-is (default: reft)")
    parser.add_argument("--policy", help="tiny (built in), a Hugging Face folder or a hub id")
    parser.add_argument("--env", help="a registered environment id, such as MathReason-v0 or MathReason/svamp-v0")
    parser.add_argument("--seed", type=int, help="of everything drawn (default: 0)")
    parser.add_argument("--iterations", type=int, help="of the loop (default: 20, without another budget)")
    parser.add_argument("--tokens", type=int, help="budget of rollout tokens")
    parser.add_argument("--seconds", type=float, help="budget of training seconds, evaluations not counted")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any hyper-parameter")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--spec", action=ReadFile, help="repeat this spec.json; the arguments above are then not taken")
    parser.add_argument(
        "--runs", action=WriteFolder, default=Path("runs"), help="where run folders are made (default: runs)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--log", action="append", default=[], choices=TRACKERS, help="a tracker that gets the rows as they are written"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what memory the run needs on 1 to 8 processes, by its shapes alone"
    )
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def _spec(given: argparse.Namespace) -> RunSpec:
    from benchmarks.experiment.resolve import resolve
    from benchmarks.experiment.spec import OWN_FIELDS, RunSpec

    own = {name: value for name, value in vars(given).items() if name == "env" or name in OWN_FIELDS}
    if given.spec is not None:
        if given.set or given.agent is not None or any(value is not None for value in own.values()):
            names = "--agent, --set, " + ", ".join(f"--{name}" for name in own)
            raise UsageError(f"--spec repeats a run exactly: leave out {names}")
        return RunSpec.read(given.spec)
    agent = "reft" if given.agent is None else given.agent
    return resolve(agent, settings=dict(assignment(text) for text in given.set), **own)


def _print_result(result: dict[str, Any], folder: Path) -> None:
    before, after = result["accuracy_before"], result["accuracy_after"]
    print(f"{result['agent']} seed {result['seed']}: held-out accuracy {before:.1%} -> {after:.1%}")
    speed, seconds = result["rollout_tokens_per_second"], result["seconds"] + result["seconds_evaluation"]
    wrote = "" if speed is None else f"rollout {speed:.0f} tokens/s, "
    print(f"{wrote}{seconds:.0f} s in all; {folder}")


if __name__ == "__main__":
    sys.exit(main())
