"""A ``policies.Policy`` behind stable-baselines3's policy interface: ``predict`` for callbacks and evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from stable_baselines3.common.policies import BasePolicy

from agents.saving.checkpoint import CRITIC
from agents.saving.folder import folder_of
from policies import Behavior, Policy
from policies.sharding import leads
from registry import UsageError

POLICY = "policy.json"


def target_of(
    given: str | Policy,
    actions: spaces.Space[Any],
    device: str,
    dtype: str | None = None,
    gradient_checkpointing: bool = False,
    longest: int = 0,
) -> Policy:
    """The policy that an agent was given or names, with gradient checkpointing where it is asked for. ``longest``
    is the most tokens of a prompt and its completion.

    Raises:
        UsageError: it cannot be loaded, its logits are not the environment's ``actions``, it has fewer positions than
            ``longest``, or gradient checkpointing is wanted of transformers' own layers.
    """
    target = given if isinstance(given, Policy) else Policy.load(given, device, dtype)
    if isinstance(given, Policy) and dtype not in (None, "auto") and dtype != str(target.dtype).removeprefix("torch."):
        raise UsageError(
            f"dtype={dtype!r}, but the policy given computes in {target.dtype}: leave dtype out, or make the policy "
            "with Policy.load(..., dtype=...)"
        )
    count = int(actions.n) if isinstance(actions, spaces.Discrete) else None
    if target.vocab_size != count:
        folder = repr("builtin" if given == "tiny" else given) if isinstance(given, str) else "its folder"
        raise UsageError(
            f"the policy has {target.vocab_size} logits, the environment {count} tokens: "
            f"give the environment the policy's tokenizer (tokenizer={folder}) and, where that has another number of "
            f"tokens, vocab_size={target.vocab_size}"
        )
    target.check_length(longest)
    if gradient_checkpointing:
        if not target.functional:
            raise UsageError(
                "gradient_checkpointing=True needs the project's layers, and this checkpoint runs on transformers' own "
                "(the project's do not reproduce it): leave gradient_checkpointing out and lower microbatch_tokens"
            )
        target.gradient_checkpointing = True
    return target


def choose_trained(target: Policy, lora_rank: int, trained_layers: Sequence[int] | None, seed: int) -> None:
    """Train low-rank adapters where a rank is given (alpha is twice that, ``seed`` that of their first factor), and
    ``trained_layers`` alone where they are.

    Raises:
        UsageError: there are adapters already, or no such layers.
    """
    if lora_rank:
        target.add_adapters(lora_rank, 2 * lora_rank, seed, trained_layers)
    elif trained_layers is not None:
        target.train_only(trained_layers)


class PredictsWithSlots:
    """``predict`` of stable-baselines3 by the full model.

    It keeps the KV slots in the recurrent ``state`` that SB3 hands back, so that ``evaluate_policy`` decodes one token
    a step. Without a state it reads the whole prefix again: correct, slower.

    Attributes:
        target: the policy, which samples at its own temperature; ``deterministic`` is greedy.
    """

    target: Policy
    observation_space: spaces.Space[Any]
    _calls = 0

    def refresh(self) -> None:
        """Call after weights were changed from outside: rollouts then see the new ones."""
        self.target.refresh()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; rollouts then see the new weights."""
        keys = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.refresh()
        return keys

    def save(self, path: Any) -> None:
        """Write the model as a Hugging Face folder, with the value head, if there is one, and the spaces beside it:
        what ``load`` takes. ``agent.save`` keeps the whole agent."""
        folder = folder_of(path)
        self.target.save(folder)
        if self.target.sharded and not leads():
            return
        if hasattr(self, "value_net"):
            save_file(self.value_net.state_dict(), folder / CRITIC)
        assert isinstance(self.observation_space, spaces.Dict)
        (length,) = self.observation_space["input_ids"].shape  # type: ignore[misc]
        state = {"max_length": length, "temperature": self.target.temperature, **self._settings()}
        state["dtype"] = str(self.target.dtype).removeprefix("torch.")
        (folder / POLICY).write_text(json.dumps(state))

    @classmethod
    def load(cls, path: Any, device: Any = "cpu") -> Any:
        """A policy from ``save``'s folder.

        Raises:
            UsageError: ``save`` has not written it.
        """
        folder = folder_of(path)
        if not (folder / POLICY).is_file():
            raise UsageError(
                f"{folder} is no saved policy: {POLICY} is missing (a saved agent is opened by the agent's own load, a "
                f"plain model by policies.Policy.load)"
            )
        state = json.loads((folder / POLICY).read_text())
        where = "cpu" if str(device) == "auto" else str(device)
        target = Policy.load(str(folder), where, state.pop("dtype", "float32"))
        target.temperature = state.pop("temperature")
        ids = spaces.Box(0, target.vocab_size - 1, (state["max_length"],), np.int64)
        length = spaces.Box(0, state.pop("max_length"), (1,), np.int64)
        observations = spaces.Dict({"input_ids": ids, "length": length})
        policy = cls(observations, spaces.Discrete(target.vocab_size), lambda _: 0.0, target=target, **state)  # type: ignore[call-arg]
        if hasattr(policy, "value_net"):
            policy.value_net.load_state_dict(load_file(folder / CRITIC))
        return policy

    def _settings(self) -> dict[str, Any]:
        """Further arguments of the constructor, JSON-able."""
        return {}

    def load_from_vector(self, vector: NDArray[np.float32]) -> None:
        """SB3's; rollouts then see the new weights."""
        super().load_from_vector(vector)  # type: ignore[misc]
        self.refresh()

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[np.int64], Any]:
        """The next token of each slot: greedy if ``deterministic``, else sampled at the training temperature."""
        if not isinstance(observation, Mapping) or set(observation) != {"input_ids", "length"}:
            raise UsageError(
                "predict takes an observation of the environment, {'input_ids': ..., 'length': ...}, and not "
                f"{type(observation).__name__}"
                + (f" of {', '.join(map(repr, observation))}" if isinstance(observation, Mapping) else "")
            )
        single = observation["input_ids"].ndim == 1
        obs = {key: np.atleast_2d(value) for key, value in observation.items()}
        slots, length = obs["input_ids"].shape
        fresh = state is None or state.version != self.target.version or state.greedy != deterministic
        if fresh:
            state = PredictState(self, slots, length, deterministic)
        start = np.ones(slots, dtype=np.bool_) if fresh or episode_start is None else np.asarray(episode_start, bool)
        actions = state.act(obs, start)
        return (actions[0] if single else actions), state


