"""Command line of the exact estimator lab: ``python -m benchmarks.estimators``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.estimators.settings import Grouping, Sweep
from registry import UsageError, advantages, corrections, did_you_mean, parse_value
from registry.command import assignment, command
from registry.paths import ReadFolder, WriteFile, WritePicture

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Enumerate a token MDP and give, for every registered off-policy correction, the exact bias, variance, direction and
ascent efficiency of its gradient estimate: for a noised target and for a transformer whose layers are skipped.
"""
EPILOG = """\
examples:
  python -m benchmarks.estimators                                       the default sweep, under two minutes
  python -m benchmarks.estimators --correction '*-is' --set cap=4       some of them, with another bound
  python -m benchmarks.estimators --correction 'truncated-is*ppo-clip'  a product
  python -m benchmarks.estimators --advantage grpo --groups 8           exact groups, normalised as in GRPO
  python -m benchmarks.estimators --check my_package:MyCorrection       is my correction sound?
  python -m benchmarks.estimators --run runs/1f3a                       which correction fits what my run measured?
  python -m benchmarks.estimators --against runs/*                      did training agree with the lab?
  python -m benchmarks.estimators --families                            which ratio, and what is done to it?
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.estimators",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Sweep()
    options.add_argument(
        "--correction", action="append", metavar="PATTERN", help="ids to compare (repeatable; default *)"
    )
    options.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the corrections")
    options.add_argument("--advantage", default=default.advantage, help=f"default {default.advantage}")
    options.add_argument("--groups", type=int, default=default.groups.size, metavar="G", help="completions per problem")
    options.add_argument(
        "--by-target",
        type=int,
        default=default.groups.by_target,
        metavar="N0",
        help="of them by the target (defensive)",
    )
    options.add_argument("--batch", type=int, default=default.batch, metavar="N", help="completions per update")
    options.add_argument(
        "--d", type=float, nargs="+", default=default.divergences, help="divergences of the noised target"
    )
    options.add_argument(
        "--horizon", type=int, nargs="+", default=default.horizons, help="tokens, of the noised target"
    )
    options.add_argument(
        "--success", type=float, nargs="+", default=default.successes, help="success rates of the target"
    )
    options.add_argument(
        "--skip", type=int, nargs="*", default=default.skips, help="layers of the transformer's 12 to skip"
    )
    options.add_argument(
        "--seeds", type=int, default=default.seeds, help=f"random problems per cell, default {default.seeds}"
    )
    options.add_argument("--json", action=WriteFile, metavar="FILE", help="write the rows, one per cell and correction")
    options.add_argument("--markdown", action=WriteFile, metavar="FILE", help="write the tables")
    options.add_argument(
        "--picture", action=WritePicture, metavar="FILE", help="write efficiency against D (png, svg, pdf)"
    )
    options.add_argument("--check", metavar="MODULE:CLASS", help="run the contract checks on a correction of your own")
    options.add_argument("--run", action=ReadFolder, metavar="FOLDER", help="advise on a run's folder")
    options.add_argument(
        "--against",
        action=ReadFolder,
        nargs="+",
        metavar="FOLDER",
        help="finished runs: what the lab predicted beside what came",
    )
    options.add_argument("--families", action="store_true", help="print the corrections by ratio, as Markdown")
    return options


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if ``--check`` found a fault, 2 on bad input."""
    given = parser().parse_args(arguments)
    import torch

    import agents  # noqa: F401  registers the components
    from benchmarks.estimators import adviser, against, report
    from benchmarks.estimators.families import families
    from benchmarks.estimators.sweep import rows
    from benchmarks.measuring.table import console as output

    if given.families:
        print(families().markdown())
        return 0
    console = output()
    torch.set_num_threads(1)  # the tensors are small
    if given.check is not None:
        return check(given.check, console)
    chosen = choose(given.correction or ["*"], dict(assignment(text) for text in given.set))
    line = "python -m benchmarks.estimators " + shlex.join(arguments if arguments is not None else sys.argv[1:])
    if given.run:
        write(adviser.advise(given.run, chosen, console), given, line)
    elif given.against:
        write(against.compare(given.against, sweep_of(given), console), given, line)
    else:
        lab = list(rows(sweep_of(given), chosen))
        write(lab, given, line)
        report.show(lab, console)
    return 0


