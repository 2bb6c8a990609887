"""The sections of a comparison's report, in their order."""

from __future__ import annotations

from collections import Counter
from functools import partial
from html import escape
from typing import Any

from benchmarks.comparison.outcomes import AXES, AXIS_WORDS, ArmOutcome
from benchmarks.experiment.summary import evaluation_rows
from benchmarks.measuring.plots import style
from benchmarks.report.comparison import Comparison, Group
from benchmarks.report.figures import (
    cost_shares,
    learning_curve_figure,
    speed_and_divergence,
    weight_rows,
    weights_over_time,
)
from benchmarks.report.page import Block, Facts, Figures, Section, Sentences, Written
from benchmarks.report.table import (
    NOTES,
    failure_table,
    main_table,
    pair_table,
    sampled_table,
    set_table,
    weight_table,
)
from benchmarks.report.words import percent, summary
from policies.nested import from_halves, halves

MOST_SUBSETS = 8


def report(comparison: Comparison) -> Section:
    """The whole report; its Markdown refers to curves.png beside it."""
    blocks: list[Block] = [Sentences(summary(comparison))]
    for group in comparison.groups:
        blocks += [Section(group.name, 2, [main_table(group)], NOTES), *_sections(group)]
    blocks.append(Written(as_markdown="![Learning curves](curves.png)"))
    blocks.append(Section("Failed runs", 2, [failure_table(comparison.failures)]))
    blocks.append(_repeat(comparison))
    return Section(comparison.grid.title, 1, blocks)


def _sections(group: Group) -> list[Section]:
    curves = [
        (f"Held-out accuracy at {AXIS_WORDS[axis]}, by agent", partial(learning_curve_figure, group, axis))
        for axis in AXES
    ]
    costs = [
        ("Rollout speed against divergence", partial(speed_and_divergence, group)),
        ("Seconds of a run by part", partial(cost_shares, group)),
    ]
    weighed = [arm for arm in group.arms if arm.mean("skip_ratio") and any(map(weight_rows, arm.runs))]
    weights = [(f"Weights of {arm.label}", partial(weights_over_time, arm)) for arm in weighed]
    band = "Median over tokens and the band from 1 % to 99 %, by iteration; a weight of 1 is on-policy."
    return [
        Section(
            "Learning curves",
            3,
            [_legend(group), Figures(curves, "Thin lines are runs, thick lines their mean.")],
        ),
        Section(
            f"Against {group.baseline}, at equal budgets",
            3,
            [pair_table(group.pairs)],
            "Paired differences of greedy accuracy in points, question by question and seed by seed, with 95 % "
            "intervals, at the largest budget that all runs of both reached; P(better run): chance that a run of the "
            f"agent ends above one of {group.baseline}.",
        ),
        Section("Against the full model with fewer completions", 3, [pair_table(group.rivals, both_named=True)]),
        Section("Sampled accuracy, %", 3, [sampled_table(group)]),
        Section("Further problem sets, greedy, %", 3, [set_table(group)]),
        Section("Speed, divergence and cost", 3, [_legend(group), Figures(costs)]),
        Section("Correction weights", 3, [weight_table(group), Figures(weights, band)] if weights else []),
        Section(
            "Skipped layers",
            3,
            [_skips(arm) for arm in group.arms],
            "Darker: skipped in more iterations. The numbers are layers, the first at the input.",
        ),
        Section("Sample completions", 3, [_samples(arm) for arm in group.arms]),
    ]


def _legend(group: Group) -> Written:
    items = (
        f'<li><span class="swatch" style="border-color:{style(n)["color"]}"></span>{escape(arm.label)}</li>'
        for n, arm in enumerate(group.arms)
    )
    return Written(f'<ul class="legend">{"".join(items)}</ul>')


def _skips(arm: ArmOutcome) -> Written:
    """A strip of layers, shaded by how often each was skipped, and the sets skipped most; of nested agents."""
    kept = [tuple(row["layers"]) for run in arm.runs for row in run.training if "layers" in row]
    if not kept or not arm.mean("skip_ratio"):
        return Written()
    present = [set(halves(layers)) for layers in kept]
    depth = max(map(max, present)) // 2 + 1
    shares = (1 - sum((2 * n in one) + (2 * n + 1 in one) for one in present) / (2 * len(kept)) for n in range(depth))
    strip = "".join(_layer(n, share) for n, share in enumerate(shares))
    used = Counter(from_halves(sorted(set(range(2 * depth)) - one)) for one in present)
    listed = ", ".join(
        f"{{{' '.join(map(str, gone))}}} {count} times" for gone, count in used.most_common(MOST_SUBSETS)
    )
    return Written(
        f'<p>{escape(arm.label)}: {len(used)} sets</p><div class="layers">{strip}</div>\n'
        f'<p class="soft">Most used: {escape(listed)}</p>'
    )


def _layer(n: int, share: float) -> str:
    ink = "#fff" if share > 0.5 else "#1b1f24"
    tone = f"rgba(0,114,178,{share:.2f})"
    return f'<span style="background:{tone};color:{ink}" title="skipped in {percent(share)}">{n}</span>'


def _samples(arm: ArmOutcome) -> Written:
    """The first held-out questions with the greedy completions before and after, of the arm's first run."""
    ends = [row["evaluation"].get("shown", []) for row in evaluation_rows(arm.runs[0].rows)]
    text = []
    for before, after in zip(ends[0], ends[-1], strict=True):
        text.append(
            f"<p><b>{escape(before['question'])}</b> <span class=soft>(answer {escape(before['answer'])})</span></p>"
        )
        for when, sample in (("before", before), ("after", after)):
            verdict = "right" if sample["status"] == "right" else "wrong"
            text.append(
                f"<blockquote>{when}: {escape(sample['completion'])} "
                f'<span class="{verdict}">[{escape(sample["status"].replace("_", " "))}]</span></blockquote>'
            )
    head = f"<summary>{escape(arm.label)}, seed {arm.seeds[0]}</summary>"
    return Written(f"<details>{head}{''.join(text)}</details>" if text else "")


def _repeat(comparison: Comparison) -> Section:
    facts = _provenance(comparison.groups[0].arms[0].runs[0].provenance)
    arms = [arm for group in comparison.groups for arm in group.arms]
    facts.append(
        ("runs", "; ".join(f"{arm.label}: {' '.join(run.result['hash'] for run in arm.runs)}" for arm in arms))
    )
    if comparison.grid.source:
        facts.append(("settings", comparison.grid.source))
    command = Written(f"<pre>{escape(comparison.command)}</pre>", f"    {comparison.command}")
    note = "Each run's folder has its spec.json: python -m benchmarks.run --spec FILE repeats it alone."
    return Section("Repeat", 2, [command, Facts(facts)], note)


def _provenance(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a run, its packages in one; its own command is left out, being the launcher's."""
    facts = []
    for name, value in provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items() if version)
        if value is not None and name != "command":
            facts.append((name, str(value)))
    return facts
