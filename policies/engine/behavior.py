"""A behaviour policy: a layer subset of a target, with slots of its own, that writes one token per slot and call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policies.engine.ahead import Ahead
from policies.engine.drafts import Drafting, Extends, Proposes
from policies.engine.sampling import SamplingSpec, uniforms
from policies.nested import LayerSubset
from registry import UsageError


class Decoder(Extends, Protocol):
    """What turns prefixes into next-token logits."""

    def hidden(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor:
        """[n, width] float32, the final hidden states of the ``active`` slots' prefixes."""
        ...

    def products(self, rows: int) -> None:
        """The layers' matrix products of a step of ``rows`` rows and nothing else: what a step takes at the least."""
        ...


class Behavior:
    """Made by ``Policy.behavior``; valid for one weight version of the policy. Shape letter: S slots.

    Attributes:
        layers: the subset it keeps.
        slots: S.
        sampling: how it draws tokens.
        decoder: what turns prefixes into hidden states and those into tokens.
        drafting: judges what is proposed to it; None where nothing is.
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: LayerSubset,
        slots: int,
        sampling: SamplingSpec,
        current: Callable[[], None],
        ahead: Ahead | None = None,
        proposers: Sequence[Proposes] = (),
    ) -> None:
        self.layers = layers
        self.slots = slots
        self.sampling = sampling
        self.decoder = decoder
        self._current = current
        # No method of its own: a circle would keep the store, gigabytes on a GPU, until the next collection.
        plain = partial(_step, decoder, sampling) if ahead is None else ahead.next
        self.drafting = Drafting(decoder, slots, sampling, proposers, plain) if proposers else None
        self._next = plain if self.drafting is None else self.drafting.next

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
            tokens[active], logp[active] = self._next(ids, length, np.asarray(start, bool), episode, active)
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
        hidden = self.decoder.hidden(ids, length, start, active)
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
        if length.max(initial=0) > self.decoder.longest:
            raise UsageError(
                f"a prefix of {length.max()} tokens is longer than max_length={self.decoder.longest}: "
                "make the behaviour with a larger max_length"
            )
        return ids, length


def _step(
    decoder: Decoder,
    sampling: SamplingSpec,
    ids: np.ndarray,
    length: np.ndarray,
    start: np.ndarray,
    episode: np.ndarray,
    active: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] and log-probabilities [n] of the ``active`` slots, by one token each."""
    hidden = decoder.hidden(ids, length, start, active)
    uniform = torch.from_numpy(uniforms(sampling.seed, episode[active], length[active])).to(hidden.device)
    token, logp = decoder.draw(hidden, uniform, sampling.temperature)
    return token.cpu().numpy(), logp.cpu().numpy()
