"""Drafts: tokens proposed before they are drawn, all judged in one forward.

A token is a function of its seed, episode, position and distribution alone: x_t = F_t^-1(u_t), where u_t is the
position's uniform number (``sampling.uniforms``) and F_t the writer's distribution after x_1 .. x_{t-1}. One forward
over a draft y_1 .. y_k gives the writer's distribution after each of its prefixes, and at every place the writer draws
its own x_t by the number that it would draw it with anyway. Where x_t = y_t, the next distribution is that after the
text written. The first x_t that differs is written in place of y_t, and what was drafted after it is dropped.

So what is written, with its log mu, is what one step a token writes, whoever drafts, for every draft and every u: law,
independence of other episodes, and reproducibility are those of plain decoding (up to rounding where a store's pass
over many tokens sums in another order than its steps). A draft decides only how many tokens a forward is worth.

A draft that knows nothing of u_t, such as a stored completion, is right at t with probability pi(y_t); one that is
drawn by u_t from another distribution, as a layer subset does, with the mass on which both inverse distribution
functions agree, which is at most 1 - TV(pi, mu). Speculative sampling (arXiv 2211.17192) reaches 1 - TV by accepting
with min(1, pi / mu) and drawing from the residual; its tokens then depend on which of them were drafted, and so on the
other slots, which here they must not.

Shape letters: S slots, n of them, N tokens to judge, k tokens of a draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policies.engine.graphs import upload
from policies.engine.sampling import SamplingSpec, uniforms
from policies.nested import Nested
from registry import UsageError

TOKENS = 2048  # judged in one pass: bounds activations and logits
ROWS = 512  # of logits at a time
SALT = 0x5EED  # of the numbers that lenience is drawn by, apart from those of tokens
RULES = ("draw", "ratio")
Plain = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Extends(Protocol):
    """A decoder that takes several tokens of a slot at once: both of ``decoder``."""

    longest: int

    def extend(
        self, ids: np.ndarray, first: np.ndarray, last: np.ndarray, start: np.ndarray, slots: np.ndarray
    ) -> Tensor: ...

    def draw(self, hidden: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]: ...

    def logp(self, hidden: Tensor, token: Tensor, temperature: float) -> Tensor: ...


@dataclass(frozen=True)
class Lenience:
    """Which stored tokens are kept although the writer draws others.

    ``draw``: y is kept with probability a = min(1, e^lenience pi(y)), else another token is drawn from pi without y.
    What is written then has exactly the law nu(y) = a, nu(x) = (1 - a) pi(x) / (1 - pi(y)), given all that went
    before, and log nu is its log mu. At lenience 0, nu = pi.

    ``ratio``: y is kept with probability min(1, e^lenience pi(y) / mu(y)), mu what wrote it, and from the first token
    that is not the writer goes on by itself: SPEC-RL (arXiv 2509.23232, with e^lenience as its l). log mu is given as
    log pi, as the paper has it, which is the law of nothing: with R = 1 - sum_v min(mu, e^lenience pi) a token's law,
    over draws of y from mu, is min(mu, e^lenience pi) + R pi. It is at most (e^lenience + R) pi, and at lenience 0 its
    total variation from pi is at most R (1 - R); given y itself, which the target has been trained on, it is not pi
    either.
    """

    rule: str = "draw"
    nats: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UsageError(f"rule={self.rule!r} must be one of {', '.join(RULES)}")
        if not 0 <= self.nats < math.inf:
            raise UsageError(f"lenience={self.nats} must be a finite number of nats, at least 0")

    @property
    def is_exact(self) -> bool:
        """Whether what is written is what the writer alone would write."""
        return self.rule == "draw" and not self.nats

    def judge(
        self,
        drawn: np.ndarray,
        drawn_logp: np.ndarray,
        draft: np.ndarray,
        logp: np.ndarray,
        mu: np.ndarray,
        v: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of N drafted tokens are kept, and log mu of what is written at each place: of the token, or of the one
        drawn in its place.

        Args:
            drawn: [N] tokens that the writer draws.
            drawn_logp: [N] their log pi.
            draft: [N] tokens.
            logp: [N] their log pi.
            mu: [N] their log-probabilities under what wrote them.
            v: [N] uniform numbers, independent of ``drawn``.
        """
        if self.rule == "ratio":
            kept = v < np.exp(np.minimum(0.0, self.nats + logp.astype(float) - mu))
            return kept, np.where(kept, logp, drawn_logp)
        p = np.exp(logp.astype(float))
        raised = np.minimum(0.0, self.nats + logp.astype(float))  # log a
        with np.errstate(divide="ignore", invalid="ignore"):
            further = np.where(p < 1, (np.exp(raised) - p) / (1 - p), 0.0)
            others = drawn_logp + np.log1p(-np.exp(raised)) - np.log1p(-p)
        kept = (drawn == draft) | (v < further)
        return kept, np.where(kept, raised, others)


