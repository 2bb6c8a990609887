"""What every agent has of a stable-baselines3 algorithm: the environment, ``learn``, files on disk.

An agent itself is its constructor, ``_setup_model`` and ``iterate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, safe_mean

import agents.saving.checkpoint as checkpoint
import agents.saving.hub as hub
from agents.arguments import check_learning_rate, check_parameters, check_seed, number_or_schedule, scheduled
from agents.environments import vector_env_in_place, vector_env_of
from agents.rollout import Interrupted
from agents.sb3_policy import LanguageModelPolicy, choose_trained, target_of
from agents.schedules import Spent
from envs.sb3 import SB3VecEnv
from policies import Policy
from policies.sharding import shape_of
from registry import UsageError, check_number
from registry.memory import return_freed

RETURN_EVERY = 10  # iterations of learn() after which freed memory goes back to the system


class TokenBar(ProgressBarCallback):
    """Stable-baselines3's progress bar, of tokens."""

    def _on_training_start(self) -> None:
        self.locals["total_timesteps"] = self.locals["total"]  # with those of earlier calls, as num_timesteps is
        super()._on_training_start()
        self.begun = self.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self.begun - self.pbar.n)
        return True


class SavesFolders:
    """Weights in and out, for stable-baselines3's own algorithms, too."""

    env: Any
    made: Mapping[str, Any] = {}  # ``in_force`` when it was set up
    begun_with: int | None = None  # num_timesteps before an iteration that is not finished

    @property
    def envs(self) -> Any:
        """The gymnasium vector env that problems come from."""
        assert isinstance(self.env, SB3VecEnv)
        return self.env.venv

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto") -> None:
        """``get_parameters``' weights and optimizer; rollouts then see them."""
        check_parameters(load_path_or_dict, type(self))
        super().set_parameters(load_path_or_dict, exact_match, device)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An agent is neither copied nor pickled: parts of it would be shared with the first one, or be lost."""
        name = type(self).__name__
        raise UsageError(
            f"{name} cannot be copied or pickled: agent.save(folder) writes all of it, and {name}.load(folder) makes a "
            "second one that goes on from there"
        )

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write a Hugging Face folder that ``from_pretrained`` takes, the optimizer and the constructor's arguments
        beside it, and a value head if there is one; nothing is pickled. ``m.zip`` names the folder ``m``, and a binary
        file gets a zip of the folder."""
        checkpoint.save(self, path, exclude, include)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a model trained by reinforced fine-tuning",
        card: str | None = None,
    ) -> str:
        """Upload the model as it is now, its tokenizer and a model card to the Hugging Face hub; returns its address.
        ``Policy.load(repo_id)`` and transformers' ``from_pretrained`` take it; adapters are merged, and what only going
        on needs (the optimizer) stays here.

        Args:
            repo_id: ``org/name``; it is made if it is not there.
            private: who may see a repository that is made; None: the owner's default.
            token: of the hub, which must be allowed to write; None: that of ``hf auth login`` or ``HF_TOKEN``.
            commit_message: in the repository's history.
            card: the text of README.md; None: one is made of the agent's settings.

        Raises:
            UsageError: the hub refuses, or cannot be reached.
        """
        return hub.push(self, repo_id, private, token, commit_message, card)

    @classmethod
    def load(
        cls,
        path: Any,
        env: Any = None,
        device: str | None = None,
        custom_objects: Mapping[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """An agent from what ``save`` wrote, ready to go on: weights, optimizer, counters, what components have
        learned, and the arguments and the environment that it was made with unless others are given. Every iteration
        begins with fresh episodes, whatever ``force_reset``."""
        return checkpoint.load(cls, path, env, custom_objects, print_system_info, device, **kwargs)


class LanguageModelAlgorithm(SavesFolders, BaseAlgorithm):  # type: ignore[misc]
    """An algorithm that trains a language model; a timestep is one token.

    ``iterate(hooks, spent)`` is one iteration: ``hooks`` are stable-baselines3's callbacks, ``spent`` tells what share
    of the run some iterations and tokens are (``agents.schedules``). It raises ``Interrupted`` where a callback stops.

    Attributes:
        weight_decay, adam_betas, adam_eps: of AdamW.
        lora_rank, trained_layers, gradient_checkpointing: of the target.
        schedule: of the learning rate, a component of ``registry.schedules``.
        iteration: how many are done.
        metrics: of the last one; a name without a slash is logged under ``log_name``.
    """

    log_name: ClassVar[str]
    weight_decay: float
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    lora_rank: int = 0
    trained_layers: Sequence[int] | None = None
    gradient_checkpointing: bool = False
    schedule: Any
    iteration: int
    metrics: dict[str, float]

    def __init__(
        self,
        env: Any,
        slots: int,
        learning_rate: float | Schedule,
        *,
        tensorboard_log: str | None,
        verbose: int,
        device: str,
        seed: int | None,
    ) -> None:
        self.iteration = 0
        self.metrics = {}
        super().__init__(
            policy=LanguageModelPolicy,
            env=SB3VecEnv(vector_env_of(env, slots)),
            learning_rate=number_or_schedule(learning_rate, "learning_rate"),
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=check_seed(seed),
            supported_action_spaces=(spaces.Discrete,),
        )

    def _make_target(self, given: str | Policy, dtype: str | None) -> None:
        """Load ``target``, and make what trains it: ``policy``, ``optimizer``, ``lr_schedule``; a silent logger, as
        stable-baselines3 makes in ``learn()``, serves ``iterate()`` alone."""
        self.target = self._load_target(given, dtype, str(self.device))
        self.policy = LanguageModelPolicy(self.observation_space, self.action_space, target=self.target)
        self._rate_given, self.lr_schedule = self.learning_rate, FloatSchedule(self.learning_rate)
        trained = [p for p in self.target.parameters() if p.requires_grad]
        rate = scheduled(self.lr_schedule, 1.0, "learning_rate")
        check_learning_rate(rate, 0 if self.lora_rank else sum(shape_of(p).numel() for p in trained))
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=rate,
            weight_decay=self.weight_decay,
            betas=self.adam_betas,
            eps=self.adam_eps,
            fused=True,
        )
        self.policy.optimizer = self.optimizer  # where SB3's algorithms have theirs
        self._logger = Logger(None, [])

    def _load_target(self, given: str | Policy, dtype: str | None, device: str) -> Policy:
        longest = self.envs.unwrapped.task.max_length
        target = target_of(given, self.action_space, device, dtype, self.gradient_checkpointing, longest)
        choose_trained(target, self.lora_rank, self.trained_layers, self.seed or 0)
        return target

    def iterate(self, hooks: BaseCallback | None = None, spent: Spent | None = None) -> dict[str, float]:
        """One iteration; returns its metrics."""
        raise NotImplementedError

    def _rate(self, begun: float, ended: float) -> float:
        """The learning rate of an iteration that begins and ends where these shares of the run are spent. Raises
        UsageError for one that no step should be taken with."""
        if self.learning_rate != self._rate_given:  # set since
            self.learning_rate = number_or_schedule(self.learning_rate, "learning_rate")
            self._rate_given, self.lr_schedule = self.learning_rate, FloatSchedule(self.learning_rate)
        rate = scheduled(self.lr_schedule, 1.0 - begun, "learning_rate") * self.schedule(self.iteration, begun, ended)
        if not 0 <= rate < float("inf"):
            raise UsageError(
                f"iteration {self.iteration + 1}: the schedule gives the learning rate {rate}, which must be a finite "
                "number of at least 0"
            )
        return rate

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Iterate until ``total_timesteps`` tokens are done or a callback stops; whole iterations only. What a
        callback saves within one is the agent of its beginning."""
        check_number(total_timesteps, float, "total_timesteps")
        name = tb_log_name or type(self).__name__
        total, hooks = self._setup_learn(total_timesteps, callback, reset_num_timesteps, name, progress_bar)
        hooks.on_training_start(locals(), globals())
        while self.num_timesteps < total:
            try:
                self.iterate(hooks, lambda iterations, tokens: min(1.0, tokens / total))
            except Interrupted:
                break
            if self.iteration % RETURN_EVERY == 0:
                return_freed()
            if log_interval and self.iteration % log_interval == 0:
                self.dump_logs()
        hooks.on_training_end()
        return self

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """As stable-baselines3's, with a bar of tokens: its own counts a step of each slot."""
        if not progress_bar:
            return super()._init_callback(callback)
        given = callback if isinstance(callback, list) else [] if callback is None else [callback]
        hooks = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in given]
        return super()._init_callback([*hooks, TokenBar()])

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Go on in another environment of equal spaces, given as to the constructor; its slots are the agent's.

        Raises:
            UsageError: the environment has another number of slots.
        """
        super().set_env(SB3VecEnv(vector_env_in_place(env, self.n_envs)), force_reset)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def dump_logs(self) -> None:
        """Write the last iteration's metrics, and means of the last episodes as SB3's algorithms do."""
        for name, value in self.metrics.items():
            self.logger.record(name if "/" in name else f"{self.log_name}/{name}", value)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([episode["r"] for episode in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([episode["l"] for episode in self.ep_info_buffer]))
            self.logger.record("rollout/success_rate", safe_mean(self.ep_success_buffer or []))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("time/iterations", self.iteration, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """The full model's next token, see ``LanguageModelPolicy.predict``."""
        return self.policy.predict(observation, state, episode_start, deterministic)


def tell_step(hooks: BaseCallback | None, scope: dict[str, Any]) -> None:
    """A whole iteration as one step, for agents that step no environment; ``scope`` is what callbacks see.

    Raises:
        Interrupted: a callback stops.
    """
    if hooks is not None:
        hooks.update_locals(scope)
        if not hooks.on_step():
            raise Interrupted
