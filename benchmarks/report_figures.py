"""The report's figures, as PNG or inline SVG, in the colours of Okabe and Ito (told apart by colour-blind readers)."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.outcomes import AXES, ArmOutcome
from benchmarks.report import Comparison, Group

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "nested-reft"  # equal numbers give equal files
matplotlib.rcParams["font.family"] = "sans-serif"

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "osD^vPX*"
AXIS_LABELS = {"iteration": "iterations", "tokens": "rollout tokens", "seconds": "training seconds"}
GRID_POINTS = 60


def style(n: int) -> dict[str, Any]:
    """Colour, marker and dash of the n-th arm."""
    return {
        "color": COLOURS[n % len(COLOURS)],
        "marker": MARKERS[n % len(MARKERS)],
        "linestyle": "-" if n < len(COLOURS) else "--",
    }


def learning_curves(group: Group, axes: tuple[str, ...] = AXES) -> Figure:
    """Held-out accuracy against each budget: thin lines are runs, thick lines their mean."""
    figure = Figure(figsize=(4.6 * len(axes), 3.9), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for n, arm in enumerate(group.arms):
            _curve(panel, arm, axis, style(n))
        panel.set_xlabel(AXIS_LABELS[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy, %")
    _legend(figure, panels[0], len(group.arms))
    return figure


def _curve(panel: Axes, arm: ArmOutcome, axis: str, how: dict[str, Any]) -> None:
    for run in arm.runs:
        panel.plot(run.spent(axis), 100 * np.array(run.greedy), color=how["color"], alpha=0.3, linewidth=0.8)
    end = min(run.spent(axis)[-1] for run in arm.runs)
    x = np.linspace(0, end, GRID_POINTS)
    mean = np.mean([np.interp(x, run.spent(axis), run.greedy) for run in arm.runs], axis=0)
    panel.plot(x, 100 * mean, label=arm.label, linewidth=2, markevery=GRID_POINTS // 6, markersize=5, **how)


def _legend(figure: Figure, panel: Axes, arms: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(arms, 3), fontsize="small", frameon=False)


def speed_and_divergence(group: Group) -> Figure:
    """Each run's rollout speed against its KL per token."""
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    panel = figure.subplots()
    for n, arm in enumerate(group.arms):
        how = style(n)
        kl = [max(run.mean("kl_k1") or 0.0, 0.0) for run in arm.runs]
        speed = [run.result["rollout_tokens_per_second"] for run in arm.runs]
        panel.scatter(kl, speed, color=how["color"], marker=how["marker"], label=arm.label, zorder=3)
    panel.set_xscale("symlog", linthresh=1e-3)
    panel.set_xlim(left=-2e-4)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("KL(behaviour || target) per token, nats")
    panel.set_ylabel("rollout tokens/s")
    panel.grid(alpha=0.3)
    _legend(figure, panel, 2)
    return figure


def cost_shares(group: Group) -> Figure:
    """Mean seconds of a run spent on rollouts, updates and evaluations."""
    figure = Figure(figsize=(6.5, 1.2 + 0.42 * len(group.arms)), layout="constrained")
    panel = figure.subplots()
    left = np.zeros(len(group.arms))
    parts = ("seconds_rollout", "seconds_update", "seconds_evaluation")
    for name, colour, word in zip(parts, COLOURS[1:], ("rollout", "update", "evaluation"), strict=False):
        width = np.array([line[name] for line in group.lines])
        panel.barh([line["label"] for line in group.lines], width, left=left, color=colour, label=word)
        left += width
    panel.invert_yaxis()
    panel.set_xlabel("seconds a run")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def learning_curves_png(comparison: Comparison) -> bytes:
    """The learning curves of the first group against all budgets, or of every group stacked."""
    images = [_png(learning_curves(group)) for group in comparison.groups[:1]]
    return images[0]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """Inline SVG: no prolog, no fixed size, no time stamp."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
