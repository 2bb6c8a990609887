"""The comparison's main table, for a terminal and for the report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.comparison.board import clock
from benchmarks.report.comparison import Comparison, Group
from benchmarks.report.words import interval, points, summary

HEADS = (
    "agent",
    "seeds",
    "accuracy before, %",
    "after, %",
    "gain, points",
    "tokens/s",
    "time",
    "rollout / reward / update, %",
    "KL/token",
    "ESS",
    "skip k/L",
)
SHARED = ("rollout", "reward", "update")
NOTES = (
    "Greedy held-out accuracy with 95 % intervals over questions and seeds; tokens/s: of rollouts with their verdicts; "
    "time: of training, without evaluation, and what its parts are of it; KL/token: of the behaviour policy from the "
    "target, in nats; ESS: effective sample size of whole completions under exact reweighting; k/L: layers skipped of "
    "all."
)


def cells(line: dict[str, Any]) -> list[str]:
    """One arm's row under ``HEADS``."""
    kept, ratio = line["layers_kept"], line["skip_ratio"]
    skip = ""
    if kept and ratio is not None:
        layers = round(kept[0] / (1 - ratio)) if len(kept) == 1 else None
        skip = f"{layers - kept[0]:.3g}/{layers}" if layers else f"{ratio:.2f}"
    return [
        line["label"],
        str(len(line["seeds"])),
        interval(line["before"]),
        interval(line["after"]),
        points(line["gain"], ""),
        f"{line['tokens_per_second']:.0f}",
        clock(line["seconds"]),
        "/".join(f"{100 * line[f'seconds_{part}'] / max(line['seconds'], 1e-9):.0f}" for part in SHARED),
        number(line["kl"]),
        number(line["ess"]),
        skip,
    ]


def number(value: float | None) -> str:
    """Two significant digits, or a dash for what was not measured."""
    if value is None:
        return "-"
    return "0" if abs(value) < 1e-4 else f"{value:.2g}"


def print_comparison(comparison: Comparison) -> None:
    """The tables and the summary on standard output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    for group in comparison.groups:
        console.print(_table(comparison, group))
    for sentence in summary(comparison):
        console.print(f"- {sentence}", highlight=False)


def _table(comparison: Comparison, group: Group) -> Table:
    table = Table(title=f"{comparison.grid.title}: {group.name}", title_justify="left", caption=NOTES)
    table.caption_justify = "left"
    for n, head in enumerate(HEADS):
        # A name cut short would not say which agent; numbers may take two lines.
        table.add_column(head, justify="left" if n == 0 else "right", no_wrap=n == 0)
    for line in group.lines:
        table.add_row(*cells(line))
    return table
