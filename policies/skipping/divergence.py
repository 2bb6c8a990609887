"""How far a nested policy mu is from its target pi, exactly: over the whole vocabulary, token by token.

    text   = write(policy, layers, prompts, Length(48, stop))     completions by mu (or by pi: all layers)
    theirs = states(policy, text, layers)                          final hidden states after the same prefixes
    gap    = compare(policy, states(policy, text, full), [theirs])

By the chain rule KL(mu || pi) of whole completions is the mean length times the mean over *mu's own* tokens of the
per-token KL(mu || pi). On tokens that pi wrote the same figure is an approximation, which ranks layers cheaply: one
text serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.model.layers import LayerWeights, kept_weights
from policies.model.nested_model import NestedModel
from policies.model.packing import Packing, micro_batches, pack
from policies.model.products import float_product, operand
from policies.model.scoring import first_stream, score_hidden
from policies.nested import HALVES, LayerSubset, Nested
from policies.policy import Policy
from policies.sharding import whole
from registry import UsageError

_CHUNK = 2**24  # logits held at a time, of each of the two policies


@dataclass(frozen=True)
class Length:
    """Where completions end: after ``tokens`` tokens, or with one of the ``stop`` tokens."""

    tokens: int = 48
    stop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Text:
    """B completions of prompts: ``prompts`` are B int64 tensors, ``tokens`` and ``mask`` are [B, T]."""

    prompts: list[Tensor]
    tokens: Tensor
    mask: Tensor

    @property
    def mean_length(self) -> float:
        """Tokens per completion."""
        return float(self.mask.sum()) / len(self.mask)

    @property
    def size(self) -> int:
        """Tokens in all, prompts counted once."""
        return int(self.mask.sum()) + sum(len(prompt) for prompt in {id(one): one for one in self.prompts}.values())

    def first(self, count: int) -> Text:
        """The first ``count`` completions."""
        return Text(self.prompts[:count], self.tokens[:count], self.mask[:count])

    def __add__(self, other: Text) -> Text:
        """The completions of both."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        padded = [
            torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in pair])
            for pair in ((self.tokens, other.tokens), (self.mask, other.mask))
        ]
        return Text([*self.prompts, *other.prompts], *padded)


@dataclass(frozen=True)
class Divergence:
    """Means over tokens, in nats: ``kl`` of mu from pi, KL(mu || pi); ``kl_reverse``, KL(pi || mu); ``tv``, the total
    variation, which is 1 minus the acceptance rate of a token of mu in speculative sampling (arXiv 2211.17192, 3.5).
    ``each`` [tokens] float32 is KL(mu || pi) token by token."""

    kl: float
    kl_reverse: float
    tv: float
    tokens: int
    each: Tensor = field(repr=False, compare=False)


def write(
    policy: Policy,
    layers: Nested,
    prompts: Sequence[Tensor],
    length: Length,
    seed: int = 0,
) -> Text:
    """A completion of each of B ``prompts`` (int64, one-dimensional) by ``layers`` of the policy."""
    sizes = np.array([len(prompt) for prompt in prompts])
    longest = int(sizes.max()) + length.tokens
    behavior = policy.behavior(layers, len(prompts), longest, seed=seed)
    ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt.numpy()
    at, episode, running = sizes.copy(), np.arange(len(prompts)), np.ones(len(prompts), bool)
    for step in range(length.tokens):
        obs = {"input_ids": ids, "length": np.where(running, at, 0)[:, None]}
        tokens, _ = behavior.act(obs, np.full(len(prompts), step == 0), episode)
        ids[running, at[running]] = tokens[running]
        at += running
        running &= ~np.isin(tokens, length.stop)
        if not running.any():
            break
    counts = at - sizes
    steps = np.arange(counts.max())
    mask = steps < counts[:, None]
    written = np.where(mask, np.take_along_axis(ids, np.minimum(sizes[:, None] + steps, longest - 1), 1), 0)
    return Text(list(prompts), torch.from_numpy(written), torch.from_numpy(mask))


def _packings(policy: Policy, text: Text) -> Iterator[Packing]:
    """The text's micro-batches, always in the same order."""
    for batch in micro_batches(text.prompts, text.mask, policy.token_limit):
        index = torch.tensor(batch)
        tokens, mask = text.tokens[index].to(policy.device), text.mask[index].to(policy.device)
        yield pack([text.prompts[i] for i in batch], tokens, mask)


def completions(policy: Policy, text: Text) -> Tensor:
    """[M] int64, the completion that each of the text's M tokens belongs to, in the order of ``states``."""
    batches = micro_batches(text.prompts, text.mask, policy.token_limit)
    return torch.cat([torch.tensor(batch)[text.mask[batch].cpu().nonzero()[:, 0]] for batch in batches])


def _model(policy: Policy, text: Text, layers: Nested) -> NestedModel:
    """What computes ``text`` through ``layers``. Raises ``UsageError`` for a policy on transformers' own layers."""
    if not policy.functional:
        raise UsageError(
            "this checkpoint runs on transformers' own layers (the project's do not reproduce it), which exact "
            "divergences do not support: choose a sampler that measures nothing, such as uniform or even"
        )
    return policy.rollout_model(layers, max(map(len, text.prompts)) + text.tokens.shape[1])


