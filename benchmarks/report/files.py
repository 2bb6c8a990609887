"""What a report writes: results.json, outcomes.json, report.md, report.html and curves.png."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.comparison.differences import NoPair, Pair
from benchmarks.comparison.stored import Stored
from benchmarks.measuring.durable import json_text, storage_errors, write_whole
from benchmarks.report.comparison import Comparison, Group


def write(comparison: Comparison, out: Path) -> None:
    """Write report.html, report.md, results.json, curves.png and outcomes.json into ``out``; the outcomes of a second
    group go to outcomes-2.json."""
    from benchmarks.report.figures import learning_curves_png
    from benchmarks.report.sections import report

    page = report(comparison)
    markdown, html, curves = page.markdown(), page.html(), learning_curves_png(comparison)  # all of it or nothing
    with storage_errors(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.json", json_text(as_json(comparison), indent=2) + "\n")
        for n, group in enumerate(comparison.groups, 1):
            name = "outcomes.json" if n == 1 else f"outcomes-{n}.json"
            write_whole(out / name, json_text(stored(group).as_json()) + "\n")
        (out / "curves.png").write_bytes(curves)
        write_whole(out / "report.md", markdown)
        write_whole(out / "report.html", html)


def stored(group: Group) -> Stored:
    """The outcomes that everything said of a group follows from."""
    rivals = tuple((pair.label, pair.baseline) for pair in group.rivals)
    return Stored(group.name, group.arms, group.baseline, rivals)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The report's numbers; runs by their hash, so that every number can be traced to its folder."""
    return {
        "title": comparison.title,
        "source": comparison.source,
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
                "margin": group.margin,
                "pairs": [_pair(pair) for pair in group.pairs],
                "rivals": [_pair(pair) for pair in group.rivals],
            }
            for group in comparison.groups
        ],
        "failures": [asdict(failure) for failure in comparison.failures],
        "provenance": next((arm.runs[0].provenance for group in comparison.groups for arm in group.arms), {}),
    }


def _pair(pair: Pair | NoPair) -> dict[str, Any]:
    """A pair with what is concluded of each difference, under the name of its axis."""
    if isinstance(pair, NoPair):
        return asdict(pair)
    said: dict[str, Any] = {**asdict(pair), "time_ratio": pair.time_ratio._asdict()}
    said |= {
        axis: {
            **asdict(one),
            "verdict": one.verdict,
            "verdict_holm": one.verdict_holm,
            "equivalent": one.equivalent,
        }
        for axis, one in pair.at_equal.items()
    }
    return {name: value for name, value in said.items() if name != "at_equal"}
