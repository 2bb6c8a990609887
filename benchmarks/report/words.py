"""The report's sentences; each follows from an interval, and says no more than it."""

from __future__ import annotations

from math import isnan
from pathlib import Path

from benchmarks.comparison.differences import Difference, Pair
from benchmarks.comparison.outcomes import AXIS_WORDS, ArmLine, ArmOutcome
from benchmarks.experiment.summary import read_result, silence
from benchmarks.experiment.training import RESULT
from benchmarks.measuring.statistics import Interval, TimeRatio
from benchmarks.report.comparison import Comparison, Group

FEW_SEEDS = 3
COLLAPSED_ESS = 0.1
BUSY_SHARE = 0.8  # of one processor, in processor seconds a second


def percent(value: float) -> str:
    """Such as ``41.2 %``."""
    return f"{100 * value:.1f} %"


def points(value: Interval, unit: str = " points") -> str:
    """A difference of accuracies in percentage points with its interval, such as ``+3.1 points [-0.4, +6.2]``."""
    bounds = "" if isnan(value.low) else f" [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    return f"{100 * value.value:+.1f}{unit}{bounds}"


def interval(value: Interval) -> str:
    """An accuracy with its interval in percent, such as ``41.2 [37.0, 45.5]``."""
    bounds = "" if isnan(value.low) else f" [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{100 * value.value:.1f}{bounds}"


def times(value: TimeRatio, baseline: str) -> str:
    """A ratio of times with its interval, such as ``0.92 [0.85, 1.04]``, or who stays behind; a dash where nobody
    gains."""
    without = {
        "ours behind": "stays behind",
        "theirs behind": f"{baseline} stays behind",
        "no gain": "-",
        "no times": "-",
    }
    if value.missing in without:
        return without[value.missing]
    middle, low, high = value.ratio
    return f"{middle:.2f}" if isnan(low) else f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def p_value(p: float) -> str:
    """Such as ``.031`` or ``< .001``."""
    if isnan(p):
        return "-"
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


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
    said += _not_over(comparison) + _few_seeds(comparison)
    said += _busy_caution(comparison) + _version_caution(comparison)
    for failure in comparison.failures:
        said.append(f"The run of {failure.label} with seed {failure.seed} failed ({failure.error}) and is left out.")
    return said


def _not_over(comparison: Comparison) -> list[str]:
    """A caution where runs go on, or were cut off."""
    runs = [run.result for group in comparison.groups for arm in group.arms for run in arm.runs]
    at = sorted(run["unfinished"] for run in runs if run.get("unfinished") is not None)
    if not at:
        return []
    where = f"{at[0]}" if at[0] == at[-1] else f"{at[0]} to {at[-1]}"
    be, they = ("is", "it stands") if len(at) == 1 else ("are", "they stand")
    return [
        f"{len(at)} of {len(runs)} runs {be} not over (iteration {where}): {they} here by the last evaluation so far."
    ]


def _few_seeds(comparison: Comparison) -> list[str]:
    """A caution where an arm, or what two arms have in common, has few seeds; it names them unless all have so few."""
    counts = {arm.label: len(arm.seeds) for group in comparison.groups for arm in group.arms}
    for pair in (pair for group in comparison.groups for pair in (*group.pairs, *group.rivals)):
        if 0 < len(pair.seeds) < min(counts[pair.label], counts[pair.baseline]):
            counts[f"{pair.label} against {pair.baseline}"] = len(pair.seeds)
    fewest = min(counts.values(), default=FEW_SEEDS + 1)
    few = [label for label, count in counts.items() if count == fewest]
    of = "" if len(few) == len(counts) else f" of {' and of '.join(few)}"
    if fewest == 1:
        return [f"There is one seed{of}: the intervals know of the questions alone, not of how runs differ."]
    if fewest > FEW_SEEDS:
        return []
    return [
        f"{fewest} seeds{of} say little of how runs differ: intervals are wide where seeds disagree, and too narrow "
        "where they agree by luck; add seeds before you rest a claim on them."
    ]


def _busy_caution(comparison: Comparison) -> list[str]:
    """A caution where runs had less than a processor, so that times measure the machine's other work too."""
    runs = [run.result for group in comparison.groups for arm in group.arms for run in arm.runs]
    shares = [
        run["cpu_seconds"] / (run["seconds"] + run.get("seconds_evaluation", 0.0))
        for run in runs
        if run.get("seconds") and run.get("cpu_seconds")
    ]
    if not shares or min(shares) >= BUSY_SHARE:
        return []
    return [
        f"The machine was busy: runs had {percent(min(shares))} to {percent(max(shares))} of a processor, so speeds "
        "and wall-clock comparisons are unreliable here."
    ]