def full_model(policy: Policy, text: Text) -> NestedModel:
    """All layers, for the tokens of ``text``. Raises ``UsageError`` for a policy on transformers' own layers."""
    return _model(policy, text, tuple(range(policy.num_layers)))


def passes(policy: Policy, text: Text) -> list[tuple[Tensor, Callable[[Tensor, LayerWeights], Tensor]]]:
    """Per micro-batch of the text, the residual stream [N, width] before the first layer, and the way through a layer.

    Raises ``UsageError`` for a policy that runs on transformers' own layers."""
    model = full_model(policy, text)
    return [first_stream(packing, model) for packing in _packings(policy, text)]


def _final(model: NestedModel, stream: Tensor) -> Tensor:
    a = model.architecture
    return F.rms_norm(stream, (a.width,), model.final_gain, a.eps)


@torch.inference_mode()
def states(policy: Policy, text: Text, layers: Nested) -> Tensor:
    """Final hidden states [M, width] float32 through ``layers``, from which the text's M tokens are predicted."""
    model = _model(policy, text, layers)
    return torch.cat([_final(model, score_hidden(packing, model)) for packing in _packings(policy, text)])


@torch.inference_mode()
def states_without_each(policy: Policy, text: Text, half: str | None = None) -> Iterator[Tensor]:
    """For each of the L layers in turn, ``states`` of the subset that leaves out that layer, or its ``half``.

    What comes before the layer is computed once for all: half the cost of L calls of ``states``."""
    model = full_model(policy, text)
    weights = list(model.layers)
    packings = list(_packings(policy, text))
    ways = [first_stream(packing, model) for packing in packings]
    before = [x for x, _ in ways]
    for n in range(len(weights)):
        rest = kept_weights(weights, _left(n, half, len(weights)))
        parts = []
        for i, (packing, (_, apply)) in enumerate(zip(packings, ways, strict=True)):
            x = before[i]
            before[i] = apply(x, weights[n])
            for w in rest:
                x = apply(x, w)
            parts.append(_final(model, x.index_select(0, packing.before)))
        yield torch.cat(parts)


def _left(n: int, half: str | None, layers: int) -> LayerSubset:
    """What comes after the input of layer ``n`` when it, or its ``half``, is left out."""
    other = () if half is None else (f"{n}.{HALVES[1 - HALVES.index(half)]}",)
    return (*other, *range(n + 1, layers))


@torch.inference_mode()
def influence(policy: Policy, text: Text) -> list[float]:
    """Block influence of each layer (ShortGPT, arXiv 2403.03853, eq. 1): 1 - cos(input, output), mean over the text's
    tokens, prompts included."""
    model = full_model(policy, text)
    totals, tokens = np.zeros(len(model.layers)), 0
    for packing in _packings(policy, text):
        x, apply = first_stream(packing, model)
        tokens += len(x)
        for n, weights in enumerate(model.layers):
            after = apply(x, weights)
            totals[n] += float((1 - F.cosine_similarity(x, after, dim=1)).sum())
            x = after
    return (totals / tokens).tolist()


@torch.inference_mode()
def compare(policy: Policy, target: Tensor, behaviors: Sequence[Tensor], int8: bool = False) -> list[Divergence]:
    """The divergence of each nested policy mu from the target, both at the policy's temperature.

    Args:
        target: final hidden states [M, width] of pi, from ``states``.
        behaviors: those of one or several mu, [M, width] each, after the same prefixes.
        int8: whether the products of every mu are on bytes; so is its head then.
    """
    weight = operand(whole(policy.model.lm_head.weight), policy.dtype)
    rows = max(1, _CHUNK // len(weight))
    gaps = torch.zeros(len(behaviors), 3, len(target), device=target.device)

    def logits(hidden: Tensor) -> Tensor:
        return float_product(hidden.to(policy.dtype), weight)

    def log_distribution(hidden: Tensor, head: Callable[[Tensor], Tensor] = logits) -> Tensor:
        return head(hidden).div_(policy.temperature).log_softmax(-1)

    theirs = policy.rollout_weights(True).head.logits if int8 else logits

    for start in range(0, len(target), rows):
        log_pi = log_distribution(target[start : start + rows])
        pi = log_pi.exp()
        for n, hidden in enumerate(behaviors):
            log_mu = log_distribution(hidden[start : start + rows], theirs)
            mu, gap = log_mu.exp(), log_mu - log_pi
            kinds = (mu * gap).sum(1), -(pi * gap).sum(1), (mu - pi).abs().sum(1) / 2
            gaps[n, :, start : start + rows] = torch.stack(kinds)
    means = gaps.double().mean(2).tolist()
    return [
        Divergence(kl, reverse, tv, len(target), one[0]) for (kl, reverse, tv), one in zip(means, gaps, strict=True)
    ]
