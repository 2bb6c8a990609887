"""``sb3-ppo``: stable-baselines3's own PPO on the same environment, the classical baseline.

The original ReFT (Luong et al., arXiv 2401.08967) was PPO with a value head on the language model. Here the loop, the
clipped loss, the value loss and GAE are stable-baselines3's, untouched; a language model takes the place of its
networks:

    features     the final hidden state at the last token of the prefix
    actor        the model's own head: logits of the next token
    critic       a linear head on the same hidden state

Two things differ from SB3's habits, both so that runs compare with the other agents and resume to the same numbers:
every iteration begins with fresh episodes seeded by (seed, iteration), and the token budget ends an episode for good
(the verifier has judged the completion, so nothing is bootstrapped beyond it). There is no KL penalty to the initial
model: SB3's PPO has none.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import nn

from agents.actor_critic import LanguageModelActorCritic
from agents.algorithm import SavesFolders
from agents.arguments import (
    check_learning_rate,
    check_lora_rank,
    check_seed,
    number_or_schedule,
    scheduled,
    settle_device,
)
from agents.environments import slots_of, vector_env_in_place, vector_env_of
from agents.memory import check_memory
from agents.monitoring.metrics import episode_metrics
from agents.monitoring.watch import Watch
from agents.rollout import Interrupted
from agents.saving.configuration import constructor_arguments, in_force
from agents.sb3_policy import choose_trained, target_of
from agents.schedules import Spent
from agents.update import NotFinite, refuse_broken_step
from envs.sb3 import SB3VecEnv
from policies import Policy
from registry import UsageError, agents

SLOTS = 64
TRAINED = ("approx_kl", "clip_fraction", "value_loss", "policy_gradient_loss", "entropy_loss", "explained_variance")


class SlotRolloutBuffer(DictRolloutBuffer):
    """SB3's rollout buffer with minibatches of whole slots, so that the prefixes of an episode share a forward."""

    def get(self, batch_size: int | None = None) -> Iterator[DictRolloutBufferSamples]:  # type: ignore[override]
        """Minibatches of ``batch_size`` transitions, a multiple of the slot's."""
        if not self.generator_ready:
            next(super().get(None))  # flattens the arrays: slot s then holds rows s * n_steps to (s + 1) * n_steps - 1
        steps = np.arange(self.buffer_size)
        order = np.random.permutation(self.n_envs)
        size = self.n_envs if batch_size is None else batch_size // self.buffer_size
        for first in range(0, self.n_envs, size):
            chosen = order[first : first + size]
            yield self._get_samples((chosen[:, None] * self.buffer_size + steps).ravel())


class BudgetEndsEpisodes(SB3VecEnv):
    """The environment without SB3's mark of a time limit: a completion out of budget has its verdict and its value."""

    def step_wait(self) -> VecEnvStepReturn:
        observation, rewards, done, infos = super().step_wait()
        for info in infos:
            info.pop("TimeLimit.truncated", None)
        return observation, rewards, done, infos


def check_steps(n_steps: int, env: SB3VecEnv) -> None:
    """Raise UsageError where an iteration of ``n_steps`` may end no episode."""
    budget = env.venv.unwrapped.task.spec.max_new_tokens  # type: ignore[attr-defined]
    if n_steps < budget:
        raise UsageError(
            f"n_steps={n_steps} is less than the completion budget of {budget} tokens (max_new_tokens), so an "
            f"iteration may end no episode: raise it to {budget} or more"
        )


