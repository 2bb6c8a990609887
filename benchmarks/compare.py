"""Compare agents: ``python -m benchmarks.compare --agents 'nested-reft/*/retrace' --seeds 5 --set learning_rate=1e-4``.

Without arguments it runs the preset ``smoke``: on-policy ReFT and three nested agents, three seeds, on the built-in
model. Every run is a process of its own with a folder of its own, so an interrupted comparison goes on where it
stopped, and runs are shared between comparisons. The report (report.html, report.md, results.json, outcomes.json,
curves.png) is written to ``runs/compare-<hash>/``. ``--from`` reports on what is there already.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiment import BUDGETS, TRACKERS
from registry import UsageError, did_you_mean
from registry.command import assignment, command
from registry.paths import ReadPath, WriteFolder

if TYPE_CHECKING:
    from benchmarks.comparison.arms import Arm
    from benchmarks.comparison.grid import Grid, Start
    from benchmarks.comparison.launch import Watched
    from benchmarks.report.comparison import Comparison
    from benchmarks.report.live import LivePage

PORT = 6420


@command(interrupted="the same command goes on from the last checkpoints")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 if a run failed, 2 on bad input, 130 when interrupted."""
    given = _parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return compare(given)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from",
        dest="stored",
        nargs="+",
        action=ReadPath,
        metavar="RUNS",
        help="compare what is there: runs, over or not, folders of them, JSON files of outcomes (CONTRIBUTING.md)",
    )
    parser.add_argument("--preset", help="smoke (the default), wallclock, samplers, paper, ... or a TOML file")
    parser.add_argument("--agents", nargs="+", metavar="ID", help="agent ids or quoted patterns of them")
    parser.add_argument("--seeds", help="how many (5), or which (0,3,7; one seed alone as '3,')")
    parser.add_argument("--policy", nargs="+", help="tiny (built in), Hugging Face folders or hub ids")
    parser.add_argument("--env", nargs="+", help="registered environment ids")
    parser.add_argument("--iterations", type=int, help="budget of a run (default: the preset's)")
    parser.add_argument("--tokens", type=int, help="instead, or as well: budget of rollout tokens a run")
    parser.add_argument("--seconds", type=float, help="instead, or as well: budget of training seconds a run")
    parser.add_argument("--recipe", default="", help="published settings, by a name in presets/recipes.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter of all runs"
    )
    parser.add_argument(
        "--control", action="append", default=[], help="a control arm: random-reward, uncorrected or fewer"
    )
    parser.add_argument("--start", metavar="ID", help="an agent whose trained model all runs start from, such as sft")
    parser.add_argument(
        "--start-set", action="append", default=[], metavar="NAME=VALUE", help="a setting of what all runs start from"
    )
    parser.add_argument("--baseline", help="the agent that the others are compared with (default: reft)")
    parser.add_argument(
        "--margin", type=float, metavar="POINTS", help="differences within it are equivalent (default: the preset's, 2)"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time (default: cores // threads; on GPUs at most one a card)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of a run (default: the preset's, else all cores)")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="where runs go (default: local)")
    parser.add_argument(
        "--runs", action=WriteFolder, default=Path("runs"), help="where run folders are made (default: runs)"
    )
    parser.add_argument("--out", action=WriteFolder, help="folder of the report (default: RUNS/compare-<hash>)")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs, their cost and resolution, by finished runs"
    )
    parser.add_argument(
        "--log", action="append", default=[], choices=TRACKERS, help="a tracker that gets the rows as they are written"
    )
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=PORT,
        metavar="PORT",
        help=f"the report so far on a page of this machine, while it runs (default port: {PORT})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")
    return parser


def compare(given: argparse.Namespace) -> int:
    """Run what the arguments ask for and write the report."""
    from agents.monitoring.trackers import check_trackers

    if given.stored:
        return _compare_stored(given)
    check_trackers(given.log)
    if given.serve is None or given.dry_run:
        return _compare(given, None)
    from benchmarks.report.live import LivePage

    with LivePage(given.serve) as live:
        print(f"live page: {live.url}", file=sys.stderr, flush=True)
        return _compare(given, live)


