"""Train one agent: ``python -m benchmarks.run --agent nested-reft/uniform/retrace --seed 3 --set correction.lam=0.9``.

The run lives in ``runs/<hash>/``: spec.json (every default resolved), provenance.json, metrics.jsonl (a line an
iteration and an evaluation), checkpoint/, model/ and, last, result.json. The same command resumes a killed run to the
same numbers; ``--spec FILE`` repeats a run exactly.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.spec import RunSpec, resolve
from registry import UsageError


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (2 on bad input)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--agent", default="reft", help="agent id, such as nested-reft/uniform/truncated-is")
    parser.add_argument("--policy", help="tiny (built in), a Hugging Face folder or a hub id")
    parser.add_argument("--env", help="a registered environment id, such as MathReason-v0 or MathReason/svamp-v0")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any hyper-parameter")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--spec", type=Path, help="repeat this spec.json; the other arguments are then not taken")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are made")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    try:
        spec = _spec(given)
        result = run(spec, given.runs, quiet=given.quiet, threads=given.threads)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not given.quiet:
        _print_result(result, given.runs / spec.hash)
    return 0


def _spec(given: argparse.Namespace) -> RunSpec:
    if given.spec is not None:
        if given.set or given.iterations or given.policy or given.env or given.seed is not None:
            raise UsageError("--spec repeats a run exactly: leave out --set, --seed, --policy, --env and --iterations")
        return RunSpec.read(given.spec)
    return resolve(
        given.agent,
        settings=given.set,
        policy=given.policy,
        env=given.env,
        seed=given.seed,
        iterations=given.iterations,
        device=given.device,
    )


def run(spec: RunSpec, runs: Path, quiet: bool = True, threads: int | None = None) -> dict[str, Any]:
    """Train ``spec``'s agent in ``runs/<hash>``, going on from its checkpoint if there is one; returns the result."""
    from benchmarks.training import Training

    folder = runs / spec.hash
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    training = Training(spec, folder)
    with _progress(spec, quiet) as show:
        for row in training:
            show(row)
    return training.result


class _progress:  # noqa: N801 (reads as a function)
    """Context: a rich bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, spec: RunSpec, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.spec = spec
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.told = time.monotonic()

    def __enter__(self) -> Any:
        self.bar.start()
        name = f"{self.spec.agent['id']} seed {self.spec.seed}"
        self.job = self.bar.add_task(name, total=self.spec.iterations, note="")
        return self.show

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Tell of one metrics row."""
        if "evaluation" in row:
            note = f"held-out accuracy {row['evaluation']['greedy']:.1%}"
        else:
            note = f"rollout accuracy {row['rollout_accuracy']:.1%}, {row['rollout_tokens_per_second']:.0f} tokens/s"
        self.bar.update(self.job, completed=row["iteration"], note=note)
        if not self.quiet and not self.live and (time.monotonic() - self.told > 10 or "evaluation" in row):
            self.told = time.monotonic()
            print(f"iteration {row['iteration']}/{self.spec.iterations}: {note}", file=sys.stderr, flush=True)


def _print_result(result: dict[str, Any], folder: Path) -> None:
    before, after = result["accuracy_before"], result["accuracy_after"]
    print(f"{result['agent']} seed {result['seed']}: held-out accuracy {before:.1%} -> {after:.1%}")
    print(f"rollout {result['rollout_tokens_per_second']:.0f} tokens/s, {result['seconds']:.0f} s in all; {folder}")


if __name__ == "__main__":
    sys.exit(main())
