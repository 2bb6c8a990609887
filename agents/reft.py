"""The ReFT loop: reinforced fine-tuning, on-policy or with nested (layer-subset) rollouts.

One iteration, after Luong et al. (arXiv 2401.08967) and Nested-ReFT (arXiv 2508.10123):

    problems ~ problem_sampler                      the same for every agent with the same seed
    stored   = batch.recall()                       groups of earlier iterations in place of fresh ones, if any
    nested   ~ nesting                              layers by the skip sampler, patched, perhaps on bytes
    mu       = writing.behavior(nested)             the same weights, fewer layers; or earlier ones; drafts judged
    rollout  = collect(mu, envs, problems, G)       completions, log mu, verdicts; refilled, if wanted
    rollout  = batch(rollout, stored)               those, and stored completions that join a fresh group
    R        = reward(rollout)                      as the environment gave it, or what the agent makes of that
    ref      = anchor(rollout)                      log-probabilities under a reference, if there is one
    A        = advantage(rollout)                   relative to the group
    for each minibatch:
        weight = correction(log pi, rollout, A)     detached
        loss   = -sum coef * weight * A * log pi    the one estimator
        step
    nesting.observe(rollout, diagnostics)           what these layers cost

Under torchrun the work of an iteration is shared out (agents/distributed.py).
`reft` keeps all layers; PPO's clip bounds its steps after the first of a rollout. `nested-reft/<sampler>/<correction>`
names both.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import update_learning_rate
from torch import Tensor

from agents.algorithm import LanguageModelAlgorithm
from agents.arguments import check_adam, check_counts, check_ema, check_lora_rank, check_rollout_dtype, settle_device
from agents.batches.experts import Experts
from agents.batches.refill import batch_of, left_out, refill, refill_metrics
from agents.batches.store import Batching
from agents.batches.weight_copy import WeightCopy
from agents.corrections import traits
from agents.distributed import join, local_device, total_weight
from agents.environments import slots_of, vector_env_of
from agents.memory import ModelSize, NotEnoughMemory, check_memory, microbatch_budget
from agents.monitoring.diagnostics import SHARE, noise_floor, of_fresh
from agents.monitoring.metrics import Laps, draft_metrics, rollout_metrics, speed_metrics, success_rates, target_tokens
from agents.monitoring.watch import Watch, warn_stale
from agents.nesting import Nesting
from agents.objective.anchors import Anchoring
from agents.rollout import NOTHING, Acts, GroupMixture, Rollout, collect, count_steps, one_each
from agents.saving.configuration import NotStorable, constructor_arguments, describe, in_force
from agents.schedules import Spent, run_length
from agents.update import NotFinite, OfUpdate, Update
from agents.writing import Deck, OwnWriter
from envs.problems.listed import problem_digest
from envs.sb3 import SB3VecEnv
from policies import Behavior, Drafter, FullDepth, LayerSubset, Nested, Policy, SkipSampler, StoredDrafts
from policies.dtype import settle_dtype
from policies.sharding import most
from registry import (
    UsageError,
    advantages,
    agents,
    aggregations,
    anchors,
    batches,
    corrections,
    patches,
    problem_samplers,
    rewards,
    schedules,
    skip_samplers,
    writers,
)

NOISE_EVERY = 10  # iterations between measurements of the noise floor
NOISE_PROBLEMS = 8

Component = str | dict[str, Any] | Any  # an id, {"id": ..., field: value}, or a component itself


@agents.register("reft", fixed={"sampler": "full", "correction": "ppo-clip"})
@agents.register("nested-reft", parts={"sampler": skip_samplers, "correction": corrections})
class ReFT(LanguageModelAlgorithm):
    """Reinforced fine-tuning as a stable-baselines3 algorithm. A timestep is one token.

    Use: ``reft`` as the on-policy baseline; ``nested-reft/<sampler>/<correction>`` where writing takes most of an
    iteration.

    Args:
        policy: the target: ``tiny`` (built in), a Hugging Face folder, a hub id, or a ``policies.Policy``.
        env: an env id, a ``MathReason``, a ``MathReasonVector`` (or a gymnasium vector wrapper of one), or a
            ``SB3VecEnv``. A single environment is widened to ``slots`` slots of the same task.
        learning_rate: of AdamW; a number or an SB3 schedule of the progress remaining. The default suits the built-in
            model; pretrained models want 1e-6 to 2e-5.
        schedule: its warm-up and decay, an id of ``registry.schedules``.
        sampler: which layers write a batch, an id of ``registry.skip_samplers``.
        patch: how the layers kept make up for those skipped, an id of ``registry.patches``; the first rollout, before
            anything can be fitted, then skips nothing.
        correction: the off-policy correction, an id of ``registry.corrections``; products as ``token-is*ppo-clip``. The
            id ``reft`` has ``ppo-clip``, which differs from ``none`` after a rollout's first step alone.
        advantage: an id of ``registry.advantages``.
        aggregation: an id of ``registry.aggregations``.
        problem_sampler: which problems a batch holds, an id of ``registry.problem_samplers``.
        anchor: what keeps the target near a reference policy, an id of ``registry.anchors``: ``kl`` for GRPO's penalty.
        batch: where the groups of a batch come from, an id of ``registry.batches``: ``replay`` for some stored ones,
            ``stale`` where weights of earlier iterations write, ``reuse`` for stored ones as drafts of fresh ones,
            ``contrast`` for stored ones that join groups without signal, ``expert`` for worked solutions beside them;
            products as ``replay*expert``.
        reward: what the agent makes of the environment's rewards, an id of ``registry.rewards``.
        writer: whose kernels write completions, an id of ``registry.writers``: ``own``, the project's engine, or
            ``vllm``.
        group_size: G, completions per problem.
        problems_per_batch: problems per iteration; an iteration writes problems_per_batch * G completions.
        refill_tokens: how many further tokens an iteration may write to replace groups whose completions are all right
            or all wrong: problems are drawn until problems_per_batch groups have signal, and a round that has begun is
            finished (DAPO's dynamic sampling, arXiv 2503.14476, sec. 3.2). They count as timesteps and in every metric.
            0, the default, is off.
        minibatches: optimizer steps per epoch over the rollout, each on whole groups.
        epochs: passes over one rollout.
        target_written: n_0, how many of a group's G completions the full model writes (defensive groups); by default 1
            where the correction expects such groups, else 0.
        temperature: of sampling, and of log pi, so that both are of the same distribution.
        consistency: weight of an auxiliary loss that keeps the nested policy near the target; see
            ``agents.objective.consistency``. 0, the default, is off.
        entropy_bonus: the loss is lowered by this times the exact entropy of every token's distribution, in nats, with
            the coefficients that the aggregation gives to tokens (A3C, arXiv 1602.01783, sec. 4). 0, the default, is
            off. With or without it the metric ``entropy`` is -mean log mu over the rollout's tokens: an unbiased
            estimate for the policy that wrote them, which is the target where no layer was skipped.
        mask_truncated: leave the tokens of completions that the budget cut off out of the loss, and out of the count
            that ``token-mean`` divides by (DAPO's overlong filtering, arXiv 2503.14476, sec. 3.4); other aggregations
            still divide by all B completions, as TRL's do, and advantages are still relative to them.
        weight_decay: of AdamW.
        adam_betas: of AdamW, the decays of its two moments.
        adam_eps: of AdamW.
        ema_decay: of an exponential moving average of the trained weights, taken after every optimizer step: a run then
            measures accuracy with the average (``averaged``), while rollouts and updates go on with the weights. 0, the
            default, keeps none; 0.99 averages over about 100 steps.
        max_grad_norm: gradient norm clip.
        microbatch_tokens: most completion and prompt tokens in one forward and backward; bounds memory only. By default
            2,048 on a CPU, where more is no faster, and on a GPU as many as a quarter of its memory holds, up to
            65,536.
        slots: env slots, when ``env`` does not say; by default as many as an iteration has episodes, up to 256, and as
            memory holds. They change no numbers.
        dtype: of the matrix products, ``float32`` or ``bfloat16``; the weights stay float32. By default that of the two
            which the device is fast in, and for the built-in model float32.
        lora_rank: r, the rank of low-rank adapters (LoRA, arXiv 2106.09685; needs peft) of every layer's projections,
            with alpha = 2 r, that are trained instead of the weights; rollouts and saved models have them merged in. 0,
            the default, trains the weights themselves.
        trained_layers: numbers of the layers, from 0, that are trained, or whose projections get adapters; all other
            weights stay as they are, head and embedding among them, and a backward ends at the lowest of these layers.
            By default all weights are trained.
        gradient_checkpointing: keep only each layer's input for the backward and compute the layer again: less memory,
            about a third more time for an update, the same numbers. Off by default.
        shard: under torchrun, split the model's matrices, their gradients and the optimizer's moments over the
            processes, each map whole only while it is used (ZeRO's third stage, arXiv 1910.02054); what rollouts read
            is whole, in ``dtype``, until the update. The processes of a machine load the model one after the other, in
            its host's memory. The same numbers up to the order of sums; a checkpoint goes on with any number of
            processes, sharded or not. In one process nothing is split. Off by default.
        rollout_dtype: ``int8`` for rollouts by products on bytes (``policies.model.int8``): faster, and off-policy by a
            little, as a nested rollout is; what the full model writes for defensive groups stays in ``dtype``. KL and D
            are of what the byte model drew. Scored again, the byte model disagrees with its own draws (metric
            ``behavior_noise_kl``; SmolLM2-135M: .0045 nats a token, most of its divergence), which enters where it is
            scored: in ``defensive``. ``noise_kl`` is of the full model in ``dtype``.
        tensorboard_log: folder of stable-baselines3's TensorBoard logs; none by default.
        verbose: stable-baselines3's: 1 prints the metrics of each logged iteration.
        device: where the policy computes, ``cpu`` or ``cuda``.
        seed: of everything drawn; equal seeds deal equal problems to every agent.

    >>> agent = ReFT("tiny", "MathReason-v0", sampler="even", correction="retrace", problems_per_batch=2, group_size=2)
    >>> metrics = agent.iterate()
    >>> metrics["layers_kept"], metrics["skip_ratio"], agent.layers
    (10.0, 0.16666666666666666, (0, 1, 2, 4, 5, 6, 7, 9, 10, 11))
    """

    log_name = "reft"
    parallel = True  # several processes can share a run
    correction, aggregation, consistency = OfUpdate(), OfUpdate(), OfUpdate()
    minibatches, epochs, microbatch_tokens, max_grad_norm = OfUpdate(), OfUpdate(), OfUpdate(), OfUpdate()
    entropy_bonus, mask_truncated, anchoring, experts = OfUpdate(), OfUpdate(), OfUpdate(), OfUpdate()

    def __init__(  # noqa: PLR0913, PLR0915 (stable-baselines3's habit: hyper-parameters are keyword arguments)
        self,
        policy: str | Policy = "tiny",
        env: Any = "MathReason-v0",
        learning_rate: float | Schedule = 3e-4,
        *,
        sampler: Component = "full",
        patch: Component = "none",
        correction: Component = "none",
        advantage: Component = "grpo",
        aggregation: Component = "token-mean",
        problem_sampler: Component = "uniform",
        schedule: Component = "constant",
        anchor: Component = "none",
        batch: Component = "fresh",
        reward: Component = "given",
        writer: Component = "own",
        group_size: int = 8,
        problems_per_batch: int = 32,
        refill_tokens: int = 0,
        minibatches: int = 1,
        epochs: int = 1,
        target_written: int | None = None,
        temperature: float = 1.0,
        consistency: float = 0.0,
        entropy_bonus: float = 0.0,
        mask_truncated: bool = False,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        ema_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        microbatch_tokens: int | None = None,
        slots: int | None = None,
        dtype: str | None = "auto",
        rollout_dtype: str | None = None,
        lora_rank: int = 0,
        trained_layers: Sequence[int] | None = None,
        gradient_checkpointing: bool = False,
        shard: bool = False,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: str = "cpu",
        seed: int | None = 0,
        _init_setup_model: bool = True,
    ) -> None:
        self.arguments = constructor_arguments(ReFT, locals())
        device = settle_device(policy, device)
        int8 = check_rollout_dtype(rollout_dtype)
        self.nesting = Nesting(skip_samplers.build(sampler), patches.build(patch), int8)
        self.correction = corrections.build(correction)
        self.advantage = advantages.build(advantage)
        self.aggregation = aggregations.build(aggregation)
        self.problem_sampler = problem_samplers.build(problem_sampler)
        self.schedule = schedules.build(schedule)
        self.anchor = anchors.build(anchor)
        self.batch = batches.build(batch)
        self.reward = rewards.build(reward)
        self.writer = writers.build(writer)
        self.target_written = int(traits(self.correction).mixed) if target_written is None else target_written
        check_counts(
            group_size, problems_per_batch, refill_tokens, minibatches, epochs, self.target_written, temperature
        )
        if group_size == 1:
            self.advantage(torch.zeros(1), torch.zeros(1, dtype=torch.int64))  # one of groups refuses groups of one
        warn_stale(self.correction, minibatches * epochs, self.batch)
        check_lora_rank(lora_rank)
        self.adam_betas, self.adam_eps = check_adam(adam_betas, adam_eps)
        self.lora_rank, self.trained_layers = lora_rank, trained_layers
        self.gradient_checkpointing = gradient_checkpointing
        self.shard = shard
        self.group_size, self.problems_per_batch = group_size, problems_per_batch
        self.refill_tokens = refill_tokens
        self.minibatches = minibatches
        self.epochs = epochs
        self.temperature = temperature
        self.consistency = consistency
        if isinstance(self.nesting.sampler, FullDepth):
            written = target_written if not (int8 or self.batch.lag) else 0
            for name, value in (("consistency", consistency), ("target_written", written)):
                if value:
                    warnings.warn(f"{name}={value} has no effect: every layer of the target writes", stacklevel=2)
        self.entropy_bonus = entropy_bonus
        self.mask_truncated = mask_truncated
        self.weight_decay = weight_decay
        self.ema_decay = check_ema(ema_decay)
        self.max_grad_norm = max_grad_norm
        self._given_budget = microbatch_tokens
        self.ranks = join(device)
        self._given_policy = policy
        self._free_env = env if slots is None and getattr(env, "num_envs", None) is None else None
        self._dtype = dtype
        self.watch = Watch()
        own = group_size * -(-problems_per_batch // self.ranks.size)
        super().__init__(
            env,
            slots_of(env, slots, own),
            learning_rate,
            tensorboard_log=tensorboard_log if self.ranks.leader else None,
            verbose=verbose if self.ranks.leader else 0,
            device=local_device(device),
            seed=seed,
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Load the target, check that it and the environment speak the same vocabulary, and make the optimizer."""
        self._make_target(self._given_policy, self._dtype)
        self.target.temperature = self.temperature
        self.all_layers = tuple(range(self.target.num_layers))
        self.nesting.check(self.target)
        self.ep_info_buffer = deque(maxlen=self._stats_window_size)  # as SB3 makes in learn(), for iterate() alone
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        self.anchoring = Anchoring(self.anchor, self.target)
        self.batching = Batching(self.batch, self.target, self.group_size, self.target_written, self.seed or 0)
        self.writer.check(self.target, self.nesting, self.target_written, self._drafts)
        self.writing = self.writer.open(self.target)
        self.experts = self._worked_solutions()
        self.drafted = torch.zeros(4, dtype=torch.int64)  # of an iteration, as Drafting.counts
        self.average = WeightCopy(self.target) if self.ema_decay else None
        if self.average is not None:
            self.optimizer.register_step_post_hook(self._follow)
        behaviors = 2 if self.target_written else 1  # of a defensive group; each keeps slots of its own
        behaviors += self.nesting.drafter(self.target) is not None
        self.microbatch_tokens = microbatch_budget(self._given_budget, ModelSize.of(self.target))
        self._fit_slots(behaviors)
        self.update = Update(
            self.target,
            self.optimizer,
            self.correction,
            self.aggregation,
            minibatches=self.minibatches,
            epochs=self.epochs,
            max_grad_norm=self.max_grad_norm,
            microbatch_tokens=self.microbatch_tokens,
            consistency=self.consistency,
            anchoring=self.anchoring,
            experts=self.experts,
            entropy_bonus=self.entropy_bonus,
            mask_truncated=self.mask_truncated,
            ranks=self.ranks,
        )
        self.made = in_force(self)

    def _load_target(self, given: str | Policy, dtype: str | None, device: str) -> Policy:
        """The same in all processes; split over them where that is wanted."""

        def load() -> tuple[Policy, float]:
            target = super(ReFT, self)._load_target(given, dtype, "cpu" if sharded else device)
            total = total_weight(target.model.parameters()) if self.ranks.size > 1 else 0.0
            if sharded:
                target.shard(device)
            return target, total

        sharded = self.shard and self.ranks.size > 1
        if sharded and not isinstance(given, Policy):
            dtype = settle_dtype(dtype, given, device)  # by where it computes, not by where it is loaded
        target, total = self.ranks.in_turn(load) if sharded else load()
        self.ranks.require_equal(self.seed or 0, total)
        return target

    def _fit_slots(self, behaviors: int) -> None:
        """As many slots as memory holds where nobody has said how many; else what does not fit is refused."""
        task, refused = self.envs.unwrapped.task, None
        try:
            check_memory(self.target, task, self.optimizer, self.n_envs, behaviors, self.microbatch_tokens)
        except NotEnoughMemory as error:
            refused = error
        if self.target.sharded:  # the processes gather weights together, so all of them start or none does
            fewer = most(0 if refused is None else self.n_envs - refused.slots)
            said = str(refused) if refused else "not enough memory: another process of this run says what it needs"
            refused = NotEnoughMemory(said, self.n_envs - fewer) if fewer else None
        if refused is None:
            return
        if not refused.slots or self._free_env is None:
            raise refused
        warnings.warn(f"memory holds {refused.slots} slots, not {self.n_envs}: slower, the same numbers", stacklevel=4)
        self.n_envs = refused.slots
        self.env = SB3VecEnv(vector_env_of(self._free_env, self.n_envs))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As of every agent. What is known of the problems of before (stored groups, rates of success) is dropped, with
        a warning, where the new environment has others."""
        before = problem_digest(self.envs.unwrapped.task.problems)
        super().set_env(env, force_reset)
        self.experts = self._worked_solutions()
        if problem_digest(self.envs.unwrapped.task.problems) != before:
            self.forget_problems()

    def forget_problems(self) -> None:
        """Drop what goes by problems of another environment."""
        known = bool(self.batching.kept)
        self.batching.forget()
        if self.problem_sampler.state_dict():
            known = True
            try:
                self.problem_sampler = problem_samplers.build(describe(self.problem_sampler, problem_samplers))
            except NotStorable as error:
                raise UsageError(
                    f"problem_sampler={self.problem_sampler!r} has learned of other problems than these, and "
                    f"cannot be made anew ({error}): give problem_sampler as well"
                ) from None
        if known:
            warnings.warn(
                "the environment has other problems: groups stored and rates of success of those before are dropped",
                stacklevel=3,
            )

    @property
    def sampler(self) -> SkipSampler:
        """What draws the layers that write."""
        return self.nesting.sampler

    @property
    def patch(self) -> Any:
        """How the layers kept make up for those skipped."""
        return self.nesting.patcher.patch

    @property
    def layers(self) -> LayerSubset:
        """The layers that wrote the last rollout."""
        return self.nesting.layers

    def iterate(self, hooks: BaseCallback | None = None, spent: Spent | None = None) -> dict[str, float]:
        """One iteration of the loop at the top of this file; returns its metrics.

        Args:
            hooks: stable-baselines3's callbacks.
            spent: what share of the run some iterations and tokens are, where the learning rate goes by that.
        """
        self.target.temperature, self.begun_with = self.temperature, self.num_timesteps  # a target may be shared
        spent = run_length(self.schedule, self.learning_rate, spent)
        begun = spent(self.iteration, self.num_timesteps) if spent else 0.0
        self._current_progress_remaining = 1.0 - begun  # as stable-baselines3's callbacks read it
        rng, laps = np.random.default_rng([self.seed or 0, self.iteration]), Laps()
        if not self.nesting.sampler.ready:
            with laps("prepare"):
                self.nesting.prepare(self.target, self.envs.unwrapped.task, self.seed or 0, self.ranks)
        self.drafted.zero_()
        with laps("rollout"):
            problems = self._draw_problems(rng)
            seed = int(rng.integers(2**31))
            stored = self.batching.recall(self.iteration, self.problems_per_batch)
            lacking = self.problems_per_batch - (len(stored) // self.group_size if stored else 0)
            with self.batching.writing(self.iteration):
                nested = self.nesting.draw(self.target, rng, self.iteration)
                rollout, problems, judging = self._write(problems[:lacking], nested, seed, hooks)
        noise = self._noise(problems, rollout, nested) if self.iteration % NOISE_EVERY == 0 and problems else {}
        with laps("update"):
            ended = spent(self.iteration + 1, self.num_timesteps) if spent else 0.0
            update_learning_rate(self.optimizer, self._rate(begun, ended))
            try:
                fresh = batch_of(rollout, self.group_size, lacking)
                unused = left_out(rollout, fresh)
                self.experts.draw(self.iteration)
                batch = self.batching(fresh, stored, self.update.score, self.iteration)
                off_policy = self._is_off_policy() or self.batching.is_off_policy(batch)
                share = SHARE if off_policy else 0.0
                batch, advantage = self._rated(batch)
                diagnostics = self.update(batch, advantage, rng, self.nesting.trainable(self.target), share, unused)
            except NotFinite as error:
                raise UsageError(f"iteration {self.iteration + 1}: {error}") from error
        if problems:
            self.nesting.observe(rollout, of_fresh(diagnostics))
            self.problem_sampler.observe(problems, success_rates(rollout, self.group_size), self.group_size)
        self.iteration, self.begun_with = self.iteration + 1, None
        self.metrics = {
            **diagnostics,
            **noise,
            **rollout_metrics(rollout, self.group_size),
            **self.nesting.metrics(self.target),
            **speed_metrics(rollout, laps, judging),
            "target_tokens": target_tokens(rollout, *self.nesting.passes(self.target), self.drafted),
            **(refill_metrics(rollout, self.group_size, lacking) if self.refill_tokens else {}),
            **(draft_metrics(self.drafted, rollout) if self._drafts else {}),
            **self.batching.metrics(batch),
            **({"expert_weight": self.experts.weight} if self.experts.source else {}),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if self.ranks.leader:
            self.watch(self.metrics | diagnostics)
        return self.metrics

    def _worked_solutions(self) -> Experts:
        return Experts(self.batch, self.envs.unwrapped.task, self.target.num_layers, self.seed or 0)

    def _draw_problems(self, rng: np.random.Generator, count: int | None = None) -> list[int]:
        """Drawn before anything else, so that equal seeds deal equal problems to every agent."""
        size = self.envs.unwrapped.task.problems.size
        return self.problem_sampler.sample(count or self.problems_per_batch, size, rng).tolist()

    def _rated(self, batch: Rollout) -> tuple[Rollout, Tensor]:
        """The batch as its reward and its anchor see it, and the advantages [B]."""
        reward = self.reward(batch, self.envs.unwrapped.task, self.update)
        batch = replace(batch, reward=one_each("reward", self.reward, reward, len(batch)))
        batch = self.anchoring.measure(batch, self.update.score, self.iteration)
        advantage = self.advantage(self.anchoring.reward(batch), batch.group)
        return batch, self.batching.scaled(one_each("advantage", self.advantage, advantage, len(batch)), batch)

    def _write(
        self, problems: list[int], nested: Nested, seed: int, hooks: BaseCallback | None
    ) -> tuple[Rollout, list[int], float]:
        """The completions of an iteration, those of further problems in place of silent groups among them; all of its
        problems, and the seconds that verdicts took."""
        if not problems:
            return NOTHING, [], 0.0
        rollout = self.rollout(problems, nested, seed, hooks)
        judging = self.envs.unwrapped.reward_seconds

        def write(count: int) -> Rollout:
            nonlocal problems, judging
            further = self._draw_problems(
                np.random.default_rng([self.seed or 0, self.iteration, 2, len(problems)]), count
            )
            written = self.rollout(further, nested, seed, hooks, first_group=len(problems))
            problems = [*problems, *further]
            judging += self.envs.unwrapped.reward_seconds
            return written

        return refill(rollout, self.group_size, self.refill_tokens, write), problems, judging

    def rollout(
        self,
        problems: Sequence[int],
        nested: Nested,
        seed: int,
        hooks: BaseCallback | None = None,
        first_group: int = 0,
    ) -> Rollout:
        """Groups of completions of ``problems`` by ``nested``, numbered from ``first_group``; of defensive groups the
        target writes some."""
        drafts = self.batching.drafts(problems, first_group, self.iteration)
        acting: list[Acts] = []

        def write(problems: Sequence[int], first: int) -> Rollout:
            mu = self._acting(nested, seed, problems, first_group + first, drafts)
            acting.extend((mu.nested, mu.target) if isinstance(mu, GroupMixture) else (mu,))
            on_step = count_steps(self, hooks)

            def act() -> Rollout:
                return collect(
                    mu, self.envs, problems, self.group_size, on_step, first_group + first, defer=hooks is None
                )

            if not isinstance(mu, GroupMixture):
                return act()
            return mu.score(self.ranks.together(act), self.target, nested)

        if hooks is not None:
            hooks.on_rollout_start()
        before = self.num_timesteps
        rollout = self.ranks.rollout(write, problems)
        self.num_timesteps = before + int(rollout.mask.sum())
        if self._drafts:
            counts = [one.drafting.counts for one in acting if isinstance(one, Behavior) and one.drafting is not None]
            self.drafted += self.ranks.sum(torch.tensor([(0, 0, 0, 0), *counts]).sum(0))
        ended = [
            {**final, "episode": {"r": reward, "l": length}}
            for final, reward, length in zip(
                rollout.episodes, rollout.reward.tolist(), rollout.mask.sum(1).tolist(), strict=True
            )
        ]
        self._update_info_buffer(ended, np.ones(len(ended), dtype=np.bool_))
        if hooks is not None:
            hooks.update_locals(locals())
            hooks.on_rollout_end()
        return rollout

    def _acting(
        self, nested: Nested, seed: int, problems: Sequence[int], first_group: int, stored: StoredDrafts | None
    ) -> Acts:
        """What acts in a deck of this process's problems."""
        size, drafter = self.group_size, self.nesting.drafter(self.target)
        deck = Deck(
            self.envs.unwrapped.task,
            self.n_envs,
            problems,
            size,
            first_group,
            range(size),
            stored=stored,
            drafter=drafter,
        )
        if not self.target_written:
            return self.writing.behavior(nested, seed, deck)
        nested_part, target_part = deck.shared(self.target_written)
        return GroupMixture(
            self.writing.behavior(nested, seed, nested_part),
            self.writing.behavior(self.all_layers, seed, target_part),
            size,
            self.target_written,
        )

    @torch.no_grad()
    def _noise(self, problems: Sequence[int], written: Rollout, nested: Nested) -> dict[str, float]:
        """What engine and trainer disagree by, scoring again what a behaviour wrote: the target's own tokens, and with
        ``behavior_`` before the names those that ``nested`` has ``written``, if that is another. Of another writer than
        the project's engine only what it has written is scored."""

        def write(problems: Sequence[int], first_group: int) -> Rollout:
            return collect(mu, self.envs.unwrapped, problems, 1, first_group=first_group)  # wrappers would count it

        def floor(rollout: Rollout, layers: Nested) -> dict[str, float]:
            logp = self.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask, layers=layers)
            return noise_floor(logp.to(rollout.tokens.device), rollout)

        measured, is_own = {}, isinstance(self.writer, OwnWriter)
        if is_own:
            mu = self.behavior(self.all_layers, self.iteration)
            measured = floor(self.ranks.rollout(write, problems[:NOISE_PROBLEMS]), self.all_layers)
        wrote_some = self.target_written < self.group_size
        if (self._is_off_policy() or not is_own) and wrote_some and not self.batching.is_lenient:
            prefix = "behavior_" if self._is_off_policy() else ""
            first_nested = torch.arange(len(problems[:NOISE_PROBLEMS])) * self.group_size + self.target_written
            own = replace(written.select(first_nested), by_target=None)
            with self.batching.writing(self.iteration):
                measured |= {f"{prefix}{name}": value for name, value in floor(own, nested).items()}
        return measured

    def _is_off_policy(self) -> bool:
        """Whether the last draw, as it is written, computes anything else than the target."""
        return self.nesting.is_off_policy(self.target) or bool(self.writer.quantization)

    def behavior(
        self, layers: Nested, seed: int, stored: StoredDrafts | None = None, drafter: Drafter | None = None
    ) -> Behavior:
        """What writes completions through ``layers``, one KV slot an env slot; ``stored`` ones, and a ``drafter``,
        draft its tokens."""
        assert self.env is not None
        length = self.envs.unwrapped.task.max_length
        return self.target.behavior(layers, self.env.num_envs, length, seed=seed, stored=stored, drafter=drafter)

    @property
    def _drafts(self) -> bool:
        """Whether anything may be a draft of what is written."""
        return bool(self.batching.drafting) or self.nesting.drafter(self.target) is not None

    def _follow(self, *_: object) -> None:
        """Of the average, after an optimizer step."""
        assert self.average is not None
        self.average.average(self.ema_decay)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the target has its averaged weights (``ema_decay``), and its own if there is no average."""
        return nullcontext() if self.average is None else self.average.in_place()

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """As ``SavesFolders.save``. Under torchrun one process writes, and the others do not wait for it; of a sharded
        agent they must call it as well.

        Raises:
            UsageError: in the middle of a rollout that older weights write, or inside ``averaged``.
        """
        if self.average is not None and self.average.is_in_place:
            raise UsageError(
                "ema_decay: the average is in place of the weights; save after the block of averaged(), or the average "
                "alone with agent.target.save(folder)"
            )
        if self.batching.is_writing:
            raise UsageError(
                f"batch={self.batch!r}: older weights are in place while a rollout is written; save between iterations"
            )
        if self.ranks.leader or self.target.sharded:
            super().save(path, exclude, include)
