"""Token MDPs small enough to enumerate: every completion, its probability under pi and mu, its reward, its score.

Letters: N completions (all of them), T the horizon, V the vocabulary, S states (prefixes). Token 0 ends a completion;
one that reaches T tokens is cut there, as a token budget does. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from agents.rollout import Rollout
from registry import UsageError


@dataclass(frozen=True)
class Tree:
    """All completions of a vocabulary and a horizon.

    Attributes:
        tokens: [N, T] int64, 0 on padding.
        mask: [N, T] bool.
        state: [N, T] int64, which prefix each token was sampled in; 0 on padding.
        states: S.
        vocabulary: V.
    """

    tokens: Tensor
    mask: Tensor
    state: Tensor
    states: int
    vocabulary: int

    @property
    def horizon(self) -> int:
        return self.tokens.shape[1]


@cache
def tree(vocabulary: int, horizon: int) -> Tree:
    """Enumerate: (V-1)^(t-1) completions of each length t below T, and V (V-1)^(T-1) of length T."""
    if vocabulary < 2 or horizon < 1:
        raise UsageError(f"vocabulary {vocabulary} and horizon {horizon}: at least 2 tokens and 1 step are needed")
    going = range(1, vocabulary)
    completions = [(*prefix, 0) for t in range(horizon - 1) for prefix in product(going, repeat=t)]
    completions += [(*prefix, last) for prefix in product(going, repeat=horizon - 1) for last in range(vocabulary)]
    index: dict[tuple[int, ...], int] = {p: n for n, p in enumerate(prefixes(vocabulary, horizon))}
    tokens = torch.zeros(len(completions), horizon, dtype=torch.long)
    mask = torch.zeros(len(completions), horizon, dtype=torch.bool)
    state = torch.zeros(len(completions), horizon, dtype=torch.long)
    for row, completion in enumerate(completions):
        length = len(completion)
        tokens[row, :length] = torch.tensor(completion)
        mask[row, :length] = True
        state[row, :length] = torch.tensor([index[completion[:t]] for t in range(length)])
    return Tree(tokens, mask, state, len(index), vocabulary)


def prefixes(vocabulary: int, horizon: int) -> list[tuple[int, ...]]:
    """The S states in order: all prefixes of fewer than T going tokens, shortest first."""
    return [prefix for t in range(horizon) for prefix in product(range(1, vocabulary), repeat=t)]


@dataclass(frozen=True)
class Cell:
    """One setting of the lab: a target, the policy that writes, and a reward.

    Attributes:
        tree: all completions.
        log_pi, log_old, log_mu: [S, V] log-probabilities of the current target, of the target at rollout time and of
            the nested policy.
        reward: [N], 0 or 1.
        gram: [S V, S V] inner products of the gradients of the logits with respect to the target's parameters; None
            for a tabular softmax, whose logits are the parameters.
        labels: what the cell is, for its rows.
    """

    tree: Tree
    log_pi: Tensor
    log_old: Tensor
    log_mu: Tensor
    reward: Tensor
    gram: Tensor | None
    labels: dict[str, float | int | str]

    def logp(self, table: Tensor) -> Tensor:
        """[N, T] log-probabilities of every token under a [S, V] table, 0 on padding."""
        return torch.where(self.tree.mask, table[self.tree.state, self.tree.tokens], 0.0)

    def probability(self, table: Tensor) -> Tensor:
        """[N]: of every completion; they sum to 1."""
        return self.logp(table).sum(1).exp()

    def rollout(self, index: Tensor, group: Tensor, by_target: Tensor | None = None) -> Rollout:
        """The completions at ``index`` ([B]) in groups ``group`` ([B]) as a rollout of the nested policy, or of the
        target where ``by_target`` ([B])."""
        prompt = torch.zeros(1, dtype=torch.long)
        return Rollout(
            prompts=(prompt,) * len(index),
            tokens=self.tree.tokens[index],
            mask=self.tree.mask[index],
            behavior_logp=self.logp(self.log_mu)[index],
            reward=self.reward[index],
            group=group,
            old_logp=self.logp(self.log_old)[index],
            by_target=by_target,
        )

    def vector(self, coefficient: Tensor) -> Tensor:
        """[S, V]: the sum over completions and tokens of ``coefficient`` [N, T] times the token's score (the gradient
        of its log-probability with respect to the logits)."""
        c = torch.where(self.tree.mask, coefficient, 0.0).flatten()
        state, token = self.tree.state.flatten(), self.tree.tokens.flatten()
        shape = self.log_pi.shape
        taken = torch.zeros(shape[0] * shape[1], dtype=c.dtype).index_add_(0, state * shape[1] + token, c)
        visits = torch.zeros(shape[0], dtype=c.dtype).index_add_(0, state, c)
        return taken.view(shape) - visits[:, None] * self.log_pi.exp()

    def inner(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two gradients given in logits, [S, V] each, in the target's parameters."""
        if self.gram is None:
            return float((a * b).sum())
        return float(a.flatten() @ (self.gram @ b.flatten()))

    def kernel(self) -> Tensor:
        """[N, T, T]: inner products of the scores of the tokens of each completion, 0 on padding."""
        vocabulary, horizon = self.tree.vocabulary, self.tree.horizon
        score = torch.nn.functional.one_hot(self.tree.tokens, vocabulary) - self.log_pi.exp()[self.tree.state]
        score = torch.where(self.tree.mask[:, :, None], score, 0.0)  # [N, T, V]
        if self.gram is None:
            return torch.diag_embed(score.square().sum(2))  # the tokens of a completion are in distinct states
        at = (self.tree.state[:, :, None] * vocabulary + torch.arange(vocabulary)).view(-1, horizon * vocabulary)
        block = self.gram[at[:, :, None], at[:, None, :]].view(-1, horizon, vocabulary, horizon, vocabulary)
        return torch.einsum("ntv,ntvsw,nsw->nts", score, block, score)

    def true_gradient(self) -> Tensor:
        """[S, V]: of the expected reward of the target, the finite sum over all completions."""
        weight = self.probability(self.log_pi) * self.reward
        return self.vector(weight[:, None].expand(self.tree.tokens.shape))

    def on_policy(self) -> Cell:
        """The same target, writing itself."""
        return replace(self, log_mu=self.log_pi, log_old=self.log_pi)

    def divergence(self) -> dict[str, float]:
        """Exact divergences of mu from pi: ``d`` (nats per completion), ``kl`` (per token), ``tv`` (per token, by
        mu's visits), ``tv_sequence``, ``chi2``, ``ess`` (of completions, as a fraction) and ``mean_length``."""
        mu, pi = self.probability(self.log_mu), self.probability(self.log_pi)
        length = float((mu * self.tree.mask.sum(1)).sum())
        gap = 0.5 * (self.log_mu.exp() - self.log_pi.exp()).abs().sum(1)
        visited = torch.where(self.tree.mask, gap[self.tree.state], 0.0).sum(1)
        d = float((mu * (self.logp(self.log_mu) - self.logp(self.log_pi)).sum(1)).sum())
        moment = float((pi.square() / mu).sum())
        return {
            "d": d,
            "kl": d / length,
            "tv": float((mu * visited).sum()) / length,
            "tv_sequence": float((mu - pi).abs().sum()) / 2,
            "chi2": moment - 1,
            "ess": 1 / moment,
            "mean_length": length,
        }


