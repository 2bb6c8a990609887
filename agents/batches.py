"""Batch sources: where the groups of a batch come from.

A batch is written afresh (``fresh``), or some of its groups are those of earlier iterations (``replay``), or weights of
some iterations ago write it (``stale``). A stored completion keeps log mu, the log-probabilities that it was sampled
with, so that every correction applies to it: rho = pi / mu with the older policy as mu. What a trust region is relative
to stays pi_old, the target when the update begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.refill import joined
from agents.rollout import Rollout
from agents.weight_copy import WeightCopy
from policies import Policy
from registry import UsageError, batches

UNITS = ("batch", "group")


class BatchSource(Protocol):
    """A registered batch source.

    Attributes:
        keeps: for how many iterations written groups are kept; 0 for none.
        lag: by how many iterations the weights that write are behind the target.
    """

    @property
    def keeps(self) -> int: ...

    @property
    def lag(self) -> int: ...

    def recall(
        self, age: NDArray[np.int64], reward: NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Which stored groups take the place of as many fresh ones; what is lacking is written.

        Args:
            age: [groups] iterations since each stored group was written, 1 to ``keeps``; at least one group.
            reward: [groups, G] of their completions.
            count: groups of the batch.
            rng: keyed by seed and iteration.

        Returns:
            At most ``count`` different positions in ``age``.
        """
        ...


