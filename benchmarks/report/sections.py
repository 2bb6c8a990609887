"""What a comparison's report says, section by section."""

from __future__ import annotations

from collections import Counter
from functools import partial
from html import escape
from typing import Any

from benchmarks.comparison.outcomes import AXIS_WORDS, ArmOutcome
from benchmarks.experiment.summary import evaluation_rows
from benchmarks.measuring.plots import style
from benchmarks.measuring.statistics import FEWEST_SEEDS
from benchmarks.report import figures, tables
from benchmarks.report.comparison import Comparison, Group
from benchmarks.report.page import Report, Section
from benchmarks.report.words import percent, summary
from policies.nested import from_halves, halves

MOST_SUBSETS = 8
OWN_RUNS = "Each run's folder has its spec.json: python -m benchmarks.run --spec FILE repeats it alone."
VERDICTS = (
    "p: of no difference, alone and among all arms (Holm, at each kind of budget); p, apart: of a difference as large "
    "as the margin or larger (two one-sided tests). Each is judged at 5 %."
)


def report(comparison: Comparison) -> Report:
    """The whole report."""
    arms = [arm for group in comparison.groups for arm in group.arms]
    facts = _facts(arms[0].runs[0].provenance)
    facts.append(
        (
            "runs",
            "; ".join(
                f"{arm.label}: {' '.join(dict.fromkeys(run.result['hash'] for run in arm.runs))}" for arm in arms
            ),
        )
    )
    if comparison.source:
        facts.append(("settings", comparison.source))
    return Report(
        title=comparison.title,
        sentences=summary(comparison),
        sections=[
            *(section for group in comparison.groups for section in _sections(group)),
            Section("Failed runs", tables.failures(comparison.failures), level=2),
        ],
        command=comparison.command,
        facts=facts,
        note=OWN_RUNS if any(run.provenance for arm in arms for run in arm.runs) else "",
    )


def _facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """A run's, its packages in one; its own command is left out, being the launcher's."""
    facts = []
    for name, value in provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items() if version)
        if value is not None and name != "command":
            facts.append((name, str(value)))
    return facts


def _sections(group: Group) -> list[Section]:
    return [
        Section(group.name, tables.arms(group), tables.NOTES, level=2),
        Section(
            "Learning curves",
            note="Thin lines are runs, thick lines their mean.",
            extra=_legend(group),
            pictures=[
                (
                    f"Held-out accuracy at {AXIS_WORDS[axis]}, by agent",
                    partial(figures.learning_curve_figure, group, axis),
                )
                for axis in group.axes
            ],
        ),
        Section(
            f"Against {group.baseline}, at equal budgets",
            tables.pairs(group.pairs),
            "Paired differences of greedy accuracy in points, question by question and seed by seed, with 95 % "
            "intervals, at the largest budget that all runs of both reached; P(better run): chance that a run of the "
            f"agent ends above one of {group.baseline}; time to an accuracy of both: the agent's training seconds over "
            f"{group.baseline}'s, to three quarters of the way from the first evaluation to the lower of the two last "
            f"ones, an interval from {FEWEST_SEEDS} seeds on.",
        ),
        Section(
            f"What may be concluded against {group.baseline}", tables.verdicts(group.pairs, group.margin), VERDICTS
        ),
        Section("Against the full model with fewer completions", tables.pairs(group.rivals, both_named=True)),
        Section(
            "What may be concluded against fewer completions", tables.verdicts(group.rivals, group.margin), VERDICTS
        ),
        Section("Sampled accuracy, %", tables.sampled_accuracy(group)),
        Section("Further problem sets, greedy, %", tables.further_sets(group)),
        Section(
            "Speed, divergence and cost",
            extra=_legend(group),
            pictures=[
                ("Rollout speed against divergence", partial(figures.speed_and_divergence, group)),
                ("Seconds of a run by part", partial(figures.cost_shares, group)),
            ],
        ),
        Section(
            "Correction weights",
            tables.weights(group),
            "Means over tokens and iterations; a weight of 1 is on-policy. Pictures: median over tokens and the band "
            "from 1 % to 99 %, by iteration.",
            pictures=[
                (f"Weights of {arm.label}", partial(figures.weights_over_time, arm)) for arm in group.weighing_arms
            ],
        ),
        Section(
            "Skipped layers",
            note="Darker: skipped in more iterations. The numbers are layers, the first at the input.",
            extra="\n".join(filter(None, map(_skips, group.arms))),
        ),
        Section("Sample completions", extra="\n".join(filter(None, map(_samples, group.arms)))),
    ]


def _legend(group: Group) -> str:
    items = (
        f'<li><span class="swatch" style="border-color:{style(n)["color"]}"></span>{escape(arm.label)}</li>'
        for n, arm in enumerate(group.arms)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _skips(arm: ArmOutcome) -> str:
    """A nested agent's layers, shaded by how often each was skipped, and the sets that were skipped most."""
    kept = [tuple(row["layers"]) for run in arm.runs for row in run.training if "layers" in row]
    if not kept or not arm.mean("skip_ratio"):
        return ""
    present = [set(halves(layers)) for layers in kept]
    depth = max(map(max, present)) // 2 + 1
    shares = (1 - sum((2 * n in one) + (2 * n + 1 in one) for one in present) / (2 * len(kept)) for n in range(depth))
    strip = "".join(_layer(n, share) for n, share in enumerate(shares))
    used = Counter(from_halves(sorted(set(range(2 * depth)) - one)) for one in present)
    listed = ", ".join(
        f"{{{' '.join(map(str, gone))}}} {count} times" for gone, count in used.most_common(MOST_SUBSETS)
    )
    return (
        f'<p>{escape(arm.label)}: {len(used)} sets</p><div class="layers">{strip}</div>\n'
        f'<p class="soft">Most used: {escape(listed)}</p>'
    )


def _layer(n: int, share: float) -> str:
    ink = "#fff" if share > 0.5 else "#1b1f24"
    tone = f"rgba(0,114,178,{share:.2f})"
    return f'<span style="background:{tone};color:{ink}" title="skipped in {percent(share)}">{n}</span>'


def _samples(arm: ArmOutcome) -> str:
    """The first held-out questions with the greedy completions before and after, of the arm's first run."""
    ends = [row["evaluation"].get("shown", []) for row in evaluation_rows(arm.runs[0].rows)]
    text = ""
    for before, after in zip(ends[0], ends[-1], strict=True):
        text += (
            f"<p><b>{escape(before['question'])}</b> <span class=soft>(answer {escape(before['answer'])})</span></p>"
        )
        for when, sample in (("before", before), ("after", after)):
            verdict = "right" if sample["status"] == "right" else "wrong"
            status = escape(sample["status"].replace("_", " "))
            text += f"<blockquote>{when}: {escape(sample['completion'])} "
            text += f'<span class="{verdict}">[{status}]</span></blockquote>'
    return text and f"<details><summary>{escape(arm.label)}, seed {arm.seeds[0]}</summary>{text}</details>"
