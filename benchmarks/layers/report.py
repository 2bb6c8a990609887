"""What ``benchmarks.divergence`` shows of its rows: tables, the Pareto picture, and a recommendation in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring.statistics import Interval, percentile_interval, resampled_weights
from benchmarks.measuring.table import Table, console

Row = dict[str, Any]
MEANS = ("kl_per_token", "kl_reverse", "tv", "acceptance", "mean_length", "D", "skipped", "speedup_ideal")


def arms(rows: Sequence[Row]) -> list[Row]:
    """One line per sampler, patch and number of skipped layers: means over its sets, sorted by D."""
    lines = []
    for _, group in groupby(sorted(rows, key=_arm), _arm):
        members = list(group)
        speeds = [row["speedup_measured"] for row in members if row["speedup_measured"] is not None]
        arm: Row = {name: fmean(row[name] for row in members) for name in MEANS}
        arm |= {name: members[0][name] for name in ("sampler", "patch", "ratio", "num_layers")}
        arm |= {"sets": len(members), "example": members[0]["layers_skipped"]}
        lines.append(arm | {"speedup_measured": fmean(speeds) if speeds else None})
    return sorted(lines, key=lambda arm: arm["D"])


def speedup(arm: Row) -> float:
    """As measured, or ideal where nothing was timed."""
    return arm["speedup_measured"] if arm["speedup_measured"] is not None else arm["speedup_ideal"]


def pareto(compared: Sequence[Row]) -> list[Row]:
    """The arms that are faster than the full model and that no other beats in both D and speed-up, by rising D."""
    front: list[Row] = []
    for arm in sorted(compared, key=lambda arm: (arm["D"], -speedup(arm))):
        if speedup(arm) > (speedup(front[-1]) if front else 1.0):
            front.append(arm)
    return front


def ratio_interval(ours: Sequence[Row], theirs: Sequence[Row], resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean KL per token of ``ours`` over that of ``theirs``, with a 95 % percentile bootstrap interval over prompts,
    the same for all rows, and over the rows of each side (sets drawn, fits); a single row stands for itself."""
    rng = np.random.default_rng(seed)
    prompts = len(ours[0]["kl_of_prompts"])
    weights = resampled_weights(prompts, resamples, rng)

    def resample(rows: Sequence[Row]) -> NDArray[np.float64]:
        sums, tokens = (np.array([row[name] for row in rows]) for name in ("kl_of_prompts", "tokens_of_prompts"))
        of_rows = (weights @ sums.T) / (weights @ tokens.T)
        return (of_rows * resampled_weights(len(rows), resamples, rng)).sum(1)

    value = fmean(row["kl_per_token"] for row in ours) / fmean(row["kl_per_token"] for row in theirs)
    return percentile_interval(value, resample(ours) / resample(theirs))


def against_uniform(rows: Sequence[Row]) -> list[str]:
    """A line for each sampler, patch and number of layers for which plain ``uniform`` was measured, too."""
    sentences = []
    for (sampler, patch, ratio), group in groupby(sorted(rows, key=_arm), _arm):
        plain = [row for row in rows if _arm(row) == ("uniform", "none", ratio)]
        if not plain or (sampler, patch) == ("uniform", "none"):
            continue
        ours = list(group)
        value, low, high = ratio_interval(ours, plain)
        sentences.append(
            f"KL per token of {sampler}, patch {patch}, at {ours[0]['skipped']:.3g} layers: {value:.3f} ({low:.3f} to "
            f"{high:.3f}) of plain uniform's"
        )
    return sentences


def _arm(row: Row) -> tuple[Any, ...]:
    return row["sampler"], row["patch"], row["ratio"]


def table(compared: Sequence[Row]) -> None:
    """The samplers, the nearest to the target first; a star marks the Pareto front."""
    front = pareto(compared)
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda arm: "*" if arm in front else "",
        "sampler": lambda arm: arm["sampler"],
        "patch": lambda arm: arm["patch"],
        "skipped": lambda arm: f"{arm['skipped']:.3g}/{arm['num_layers']}",
        "KL/token": lambda arm: f"{arm['kl_per_token']:.3f}",
        "TV": lambda arm: f"{arm['tv']:.3f}",
        "acceptance": lambda arm: f"{arm['acceptance']:.3f}",
        "D": lambda arm: f"{arm['D']:.2f}",
        "ideal": lambda arm: f"{arm['speedup_ideal']:.3f}",
        "measured": lambda arm: "" if arm["speedup_measured"] is None else f"{arm['speedup_measured']:.3f}",
        "sets": lambda arm: str(arm["sets"]),
        "skips": lambda arm: " ".join(map(str, arm["example"])) + (" ..." if arm["sets"] > 1 else ""),
    }
    title = "Samplers: means over their sets, on held-out prompts and the nested policy's own tokens"
    shown = Table.of(compared, columns, title=title, left=(0, 1, 2, len(columns) - 1))
    console().print(shown)


