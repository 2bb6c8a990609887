"""The picture of a sweep: ascent efficiency against the divergence D."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.estimators.report import group_equal, levels, rank, relative_efficiency
from benchmarks.estimators.sweep import Row
from benchmarks.measuring.plots import style

NAMED = 10
TITLES = {"noise": "mu = noised target", "skip": "mu = transformer with layers skipped (dots: single subsets)"}
KEEP = ("none", "sequence-is", "defensive", "retrace", "token-is", "truncated-is", "v-trace")
TICKS = (0.03, 0.1, 0.3, 1.0, 2.0)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture to ``path`` (png, svg or pdf by its ending)."""
    kinds = [kind for kind in TITLES if any(row["mu"] == kind for row in rows)]
    figure = Figure(figsize=(6.2 * len(kinds) + 2.2, 5.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)
    groups = group_equal(rows)
    order = rank(rows)
    leading = {ids[0] for ids in groups.values() if set(ids) & set(KEEP)}
    named = sorted({*leading, *order[: max(NAMED - len(leading), 0)]}, key=order.index)
    for panel, kind in zip(panels[0], kinds, strict=True):
        own = [row for row in rows if row["mu"] == kind]
        for id in sorted(order, key=lambda id: id in named):
            _line(panel, own, kind, id, named, groups)
        panel.axhline(1.0, color="black", linewidth=1, linestyle=":")
        panel.set_title(TITLES[kind])
        panel.set_xlabel("D = KL(mu || pi), nats per completion")
        panel.set_xscale("log")
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.minorticks_off()
        panel.set_ylim(0, 1.05)
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("ascent efficiency / on-policy efficiency")
    handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    wanted = [_label(id, groups) for id in named] + (["the others"] if "the others" in handles else [])
    figure.legend([handles[name] for name in wanted], wanted, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(
        f"One gradient step of {rows[0]['batch']} completions: the share of the on-policy ascent that is left",
        fontsize=12,
    )
    figure.savefig(path, dpi=140)


def _label(id: str, groups: dict[str, list[str]]) -> str:
    names = groups[id]
    rest = len(names) - 3
    return "\n= ".join(names[:3]) + (f"\n= {rest} more trust regions" if rest > 0 else "")


def _line(panel: Axes, own: Sequence[Row], kind: str, id: str, named: list[str], groups: dict[str, list[str]]) -> None:
    label = {"noise": "level", "skip": "skipped"}[kind]
    chosen = [row for row in own if row["correction"] == id]
    cells = [[row for row in chosen if row[label] == level] for level in levels(own, kind)]
    x = [fmean(row["d"] for row in cell) for cell in cells]
    y = [fmean(relative_efficiency(row) for row in cell) for cell in cells]
    if id not in named:
        panel.plot(x, y, color="0.8", linewidth=1, zorder=1, label="the others")
        return
    look = style(named.index(id))
    panel.plot(x, y, linewidth=1.8, markersize=5, zorder=3, label=_label(id, groups), **look)
    if kind == "skip":
        efficiencies = [relative_efficiency(row) for row in chosen]
        panel.scatter([row["d"] for row in chosen], efficiencies, s=6, color=look["color"], alpha=0.35)
