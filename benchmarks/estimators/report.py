"""What the lab prints: tables of a sweep's rows, in the terminal and in Markdown, and what they can and cannot tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from rich.console import Console
from rich.table import Table

from benchmarks.estimators.mini import LAYERS
from benchmarks.estimators.sweep import Row

CAN_TELL = (
    "It can tell: the exact bias, variance and direction of the registered code's first gradient step (pi = pi_old), "
    "with a terminal reward and a sum over tokens, for completions of at most a few tokens. Which variants are "
    "unbiased, and how fast their variance grows with the divergence, is exact."
)
CANNOT_TELL = (
    "It cannot tell: accuracy after training. It ranks estimators for one step at short T; over many steps bias, "
    "optimizer and exploration interact, at long T variances grow with D and products of ratios fare worse, and trust "
    "regions act only after the first step of a rollout (here they all equal 'none')."
)
READING = (
    "base, practical and retrace are our reading of the three variants that Nested-ReFT names, not the authors' text."
)
CLAIM = "unbiased with controlled variance? relative bias, and variance times on-policy, by layers skipped"
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


def merged(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Corrections whose rows are equal in every cell, as first id -> all ids."""
    figures: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        key = tuple(float(f"{row[name]:.8g}") for name in ("relative_bias", "variance_ratio", "efficiency"))
        figures.setdefault(row["correction"], []).append(key)
    groups: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for id in sorted(figures, key=lambda id: (id != "none", id)):
        groups.setdefault(tuple((0.0 if a < 1e-9 else a, b, c) for a, b, c in figures[id]), []).append(id)
    return {ids[0]: ids for ids in groups.values()}


def relative_efficiency(row: Row) -> float:
    """Ascent efficiency as a fraction of the on-policy estimator's in the same cell."""
    return row["efficiency"] / row["on_policy_efficiency"]


def ranked(rows: Sequence[Row]) -> list[str]:
    """One id of each group of equal corrections, by mean relative efficiency, best first."""
    return sorted(merged(rows), key=lambda id: -fmean(relative_efficiency(r) for r in rows if r["correction"] == id))


def levels(rows: Sequence[Row], kind: str) -> list[float]:
    """The divergences, or the numbers of skipped layers, of a kind of cell."""
    return sorted({row[SECTIONS[kind][0]] for row in rows if row["mu"] == kind})


def summary(rows: Sequence[Row], kind: str, id: str) -> list[str]:
    """One line of a table: bias, variance, cosine at the middle level, N*, and the efficiency at every level."""
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


def header(rows: Sequence[Row], kind: str) -> list[str]:
    """The columns of a section's table."""
    name, values = SECTIONS[kind][2], levels(rows, kind)
    return ["correction", "unbiased", "bias", "variance", "cosine", "N*", *(f"eff. {name} {v:g}" for v in values)]


def title(rows: Sequence[Row], kind: str) -> str:
    """What the section is, with its divergences."""
    label, words, name = SECTIONS[kind]
    own = [row for row in rows if row["mu"] == kind]
    parts = []
    for level in levels(rows, kind):
        cells = [row for row in own if row[label] == level]
        d, ess = fmean(row["d"] for row in cells), fmean(row["ess"] for row in cells)
        parts.append(f"{level:g}: D {d:.2g}, TV {fmean(row['tv'] for row in cells):.2f}, ESS {ess:.2g}")
    middle = _middle(levels(rows, kind))
    return f"{words}; bias to N* at {name} {middle:g}; by {name}: " + " | ".join(parts)


def lines(rows: Sequence[Row], kind: str) -> list[list[str]]:
    """The body of a section's table."""
    own = [row for row in rows if row["mu"] == kind]
    groups = merged(rows)
    found = []
    for id in ranked(own):
        names = next((ids for ids in groups.values() if id in ids), [id])
        sampled = any(row["sampled_batches"] for row in own if row["correction"] == id)
        found.append([" = ".join(names) + (" ~" if sampled else ""), *summary(rows, kind, id)])
    return found


def claim(rows: Sequence[Row]) -> list[list[str]]:
    """The paper's claim in the exact sense: relative bias and variance (times on-policy) of its three variants, as we
    read them, and of the unbiased corrections, by layers skipped. A header and a line per correction."""
    values = levels(rows, "skip")
    table = [["correction", *(f"bias, variance at {v:g} of {LAYERS}" for v in values)]]
    for id in ("practical", "base", "retrace", "sequence-is", "defensive"):
        own = [row for row in rows if row["mu"] == "skip" and row["correction"] == id]
        if own:
            table.append([id])
            for value in values:
                cell = [row for row in own if row["skipped"] == value]
                bias = fmean(row["relative_bias"] for row in cell)
                variance = math.exp(fmean(math.log(row["variance_ratio"]) for row in cell))
                table[-1].append(f"{'0' if bias < 1e-10 else f'{bias:.2f}'}, x {variance:.3g}")
    return table if len(table) > 1 else []


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the tables and what they mean."""
    for kind in (kind for kind in SECTIONS if any(row["mu"] == kind for row in rows)):
        table = Table(title=title(rows, kind), title_justify="left")
        for n, column in enumerate(header(rows, kind)):
            table.add_column(column, justify="left" if n == 0 else "right", overflow="fold", max_width=34)
        for line in lines(rows, kind):
            table.add_row(*line)
        console.print(table)
    columns, *body = claim(rows) or [[]]
    if body:
        table = Table(*columns, title=CLAIM, title_justify="left")
        for line in body:
            table.add_row(*line)
        console.print(table)
    for text in notes(rows):
        console.print(text, soft_wrap=True)


def markdown(rows: Sequence[Row], command: str) -> str:
    """The same as a Markdown page."""
    parts = [f"# Exact estimator lab\n\nMade by `{command}`.\n"]
    for kind in (kind for kind in SECTIONS if any(row["mu"] == kind for row in rows)):
        parts.append(f"## {title(rows, kind)}\n\n{_piped([header(rows, kind), *lines(rows, kind)])}\n")
    if claim(rows):
        parts.append(f"## {CLAIM}\n\n{_piped(claim(rows))}\n")
    return "\n".join([*parts, *(f"{text}\n" for text in notes(rows))])


def _piped(table: list[list[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(table[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [table[0], rule, *table[1:]])


def notes(rows: Sequence[Row]) -> list[str]:
    """The legend, the setting and the limits of what was printed."""
    one = rows[0]
    setting = f"Advantage {one['advantage']}, {one['batch']} completions per update, {len(rows)} rows."
    ours = [READING] if {"base", "practical", "retrace"} & {row["correction"] for row in rows} else []
    cost = [COST] if any(row["correction"] == "defensive" for row in rows) else []
    return [LEGEND, setting, *cost, *ours, CAN_TELL, CANNOT_TELL]
