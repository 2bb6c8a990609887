"""Patches in the loop: what they are fitted to, when, and how they are kept on disk."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.rollout import Rollout
from policies import LayerSubset, Length, Nested, PatchedSubset, Policy, Probe
from policies.nested import Change
from policies.skipping.divergence import Text

if TYPE_CHECKING:
    from agents.reft import ReFT


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

    def __call__(self, policy: Policy, layers: LayerSubset, iteration: int) -> tuple[LayerSubset, Nested]:
        """The layers to keep, and those patched. ``metrics`` then says what was fitted; its seconds are part of the
        rollout's."""
        self.metrics = {}
        if not self.patch.tokens or policy.layers_skipped(layers) == 0:
            return layers, layers
        if self.text is None:
            full = tuple(range(policy.num_layers))
            return full, full
        before = self.fitted if self.fitted is not None and self.fitted.layers == layers else None
        if before is not None and iteration - self.fitted_at < self.patch.every:
            return layers, before
        began = time.perf_counter()
        fit = self.patch.fit(policy, self.text, layers, before)
        self.fitted, self.fitted_at = fit.nested, iteration
        self.metrics = {"patch/residual": fit.residual, "time/patch": time.perf_counter() - began}
        return layers, fit.nested

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


PROBLEMS = 16  # and the tokens per completion that scores are measured on
TOKENS = 32


def check_sampler(sampler: Any, num_layers: int) -> None:
    """Raise ``UsageError`` for settings that cannot work with ``num_layers``, such as a ratio too high."""
    if hasattr(sampler, "check"):
        sampler.check(num_layers)
    else:
        sampler.sample(num_layers, np.random.default_rng(0))


def prepare_sampler(agent: ReFT) -> dict[str, float]:
    """Let the agent's sampler measure its scores on a few training problems; returns what that cost.

    The problems are drawn apart from the iterations' own, so that agents with and without scores stay paired."""
    began = time.perf_counter()
    task, seed = agent.envs.unwrapped.task, agent.seed or 0
    chosen = np.random.default_rng([seed, 0, 1]).integers(task.problems.size or 2**16, size=PROBLEMS)
    prompts = [torch.from_numpy(np.asarray(task.prompt(int(problem)))) for problem in chosen]
    longest = task.spec.max_new_tokens
    length = Length(min(longest, TOKENS), tuple(task.stop_token_ids))
    agent.sampler.prepare(Probe(agent.target, prompts, length, agent.temperature, seed, longest))
    # Every process measures the same; equal to the last bit they must be made, or they would skip different layers.
    agent.sampler.load_state_dict(json.loads(agent.ranks.agree_on(json.dumps(agent.sampler.state_dict()))))
    return {"time/prepare": time.perf_counter() - began}
