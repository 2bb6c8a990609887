"""Which layers to skip on a model and data of your own, and how many: the tool to run first.

    python -m benchmarks.divergence                                        the built-in model
    python -m benchmarks.divergence --policy FOLDER --problems svamp --json FILE --picture FILE

Every skip sampler at every number of skipped layers: exact KL(mu || pi) and total variation per token over the whole
vocabulary, on tokens that the *nested* policy mu itself wrote for held-out prompts; D, which decides what corrections
can do; the speed-up by weights, and as measured against the full model in pairs of blocks. Samplers that choose layers
by measured scores choose on other prompts, on tokens that the *full* model wrote. Patches (``--patches``) are fitted on
yet other prompts, to the two nearest samplers at each number of layers and to ``uniform``, or to those of
``--patched``. Where ``uniform`` was measured, each sampler's KL over that of plain ``uniform`` has its interval.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.layers.bench import Bench, make_bench, make_component
from benchmarks.layers.report import against_uniform, arms, draw, layer_table, recommend, table
from benchmarks.measuring.durable import json_text, write_whole
from benchmarks.measuring.provenance import provenance
from policies import LayerSubset, with_int8
from policies.nested import HALVES, without
from registry import UsageError, did_you_mean, patches, skip_samplers
from registry.command import command
from registry.paths import WriteFile, WritePicture

DEFAULT_VARIANTS = ("attention-only:by=kl", "mlp-only:by=kl")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.divergence", description=__doc__.split("\n")[0])
    options.add_argument("--policy", default="tiny", help="a model folder, a hub id or 'tiny'")
    options.add_argument("--problems", default="arithmetic", help="a known set, a file, a folder, a hub id")
    options.add_argument("--split", default="test", help="of the problems (default test)")
    options.add_argument("--template", default="plain", help="how a question becomes a prompt")
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the products (default: what is fast here)",
    )
    options.add_argument("--samplers", nargs="+", metavar="ID[:FIELD=VALUE,...]", help="default: all that take a ratio")
    options.add_argument(
        "--patches",
        nargs="*",
        default=["heal"],
        metavar="ID[:FIELD=VALUE,...]",
        help="besides 'none' (default heal)",
    )
    options.add_argument("--patched", nargs="+", metavar="SAMPLER", help="samplers to patch; 'all' is long")
    options.add_argument("--fits", type=int, default=1, help="of each patch to each set, on texts of their own")
    options.add_argument("--both-texts", action="store_true", help="fit to what the patched policy writes, too")
    options.add_argument("--skips", nargs="+", type=int, default=[2, 4, 6], help="numbers of skipped layers")
    options.add_argument("--border", type=int, default=1, help="first and last layers that are never skipped")
    options.add_argument("--prompts", type=int, default=16, help="held-out prompts that figures are measured on")
    options.add_argument("--choose-prompts", type=int, default=16, help="other prompts that layers are chosen on")
    options.add_argument("--fit-prompts", type=int, default=32, help="yet other prompts that patches are fitted on")
    options.add_argument("--fit-split", help="that these are of (default --split, other problems)")
    options.add_argument("--new-tokens", type=int, default=48, help="longest completion")
    options.add_argument("--draws", type=int, default=2, help="sets of each sampler that draws at random")
    options.add_argument("--pairs", type=int, default=4, help="pairs of timed blocks per speed-up; 0 times nothing")
    options.add_argument("--budget", type=float, default=0.3, help="largest D, in nats per completion, to recommend")
    options.add_argument("--no-layers", action="store_true", help="leave out the table of single layers")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, help="of torch (default: all cores)")
    options.add_argument("--json", action=WriteFile, help="write the rows here, as they are measured")
    options.add_argument("--picture", action=WritePicture, help="write the picture here (png, svg)")
    return options


def sampler_of(spec: str, ratio: float, border: int) -> Any:
    """The sampler of ``id`` or ``id:field=value,...`` at a ratio."""
    known = skip_samplers.fields(spec.partition(":")[0])
    if "ratio" not in known:
        raise UsageError(f"sampler {spec!r} has no ratio, so it cannot be compared at equal numbers of layers")
    return make_component(skip_samplers, spec, ratio=ratio, **({"border": border} if "border" in known else {}))


def default_samplers() -> list[str]:
    """All registered samplers with a ratio; ``fixed`` draws what ``uniform`` draws."""
    return [*(id for id in skip_samplers if "ratio" in skip_samplers.fields(id) and id != "fixed"), *DEFAULT_VARIANTS]


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


def single_layers(bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of every layer skipped alone, and of its halves, on tokens that the full model wrote."""
    total, length = bench.policy.num_layers, bench.probe.text.mean_length
    for half in (None, *HALVES):
        for n, one in enumerate(bench.probe.each(half)):
            subset = without([n if half is None else f"{n}.{half}"], total)
            figures = {"kl_per_token": one.kl, "kl_reverse": one.kl_reverse, "tv": one.tv, "acceptance": 1 - one.tv}
            figures |= {"mean_length": length, "D": one.kl * length, "influence": bench.probe.influence[n]}
            yield bench.row("one layer" if half is None else f"one {half}", subset, figures, None)


def check(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` for numbers that make no sense and for unknown names."""
    for patch in options.patches:
        make_component(patches, patch)
    for name, least in (
        ("prompts", 1),
        ("choose_prompts", 1),
        ("fit_prompts", 1),
        ("new_tokens", 1),
        ("fits", 1),
        ("draws", 1),
        ("pairs", 0),
        ("threads", 1),
    ):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {least}")
    if min(options.skips) < 1:
        raise UsageError(f"--skips {min(options.skips)}: give at least 1")
    if not options.budget >= 0:
        raise UsageError(f"--budget {options.budget:g}: give a number of nats, from 0 on")
    measured = ["all", *(options.samplers or default_samplers())]
    for spec in options.patched or ():
        if spec not in measured:
            raise UsageError(f"--patched {spec!r} is not among --samplers: {did_you_mean(spec, measured)}")


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


@command(interrupted="--json keeps the rows so far")
def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 for bad input."""
    options = parser().parse_args(arguments)
    check(options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    bench = make_bench(options)
    most, layers = max(options.skips), bench.policy.num_layers
    if most >= layers:
        raise UsageError(f"--skips {most}: the model has {layers} layers, and one has to stay")
    for spec in options.samplers or default_samplers():
        sampler_of(spec, most / layers, options.border).check(layers)
    leave_out_patches(bench)
    rows = collect_rows(bench)
    singles = [row for row in rows if row["written_by"] == "full model"]
    measured = arms([row for row in rows if row["written_by"] == "nested policy"])
    if singles:
        layer_table(singles)
    table(measured)
    for line in against_uniform([row for row in rows if row["written_by"] == "nested policy"]):
        print(line)
    print(recommend(measured, options.budget))
    if options.picture:
        draw(measured, options.budget, options.picture, f"{Path(options.policy).name} on {options.problems}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
