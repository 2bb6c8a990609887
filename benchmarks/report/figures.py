"""The report's figures, as PNG or inline SVG."""

from __future__ import annotations

import io
from html import escape

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from benchmarks.comparison.outcomes import END
from benchmarks.measuring.plots import COLOURS, literal, style
from benchmarks.report.charts import AXIS_LABELS, mean_line
from benchmarks.report.comparison import Comparison, Group

COSTS = {"rollout": COLOURS[1], "reward": COLOURS[2], "update": COLOURS[5], "evaluation": "#BBBBBB"}
PANEL = (4.2, 3.1)
MOST_INSIDE = 6  # arms whose legend fits into a panel
LETTER = 0.058  # inches that a letter of a legend is wide, at most


def names_inside(group: Group) -> bool:
    """Whether a panel has room for the legend: few arms, of names that are short beside it."""
    longest = max(len(arm.label) for arm in group.arms)
    return len(group.arms) <= MOST_INSIDE and 0.6 + LETTER * longest < 0.8 * PANEL[0]


def learning_curve(panel: Axes, group: Group, axis: str) -> None:
    """Held-out accuracy against a budget: thin lines are runs, thick lines their mean. Of many arms there are the means
    alone, marked at their ends."""
    many = len(group.arms) > MOST_INSIDE
    for n, arm in enumerate(group.arms):
        how = style(n)
        for run in () if many else arm.runs:
            panel.plot(run.spent(axis), 100 * np.array(run.greedy), color=how["color"], alpha=0.25, linewidth=0.8)
        x, mean = mean_line([(run.spent(axis), run.greedy) for run in arm.runs])
        ends = [len(x) - 1] if many else None
        panel.plot(x, 100 * mean, label=literal(arm.label), linewidth=2, markersize=5, markevery=ends, **how)
    if axis == END:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axis in ("tokens", "target_tokens"):
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 125k: whole numbers of tokens run into each other
    panel.set_xlabel(AXIS_LABELS[axis])
    panel.set_ylabel("held-out accuracy, %")
    panel.grid(alpha=0.3)


def learning_curves_png(comparison: Comparison) -> bytes:
    """The learning curves of every group against every budget, in a row, or two to a row where arms are many."""
    columns = [2 if len(group.arms) > MOST_INSIDE else len(group.axes) for group in comparison.groups]
    rows = [-(-len(group.axes) // wide) for group, wide in zip(comparison.groups, columns, strict=True)]
    beside = [arm.label for group in comparison.groups if not names_inside(group) for arm in group.arms]
    room = 0.6 + LETTER * max(map(len, beside)) if beside else 0.0
    figure = Figure(figsize=(PANEL[0] * max(columns) + room, (PANEL[1] + 0.6) * sum(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=rows)[:, 0]
    for part, group, high, wide in zip(parts, comparison.groups, rows, columns, strict=True):
        panels = list(part.subplots(high, wide, squeeze=False).flat)
        for panel, axis in zip(panels, group.axes, strict=False):
            learning_curve(panel, group, axis)
        for panel in panels[len(group.axes) :]:
            panel.set_axis_off()
        panels[0].set_title(literal(group.name), loc="left", fontsize="medium")
        if names_inside(group):
            panels[0].legend(fontsize="x-small", frameon=False)
        else:  # beside the panels, from above as the lines end
            lines = sorted(panels[0].get_legend_handles_labels()[0], key=lambda line: -line.get_ydata()[-1])
            part.legend(handles=lines, loc="outside right upper", fontsize="x-small", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def speed_and_divergence(group: Group) -> Figure:
    """Each run's rollout speed against its KL per token."""
    figure = Figure(figsize=PANEL, layout="constrained")
    panel = figure.subplots()
    for n, arm in enumerate(group.arms):
        if arm.tokens_per_second is None:
            continue
        how = style(n)
        timed = [run for run in arm.runs if run.result.get("rollout_tokens_per_second") is not None]
        kl = [max(run.mean("kl_k1") or 0.0, 0.0) for run in timed]
        speed = [run.result["rollout_tokens_per_second"] for run in timed]
        panel.scatter(kl, speed, color=how["color"], marker=how["marker"], label=literal(arm.label), zorder=3)
    panel.set_xscale("symlog", linthresh=1e-3)
    panel.set_xlim(left=-2e-4)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("KL per token of behaviour from target, nats")
    panel.set_ylabel("rollout tokens/s")
    panel.grid(alpha=0.3)
    return figure


def cost_shares(group: Group) -> Figure:
    """Mean seconds of a run spent on rollouts, verdicts, updates and evaluations."""
    names = 1.5 * LETTER * max(len(line.label) for line in group.lines)  # in letters of the usual size
    figure = Figure(figsize=(PANEL[0] + max(1.2, names), 1.1 + 0.36 * len(group.arms)), layout="constrained")
    panel = figure.subplots()
    left = np.zeros(len(group.arms))
    for part, colour in COSTS.items():
        width = np.array([line.parts[part] for line in group.lines])
        panel.barh([literal(line.label) for line in group.lines], width, left=left, color=colour, label=part)
        left += width
    panel.invert_yaxis()
    panel.set_xlabel("seconds a run")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def svg(figure: Figure, described: str) -> str:
    """Inline SVG with a text for screen readers: no prolog, no time stamp, no ground, and black is the page's ink."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue().replace("#000000", "currentColor")
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(described)}"', 1)