def sweep_of(given: argparse.Namespace) -> Sweep:
    """The sweep that the arguments describe."""
    advantages.check(given.advantage)
    for name, values in (("--d", given.d), ("--success", given.success), ("--seeds", [given.seeds])):
        if not all(0 < value < math.inf for value in values):
            raise UsageError(f"{name} must be above 0, and a number")
    if any(value >= 1 for value in given.success):
        raise UsageError("--success must be below 1")
    if not given.d and not given.skip:
        raise UsageError("nothing to enumerate: give --d or --skip")
    if any(not 1 <= horizon <= 7 for horizon in given.horizon):
        raise UsageError("--horizon must lie in 1 to 7: the completions are enumerated, 4 ** T of them")
    groups = Grouping(given.groups, given.by_target)
    if given.batch < groups.size:
        raise UsageError(f"--batch {given.batch} must hold at least one group of {groups.size}")
    return Sweep(
        divergences=tuple(given.d),
        horizons=tuple(given.horizon),
        successes=tuple(given.success),
        skips=tuple(given.skip),
        seeds=given.seeds,
        advantage=given.advantage,
        groups=groups,
        batch=given.batch,
    )


def choose(patterns: Sequence[str], settings: Mapping[str, str]) -> dict[str, Any]:
    """The corrections by id: a pattern is a (product) id or a shell pattern over the registered ones. A setting goes
    to every chosen correction that has the field."""
    ids: list[str] = []
    for pattern in patterns:
        exact = "*" in pattern and all(factor and factor in corrections for factor in pattern.split("*"))
        matching = [pattern] if exact else corrections.ids(pattern)
        if not matching and set(pattern) & set("*?["):
            raise UsageError(f"--correction {pattern!r} matches none: {did_you_mean(pattern, corrections.ids())}")
        if not matching:
            corrections.check(pattern)  # raises with the nearest known id
        ids += [id for id in matching if id not in ids]
    values = {name.removeprefix("correction."): text for name, text in settings.items()}
    known = {id: corrections.fields(id) for id in ids}
    for name in values:
        if not any(name in fields for fields in known.values()):
            raise UsageError(f"--set {name}: none of {', '.join(ids)} has this field")
    return {
        id: corrections.make(
            id,
            **{
                name: parse_value(text, known[id][name].type, name)
                for name, text in values.items()
                if name in known[id]
            },
        )
        for id in ids
    }


def write(lab: list[dict[str, Any]], given: argparse.Namespace, line: str) -> None:
    """The files asked for."""
    from benchmarks.estimators import picture, report
    from benchmarks.measuring.durable import json_text

    if given.json:
        rounded = [{name: _rounded(value) for name, value in row.items()} for row in lab]
        given.json.write_text("[\n" + ",\n".join(json_text(row) for row in rounded) + "\n]\n")
    sweeping = not (given.run or given.against)
    if (given.markdown or given.picture) and not sweeping:
        raise UsageError("--markdown and --picture are of a sweep; leave out --run and --against")
    if given.markdown:
        given.markdown.write_text(report.markdown(lab, line))
    if given.picture:
        picture.draw(lab, given.picture)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load(target: str) -> Any:
    """The correction that ``package.module:Class`` or ``path/to/file.py:Class`` names, with its defaults."""
    module_name, colon, class_name = target.rpartition(":")
    if not colon:
        raise UsageError(f"--check {target!r}: write MODULE:CLASS, such as my_package:MyCorrection")
    sys.path.insert(0, os.getcwd())
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).is_file():
            raise UsageError(f"--check: there is no file {module_name!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--check: cannot import {module_name!r} ({error}); run it where Python finds it"
            ) from None
    if not hasattr(module, class_name):
        raise UsageError(f"--check: {module_name} has no {class_name!r}")
    try:
        return getattr(module, class_name)()
    except TypeError as error:
        raise UsageError(f"--check: {class_name}() cannot be made with its defaults: {error}") from None


def check(target: str, console: Console) -> int:
    """Print the contract checks of one correction and where it stands in the lab."""
    from agents.corrections import traits
    from benchmarks.estimators import contract, report
    from benchmarks.estimators.sweep import rows
    from benchmarks.measuring.table import Table

    correction = load(target)
    faults = contract.check(correction)
    console.print(f"{target} declares {traits(correction)}", soft_wrap=True)
    results = [[name, fault or "ok"] for name, fault in faults.items()]
    console.print(Table(["check", "result"], results, left=(0, 1)))
    if any(faults.values()):
        return 1
    if not hasattr(correction, "scope"):
        console.print(
            "It declares no scope, so the update calls it on whole minibatches; declare scope if it may be less."
        )
    compared = {id: corrections.make(id) for id in ("none", "token-is", "truncated-is", "sequence-is")}
    sweep = Sweep(divergences=(0.1, 0.3, 1.0), successes=(0.3,), skips=())
    report.show(list(rows(sweep, {target: correction, **compared})), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
