"""What a comparison's report says, section by section."""

from __future__ import annotations

from collections import Counter
from functools import partial
from html import escape
from typing import Any

from benchmarks.comparison.outcomes import ArmOutcome
from benchmarks.measuring.plots import style
from benchmarks.measuring.statistics import FEWEST_SEEDS
from benchmarks.measuring.table import html_text
from benchmarks.report import charts, figures, tables
from benchmarks.report.charts import Chart, ink, page_data
from benchmarks.report.comparison import Comparison, Group
from benchmarks.report.completions import reader
from benchmarks.report.page import Report, Section
from benchmarks.report.words import percent, summary
from policies.nested import from_halves, halves

MOST_SUBSETS = 8
NO_SCRIPT = '<p class="soft">Charts need scripts; curves.png, beside this page, has the learning curves.</p>'
OWN_RUNS = "Each run's folder has its spec.json: python -m benchmarks.run --spec FILE repeats it alone."
VERDICTS = (
    "p: of no difference, alone and among all arms (Holm, at each kind of budget); p, apart: of a difference as large "
    "as the margin or larger (two one-sided tests). Each is judged at 5 %."
)


def report(comparison: Comparison) -> Report:
    """The whole report."""
    data = page_data(comparison)
    arms = [arm for group in comparison.groups for arm in group.arms]
    facts = _facts(next((arm.runs[0].provenance for arm in arms), {}))
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
            *(section for n, group in enumerate(comparison.groups) for section in _sections(group, n, data[n])),
            Section("Failed runs", tables.failures(comparison.failures), level=2),
        ],
        command=comparison.command,
        facts=facts,
        note=OWN_RUNS if any(run.provenance for arm in arms for run in arm.runs) else "",
        data=data,
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


def _sections(group: Group, number: int, data: dict[str, Any]) -> list[Section]:
    """A group's; ``number`` is its place in the page's data, ``data`` what stands there."""

    def drawn(*wanted: Chart) -> str:
        keys = [chart.key for chart in wanted if chart.key in data["charts"]]
        place = f'<div class="charts" data-group="{number}" data-charts="{" ".join(keys)}">{NO_SCRIPT}</div>'
        return place if keys else ""

    return [
        Section(group.name, tables.arms(group), tables.NOTES, level=2),
        Section(
            "Learning curves",
            note="Thin lines are runs, thick lines their mean. A pointer over a chart, or the arrow keys on it, shows "
            "values.",
            extra=drawn(charts.HELD_OUT),
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
        Section(
            "Sampled accuracy, %" if all(line.samples for line in group.lines) else "Mean of the runs, and time",
            tables.sampled_accuracy(group),
        ),
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
            "The tail of the ratios",
            tables.tail(group),
            "Means over iterations. Overlap is min(1, rho) with rho = pi / mu, of a completion its mean over the "
            "tokens; 1 is on-policy.",
            extra=drawn(*charts.TAIL),
        ),
        Section(
            "Correction weights",
            tables.weights(group),
            "Means over tokens and iterations; a weight of 1 is on-policy. Chart: median over tokens and the band from "
            "1 % to 99 %.",
            extra=drawn(*charts.WEIGHTS),
        ),
        Section(
            "Length of completions",
            tables.lengths(group),
            "Held-out completions are greedy. Cut off: by the budget of tokens.",
            extra=drawn(charts.HELD_OUT_LENGTH, *charts.LENGTH),
        ),
        Section(
            "Skipped layers",
            note="Darker: skipped in more iterations. The numbers are layers, the first at the input.",
            extra="\n".join(filter(None, map(_skips, group.arms))),
        ),
        Section(
            "Completions",
            note="Greedy answers to the first held-out questions, of each agent's first run. Characters that are not "
            "seen by themselves stand as their code points.",
            extra=reader(group, number),
        ),
    ]


def _legend(group: Group) -> str:
    items = (
        f'<li><span class="swatch" style="border-color:{ink(style(n)["color"])}"></span>{html_text(arm.label)}</li>'
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
        f'<p>{html_text(arm.label)}: {len(used)} sets</p><div class="layers">{strip}</div>\n'
        f'<p class="soft">Most used: {escape(listed)}</p>'
    )


def _layer(n: int, share: float) -> str:
    tone = f"rgba(0,114,178,{0.75 * share:.2f})"  # never so dark that the number could not be read
    return f'<span style="background:{tone}" title="skipped in {percent(share)}">{n}</span>'