@dataclass(frozen=True)
class Draft:
    """What may come next in a slot.

    Attributes:
        tokens: [k] int64.
        goes_on: whether the token after the last is wanted of the same forward.
        mu: [k] float32 log-probabilities under what wrote ``tokens``, for ``lenience``.
        lenience: None for what the writer itself would draw.
    """

    tokens: np.ndarray
    goes_on: bool = True
    mu: np.ndarray | None = None
    lenience: Lenience | None = None


class Proposes(Protocol):
    """What makes drafts."""

    def propose(
        self,
        ids: np.ndarray,
        length: np.ndarray,
        start: np.ndarray,
        episode: np.ndarray,
        slots: np.ndarray,
        live: int,
    ) -> list[Draft | None]:
        """One draft, or none, for each of ``slots`` [n]; the other arguments are of all S slots, as of
        ``Behavior.act``, and ``live`` is how many of them are not idle."""
        ...


@dataclass(frozen=True)
class StoredDrafts:
    """Completions of earlier times, by the episode that each is a draft of, proposed where the episode begins.

    Attributes:
        drafts: tokens [k] int64 and their log mu [k] float32.
        lenience: which of them are kept.
    """

    drafts: Mapping[int, tuple[np.ndarray, np.ndarray]]
    lenience: Lenience = Lenience()

    def propose(
        self,
        ids: np.ndarray,
        length: np.ndarray,
        start: np.ndarray,
        episode: np.ndarray,
        slots: np.ndarray,
        live: int,
    ) -> list[Draft | None]:
        """As ``Proposes.propose``."""
        lenience = None if self.lenience.is_exact else self.lenience
        stored = [self.drafts.get(int(episode[slot])) if start[slot] else None for slot in slots]
        return [None if one is None else Draft(one[0], False, one[1], lenience) for one in stored]


@dataclass(frozen=True)
class Drafter:
    """A layer subset that drafts where few slots are live (self-speculative decoding, arXiv 2309.08168).

    Attributes:
        layers: kept by it.
        tokens: of a draft.
        rows: live slots up to which it drafts: a step of many rows is not cheaper a token for being of more.
    """

    layers: Nested
    tokens: int = 4
    rows: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.rows < 1:
            raise UsageError(
                f"a drafter of tokens={self.tokens} up to rows={self.rows} drafts nothing: give 1 or more of both, or "
                "let no layers draft (sampler=full)"
            )


