"""The update: one estimator for every agent, ``loss = -sum coef * (W * A).detach() * log pi``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.arguments import check_grad_norm
from agents.batches.experts import Experts
from agents.corrections import traits, warn_zero, weigh
from agents.distributed import ALONE, Ranks
from agents.monitoring.diagnostics import by_kind, by_length, design_weights, diagnostics, weight_diagnostics
from agents.objective.anchors import Anchoring
from agents.objective.consistency import Consistency
from agents.rollout import Rollout, joined
from policies import Nested, Policy
from policies.sharding import most
from registry import UsageError

WIDE_SCOPES = ("group", "batch")  # a correction of such a scope must see more than one sequence at once

_KEPT = "No step was taken with it: the weights are those of before. Lower learning_rate"
_AGAIN = "start again or go on from the last checkpoint"
REMEDY = f"{_KEPT}, take dtype=float32 or a bounded correction (truncated-is), and {_AGAIN}"


class NotFinite(UsageError):
    """A step would have written NaN or infinity into every weight."""

    def __init__(self, what: str, remedy: str = REMEDY) -> None:
        super().__init__(f"{what}. {remedy}")


def refuse_broken_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """A hook before another loop's optimizer steps: raises NotFinite where a gradient is not finite."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        raise NotFinite(f"the gradient's norm is {float(norm)}", f"{_KEPT}, and {_AGAIN}")


def _of_used(index: Tensor, weight: Tensor, logp: Tensor, rollout: Rollout) -> dict[str, float]:
    """``weight_diagnostics`` of the sequences at ``index``; empty where there is none."""
    if not len(index):
        return {}
    used = rollout.select(index)
    width = used.mask.shape[1]
    return weight_diagnostics(weight[index, :width], logp[index, :width], used)


