"""How fast completions are written: the engine at several depths against transformers' generate and other engines.

    python -m benchmarks.throughput                                  the built-in model
    python -m benchmarks.throughput --policy FOLDER --dtype bfloat16 --prompts 64 --new-tokens 128 --json FILE
    python -m benchmarks.throughput --policy FOLDER --vllm .venv-vllm/bin/python --openvino .venv-openvino/bin/python

Every ratio is a median over ABBA pairs of blocks, with a bootstrap interval; the first row is the engine against itself
(A/A), whose interval should hold 1. Rollouts go through the environment, verdicts included. vLLM and OpenVINO write in
processes of their own, which wait while others are measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.memory import peak_bytes
from benchmarks.measuring.durable import json_text
from benchmarks.measuring.pairing import Block, abba, median_ratio, processor_ratio
from benchmarks.measuring.provenance import provenance
from benchmarks.measuring.table import Table, console
from benchmarks.speed.limits import bandwidth_limit, product_limit
from benchmarks.speed.ours import Engine, Parts
from benchmarks.speed.process import EngineProcess
from benchmarks.speed.transformers_generate import ContinuousBatching, Generate
from benchmarks.speed.work import Work, kept_layers, make_work
from policies import Policy, with_int8
from policies.dtype import settle_dtype
from policies.pretrained.load import BUILT_IN
from registry import UsageError
from registry.command import command
from registry.paths import WriteFile, WritePicture

SKIPS = (1, 2, 4, 8)
QUICK_SKIPS = (2, 4)
BATCHES = (32, 64, 128)
WARM_UPS = 2  # iterations: the first ones of a process are slower, until memory has been touched
COLUMNS = ("name", "workload", "tokens_per_second", "ratio", "ratio_low", "ratio_high", "against")
FIGURES = ("of_ideal", "of_products", "outside", "of_bandwidth", "occupancy", "head_share", "peak_gb")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.split("\n")[0])
    options.add_argument("--policy", default="tiny", help="a model folder, a hub id or 'tiny'")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the products (default: what is fast here)",
    )
    options.add_argument("--problems", default="arithmetic", help="a known set, a file, a folder, a hub id")
    options.add_argument("--split", default="train", help="of the problems (default train)")
    options.add_argument("--template", default="plain", help="of the prompts, see envs.templates (default plain)")
    options.add_argument("--prompts", type=int, help="problems a block (default 32; quick, a model of yours: 8)")
    options.add_argument("--group-size", type=int, default=8, help="completions a problem")
    options.add_argument("--new-tokens", type=int, help="longest completion (default 64; quick, a model of yours: 16)")
    options.add_argument("--slots", type=int, default=64)
    options.add_argument("--pairs", type=int, default=8, help="pairs of blocks a ratio")
    options.add_argument("--skips", nargs="*", type=int, help="numbers of skipped layers (default 1 2 4 8; quick: 2 4)")
    options.add_argument("--batch", type=int, help="of transformers' generate (default: the fastest of 32, 64 and 128)")
    options.add_argument("--alone", action="store_true", help="no engine but the project's own: what its depths take")
    options.add_argument("--continuous", action="store_true", help="also transformers' continuous batching (slow)")
    options.add_argument("--vllm", metavar="PYTHON", help="also vLLM, in the environment of this interpreter")
    options.add_argument("--openvino", metavar="PYTHON", help="also OpenVINO GenAI, likewise (a CPU's)")
    options.add_argument("--iteration", action="store_true", help="also a whole GRPO iteration")
    options.add_argument(
        "--trl",
        action="store_true",
        help="also a whole GRPO iteration against TRL's (needs trl); with --vllm, vLLM writes TRL's",
    )
    options.add_argument("--workload", choices=("forced", "natural", "both", "none"), help="lengths")
    options.add_argument("--threads", type=int, help="of torch (default: all cores)")
    options.add_argument("--quick", action="store_true", help="under three minutes: 3 pairs, skips 0, 2, 4, less work")
    options.add_argument("--json", action=WriteFile, help="write the rows here")
    options.add_argument("--picture", action=WritePicture, help="write a picture here (png, svg)")
    return options


def chosen_skips(options: argparse.Namespace, layers: int) -> tuple[int, ...]:
    """Numbers of skipped layers: those given, else those of the default that the model has room for."""
    if options.skips is None:
        return tuple(skips for skips in (QUICK_SKIPS if options.quick else SKIPS) if skips < layers - 1)
    for skips in options.skips:
        if not 0 < skips < layers - 1:
            raise UsageError(f"--skips {skips}: give 1 to {layers - 2}, the first and the last layer are kept")
    return tuple(options.skips)


def settle_work(options: argparse.Namespace) -> None:
    """Set what the command line left open. A quick comparison of a model of the user's has one wave of short
    completions a block, and forced length alone; pairs and their order are those of the others."""
    small = options.quick and options.policy not in BUILT_IN
    for name, usual, quick in (("prompts", 32, 8), ("new_tokens", 64, 16), ("workload", "both", "forced")):
        if getattr(options, name) is None:
            setattr(options, name, quick if small else usual)
    if options.quick:
        options.pairs = min(options.pairs, 3)
        options.batch = options.batch or 64


def ratio_row(name: str, workload: str, pairs: list[tuple[Block, Block]], against: str) -> dict[str, Any]:
    """One line of the table: the first block of each pair is that of ``name``, the second that of ``against``."""
    ratio = median_ratio(pairs)
    rate = float(np.median([ours.rate for ours, _ in pairs]))
    values = (name, workload, rate, ratio.value, ratio.low, ratio.high, against)
    line = dict(zip(COLUMNS, values, strict=True))
    busy = processor_ratio(pairs)
    return line if busy is None else line | {"processor_ratio": busy}


@contextmanager
def engine_processes(policy: Policy, work: Work, options: argparse.Namespace) -> Iterator[Mapping[str, EngineProcess]]:
    """The other engines that are asked for, by name, each warmed up by a block."""
    peers: dict[str, EngineProcess] = {}
    with ExitStack() as stack:
        for name, engine, int8 in (
            ("vLLM", "vllm", False),
            ("OpenVINO", "openvino", False),
            ("OpenVINO, int8 weights", "openvino", True),
        ):
            if python := getattr(options, engine):
                peers[name] = EngineProcess(engine, python, policy, work, int8)
                stack.callback(peers[name].close)
        for peer in peers.values():  # all of them start at once
            peer()
        yield peers


def measure(
    policy: Policy, work: Work, workload: str, options: argparse.Namespace, others: Mapping[str, EngineProcess]
) -> Iterator[dict[str, Any]]:
    """All rows of one workload, each as soon as it is measured; ``others`` are engines beside generate, if any are
    wanted."""
    full = Engine(policy, work, kept_layers(policy, 0))
    full()  # builds kernels, packs weights, touches memory
    full.parts = Parts(slots=options.slots)
    yield ratio_row("engine, again (A/A)", workload, abba(full, full, options.pairs), "engine")
    if not options.alone:
        yield from beside_others(policy, work, workload, options, full, others)
    share = full.parts.layers / full.parts.total
    for skips in options.skips:
        nested = Engine(policy, work, kept_layers(policy, skips))
        name = f"engine, {skips} of {policy.num_layers} skipped"
        line = ratio_row(name, workload, abba(nested, full, options.pairs), "engine")
        ideal = 1 / (1 - share * skips / policy.num_layers)
        yield line | {"of_ideal": line["ratio"] / ideal, "occupancy": nested.parts.occupancy}


def beside_others(
    policy: Policy,
    work: Work,
    workload: str,
    options: argparse.Namespace,
    full: Engine,
    others: Mapping[str, EngineProcess],
) -> Iterator[dict[str, Any]]:
    """Rows of the engine with all layers, in the compute dtype and on bytes, against generate and ``others``."""
    batch = options.batch or fastest_batch(policy, work)
    generate = f"generate (batch {batch})"
    peers: dict[str, Callable[[], Block]] = {generate: Generate(policy, work, batch)}
    peers |= {name: peer for name, peer in others.items() if not peer.int8}
    if options.continuous:
        peers[f"continuous batching ({batch})"] = ContinuousBatching(policy, work, batch)
    for name, peer in peers.items():
        pairs = abba(full, peer, options.pairs)
        line = ratio_row("engine", workload, pairs, name)
        yield line | engine_figures(policy, work, full, line["tokens_per_second"])
        yield ratio_row(name, workload, [(theirs, ours) for ours, theirs in pairs], "engine")
    beside: dict[str, Callable[[], Block]] = {"engine": full, **others}
    if not options.quick:
        beside[generate] = peers[generate]
    yield from by_bytes(policy, work, workload, beside, options.pairs)


def by_bytes(
    policy: Policy, work: Work, workload: str, peers: Mapping[str, Callable[[], Block]], pairs: int
) -> Iterator[dict[str, Any]]:
    """Rows of all layers with products on bytes, against each of ``peers`` by its name, where the model allows them."""
    try:
        engine = Engine(policy, work, with_int8(kept_layers(policy, 0)))
        engine()
    except UsageError as error:
        print(f"no int8 rows: {error}", file=sys.stderr)
        return
    engine.parts = Parts(slots=work.env.num_envs)
    for against, peer in peers.items():
        line = ratio_row("engine, int8", workload, abba(engine, peer, pairs), against)
        yield line | engine_figures(policy, work, engine, line["tokens_per_second"], int8=True)


def fastest_batch(policy: Policy, work: Work) -> int:
    """Of generate, by one block each; none larger than the work."""
    possible = [size for size in BATCHES if size <= len(work.problems) * work.group_size] or BATCHES[:1]
    if len(possible) == 1:
        return possible[0]
    Generate(policy, work, possible[0])()  # warms up
    return max(possible, key=lambda size: Generate(policy, work, size)().rate)


def iteration_rows(policy: Policy, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a whole iteration, with rollouts in the compute dtype against itself or, if asked for, with rollouts
    in the compute dtype and on bytes against TRL's."""
    from benchmarks.speed.iteration import OurIteration
    from benchmarks.speed.trl import TrlProcess
    from benchmarks.speed.work import iteration_work

    work = iteration_work(options, policy)
    name = f"GRPO iteration, {len(work.problems)} x {options.group_size} x {work.new_tokens}"
    if not options.trl:
        ours = OurIteration(policy, work)
        for _ in range(WARM_UPS):
            ours()
        yield iteration_row(name, ours, ours, options.pairs, "itself")
        return
    against = f"TRL's GRPOTrainer step{', vLLM writes' if options.vllm else ''}"
    theirs = TrlProcess(options)
    try:
        for _ in range(WARM_UPS):  # without trl, the first says so at once
            theirs()
        for title, rollout_dtype in ((name, None), (f"{name}, int8 rollouts", "int8")):
            ours = OurIteration(policy, work, rollout_dtype)
            for _ in range(WARM_UPS):
                ours()
            yield iteration_row(title, ours, theirs, min(options.pairs, 4), against)
    finally:
        theirs.close()


