"""The skip sampler that learns what layers cost, and skips as many as a budget of divergence allows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.nested import LayerSubset, kept_blocks, without
from policies.skipping.costs import LayerCosts
from policies.skipping.probe import Probe
from policies.skipping.samplers import SkipSampler, inner_layers
from registry import UsageError, skip_samplers

OPTIMISM = 2.0  # standard deviations below its expected cost at which a layer is still worth a trial
PROBE_NOISE = 0.1  # log sd of an exactly measured set, on another text
MEMORY = 0.7  # of the mean completion length, per batch
ENOUGH_TOKENS = 300  # behind a batch's KL, from which on it is as sure as ``noise`` says
TAIL_RATIO = (
    2.0  # (1 - overlap)^2 / KL of the tail, until measured: twice the largest mean loss (Pinsker's 1/2, squared)
)


class BudgetAllowsNothing(UserWarning):
    """No layer can be skipped within the budget."""


@skip_samplers.register("budget")
@dataclass(frozen=True)
class BudgetSkip(SkipSampler):
    """Skips as many inner layers as keep D, the divergence of a completion in nats, within ``budget``: at D < 0.3 most
    corrections work, at D > 2 no unbiased one but ``defensive``.

    D is predicted as tokens per completion times KL per token, with a belief over the layers' costs that every training
    step's own log-probabilities update (``costs``). Layers are tried in the order of costs drawn from that
    belief (Thompson sampling), and a layer is taken if the set's expected cost plus ``caution`` standard deviations
    stays in the budget. ``prepare`` measures every layer once, as a start. If nothing fits, one layer that might fit is
    tried; if none might, the full model writes, with a warning and the metric ``sampler/off``. Whole layers only.

    With ``tail`` a set has to keep the worst completions near the target, too: the 5th percentile of their agreement
    with it (the agents' ``overlap_q05``), which has told stable runs from collapsing ones of equal means (arXiv
    2606.08446, where .86 held). It is predicted as 1 - sqrt(c KL), the form in which Pinsker's inequality bounds its
    mean, with c = 1/2; c is measured with every batch.

    Use: where D should stay in a range while the model moves, rather than the number of layers.

    Attributes:
        budget: largest D per completion, as the agents measure it: over all completions of a rollout.
        tail: least agreement of the worst completions, in [0, 1); 0 asks for none.
        border: number of first and of last layers that are never skipped.
        most: largest share of all layers that is skipped.
        caution: standard deviations of the belief that are added to what a set is expected to cost.
        explore: how often a random layer takes the place of the dearest one skipped, if it might fit.
        drift: by how much (in log) a layer's cost may change from one batch to the next.
        noise: log standard deviation of a batch's measured KL around the model of it, where at least 300 tokens stand
            behind it (the agents' ``tokens``); with fewer it grows as the square root of what is missing.
    """

    budget: float = 0.3
    border: int = 1
    most: float = 0.5
    caution: float = 1.0
    explore: float = 0.1
    drift: float = 0.05
    noise: float = 0.2
    tail: float = 0.0
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check(self, num_layers: int) -> None:
        """Raise ``UsageError`` for settings that cannot work with ``num_layers``."""
        inner_layers(self.border, num_layers)
        if not (self.budget > 0 and 0 < self.most < 1 and self.caution >= 0 and 0 <= self.explore <= 1):
            raise UsageError(
                f"budget={self.budget} must be positive, most={self.most} in (0, 1), caution={self.caution} at least "
                f"0, explore={self.explore} in [0, 1]"
            )
        if not 0 <= self.tail < 1:
            raise UsageError(f"tail={self.tail} must be in [0, 1): the share of agreement to hold, 0 for none")
        if self.drift < 0 or self.noise <= 0:
            raise UsageError(f"drift={self.drift} must be at least 0 and noise={self.noise} positive")

    @property
    def ready(self) -> bool:
        """Whether anything is known of the layers; ``sample`` works without, more slowly."""
        return "costs" in self._state

    def prepare(self, probe: Probe) -> None:
        """Measure every layer alone, and then the set that these costs would choose."""
        costs = self._state["costs"] = LayerCosts.measured(probe.kl())
        self._state["length"] = float(probe.longest)
        chosen = self._affordable(np.argsort(costs.mean[:-1]), probe.num_layers)
        if len(chosen) > 1:
            costs.update(chosen, probe.set_kl(chosen), PROBE_NOISE)

    def sample(self, num_layers: int, rng: np.random.Generator) -> LayerSubset:
        """The subset for the next batch."""
        self.check(num_layers)
        costs = self._costs(num_layers)
        drawn = costs.draw(rng)
        chosen = self._affordable(np.argsort(drawn), num_layers)
        trial = self._trial(chosen, num_layers, rng)
        if trial is not None:
            chosen = trial
        self._state["metrics"] = {
            "sampler/predicted_D": math.exp(costs.predict(chosen)[0]) * self._length if chosen else 0.0,
            "sampler/trial": float(trial is not None),
            "sampler/off": float(not chosen),
        }
        if self.tail:
            lost = math.sqrt(self._tail_ratio * math.exp(costs.predict(chosen)[0])) if chosen else 0.0
            self._state["metrics"]["sampler/predicted_overlap"] = max(0.0, 1 - lost)
        if not chosen and not self._state.get("warned"):
            self._state["warned"] = True
            self._warn(num_layers)
        return without(chosen, num_layers)

    def observe(self, layers: LayerSubset, diagnostics: Mapping[str, float]) -> None:
        """Learn from a batch: ``mean_length``, the mean of ``kl_k1`` and ``kl_k3`` (the first is noisy where KL is
        small, the second where it is large), and for a ``tail`` ``overlap_q05``."""
        num_layers = self._state["layers"]
        costs = self._costs(num_layers)
        costs.widen(self.drift)
        if diagnostics.get("mean_length"):
            length = diagnostics["mean_length"]
            before = self._state["length"] if self._state.get("seen") else length
            self._state.update(length=MEMORY * before + (1 - MEMORY) * length, seen=True)
        kept = {block.layer for block in kept_blocks(layers)}
        skipped = [n for n in range(num_layers) if n not in kept]
        estimates = [diagnostics[name] for name in ("kl_k1", "kl_k3") if name in diagnostics]
        if skipped and estimates:
            few = max(1.0, ENOUGH_TOKENS / max(diagnostics.get("tokens", ENOUGH_TOKENS), 1.0))
            kl = sum(estimates) / len(estimates)
            costs.update(skipped, kl, self.noise * math.sqrt(few))
            if self.tail and kl > 0 and diagnostics.get("overlap_q05", 1.0) < 1:
                measured = (1 - diagnostics["overlap_q05"]) ** 2 / kl
                self._state["tail_ratio"] = self._tail_ratio**MEMORY * measured ** (1 - MEMORY)

    def metrics(self) -> dict[str, float]:
        """Of the last sample: the D it is expected to have, whether it tries a layer out, whether nothing fits."""
        return dict(self._state.get("metrics", {}))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the belief, the completion length, what was said."""
        state = {name: value for name, value in self._state.items() if name != "costs"}
        return state | ({"costs": self._state["costs"].state_dict()} if self.ready else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._state.clear()
        self._state.update(state)
        if "costs" in state:
            self._state["costs"] = LayerCosts.from_state(state["costs"])

    @property
    def _length(self) -> float:
        return self._state.get("length", 256.0)  # tokens per completion, until any was seen

    @property
    def _tail_ratio(self) -> float:
        return self._state.get("tail_ratio", TAIL_RATIO)

    def _costs(self, num_layers: int) -> LayerCosts:
        self._state["layers"] = num_layers
        return self._state.setdefault("costs", LayerCosts.unknown(num_layers))

    def _fits(self, skipped: Sequence[int], deviations: float) -> bool:
        expected, spread = self._state["costs"].predict(skipped)
        most = self.budget / self._length
        if self.tail:
            most = min(most, (1 - self.tail) ** 2 / self._tail_ratio)
        return expected + deviations * spread <= math.log(most)

    def _affordable(self, order: Sequence[int] | np.ndarray, num_layers: int) -> list[int]:
        """Layers taken in ``order``, each if the set with it surely fits."""
        inner = set(inner_layers(self.border, num_layers).tolist())
        chosen: list[int] = []
        for n in (int(n) for n in order if int(n) in inner):
            if len(chosen) + 1 > self.most * num_layers:
                break
            if self._fits([*chosen, n], self.caution):
                chosen.append(n)
        return chosen

    def _trial(self, chosen: list[int], num_layers: int, rng: np.random.Generator) -> list[int] | None:
        """A set to learn from: ``chosen`` with its dearest layer replaced by a random one that might fit."""
        mean = self._state["costs"].mean
        rest = sorted(chosen, key=lambda n: mean[n])[:-1]
        inner = [int(n) for n in inner_layers(self.border, num_layers) if n not in chosen]
        tempting = [n for n in inner if self._fits([*rest, n], -OPTIMISM)]
        if tempting and (not chosen or rng.random() < self.explore):
            return [*rest, int(rng.choice(tempting))]
        return None

    def _warn(self, num_layers: int) -> None:
        inner = inner_layers(self.border, num_layers).tolist()
        cheapest = min((self._state["costs"].predict([n])[0] for n in inner), default=math.inf)
        tail, lower = (f" and the tail of {self.tail:g}", ", lower sampler.tail") if self.tail else ("", "")
        warnings.warn(
            f"the budget of D = {self.budget:g} nats per completion{tail} allows no layer to be skipped: the cheapest "
            f"one is expected to cost {math.exp(cheapest) * self._length:.2g} over {self._length:.0f} tokens. The full "
            f"model writes until that changes; raise sampler.budget{lower}, or shorten the completions",
            BudgetAllowsNothing,
            stacklevel=3,
        )
