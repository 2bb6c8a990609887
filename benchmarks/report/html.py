"""The report as one self-contained HTML file: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.comparison.outcomes import AXES, AXIS_WORDS, ArmOutcome
from benchmarks.experiment.summary import evaluation_rows
from benchmarks.report.comparison import Comparison, Group
from benchmarks.report.figures import (
    cost_shares,
    learning_curve_figure,
    speed_and_divergence,
    style,
    svg,
    weights_over_time,
)
from benchmarks.report.markdown import RIVALS, flat, pair_table, sampled_table, set_table
from benchmarks.report.table import HEADS, NOTES, cells, number
from benchmarks.report.words import percent, summary
from policies.nested import from_halves, halves

STYLE = Path(__file__).parent / "style.css"
MOST_SUBSETS = 8


def html(comparison: Comparison) -> str:
    """The whole page."""
    title = escape(comparison.grid.title)
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary(comparison))
    body = [f"<h1>{title}</h1>", f'<ul class="summary">{said}</ul>']
    for group in comparison.groups:
        body += _group(group)
    body += _failures(comparison) + _repeat(comparison)
    style_sheet = STYLE.read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>\n{style_sheet}</style>\n</head>\n<body>',
            *body,
            "</body>\n</html>\n",
        ]
    )


def _group(group: Group) -> list[str]:
    parts = [f"<h2>{escape(group.name)}</h2>", _table(HEADS, [cells(line) for line in group.lines])]
    parts += [f'<p class="soft">{escape(NOTES)}</p>', "<h3>Learning curves</h3>", _legend(group)]
    curves = [
        (learning_curve_figure(group, axis), f"Held-out accuracy at {AXIS_WORDS[axis]}, by agent") for axis in AXES
    ]
    parts += [_figures(curves), '<p class="soft">Thin lines are runs, thick lines their mean.</p>']
    if group.pairs:
        parts += [f"<h3>Against {escape(str(group.baseline))}, at equal budgets</h3>", _table(*pair_table(group.pairs))]
        parts.append(
            '<p class="soft">Paired differences of greedy accuracy in points, question by question and seed by seed, '
            "with 95 % intervals, at the largest budget that all runs of both reached; P(better run): chance that a "
            f"run of the agent ends above one of {escape(str(group.baseline))}.</p>"
        )
    if group.rivals:
        parts += [f"<h3>{RIVALS}</h3>", _table(*pair_table(group.rivals, named=True))]
    parts += ["<h3>Sampled completions</h3>", _table(*sampled_table(group))]
    if group.lines[0]["sets"]:
        parts += ["<h3>Further problem sets, greedy, %</h3>", _table(*set_table(group))]
    parts += ["<h3>Speed, divergence and cost</h3>", _legend(group)]
    parts.append(
        _figures(
            [
                (speed_and_divergence(group), "Rollout speed against divergence"),
                (cost_shares(group), "Seconds of a run by part"),
            ]
        )
    )
    return [*parts, *_weights(group), *_skips(group), *_samples(group)]


def _table(heads: Any, rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def _legend(group: Group) -> str:
    items = (
        f'<li><span class="swatch" style="border-color:{style(n)["color"]}"></span>{escape(arm.label)}</li>'
        for n, arm in enumerate(group.arms)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _figures(figures: list[tuple[Any, str]]) -> str:
    drawn = "".join(f"<figure>{svg(figure, described)}</figure>" for figure, described in figures)
    return f'<div class="figures">{drawn}</div>'


def _weights(group: Group) -> list[str]:
    nested = [arm for arm in group.arms if arm.mean("skip_ratio")]
    drawn = [(figure, f"Weights of {arm.label}") for arm in nested if (figure := weights_over_time(arm)) is not None]
    if not drawn:
        return []
    heads = ["agent", "mean weight", "share zero", "share below the raw ratio", "raw log ratio 1 %", "99 %"]
    names = ("weight_mean", "weight_zero", "weight_shrunk", "log_ratio_q01", "log_ratio_q99")
    rows = [[arm.label, *(number(arm.mean(name)) for name in names)] for arm in nested]
    note = "Median over tokens and the band from 1 % to 99 %, by iteration; a weight of 1 is on-policy."
    return ["<h3>Correction weights</h3>", _table(heads, rows), _figures(drawn), f'<p class="soft">{note}</p>']


def _skips(group: Group) -> list[str]:
    parts = []
    for arm in group.arms:
        kept = [tuple(row["layers"]) for run in arm.runs for row in run.training if "layers" in row]
        ratio = arm.mean("skip_ratio")
        if not kept or not ratio:
            continue
        present = [set(halves(layers)) for layers in kept]
        depth = max(map(max, present)) // 2 + 1
        cells_ = "".join(
            _layer(n, 1 - sum((2 * n in one) + (2 * n + 1 in one) for one in present) / (2 * len(kept)))
            for n in range(depth)
        )
        used = Counter(from_halves(sorted(set(range(2 * depth)) - one)) for one in present)
        listed = ", ".join(
            f"{{{' '.join(map(str, skipped))}}} {count} times" for skipped, count in used.most_common(MOST_SUBSETS)
        )
        parts.append(f'<p>{escape(arm.label)}: {len(used)} sets</p><div class="layers">{cells_}</div>')
        parts.append(f'<p class="soft">Most used: {escape(listed)}</p>')
    note = "Darker: skipped in more iterations. The numbers are layers, the first at the input."
    return ["<h3>Skipped layers</h3>", *parts, f'<p class="soft">{note}</p>'] if parts else []


def _layer(n: int, share: float) -> str:
    ink = "#fff" if share > 0.5 else "#1b1f24"
    tone = f"rgba(0,114,178,{share:.2f})"
    return f'<span style="background:{tone};color:{ink}" title="skipped in {percent(share)}">{n}</span>'


def _samples(group: Group) -> list[str]:
    parts = ["<h3>Sample completions</h3>"]
    for arm in group.arms:
        shown = _shown(arm)
        if shown:
            parts.append(f"<details><summary>{escape(arm.label)}, seed {arm.seeds[0]}</summary>{shown}</details>")
    return parts if len(parts) > 1 else []


def _shown(arm: ArmOutcome) -> str:
    """The first held-out questions with the greedy completions before and after."""
    ends = [row["evaluation"].get("shown", []) for row in evaluation_rows(arm.runs[0].rows)]
    text = []
    for before, after in zip(ends[0], ends[-1], strict=True):
        text.append(
            f"<p><b>{escape(before['question'])}</b> <span class=soft>(answer {escape(before['answer'])})</span></p>"
        )
        for when, found in (("before", before), ("after", after)):
            verdict = "right" if found["status"] == "right" else "wrong"
            text.append(
                f"<blockquote>{when}: {escape(found['completion'])} "
                f'<span class="{verdict}">[{escape(found["status"].replace("_", " "))}]</span></blockquote>'
            )
    return "".join(text)


def _failures(comparison: Comparison) -> list[str]:
    if not comparison.failures:
        return []
    rows = [[f.label, str(f.seed), f.error, f.folder] for f in comparison.failures]
    return ["<h2>Failed runs</h2>", _table(["agent", "seed", "why", "folder"], rows)]


def _repeat(comparison: Comparison) -> list[str]:
    facts = flat(comparison.groups[0].arms[0].runs[0].provenance)
    hashes = [
        f"{arm.label}: {' '.join(run.result['hash'] for run in arm.runs)}"
        for group in comparison.groups
        for arm in group.arms
    ]
    facts.append(("runs", "; ".join(hashes)))
    if comparison.grid.source:
        facts.append(("settings", comparison.grid.source))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    command = f"<pre>{escape(comparison.command)}</pre>"
    note = "Each run's folder has its spec.json: <code>python -m benchmarks.run --spec FILE</code> repeats it alone."
    return ["<h2>Repeat</h2>", command, f'<p class="soft">{note}</p>', f"<dl>{listed}</dl>"]
