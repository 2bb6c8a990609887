"""A behaviour policy: a layer subset of a target, with slots of its own, that writes one token per slot and call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policies.sampling import draw, uniforms
from policies.subset import LayerSubset
from registry import UsageError


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn from logits.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        seed: of the uniforms, together with the episode and the position.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature={self.temperature} is negative: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} is outside (0, 1]: 1 keeps every token")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} is negative: 0 keeps every token")


class Decoder(Protocol):
    """What turns prefixes into next-token logits."""

    longest: int

    def hidden(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """[n, width] float32, the final hidden states that the logits are a linear map of."""
        ...

    def logits(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """[n, V] float32 for the ``active`` slots; the caller may overwrite it."""
        ...


class Behavior:
    """Made by ``Policy.nested``; valid for one weight version of the policy. Shape letter: S slots.

    Attributes:
        layers: the subset it keeps.
        slots: S.
    """

    def __init__(
        self, decoder: Decoder, layers: LayerSubset, slots: int, sampling: SamplingSpec, current: Callable[[], None]
    ) -> None:
        self.layers = layers
        self.slots = slots
        self.sampling = sampling
        self._decoder = decoder
        self._current = current

    @torch.inference_mode()
    def act(
        self, obs: Mapping[str, np.ndarray], start: np.ndarray, episode: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token per slot and its log-probability under exactly the distribution it was drawn from.

        Args:
            obs: ``input_ids`` [S, M] int64, the full prefixes, and ``length`` [S, 1] int64; length 0 is an idle slot.
            start: [S] bool, true where a slot begins a new episode.
            episode: [S] int64; a token depends on the seed, its episode, its position and its distribution alone.

        Returns:
            Tokens [S] int64 and log-probabilities [S] float32; 0 and 0.0 in idle slots.

        Raises:
            RuntimeError: the policy's weights have changed since this behaviour was made.
            UsageError: shapes other than above, or a prefix longer than the slots hold.
        """
        ids, length = self._prefixes(obs, start, episode)
        tokens, logp = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.float32)
        active = np.flatnonzero(length > 0)
        if len(active):
            logits = self._decoder.logits(ids, length, np.asarray(start, bool), active)
            s = self.sampling
            uniform = torch.from_numpy(uniforms(s.seed, episode[active], length[active])).to(logits.device)
            token, chosen = draw(logits, uniform, s.temperature, s.top_p, s.top_k)
            tokens[active], logp[active] = token.cpu().numpy(), chosen.cpu().numpy()
        return tokens, logp

    @torch.inference_mode()
    def states(self, obs: Mapping[str, np.ndarray]) -> Tensor:
        """The final hidden states [S, width] float32 at the last token of each prefix, for a critic; 0 in idle slots.

        Takes the observations that ``act`` takes, in any order; errors as there."""
        start = np.zeros(self.slots, dtype=bool)  # a prefix that the slot does not hold is computed anew
        ids, length = self._prefixes(obs, start, start)
        active = np.flatnonzero(length > 0)
        if len(active) == 0:
            raise UsageError("every slot is idle: there is no prefix to compute a state of")
        hidden = self._decoder.hidden(ids, length, start, active)
        states = hidden.new_zeros(self.slots, hidden.shape[1])
        states[torch.from_numpy(active).to(hidden.device)] = hidden
        return states

    def _prefixes(
        self, obs: Mapping[str, np.ndarray], start: np.ndarray, episode: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """``input_ids`` [S, M] and lengths [S] of an observation that fits this behaviour, or an error."""
        self._current()
        ids, length = np.asarray(obs["input_ids"]), np.asarray(obs["length"]).reshape(-1)
        if not len(ids) == len(length) == len(start) == len(episode) == self.slots:
            raise UsageError(
                f"this behaviour has {self.slots} slots, but input_ids, length, start and episode have "
                f"{len(ids)}, {len(length)}, {len(start)} and {len(episode)} rows"
            )
        if length.max(initial=0) > self._decoder.longest:
            raise UsageError(
                f"a prefix of {length.max()} tokens is longer than max_length={self._decoder.longest}: "
                "make the behaviour with a larger max_length"
            )
        return ids, length
