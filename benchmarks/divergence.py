"""Which layers to skip on a model and data of your own, and how many: the tool to run first.

    python -m benchmarks.divergence                                        the built-in model
    python -m benchmarks.divergence --policy FOLDER --problems svamp --json FILE --picture FILE

Every skip sampler at every number of skipped layers: exact KL(mu || pi) and total variation per token over the whole
vocabulary, on tokens that the *nested* policy mu itself wrote for held-out prompts; D, which decides what corrections
can do; the speed-up by weights, and as measured against the full model in pairs of blocks. Samplers that choose layers
by measured scores choose on other prompts, on tokens that the *full* model wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.divergence_report import arms, draw, layer_table, recommend, table
from benchmarks.durable import write_whole
from benchmarks.pairing import Block, abba, median_ratio
from benchmarks.provenance import provenance
from envs.task import Task, TaskSpec
from policies import LayerSubset, Length, Policy, Probe
from policies.divergence import compare, states, write
from policies.subset import HALVES, kept_blocks, without
from registry import UsageError, skip_samplers
from registry.fields import parse_value

LONGEST_PROMPT = 8192
DEFAULT_VARIANTS = ("attention-only:by=kl", "mlp-only:by=kl")
SHORTEST_BLOCK = 1.0  # seconds
GROUP = 2  # completions per prompt in the timed blocks


@dataclass
class Bench:
    """What is measured, and with what."""

    policy: Policy
    prompts: list[torch.Tensor]
    probe: Probe
    length: Length
    options: argparse.Namespace

    def __post_init__(self) -> None:
        self.full: LayerSubset = tuple(range(self.policy.num_layers))
        self._speed: dict[tuple[int, int], float] = {}

    def divergence(self, layers: LayerSubset) -> dict[str, float]:
        """KL, TV, D and mean length of ``layers`` on its own completions of the held-out prompts."""
        text = write(self.policy, layers, self.prompts, self.length, seed=self.options.seed)
        target, nested = (states(self.policy, text, subset) for subset in (self.full, layers))
        found = compare(self.policy, target, [nested])[0]
        return {
            "kl_per_token": found.kl,
            "kl_reverse": found.kl_reverse,
            "tv": found.tv,
            "acceptance": 1 - found.tv,
            "mean_length": text.mean_length,
            "D": found.kl * text.mean_length,
        }

    def speed(self, layers: LayerSubset) -> dict[str, Any]:
        """The speed-up of rollouts by weights, and measured; which layers are skipped makes no difference to it."""
        a, skipped = self.policy.architecture, self.policy.layers_skipped(layers)
        blocks = kept_blocks(layers)
        shape = (sum(block.attention for block in blocks), sum(block.mlp for block in blocks))
        if shape not in self._speed and self.options.pairs:
            pairs = abba(lambda: self._block(layers), lambda: self._block(self.full), self.options.pairs)
            self._speed[shape] = median_ratio(pairs).value
        ideal = 1 / (1 - a.layers_share * skipped / a.layers)
        return {"speedup_ideal": ideal, "speedup_measured": self._speed.get(shape)}

    def _block(self, layers: LayerSubset) -> Block:
        tokens, began, seconds = 0, time.perf_counter(), 0.0
        while seconds < SHORTEST_BLOCK:
            text = write(self.policy, layers, self.prompts * GROUP, Length(self.length.tokens))
            tokens, seconds = tokens + int(text.mask.sum()), time.perf_counter() - began
        return Block(tokens, seconds)

    def row(self, sampler: str, layers: LayerSubset, found: dict[str, float], ratio: float | None) -> dict[str, Any]:
        """One line of the JSON: a set of layers, where it comes from, and its figures."""
        kept, total = set(kept_blocks(layers)), self.policy.num_layers
        gone = [n for n in range(total) if not any(block.layer == n for block in kept)]
        halves = [f"{b.layer}.{HALVES[b.attention]}" for b in sorted(kept) if not (b.attention and b.mlp)]
        return {
            "sampler": sampler,
            "patch": "none",
            "skipped": self.policy.layers_skipped(layers),
            "num_layers": total,
            "layers": list(layers),
            "layers_skipped": [*gone, *halves],
            "ratio": ratio,
            "written_by": "full model" if ratio is None else "nested policy",
            **found,
            **self.speed(layers),
        }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.divergence", description=__doc__.split("\n")[0])
    found.add_argument("--policy", default="tiny", help="a model folder, a hub id or 'tiny'")
    found.add_argument("--problems", default="arithmetic", help="a known set, a file, a folder, a hub id")
    found.add_argument("--split", default="test", help="of the problems (default test)")
    found.add_argument("--template", default="plain", help="how a question becomes a prompt")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32 for 'tiny', else bfloat16")
    found.add_argument("--samplers", nargs="+", metavar="ID[:FIELD=VALUE,...]", help="default: all that take a ratio")
    found.add_argument("--skips", nargs="+", type=int, default=[2, 4, 6], help="numbers of skipped layers")
    found.add_argument("--border", type=int, default=1, help="first and last layers that are never skipped")
    found.add_argument("--prompts", type=int, default=16, help="held-out prompts that figures are measured on")
    found.add_argument("--choose-prompts", type=int, default=16, help="other prompts that layers are chosen on")
    found.add_argument("--new-tokens", type=int, default=48, help="longest completion")
    found.add_argument("--draws", type=int, default=2, help="sets of each sampler that draws at random")
    found.add_argument("--pairs", type=int, default=4, help="pairs of timed blocks per speed-up; 0 times nothing")
    found.add_argument("--budget", type=float, default=0.3, help="largest D, in nats per completion, to recommend")
    found.add_argument("--no-layers", action="store_true", help="leave out the table of single layers")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--threads", type=int, help="of torch (default: all cores)")
    found.add_argument("--json", type=Path, help="write the rows here, as they are measured")
    found.add_argument("--picture", type=Path, help="write the picture here (png, svg)")
    return found


def make_bench(options: argparse.Namespace) -> Bench:
    """Load the policy and two disjoint sets of prompts."""
    dtype = options.dtype or ("float32" if options.policy == "tiny" else "bfloat16")
    policy = Policy.load(options.policy, dtype=dtype)
    tokenizer = "builtin" if options.policy == "tiny" else options.policy
    task = Task(
        TaskSpec(
            problems=options.problems,
            split=options.split,
            tokenizer=tokenizer,
            template=options.template,
            max_prompt_tokens=LONGEST_PROMPT,
        )
    )
    count = options.prompts + options.choose_prompts
    size = task.problems.size or 2**20
    if size < count:
        raise UsageError(
            f"{task.problems.name} has {size} problems, but {options.prompts} held-out prompts and "
            f"{options.choose_prompts} others are wanted: lower --prompts and --choose-prompts"
        )
    chosen = np.random.default_rng(options.seed).choice(size, count, replace=False)
    prompts = [torch.from_numpy(task.prompt(int(index))) for index in chosen]
    length = Length(options.new_tokens, tuple(task.stop_token_ids))
    probe = Probe(policy, prompts[options.prompts :], length, seed=options.seed)
    return Bench(policy, prompts[: options.prompts], probe, length, options)


def sampler_of(spec: str, ratio: float, border: int) -> Any:
    """The sampler of ``id`` or ``id:field=value,...`` at a ratio."""
    id, _, given = spec.partition(":")
    known = skip_samplers.fields(id)
    if "ratio" not in known:
        raise UsageError(f"sampler {id!r} has no ratio, so it cannot be compared at equal numbers of layers")
    fields: dict[str, Any] = {"ratio": ratio} | ({"border": border} if "border" in known else {})
    for part in given.split(",") if given else ():
        name, _, value = part.partition("=")
        fields[name] = parse_value(value, known[name].type, f"{id}.{name}") if name in known else value
    return skip_samplers.make(id, **fields)


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
            if hasattr(sampler, "check"):
                sampler.check(layers)
            if not getattr(sampler, "ready", True):
                sampler.prepare(bench.probe)
            draws = (sampler.sample(layers, np.random.default_rng([options.seed, n])) for n in range(options.draws))
            for subset in dict.fromkeys(draws):
                if subset not in known:
                    known[subset] = bench.divergence(subset)
                yield bench.row(spec, subset, known[subset], skips / layers)


def single_layers(bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of every layer skipped alone, and of its halves, on tokens that the full model wrote."""
    total, length = bench.policy.num_layers, bench.probe.text.mean_length
    for half in (None, *HALVES):
        for n, one in enumerate(bench.probe.each(half)):
            subset = without([n if half is None else f"{n}.{half}"], total)
            found = {"kl_per_token": one.kl, "kl_reverse": one.kl_reverse, "tv": one.tv, "acceptance": 1 - one.tv}
            found |= {"mean_length": length, "D": one.kl * length, "influence": bench.probe.influence[n]}
            yield bench.row("one layer" if half is None else f"one {half}", subset, found, None)