def random_target(shape: Tree, generator: torch.Generator, eos: float = -2.0) -> Tensor:
    """[S, V] log-probabilities: Gaussian logits of deviation 1.5, ``eos`` is added to the end token's so that most
    completions run long."""
    logits = 1.5 * torch.randn(shape.states, shape.vocabulary, generator=generator, dtype=torch.float64)
    logits[:, 0] += eos
    return logits.log_softmax(1)


def random_reward(shape: Tree, log_pi: Tensor, success: float, generator: torch.Generator) -> Tensor:
    """[N] of 0 and 1: random completions, taken until the target's success rate is nearest to ``success``."""
    logp = torch.where(shape.mask, log_pi[shape.state, shape.tokens], 0.0).sum(1)
    order = torch.randperm(len(logp), generator=generator)
    mass = logp.exp()[order].cumsum(0)
    count = int((mass - success).abs().argmin()) + 1
    reward = torch.zeros(len(logp), dtype=torch.float64)
    reward[order[:count]] = 1.0
    return reward


def add_noise(cell: Cell, d: float, generator: torch.Generator) -> Cell:
    """The cell with mu = softmax(log pi + sigma * noise), sigma such that D = ``d`` nats."""
    noise = torch.randn(cell.log_pi.shape, generator=generator, dtype=torch.float64)

    def at(sigma: float) -> Cell:
        return replace(cell, log_mu=(cell.log_pi + sigma * noise).log_softmax(1))

    low, high = 0.0, 1.0
    while at(high).divergence()["d"] < d:
        high *= 2
        if high > 64:
            raise UsageError(f"D = {d:g} nats cannot be reached at horizon {cell.tree.horizon}; lower it")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).divergence()["d"] < d else (low, middle)
    return at(high)