class LanguageModelPolicy(PredictsWithSlots, BasePolicy):
    """The full model as an SB3 policy, for agents whose update does not go through SB3's policy interface."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Any = None,
        *,
        target: Policy,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=False)
        self.target = target
        self.model = target.model

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Not a feed-forward network: use ``predict``."""
        raise NotImplementedError("use predict(), or policies.Policy.logprobs for log-probabilities with gradients")

    _predict = forward


class PredictState:
    """What SB3 carries between ``predict`` calls: a behaviour and the episode number of each slot."""

    def __init__(self, policy: PredictsWithSlots, slots: int, length: int, greedy: bool) -> None:
        target = policy.target
        policy._calls += 1
        self.greedy = greedy
        self.version = target.version
        self.behavior: Behavior = target.behavior(
            tuple(range(target.num_layers)),
            slots=slots,
            max_length=length,
            temperature=0.0 if greedy else None,
            seed=policy._calls,
        )
        self.episode = np.zeros(slots, dtype=np.int64)
        self.count = 0

    def act(self, obs: dict[str, NDArray[np.int64]], start: NDArray[np.bool_]) -> NDArray[np.int64]:
        """[S] tokens."""
        self.episode[start] = self.count + np.arange(int(start.sum()))
        self.count += int(start.sum())
        return self.behavior.act(obs, start, self.episode)[0]
