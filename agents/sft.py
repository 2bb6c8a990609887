"""``sft``: supervised fine-tuning on worked solutions, the warm-up of ReFT (arXiv 2401.08967, section 3.1) as an agent.

One step is the mean cross-entropy per completion token of a batch of demonstrations. Nothing is rolled out, so in a
comparison it is what the time of a reinforced run buys where worked solutions are at hand:

    batch = batches[step]                           agents/supervised.py
    for each micro-batch:                           packed, without padding
        loss = -sum log pi / completion tokens of the whole batch
    clip, step

``python -m benchmarks.run --agent sft`` trains by itself; a comparison starts from it with ``--start sft``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import update_learning_rate
from torch.nn.utils.rnn import pad_sequence

from agents.algorithm import LanguageModelAlgorithm, tell_step
from agents.arguments import check_lora_rank, settle_device
from agents.environments import slots_of
from agents.memory import ModelSize, check_memory, microbatch_budget
from agents.saving.configuration import constructor_arguments, in_force
from agents.schedules import Spent, run_length
from agents.supervised import Batch, Batches, clipped_step
from policies import Policy
from policies.model.packing import micro_batches
from registry import UsageError, agents, schedules

MOST_PROBLEMS = 1_000_000
Component = str | dict[str, Any] | Any  # an id, {"id": ..., field: value}, or a component itself


@agents.register("sft")
class SFT(LanguageModelAlgorithm):
    """Supervised fine-tuning as a stable-baselines3 algorithm. A timestep is one token of a demonstration's completion.

    Use: as ReFT's first stage, and as the arm that says what the same time buys without reinforcement.

    Args:
        policy, env: as for ``agents.reft.ReFT``; the environment's problems need worked solutions.
        learning_rate, schedule: as for ``agents.reft.ReFT``; the rate is that of an iteration.
        batch_size: demonstrations an optimizer step.
        gradient_steps: optimizer steps an iteration; 16 of 16 demonstrations are as many as ``reft`` completions.
        problems: how many problems of the split are learnt from, its first ones; 0 for all, which of an unlimited
            source are fresh ones in every step.
        skip: the chance that a step leaves out layers, 1 to a fifth of them, uniformly drawn but for the first and the
            last (stochastic depth, arXiv 1603.09382), so that nested subsets stay usable.
        weight_decay: of AdamW.
        max_grad_norm: gradient norm clip.
        microbatch_tokens, dtype, lora_rank, trained_layers, gradient_checkpointing: as for ``agents.reft.ReFT``.
        slots: env slots, when ``env`` does not say; training needs none.
        seed: of the order of demonstrations, of the layers left out and of adapters.

    >>> agent = SFT("tiny", "MathReason-v0", batch_size=4, gradient_steps=2)
    >>> metrics = agent.iterate()
    >>> metrics["updates"], agent.num_timesteps == metrics["tokens"]
    (2, True)
    """

    log_name = "sft"

    def __init__(  # noqa: PLR0913 (stable-baselines3's habit: hyper-parameters are keyword arguments)
        self,
        policy: str | Policy = "tiny",
        env: Any = "MathReason-v0",
        learning_rate: float | Schedule = 3e-4,
        *,
        schedule: Component = "constant",
        batch_size: int = 16,
        gradient_steps: int = 16,
        problems: int = 0,
        skip: float = 0.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        microbatch_tokens: int | None = None,
        slots: int | None = None,
        dtype: str | None = "auto",
        lora_rank: int = 0,
        trained_layers: Sequence[int] | None = None,
        gradient_checkpointing: bool = False,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: str = "cpu",
        seed: int | None = 0,
        _init_setup_model: bool = True,
    ) -> None:
        self.arguments = constructor_arguments(SFT, locals())
        device = settle_device(policy, device)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("gradient_steps", gradient_steps, 1),
            ("problems", problems, 0),
        ):
            if value < least:
                raise UsageError(f"{name}={value} must be at least {least}")
        if problems > MOST_PROBLEMS:
            raise UsageError(f"problems={problems} must be at most {MOST_PROBLEMS}: all of them are kept in memory")
        if not 0 <= skip <= 1:
            raise UsageError(f"skip={skip} must be a chance, 0 to 1")
        check_lora_rank(lora_rank)
        self.schedule = schedules.build(schedule)
        self.batch_size = batch_size
        self.gradient_steps = gradient_steps
        self.problems = problems
        self.skip = skip
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self._given_budget = microbatch_tokens
        self.lora_rank, self.trained_layers = lora_rank, trained_layers
        self.gradient_checkpointing = gradient_checkpointing
        self.nesting = self.problem_sampler = None
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
        """Load the target and the demonstrations, and make the optimizer."""
        task = self.envs.unwrapped.task
        self._make_target(self._given_policy, self._dtype)
        self.layers = tuple(range(self.target.num_layers))
        check_memory(self.target, task, self.optimizer, 1)
        self.microbatch_tokens = microbatch_budget(self._given_budget, ModelSize.of(self.target))
        self._learn_from(task)
        self.made = in_force(self)

    def _learn_from(self, task: Any) -> None:
        self.batches = Batches(task, self.problems, self.batch_size, self.target.num_layers, self.skip, self.seed or 0)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.iteration * self.gradient_steps

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As ``LanguageModelAlgorithm.set_env``, and learn from that environment's problems."""
        super().set_env(env, force_reset)
        self._learn_from(self.envs.unwrapped.task)

    def iterate(self, hooks: BaseCallback | None = None, spent: Spent | None = None) -> dict[str, float]:
        """``gradient_steps`` optimizer steps, to callbacks one step; returns their metrics: ``loss`` in nats per
        completion token, ``grad_norm`` before the clip (both means over steps), ``tokens`` of completions and
        ``prompt_tokens``."""
        start = time.perf_counter()
        batches = [self.batches[step] for step in range(self.step, self.step + self.gradient_steps)]
        shown = [one for batch in batches for one in batch.demonstrations]
        tokens, prompt_tokens = sum(len(one.completion) for one in shown), sum(len(one.prompt) for one in shown)
        spent = run_length(self.schedule, self.learning_rate, spent)
        begun = spent(self.iteration, self.num_timesteps) if spent else 0.0
        ended = spent(self.iteration + 1, self.num_timesteps + tokens) if spent else 0.0
        self._current_progress_remaining = 1.0 - begun  # as stable-baselines3's callbacks read it
        update_learning_rate(self.optimizer, self._rate(begun, ended))
        losses, norms = [], []
        for step, batch in enumerate(batches, self.step + 1):
            loss = self._backward(batch)
            parameters = list(self.target.parameters())
            norms.append(clipped_step(parameters, [self.optimizer], step, loss, self.max_grad_norm))
            self.target.refresh()
            losses.append(loss)
        self.iteration += 1
        self.num_timesteps += tokens
        seconds = time.perf_counter() - start
        self.metrics = {
            "loss": float(np.mean(losses)),
            "grad_norm": float(np.mean(norms)),
            "updates": self.gradient_steps,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "time/update": seconds,
            "trained_tokens_per_second": (tokens + prompt_tokens) / seconds,
        }
        tell_step(hooks, locals())
        return self.metrics

    def _backward(self, batch: Batch) -> float:
        """Gradients of a batch's loss, by micro-batches that sum to it; returns the loss."""
        prompts = [one.prompt for one in batch.demonstrations]
        completions = [one.completion for one in batch.demonstrations]
        tokens = pad_sequence(completions, batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(completion)] for completion in completions])
        count, loss = int(mask.sum()), 0.0
        for index in micro_batches(prompts, mask, self.microbatch_tokens):
            width = max(len(completions[i]) for i in index)
            logp = self.target.logprobs(
                [prompts[i] for i in index],
                tokens[index, :width],
                mask[index, :width],
                layers=batch.layers,
                temperature=1.0,
            )
            part = -logp.sum() / count
            part.backward()
            loss += float(part.detach())
        return loss
