"""Which policy writes a batch: layers drawn by a skip sampler, patched, perhaps on bytes."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.distributed import Ranks
from agents.rollout import Rollout
from envs.task import Task
from policies import Drafter, LayerSubset, Length, Nested, PatchedSubset, Policy, Probe, SkipSampler, with_int8
from policies.nested import Change, layers_of
from policies.skipping.divergence import Text
from policies.skipping.samplers import FullDepth
from registry import UsageError

PROBE_PROBLEMS = 16
PROBE_TOKENS = 32  # per completion


class Nesting:
    """Draws what writes each rollout.

    Args:
        sampler: which layers are kept, a component of ``registry.skip_samplers``.
        patch: how they make up for those skipped, a component of ``registry.patches``.
        int8: whether rollouts are by products on bytes.

    Attributes:
        layers: those kept by the last draw.
    """

    def __init__(self, sampler: SkipSampler, patch: Any, int8: bool = False) -> None:
        if not isinstance(sampler, SkipSampler):
            raise UsageError(f"the skip sampler {sampler!r} has to be a policies.SkipSampler: inherit from it")
        if isinstance(sampler, FullDepth) and patch.tokens:
            warnings.warn(f"patch={patch} has no effect: sampler={sampler} writes with every layer", stacklevel=3)
        self.sampler = sampler
        self.patcher = Patcher(patch)
        self.int8 = int8
        self.layers: LayerSubset = ()
        self._patched: Nested = ()

    def check(self, policy: Policy) -> None:
        """Raise ``UsageError`` for what the policy's layers do not allow, before anything is trained."""
        self.sampler.check(policy.num_layers)
        self.patcher.patch.check(policy)
        if self.int8:
            policy.check_functional("int8 rollouts")

    def prepare(self, policy: Policy, task: Task, seed: int, ranks: Ranks) -> None:
        """Let the sampler measure its scores on a few training problems.

        The problems are drawn apart from the iterations' own, so that agents with and without scores stay paired."""
        chosen = np.random.default_rng([seed, 0, 1]).integers(task.problems.size or 2**16, size=PROBE_PROBLEMS)
        prompts = [torch.from_numpy(np.asarray(task.prompt(int(problem)))) for problem in chosen]
        longest = task.spec.max_new_tokens
        length = Length(min(longest, PROBE_TOKENS), tuple(task.stop_token_ids))
        self.sampler.prepare(Probe(policy, prompts, length, seed, longest))
        # Every process measures the same; equal to the last bit they must be made, or they would skip different layers.
        self.sampler.load_state_dict(json.loads(ranks.agree_on(json.dumps(self.sampler.state_dict()))))

    def draw(self, policy: Policy, rng: np.random.Generator, iteration: int) -> Nested:
        """What writes the next rollout."""
        self._patched = self.patcher(policy, self.sampler.sample(policy.num_layers, rng), iteration)
        self.layers = layers_of(self._patched)
        return with_int8(self._patched, self.int8)

    def drafter(self, policy: Policy) -> Drafter | None:
        """What drafts tokens for it."""
        drafter = self.sampler.drafter(policy.num_layers)
        return None if drafter is None else replace(drafter, layers=with_int8(drafter.layers, self.int8))

    def is_off_policy(self, policy: Policy) -> bool:
        """Whether the last draw computes anything else than the target."""
        return self.int8 or policy.layers_skipped(self.layers) > 0

    def passes(self, policy: Policy) -> tuple[float, float]:
        """Shares of all layers: those that the last draw skips, and those that draft."""
        drafter = self.drafter(policy)
        drafting = 0.0 if drafter is None else 1 - policy.layers_skipped(layers_of(drafter.layers)) / policy.num_layers
        return policy.layers_skipped(self.layers) / policy.num_layers, drafting

    def trainable(self, policy: Policy) -> Nested | None:
        """The last draw in full precision, of which gradients can be taken; None where it skips nothing."""
        return self._patched if policy.layers_skipped(self.layers) else None

    def observe(self, rollout: Rollout, diagnostics: Mapping[str, float]) -> None:
        """What the next patches are fitted to, and what the layers drawn last cost."""
        self.patcher.observe(rollout)
        self.sampler.observe(self.layers, diagnostics)

    def metrics(self, policy: Policy) -> dict[str, float]:
        """Of the last draw."""
        skipped = policy.layers_skipped(self.layers)
        return {
            **self.patcher.metrics,
            **self.sampler.metrics(),
            "layers_kept": policy.num_layers - skipped,
            "skip_ratio": skipped / policy.num_layers,
        }


