"""What the lab prints: tables of a sweep's rows, in the terminal and in Markdown, and what they can and cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from rich.console import Console

from benchmarks.estimators.sweep import Row
from benchmarks.estimators.transformer import LAYERS
from benchmarks.measuring.table import Table

CAN_TELL = (
    "It can tell: the exact bias, variance and direction of the registered code's first gradient step (pi = pi_old), "
    "with a terminal reward and a sum over tokens, for completions of at most a few tokens. Which variants are "
    "unbiased, and how fast their variance grows with the divergence, is exact."
)
CANNOT_TELL = (
    "It cannot tell: accuracy after training. It ranks estimators for one step at short T; over many steps bias, "
    "optimizer and exploration interact, at long T variances grow with D and products of ratios fare worse, and trust "
    "regions act only after the first step of a rollout (here pi = pi_old)."
)
READING = (
    "base, practical and retrace are our reading of the three variants that Nested-ReFT names, not the authors' text."
)
CLAIM = "the paper's claim, exactly: relative bias, and variance as a multiple of on-policy, by layers skipped"
COST = (
    "defensive writes n_0 of the G completions of each group with all layers, and scores every completion under both "
    "policies: it gives back n_0/G of what skipping saves, and costs one more scoring pass of the nested policy. The "
    "efficiencies above are per completion, not per second."
)
LEGEND = (
    "unbiased: declared, and held to 1e-10 by the contract tests; bias: |m - g| / |g|; variance: of one completion "
    "relative to on-policy; cosine: of the mean and the true gradient; efficiency: ascent of one step of a batch as a "
    "fraction of on-policy; N*: completions per update above which sequence-is is better (median; never: -); "
    "~: sampled, not enumerated."
)
SECTIONS = {
    "noise": ("level", "noised target", "D"),
    "skip": ("skipped", "layer-skipped transformer", "layers skipped"),
}


def group_equal(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Corrections whose rows are equal in every cell (up to rounding), as first id -> all ids."""
    figures: dict[str, list[float]] = {}
    for row in rows:
        own = (row["relative_bias"], row["variance_ratio"], row["efficiency"])
        figures.setdefault(row["correction"], []).extend(own)
    groups: dict[str, list[str]] = {}
    for id in sorted(figures, key=lambda id: (id != "none", id)):
        same = (first for first in groups if _equal(figures[first], figures[id]))
        groups.setdefault(next(same, id), []).append(id)
    return groups


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9) for x, y in zip(a, b, strict=True))


def relative_efficiency(row: Row) -> float:
    """Ascent efficiency as a fraction of the on-policy estimator's in the same cell."""
    return row["efficiency"] / row["on_policy_efficiency"]


def rank(rows: Sequence[Row]) -> list[str]:
    """One id of each group of equal corrections, by mean relative efficiency, best first."""
    return _best_first(rows, group_equal(rows))


def _best_first(rows: Sequence[Row], ids: Iterable[str]) -> list[str]:
    return sorted(ids, key=lambda id: -fmean(relative_efficiency(row) for row in rows if row["correction"] == id))


def levels(rows: Sequence[Row], kind: str) -> list[float]:
    """The divergences, or the numbers of skipped layers, of a kind of cell."""
    return sorted({row[SECTIONS[kind][0]] for row in rows if row["mu"] == kind})


def _figures(rows: Sequence[Row], kind: str, id: str) -> list[str]:
    """A correction's cells in a section's table: bias, variance and cosine at the middle level, N*, and the efficiency
    at every level."""
    label = SECTIONS[kind][0]
    own = [row for row in rows if row["mu"] == kind and row["correction"] == id]
    at = {level: [row for row in own if row[label] == level] for level in levels(rows, kind)}
    middle = at[_middle(levels(rows, kind))]
    star = median(math.inf if row["crossover"] is None else row["crossover"] for row in middle)
    bias = fmean(row["relative_bias"] for row in middle)
    return [
        "yes" if own[0]["declared_unbiased"] else "",
        "0" if bias < 1e-10 else f"{bias:.2f}",
        f"{math.exp(fmean(math.log(row['variance_ratio']) for row in middle)):.3g}",
        f"{fmean(row['cosine'] for row in middle):.2f}",
        "-" if math.isinf(star) else ("1" if star == 1 else f"{star:.3g}"),
        *(f"{fmean(relative_efficiency(row) for row in one):.2f}" for one in at.values()),
    ]