def iteration_row(name: str, ours: Any, theirs: Callable[[], Block], pairs: int, against: str) -> dict[str, Any]:
    """Of an ``OurIteration``; ``outside`` is the share of it that is not matrix products of weights."""
    blocks = abba(ours, theirs, pairs)
    seconds = float(np.median([block.seconds for block, _ in blocks]))
    return ratio_row(name, "forced", blocks, against) | {"outside": 1 - ours.product_seconds() / seconds}


def engine_figures(policy: Policy, work: Work, engine: Engine, rate: float, int8: bool = False) -> dict[str, float]:
    """What was measured of an engine beside its rate; ``outside`` is the share of a rollout, prefill, environment and
    verdicts included, that is not spent in matrix products."""
    busy = max(1, round(engine.parts.occupancy * work.env.num_envs))
    context = float(np.mean([len(work.prompt(p)) for p in work.problems])) + work.new_tokens / 2
    products = product_limit(policy, busy, int8)
    return {
        "of_products": rate / products,
        "outside": 1 - (engine.parts.tokens + engine.parts.prompt_tokens) / products / engine.parts.total,
        "of_bandwidth": rate / bandwidth_limit(policy, busy, context, int8),
        "occupancy": engine.parts.occupancy,
        "head_share": engine.parts.head / engine.parts.total,
        "layer_share": engine.parts.layers / engine.parts.total,
        "peak_gb": peak_gb(policy.device),
    }


