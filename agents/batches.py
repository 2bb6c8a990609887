"""Batch sources: where the groups of a batch come from.

A batch is written afresh (``fresh``), or some of its groups are those of earlier iterations (``replay``), or weights of
some iterations ago write it (``stale``), or stored completions of the same problem join a group whose own are all wrong
or all right (``contrast``). Sources multiply: ``replay*expert`` is both in one batch. A stored completion keeps log mu,
the log-probabilities that it was sampled with, so that every correction applies to it: rho = pi / mu with the older
policy as mu. What a trust region is relative to stays pi_old, the target when the update begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.metrics import unshaped_rewards
from agents.refill import joined
from agents.rollout import Rollout
from agents.weight_copy import WeightCopy
from policies import Policy
from registry import UsageError, batches

UNITS = ("batch", "group")


class BatchSource(Protocol):
    """A registered batch source.

    Two more things may be declared: ``until``, the iterations after which a source recalls nothing any more, and
    ``join`` and ``scale``, by which stored completions join fresh groups, as in ``Contrast``.

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
        until: iterations after which every batch is fresh, as at the paper's reincarnation; 0 for never.
    """

    share: float = 0.4
    window: int = 2
    by: str = "batch"
    until: int = 0
    lag: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"replay: share={self.share} must be in [0, 1], the expected share of stored groups")
        if self.window < 1:
            raise UsageError(f"replay: window={self.window} must be at least 1; batch=fresh stores nothing")
        if self.by not in UNITS:
            raise UsageError(f"replay: by={self.by!r} must be one of {', '.join(UNITS)}")
        if self.until < 0:
            raise UsageError(f"replay: until={self.until} must be at least 0, which is for the whole run")

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


@batches.register("contrast")
@dataclass(frozen=True)
class Contrast(Fresh):
    """Stored right completions join a fresh group that is all wrong, and wrong ones a group that is all right: the
    cross-context replay of R^3 (arXiv 2601.19620).

    They are of the same problem, and the advantage is over the mixed group; theirs is scaled by ``scale``. A problem
    has to come again for it, so that it does nothing with an unlimited source. Our readings: the youngest are taken,
    which the target is nearest to, and the defaults of k and alpha. Of partial rewards, 1 alone is right.

    The store is that of ``replay``: ``memory`` * B * T * 13 bytes at most.

    Use: with a finite set of problems, many groups of which are all right or all wrong.

    Attributes:
        memory: iterations that a completion is kept for.
        answers: k, the most that join a group.
        scale: alpha.
    """

    memory: int = 16
    answers: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.memory < 1 or self.answers < 1:
            raise UsageError(
                f"contrast: memory={self.memory} iterations and answers={self.answers} must be at least 1; "
                "batch=fresh stores nothing"
            )
        if not 0 < self.scale < float("inf"):
            raise UsageError(f"contrast: scale={self.scale} must be a finite number above 0")

    @property
    def keeps(self) -> int:  # type: ignore[override]
        return self.memory

    def join(
        self, right: NDArray[np.bool_], stored: NDArray[np.bool_], age: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Which stored completions of a problem join its fresh group.

        Args:
            right: [G], the fresh ones.
            stored: [M], whether those stored are right; at least one.
            age: [M] iterations since they were written.
            rng: keyed by seed and iteration.

        Returns:
            Different positions in ``stored``.
        """
        if right.any() and not right.all():
            return np.zeros(0, dtype=np.int64)
        others = rng.permutation(np.flatnonzero(stored != right[0]))
        return others[np.argsort(age[others], kind="stable")][: self.answers]


@dataclass(frozen=True)
class Mixture:
    """Several batch sources in one: what an id such as ``replay*expert`` makes. Each recalls from what it would keep by
    itself, one after the other and no group twice.

    Raises:
        UsageError: two of one kind, or two that would each write, or join groups, in their own way.
    """

    factors: tuple[Any, ...]

    def __post_init__(self) -> None:
        names = [type(factor).__name__ for factor in self.factors]
        for holders, what in (
            ([name for name in names if names.count(name) > 1], "are the same source"),
            ([type(f).__name__ for f in self.factors if f.lag], "each say which weights write"),
            ([type(f).__name__ for f in self.factors if hasattr(f, "join")], "each join groups"),
        ):
            if len(holders) > 1:
                raise UsageError(f"a mixture of batch sources: {' and '.join(holders)} {what}; keep one of them")

    @property
    def keeps(self) -> int:
        return max(factor.keeps for factor in self.factors)

    @property
    def lag(self) -> int:
        return max(factor.lag for factor in self.factors)


