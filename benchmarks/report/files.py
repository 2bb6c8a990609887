"""What a report writes: results.json, report.md, report.html and curves.png."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measuring.durable import json_text, storage_errors, write_whole
from benchmarks.report.comparison import Comparison


def write(comparison: Comparison, out: Path) -> None:
    """Write report.html, report.md, results.json and curves.png into ``out``."""
    from benchmarks.report.figures import learning_curves_png
    from benchmarks.report.sections import report

    page = report(comparison)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.json", json_text(as_json(comparison), indent=2) + "\n")
        (out / "curves.png").write_bytes(learning_curves_png(comparison))
        write_whole(out / "report.md", page.markdown())
        write_whole(out / "report.html", page.html())


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The report's numbers; runs by their hash, so that every number can be traced to its folder."""
    return {
        "title": comparison.grid.title,
        "source": comparison.grid.source,
        "command": comparison.command,
        "groups": [
            {
                "name": group.name,
                "baseline": group.baseline,
                "target": group.target,
                "arms": [
                    {**asdict(line), "runs": [run.result["hash"] for run in arm.runs]}
                    for arm, line in zip(group.arms, group.lines, strict=True)
                ],
                "pairs": [asdict(pair) for pair in group.pairs],
                "rivals": [asdict(pair) for pair in group.rivals],
            }
            for group in comparison.groups
        ],
        "failures": [asdict(failure) for failure in comparison.failures],
        "provenance": next((arm.runs[0].provenance for group in comparison.groups for arm in group.arms), {}),
    }