def _compare(given: argparse.Namespace, live: LivePage | None) -> int:
    """A comparison of runs that may have to be done."""
    from benchmarks.comparison.arms import arms, start_arms
    from benchmarks.comparison.rehearse import rehearse

    grid = grid_of(given)
    planned = [*arms(grid), *start_arms(grid).values()]  # what is wrong with them is told before a start is trained
    rehearse(planned, here=given.launcher == "local", hub=not given.dry_run)
    jobs, threads = resources(given, grid, {spec.device for arm in planned for spec in arm.specs})
    compared = arms(grid, start_models(grid, jobs, threads, given))
    for text in () if given.quiet else sorted({text for arm in compared for text in arm.missed}):
        without = ", ".join(arm.label for arm in compared if text in arm.missed)
        print(f"note: {text} does not apply to {without}", file=sys.stderr)
    if not given.quiet and len(compared) > 1 and all(arm.specs[0].agent["id"] != grid.baseline for arm in compared):
        print(
            f"note: the baseline {grid.baseline!r} is not compared, so the report has no differences: name one with "
            "--baseline",
            file=sys.stderr,
        )
    if given.dry_run:
        from benchmarks.comparison.plan import print_plan

        print_plan([*start_arms(grid).values(), *compared], given.runs, jobs, threads)
        return 0
    out = given.out or given.runs / f"compare-{comparison_hash(compared)}"

    def show(runs: list[Watched]) -> None:
        if live is not None:
            labels = {spec.hash: arm.label for arm in compared for spec in arm.specs}
            live.follow(runs, labels, jobs, lambda: _comparison(grid, compared, runs, given, over=False), out)

    runs = launch(compared, jobs, threads, given, show)
    return _report(_comparison(grid, compared, runs, given, over=True), out, given.quiet)


def _compare_stored(given: argparse.Namespace) -> int:
    """The report of what is there already."""
    from benchmarks.comparison.differences import MARGIN
    from benchmarks.comparison.stored import read
    from benchmarks.measuring.provenance import command_line
    from benchmarks.report.comparison import Comparison

    for name in ("agents", "policy", "env", *BUDGETS, "recipe", "set", "control", "dry_run", "log"):
        if getattr(given, name):
            raise UsageError(f"--from takes runs as they are: leave out --{name.replace('_', '-')}")
    if given.serve is not None:
        raise UsageError("--serve shows the runs that a command starts, and --from starts none: leave it out")
    margin = MARGIN if given.margin is None else given.margin / 100
    if not 0 < margin < 1:
        raise UsageError(f"--margin {given.margin} must be above 0 and below 100 points of accuracy")
    chosen = read(given.stored).of(None if given.seeds is None else _seeds(given.seeds))
    comparison = Comparison.of_stored(chosen, "Comparison", given.baseline, margin, command_line())
    _tell(comparison, given.out or Path("comparison"), given.quiet)
    return 0


def start_models(grid: Grid, jobs: int, threads: int, given: argparse.Namespace) -> dict[tuple[str, str], str]:
    """The folder of the model that the arms of each (policy, environment) start from; what is not there is trained,
    but for a dry run.

    Raises:
        UsageError: such a run failed.
    """
    from benchmarks.comparison.arms import start_arms

    starts = start_arms(grid)
    if starts and not given.dry_run:
        for run in launch(list(starts.values()), jobs, threads, given):
            if run.phase == "failed":
                raise UsageError(f"what all arms start from failed: {run.error}{_see(run.folder)}")
    folders = {place: given.runs / arm.specs[0].hash / "model" for place, arm in starts.items()}
    return {place: str(folder) for place, folder in folders.items() if folder.is_dir()}


def grid_of(given: argparse.Namespace) -> Grid:
    """The preset with the command line's changes."""
    from benchmarks.comparison.arms import without_missed
    from benchmarks.comparison.grid import agent_ids, preset, recipe, without_replaced
    from benchmarks.experiment.resolve import by_plain_names

    grid, published = preset("smoke" if given.preset is None else given.preset), recipe(given.recipe)
    own: dict[str, Any] = {name: value for name in BUDGETS if (value := getattr(given, name)) is not None}
    own |= by_plain_names(dict(assignment(text) for text in given.set))
    of_preset = without_replaced(grid.set, {**published, **own})
    if given.agents is not None:
        of_preset = without_missed(of_preset, given.agents)
    settings: dict[str, Any] = {**of_preset, **published}
    if set(BUDGETS) & set(own):  # whoever gives a budget means that one, not the preset's
        settings = {name: value for name, value in settings.items() if name not in BUDGETS}
    settings |= own
    changes: dict[str, Any] = {"set": settings, "controls": (*grid.controls, *given.control)}
    for name, value in (("agents", given.agents), ("policies", given.policy), ("envs", given.env)):
        if value is not None:
            changes[name] = tuple(value)
    # So it is with whatever else a preset's variants set; their names told of it.
    kept = [
        replace(one, set={name: value for name, value in one.set.items() if name not in own}) for one in grid.variants
    ]
    changes["variants"] = tuple(one if one.set else replace(one, name="") for one in kept)
    if given.agents is not None:
        changes["title"] = "Comparison"
        if given.preset is None:  # whoever names a preset wants its arms of these agents; else the agents as they are
            changes["variants"] = ()
    if given.seeds is not None:
        changes["seeds"] = _seeds(given.seeds)
    changes["start"] = _start(grid.start, given)
    if given.baseline is not None:
        changes["baseline"] = given.baseline
    if given.margin is not None:
        changes["margin"] = given.margin
    grid = replace(grid, **changes)
    if given.baseline is not None and given.baseline not in (compared := agent_ids(grid.agents)):
        raise UsageError(f"--baseline {given.baseline!r} is not compared: {did_you_mean(given.baseline, compared)}")
    return grid


