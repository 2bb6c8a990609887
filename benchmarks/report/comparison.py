"""A comparison's numbers, from the folders of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison.differences import NoPair, Pair, against, among_all
from benchmarks.comparison.grid import Arm, Grid, fewer_completions
from benchmarks.comparison.outcomes import ArmLine, ArmOutcome, Outcome, describe
from registry import UsageError


@dataclass(frozen=True)
class Failure:
    """A run without a usable result."""

    label: str
    seed: int
    folder: str
    error: str


@dataclass(frozen=True)
class Group:
    """The arms that may be compared with each other: the same policy on the same environment.

    Attributes:
        name: the policy and the environment.
        arms: with at least one finished run, the baseline first.
        lines: ``describe`` of each arm.
        pairs: ``against`` the baseline, of each arm but the baseline; empty without a finished baseline.
        rivals: ``against`` the full model with fewer completions, of each nested arm that has such a control.
        margin: of accuracy, 0 to 1, within which two arms are equivalent.
        target: the accuracy that times to target are taken to.
        baseline: its label; None where it has no finished run.
    """

    name: str
    arms: tuple[ArmOutcome, ...]
    lines: tuple[ArmLine, ...]
    pairs: tuple[Pair | NoPair, ...]
    rivals: tuple[Pair | NoPair, ...]
    margin: float
    target: float
    baseline: str | None

    @property
    def weighing_arms(self) -> list[ArmOutcome]:
        """Those that skip layers, and measured what their correction's weights were."""
        return [arm for arm in self.arms if arm.mean("skip_ratio") and any(run.weighed for run in arm.runs)]


@dataclass(frozen=True)
class Comparison:
    """Everything a report says."""

    grid: Grid
    groups: tuple[Group, ...]
    failures: tuple[Failure, ...]
    command: str

    @staticmethod
    def read(grid: Grid, arms: list[Arm], runs: Path, failed: Mapping[str, str], command: str) -> Comparison:
        """Read the arms' runs back; ``failed`` says of some hashes why they have no result."""
        failures: list[Failure] = []
        by_group: dict[tuple[str, str], list[tuple[Arm, ArmOutcome]]] = {}
        for arm in arms:
            done: list[Outcome] = []
            for spec in arm.specs:
                folder = runs / spec.hash
                try:
                    if spec.hash in failed:
                        raise UsageError(failed[spec.hash])
                    done.append(Outcome.read(folder))
                except UsageError as error:
                    failures.append(Failure(arm.label, spec.seed, str(folder), str(error)))
            if done:
                spec = arm.specs[0]
                by_group.setdefault((spec.policy, spec.env["id"]), []).append((arm, ArmOutcome(arm.label, tuple(done))))
        groups = tuple(_group(members[0][0].group, grid, members) for members in by_group.values())
        return Comparison(grid, groups, tuple(failures), command)


def _group(name: str, grid: Grid, members: list[tuple[Arm, ArmOutcome]]) -> Group:
    outcomes = tuple(outcome for _, outcome in members)
    base = next((o for arm, o in members if arm.specs[0].agent["id"] == grid.baseline and arm.control is None), None)
    reference = base or outcomes[0]
    # Halfway of the baseline's gain: an accuracy that most arms pass, between evaluations.
    target = (reference.ends(0).mean() + reference.ends(-1).mean()) / 2
    margin = grid.margin / 100
    return Group(
        name=name,
        arms=outcomes,
        lines=tuple(describe(outcome, float(target)) for outcome in outcomes),
        pairs=among_all([against(o, base, margin) for o in outcomes if o is not base]) if base else (),
        rivals=among_all(_rivals(members, margin)),
        margin=margin,
        target=float(target),
        baseline=base.label if base else None,
    )


def _rivals(members: list[tuple[Arm, ArmOutcome]], margin: float) -> list[Pair | NoPair]:
    """Each arm that skips layers against the control ``fewer`` of its own skip ratio."""
    full = {arm.specs[0].agent["group_size"]: outcome for arm, outcome in members if arm.control == "fewer"}
    nested = [(outcome, fewer_completions(arm.specs[0].agent)) for arm, outcome in members if arm.skips]
    return [against(outcome, full[size], margin) for outcome, size in nested if size in full]