def check(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` for numbers that make no sense."""
    for name, least in (("prompts", 1), ("choose_prompts", 1), ("new_tokens", 1), ("draws", 1), ("pairs", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {least}")
    if min(options.skips) < 1:
        raise UsageError(f"--skips {min(options.skips)}: give at least 1")


def collect_rows(bench: Bench) -> list[dict[str, Any]]:
    """All rows, written to ``--json`` and told of on stderr as they come."""
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    facts = provenance()
    sources = [measured_sets(bench)] if bench.options.no_layers else [single_layers(bench), measured_sets(bench)]
    for source in sources:
        for row in source:
            rows.append(row | {"provenance": facts} if not rows else row)
            gone = " ".join(map(str, row["layers_skipped"]))
            print(
                f"{time.perf_counter() - began:6.0f} s  {row['sampler']}: without {gone}: "
                f"{row['kl_per_token']:.3f} nats per token, D {row['D']:.2f}",
                file=sys.stderr,
                flush=True,
            )
            if bench.options.json:
                write_whole(bench.options.json, json.dumps(rows, indent=1) + "\n")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 for bad input."""
    options = parser().parse_args(arguments)
    try:
        check(options)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        bench = make_bench(options)
        for spec in options.samplers or ():
            sampler_of(spec, max(options.skips) / bench.policy.num_layers, options.border)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        rows = collect_rows(bench)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    singles = [row for row in rows if row["written_by"] == "full model"]
    found = arms([row for row in rows if row["written_by"] == "nested policy"])
    if singles:
        layer_table(singles)
    table(found)
    print(recommend(found, options.budget))
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(found, options.budget, options.picture, f"{Path(options.policy).name} on {options.problems}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