def _wide_norm(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([gradient.double().norm() for gradient in gradients]).norm()


def _check_finite(rollout: Rollout, advantage: Tensor) -> None:
    """Raise NotFinite for numbers that no step may be taken with. Rewards that are all infinite are equal, and would
    pass for ones without signal."""
    for name, values in (("a reward", rollout.reward), ("an advantage", advantage)):
        if not torch.isfinite(values).all():
            raise NotFinite(
                f"{name} is not a finite number",
                f"No step was taken with it: mend what computes the rewards, and {_AGAIN}",
            )
    if not torch.isfinite(rollout.behavior_logp[rollout.mask]).all():
        raise NotFinite("the rollout holds a log-probability that is not a finite number")


class OfUpdate:
    """An attribute of an agent that its ``update`` has, so that it may be set on either. Setting it raises what making
    such an update raises."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, agent: Any, owner: type) -> Any:
        if agent is None:
            return self
        own = vars(agent)
        return getattr(own["update"], self.name) if "update" in own else own[self.name]

    def __set__(self, agent: Any, value: Any) -> None:
        own = vars(agent)
        if "update" not in own:  # the constructor has yet to make it
            own[self.name] = value
            return
        replace(own["update"], **{self.name: value})
        setattr(own["update"], self.name, value)


@dataclass
class Update:
    """Policy-gradient steps on a rollout.

    Zero-advantage sequences are dropped before the forward, unless an anchor in the loss or an entropy bonus pulls at
    every token: their gradient is exactly zero, since the coefficients of the aggregation come from the whole minibatch
    first. Corrections whose scope is a group or the batch see the whole minibatch in one call, so that micro-batches,
    which only bound memory, cannot change them.

    Attributes:
        minibatches: optimizer steps per epoch, each on whole groups.
        epochs: passes over the rollout.
        max_grad_norm: clip.
        microbatch_tokens: most tokens in one forward and backward; a prompt that completions share counts once.
        consistency: weight of the auxiliary loss that keeps the nested policy near the target.
        anchoring: what keeps the target near a reference; in the loss it pulls at every completion.
        experts: worked solutions, which have a part in the loss beside the rollout's.
        entropy_bonus: weight of the exact entropy of every token's distribution, which the loss is lowered by.
        mask_truncated: completions that the token budget cut off have no part in the loss, and their tokens none in its
            normaliser (DAPO's overlong filtering, arXiv 2503.14476, sec. 3.4); where that holds B, it counts them.
        ranks: the processes that share the forwards and backwards; each knows the whole rollout.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    correction: Any
    aggregation: Any
    minibatches: int = 1
    epochs: int = 1
    max_grad_norm: float = 1.0
    microbatch_tokens: int = 16_384
    consistency: float = 0.0
    anchoring: Anchoring | None = None
    experts: Experts | None = None
    entropy_bonus: float = 0.0
    mask_truncated: bool = False
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        check_grad_norm(self.max_grad_norm)
        for name in ("minibatches", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("entropy_bonus", "consistency"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name}={getattr(self, name)} must be a finite number of at least 0")
        self._consistency = Consistency(self.consistency)

    def __call__(
        self,
        rollout: Rollout,
        advantage: Tensor,
        rng: np.random.Generator,
        nested: Nested | None = None,
        share: float = 0.0,
        beside: Rollout | None = None,
    ) -> dict[str, float]:
        """Take ``epochs * minibatches`` optimizer steps, less those without a gradient. Returns their number
        ``updates`` and mean gradient norm, the weights of the first epoch, and the diagnostics at pi_old: of all
        completions if ``share`` is above 0 or all are scored anyway, else of those with an advantage.

        Raises:
            NotFinite: before a step whose log-probabilities, advantages or gradient are not finite.

        Args:
            rollout: B completions.
            advantage: [B].
            rng: orders the groups.
            nested: what wrote the rollout, for the consistency loss; None where the full model did.
            share: of the completions without an advantage that are scored for the diagnostics alone.
            beside: further completions of what wrote the rollout, to be measured alone, as those without an advantage.
        """
        wide = traits(self.correction).scope in WIDE_SCOPES
        self._consistency = Consistency(self.consistency)
        _check_finite(rollout, advantage)
        advantage = torch.where(self._counted(rollout), advantage, 0.0)
        used_index = advantage.nonzero()[:, 0]
        all_scored = wide or rollout.old_logp is not None
        design = design_weights(advantage, rollout, 1.0 if all_scored else share, rng.spawn(1)[0])
        one_step = self.epochs * self.minibatches == 1
        old_logp = self._old_logp(rollout, advantage, design, wide)
        if beside is not None:
            design_beside = design_weights(torch.zeros(len(beside)), beside, share, rng.spawn(1)[0])
            beside = replace(
                beside,
                old_logp=self._score(beside, design_beside.nonzero()[:, 0]),
                age=None if rollout.age is None else torch.zeros_like(beside.group),
                borrowed=None if rollout.borrowed is None else torch.zeros(len(beside), dtype=torch.bool),
            )
        if wide or not one_step:
            rollout = replace(rollout, old_logp=old_logp)
        groups = torch.unique(rollout.group)
        norms: list[float] = []
        logp, weight = torch.zeros_like(rollout.behavior_logp), torch.zeros_like(rollout.behavior_logp)
        for epoch in range(self.epochs):
            order = torch.from_numpy(rng.permutation(len(groups)))
            for number, chosen in enumerate(order.tensor_split(self.minibatches)):
                index = torch.isin(rollout.group, groups[chosen]).nonzero()[:, 0]
                batch, a = rollout.select(index), advantage[index]
                weights = self._whole_weights(batch, a, moved=bool(norms)) if wide else None
                solutions = self.experts.part(number, self.minibatches) if self.experts else None
                norm, used = self._step(batch, a, weights, nested, solutions)
                norms += [] if norm is None else [norm]
                if epoch == 0:
                    width = batch.mask.shape[1]
                    logp[index, :width], weight[index, :width] = used
        logp, weight = self.ranks.sum(logp), self.ranks.sum(weight)
        if rollout.old_logp is None:
            old_logp[used_index] = logp[used_index]
        metrics = {"grad_norm": float(np.mean(norms or [0.0])), "updates": float(len(norms))}
        metrics |= {"sequences_used": float(len(used_index)), **self._consistency.spent()}
        metrics |= self._anchor_metrics(rollout, logp)
        written = replace(rollout, old_logp=old_logp)
        if beside is not None:
            written, design = joined(written, beside), torch.cat([design, design_beside])
        assert written.old_logp is not None
        return (
            metrics
            | diagnostics(written.old_logp, written, design)
            | by_kind(written.old_logp, written, design)
            | (by_length(written.old_logp, written, design) if share else {})
            | _of_used(used_index, weight, logp, rollout)
        )

    def _step(
        self,
        batch: Rollout,
        advantage: Tensor,
        weights: Tensor | None,
        nested: Nested | None,
        solutions: Rollout | None = None,
    ) -> tuple[float | None, tuple[Tensor, Tensor]]:
        """One optimizer step on whole groups: the gradient norm, None where there is no gradient and no step, and the
        [B, T] log pi and weights that this process's part of the gradient was made of."""
        coef = self.aggregation(batch.mask & self._counted(batch)[:, None])
        used = torch.zeros_like(batch.behavior_logp), torch.zeros_like(batch.behavior_logp)
        wanted = self._learnt(batch, advantage).nonzero()[:, 0]
        pull = self._consistency.coefficients(batch, wanted, self.aggregation)
        self.optimizer.zero_grad(set_to_none=True)
        if self.experts is not None and solutions is not None:
            coef, pull = coef * (1 - self.experts.weight), pull * (1 - self.experts.weight)
            self._imitate(solutions, self.experts)
        for index in self._microbatches(batch, wanted):
            micro, a = batch.select(index), advantage[index]
            logp, entropy = self._logprobs_and_entropies(micro) if self.entropy_bonus else (self._logprobs(micro), None)
            now = logp.detach()
            if micro.old_logp is None:
                micro = replace(micro, old_logp=now)
            width = logp.shape[1]
            if weights is not None:
                weight = weights[index][:, :width]
            else:
                weight = weigh(self.correction, now, micro, a) if len(index) else now
            slope = -(coef[index][:, :width] * weight * a[:, None])
            if self.anchoring is not None and self.anchoring.in_loss:
                slope = slope + coef[index][:, :width] * self.anchoring.anchor.slope(now, micro).float()
            loss = (slope.detach() * logp).sum()
            if entropy is not None:
                loss = loss - self.entropy_bonus * (coef[index][:, :width] * entropy).sum()
            loss.backward()
            self._consistency.backward(self.policy, nested, micro, now, pull[index][:, :width])
            used[0][index, :width], used[1][index, :width] = now, weight
        signal = (advantage != 0)[:, None]
        if signal.any() and not self.ranks.sum((signal & (used[1] != 0)).sum()):
            warn_zero(self.correction)
        if not len(wanted) and solutions is None:
            return None, used
        self.ranks.sum_gradients(self.policy.parameters())
        norm = self._clip(float(used[1].max()))
        self.optimizer.step()
        self.policy.refresh()
        return norm, used

    def _imitate(self, solutions: Rollout, experts: Experts) -> None:
        """Add the gradient of the worked solutions' part of the loss."""
        assert experts.source is not None
        coef = experts.weight * self.aggregation(solutions.mask)
        for index in self._microbatches(solutions, torch.arange(len(solutions))):
            logp = self._logprobs(solutions.select(index))
            weight = coef[index][:, : logp.shape[1]] * experts.source.token_weight(logp)
            (-weight * logp).sum().backward()

    def _learnt(self, batch: Rollout, advantage: Tensor) -> Tensor:
        """[B] bool, the sequences that have a gradient."""
        everywhere = bool(self.entropy_bonus) or (self.anchoring is not None and self.anchoring.in_loss)
        return self._counted(batch) if everywhere else advantage != 0

    def _anchor_metrics(self, rollout: Rollout, logp: Tensor) -> dict[str, float]:
        """Of the first epoch's log pi [B, T]."""
        if self.anchoring is None or rollout.reference_logp is None:
            return {}
        if self.anchoring.in_reward:
            assert rollout.old_logp is not None
            logp = rollout.old_logp
        index = self._counted(rollout).nonzero()[:, 0]
        counted = rollout.select(index)
        return self.anchoring.metrics(logp[index, : counted.mask.shape[1]], counted)

    def _counted(self, batch: Rollout) -> Tensor:
        """[B] bool, the completions that the loss is of."""
        return ~batch.truncated if self.mask_truncated else torch.ones(len(batch), dtype=torch.bool)

    def _clip(self, largest_weight: float) -> float:
        """Clip the gradient; returns its norm before."""
        parameters = [parameter for parameter in self.policy.parameters() if parameter.grad is not None]
        norm = self.ranks.norm(parameters, torch.nn.utils.get_total_norm)
        if not torch.isfinite(norm):  # the squares of large entries overflow first
            norm = self.ranks.norm(parameters, _wide_norm)
        if not torch.isfinite(norm):
            raise NotFinite(
                f"the gradient's norm is {float(norm)} (largest weight W of the correction: {largest_weight:.2g})"
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return float(norm)

    def _whole_weights(self, batch: Rollout, advantage: Tensor, moved: bool) -> Tensor:
        """[B, T] weights of a whole minibatch; before the first step log pi is still log pi_old."""
        logp = self._score(batch, torch.arange(len(batch))) if moved or batch.old_logp is None else batch.old_logp
        return weigh(self.correction, logp, batch, advantage)

    def _old_logp(self, rollout: Rollout, advantage: Tensor, design: Tensor, wide: bool) -> Tensor:
        """[B, T] log pi_old of the sequences that the diagnostics or a later step will ask for; 0 elsewhere."""
        if rollout.old_logp is not None:
            return rollout.old_logp
        if wide:
            return self.score(rollout)
        silent = (design > 0) & (advantage == 0)
        logp = self._score(rollout, silent.nonzero()[:, 0])
        if self.epochs * self.minibatches > 1:  # apart from the silent ones, which would change their micro-batches
            logp += self._score(rollout, (self._learnt(rollout, advantage) & ~silent).nonzero()[:, 0])
        return logp

    def score(self, rollout: Rollout) -> Tensor:
        """[B, T] log pi of the whole rollout under the present weights."""
        return self._score(rollout, torch.arange(len(rollout)))

    @torch.no_grad()
    def entropies(self, rollout: Rollout) -> Tensor:
        """[B, T] of the whole rollout's next-token distributions under the present weights, in nats."""
        entropy = torch.zeros_like(rollout.behavior_logp)
        for index in self._microbatches(rollout, torch.arange(len(rollout))):
            _, measured = self._logprobs_and_entropies(rollout.select(index))
            entropy[index, : measured.shape[1]] = measured
        return self.ranks.sum(entropy)

    @torch.no_grad()
    def _score(self, batch: Rollout, wanted: Tensor) -> Tensor:
        """[B, T] log pi of the sequences ``wanted``, 0 elsewhere."""
        logp = torch.zeros_like(batch.behavior_logp)
        for index in self._microbatches(batch, wanted):
            scored = self._logprobs(batch.select(index))
            logp[index, : scored.shape[1]] = scored
        return self.ranks.sum(logp)

    def _logprobs(self, batch: Rollout) -> Tensor:
        return self._on_host(self.policy.logprobs(batch.prompts, batch.tokens, batch.mask), batch)

    def _logprobs_and_entropies(self, batch: Rollout) -> tuple[Tensor, Tensor]:
        logp, entropy = self.policy.logprobs_and_entropies(batch.prompts, batch.tokens, batch.mask)
        return self._on_host(logp, batch), entropy.to(batch.tokens.device)

    def _on_host(self, logp: Tensor, batch: Rollout) -> Tensor:
        """Rollouts stay on the host: corrections are small beside the forward."""
        if not torch.isfinite(logp.detach()).all():
            raise NotFinite("the target gives a completion's token a log-probability that is not a finite number")
        return logp.to(batch.tokens.device)

    def _microbatches(self, batch: Rollout, index: Tensor) -> list[Tensor]:
        """This process's part of ``index`` in runs of at most ``microbatch_tokens``, in order: whole groups, which
        share their prompt, where they fit."""
        length = batch.mask.sum(1)
        prompt = torch.tensor([len(prompt) for prompt in batch.prompts])
        index = self.ranks.part(index, (length + prompt)[index])
        runs: list[list[int]] = []
        room = 0
        _, counts = torch.unique_consecutive(batch.group[index], return_counts=True)
        for members in index.split(counts.tolist()):
            shared = int(prompt[members[0]])
            if int(length[members].sum()) + shared > room:
                runs.append([])
                room = self.microbatch_tokens - shared
            else:
                room -= shared
            for i, tokens in zip(members.tolist(), length[members].tolist(), strict=True):
                if runs[-1] and tokens > room:
                    runs.append([])
                    room = self.microbatch_tokens - shared
                runs[-1].append(i)
                room -= tokens
        if self.policy.sharded:  # every process gathers the weights as often as the one with most to do
            runs += [[] for _ in range(most(len(runs)) - len(runs))]
        return [torch.tensor(run, dtype=torch.int64) for run in runs]