def _start(preset: Start | None, given: argparse.Namespace) -> Start | None:
    """The preset's, or the command line's in its place, with the command line's settings."""
    from benchmarks.comparison.grid import Start

    start = preset if given.start is None else Start(given.start)
    own = dict(assignment(text, "--start-set") for text in given.start_set)
    if own and start is None:
        raise UsageError(f"--start-set {given.start_set[0]} is of nothing: say what all runs start from (--start sft)")
    return replace(start, set={**start.set, **own}) if start is not None else None


def _seeds(text: str) -> tuple[int, ...]:
    try:
        if "," in text:
            return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
        count = int(text)
    except ValueError:
        raise UsageError(f"--seeds {text!r} is neither a number of seeds (5) nor a list of them (0,3,7)") from None
    if count < 1:
        raise UsageError(f"--seeds {count} must be at least 1")
    return tuple(range(count))


def resources(given: argparse.Namespace, grid: Grid, devices: Collection[str] = ()) -> tuple[int, int]:
    """Runs at a time on ``devices``, and threads of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = given.threads if given.threads is not None else grid.threads
    jobs, most = given.jobs, cores
    on_cards = {device for device in devices if device.startswith("cuda")} if given.launcher == "local" else set()
    if on_cards and jobs is None:  # several runs would take turns on a card, and share its memory
        from benchmarks.comparison.launch import cards

        most = max(1, len(cards()) if "cuda" in on_cards else len(on_cards))
        threads = threads if threads is not None else max(1, cores // most)
    threads = threads if threads is not None else cores
    jobs = jobs if jobs is not None else min(most, max(1, cores // max(1, threads)))
    for name, value in (("threads", threads), ("jobs", jobs)):
        if value < 1:
            raise UsageError(f"--{name} {value} must be at least 1")
    return jobs, threads


def launch(
    compared: list[Arm],
    jobs: int,
    threads: int,
    given: argparse.Namespace,
    show: Callable[[list[Watched]], None] = lambda runs: None,
) -> list[Watched]:
    """Run what has no result yet; returns every run's last state. ``show`` is told of the runs, whose states change."""
    from benchmarks.comparison.board import Board
    from benchmarks.comparison.launch import Launcher, cards, local_process
    from benchmarks.experiment.training import log_finished

    # Seed by seed, so that early on every arm has something to show.
    order = [spec for specs in zip(*(arm.specs for arm in compared), strict=True) for spec in specs]
    labels = {spec.hash: arm.label for arm in compared for spec in arm.specs}
    start: Any = local_process
    if given.launcher == "ray":
        from benchmarks.comparison.on_ray import connect, ray_task

        connect()
        start = ray_task
        jobs = given.jobs or len(order)  # Ray queues what the cluster has no processors for
    own = cards() if given.launcher == "local" and any(spec.device == "cuda" for spec in order) else ()
    launcher = Launcher(order, given.runs.absolute(), jobs, threads, partial(start, trackers=given.log), own)
    for run in launcher.watched:
        if run.reused:
            log_finished(run.spec, run.folder, given.log)
    show(launcher.watched)
    with Board(labels, jobs, given.quiet) as board:
        for state in launcher:
            board.show(state)
        board.show(launcher.watched)
    return launcher.watched


def _comparison(
    grid: Grid, compared: list[Arm], runs: list[Watched], given: argparse.Namespace, over: bool
) -> Comparison:
    """What the runs say; until they are ``over``, those that have been evaluated."""
    from benchmarks.comparison.outcomes import Outcome
    from benchmarks.measuring.provenance import command_line
    from benchmarks.report.comparison import Comparison

    failed = {run.spec.hash: run.error for run in runs if run.phase == "failed"}
    look = Outcome.read if over else Outcome.so_far
    return Comparison.read(grid, compared, given.runs, failed, command_line(), look=look)


def _report(comparison: Comparison, out: Path, quiet: bool) -> int:
    if comparison.groups:
        _tell(comparison, out, quiet)
    for run in comparison.failures:
        print(f"failed: {run.label} seed {run.seed}: {run.error}{_see(run.folder)}", file=sys.stderr)
    return 1 if comparison.failures else 0


def _see(folder: Path | str) -> str:
    """Where to read on about a failed run; nothing of one that was refused at its start, whose error says all."""
    return f"; see {folder}" if Path(folder).is_dir() else ""


def _tell(comparison: Comparison, out: Path, quiet: bool) -> None:
    """Write the report, and print its tables and sentences."""
    from benchmarks.report.files import write
    from benchmarks.report.tables import print_comparison

    write(comparison, out)
    if not quiet:
        print_comparison(comparison)
        print(f"\nreport: {out / 'report.html'}")


def comparison_hash(compared: list[Arm]) -> str:
    """8 hex digits of what is compared."""
    text = "\n".join(f"{arm.label} {spec.hash}" for arm in compared for spec in arm.specs)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(main())