@agents.register("sb3-ppo")
class SB3PPO(SavesFolders, PPO):  # type: ignore[misc]
    """PPO of stable-baselines3 with a language-model actor-critic. A timestep is one token.

    Use: as the classical baseline, with a value head.

    Args:
        policy: the target: ``tiny`` (built in), a Hugging Face folder, a hub id, or a ``policies.Policy``.
        env: as for ``agents.reft.ReFT``.
        learning_rate: of Adam, actor and critic; a number or an SB3 schedule.
        n_steps: tokens per slot and iteration, at least the completion budget, so that episodes end in every slot.
        batch_size: transitions per optimizer step, a multiple of ``n_steps`` (whole slots). Logits of
            [batch_size, V] are held, with gradients.
        n_epochs: passes over one rollout.
        gamma: discount; 1, since the reward comes once, at the end.
        gae_lambda: of generalised advantage estimation.
        clip_range: of the probability ratio; a number or an SB3 schedule.
        ent_coef, vf_coef: weights of entropy bonus and value loss.
        detached_critic: the value loss trains its linear head alone, not the language model.
        normalize_advantage: to mean 0 and deviation 1 per minibatch.
        max_grad_norm: gradient norm clip.
        target_kl: ends an iteration's updates early where the approximate KL passes 1.5 times this.
        lora_rank: as for ``agents.reft.ReFT``.
        slots: env slots, when ``env`` does not say; 64.
        seed: of everything drawn.
    """

    def __init__(  # noqa: PLR0913 (stable-baselines3's habit: hyper-parameters are keyword arguments)
        self,
        policy: str | Policy = "tiny",
        env: Any = "MathReason-v0",
        learning_rate: float | Schedule = 3e-4,
        *,
        n_steps: int = 48,
        batch_size: int = 768,
        n_epochs: int = 2,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        detached_critic: bool = True,
        normalize_advantage: bool = True,
        max_grad_norm: float = 1.0,
        target_kl: float | None = None,
        lora_rank: int = 0,
        slots: int | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: str = "cpu",
        seed: int | None = 0,
        _init_setup_model: bool = True,
    ) -> None:
        self.arguments = constructor_arguments(SB3PPO, locals())
        device = settle_device(policy, device)
        venv = BudgetEndsEpisodes(vector_env_of(env, slots_of(env, slots, SLOTS)))
        check_steps(n_steps, venv)
        if batch_size < n_steps or batch_size % n_steps:
            raise UsageError(
                f"batch_size={batch_size} must be a multiple of n_steps={n_steps}: minibatches are whole slots"
            )
        if n_epochs < 1:
            raise UsageError(f"n_epochs={n_epochs} must be at least 1")
        if target_kl is not None and not 0 < target_kl < math.inf:
            raise UsageError(f"target_kl={target_kl} must be a finite number above 0, or None")
        check_lora_rank(lora_rank)
        self.lora_rank = lora_rank
        self.iteration = 0
        self.nesting = self.problem_sampler = None
        self.metrics: dict[str, float] = {}
        self._given_policy = policy
        self._detached_critic = detached_critic
        self._finals: list[dict[str, Any]] = []
        self.watch = Watch()
        super().__init__(
            policy=LanguageModelActorCritic,
            env=venv,
            learning_rate=number_or_schedule(learning_rate, "learning_rate"),
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=number_or_schedule(clip_range, "clip_range"),
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            target_kl=target_kl,
            rollout_buffer_class=SlotRolloutBuffer,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=check_seed(seed),
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        """Load the target, then what SB3 sets up around it."""
        longest = self.envs.unwrapped.task.max_length
        self.target = target_of(self._given_policy, self.action_space, str(self.device), longest=longest)
        choose_trained(self.target, self.lora_rank, None, self.seed or 0)
        if self.target.dtype != torch.float32:
            raise UsageError(
                "agent 'sb3-ppo' multiplies in float32, and the policy that it is given in "
                f"{str(self.target.dtype).removeprefix('torch.')}: load it with dtype='float32'"
            )
        scheduled(FloatSchedule(self.learning_rate), 1.0, "learning_rate")  # before an optimizer is made with it
        self.policy_kwargs = {"target": self.target, "detached_critic": self._detached_critic}
        super()._setup_model()
        trained = sum(p.numel() for p in self.target.parameters() if p.requires_grad)
        check_learning_rate(self._scheduled(), 0 if self.lora_rank else trained)
        check_memory(self.target, self.envs.unwrapped.task, self.optimizer, self.n_envs)
        self.optimizer.register_step_pre_hook(refuse_broken_step)
        self.layers = tuple(range(self.target.num_layers))
        # What SB3 makes in learn(), for a caller that iterates by hand.
        self._logger = Logger(None, [])
        self.ep_info_buffer = deque(maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        self.made = in_force(self)

    def _scheduled(self) -> float:
        """The learning rate of now. Raises UsageError where a schedule gives none, or no clip."""
        remaining = self._current_progress_remaining
        if not scheduled(self.clip_range, remaining, "clip_range") > 0:  # type: ignore[arg-type]
            raise UsageError("clip_range is 0, with which no step would move a weight")
        return scheduled(self.lr_schedule, remaining, "learning_rate")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of actor and critic."""
        return self.policy.optimizer

    @property
    def critic(self) -> nn.Module:
        """The value head."""
        return self.policy.value_net

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As of ``agents.reft.ReFT``; the budget goes on to end episodes for good."""
        venv = BudgetEndsEpisodes(vector_env_in_place(env, self.n_envs))
        check_steps(self.n_steps, venv)
        super().set_env(venv, force_reset)

    def iterate(self, hooks: BaseCallback | None = None, spent: Spent | None = None) -> dict[str, float]:
        """One rollout and its updates, as ``learn`` does; returns the metrics. ``spent`` as of ``agents.reft.ReFT``."""
        if spent is not None:
            self._current_progress_remaining = 1.0 - spent(self.iteration, self.num_timesteps)
        hooks = hooks or self._init_callback(None)
        assert self.env is not None
        if not self.collect_rollouts(self.env, hooks, self.rollout_buffer, self.n_steps):
            raise Interrupted
        self.train()
        return self.metrics

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """SB3's, from fresh episodes and random numbers of (seed, iteration)."""
        self.set_random_seed(int(np.random.SeedSequence([self.seed or 0, self.iteration]).generate_state(1)[0]))
        self.begun_with = self.num_timesteps
        self._began = time.perf_counter()
        judged = self.envs.unwrapped.reward_seconds
        self._last_obs = env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(env.num_envs, dtype=np.bool_)
        self._finals = []
        finished = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self._wrote = time.perf_counter()
        self._judging = self.envs.unwrapped.reward_seconds - judged
        ends = np.vstack([self.rollout_buffer.episode_starts[1:], self._last_episode_starts]).astype(bool)
        self._reward_spread = float(np.ptp(self.rollout_buffer.rewards[ends])) if ends.any() else 0.0
        return finished

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        self._finals += [info for info in infos if "finish_reason" in info]

    def train(self) -> None:
        """SB3's updates; rollouts then see the new weights."""
        began = time.perf_counter()
        self._scheduled()
        try:
            super().train()
        except NotFinite as error:
            raise UsageError(f"iteration {self.iteration + 1}: {error}") from error
        self.target.refresh()
        self.iteration, self.begun_with = self.iteration + 1, None
        recorded = self.logger.name_to_value
        tokens = self.n_steps * self.n_envs
        self.metrics = {
            **episode_metrics(self._finals),
            "reward_spread": self._reward_spread,
            **{name: float(recorded[f"train/{name}"]) for name in TRAINED},
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "layers_kept": len(self.layers),
            "skip_ratio": 0.0,
            "tokens": tokens,
            "time/rollout": self._wrote - self._began - self._judging,
            "time/reward": self._judging,
            "time/update": time.perf_counter() - began,
            "rollout_tokens_per_second": tokens / (self._wrote - self._began),
        }
        self.watch(self.metrics)
