"""Drawing tokens: a counter-based uniform per (seed, episode, position) and an inverse CDF.

The uniform of a token is a hash of its coordinates, so an episode is the same whatever the slots it runs in. The
inverse CDF is two-level (block sums, then one block), because a softmax with ``torch.multinomial`` over a large
vocabulary costs more than the model on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from registry import UsageError

_BLOCK = 256  # entries per block of the two-level inverse CDF: about sqrt(V) for the usual vocabularies
_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn from logits.

    Attributes:
        temperature: 0 is greedy.
        seed: of the uniforms, together with the episode and the position.
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature={self.temperature} is negative: give 0 (greedy) or more")


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    x = x + _ODD[0]
    x = (x ^ (x >> np.uint64(30))) * _ODD[1]
    x = (x ^ (x >> np.uint64(27))) * _ODD[2]
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, episode: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) per pair of int64 ``episode`` and ``position``: a pure function of the three arguments."""
    with np.errstate(over="ignore"):
        word = _mix(np.array([seed % 2**64], dtype=np.uint64))
        word = _mix(word ^ episode.astype(np.uint64))
        word = _mix(word ^ position.astype(np.uint64))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds ``target``, kept below the total whatever the rounding."""
    total = cumulative[:, -1]
    inside = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, inside[:, None], right=True)[:, 0].clamp_max(cumulative.shape[1] - 1)


def _invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from unnormalised ``mass`` [B, V] by the inverse CDF at ``uniform`` [B], and the totals [B]."""
    rows, size = mass.shape
    if size <= 4 * _BLOCK:
        cumulative = mass.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1]
        return _first_above(cumulative, uniform * total), total
    blocks = -(-size // _BLOCK)
    whole = size // _BLOCK
    sums = mass.new_zeros(rows, blocks, dtype=torch.float64)
    sums[:, :whole] = mass[:, : whole * _BLOCK].view(rows, whole, _BLOCK).sum(-1)
    if whole < blocks:
        sums[:, whole] = mass[:, whole * _BLOCK :].sum(-1)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1]
    target = uniform * total
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)[:, None])[:, 0], 0.0)
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=mass.device)
    inner = mass.gather(1, columns.clamp_max(size - 1)) * (columns < size)
    return block * _BLOCK + _first_above(inner.cumsum(-1, dtype=torch.float64), target - before), total


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens [B] int64 and their log-probabilities [B] float32 under the distribution they are drawn from.

    Args:
        logits: [B, V] float32; overwritten.
        uniform: [B] float64 in [0, 1), one per row.
        temperature: 0 is greedy, and the log-probability is then the untempered softmax's.
    """
    if temperature == 0.0:
        best, token = logits.max(-1)
        return token, -logits.sub_(best[:, None]).exp_().sum(-1).log()
    if temperature != 1.0:
        logits.div_(temperature)
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub_(peak).exp_()
    token, total = _invert(mass, uniform)
    return token, (mass.gather(1, token[:, None])[:, 0].double().log() - total.log()).float()
