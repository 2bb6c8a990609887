"""The rows of ``benchmarks.throughput``: the engine at several depths against others, in ABBA pairs of blocks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from agents.memory import peak_bytes
from benchmarks.measuring.pairing import Block, abba, median_ratio, processor_ratio
from benchmarks.speed.limits import bandwidth_limit, product_limit
from benchmarks.speed.ours import Engine, Parts
from benchmarks.speed.process import EngineProcess
from benchmarks.speed.transformers_generate import ContinuousBatching, Generate
from benchmarks.speed.work import Work, kept_layers, make_work
from policies import Policy, with_int8
from registry import UsageError

BATCHES = (32, 64, 128)
WARM_UPS = 2  # iterations: the first ones of a process are slower, until memory has been touched
COLUMNS = ("name", "workload", "tokens_per_second", "ratio", "ratio_low", "ratio_high", "against")


def all_rows(policy: Policy, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the command line asks for."""
    chosen = {"both": ("forced", "natural"), "none": ()}.get(options.workload, (options.workload,))
    for workload in chosen:
        work = make_work(options, policy, workload == "natural")
        with engine_processes(policy, work, options) as others:
            yield from measure(policy, work, workload, options, others)
    if options.iteration or options.trl:
        yield from iteration_rows(policy, options)


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
    """Rows of all layers with products on bytes, against each of ``peers`` by its name, where the model allows them and
    the device has a kernel of its own."""
    if policy.device.type == "cuda":
        print("no int8 rows: a GPU has no kernel of them, and bfloat16 is four times as fast", file=sys.stderr)
        return
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
        titles = {name: None} if policy.device.type == "cuda" else {name: None, f"{name}, int8 rollouts": "int8"}
        for title, rollout_dtype in titles.items():
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


def ratio_row(name: str, workload: str, pairs: list[tuple[Block, Block]], against: str) -> dict[str, Any]:
    """One line of the table: the first block of each pair is that of ``name``, the second that of ``against``."""
    ratio = median_ratio(pairs)
    rate = float(np.median([ours.rate for ours, _ in pairs]))
    values = (name, workload, rate, ratio.value, ratio.low, ratio.high, against)
    line = dict(zip(COLUMNS, values, strict=True))
    busy = processor_ratio(pairs)
    return line if busy is None else line | {"processor_ratio": busy}


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
