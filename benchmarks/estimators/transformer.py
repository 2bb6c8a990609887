"""A real layer-skipped behaviour policy, small enough to enumerate: a pre-norm causal transformer in float64, fitted to
a random target policy, whose nested policy leaves out whole layers. pi and mu share every weight, as in Nested-ReFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from benchmarks.estimators.mdp import Cell, prefixes, random_reward, random_target, tree
from registry import UsageError

LAYERS = 12
WIDTH = 16
HEADS = 2
FITTING_STEPS = 200


class Layer(nn.Module):
    """One layer: attention and a gated linear unit on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mixed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[sequences, positions, width] to the same."""
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.attention(_norm(x)).chunk(3, -1))
        score = q @ k.transpose(2, 3) / shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        read = (score.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.mixed(read)
        gate, value = self.up(_norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * value)


class Mini(nn.Module):
    """The transformer over a vocabulary and a horizon; position 0 is the start of the completion."""

    def __init__(self, vocabulary: int, horizon: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocabulary, WIDTH))
        self.position = nn.Parameter(torch.randn(horizon, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, vocabulary)
        self.double()

    def forward(self, tokens: Tensor, kept: tuple[int, ...] = tuple(range(LAYERS))) -> Tensor:
        """Logits [sequences, positions, V] of [sequences, positions - 1] tokens, through the layers ``kept``."""
        start = torch.zeros_like(self.position[:1]).expand(len(tokens), 1, WIDTH)
        x = torch.cat([start, self.embedding[tokens]], 1) + self.position[: tokens.shape[1] + 1]
        for layer in kept:
            x = self.layers[layer](x)
        return self.head(_norm(x))


def _norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@cache
def fit(vocabulary: int, horizon: int, seed: int) -> Mini:
    """A mini transformer fitted by Adam to a random target policy on every prefix, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mini(vocabulary, horizon)
        wanted = random_target(tree(vocabulary, horizon), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(FITTING_STEPS):
        loss = -(wanted.exp() * log_probabilities(model, vocabulary, horizon)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def log_probabilities(
    model: nn.Module, vocabulary: int, horizon: int, kept: tuple[int, ...] = tuple(range(LAYERS))
) -> Tensor:
    """[S, V] log-probabilities of every prefix through the layers ``kept``: all prefixes of full length in one batch,
    whose positions are all shorter ones."""
    longest, rows, columns = _layout(vocabulary, horizon)
    return model(longest, kept)[rows, columns].log_softmax(-1)


def _layout(vocabulary: int, horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    states = prefixes(vocabulary, horizon)
    full = [p for p in states if len(p) == horizon - 1]
    first = {p[:t]: n for n, p in reversed(list(enumerate(full))) for t in range(horizon)}
    longest = torch.tensor(full, dtype=torch.long).view(len(full), horizon - 1)
    return longest, torch.tensor([first[p] for p in states]), torch.tensor([len(p) for p in states])


@cache
def gram(vocabulary: int, horizon: int, seed: int) -> Tensor:
    """[S V, S V]: inner products of the logits' gradients in all parameters (the neural tangent kernel)."""
    model = fit(vocabulary, horizon, seed)
    longest, rows, columns = _layout(vocabulary, horizon)

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (longest,))[rows, columns].flatten()

    jacobian = jacrev(logits, chunk_size=64)(dict(model.named_parameters()))
    flat = torch.cat([part.flatten(1) for part in jacobian.values()], 1)  # [S V, parameters]
    return flat @ flat.T


def skipping_cell(vocabulary: int, horizon: int, success: float, seed: int, skipped: Sequence[int]) -> Cell:
    """The cell of a fitted transformer whose nested policy leaves out the layers ``skipped``."""
    model = fit(vocabulary, horizon, seed)
    shape = tree(vocabulary, horizon)
    log_pi = log_probabilities(model, vocabulary, horizon)
    kept = tuple(n for n in range(LAYERS) if n not in skipped)
    return Cell(
        tree=shape,
        log_pi=log_pi,
        log_old=log_pi,
        log_mu=log_probabilities(model, vocabulary, horizon, kept),
        reward=random_reward(shape, log_pi, success, torch.Generator().manual_seed(seed)),
        gram=gram(vocabulary, horizon, seed),
        labels={"mu": "skip", "skipped": len(skipped), "success": success, "seed": seed},
    )


def subsets(count: int, draws: int, seed: int) -> list[tuple[int, ...]]:
    """Up to ``draws`` different sets of ``count`` skipped layers, uniform, the first and the last kept."""
    inner = range(1, LAYERS - 1)
    if not 0 < count <= len(inner):
        raise UsageError(f"cannot skip {count} layers: 1 to {len(inner)} of the {LAYERS} may be left out")
    every = list(combinations(inner, count)) if comb(len(inner), count) <= 1000 else []
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(every), generator=generator)[:draws]
    return [every[n] for n in order]