@batches.register("fresh")
@dataclass(frozen=True)
class Fresh:
    """Every group is written by the present weights.

    Use: unless rollouts are dear or come late.
    """

    keeps: ClassVar[int] = 0
    lag: ClassVar[int] = 0

    def recall(
        self, age: NDArray[np.int64], reward: NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        return np.zeros(0, dtype=np.int64)


@batches.register("replay")
@dataclass(frozen=True)
class Replay:
    """Some groups are those of the last iterations, which cost no rollout (ReMix, arXiv 2507.06892).

    By ``batch``, as in the paper, a batch is a stored one with the probability ``share``, else a fresh one. By
    ``group``, our reading for batches that are to mix both, every batch has that share of stored groups, drawn without
    replacement from all that are kept. Of which iteration a stored batch is, is drawn uniformly (our reading).

    ``token-is*ppo-clip`` weighs by pi / mu while pi / mu is within s (1 +- eps), s = pi_old / mu; the paper's own clip
    has s +- eps. Its m updates a batch are ``epochs``.

    Nothing older than ``window`` iterations takes part, and where nothing is kept groups are written; so rollouts go on
    whatever the share. The store holds at most window * B * T * 13 bytes (17 with defensive groups) for B completions
    of at most T tokens, beside prompts and verdicts: 7 MB at a window of 2, B = 256 and T = 1,024.

    Use: where writing takes most of an iteration.

    Attributes:
        share: in [0, 1]; .4 in the paper.
        window: N, in iterations; 2 in the paper.
        by: ``batch`` or ``group``.
    """

    share: float = 0.4
    window: int = 2
    by: str = "batch"
    lag: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"replay: share={self.share} must be in [0, 1], the expected share of stored groups")
        if self.window < 1:
            raise UsageError(f"replay: window={self.window} must be at least 1; batch=fresh stores nothing")
        if self.by not in UNITS:
            raise UsageError(f"replay: by={self.by!r} must be one of {', '.join(UNITS)}")

    @property
    def keeps(self) -> int:
        return self.window if self.share else 0

    def recall(
        self, age: NDArray[np.int64], reward: NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        if self.by == "group":
            return rng.permutation(len(age))[: round(self.share * count)]
        if rng.random() >= self.share:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(age == rng.choice(np.unique(age)))[:count]


@batches.register("stale")
@dataclass(frozen=True)
class Stale:
    """Weights of some iterations ago write every batch, the first weights until there are such: the data of
    asynchronous training, without its concurrency. log mu is the older weights' own.

    As many copies of the trained weights are kept: iterations * 4 bytes a trained weight.

    Use: to measure what asynchronous training would cost, correction by correction.

    Attributes:
        iterations: k; 0 is ``fresh``.
    """

    iterations: int = 1
    keeps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise UsageError(f"stale: iterations={self.iterations} must be at least 0, which is batch=fresh")

    @property
    def lag(self) -> int:
        return self.iterations

    recall = Fresh.recall


class Batching:
    """A batch source, and what it keeps.

    Args:
        source: a component of ``registry.batches``.
        policy: the target, whose present weights are the first that write.
        group_size: G.
        target_written: n_0, of defensive groups.
        seed: of what is recalled.

    Attributes:
        kept: the batches written, by iteration.
        copies: the weights that write, in turn; ``taken`` says at the beginning of which iteration they were the
            target's.
        age: of the weights that wrote last.
        is_writing: whether older weights are in place.
    """

    def __init__(self, source: Any, policy: Policy, group_size: int, target_written: int, seed: int) -> None:
        self.source: BatchSource = source
        self.group_size = group_size
        self.target_written = target_written
        self.seed = seed
        self.kept: dict[int, Rollout] = {}
        self.copies = [WeightCopy(policy) for _ in range(source.lag)]
        self.taken = [0] * source.lag
        self.age = 0
        self.is_writing = False

    @property
    def is_plain(self) -> bool:
        """Whether every group is fresh, by the present weights."""
        return not (self.source.keeps or self.copies)

    def recall(self, iteration: int, count: int) -> Rollout | None:
        """Stored groups that take the place of as many of ``count`` fresh ones; None where all are to be written."""
        kept = {n: self.kept[n] for n in sorted(self.kept) if 0 < iteration - n <= self.source.keeps}
        if not kept:
            return None
        whole = reduce(joined, (replace(r, age=torch.full((len(r),), iteration - n)) for n, r in kept.items()))
        assert whole.age is not None
        age = whole.age[:: self.group_size].numpy()
        reward = whole.reward.view(-1, self.group_size).numpy()
        rng = np.random.default_rng([self.seed, iteration, 3])
        chosen = torch.as_tensor(np.asarray(self.source.recall(age, reward, count, rng), dtype=np.int64))
        if len(chosen) > count or len(chosen.unique()) < len(chosen) or not ((chosen >= 0) & (chosen < len(age))).all():
            raise UsageError(
                f"{type(self.source).__name__}.recall returned {chosen.tolist()}: return at most {count} different "
                f"positions of the {len(age)} stored groups"
            )
        if not len(chosen):
            return None
        rows = (chosen[:, None] * self.group_size + torch.arange(self.group_size)).flatten()
        return replace(whole.select(rows), group=torch.arange(len(rows)) // self.group_size)

    @contextmanager
    def writing(self, iteration: int) -> Iterator[None]:
        """Inside, the weights that write in this iteration are the policy's."""
        if not self.copies:
            yield
            return
        with self.copies[iteration % len(self.copies)].in_place():
            self.is_writing = True
            try:
                yield
            finally:
                self.is_writing = False

    def __call__(
        self, fresh: Rollout, stored: Rollout | None, score: Callable[[Rollout], Tensor], iteration: int
    ) -> Rollout:
        """The batch of fresh groups and of those recalled. The fresh ones, and the target's present weights where such
        write later, are kept from here on; ``score`` gives a rollout's log-probabilities [B, T] under the policy's
        weights of that moment."""
        if self.is_plain:
            return fresh
        if len(fresh):
            if fresh.by_target is not None:
                with self.writing(iteration):
                    fresh = replace(fresh, target_logp=score(fresh))
            if self.source.keeps:
                fresh = fresh.select(torch.arange(len(fresh)))
                self.kept[iteration] = fresh
        if self.copies:
            slot = iteration % len(self.copies)
            self.age, self.taken[slot] = iteration - self.taken[slot], iteration
            self.copies[slot].take()
        self.kept = {n: rollout for n, rollout in self.kept.items() if iteration - n < self.source.keeps}
        if stored is None:
            return fresh
        if not len(fresh):
            return stored
        fresh = replace(fresh, age=torch.zeros(len(fresh), dtype=torch.int64))
        return joined(fresh, replace(stored, group=stored.group + int(fresh.group.max()) + 1))

    def metrics(self, batch: Rollout) -> dict[str, float]:
        """``age``: iterations since the weights that wrote were the target's, mean over completions;
        ``stored_share``: of the batch's completions."""
        if self.copies:
            return {"age": float(self.age)}
        if not self.source.keeps:
            return {}
        age = torch.zeros(len(batch)) if batch.age is None else batch.age.double()
        return {"age": float(age.mean()), "stored_share": float((age > 0).double().mean())}

    def restart(self, iteration: int) -> None:
        """Begin at the policy's present weights, with nothing stored."""
        self.kept = {}
        self.taken = [iteration] * len(self.copies)
        for copy in self.copies:
            copy.take()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and what JSON holds; both empty where nothing is kept."""
        tensors = {f"copy.{n}.{name}": v for n, copy in enumerate(self.copies) for name, v in copy.state_dict().items()}
        episodes = {}
        for n, rollout in self.kept.items():
            tensors |= {f"rollout.{n}.{name}": value for name, value in _tensors_of(rollout, self.group_size).items()}
            episodes[str(n)] = json.loads(json.dumps(rollout.episodes, default=lambda value: value.item()))
        if not tensors:
            return {}, {}
        groups = {"group_size": self.group_size, "target_written": self.target_written}
        return tensors, {"taken": self.taken, "episodes": episodes, **groups}

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave; what this source does not keep is left out.

        Raises:
            UsageError: the groups stored are of another make, or other weights write.
        """
        if self.copies:
            if len(state["taken"]) != len(self.copies):
                raise UsageError(
                    f"{len(state['taken'])} copies of the weights were saved, and this batch source needs "
                    f"{len(self.copies)}: go on with the saved batch, or start anew from the weights"
                )
            self.taken = list(state["taken"])
            for n, copy in enumerate(self.copies):
                copy.load_state_dict(_below(tensors, f"copy.{n}."))
        if not self.source.keeps:
            return
        for name in ("group_size", "target_written"):
            if state["episodes"] and state[name] != getattr(self, name):
                raise UsageError(
                    f"stored groups are of {name}={state[name]}, and cannot go on with {name}={getattr(self, name)}: "
                    f"give {state[name]}, or batch=fresh"
                )
        for n, episodes in state["episodes"].items():
            self.kept[int(n)] = _rollout_of(_below(tensors, f"rollout.{n}."), episodes, self.group_size)


def _tensors_of(rollout: Rollout, group_size: int) -> dict[str, Tensor]:
    """All but the episodes; each group's prompt once."""
    known = {field.name: getattr(rollout, field.name) for field in fields(Rollout)}
    tensors = {name: value.contiguous() for name, value in known.items() if isinstance(value, Tensor)}
    prompts = rollout.prompts[::group_size]
    return {**tensors, "prompts": torch.cat(prompts), "sizes": torch.tensor([len(prompt) for prompt in prompts])}


def _rollout_of(tensors: dict[str, Tensor], episodes: list[dict[str, Any]], group_size: int) -> Rollout:
    """What ``_tensors_of`` took apart."""
    prompts = tensors.pop("prompts").split(tensors.pop("sizes").tolist())
    parts: dict[str, Any] = {**tensors, "episodes": tuple(episodes)}
    return Rollout(prompts=tuple(prompt for prompt in prompts for _ in range(group_size)), **parts)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
