"""The report's sentences; each follows from an interval, and says no more than it."""

from __future__ import annotations

import numpy as np

from benchmarks.comparison.outcomes import AXES, AXIS_WORDS, ArmLine, ArmOutcome, Pair
from benchmarks.experiment.summary import silence
from benchmarks.measuring.statistics import Interval
from benchmarks.report.comparison import Comparison, Group

FEW_SEEDS = 3
COLLAPSED_ESS = 0.1
BUSY_SHARE = 0.8  # of one processor, in processor seconds a second


def percent(value: float) -> str:
    """Such as ``41.2 %``."""
    return f"{100 * value:.1f} %"


def points(value: Interval, unit: str = " points") -> str:
    """A difference of accuracies in percentage points with its interval, such as ``+3.1 points [-0.4, +6.2]``."""
    return f"{100 * value.value:+.1f}{unit} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def interval(value: Interval) -> str:
    """An accuracy with its interval in percent, such as ``41.2 [37.0, 45.5]``."""
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def ratio(value: Interval) -> str:
    """A ratio of times with its interval, such as ``0.92 [0.85, 1.04]``; ``never`` where it is infinite, a dash
    where it is not defined."""
    if np.isnan(value.value):
        return "-"
    middle, low, high = ("-" if np.isnan(part) else "never" if np.isinf(part) else f"{part:.2f}" for part in value)
    return f"{middle} [{low}, {high}]"


def number(value: float | None) -> str:
    """Two significant digits, or a dash for what was not measured."""
    if value is None:
        return "-"
    return "0" if abs(value) < 1e-4 else f"{value:.2g}"


def summary(comparison: Comparison) -> list[str]:
    """The findings as sentences, group by group."""
    said = []
    for group in comparison.groups:
        said += _group(group)
    seeds = {seed for group in comparison.groups for arm in group.arms for seed in arm.seeds}
    if len(seeds) == 1:
        said.append("There is one seed: the intervals know of the questions alone, not of how runs differ.")
    elif len(seeds) <= FEW_SEEDS:
        said.append(
            f"{len(seeds)} seeds say little of how runs differ: take the intervals as rough, and add seeds "
            "before you rest a claim on them."
        )
    said += _busy_caution(comparison) + _version_caution(comparison)
    for failure in comparison.failures:
        said.append(f"The run of {failure.label} with seed {failure.seed} failed ({failure.error}) and is left out.")
    return said


def _busy_caution(comparison: Comparison) -> list[str]:
    """A caution where runs had less than a processor, so that times measure the machine's other work too."""
    runs = [run.result for group in comparison.groups for arm in group.arms for run in arm.runs]
    shares = [run["cpu_seconds"] / (run["seconds"] + run["seconds_evaluation"]) for run in runs if run["seconds"]]
    if not shares or min(shares) >= BUSY_SHARE:
        return []
    return [
        f"The machine was busy: runs had {percent(min(shares))} to {percent(max(shares))} of a processor, so speeds "
        "and wall-clock comparisons are unreliable here."
    ]


def _version_caution(comparison: Comparison) -> list[str]:
    """A caution where runs of several versions of the code were put together."""
    commits = {
        str(run.provenance.get("commit")) for group in comparison.groups for arm in group.arms for run in arm.runs
    }
    if len(commits) < 2:
        return []
    return [
        f"The runs are of {len(commits)} versions of the code ({', '.join(sorted(commits))}): differences may be the "
        "code's. Use another --runs folder to do them all again."
    ]


def _group(group: Group) -> list[str]:
    said = [_gain(line) for line in group.lines]
    said += [_difference(pair) for pair in (*group.pairs, *group.rivals) if isinstance(pair, Pair)]
    for line in group.lines:
        if line.ess is not None and line.ess < COLLAPSED_ESS and line.skip_ratio:
            said.append(
                f"{line.label}: the effective sample size of whole completions is {percent(line.ess)} "
                f"(D = {line.D:.2f} nats a completion): reweighting cannot repair that much divergence."
            )
    return said + [_silence(arm) for arm in group.arms if any(silence(run.training) for run in arm.runs)]


def _silence(arm: ArmOutcome) -> str:
    """A caution of an arm that for some time had nothing to learn from."""
    whys = [(seed, why) for seed, run in zip(arm.seeds, arm.runs, strict=True) if (why := silence(run.training))]
    seed, why = whys[0]
    return f"{arm.label} had nothing to learn from in {len(whys)} of {len(arm.runs)} runs (seed {seed}: {why})."


def _gain(line: ArmLine) -> str:
    """What one arm learned."""
    gain = line.gain
    if not gain.excludes_zero:
        return f"{line.label} did not measurably change: {points(gain)} held-out accuracy."
    verb = "gained" if gain.low > 0 else "lost"
    return f"{line.label} {verb} {points(gain)}, to {percent(line.after.value)} held-out accuracy."


def _difference(pair: Pair) -> str:
    """One arm against the baseline, on every budget."""
    by_finding: dict[str, list[str]] = {}
    for axis in AXES:
        difference = pair.at_equal(axis).difference
        if difference.low > 0:
            finding = f"better than {pair.baseline}"
        elif difference.high < 0:
            finding = f"worse than {pair.baseline}"
        else:
            finding = f"not distinguishable from {pair.baseline}"
        by_finding.setdefault(finding, []).append(f"at {AXIS_WORDS[axis]} ({points(difference, '')})")
    parts = [f"{finding} {' and '.join(where)}" for finding, where in by_finding.items()]
    said = f"{pair.label} is {'; '.join(parts)}."
    if pair.speed_up_rollout is not None:
        said += f" It wrote {pair.speed_up_rollout:.2f} times as many rollout tokens a second."
    return said