class Patcher:
    """Patches each subset that a sampler draws, on tokens of the rollout before.

    A subset that stays in use is fitted again every ``patch.every`` iterations, anchored at its patches so far; another
    subset is fitted anew. The first rollout, before there is anything to fit to, skips nothing.

    Args:
        patch: a component of ``registry.patches``.
    """

    def __init__(self, patch: Any) -> None:
        self.patch = patch
        self.text: Text | None = None
        self.fitted: PatchedSubset | None = None
        self.fitted_at = 0
        self.metrics: dict[str, float] = {}

    def __call__(self, policy: Policy, layers: LayerSubset, iteration: int) -> Nested:
        """``layers`` patched, or all layers while there is nothing to fit to. ``metrics`` then says what was fitted;
        the seconds of a fit are part of the rollout's."""
        self.metrics = {}
        if not self.patch.tokens or policy.layers_skipped(layers) == 0:
            return layers
        if self.text is None:
            return tuple(range(policy.num_layers))
        before = self.fitted if self.fitted is not None and self.fitted.layers == layers else None
        if before is not None and iteration - self.fitted_at < self.patch.every:
            return before
        began = time.perf_counter()
        fit = self.patch.fit(policy, self.text, layers, before)
        self.fitted, self.fitted_at = fit.subset, iteration
        self.metrics = {"patch/residual": fit.residual, "time/patch": time.perf_counter() - began}
        return fit.subset

    def observe(self, rollout: Rollout) -> None:
        """Keep the rollout's first completions, as many as ``patch.tokens`` holds."""
        if not self.patch.tokens:
            return
        room, seen, count = self.patch.tokens, set(), 0
        for prompt, length in zip(rollout.prompts, rollout.mask.sum(1).tolist(), strict=True):
            room -= length + (len(prompt) if id(prompt) not in seen else 0)
            seen.add(id(prompt))
            if room < 0 and count:
                break
            count += 1
        chosen = rollout.select(torch.arange(count))
        self.text = Text(list(chosen.prompts), chosen.tokens, chosen.mask)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and what JSON holds."""
        if self.text is None:
            return {}, {}
        number: dict[int, int] = {}
        group = [number.setdefault(id(prompt), len(number)) for prompt in self.text.prompts]
        distinct = [self.text.prompts[group.index(n)] for n in range(len(number))]
        tensors = {
            "tokens": self.text.tokens.contiguous(),
            "mask": self.text.mask.contiguous(),
            "group": torch.tensor(group),
            "prompts": torch.cat(distinct),
            "sizes": torch.tensor([len(prompt) for prompt in distinct]),
        }
        if self.fitted is None:
            return tensors, {}
        for half, change in self.fitted.changes.items():
            tensors |= {f"weight.{half}": change.weight, f"bias.{half}": change.bias}
        return tensors, {"layers": list(self.fitted.layers), "fitted_at": self.fitted_at}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        distinct = tensors["prompts"].split(tensors["sizes"].tolist())
        self.text = Text([distinct[n] for n in tensors["group"].tolist()], tensors["tokens"], tensors["mask"])
        if state:
            halves = sorted(int(name[7:]) for name in tensors if name.startswith("weight."))
            changes = {half: Change(tensors[f"weight.{half}"], tensors[f"bias.{half}"]) for half in halves}
            self.fitted, self.fitted_at = PatchedSubset(tuple(state["layers"]), changes), state["fitted_at"]
