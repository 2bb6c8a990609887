"""A rollout: completions as the behaviour policy wrote them, with the log-probabilities they were sampled with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from envs.task import Task
from policies import Nested, Policy
from registry import UsageError


@dataclass(frozen=True)
class Rollout:
    """Completions of one behaviour policy, or a minibatch of them. Shape letters: B sequences, T completion tokens.

    Padding (``mask`` false) may hold anything finite; nothing may depend on it.

    Attributes:
        prompts: B one-dimensional int64 tensors; completions of one group share the same object.
        tokens: [B, T] int64, completion tokens, the final EOS included.
        mask: [B, T] bool, true on completion tokens.
        behavior_logp: [B, T] float32, log mu of each token under the distribution it was sampled from.
        reward: [B] float32, the sum over an episode: the verdict's in {0, 1}; with reward parts, or through a wrapper,
            any number.
        group: [B] int64, which completions answer the same dealt problem (equal numbers, any values).
        old_logp: [B, T] float32, log pi_old of each token: the target at rollout time, for trust regions. None until
            the agent has computed it; with one update per rollout it equals the current log pi.
        reference_logp: [B, T] float32, log ref of each token, where an anchor has measured it.
        target_logp: [B, T] float32, log-probabilities under the target that wrote a part of defensive groups, where
            that may be older than pi_old.
        age: [B] int64, iterations since a stored completion was written, 0 for a fresh one; None: all are fresh.
        borrowed: [B] bool, true where a stored completion has joined a fresh group; None: none has.
        by_target: [B] bool, true where the *full* model wrote the completion (defensive groups); None means nowhere.
        episodes: B terminal infos of the environment (problem_index, status, finish_reason, ...); may be empty.
    """

    prompts: tuple[Tensor, ...]
    tokens: Tensor
    mask: Tensor
    behavior_logp: Tensor
    reward: Tensor
    group: Tensor
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    target_logp: Tensor | None = None
    age: Tensor | None = None
    borrowed: Tensor | None = None
    by_target: Tensor | None = None
    episodes: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def truncated(self) -> Tensor:
        """[B] bool, true where the token budget cut the completion off."""
        if not self.episodes:
            raise ValueError("a rollout without episodes does not say why its completions ended")
        return torch.tensor([info["finish_reason"] == "length" for info in self.episodes], dtype=torch.bool)

    @property
    def kinds(self) -> dict[str, Tensor]:
        """[B] bool by kind, of which every completion has one: ``fresh``, ``stored`` in a group that is recalled whole,
        ``borrowed`` by a fresh group."""
        old = torch.zeros(len(self), dtype=torch.bool) if self.age is None else self.age > 0
        borrowed = torch.zeros_like(old) if self.borrowed is None else self.borrowed
        return {"fresh": ~old, "stored": old & ~borrowed, "borrowed": borrowed}

    @property
    def full_logp(self) -> Tensor | None:
        """[B, T] log-probabilities under the full model of the time of writing."""
        return self.old_logp if self.target_logp is None else self.target_logp

    @property
    def entropy(self) -> float:
        """-mean log mu over the tokens that mu wrote, in nats: an unbiased estimate of the mean entropy of mu's
        next-token distributions."""
        own = self.mask if self.by_target is None else self.mask & ~self.by_target[:, None]
        return float(-self.behavior_logp[own].double().mean()) if own.any() else 0.0

    def select(self, index: Tensor) -> Rollout:
        """The sequences at ``index`` ([N] int64), trimmed to their longest completion."""
        length = int(self.mask[index].sum(1).max()) if len(index) else 0
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                chosen[field.name] = value[index][:, :length] if value.dim() == 2 else value[index]
            elif value:
                chosen[field.name] = tuple(value[i] for i in index.tolist())
        return replace(self, **chosen)


NOTHING = Rollout(
    prompts=(),
    tokens=torch.zeros(0, 0, dtype=torch.int64),
    mask=torch.zeros(0, 0, dtype=torch.bool),
    behavior_logp=torch.zeros(0, 0),
    reward=torch.zeros(0),
    group=torch.zeros(0, dtype=torch.int64),
)


def joined(first: Rollout, second: Rollout) -> Rollout:
    """The completions of both, padded to the longer, with what is known of both."""
    width = max(first.mask.shape[1], second.mask.shape[1])
    parts: dict[str, Any] = {}
    for field in fields(Rollout):
        ours, theirs = getattr(first, field.name), getattr(second, field.name)
        if ours is None or theirs is None:
            continue
        if isinstance(ours, Tensor):
            pair = [F.pad(one, (0, width - one.shape[1])) if one.dim() == 2 else one for one in (ours, theirs)]
            parts[field.name] = torch.cat(pair)
        else:
            parts[field.name] = (*ours, *theirs)
    return Rollout(**parts)


class Acts(Protocol):
    """What writes completions: a ``policies.Behavior``, or anything with its ``act``."""

    def act(
        self, obs: dict[str, NDArray[np.int64]], start: NDArray[np.bool_], episode: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...


@dataclass(frozen=True)
class GroupMixture:
    """Defensive groups: in one rollout, the first ``target_written`` completions of every group are written by the
    target, the others by the nested policy. Both keep KV slots for all env slots; each acts on its own episodes."""

    nested: Acts
    target: Acts
    group_size: int
    target_written: int

    def act(
        self, obs: dict[str, NDArray[np.int64]], start: NDArray[np.bool_], episode: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As ``Behavior.act``; a slot the other one writes looks idle."""
        by_target = episode % self.group_size < self.target_written
        ids, length = obs["input_ids"], obs["length"]
        tokens, logp = self.nested.act({"input_ids": ids, "length": length * ~by_target[:, None]}, start, episode)
        theirs, theirs_logp = self.target.act({"input_ids": ids, "length": length * by_target[:, None]}, start, episode)
        return np.where(by_target, theirs, tokens), np.where(by_target, theirs_logp, logp)

    @torch.no_grad()
    def score(self, rollout: Rollout, policy: Policy, layers: Nested) -> Rollout:
        """Mark the completions of the target and put the nested policy's log-probabilities of them in place."""
        by_target = torch.arange(len(rollout)) % self.group_size < self.target_written
        index = by_target.nonzero()[:, 0]
        theirs = rollout.select(index)
        behavior_logp = rollout.behavior_logp.clone()
        scored = policy.logprobs(theirs.prompts, theirs.tokens, theirs.mask, layers=layers)
        behavior_logp[index, : scored.shape[1]] = scored.to(behavior_logp)
        return replace(rollout, by_target=by_target, behavior_logp=behavior_logp)