def _version_caution(comparison: Comparison) -> list[str]:
    """A caution where runs of several versions of the code were put together."""
    commits = {
        str(run.provenance.get("commit"))
        for group in comparison.groups
        for arm in group.arms
        for run in arm.runs
        if run.provenance
    }
    if len(commits) < 2:
        return []
    return [
        f"The runs are of {len(commits)} versions of the code ({', '.join(sorted(commits))}): differences may be the "
        "code's. Use another --runs folder to do them all again."
    ]


def _group(group: Group) -> list[str]:
    said = _start(group) + [_gain(line) for line in group.lines]
    for pairs in (group.pairs, group.rivals):
        whole = [pair for pair in pairs if isinstance(pair, Pair)]
        said += [_difference(pair, group.margin, len(whole)) for pair in whole]
    for line in group.lines:
        if line.ess is not None and line.ess < COLLAPSED_ESS and line.skip_ratio:
            said.append(
                f"{line.label}: the effective sample size of whole completions is {percent(line.ess)} "
                f"(D = {line.D:.2f} nats a completion): reweighting cannot repair that much divergence."
            )
    return said + [_silence(arm) for arm in group.arms if any(silence(run.training) for run in arm.runs)]


def _start(group: Group) -> list[str]:
    """Where the arms' policy is the model of a finished run: which run that is, and what it took."""
    policy = Path(group.arms[0].runs[0].result.get("policy", ""))
    if policy.name != "model" or not (policy.parent / RESULT).is_file():
        return []
    run = read_result(policy.parent / RESULT)
    return [
        f"All arms start from one run of {run['agent']} on {Path(run['policy']).name} (seed {run['seed']}, "
        f"{run['iterations']} iterations, {run['seconds']:.0f} s): {percent(run['accuracy_before'])} before it, "
        f"{percent(run['accuracy_after'])} after it."
    ]


def _silence(arm: ArmOutcome) -> str:
    """A caution of an arm that for some time had nothing to learn from."""
    whys = [(seed, why) for seed, run in zip(arm.seeds, arm.runs, strict=True) if (why := silence(run.training))]
    seed, why = whys[0]
    return f"{arm.label} had nothing to learn from in {len(whys)} of {len(arm.runs)} runs (seed {seed}: {why})."


def _gain(line: ArmLine) -> str:
    """What one arm learned."""
    gain = line.gain
    if gain is None:
        return f"{line.label} has {interval(line.after)} % accuracy."
    if not gain.excludes_zero:
        return f"{line.label} did not measurably change: {points(gain)} held-out accuracy."
    verb = "gained" if gain.low > 0 else "lost"
    return f"{line.label} {verb} {points(gain)}, to {percent(line.after.value)} held-out accuracy."


def _difference(pair: Pair, margin: float, count: int) -> str:
    """One of ``count`` arms against the baseline, on every budget."""
    by_finding: dict[str, list[str]] = {}
    for axis, one in pair.at_equal.items():
        where = f"at {AXIS_WORDS[axis]} ({points(one.difference, '')})"
        by_finding.setdefault(conclusion(one, pair.baseline, margin, count), []).append(where)
    parts = [f"{finding} {' and '.join(where)}" for finding, where in by_finding.items()]
    said = f"{pair.label} is {'; '.join(parts)}."
    if pair.speed_up_rollout is not None:
        said += f" It wrote {pair.speed_up_rollout:.2f} times as many rollout tokens a second."
    return said + _times_sentence(pair)


def conclusion(difference: Difference, baseline: str, margin: float, count: int) -> str:
    """What may be said of one of ``count`` arms at one budget."""
    within = f"{100 * margin:g} points"
    if difference.verdict == "not distinguishable":
        return (
            f"equivalent to {baseline} within {within}"
            if difference.equivalent
            else f"not distinguishable from {baseline}"
        )
    said = f"{difference.verdict} than {baseline}"
    if difference.verdict_holm == "not distinguishable":
        said += f", taken alone but not among {count} arms (Holm),"
    return f"{said} by less than {within}" if difference.equivalent else said


def _times_sentence(pair: Pair) -> str:
    value = pair.time_ratio
    if value.missing in ("ours behind", "theirs behind"):
        behind, ahead = (pair.label, pair.baseline) if value.missing == "ours behind" else (pair.baseline, pair.label)
        return f" {behind} gained less than half of what {ahead} did: times to an accuracy are not compared."
    if value.missing or value.target is None:
        return ""
    return f" Its time to {percent(value.target)} is {times(value, pair.baseline)} of {pair.baseline}'s."
