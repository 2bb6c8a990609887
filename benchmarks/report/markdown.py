"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.comparison.board import clock
from benchmarks.comparison.outcomes import AXES, AXIS_WORDS
from benchmarks.report.comparison import Comparison, Group
from benchmarks.report.table import HEADS, NOTES, cells
from benchmarks.report.words import percent, points, ratio, summary

RIVALS = "Against the full model with fewer completions"


def markdown(comparison: Comparison) -> str:
    """The whole report; refers to curves.png beside it."""
    parts = [f"# {comparison.grid.title}", ""]
    parts += [f"- {sentence}" for sentence in summary(comparison)]
    for group in comparison.groups:
        parts += ["", f"## {group.name}", "", *table(HEADS, [cells(line) for line in group.lines]), "", NOTES]
        if group.pairs:
            parts += ["", f"### Against {group.baseline}, at equal budgets", "", *table(*pair_table(group.pairs))]
        if group.rivals:
            parts += ["", f"### {RIVALS}", "", *table(*pair_table(group.rivals, named=True))]
        parts += ["", "### Sampled accuracy", "", *table(*sampled_table(group))]
        if group.lines[0]["sets"]:
            parts += ["", "### Further problem sets (greedy)", "", *table(*set_table(group))]
    parts += ["", "![Learning curves](curves.png)", "", "## Repeat", "", f"    {comparison.command}", ""]
    if comparison.grid.source:
        parts += [f"Settings: {comparison.grid.source}", ""]
    provenance = comparison.groups[0].arms[0].runs[0].provenance
    parts += [f"- {name}: {value}" for name, value in flat(provenance)]
    return "\n".join(parts) + "\n"


def table(heads: Any, rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the first column left, the others right."""
    aligned = "|".join(["---", *["---:"] * (len(heads) - 1)])
    lines = [f"| {' | '.join(heads)} |", f"|{aligned}|"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def pair_table(pairs: Iterable[dict[str, Any]], named: bool = False) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: paired differences, in points, at each kind of budget; ``named`` says what from in each row."""
    heads = ["agent", *(AXIS_WORDS[axis] for axis in AXES), "P(better run)"]
    heads += ["rollout speed-up", "wall-clock speed-up", "its time to the other's final accuracy, ratio"]
    rows = []
    for pair in pairs:
        label = f"{pair['label']} against {pair['baseline']}" if named else pair["label"]
        if not pair["seeds"]:
            rows.append([label, *["no common seed"] * 3, "-", "-", "-", "-"])
            continue
        rows.append(
            [
                label,
                *(points(pair[axis]["difference"], "") for axis in AXES),
                f"{pair['probability_of_improvement']:.2f}",
                f"{pair['speed_up_rollout']:.2f}x",
                f"{pair['speed_up']:.2f}x",
                ratio(pair["time_ratio"]),
            ]
        )
    return heads, rows


def sampled_table(group: Group) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: avg@n and pass@k before and after, the interquartile mean, and the time to the target."""
    samples = group.lines[0]["samples"]
    ks = [k for k in group.lines[0]["pass_at"] if k > 1]
    heads = ["agent", f"avg@{samples}", *(f"pass@{k}" for k in ks), "IQM of runs", f"time to {percent(group.target)}"]
    rows = []
    for line in group.lines:
        reached = [clock(seconds) if seconds is not None else "never" for seconds in line["seconds_to_target"]]
        pairs = [(line["sampled_before"], line["sampled_after"]), *(line["pass_at"][k] for k in ks)]
        rows.append(
            [
                line["label"],
                *(f"{100 * before:.1f} -> {100 * after:.1f}" for before, after in pairs),
                percent(line["iqm"]),
                ", ".join(reached),
            ]
        )
    return heads, rows


def set_table(group: Group) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: greedy accuracy on the further sets."""
    names = list(group.lines[0]["sets"])
    rows = [
        [line["label"], *(f"{100 * line['sets'][n][0]:.1f} -> {100 * line['sets'][n][1]:.1f}" for n in names)]
        for line in group.lines
    ]
    return ["agent", *names], rows


def flat(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance of a run as lines, packages in one; its own command is left out, being the launcher's."""
    lines = []
    for name, value in provenance.items():
        if name == "command":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items() if version)
        if value is not None:
            lines.append((name, str(value)))
    return lines