# (tokens of the step, what SB3 calls its locals) -> whether to go on. The locals are ``actions`` [S], ``rewards`` [S],
# ``dones`` [S], ``infos`` (S terminal infos or {}) and ``new_obs``.
OnStep = Callable[[int, dict[str, Any]], bool]


def count_steps(agent: Any, hooks: Any) -> OnStep:
    """Counts timesteps on the agent, a timestep being a token, and asks stable-baselines3's callbacks, if any."""

    def on_step(tokens: int, seen: dict[str, Any]) -> bool:
        agent.num_timesteps += tokens
        if hooks is None:
            return True
        hooks.update_locals({**seen, "new_obs": deepcopy(seen["new_obs"])})  # SB3's callbacks look for these
        return hooks.on_step()

    return on_step


class Interrupted(Exception):
    """A callback stopped the rollout; what was written so far is dropped."""


def one_each(what: str, component: Any, values: Any, count: int) -> Tensor:
    """What a component gave for ``count`` completions: a number each.

    Raises:
        UsageError: it gave something else.
    """
    if isinstance(values, Tensor) and values.shape == (count,):
        return values
    name = getattr(component, "__name__", type(component).__name__)
    given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise UsageError(f"{what} {name} returned {given}: return a tensor of one number a completion, [{count}]")


