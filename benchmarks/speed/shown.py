"""How the rows of ``benchmarks.throughput`` are told, kept, tabled and drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring.durable import json_text
from benchmarks.measuring.provenance import provenance
from benchmarks.measuring.table import Table, console

FIGURES = ("of_ideal", "of_products", "outside", "of_bandwidth", "occupancy", "head_share", "peak_gb")


def record_rows(rows: Iterable[dict[str, Any]], target: Path | None) -> list[dict[str, Any]]:
    """The rows, each told on stderr and put into the file as it comes, so that a killed run keeps what it has."""
    facts, so_far = provenance(), []
    for line in rows:
        so_far.append(line)
        rate = f"{line['tokens_per_second']:.0f} tokens/s, {line['ratio']:.3f} of {line['against']}"
        busy = f", {line['processor_ratio']:.3f} by processor time" if "processor_ratio" in line else ""
        print(f"{line['name']} ({line['workload']}): {rate}{busy}", file=sys.stderr, flush=True)
        if target is not None:
            target.write_text(json_text([each | {"provenance": facts} for each in so_far], indent=1) + "\n")
    return so_far


def show(rows: list[dict[str, Any]]) -> None:
    """Two tables: the ratios, and what else was measured beside some of them."""
    place: dict[str, Callable[[dict[str, Any]], str]] = {"": _label, "workload": lambda line: line["workload"]}
    ratios: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens/s": lambda line: f"{line['tokens_per_second']:.0f}",
        "ratio": lambda line: f"{line['ratio']:.3f}",
        "interval": lambda line: f"[{line['ratio_low']:.3f}, {line['ratio_high']:.3f}]",
        "by processor time": lambda line: f"{line['processor_ratio']:.3f}" if "processor_ratio" in line else "",
    }
    figures = {name.replace("_", " "): partial(_figure, name) for name in FIGURES}
    console().print(Table.of(rows, place | ratios, left=(0, 1)))
    if more := [line for line in rows if set(FIGURES) & set(line)]:
        console().print(Table.of(more, place | figures, left=(0, 1)))


def _figure(name: str, line: dict[str, Any]) -> str:
    return f"{line[name]:.2f}" if name in line else ""


def _label(line: dict[str, Any]) -> str:
    return f"{line['name']} / {line['against']}"


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Ratios with their intervals as a picture; a peer's row says the same as the engine's against it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    from benchmarks.measuring.plots import style

    rows = [line for line in rows if line["name"].startswith(("engine", "GRPO"))]
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(rows))[::-1]
    middle = np.array([line["ratio"] for line in rows])
    ends = np.abs(np.array([[line["ratio_low"], line["ratio_high"]] for line in rows]).T - middle)
    axes.errorbar(middle, place, xerr=ends, capsize=3, **style(1) | {"linestyle": ""})
    axes.set_yticks(place, [f"{_label(line)} ({line['workload']})" for line in rows])
    axes.set_xscale("log")
    for axis_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_format(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("ratio of tokens a second")
    figure.savefig(target, dpi=150)
