"""What ``benchmarks.divergence`` measures of one set of layers, on a policy and prompts of the user's."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.measuring.pairing import Block, abba, median_ratio
from envs.task import Task, TaskSpec
from policies import LayerSubset, Length, Nested, Policy, Probe, with_int8
from policies.nested import HALVES, is_int8, kept_blocks
from policies.skipping.divergence import Text, compare, completions, states, write
from registry import Registry, UsageError, parse_value, patches
from registry.command import assignment

LONGEST_PROMPT = 8192
SHORTEST_BLOCK = 1.0  # seconds
GROUP = 2  # completions per prompt in the timed blocks


@dataclass
class Bench:
    """What is measured, and with what."""

    policy: Policy
    prompts: list[torch.Tensor]
    probe: Probe
    fitted_on: list[torch.Tensor]
    length: Length
    options: argparse.Namespace

    def __post_init__(self) -> None:
        self.full: LayerSubset = tuple(range(self.policy.num_layers))
        self._speed: dict[tuple[int, int, bool], float] = {}
        self._texts: dict[int, Text] = {}

    def _fit_text(self, number: int) -> Text:
        """What the full model wrote for fit ``number``."""
        if number not in self._texts:
            seed = self.options.seed + 1 + 2 * number
            self._texts[number] = write(self.policy, self.full, self.fitted_on, self.length, seed=seed)
        return self._texts[number]

    def patched(self, spec: str, layers: LayerSubset, number: int = 0) -> dict[str, Any]:
        """``divergence`` of a patched subset, and what its fit says and took.

        Args:
            spec: of the patch, as ``make_component``.
            number: of the fit; each has completions of its own. With ``--both-texts`` a first fit, to a quarter of
                them, writes as many, and the patch is fitted to both.
        """
        began = time.perf_counter()
        patch, text = make_component(patches, spec), self._fit_text(number)
        if self.options.both_texts:
            first = patch.fit(self.policy, text.first(max(1, len(text.mask) // 4)), layers).subset
            seed = self.options.seed + 2 + 2 * number
            text = text + write(self.policy, first, self.fitted_on, self.length, seed=seed)
        fit = patch.fit(self.policy, text, layers)
        cost = {"fit_seconds": time.perf_counter() - began, "fit_residual": fit.residual, "fit_tokens": text.size}
        return self.divergence(fit.subset) | cost | {"fit": number}

    def divergence(self, mu: Nested) -> dict[str, Any]:
        """KL, TV, D and mean length of ``mu`` on its own completions of the held-out prompts."""
        text = write(self.policy, mu, self.prompts, self.length, seed=self.options.seed)
        target, nested = (states(self.policy, text, subset) for subset in (self.full, mu))
        figures = compare(self.policy, target, [nested], int8=is_int8(mu))[0]
        of_prompt = torch.zeros(len(text.mask)).index_add_(0, completions(self.policy, text), figures.each.cpu())
        return {
            "kl_per_token": figures.kl,
            "kl_reverse": figures.kl_reverse,
            "tv": figures.tv,
            "acceptance": 1 - figures.tv,
            "mean_length": text.mean_length,
            "D": figures.kl * text.mean_length,
            "kl_of_prompts": of_prompt.tolist(),
            "tokens_of_prompts": text.mask.sum(1).tolist(),
        }

    def speed(self, layers: LayerSubset, int8: bool = False) -> dict[str, Any]:
        """The speed-up of rollouts by weights skipped, and measured; which layers are skipped makes no difference to
        it."""
        a, skipped = self.policy.architecture, self.policy.layers_skipped(layers)
        blocks, mu = kept_blocks(layers), with_int8(layers, int8)
        shape = (sum(block.attention for block in blocks), sum(block.mlp for block in blocks), int8)
        if shape not in self._speed and self.options.pairs:
            pairs = abba(lambda: self._block(mu), lambda: self._block(self.full), self.options.pairs)
            self._speed[shape] = median_ratio(pairs).value
        ideal = 1 / (1 - a.layers_share * skipped / a.layers)
        return {"speedup_ideal": ideal, "speedup_measured": self._speed.get(shape)}

    def _block(self, layers: Nested) -> Block:
        tokens, began, seconds = 0, time.perf_counter(), 0.0
        while seconds < SHORTEST_BLOCK:
            text = write(self.policy, layers, self.prompts * GROUP, Length(self.length.tokens))
            tokens, seconds = tokens + int(text.mask.sum()), time.perf_counter() - began
        return Block(tokens, seconds)

    def row(
        self, sampler: str, layers: LayerSubset, figures: dict[str, float], ratio: float | None, int8: bool = False
    ) -> dict[str, Any]:
        """One line of the JSON: a set of layers, where it comes from, and its figures. Patches cost nothing in
        rollouts, so their speed-up is that of the plain skip."""
        kept, total = set(kept_blocks(layers)), self.policy.num_layers
        gone = [n for n in range(total) if not any(block.layer == n for block in kept)]
        halves = [f"{b.layer}.{HALVES[b.attention]}" for b in sorted(kept) if not (b.attention and b.mlp)]
        return {
            "sampler": sampler,
            "patch": "int8" if int8 else "none",
            "skipped": self.policy.layers_skipped(layers),
            "num_layers": total,
            "layers": list(layers),
            "layers_skipped": [*gone, *halves],
            "ratio": ratio,
            "written_by": "full model" if ratio is None else "nested policy",
            **figures,
            **self.speed(layers, int8),
        }


def make_component(registry: Registry, spec: str, **fields: Any) -> Any:
    """The component of ``id`` or ``id:field=value,...``; what the spec gives goes before ``fields``."""
    id, _, given = spec.partition(":")
    known = registry.fields(id)
    for part in re.split(r",(?=\w+=)", given) if given else ():  # a value may be a list: fixed:layers=4,5,border=2
        name, value = assignment(part, f"{id}:")
        fields[name] = parse_value(value, known[name].type, f"{id}.{name}") if name in known else value
    return registry.make(id, **fields)


def prompts_of(task: Task, count: int, seed: int) -> list[torch.Tensor]:
    """``count`` prompts of different problems."""
    size = task.problems.size or 2**20
    if size < count:
        raise UsageError(
            f"{task.problems.name} has {size} problems in its split {task.spec.split!r}, but {count} different prompts "
            "are wanted: lower --prompts, --choose-prompts or --fit-prompts"
        )
    return [torch.from_numpy(task.prompt(int(n))) for n in np.random.default_rng(seed).choice(size, count, False)]


def make_bench(options: argparse.Namespace) -> Bench:
    """Load the policy and three disjoint sets of prompts."""
    policy = Policy.load(options.policy, dtype=options.dtype)
    tokenizer = "builtin" if options.policy == "tiny" else options.policy
    tasks = {
        split: Task(
            TaskSpec(
                problems=options.problems,
                split=split,
                tokenizer=tokenizer,
                template=options.template,
                max_prompt_tokens=LONGEST_PROMPT,
            )
        )
        for split in dict.fromkeys((options.split, options.fit_split or options.split))
    }
    task = tasks[options.split]
    held_out, others = options.prompts, options.prompts + options.choose_prompts
    apart = (options.fit_split or options.split) != options.split
    fitted = options.fit_prompts if options.patches else 0
    prompts = prompts_of(task, others + (0 if apart else fitted), options.seed)
    fitted_on = prompts_of(tasks[options.fit_split], fitted, options.seed) if apart else prompts[others:]
    length = Length(options.new_tokens, tuple(task.stop_token_ids))
    probe = Probe(policy, prompts[held_out:others], length, seed=options.seed)
    return Bench(policy, prompts[:held_out], probe, fitted_on, length, options)
