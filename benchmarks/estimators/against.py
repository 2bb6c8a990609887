"""The lab beside training: what it predicted for the divergence that runs measured, and what accuracy they gained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from scipy.stats import rankdata, spearmanr

from benchmarks.estimators.adviser import HOPELESS_D, SMALLEST_D
from benchmarks.estimators.report import CANNOT_TELL, relative_efficiency
from benchmarks.estimators.settings import Sweep
from benchmarks.estimators.sweep import VOCABULARY, cell_rows, noisy_cell
from benchmarks.measuring.table import Table
from registry import UsageError, corrections

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run: its correction as (id, fields), the layers it skipped, its measured D and what it gained."""

    correction: tuple[str, tuple[tuple[str, Any], ...]]
    skip_ratio: float
    d: float
    gain: float


def read(folders: Iterable[Path]) -> list[Run]:
    """The runs that finished, have a correction and measured a divergence. Raises ``UsageError`` if none."""
    runs, folders = [], list(folders)
    for folder in folders:
        if not (folder / "result.json").is_file() or not (folder / "spec.json").is_file():
            continue
        result = json.loads((folder / "result.json").read_text())
        correction = json.loads((folder / "spec.json").read_text())["agent"].get("correction")
        means = result.get("means", {})
        if not correction or not {"D", "skip_ratio"} <= set(means):
            continue
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in correction.items() if name != "id"}
        gain = result["accuracy_after"] - result["accuracy_before"]
        key = (correction["id"], tuple(sorted(fields.items())))
        runs.append(Run(key, round(means["skip_ratio"], 3), means["D"], gain))
    if not runs:
        raise UsageError(
            f"none of the {len(folders)} folders is a finished run (result.json) of an agent with a correction"
        )
    return runs


def compare(folders: Sequence[Path], sweep: Sweep, console: Console) -> list[Row]:
    """Print and return a row per skip ratio and correction, with the rank correlation of each skip ratio."""
    runs = read(folders)
    rows: list[Row] = []
    for ratio in sorted({run.skip_ratio for run in runs}):
        own = [run for run in runs if run.skip_ratio == ratio]
        part = [_row(own, key, sweep) for key in sorted({run.correction for run in own})]
        _rank(part)
        rows += part
        console.print(_table(part))
    console.print(CANNOT_TELL, soft_wrap=True)
    return rows


def _row(runs: Sequence[Run], key: tuple[str, tuple[tuple[str, Any], ...]], sweep: Sweep) -> Row:
    own = [run for run in runs if run.correction == key]
    gains = [run.gain for run in own]
    d = fmean(run.d for run in own)
    reached = float(f"{min(max(d, SMALLEST_D), HOPELESS_D):.2g}")
    chosen = {key[0]: corrections.make(key[0], **dict(key[1]))}
    cells = [
        noisy_cell(VOCABULARY, 6, success, reached, seed) for seed in range(sweep.seeds) for success in sweep.successes
    ]
    predicted = [row for cell in cells for row in cell_rows(cell, sweep, chosen)]
    return {
        "correction": key[0],
        "fields": dict(key[1]),
        "skip_ratio": own[0].skip_ratio,
        "runs": len(own),
        "d": d,
        "lab_d": reached,
        "gain": fmean(gains),
        "gain_error": stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
        "lab_efficiency": fmean(relative_efficiency(row) for row in predicted),
        "lab_relative_bias": fmean(row["relative_bias"] for row in predicted),
    }


def _rank(rows: list[Row]) -> None:
    """Add the ranks (1 is best; equal values share theirs) and Spearman's correlation, None for fewer than three."""
    by_lab, by_gain = (rankdata([-row[name] for row in rows]) for name in ("lab_efficiency", "gain"))
    varied = len(rows) > 2 and len(set(by_lab)) > 1 and len(set(by_gain)) > 1
    rho = float(spearmanr(by_lab, by_gain).statistic) if varied else None
    for row, lab, gain in zip(rows, by_lab, by_gain, strict=True):
        row.update(lab_rank=float(lab), gain_rank=float(gain), spearman=rho)


def _table(rows: Sequence[Row]) -> Table:
    rho = rows[0]["spearman"]
    agreement = "too few corrections to rank" if rho is None else f"Spearman rank correlation {rho:.2f}"
    columns: dict[str, Callable[[Row], str]] = {
        "correction": lambda row: row["correction"],
        "runs": lambda row: str(row["runs"]),
        "D": lambda row: f"{row['d']:.3g}" + ("" if row["d"] <= HOPELESS_D else f" (lab at {HOPELESS_D:g})"),
        "lab efficiency": lambda row: f"{row['lab_efficiency']:.2f}",
        "lab rank": lambda row: f"{row['lab_rank']:g}",
        "accuracy gained": lambda row: (
            f"{row['gain']:+.3f}" + ("" if row["gain_error"] is None else f" +- {row['gain_error']:.3f}")
        ),
        "rank": lambda row: f"{row['gain_rank']:g}",
        "lab off by": lambda row: f"{row['lab_rank'] - row['gain_rank']:+g}",
    }
    title = f"{rows[0]['skip_ratio']:.1%} of the layers skipped: {agreement} over {len(rows)} corrections"
    return Table.of(sorted(rows, key=lambda row: row["gain_rank"]), columns, title=title)
