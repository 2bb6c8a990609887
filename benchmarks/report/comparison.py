"""A comparison's numbers, from the folders of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison.arms import Arm, fewer_completions
from benchmarks.comparison.differences import NoPair, Pair, against, among_all
from benchmarks.comparison.grid import Grid
from benchmarks.comparison.outcomes import AXES, ArmLine, ArmOutcome, Outcome, describe, shared_axes
from benchmarks.comparison.stored import Stored
from registry import UsageError, did_you_mean


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
        target: the accuracy that times to target are taken to; None where the baseline gained nothing.
        baseline: its label; None where it has no finished run.
    """

    name: str
    arms: tuple[ArmOutcome, ...]
    lines: tuple[ArmLine, ...]
    pairs: tuple[Pair | NoPair, ...]
    rivals: tuple[Pair | NoPair, ...]
    margin: float
    target: float | None
    baseline: str | None

    @property
    def axes(self) -> tuple[str, ...]:
        """On which the arms can be compared."""
        return shared_axes(self.arms)

    @property
    def weighing_arms(self) -> list[ArmOutcome]:
        """Those that skip layers, and measured what their correction's weights were."""
        return [arm for arm in self.arms if arm.mean("skip_ratio") and any(run.weighed for run in arm.runs)]


@dataclass(frozen=True)
class Comparison:
    """Everything a report says.

    Attributes:
        title, source: of the grid.
        groups: with a finished run.
        failures: runs without a usable result.
        command: repeats it.
    """

    title: str
    source: str
    groups: tuple[Group, ...]
    failures: tuple[Failure, ...]
    command: str

    @staticmethod
    def read(
        grid: Grid,
        arms: list[Arm],
        runs: Path,
        failed: Mapping[str, str],
        command: str,
        *,
        look: Callable[[Path], Outcome | None] = Outcome.read,
    ) -> Comparison:
        """Read the arms' runs back; ``failed`` says of some hashes why they have no result. ``look`` reads a run's
        folder; a run of which it says nothing is left out."""
        failures: list[Failure] = []
        by_group: dict[tuple[str, str], list[tuple[Arm, ArmOutcome]]] = {}
        for arm in arms:
            done: list[Outcome] = []
            for spec in arm.specs:
                folder = runs / spec.hash
                try:
                    if spec.hash in failed:
                        raise UsageError(failed[spec.hash])
                    outcome = look(folder)
                    done += [outcome] if outcome is not None else []
                except UsageError as error:
                    failures.append(Failure(arm.label, spec.seed, str(folder), str(error)))
            if done:
                spec = arm.specs[0]
                by_group.setdefault((spec.policy, spec.env["id"]), []).append((arm, ArmOutcome(arm.label, tuple(done))))
        groups = tuple(_group(members[0][0].group, grid, members) for members in by_group.values())
        return Comparison(grid.title, grid.source, groups, tuple(failures), command)

    @staticmethod
    def of_stored(stored: Stored, title: str, baseline: str | None, margin: float, command: str) -> Comparison:
        """What finished runs and files of outcomes say. Raises UsageError where the baseline is none of their arms."""
        labels = {arm.label: arm for arm in stored.arms}
        chosen = _full_label(baseline or stored.baseline or "reft", list(labels))
        rivals = [(labels[one], labels[other]) for one, other in stored.rivals]
        arms = [labels[chosen], *(arm for arm in stored.arms if arm.label != chosen)]
        group = group_of(stored.task, arms, labels[chosen], rivals, margin)
        return Comparison(title, "", (group,), (), command)


def _full_label(given: str, labels: list[str]) -> str:
    """The one label that is ``given``, or begins with it and goes on with settings, of which a random reward makes no
    baseline.

    Raises:
        UsageError: there is none, or there are several.
    """
    if given in labels:
        return given
    begun = [label for label in labels if label.startswith(f"{given} ")]
    rewarded = [label for label in begun if "env.reward=random" not in label.split()]
    if len(rewarded) == 1:
        return rewarded[0]
    if begun:
        raise UsageError(f"--baseline {given!r} is one of {', '.join(map(repr, begun))}: give that label whole")
    raise UsageError(f"--baseline {given!r} is not compared: {did_you_mean(given, labels)}")


def _group(name: str, grid: Grid, members: list[tuple[Arm, ArmOutcome]]) -> Group:
    base = next((o for arm, o in members if arm.specs[0].agent["id"] == grid.baseline and arm.control is None), None)
    return group_of(name, [outcome for _, outcome in members], base, _rivals(members), grid.margin / 100)


def _rivals(members: list[tuple[Arm, ArmOutcome]]) -> list[tuple[ArmOutcome, ArmOutcome]]:
    """Each arm that skips layers, and the control ``fewer`` of its own skip ratio."""
    full = {arm.specs[0].agent["group_size"]: outcome for arm, outcome in members if arm.control == "fewer"}
    nested = [(outcome, fewer_completions(arm.specs[0].agent)) for arm, outcome in members if arm.skips]
    return [(outcome, full[size]) for outcome, size in nested if size in full]


def group_of(
    name: str,
    arms: Sequence[ArmOutcome],
    baseline: ArmOutcome | None,
    rivals: Sequence[tuple[ArmOutcome, ArmOutcome]],
    margin: float,
) -> Group:
    """What a comparison says of some arms and of each against the baseline; ``rivals`` are compared beside that."""
    reference = baseline or arms[0]
    # Halfway of the baseline's gain: an accuracy that most arms pass, between evaluations.
    first, last = (float(reference.ends(which).mean()) for which in (0, -1))
    target = (first + last) / 2 if last > first else None
    told = [axis for axis in AXES if axis != "target_tokens" or axis in shared_axes(arms)]
    return Group(
        name=name,
        arms=tuple(arms),
        lines=tuple(describe(arm, target) for arm in arms),
        pairs=among_all(
            [against(arm, baseline, margin, told) for arm in arms if arm is not baseline] if baseline else []
        ),
        rivals=among_all([against(arm, rival, margin, told) for arm, rival in rivals]),
        margin=margin,
        target=target,
        baseline=baseline.label if baseline else None,
    )
