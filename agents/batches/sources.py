"""Batch sources: where the groups of a batch come from.

A batch is written afresh (``fresh``), or some of its groups are those of earlier iterations (``replay``), or weights of
some iterations ago write it (``stale``), or stored completions of the same problem join a group whose own are all wrong
or all right (``contrast``). Sources multiply: ``replay*expert`` is both in one batch. A stored completion keeps log mu,
the log-probabilities that it was sampled with, so that every correction applies to it: rho = pi / mu with the older
policy as mu. What a trust region is relative to stays pi_old, the target when the update begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

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
