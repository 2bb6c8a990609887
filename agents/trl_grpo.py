"""``trl-grpo``: TRL's GRPOTrainer as an agent, so that it stands beside ours on equal problems, reward and evaluation.

TRL writes (transformers' ``generate``), scores, weighs and steps; ours are the problems (dealt as to ``reft`` of the
same seed), the verdicts, AdamW's state between steps, and the runner. One iteration is one optimizer step of
``trainer.train()``. What TRL calls a completion is what an environment does: the same stop tokens, the same budget.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import update_learning_rate

from agents.algorithm import LanguageModelAlgorithm, tell_step
from agents.arguments import check_counts
from agents.batches.problem_samplers import UniformProblems
from agents.environments import slots_of
from agents.monitoring.metrics import episode_metrics
from agents.monitoring.watch import Watch
from agents.saving.configuration import constructor_arguments, in_force
from agents.schedules import Spent, run_length
from agents.update import NotFinite, refuse_broken_step
from envs.task import start_info
from policies import Policy
from registry import UsageError, agents, schedules

LOGGED = {
    "loss": "loss",
    "entropy": "entropy",
    "kl": "kl_reference",
    "reward": "rollout_reward",
    "grad_norm": "grad_norm",
}
"""What TRL logs, and the names that it has here."""


def check_trl() -> None:
    """Raise UsageError where TRL is not installed, without importing it."""
    if find_spec("trl") is None:
        raise UsageError("agent 'trl-grpo' needs the package trl: pip install 'nested-reft[trl]'")


@agents.register("trl-grpo")
class TRLGRPO(LanguageModelAlgorithm):
    """TRL's GRPOTrainer (extra ``trl``) with the settings that ``reft`` has by default. A timestep is one token.

    Use: to hold ``reft`` against an implementation that others know.

    Args:
        policy, env, schedule, temperature, weight_decay, max_grad_norm, group_size, problems_per_batch, dtype: as for
            ``agents.reft.ReFT``; bfloat16 is TRL's autocast of float32 weights.
        learning_rate: of AdamW; a number or an SB3 schedule.
        loss_type, scale_rewards, beta, epsilon: TRL's. By default the mean over the batch's tokens, advantages over the
            group's deviation, no KL to a reference: ``reft``'s ``token-mean`` and ``grpo``.
        backward_size: completions of one forward and backward (TRL's per_device_train_batch_size), a multiple of which
            is the batch; bounds memory only. 0: all of them at once.
        slots: env slots, when ``env`` does not say; training needs none.
        seed: of everything drawn; equal seeds deal the problems that ``reft`` gets.
    """

    log_name = "trl"

    def __init__(  # noqa: PLR0913 (stable-baselines3's habit: hyper-parameters are keyword arguments)
        self,
        policy: str | Policy = "tiny",
        env: Any = "MathReason-v0",
        learning_rate: float | Schedule = 3e-4,
        *,
        schedule: Any = "constant",
        group_size: int = 8,
        problems_per_batch: int = 32,
        loss_type: str = "bnpo",
        scale_rewards: str = "group",
        beta: float = 0.0,
        epsilon: float = 0.2,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        backward_size: int = 0,
        slots: int | None = None,
        dtype: str | None = "auto",
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: str = "cpu",
        seed: int | None = 0,
        _init_setup_model: bool = True,
    ) -> None:
        self.arguments = constructor_arguments(TRLGRPO, locals())
        check_counts(group_size, problems_per_batch, 0, 1, 1, 0, temperature)
        batch = group_size * problems_per_batch
        if backward_size < 0 or (backward_size and batch % backward_size):
            raise UsageError(
                f"backward_size={backward_size} must divide the {batch} completions of an iteration "
                "(group_size x problems_per_batch), or be 0 for all at once"
            )
        self.schedule = schedules.build(schedule)
        self.group_size = group_size
        self.problems_per_batch = problems_per_batch
        self.temperature = temperature
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.settings: dict[str, Any] = {
            "loss_type": loss_type,
            "scale_rewards": scale_rewards,
            "beta": beta,
            "epsilon": epsilon,
            "per_device_train_batch_size": backward_size or batch,
            "gradient_accumulation_steps": batch // (backward_size or batch),
        }
        self.nesting = None
        self.problem_sampler = UniformProblems()
        self.watch = Watch()
        self._given_policy = policy
        self._dtype = dtype
        super().__init__(
            env,
            slots_of(env, slots, 1),
            learning_rate,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Load the target and set TRL's trainer up around its transformers model."""
        self._make_target(self._given_policy, self._dtype)
        self.target.temperature = self.temperature
        self.layers = tuple(range(self.target.num_layers))
        self._began = self._wrote = self._judged = self._ended = 0.0  # of the last step, by the clock
        self.optimizer.register_step_pre_hook(refuse_broken_step)  # TRL would step, and fail when it next draws
        self._trainer = self._make_trainer()
        self.made = in_force(self)

    def _make_trainer(self) -> Any:
        check_trl()
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        task = self.envs.unwrapped.task
        if task.template.stop:
            raise UsageError(
                f"agent 'trl-grpo': template {task.spec.template!r} ends completions at strings "
                f"{list(task.template.stop)}, which TRL cannot; use a template without"
            )
        agent = self

        class Clock(TrainerCallback):
            """When TRL begins to write, and when its optimizer has stepped."""

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                agent._began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                agent._ended = time.perf_counter()

        self.target.model.generation_config.eos_token_id = sorted(task.stop_token_ids)
        try:
            settings = GRPOConfig(
                output_dir=tempfile.mkdtemp(prefix="trl-"),
                num_generations=self.group_size,
                max_completion_length=task.spec.max_new_tokens,
                temperature=self.temperature,
                top_k=0,
                learning_rate=self.lr_schedule(1.0),
                max_grad_norm=self.max_grad_norm,
                max_steps=1,
                logging_steps=1,
                shuffle_dataset=False,
                gradient_checkpointing=False,
                bf16=self.target.dtype == torch.bfloat16,
                use_cpu=self.device.type == "cpu",
                seed=self.seed or 0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **self.settings,
            )
        except ValueError as error:
            raise UsageError(f"agent 'trl-grpo': {error}") from None
        constant = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        trainer = GRPOTrainer(
            model=self.target.model,
            args=settings,
            reward_funcs=self._judge,
            train_dataset=self._dataset([0]),
            processing_class=task.tokenizer,
            optimizers=(self.optimizer, constant),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock)
        return trainer

    def _dataset(self, problems: list[int]) -> Any:
        """Prompts as text, which TRL tokenizes itself. Raises UsageError where other tokens come of it."""
        from datasets import Dataset

        task = self.envs.unwrapped.task
        ids = [task.prompt(index).tolist() for index in problems]
        texts = [task.tokenizer.decode(one) for one in ids]
        for text, one in zip(texts, ids, strict=True):
            if task.tokenizer(text=text)["input_ids"] != one:
                raise UsageError(
                    f"agent 'trl-grpo': template {task.spec.template!r} gives a prompt that TRL would read as other "
                    f"tokens ({text[:40]!r}...): use a template of plain text (--set env.template=plain)"
                )
        return Dataset.from_dict({"prompt": texts, "problem": problems})

    def _judge(self, completion_ids: list[list[int]], problem: list[int], **_: Any) -> list[float | None]:
        """The environment's rewards, as TRL asks for them."""
        task = self.envs.unwrapped.task
        self._wrote = time.perf_counter()
        completions = [np.asarray(ids, dtype=np.int64) for ids in completion_ids]
        verdicts = [task.verdict(completion, index) for completion, index in zip(completions, problem, strict=True)]
        rewards: list[float | None] = []
        self._finals: list[dict[str, Any]] = []
        for n, (completion, index) in enumerate(zip(completions, problem, strict=True)):
            start = start_info(task, index, n, n // self.group_size, n % self.group_size)
            reason = task.finish_reason(completion) or "length"
            reward, info = task.outcome(start, reason, completion, verdicts[n].result())
            rewards.append(reward)
            self._finals.append(info)
        self._judged = time.perf_counter()
        return rewards

    def iterate(self, hooks: BaseCallback | None = None, spent: Spent | None = None) -> dict[str, float]:
        """One step of TRL's trainer, to callbacks one step; returns its metrics. ``time/rollout`` is
        from the step's beginning to the first verdict, ``time/update`` from the last one to the optimizer's step."""
        spent = run_length(self.schedule, self.learning_rate, spent)
        begun, ended = (spent(self.iteration + n, self.num_timesteps) if spent else 0.0 for n in (0, 1))
        update_learning_rate(self.optimizer, self._rate(begun, ended))
        rng = np.random.default_rng([self.seed or 0, self.iteration])
        size = self.envs.unwrapped.task.problems.size
        problems = self.problem_sampler.sample(self.problems_per_batch, size, rng).tolist()
        self._trainer.train_dataset = self._dataset(problems)
        torch.manual_seed(int(rng.integers(2**31)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of names that TRL uses
            try:
                self._trainer.train()
            except NotFinite as error:
                raise UsageError(f"iteration {self.iteration + 1}: {error}") from error
        self.target.model.eval()
        self.target.refresh()
        self.iteration += 1
        tokens = sum(info["response_len"] for info in self._finals)
        self.num_timesteps += tokens
        told = self._trainer.state.log_history[0]
        self.metrics = {
            **episode_metrics(self._finals),
            **{ours: float(told[theirs]) for theirs, ours in LOGGED.items() if theirs in told},
            "groups_with_signal": 1.0 - float(told["frac_reward_zero_std"]),
            "updates": 1.0,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "layers_kept": len(self.layers),
            "skip_ratio": 0.0,
            "tokens": tokens,
            "time/rollout": self._wrote - self._began,
            "time/reward": self._judged - self._wrote,
            "time/update": self._ended - self._judged,
            "rollout_tokens_per_second": tokens / (self._judged - self._began),
        }
        self.watch(self.metrics)
        tell_step(hooks, locals())
        return self.metrics
