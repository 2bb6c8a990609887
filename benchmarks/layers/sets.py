"""The rows of ``benchmarks.divergence``: which sets of layers are measured, in what order."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.layers.bench import Bench, make_component
from benchmarks.layers.report import arms
from benchmarks.measuring.durable import json_text, write_whole
from benchmarks.measuring.provenance import provenance
from policies import LayerSubset, with_int8
from policies.nested import HALVES, without
from registry import UsageError, did_you_mean, patches, skip_samplers

DEFAULT_VARIANTS = ("attention-only:by=kl", "mlp-only:by=kl")


def collect_rows(bench: Bench) -> list[dict[str, Any]]:
    """All rows, written to ``--json`` and told of on stderr as they come."""
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    facts = provenance()

    def sources() -> Iterator[Iterator[dict[str, Any]]]:
        if not bench.options.no_layers:
            yield single_layers(bench)
        yield measured_sets(bench)
        plain = [row for row in rows if row["ratio"] is not None]
        if bench.options.patches:
            yield patched_sets(bench, plain)
        yield byte_sets(bench, worth_a_patch(plain, bench.options.patched))

    for source in sources():
        for row in source:
            rows.append(row | {"provenance": facts} if not rows else row)
            gone = " ".join(map(str, row["layers_skipped"])) or "nothing"
            print(
                f"{time.perf_counter() - began:6.0f} s  {row['sampler']}, patch {row['patch']}: without {gone}: "
                f"{row['kl_per_token']:.3f} nats per token, D {row['D']:.2f}",
                file=sys.stderr,
                flush=True,
            )
            if bench.options.json:
                write_whole(bench.options.json, json_text(rows, indent=1) + "\n")
    return rows


def single_layers(bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of every layer skipped alone, and of its halves, on tokens that the full model wrote."""
    total, length = bench.policy.num_layers, bench.probe.text.mean_length
    for half in (None, *HALVES):
        for n, one in enumerate(bench.probe.each(half)):
            subset = without([n if half is None else f"{n}.{half}"], total)
            figures = {"kl_per_token": one.kl, "kl_reverse": one.kl_reverse, "tv": one.tv, "acceptance": 1 - one.tv}
            figures |= {"mean_length": length, "D": one.kl * length, "influence": bench.probe.influence[n]}
            yield bench.row("one layer" if half is None else f"one {half}", subset, figures, None)


def measured_sets(bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of every sampler, each as it is measured."""
    options, layers = bench.options, bench.policy.num_layers
    known: dict[LayerSubset, dict[str, float]] = {}
    for spec in options.samplers or default_samplers():
        for skips in options.skips:
            sampler = sampler_of(spec, skips / layers, options.border)
            sampler.check(layers)
            if not sampler.ready:
                sampler.prepare(bench.probe)
            draws = (sampler.sample(layers, np.random.default_rng([options.seed, n])) for n in range(options.draws))
            for subset in dict.fromkeys(draws):
                if subset not in known:
                    known[subset] = bench.divergence(subset)
                yield bench.row(spec, subset, known[subset], skips / layers)


def patched_sets(bench: Bench, plain: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of the sets of ``plain`` that are worth a patch, patched."""
    for row in worth_a_patch(plain, bench.options.patched):
        layers = tuple(row["layers"])
        for patch in bench.options.patches:
            for number in range(bench.options.fits):
                figures = bench.patched(patch, layers, number)
                yield bench.row(row["sampler"], layers, figures, row["ratio"]) | {"patch": patch}


def byte_sets(bench: Bench, plain: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of all layers, and of the sets of ``plain`` that are worth a patch, with products on bytes."""
    sets = [("full", bench.full, 0.0), *((row["sampler"], tuple(row["layers"]), row["ratio"]) for row in plain)]
    for sampler, layers, ratio in sets:
        try:
            figures = bench.divergence(with_int8(layers))
        except UsageError as error:
            print(f"no int8 rows: {error}", file=sys.stderr)
            return
        yield bench.row(sampler, layers, figures, ratio, int8=True)


def worth_a_patch(plain: list[dict[str, Any]], samplers: list[str] | None) -> list[dict[str, Any]]:
    """The rows of ``samplers``; by default at each ratio those of the two samplers of whole layers nearest to the
    target, and of ``uniform``."""
    if samplers:
        return [row for row in plain if row["sampler"] in samplers or "all" in samplers]
    chosen = []
    for ratio in dict.fromkeys(row["ratio"] for row in plain):
        own = [row for row in plain if row["ratio"] == ratio]
        whole = [arm["sampler"] for arm in arms(own) if all(isinstance(n, int) for n in arm["example"])]
        wanted = {*whole[:2], "uniform"}
        chosen += [row for row in own if row["sampler"] in wanted]
    return chosen


def sampler_of(spec: str, ratio: float, border: int) -> Any:
    """The sampler of ``id`` or ``id:field=value,...`` at a ratio."""
    known = skip_samplers.fields(spec.partition(":")[0])
    if "ratio" not in known:
        raise UsageError(f"sampler {spec!r} has no ratio, so it cannot be compared at equal numbers of layers")
    return make_component(skip_samplers, spec, ratio=ratio, **({"border": border} if "border" in known else {}))


def default_samplers() -> list[str]:
    """All registered samplers with a ratio; ``fixed`` draws what ``uniform`` draws."""
    return [*(id for id in skip_samplers if "ratio" in skip_samplers.fields(id) and id != "fixed"), *DEFAULT_VARIANTS]


def leave_out_patches(bench: Bench) -> None:
    """Leave out, with a sentence, the patches that the policy's layers do not take."""
    kept = []
    for spec in bench.options.patches:
        try:
            make_component(patches, spec).check(bench.policy)
            kept.append(spec)
        except UsageError as error:
            print(f"no rows of patch {spec}: {error}", file=sys.stderr)
    bench.options.patches = kept


def check_names(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` for unknown patches, and for samplers to patch that are not measured."""
    for patch in options.patches:
        make_component(patches, patch)
    measured = ["all", *(options.samplers or default_samplers())]
    for spec in options.patched or ():
        if spec not in measured:
            raise UsageError(f"--patched {spec!r} is not among --samplers: {did_you_mean(spec, measured)}")