def _middle(values: Sequence[float]) -> float:
    return values[len(values) // 2]


def _section(rows: Sequence[Row], kind: str) -> Table:
    """The table of a kind of cell, a line per group of equal corrections; its title gives the divergences."""
    name = SECTIONS[kind][2]
    heads = ["correction", "unbiased", "bias", "variance", "cosine", "N*"]
    heads += [f"eff. {name} {level:g}" for level in levels(rows, kind)]
    own, groups = [row for row in rows if row["mu"] == kind], group_equal(rows)
    lines = [[_names(own, groups[id]), *_figures(rows, kind, id)] for id in _best_first(own, groups)]
    return Table(heads, lines, title=f"{SECTIONS[kind][1]}: {_divergences(rows, kind)}")


def _divergences(rows: Sequence[Row], kind: str) -> str:
    """The divergences behind a section's columns."""
    label, _, name = SECTIONS[kind]
    parts = []
    for level in levels(rows, kind):
        cells = [row for row in rows if row["mu"] == kind and row[label] == level]
        d, tv, ess = (fmean(row[figure] for row in cells) for figure in ("d", "tv", "ess"))
        parts.append(f"{level:g} has D {d:.2g}, TV {tv:.2f}, ESS {ess:.2g}")
    return f"bias to N* at {name} {_middle(levels(rows, kind)):g}; {name} " + "; ".join(parts)


def _names(rows: Sequence[Row], ids: list[str]) -> str:
    sampled = any(row["sampled_batches"] for row in rows if row["correction"] == ids[0])
    return " = ".join(ids) + (" ~" if sampled else "")


def _by_setting(rows: Sequence[Row]) -> Table:
    """Mean efficiency of the noised cells by horizon and by success rate."""
    own, groups = [row for row in rows if row["mu"] == "noise"], group_equal(rows)
    axes = [("horizon", "T"), ("success", "success")]
    columns = [(axis, word, value) for axis, word in axes for value in sorted({row[axis] for row in own})]
    lines = []
    for id in _best_first(own, groups) if own else []:
        mine = [row for row in own if row["correction"] == id]
        means = (fmean(relative_efficiency(row) for row in mine if row[axis] == value) for axis, _, value in columns)
        lines.append([_names(own, groups[id]), *(f"{mean:.2f}" for mean in means)])
    heads = ["correction", *(f"eff. {word} {value:g}" for _, word, value in columns)]
    return Table(heads, lines, title="noised target, all divergences, by horizon and success rate")


def _claim(rows: Sequence[Row]) -> Table:
    """The paper's claim in the exact sense: relative bias and variance (times on-policy) of its three variants, as we
    read them, and of the unbiased corrections, by layers skipped."""
    values = levels(rows, "skip")
    lines = []
    for id in ("practical", "base", "retrace", "sequence-is", "defensive"):
        own = [row for row in rows if row["mu"] == "skip" and row["correction"] == id]
        if own:
            lines.append([id])
            for value in values:
                cell = [row for row in own if row["skipped"] == value]
                bias = fmean(row["relative_bias"] for row in cell)
                variance = math.exp(fmean(math.log(row["variance_ratio"]) for row in cell))
                lines[-1].append(f"{'0' if bias < 1e-10 else f'{bias:.2f}'}, x {variance:.3g}")
    return Table(["correction", *(f"bias, variance at {v:g} of {LAYERS}" for v in values)], lines, title=CLAIM)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Those that the rows have something for."""
    kinds = [kind for kind in SECTIONS if any(row["mu"] == kind for row in rows)]
    every = [*(_section(rows, kind) for kind in kinds), _by_setting(rows), _claim(rows)]
    return [table for table in every if table.rows]


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the tables and what they mean."""
    for table in tables(rows):
        console.print(table)
    for text in notes(rows):
        console.print(text, soft_wrap=True)


def markdown(rows: Sequence[Row], command: str) -> str:
    """The same as a Markdown page."""
    parts = [f"# Exact estimator lab\n\nMade by `{command}`.\n"]
    for table in tables(rows):
        heading, _, rest = table.title.partition(": ")
        parts.append(f"## {heading[0].upper()}{heading[1:]}\n\n{rest and rest + chr(10) * 2}{table.markdown()}\n")
    return "\n".join([*parts, *(f"{text}\n" for text in notes(rows))])


def _verdict(rows: Sequence[Row]) -> str:
    skipping = [row for row in rows if row["mu"] == "skip"]
    parts = []
    for id in ("base", "practical", "retrace"):
        biases = [row["relative_bias"] for row in skipping if row["correction"] == id]
        if biases:
            parts.append(f"{id} {min(biases):.2g} to {max(biases):.2g}")
    return (
        f"With layers skipped, their relative bias ranges over: {', '.join(parts)}. A range that starts above 0 says "
        "that the variant is not unbiased in the exact sense."
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """The legend, the setting and the limits of what was printed."""
    one = rows[0]
    setting = f"Advantage {one['advantage']}, {one['batch']} completions per update, {len(rows)} rows."
    ours = [READING] if {"base", "practical", "retrace"} & {row["correction"] for row in rows} else []
    ours += [_verdict(rows)] if ours and any(row["mu"] == "skip" for row in rows) else []
    scaled = fmean(row["on_policy_bias"] for row in rows)
    if scaled > 1e-6:
        setting += (
            f" This advantage rescales groups: even on policy its relative bias is {scaled:.2f} on average. Read the "
            "cosine and the efficiency, which a scale does not change."
        )
    cost = [COST] if any(row["correction"] == "defensive" for row in rows) else []
    return [LEGEND, setting, *cost, *ours, CAN_TELL, CANNOT_TELL]