def _checked_rewards(rewards: Any, slots: int) -> NDArray[np.float64]:
    if np.shape(rewards) != (slots,) or np.asarray(rewards).dtype.kind not in "fiub":
        raise UsageError(
            f"the environment's step gave the rewards {rewards!r}: a wrapper must return a number a slot, [{slots}]"
        )
    return np.asarray(rewards, dtype=np.float64)


def collect(
    mu: Acts,
    envs: VectorEnv,
    problems: Sequence[int],
    group_size: int,
    on_step: OnStep | None = None,
    first_group: int = 0,
    defer: bool = True,
) -> Rollout:
    """Deal ``problems`` x ``group_size`` episodes to the slots of ``envs`` and drain them all.

    Args:
        mu: the behaviour policy, with one KV slot an env slot.
        envs: a ``MathReasonVector``, or a gymnasium vector wrapper of one.
        on_step: called after each step; a false answer stops the rollout.
        first_group: where ``problems`` begin in a deck that several processes share.
        defer: whether verdicts of workers may come after the last step; if not, no info is ``pending``.

    Returns:
        A ``Rollout`` in the order of the deck, whatever the number of slots.

    Raises:
        Interrupted: ``on_step`` answered false.
    """
    task: Task = envs.unwrapped.task  # type: ignore[attr-defined]  # of MathReasonVector
    total, budget = len(problems) * group_size, task.spec.max_new_tokens
    tokens = np.zeros((total, budget), dtype=np.int64)
    logp = np.zeros((total, budget), dtype=np.float32)
    written = np.zeros(total, dtype=np.int64)
    reward = np.zeros(total, dtype=np.float32)
    finals: list[dict[str, Any]] = [{} for _ in range(total)]
    episode = np.full(envs.num_envs, -1, dtype=np.int64)

    # A wrapper that shapes rewards must see them when they are given, so only the bare env may hand verdicts in later.
    defer = defer and envs is envs.unwrapped
    first = first_group * group_size
    options = {"deck": list(problems), "group_size": group_size, "first_group": first_group, "defer": defer}
    began = perf_counter()
    obs, info = envs.reset(options=options)
    start = _begin(info, episode)
    while (live := obs["length"][:, 0] > 0).any():
        actions, action_logp = mu.act(obs, start, episode)
        rows = episode[live] - first
        tokens[rows, written[rows]] = actions[live]
        logp[rows, written[rows]] = action_logp[live]
        written[rows] += 1
        obs, rewards, terminated, truncated, info = envs.step(actions)
        reward[rows] += _checked_rewards(rewards, len(live))[live]  # a wrapper may pay before the end
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in done]
        for slot in np.flatnonzero(done):
            row = episode[slot] - first
            finals[row] = {k: value[slot] for k, value in info["final_info"].items() if k[0] != "_"}
            episode_info = {"r": float(reward[row]), "l": int(written[row]), "t": perf_counter() - began}
            infos[slot] = {**finals[row], "episode": episode_info}
        seen = {"actions": actions, "rewards": rewards, "dones": done, "infos": infos, "new_obs": obs}
        if on_step is not None and not on_step(int(live.sum()), seen):
            raise Interrupted
        start = _begin(info, episode)
    for late, final in envs.settle() if defer else ():  # type: ignore[attr-defined]
        row = final["episode_id"] - first
        reward[row], finals[row] = late, final
    longest = int(written.max(initial=1))
    prompts = [torch.as_tensor(task.prompt(index)) for index in problems]
    return Rollout(
        prompts=tuple(prompts[e // group_size] for e in range(total)),
        tokens=torch.from_numpy(tokens[:, :longest]),
        mask=torch.arange(longest) < torch.from_numpy(written)[:, None],
        behavior_logp=torch.from_numpy(logp[:, :longest]),
        reward=torch.from_numpy(reward),
        group=first_group + torch.arange(total) // group_size,
        episodes=tuple(finals),
    )


def _begin(info: dict[str, Any], episode: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[S] bool, the slots that begin an episode; writes their ids into ``episode``."""
    start = info.get("_episode_id", np.zeros(len(episode), dtype=np.bool_))
    episode[start] = info["episode_id"][start] if start.any() else 0
    return start
