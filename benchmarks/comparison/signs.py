"""What measured in the first iterations tells how a run will end: a threshold for each sign, judged on other arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from benchmarks.comparison.outcomes import ArmOutcome, Outcome
from benchmarks.measuring.plots import style
from benchmarks.measuring.table import Table
from registry import UsageError
from registry.errors import did_you_mean

SIGNS = {  # metric: name, and whether more of it is worse
    "D": ("KL of a completion", True),
    "kl_k3": ("KL of a token", True),
    "ess_sequence": ("effective sample size", False),
    "overlap_q05": ("overlap of a completion, 5th percentile", False),
    "overlap_token_q05": ("overlap of a token, 5th percentile", False),
    "log_ratio_q01": ("log ratio of a token, 1st percentile", False),
}
COLLAPSED = 0.5  # of the baseline's gain


@dataclass(frozen=True)
class Early:
    """A run's first iterations and its end.

    Attributes:
        arm, seed: of the run.
        fitted: whether the thresholds may be fitted to it.
        share: its gain over the baseline's, of the same seed.
        signs: metric -> mean over the first iterations.
    """

    arm: str
    seed: int
    fitted: bool
    share: float
    signs: dict[str, float]

    @property
    def collapsed(self) -> bool:
        """Whether less than half of the baseline's gain is left."""
        return self.share < COLLAPSED


@dataclass(frozen=True)
class Sign:
    """What a metric tells. Its fields are those of the JSON file.

    Attributes:
        metric: its name in metrics.jsonl.
        threshold: beyond it a run is expected to collapse.
        auc: chance that a run that collapses has the worse value of two, by the runs that the threshold was fitted to
            and by the others; None where all or none of them collapse.
        right: share of the runs on the expected side, in the same order.
    """

    metric: str
    threshold: float
    auc: tuple[float | None, float | None]
    right: tuple[float | None, float | None]


def early(arms: Sequence[ArmOutcome], baseline: str, fit: Sequence[str], iterations: int) -> list[Early]:
    """Every run but the baseline's, with the baseline of its seed.

    Raises:
        UsageError: no such baseline, or one that gained nothing.
    """
    by_label = {arm.label: arm for arm in arms}
    if baseline not in by_label:
        raise UsageError(f"--baseline {baseline!r} is not among the runs: {did_you_mean(baseline, list(by_label))}")
    gains = {run.result["seed"]: run.greedy[-1] - run.greedy[0] for run in by_label[baseline].runs}
    if min(gains.values()) <= 0:
        raise UsageError(f"{baseline} did not gain with every seed: there is nothing to lose, train it for longer")
    found = []
    for arm in arms:
        if arm.label == baseline:
            continue
        fitted = any(fnmatchcase(arm.label, pattern) for pattern in fit)
        for run in arm.runs:
            if (seed := run.result["seed"]) in gains and (signs := signs_of(run, iterations)):
                share = (run.greedy[-1] - run.greedy[0]) / gains[seed]
                found.append(Early(arm.label, seed, fitted, share, signs))
    return found


def signs_of(run: Outcome, iterations: int) -> dict[str, float]:
    """Means over a run's first iterations of those of ``SIGNS`` that it measured."""
    first = run.training[:iterations]
    measured = {metric: [row[metric] for row in first if row.get(metric) is not None] for metric in SIGNS}
    return {metric: float(np.mean(values)) for metric, values in measured.items() if values}


def judge(runs: Sequence[Early]) -> list[Sign]:
    """The signs that all runs measured, the best first by its AUC on the runs that the threshold was fitted to.

    Raises:
        UsageError: of the runs to fit to, none or all collapse.
    """
    fitted, others = ([run for run in runs if run.fitted is which] for which in (True, False))
    collapsed = sum(run.collapsed for run in fitted)
    if collapsed in (0, len(fitted)):
        raise UsageError(
            f"of the {len(fitted)} runs that --fit chooses {collapsed} collapse: a threshold needs both kinds, choose "
            "more arms"
        )
    metrics = [metric for metric in SIGNS if all(metric in run.signs for run in runs)]
    told = []
    for metric in metrics:
        threshold = _threshold(_badness(fitted, metric), _collapsed(fitted))
        sides = [(_badness(part, metric), _collapsed(part)) for part in (fitted, others)]
        told.append(
            Sign(
                metric,
                threshold if SIGNS[metric][1] else -threshold,
                (_auc(*sides[0]), _auc(*sides[1])),
                (_right(*sides[0], threshold), _right(*sides[1], threshold)),
            )
        )
    return sorted(told, key=lambda sign: -(sign.auc[0] or 0))


def _badness(runs: Sequence[Early], metric: str) -> NDArray[np.float64]:
    return np.array([run.signs[metric] for run in runs]) * (1 if SIGNS[metric][1] else -1)


def _collapsed(runs: Sequence[Early]) -> NDArray[np.bool_]:
    return np.array([run.collapsed for run in runs], bool)


def _threshold(bad: NDArray[np.float64], collapsed: NDArray[np.bool_]) -> float:
    """Between two values next to each other, where the mean of both kinds' shares of right answers is largest; in the
    middle of the best places, where several are."""
    values = np.unique(bad)
    places = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    score = np.array([(np.mean(bad[collapsed] > place) + np.mean(bad[~collapsed] <= place)) / 2 for place in places])
    return float(np.median(places[score >= score.max() - 1e-12]))


def _auc(bad: NDArray[np.float64], collapsed: NDArray[np.bool_]) -> float | None:
    """Mann and Whitney's U over its largest: ties are half."""
    if not collapsed.any() or collapsed.all():
        return None
    worse, better = bad[collapsed], bad[~collapsed]
    return float(mannwhitneyu(worse, better).statistic / (len(worse) * len(better)))


def _right(bad: NDArray[np.float64], collapsed: NDArray[np.bool_], threshold: float) -> float | None:
    return float(np.mean((bad > threshold) == collapsed)) if len(bad) else None


def table(signs: Sequence[Sign]) -> Table:
    """A line a sign."""

    def figure(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            f"{sign.metric} ({SIGNS[sign.metric][0]})",
            f"{'>' if SIGNS[sign.metric][1] else '<'} {sign.threshold:.3g}",
            *(figure(value) for pair in zip(sign.auc, sign.right, strict=True) for value in pair),
        ]
        for sign in signs
    ]
    return Table(["sign", "collapse", "AUC, fitted", "right, fitted", "AUC, others", "right, others"], rows)


def draw(runs: Sequence[Early], sign: Sign, target: Path) -> None:
    """Each run by a sign and by what is left of the gain, with the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = sorted({_kind(run.arm) for run in runs})
    for n, kind in enumerate(kinds):
        own = [run for run in runs if _kind(run.arm) == kind]
        place = [run.signs[sign.metric] for run in own]
        how = style(n) | {"linestyle": "", "label": kind + ("" if own[0].fitted else " (not fitted)")}
        axes.plot(place, [run.share for run in own], **how, fillstyle="full" if own[0].fitted else "none")
    axes.axvline(sign.threshold, color="grey", linewidth=1)
    axes.axhline(COLLAPSED, color="grey", linewidth=0.8, linestyle=":")
    if min(run.signs[sign.metric] for run in runs) > 0:
        axes.set_xscale("log")
    axes.set_xlabel(f"{sign.metric} ({SIGNS[sign.metric][0]}), first iterations")
    axes.set_ylabel("gain, of the baseline's with the same seed")
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=150)


def _kind(label: str) -> str:
    """An arm's agent, without its settings."""
    return label.split(" ", 1)[0]