@batches.combine_with
def mixture(factors: tuple[Any, ...]) -> Mixture:
    """``a*b`` of the registry."""
    return Mixture(factors)


def factors_of(source: Any) -> tuple[Any, ...]:
    """The sources that a mixture is of, or the one source."""
    return source.factors if isinstance(source, Mixture) else (source,)


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
        lags: by how many iterations the weights that wrote them were behind the target.
        copies: the weights that write, in turn; ``taken`` says at the beginning of which iteration they were the
            target's.
        age: iterations since the weights that wrote were the target's, mean over the last batch's completions.
        is_writing: whether older weights are in place.
    """

    def __init__(self, source: Any, policy: Policy, group_size: int, target_written: int, seed: int) -> None:
        self.source = source
        self.recalling = [one for one in factors_of(source) if type(one).recall is not Fresh.recall]
        self.joining = [one for one in factors_of(source) if hasattr(one, "join")]
        self.group_size = group_size
        self.target_written = target_written
        self.seed = seed
        self.kept: dict[int, Rollout] = {}
        self.lags: dict[int, int] = {}
        self.copies = [WeightCopy(policy) for _ in range(source.lag)]
        self.taken = [0] * source.lag
        self.age = 0.0
        self.is_writing = False

    @property
    def is_plain(self) -> bool:
        """Whether every group is fresh, by the present weights."""
        return not (self.source.keeps or self.copies)

    def recall(self, iteration: int, count: int) -> Rollout | None:
        """Stored groups that take the place of as many of ``count`` fresh ones; None where all are to be written."""
        whole = self._stored(iteration, self.recalling)
        if whole is None:
            return None
        assert whole.age is not None
        age = whole.age[:: self.group_size].numpy()
        reward = whole.reward.view(-1, self.group_size).numpy()
        rng = np.random.default_rng([self.seed, iteration, 3])
        chosen = np.zeros(0, dtype=np.int64)
        for factor in self.recalling:
            until = getattr(factor, "until", 0)
            within = np.setdiff1d(np.flatnonzero(age <= factor.keeps), chosen)
            room = count - len(chosen)
            if len(within) and room and not (until and iteration >= until):
                positions = factor.recall(age[within], reward[within], room, rng)
                chosen = np.append(chosen, within[_checked(positions, factor, "recall", room, len(within))])
        if not len(chosen):
            return None
        rows = (torch.as_tensor(chosen)[:, None] * self.group_size + torch.arange(self.group_size)).flatten()
        return replace(whole.select(rows), group=torch.arange(len(rows)) // self.group_size)

    def _stored(self, iteration: int, sources: Sequence[Any]) -> Rollout | None:
        """All that is kept for one of some sources, with its age; None where that is nothing."""
        oldest = max((source.keeps for source in sources), default=0)
        kept = {n: self.kept[n] for n in sorted(self.kept) if 0 < iteration - n <= oldest}
        if not kept:
            return None
        return reduce(joined, (replace(r, age=torch.full((len(r),), iteration - n)) for n, r in kept.items()))

    def _with_borrowed(self, fresh: Rollout, iteration: int) -> Rollout:
        """The fresh groups with the stored completions that join them, each group in one piece."""
        whole = self._stored(iteration, self.joining)
        if whole is None or not len(fresh):
            return fresh
        (source,) = self.joining
        assert whole.age is not None
        known: dict[int, list[int]] = {}
        for row, info in enumerate(whole.episodes):
            known.setdefault(int(info["problem_index"]), []).append(row)
        stored, age = unshaped_rewards(whole) >= 1, whole.age.numpy()
        right = (unshaped_rewards(fresh) >= 1).reshape(-1, self.group_size)
        rng = np.random.default_rng([self.seed, iteration, 4])
        guests: list[int] = []
        hosts: list[int] = []
        for n, members in enumerate(right):
            rows = np.array(known.get(int(fresh.episodes[n * self.group_size]["problem_index"]), ()), dtype=np.int64)
            if len(rows):
                positions = source.join(members, stored[rows], age[rows], rng)
                chosen = rows[_checked(positions, source, "join", len(rows), len(rows))]
                guests += chosen.tolist()
                hosts += [n * self.group_size] * len(chosen)
        if not guests:
            return fresh
        theirs = whole.select(torch.tensor(guests))
        theirs = replace(
            theirs,
            prompts=tuple(fresh.prompts[host] for host in hosts),  # one object a group: computed once
            group=fresh.group[hosts],
            borrowed=torch.ones(len(guests), dtype=torch.bool),
        )
        ours = replace(fresh, age=torch.zeros_like(fresh.group), borrowed=torch.zeros(len(fresh), dtype=torch.bool))
        both = joined(ours, theirs)
        return both.select(both.group.argsort(stable=True))

    def scaled(self, advantage: Tensor, batch: Rollout) -> Tensor:
        """[B] advantages, those of completions that joined a group times their source's ``scale``."""
        if batch.borrowed is None:
            return advantage
        (source,) = self.joining
        return torch.where(batch.borrowed, source.scale * advantage, advantage)

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
        """The batch of fresh groups, of what joins them and of the groups recalled. The fresh ones, and the target's
        present weights where such write later, are kept from here on; ``score`` gives a rollout's log-probabilities
        [B, T] under the policy's weights of that moment."""
        if self.is_plain:
            return fresh
        if len(fresh) and fresh.by_target is not None:
            with self.writing(iteration):
                fresh = replace(fresh, target_logp=score(fresh))
        mixed = self._with_borrowed(fresh, iteration)
        lag = 0
        if self.copies:
            slot = iteration % len(self.copies)
            lag, self.taken[slot] = iteration - self.taken[slot], iteration
            self.copies[slot].take()
        if len(fresh) and self.source.keeps:
            self.kept[iteration] = fresh.select(torch.arange(len(fresh)))
            self.lags[iteration] = lag
        batch = _beside(mixed, stored)
        age = torch.zeros_like(batch.group) if batch.age is None else batch.age
        lags = {**self.lags, iteration: lag}
        self.age = float(np.mean([n + lags[iteration - n] for n in age.tolist()]))
        self.kept = {n: rollout for n, rollout in self.kept.items() if iteration - n < self.source.keeps}
        self.lags = {n: self.lags[n] for n in self.kept}
        return batch

    def metrics(self, batch: Rollout) -> dict[str, float]:
        """``age``: iterations since the weights that wrote were the target's, mean over completions;
        ``stored_share`` and ``borrowed_share``: of the batch's completions, those of stored groups and those that
        joined fresh ones."""
        if self.is_plain:
            return {}
        share = {name: float(rows.double().mean()) for name, rows in batch.kinds.items()}
        stored = {"stored_share": share["stored"]} if self.recalling else {}
        borrowed = {"borrowed_share": share["borrowed"]} if self.joining else {}
        return {"age": self.age, **stored, **borrowed}

    def restart(self, iteration: int) -> None:
        """Begin at the policy's present weights, with nothing stored."""
        self.kept, self.lags = {}, {}
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
        lags = {str(n): lag for n, lag in self.lags.items()}
        return tensors, {"taken": self.taken, "episodes": episodes, "lags": lags, **groups}

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
            self.lags[int(n)] = state.get("lags", {}).get(n, 0)


def _checked(positions: Any, source: Any, method: str, most: int, stored: int) -> NDArray[np.int64]:
    """What a source has chosen of what is stored, if it can be that."""
    chosen = np.asarray(positions, dtype=np.int64)
    if len(chosen) > most or len(np.unique(chosen)) < len(chosen) or not ((chosen >= 0) & (chosen < stored)).all():
        what = "groups" if method == "recall" else "completions"
        raise UsageError(
            f"{type(source).__name__}.{method} returned {chosen.tolist()}: return at most {most} different positions "
            f"of the {stored} stored {what}"
        )
    return chosen


def _beside(fresh: Rollout, stored: Rollout | None) -> Rollout:
    """The groups of both, those stored with numbers of their own."""
    if stored is None:
        return fresh
    if not len(fresh):
        return stored
    if fresh.age is None:
        fresh = replace(fresh, age=torch.zeros_like(fresh.group))
    if fresh.borrowed is not None:
        stored = replace(stored, borrowed=torch.zeros(len(stored), dtype=torch.bool))
    return joined(fresh, replace(stored, group=stored.group + int(fresh.group.max()) + 1))


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