class LayerDrafts:
    """Drafts drawn by a decoder of fewer layers, by the numbers that the writer draws with.

    Args:
        decoder: of ``drafter.layers``, with slots of its own.
        slots: S.
        sampling: the writer's.
        drafter: how much it drafts, and when.
    """

    def __init__(self, decoder: Extends, slots: int, sampling: SamplingSpec, drafter: Drafter) -> None:
        self.decoder = decoder
        self.sampling = sampling
        self.drafter = drafter
        self.ids = np.zeros((slots, decoder.longest), np.int64)

    def propose(
        self,
        ids: np.ndarray,
        length: np.ndarray,
        start: np.ndarray,
        episode: np.ndarray,
        slots: np.ndarray,
        live: int,
    ) -> list[Draft | None]:
        """As ``Proposes.propose``."""
        if live > self.drafter.rows:
            return [None] * len(slots)
        width = int(length[slots].max())
        self.ids[slots, :width] = ids[slots, :width]
        for n in range(self.drafter.tokens):
            going = slots[length[slots] + n < self.decoder.longest]
            if not len(going):
                break
            size = length[going] + n
            hidden = self.decoder.extend(self.ids, size, size, start & (n == 0), going)
            uniform = torch.from_numpy(uniforms(self.sampling.seed, episode[going], size)).to(hidden.device)
            token, _ = self.decoder.draw(hidden, uniform, self.sampling.temperature)
            self.ids[going, size] = token.cpu().numpy()
        ends = np.minimum(length[slots] + self.drafter.tokens, self.decoder.longest)
        drafts = [self.ids[slot, length[slot] : end].copy() for slot, end in zip(slots, ends, strict=True)]
        return [Draft(tokens) if len(tokens) else None for tokens in drafts]


