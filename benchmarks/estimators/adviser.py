"""The adviser: from what a run measured of its divergence, a correction and a budget of skipped layers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from agents.monitoring.diagnostics import BySubset, of_fresh
from benchmarks.estimators.report import CANNOT_TELL, group_equal, rank, relative_efficiency
from benchmarks.estimators.settings import Sweep
from benchmarks.estimators.sweep import VOCABULARY, Row, cell_rows, noisy_cell
from benchmarks.measuring.table import Table
from policies import LayerSubset
from registry import UsageError

NEEDED = ("mean_length", "kl_k1", "chi2", "ess_sequence")
EASY_D, HOPELESS_D = 0.3, 2.0
SMALLEST_D = 0.01
SEEDS = 4
SUBSETS = 5
BEST = 6  # corrections that are shown


@dataclass(frozen=True)
class RunMeans:
    """Means over a run's iterations.

    Attributes:
        length: tokens per completion.
        kl: KL(mu || pi) per token, nats.
        chi2: of whole completions.
        ess: effective sample size of completions, as a fraction.
        skip_ratio: share of the layers left out, None where the run does not say.
        batch: completions per update, None where the run does not say.
        by_subset: the diagnostics per set of kept layers, the nearest to the target first.
    """

    length: float
    kl: float
    chi2: float
    ess: float
    skip_ratio: float | None
    batch: int | None
    by_subset: dict[LayerSubset, dict[str, float]]

    @property
    def d(self) -> float:
        """D = T * KL, nats per completion."""
        return self.length * self.kl


def read_means(run: Path) -> RunMeans:
    """Read a run's folder (``metrics.jsonl``). Raises ``UsageError`` naming what is missing."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{run} has no metrics.jsonl: give the folder of a run, runs/<hash>")
    rows = [of_fresh(json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if all(isinstance(row.get(name), int | float) for name in NEEDED)]
    if not rows:
        raise UsageError(
            f"{path} has no iteration with {', '.join(NEEDED)}: the adviser needs a run of nested-reft, or one of reft "
            "in which at least one group had both right and wrong completions"
        )
    subsets = BySubset()
    for row in rows:
        subsets.add(tuple(row.get("layers", ())), row)
    ratios = [row["skip_ratio"] for row in rows if "skip_ratio" in row]
    used = [row["sequences_used"] for row in rows if row.get("sequences_used")]
    means = {name: fmean(row[name] for row in rows) for name in NEEDED}
    return RunMeans(
        length=means["mean_length"],
        kl=max(means["kl_k1"], 0.0),
        chi2=means["chi2"],
        ess=means["ess_sequence"],
        skip_ratio=fmean(ratios) if ratios else None,
        batch=round(fmean(used)) if used else None,
        by_subset=subsets.table(),
    )


def nearest_rows(means: RunMeans, chosen: dict[str, Any]) -> list[Row]:
    """The lab's rows at the run's D and batch size (D within what the lab can reach)."""
    d = min(max(means.d, SMALLEST_D), HOPELESS_D)
    sweep = Sweep(batch=max(means.batch or Sweep.batch, 8))
    cells = (noisy_cell(VOCABULARY, 6, success, d, seed) for seed in range(SEEDS) for success in sweep.successes)
    return [row for cell in cells for row in cell_rows(cell, sweep, chosen)]


def advise(run: Path, chosen: dict[str, Any], console: Console) -> list[Row]:
    """Print the measurements, the ranking at that divergence and the budget; return the lab's rows."""
    means = read_means(run)
    console.print(
        f"{run}: {means.length:.1f} tokens per completion, KL per token {means.kl:.4g}, D = {means.d:.3g} nats per "
        f"completion, chi2 {means.chi2:.3g}, sequence ESS {means.ess:.3g} (of a large batch about exp(-2 D) = "
        f"{math.exp(-2 * means.d):.2g})",
        soft_wrap=True,
    )
    rows = nearest_rows(means, chosen)
    console.print(_ranking(rows))
    for text in [*budget(means), CANNOT_TELL]:
        console.print(text, soft_wrap=True)
    return rows


def _ranking(rows: Sequence[Row]) -> Table:
    """The corrections of the lab's rows that are best."""
    groups, lines = group_equal(rows), []
    for id in rank(rows)[:BEST]:
        own = [row for row in rows if row["correction"] == id]
        bias = fmean(row["relative_bias"] for row in own)
        lines.append(
            [
                " = ".join(groups[id]),
                "yes" if own[0]["declared_unbiased"] else "",
                "0" if bias < 1e-10 else f"{bias:.2f}",
                f"{fmean(row['variance_ratio'] for row in own):.3g}",
                f"{fmean(relative_efficiency(row) for row in own):.2f}",
            ]
        )
    title = f"The lab at D = {rows[0]['d']:.3g}, {rows[0]['batch']} completions per update (best first)"
    return Table(["correction", "unbiased", "bias", "variance", "efficiency / on-policy"], lines, title=title)


def budget(means: RunMeans) -> list[str]:
    """What to skip, in words."""
    said = []
    if means.d > HOPELESS_D:
        said.append(
            f"D = {means.d:.3g} is beyond {HOPELESS_D:g}: the ranking above is for D = {HOPELESS_D:g}. No unbiased "
            "reweighting works here; shorten the completions or skip less before choosing among corrections."
        )
    elif means.d <= EASY_D:
        said.append(f"D is at most {EASY_D:g}: the corrections differ little, and you may skip more.")
    allowed = EASY_D / max(means.length, 1e-9)
    said.append(
        f"Budget: at {means.length:.0f} tokens, D <= {EASY_D:g} asks for a KL per token of at most {allowed:.2g} "
        f"(D <= {HOPELESS_D:g}: {HOPELESS_D / max(means.length, 1e-9):.2g})."
    )
    if means.skip_ratio and means.kl > 0:
        ratio = means.skip_ratio * allowed / means.kl
        said.append(
            f"If KL grew in proportion to the layers skipped (an assumption: which layers matters more), skipping "
            f"{min(ratio, 1.0):.1%} of them would stay in it; the run skipped {means.skip_ratio:.1%}."
        )
    if len(means.by_subset) > 1:
        said.append("The nearest of the run's layer subsets (layers kept: KL per token, TV, sequence ESS, rollouts):")
        said += [
            f"  {list(subset)}: {one['kl_k3']:.3g}, {one['tv']:.2f}, {one['ess_sequence']:.2f}, {one['rollouts']:.0f}"
            for subset, one in list(means.by_subset.items())[:SUBSETS]
        ]
    return said
