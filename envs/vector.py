"""The native vector environment: S slots over one task, SAME_STEP autoreset, a deck dealt and drained.

It equals ``SyncVectorEnv(autoreset_mode=SAME_STEP)`` of ``MathReason`` step by step (a test holds this), and adds what
rollouts need: a deck of problems x group_size, dealt to whichever slot is free and drained to the last episode, so that
short completions are not preferred; idle slots once the deck is empty; and a problem index per slot.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from envs.math_reason import RENDER_MODES, Observation, check_render_mode, plain_index, plain_seed, task_spec
from envs.problem import PENDING, Verdict
from envs.task import Task, start_info
from registry import UnknownField, UsageError, WrongType, check_at_least

OPTIONS = ("problem_index", "problem_indices", "deck", "group_size", "first_group", "defer", "reset_mask")


@dataclass(frozen=True)
class Card:
    """An episode to be dealt to a slot: which problem, and its number, group and place in the group."""

    index: int
    episode: int
    group: int
    sample: int


@dataclass(frozen=True)
class Ending:
    """An episode that has ended, verdict aside.

    Attributes:
        slot: where it was.
        start: its start info.
        reason: why it ended.
        completion: [T] int64.
        seed: of the slot; None of episodes that are dealt from a deck.
    """

    slot: int
    start: dict[str, Any]
    reason: str
    completion: NDArray[np.int64]
    seed: int | None

    def outcome(self, task: Task, verdict: Verdict) -> tuple[float, dict[str, Any]]:
        """Reward and terminal info under a verdict."""
        return task.outcome(self.start, self.reason, self.completion, verdict, self.seed)


class MathReasonVector(VectorEnv[Observation, NDArray[np.int64], NDArray[Any]]):
    """S slots of ``MathReason`` stepped together.

    Observation: ``{"input_ids": [S, L] int64, "length": [S, 1] int64}``. Action: [S] int64 tokens; an idle slot (length
    0) ignores its own. Rewards [S] float64, flags [S] bool.

    Reset options:
        deck: [N] problem indices, with ``group_size`` G: N * G episodes are dealt in order, episode e being sample
            e % G of group e // G. A slot that finishes takes the next one; when none is left it idles.
        first_group: with a deck: the number of its first group, if it is a part of a larger deck (default 0).
        defer: with a deck: a verdict that a worker is still busy with does not hold the step up. The episode ends with
            the reward 0 and the status ``pending``, and ``settle`` gives the verdict later.
        problem_indices: [S], the problem each slot begins with, None for a drawn one; later ones are drawn.
        problem_index: the same problem for every slot.
        reset_mask: [S] bool, the slots to reset; an unfinished episode there is abandoned.

    Attributes:
        reward_seconds: wall-clock seconds that verdicts took (their settling included) since the last deck was dealt.

    It can be copied and pickled; verdicts that are still pending are waited for then.

    Args:
        num_envs: S.
        copy: return fresh observation arrays. False returns views of the live buffers, valid until the next step.
        render_mode: ``ansi`` renders a tuple of texts, one a slot; ``human`` renders nothing here.
        max_episode_steps: as gymnasium's ``TimeLimit``: episodes are truncated after so many tokens, without a verdict.
            ``max_new_tokens`` is the budget that ends a completion with one. -1 is no limit, as to ``gym.make``.
        **task: the fields of ``envs.task.TaskSpec``.
    """

    metadata = {  # noqa: RUF012 (gymnasium's convention)
        "render_modes": list(RENDER_MODES),
        "render_fps": 30,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        copy: bool = True,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **task: Any,
    ) -> None:
        check_render_mode(render_mode)
        if max_episode_steps == -1:
            max_episode_steps = None
        if max_episode_steps is not None:
            check_at_least(max_episode_steps, 1, "max_episode_steps")
        check_at_least(num_envs, 1, "num_envs")
        self.num_envs = num_envs = int(num_envs)
        self.copy = copy
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps
        self.task = Task(task_spec(task))
        self.single_observation_space = self.task.observation_space()
        self.single_action_space = self.task.action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._stops = np.isin(np.arange(self.task.vocab_size), list(self.task.stop_token_ids))  # [V] bool
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._seeds = [-1] * num_envs
        self._ids = np.full((num_envs, self.task.max_length), self.task.pad_token_id, dtype=np.int64)
        self._length = np.zeros(num_envs, dtype=np.int64)
        self._prompt = np.zeros(num_envs, dtype=np.int64)
        self._live = np.zeros(num_envs, dtype=np.bool_)
        self._episodes = np.zeros(num_envs, dtype=np.int64)
        self._infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self._last: list[str] = [""] * num_envs
        self._deck: deque[Card] | None = None
        self._defer = False
        self._pending: list[tuple[Ending, Future[Verdict]]] = []
        self.reward_seconds = 0.0
        self._begun = False

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Each slot's random numbers, as of gymnasium's vector envs."""
        return tuple(self._rng(slot) for slot in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each slot's random numbers."""
        return tuple(self._seeds[slot] for slot, _ in enumerate(self.np_random))

    @property
    def live(self) -> NDArray[np.bool_]:
        """[S], which slots hold an episode; the others idle."""
        return self._live.copy()

    def reset(  # type: ignore[override]
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin episodes in all slots, or in those of ``reset_mask``."""
        options = dict(options or {})
        for name in options:
            if name not in OPTIONS:
                raise UnknownField("reset options of MathReasonVector", name, OPTIONS)
        slots = self._mask(options.get("reset_mask"))
        indices = self._first_indices(options)
        self._seed(seed, slots)
        self._open_deck(options)
        infos = self._begin_all(slots.tolist(), indices, {})
        return self._observation(), infos

    def step(  # type: ignore[override]
        self, actions: NDArray[np.int64]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Append one token in every live slot; a slot that ends begins its next episode at once."""
        if not self._begun:
            raise ResetNeeded("no episode has begun: call reset() before step()")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise WrongType(
                f"actions of shape {actions.shape} and type {actions.dtype} given, ({self.num_envs},) integers needed: "
                "one token a slot"
            )
        live = np.flatnonzero(self._live)
        tokens = actions[live]
        if np.any((tokens < 0) | (tokens >= self.task.vocab_size)):
            bad = tokens[(tokens < 0) | (tokens >= self.task.vocab_size)][0]
            raise UsageError(f"action={bad} is not a token: the action space is {self.single_action_space}")
        self._ids[live, self._length[live]] = tokens
        self._length[live] += 1
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        finished = self._endings(live, tokens)
        infos: dict[str, Any] = {}
        for one, verdict in zip(finished, self._verdicts(finished), strict=True):
            slot = one.slot
            rewards[slot], final = one.outcome(self.task, verdict)
            terminations[slot] = one.reason != "length"
            truncations[slot] = one.reason == "length"
            infos = self._add_info(infos, {"final_obs": self._slot_observation(slot), "final_info": final}, slot)
            if self.render_mode == "ansi":
                self._last[slot] = f"{self._text(slot)}\n[{verdict.status}: reward {verdict.reward:g}]\n"
        infos = self._cut(live, {one.slot for one in finished}, truncations, infos)
        infos = self._begin_all(np.flatnonzero(terminations | truncations).tolist(), None, infos)
        return self._observation(), rewards, terminations, truncations, infos

    def settle(self) -> list[tuple[float, dict[str, Any]]]:
        """Reward and final info of every episode whose verdict was deferred, in the order they ended; waits."""
        began = perf_counter()
        pending, self._pending = self._pending, []
        outcomes = [one.outcome(self.task, future.result()) for one, future in pending]
        self.reward_seconds += perf_counter() - began
        return outcomes

    def render(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """``ansi``: a slot's text so far, below its last finished episode."""
        if self.render_mode != "ansi":
            return None
        return tuple(self._last[slot] + self._text(slot) for slot in range(self.num_envs))

    def __getstate__(self) -> dict[str, Any]:
        settled = [(one, future.result()) for one, future in self._pending]
        return {**vars(self), "_pending": settled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pending = [(one, _settled(verdict)) for one, verdict in state["_pending"]]

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing is held that needs closing: the verifier's workers are shared by the process."""

    def _mask(self, mask: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        if mask is None:
            return np.arange(self.num_envs)
        mask = np.asarray(mask)
        if mask.dtype != np.bool_:
            raise WrongType(f"reset_mask of type {mask.dtype} must be a bool array of shape ({self.num_envs},)")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise UsageError(f"reset_mask must be a bool array of shape ({self.num_envs},) with at least one True")
        return np.flatnonzero(mask)

    def _rng(self, slot: int) -> np.random.Generator:
        if (rng := self._rngs[slot]) is None:
            rng, self._seeds[slot] = seeding.np_random(None)
            self._rngs[slot] = rng
        return rng

    def _seed(self, seed: int | list[int | None] | None, slots: NDArray[np.int64]) -> None:
        if seed is None:
            return
        if isinstance(seed, list | tuple) or (isinstance(seed, np.ndarray) and seed.ndim):
            seeds = [plain_seed(one) for one in seed]
        else:
            first = plain_seed(seed) or 0
            seeds = [first + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise UsageError(f"{len(seeds)} seeds given for num_envs={self.num_envs}")
        for slot in slots:
            if seeds[slot] is not None:
                self._rngs[slot], self._seeds[slot] = seeding.np_random(seeds[slot])
                self._episodes[slot] = 0

    def _open_deck(self, options: dict[str, Any]) -> None:
        if "deck" in options:
            other = next((name for name in ("reset_mask", "problem_index", "problem_indices") if name in options), None)
            if other:
                raise UsageError(f"a deck is dealt to all slots: give reset options deck or {other}, not both")
            size = plain_index(options.get("group_size", 1), "group_size")
            if size < 1:
                raise UsageError(f"group_size={size} must be at least 1")
            deck = _listed(options["deck"], "deck")
            indices = [plain_index(index, "an index of the deck") for index in deck]
            self._check_indices(indices)
            groups = enumerate(indices, plain_index(options.get("first_group", 0), "first_group"))
            self._deck = deque(Card(index, n * size + k, n, k) for n, index in groups for k in range(size))
            self._defer = bool(options.get("defer", False))
            self._pending = []
            self.reward_seconds = 0.0
            self._live[:] = False
        elif {"group_size", "first_group", "defer"} & set(options):
            raise UsageError(
                "group_size, first_group and defer go with a deck: pass options={'deck': indices, 'group_size': G}"
            )
        elif "reset_mask" not in options:
            self._deck, self._defer, self._pending = None, False, []

    def _first_indices(self, options: dict[str, Any]) -> list[int | None] | None:
        """The problem that each slot begins with, where the options say so; None draws one."""
        given = options.get("problem_indices")
        if "problem_index" in options:
            if "problem_indices" in options:
                raise UsageError("each slot begins with one problem: give problem_index or problem_indices, not both")
            given = [plain_index(options["problem_index"])] * self.num_envs
        if given is None:
            return None
        indices = [None if index is None else plain_index(index) for index in _listed(given, "problem_indices")]
        if len(indices) != self.num_envs:
            raise UsageError(f"{len(indices)} problem_indices given for num_envs={self.num_envs}")
        self._check_indices([index for index in indices if index is not None])
        return indices

    def _check_indices(self, indices: list[int]) -> None:
        """Raise UsageError for a problem that is not there, or whose prompt is too long, before anything changes."""
        for index in set(indices):
            self.task.problem(index)
            self.task.prompt(index)

    def _begin_all(self, slots: list[int], indices: list[int | None] | None, infos: dict[str, Any]) -> dict[str, Any]:
        """Start the next episodes of ``slots``; ``infos`` with theirs. Where one cannot be had, only a reset helps."""
        self._begun = False
        for slot in slots:
            start = self._begin(slot, indices[slot] if indices is not None else None)
            if start is not None:
                infos = self._add_info(infos, start, slot)
        self._begun = True
        return infos

    def _begin(self, slot: int, index: int | None) -> dict[str, Any] | None:
        """Start the next episode of a slot, on problem ``index`` if given; None where the slot idles."""
        card = self._deal(slot, index)
        if card is None:
            self._ids[slot] = self.task.pad_token_id
            self._live[slot] = False
            self._length[slot] = self._prompt[slot] = 0
            return None
        info = start_info(self.task, card.index, card.episode, card.group, card.sample)
        prompt = self.task.prompt(card.index)  # nothing of the slot has changed, should there be none
        self._ids[slot] = self.task.pad_token_id
        self._ids[slot, : len(prompt)] = prompt
        self._length[slot] = self._prompt[slot] = len(prompt)
        self._live[slot] = True
        self._episodes[slot] += 1
        self._infos[slot] = info
        return dict(info)

    def _deal(self, slot: int, index: int | None) -> Card | None:
        """From the deck, None when it is drained; without a deck, problem ``index`` or a drawn one."""
        if index is None and self._deck is not None:
            return self._deck.popleft() if self._deck else None
        if index is None:
            index = self.task.draw(self._rng(slot))
        episode = int(self._episodes[slot])
        return Card(index, episode, group=episode, sample=0)

    def _cut(
        self, live: NDArray[np.int64], finished: set[int], truncations: NDArray[np.bool_], infos: dict[str, Any]
    ) -> dict[str, Any]:
        """Truncate what has reached ``max_episode_steps``, as ``TimeLimit`` does: without a verdict."""
        if self.max_episode_steps is None:
            return infos
        for slot in live[self._length[live] - self._prompt[live] >= self.max_episode_steps].tolist():
            truncations[slot] = True
            if slot not in finished:
                infos = self._add_info(infos, {"final_obs": self._slot_observation(slot), "final_info": {}}, slot)
        return infos

    def _endings(self, live: NDArray[np.int64], tokens: NDArray[np.int64]) -> list[Ending]:
        """The episodes that end with these tokens. Stop strings alone need a look at every slot."""
        if self.task.template.stop:
            candidates = live
        else:
            full = self._length[live] - self._prompt[live] >= self.task.spec.max_new_tokens
            candidates = live[full | self._stops[tokens]]
        reasons = [(int(slot), self.task.finish_reason(self._completion(slot))) for slot in candidates]
        return [
            Ending(slot, self._infos[slot], reason, self._completion(slot).copy(), self._coin_seed(slot))
            for slot, reason in reasons
            if reason is not None
        ]

    def _coin_seed(self, slot: int) -> int | None:
        if self._deck is not None:
            return None
        self._rng(slot)
        return self._seeds[slot]

    def _verdicts(self, finished: list[Ending]) -> list[Verdict]:
        """The verdict on each, or ``PENDING`` for one that is deferred."""
        began = perf_counter()
        # All are requested before any is waited for, so that workers settle them side by side.
        futures = [self.task.verdict(one.completion, one.start["problem_index"]) for one in finished]
        verdicts = [PENDING if self._defer and not future.done() else future.result() for future in futures]
        late = zip(finished, futures, verdicts, strict=True)
        self._pending += [(one, future) for one, future, verdict in late if verdict is PENDING]
        self.reward_seconds += perf_counter() - began
        return verdicts

    def _completion(self, slot: int) -> NDArray[np.int64]:
        return self._ids[slot, self._prompt[slot] : self._length[slot]]

    def _text(self, slot: int) -> str:
        return self.task.tokenizer.decode(self._ids[slot, : self._length[slot]].tolist())

    def _slot_observation(self, slot: int) -> Observation:
        return {"input_ids": self._ids[slot].copy(), "length": np.array([self._length[slot]], dtype=np.int64)}

    def _observation(self) -> Observation:
        observation = {"input_ids": self._ids, "length": self._length[:, None]}
        return deepcopy(observation) if self.copy else observation


def _listed(given: Any, name: str) -> list[Any]:
    """The elements of a list, array or other iterable of reset options; raises UsageError for what is none."""
    try:
        return list(given)
    except TypeError:
        raise UsageError(f"{name}={given!r} is no list of problem indices") from None


def _settled(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future