def layer_table(singles: Sequence[Row]) -> None:
    """Every layer skipped alone, and its halves."""
    kinds = [[row for row in singles if row["sampler"] == f"one {kind}"] for kind in ("layer", "attention", "mlp")]
    rows = []
    for n, (whole, attention, mlp) in enumerate(zip(*kinds, strict=True)):
        figures = (whole["kl_per_token"], whole["tv"], attention["kl_per_token"], mlp["kl_per_token"])
        rows.append([str(n), *(f"{value:.3f}" for value in figures), f"{whole['influence']:.4f}"])
    heads = ["layer", "KL/token", "TV", "attention alone", "MLP alone", "block influence"]
    title = "Layers skipped alone: KL per token on other prompts and the full model's tokens"
    console().print(Table(heads, rows, title=title, left=()))


def recommend(compared: Sequence[Row], budget: float) -> str:
    """The fastest arm within the budget, or what is nearest to it, in words."""

    def words(arm: Row) -> str:
        patch = {"none": "", "int8": " with rollout_dtype=int8"}.get(arm["patch"], f" with patch {arm['patch']}")
        return (
            f"{arm['sampler']}{patch} at {arm['skipped']:.3g} of {arm['num_layers']} layers "
            f"(its ratio {arm['ratio']:.3f}): D {arm['D']:.2f}, {speedup(arm):.2f} times the tokens a second"
        )

    length = fmean(arm["mean_length"] for arm in compared)
    allowed = [arm for arm in compared if arm["D"] <= budget and speedup(arm) > 1]
    if allowed:
        best = max(allowed, key=lambda arm: (speedup(arm), -arm["D"]))
        return f"Recommended within D = {budget:g} ({length:.0f} tokens per completion): {words(best)}."
    nearest = compared[0]
    within = [arm for arm in compared if arm["D"] <= budget]
    if within:
        best = max(within, key=lambda arm: (speedup(arm), -arm["D"]))
        timed = best["speedup_measured"] is not None
        why = "is faster than the full model" if timed else "skips weights, and nothing was timed (--pairs 0)"
        return (
            f"Nothing that stays within D = {budget:g} nats per completion ({length:.0f} tokens each) {why}: "
            f"{'keep all layers' if timed else 'time it, with --pairs 4'}; within it is {words(best)}"
        )
    return (
        f"Nothing here stays within D = {budget:g} nats per completion ({length:.0f} tokens each): keep all layers, or "
        f"accept a bounded correction's bias (truncated-is, retrace) with the nearest, {words(nearest)}; "
        "shorter completions and patches lower D"
    )


def draw(compared: Sequence[Row], budget: float, path: Path, title: str) -> None:
    """Speed-up against D: every arm, the Pareto front, the budget."""
    from matplotlib.figure import Figure

    from benchmarks.measuring.plots import style

    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    panel = figure.subplots()
    kinds = list(dict.fromkeys((arm["sampler"], arm["patch"]) for arm in compared))
    for n, (sampler, patch) in enumerate(sorted(kinds)):
        own = [arm for arm in compared if (arm["sampler"], arm["patch"]) == (sampler, patch)]
        label = sampler if patch == "none" else f"{sampler}, {patch}"
        panel.plot([a["D"] for a in own], [speedup(a) for a in own], label=label, **style(n) | {"linestyle": ""})
    front = pareto(compared)
    panel.plot([a["D"] for a in front], [speedup(a) for a in front], color="black", linewidth=1, zorder=0)
    for arm in front:
        text = f"{arm['skipped']:.3g} of {arm['num_layers']}"
        where = (arm["D"], speedup(arm))
        panel.annotate(text, where, (-4, 5), textcoords="offset points", ha="right", fontsize=8)
    panel.axvline(budget, color="grey", linestyle=":", linewidth=1)
    panel.annotate(f" budget D = {budget:g}", (budget, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    panel.set_xscale("log")
    panel.margins(x=0.08)
    panel.set_xlabel("D = KL(mu || pi) of a completion, nats; further left is nearer to the target")
    timed = compared[0]["speedup_measured"] is not None
    panel.set_ylabel("speed-up of rollouts, measured" if timed else "ideal speed-up of a decode step, by weights")
    panel.set_title(f"{title}: the line is the Pareto front", fontsize=11)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
