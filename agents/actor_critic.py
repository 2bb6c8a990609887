"""A language model as stable-baselines3's actor-critic policy, on the environment's padded prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from agents.sb3_policy import PredictsWithSlots
from policies import Behavior, Policy


class LastHidden(BaseFeaturesExtractor):
    """Observation -> [B, width], the final hidden state at the last token of each prefix.

    Prefixes that another one of the batch continues take their state from its forward: in a causal model the two are
    the same. A batch of whole episodes so costs one forward a token, not one a prefix.
    """

    def __init__(self, observation_space: spaces.Dict, target: Policy) -> None:
        super().__init__(observation_space, features_dim=target.config.hidden_size)
        self.target = target
        self.decoder = target.model.model

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """``input_ids`` [B, L] and ``length`` [B, 1], of any number type."""
        ids, length = observations["input_ids"].long(), observations["length"].long()[:, 0].clamp(min=1)
        whole, within = longest_prefixes(ids.cpu().numpy(), length.cpu().numpy())
        # Padding stands to the right, where causal attention never looks.
        padded = ids[torch.from_numpy(whole), : int(length.max())]
        hidden = self.decoder(input_ids=padded, use_cache=False).last_hidden_state
        return hidden[torch.from_numpy(within), length - 1]


def longest_prefixes(ids: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of ``ids`` [B, L] with ``length`` [B] no other row continues ([U] row numbers), and for each row a row
    that continues it or equals it ([B] indices into the former)."""
    keys = [row[:size].tobytes() for row, size in zip(ids, length, strict=True)]
    whole: list[int] = []
    within = np.empty(len(keys), dtype=np.int64)
    after = b""
    # In lexicographic order a prefix stands right before everything that continues it.
    for row in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
        if not after.startswith(keys[row]):
            whole.append(row)
        within[row] = len(whole) - 1
        after = keys[row]
    return np.array(whole, dtype=np.int64), within


class Critic(nn.Linear):
    """[B, width] -> [B, 1], the expected reward; ``detached`` keeps its gradient out of the language model."""

    def __init__(self, width: int, detached: bool) -> None:
        super().__init__(width, 1)
        self.detached = detached
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.detach() if self.detached else hidden)


class LanguageModelActorCritic(PredictsWithSlots, ActorCriticPolicy):
    """SB3's actor-critic policy around a language model; the observation is the environment's padded prefix.

    Args:
        target: the language model.
        detached_critic: the value loss trains the critic alone, not the language model.
    """

    features_extractor: LastHidden

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        target: Policy,
        detached_critic: bool = True,
        use_sde: bool = False,
    ) -> None:
        self._detached_critic = detached_critic
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            use_sde=use_sde,
            features_extractor_class=LastHidden,
            features_extractor_kwargs={"target": target},
        )
        self.target = target
        self._memo: tuple[int, Behavior] | None = None

    def _build(self, lr_schedule: Schedule) -> None:
        self._build_mlp_extractor()  # the identity, as net_arch is empty
        self.action_net = self.features_extractor.target.model.lm_head
        self.value_net = Critic(self.features_dim, self._detached_critic)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _settings(self) -> dict[str, Any]:
        return {"detached_critic": self._detached_critic}

    def set_training_mode(self, mode: bool) -> None:
        """Dropout stays off, so that probability ratios begin at 1."""
        self.train(False)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B], values [B, 1] and log-probabilities [B]. Without gradients (in rollouts) through KV slots."""
        if torch.is_grad_enabled():
            return super().forward(obs, deterministic)  # type: ignore[arg-type]
        hidden = self._states(obs)
        distribution = self._get_action_dist_from_latent(hidden)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.value_net(hidden), distribution.log_prob(actions)

    def _states(self, obs: PyTorchObs) -> Tensor:
        assert isinstance(obs, dict)
        slots, longest = obs["input_ids"].shape
        if self._memo is None or self._memo[0] != self.target.version or self._memo[1].slots != slots:
            layers = tuple(range(self.target.num_layers))
            self._memo = self.target.version, self.target.behavior(layers, slots=slots, max_length=longest)
        return self._memo[1].states({key: value.cpu().numpy() for key, value in obs.items()})
