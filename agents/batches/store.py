"""What a batch source keeps, and how a batch is made of what is fresh and what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.batches.sources import Fresh, factors_of
from agents.batches.weight_copy import WeightCopy
from agents.monitoring.metrics import unshaped_rewards
from agents.rollout import Rollout, joined
from policies import Policy, StoredDrafts
from registry import UsageError


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
        self.drafting = [one for one in factors_of(source) if hasattr(one, "judge")]
        if target_written and any(not one.judge.is_exact for one in self.drafting):
            raise UsageError(
                f"defensive groups (target_written={target_written}) take what the target writes for its own draws: "
                "give reuse rule=draw and lenience=0, or a correction without them"
            )
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

    def drafts(self, problems: Sequence[int], first_group: int, iteration: int) -> StoredDrafts | None:
        """What is stored of ``problems``, the groups of a deck from ``first_group`` on, by the episodes that it is a
        draft of; None where there is nothing."""
        if not self.drafting:
            return None
        (source,) = self.drafting
        known: dict[int, list[tuple[int, int]]] = {}  # by problem, youngest first: iteration and first row
        for n in sorted(self.kept, reverse=True):
            if 0 < iteration - n <= source.keeps:
                for row in range(0, len(self.kept[n]), self.group_size):
                    known.setdefault(int(self.kept[n].episodes[row]["problem_index"]), []).append((n, row))
        drafts = {}
        for group, problem in enumerate(problems, first_group):
            if not known.get(problem):
                continue
            n, first = known[problem].pop(0)
            for member in range(self.group_size):
                row, stored = first + member, self.kept[n]
                size = int(stored.mask[row].sum())
                drafts[group * self.group_size + member] = (
                    stored.tokens[row, :size].numpy(),
                    stored.behavior_logp[row, :size].numpy(),
                )
        return StoredDrafts(drafts, source.judge) if drafts else None

    @property
    def is_lenient(self) -> bool:
        """Whether what writes keeps tokens that it would not draw, with their own log mu."""
        return any(one.is_off_policy for one in self.drafting)

    def is_off_policy(self, batch: Rollout) -> bool:
        """Whether present weights would not have written all of a batch as it is."""
        return batch.age is not None or bool(self.copies) or self.is_lenient

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

    def forget(self) -> None:
        """Drop the stored groups."""
        self.kept, self.lags = {}, {}

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
