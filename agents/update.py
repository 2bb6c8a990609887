"""The update: one estimator for every agent, ``loss = -sum coef * (W * A).detach() * log pi``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from agents.corrections import traits, weigh
from agents.diagnostics import diagnostics
from agents.rollout import Rollout
from policies import Policy

WIDE_SCOPES = ("group", "batch")  # a correction of such a scope must see more than one sequence at once


@dataclass(frozen=True)
class Used:
    """What one micro-batch's gradient was made of."""

    index: Tensor  # [N] rows of the minibatch
    logp: Tensor  # [N, T] log pi at the step
    weight: Tensor  # [N, T] the correction's


@dataclass
class Update:
    """Policy-gradient steps on a rollout.

    Zero-advantage sequences are dropped before the forward: their gradient is exactly zero, since the coefficients of
    the aggregation come from the whole minibatch first. Corrections whose scope is a group or the batch see the whole
    minibatch in one call, so that micro-batches, which only bound memory, cannot change them.

    Attributes:
        temperature: log pi is that of the tempered distribution, the one that rollouts are sampled from.
        max_grad_norm: clip.
        microbatch_tokens: most tokens, prompts counted per completion, in one forward and backward.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    correction: Any
    aggregation: Any
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    microbatch_tokens: int = 16_384

    def __call__(
        self, rollout: Rollout, advantage: Tensor, minibatches: int, epochs: int, rng: np.random.Generator
    ) -> dict[str, float]:
        """Take ``epochs * minibatches`` optimizer steps. Returns the gradient norm and the diagnostics of the first
        epoch: raw ratios of the sequences that carried a gradient."""
        wide = traits(self.correction).scope in WIDE_SCOPES
        if wide or epochs * minibatches > 1:
            wanted = torch.arange(len(rollout)) if wide else advantage.nonzero()[:, 0]
            rollout = replace(rollout, old_logp=self._score(rollout, wanted))
        groups = torch.unique(rollout.group)
        norms: list[float] = []
        used: list[Used] = []
        for epoch in range(epochs):
            order = torch.from_numpy(rng.permutation(len(groups)))
            for chosen in order.tensor_split(minibatches):
                index = torch.isin(rollout.group, groups[chosen]).nonzero()[:, 0]
                batch, a = rollout.select(index), advantage[index]
                weights = self._whole_weights(batch, a, moved=bool(norms)) if wide else None
                norm, done = self._step(batch, a, weights)
                norms.append(norm)
                if epoch == 0:
                    used += [replace(one, index=index[one.index]) for one in done]
        metrics = {"grad_norm": float(np.mean(norms)), "updates": float(len(norms)), "sequences_used": 0.0}
        if used:
            index = torch.cat([one.index for one in used])
            chosen_rollout = rollout.select(index)
            width = chosen_rollout.mask.shape[1]
            logp = torch.cat([pad(one.logp, (0, width - one.logp.shape[1])) for one in used])
            weight = torch.cat([pad(one.weight, (0, width - one.weight.shape[1])) for one in used])
            metrics |= {"sequences_used": float(len(index)), **diagnostics(logp, chosen_rollout, weight)}
        return metrics

    def _step(self, batch: Rollout, advantage: Tensor, weights: Tensor | None) -> tuple[float, list[Used]]:
        """One optimizer step on whole groups: the gradient norm and what it was made of."""
        coef = self.aggregation(batch.mask)
        done: list[Used] = []
        self.optimizer.zero_grad(set_to_none=True)
        for index in self._microbatches(batch, advantage.nonzero()[:, 0]):
            micro, a = batch.select(index), advantage[index]
            logp = self._logprobs(micro)
            now = logp.detach()
            if micro.old_logp is None:
                micro = replace(micro, old_logp=now)
            width = logp.shape[1]
            weight = weigh(self.correction, now, micro, a) if weights is None else weights[index][:, :width]
            (-(coef[index][:, :width] * weight * a[:, None]).detach() * logp).sum().backward()
            done.append(Used(index, now, weight))
        if not done:
            return 0.0, done
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.policy.refresh()
        return float(norm), done

    def _whole_weights(self, batch: Rollout, advantage: Tensor, moved: bool) -> Tensor:
        """[B, T] weights of a whole minibatch; before the first step log pi is still log pi_old."""
        logp = self._score(batch, torch.arange(len(batch))) if moved or batch.old_logp is None else batch.old_logp
        return weigh(self.correction, logp, batch, advantage)

    @torch.no_grad()
    def _score(self, batch: Rollout, wanted: Tensor) -> Tensor:
        """[B, T] log pi of the sequences ``wanted``, 0 elsewhere."""
        logp = torch.zeros_like(batch.behavior_logp)
        for index in self._microbatches(batch, wanted):
            scored = self._logprobs(batch.select(index))
            logp[index, : scored.shape[1]] = scored
        return logp

    def _logprobs(self, batch: Rollout) -> Tensor:
        return self.policy.logprobs(batch.prompts, batch.tokens, batch.mask, temperature=self.temperature)

    def _microbatches(self, batch: Rollout, index: Tensor) -> list[Tensor]:
        """``index`` in runs of at most ``microbatch_tokens``, in order, so that most groups stay together and share
        their prompt."""
        cost = (batch.mask.sum(1) + torch.tensor([len(prompt) for prompt in batch.prompts]))[index]
        runs: list[Tensor] = []
        begin, total = 0, 0
        for end, tokens in enumerate(cost.tolist()):
            if total and total + tokens > self.microbatch_tokens:
                runs.append(index[begin:end])
                begin, total = end, 0
            total += tokens
        return [*runs, index[begin:]] if len(index) else []