class Drafting:
    """The tokens that each slot is known to go on with, by drafts; plain steps where there is none.

    Args:
        decoder: the writer's.
        slots: S.
        sampling: how it draws.
        proposers: asked in turn.
        plain: the next tokens of slots of which none has a draft.

    Attributes:
        judged: drafts.
        proposed: tokens of drafts.
        accepted: tokens written that were drafted; those after an episode's end do not count.
        lost: places computed, of drafts and behind them, that no token was written at.
    """

    def __init__(
        self, decoder: Extends, slots: int, sampling: SamplingSpec, proposers: Sequence[Proposes], plain: Plain
    ) -> None:
        self.decoder = decoder
        self.sampling = sampling
        self.proposers = proposers
        self.plain = plain
        self.ids = np.zeros((slots, decoder.longest + 1), np.int64)  # by slot: the last prefix and what follows
        self.logp = np.zeros((slots, decoder.longest + 1), np.float32)
        self.drafted = np.zeros((slots, decoder.longest + 1), bool)
        self.known = np.zeros(slots, np.int64)  # by slot: how many of ``ids``
        self.episode = np.zeros(slots, np.int64)
        self.judged = self.proposed = self.accepted = self.lost = 0

    def next(
        self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, episode: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] and their log-probabilities [n] of the ``active`` slots; arguments as of ``Behavior.act``."""
        size = length[active]
        width = int(size.max())
        differs = (self.ids[active, :width] != ids[active, :width]) & (np.arange(width) < size[:, None])
        known = ~start[active] & (self.episode[active] == episode[active]) & (size < self.known[active])
        lacking = active[~known | differs.any(1)]
        if len(lacking):
            drafts = self._drafts(ids, length, start, episode, lacking, len(active))
            if len(lacking) == len(active) and not drafts:
                return self.plain(ids, length, start, episode, active)
            self.episode[lacking] = episode[lacking]
            self.ids[lacking, :width] = ids[lacking, :width]
            for part in _parts(lacking, drafts):
                self._write(length, start, part)
        self.accepted += int(self.drafted[active, size].sum())
        self.lost -= len(active)
        return self.ids[active, size], self.logp[active, size]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """``judged``, ``proposed``, ``accepted`` and ``lost``, the last of episodes that have ended."""
        return self.judged, self.proposed, self.accepted, self.lost

    def _drafts(
        self,
        ids: np.ndarray,
        length: np.ndarray,
        start: np.ndarray,
        episode: np.ndarray,
        slots: np.ndarray,
        live: int,
    ) -> dict[int, Draft]:
        """By slot, the drafts that there are."""
        drafts: dict[int, Draft] = {}
        for proposer in self.proposers:
            open_slots = np.array([slot for slot in slots.tolist() if slot not in drafts], dtype=np.int64)
            if len(open_slots):
                made = proposer.propose(ids, length, start, episode, open_slots, live)
                drafts |= {slot: one for slot, one in zip(open_slots.tolist(), made, strict=True) if one is not None}
        return drafts

    def _write(self, length: np.ndarray, start: np.ndarray, drafts: dict[int, Draft | None]) -> None:
        """Judge the drafts of some slots, and write one token where a slot has none."""
        slots = np.array(list(drafts), dtype=np.int64)
        first, last = length[slots], length[slots].copy()
        sizes = np.zeros_like(first)
        for n, (slot, draft) in enumerate(drafts.items()):
            if draft is not None:
                sizes[n] = min(len(draft.tokens), self.decoder.longest + 1 - first[n])
                self.ids[slot, first[n] : first[n] + sizes[n]] = draft.tokens[: sizes[n]]
                last[n] = min(first[n] + sizes[n] - (not draft.goes_on), self.decoder.longest)
        hidden = self.decoder.extend(self.ids, first, last, start, slots)
        count = last - first + 1
        begin = np.cumsum(count) - count
        row, nth = np.repeat(slots, count), np.arange(count.sum()) - np.repeat(begin, count)
        place = nth + np.repeat(first, count)
        drafted = nth < np.repeat(sizes, count)
        token, logp = self._draw(hidden, uniforms(self.sampling.seed, self.episode[row], place))
        proposed = self.ids[row, place]
        kept = drafted & (token == proposed)
        for lenience in {draft.lenience for draft in drafts.values() if draft is not None and draft.lenience}:
            mine = [draft is not None and draft.lenience == lenience for draft in drafts.values()]
            mus = [draft.mu for draft in drafts.values() if draft is not None and draft.lenience == lenience]
            at = np.flatnonzero(drafted & np.repeat(mine, count))
            mu = np.concatenate([one[:n] for one, n in zip(mus, sizes[mine], strict=True) if one is not None])
            own = self._logp(hidden[upload(at, hidden.device)], proposed[at])
            v = uniforms(self.sampling.seed + SALT, self.episode[row[at]], place[at])
            kept[at], logp[at] = lenience.judge(token[at], logp[at], proposed[at], own, mu, v)
        right = np.minimum.reduceat(np.where(kept, len(nth), nth), begin)
        written = nth <= np.repeat(right, count)
        self.ids[row[written], place[written]] = np.where(kept, proposed, token)[written]
        self.logp[row[written], place[written]] = logp[written]
        self.drafted[row[written], place[written]] = kept[written]
        self.known[slots] = first + np.minimum(right + 1, count)
        self.judged += int((sizes > 0).sum())
        self.proposed += int(drafted.sum())
        self.lost += int(count.sum())

    def _draw(self, hidden: Tensor, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N] tokens and [N] log-probabilities."""
        numbers = torch.from_numpy(uniform).to(hidden.device)
        pairs = zip(hidden.split(ROWS), numbers.split(ROWS), strict=True)
        drawn = [self.decoder.draw(rows, part, self.sampling.temperature) for rows, part in pairs]
        return (
            torch.cat([token for token, _ in drawn]).cpu().numpy(),
            torch.cat([logp for _, logp in drawn]).cpu().numpy(),
        )

    def _logp(self, hidden: Tensor, token: np.ndarray) -> np.ndarray:
        """[N] log pi of ``token`` [N]."""
        chosen = torch.from_numpy(token).to(hidden.device)
        return self.decoder.logp(hidden, chosen, self.sampling.temperature).cpu().numpy()


def _parts(slots: np.ndarray, drafts: Mapping[int, Draft]) -> list[dict[int, Draft | None]]:
    """The slots with their drafts, in parts of at most about ``TOKENS`` tokens."""
    parts: list[dict[int, Draft | None]] = [{}]
    room = TOKENS
    for slot in slots.tolist():
        draft = drafts.get(slot)
        cost = 1 if draft is None else 1 + len(draft.tokens)
        if cost > room and parts[-1]:
            parts.append({})
            room = TOKENS
        parts[-1][slot] = draft
        room -= cost
    return parts