def peak_gb(device: torch.device) -> float:
    """The most memory that this process has held: of the GPU where it computes there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_bytes() / 2**30


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


def all_rows(policy: Policy, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the command line asks for."""
    chosen = {"both": ("forced", "natural"), "none": ()}.get(options.workload, (options.workload,))
    for workload in chosen:
        work = make_work(options, policy, workload == "natural")
        with engine_processes(policy, work, options) as others:
            yield from measure(policy, work, workload, options, others)
    if options.iteration or options.trl:
        yield from iteration_rows(policy, options)


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


@command(interrupted="--json keeps the rows so far")
def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 for bad input."""
    options = parser().parse_args(arguments)
    settle_work(options)
    for name in ("prompts", "group_size", "new_tokens", "slots", "pairs", "batch", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    for name in ("vllm", "openvino", "continuous", "batch"):
        if options.alone and getattr(options, name):
            raise UsageError(f"--alone measures no other engine: leave out one of it and --{name}")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    options.dtype = settle_dtype(options.dtype, options.policy, options.device)
    policy = Policy.load(options.policy, options.device, options.dtype)
    options.skips = chosen_skips(options, policy.num_layers)
    rows = record_rows(all_rows(policy, options), options.json)
    show(rows)
    if options.picture:
        draw(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
