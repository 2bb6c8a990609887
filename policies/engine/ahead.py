"""Tokens written before they are asked for: several decode steps on the device between two reads by the host.

A token depends on its seed, its episode, its position and its prefix alone, so the next ones of a slot can be drawn
before the environment has seen the first, each fed back without leaving the device. They are handed out as long as the
observation is what they were drawn for. Where it is not (an episode has ended, or somebody edits a prefix) that slot's
are dropped. Shape letters: S slots, n active ones, m steps at a time.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policies.engine.graphs import upload
from policies.engine.sampling import SamplingSpec, uniforms


class Plans(Protocol):
    """A decoder whose steps can be planned: ``decoder.CachedDecoder``."""

    longest: int

    @property
    def device(self) -> torch.device: ...

    def hidden(self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, active: np.ndarray) -> Tensor: ...

    def plan(self, active: np.ndarray, position: np.ndarray) -> None: ...

    def follow(self, step: int, token: Tensor) -> Tensor: ...

    def hold(self, ids: np.ndarray, size: np.ndarray, active: np.ndarray) -> None: ...

    def draw(self, hidden: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]: ...


class Ahead:
    """The tokens that each slot is known to go on with.

    A window is the number of steps between two reads. All active slots take part in each, so that the graphs to replay
    stay the same; a slot that is ahead of the others waits. An episode that begins while others go on therefore costs a
    step, and a step costs more than a read: windows are short after such a time, and grow by one with every
    ``patience`` tokens without.

    Args:
        decoder: writes the tokens.
        slots: S.
        sampling: how they are drawn.
        most: the largest window.
        patience: tokens of a slot for which the window grows by one.
    """

    # patience=16, by simulation: episodes of 150 to 1,000 tokens in 64 to 8 slots take at most 2.4 % more steps for 0
    # to 75 % less reads. Windows that double when used up and halve when cut short take 5 to 67 % more steps.
    def __init__(self, decoder: Plans, slots: int, sampling: SamplingSpec, most: int, patience: int = 16) -> None:
        self.decoder = decoder
        self.sampling = sampling
        self.most = most
        self.patience = patience
        self.calm = 0  # calls since an episode began while others went on
        self.ids = np.zeros((slots, decoder.longest + 1), np.int64)  # by slot: the last prefix and what follows
        self.logp = np.zeros((slots, decoder.longest + 1), np.float32)
        self.first = np.zeros(slots, np.int64)  # by slot: the place of the first token that was drawn here
        self.known = np.zeros(slots, np.int64)  # by slot: how many of ``ids``
        self.episode = np.zeros(slots, np.int64)

    def next(
        self, ids: np.ndarray, length: np.ndarray, start: np.ndarray, episode: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] and their log-probabilities [n] of the ``active`` slots; arguments as of ``Behavior.act``."""
        size = length[active]
        agrees = ~start[active] & (self.episode[active] == episode[active]) & self._foreseen(ids, size, active)
        ready = agrees & (size < self.known[active])
        self.calm = 0 if agrees.any() and not agrees.all() else self.calm + 1
        if not ready.all():
            fresh = active[~agrees]
            width = int(size.max())
            self.ids[fresh, :width] = ids[fresh, :width]
            self.first[fresh] = self.known[fresh] = length[fresh]
            self.episode[fresh] = episode[fresh]
            self._write(size, start, active)
        return self.ids[active, size], self.logp[active, size]

    def _foreseen(self, ids: np.ndarray, size: np.ndarray, active: np.ndarray) -> np.ndarray:
        """[n] bool, whether a prefix is one that tokens were drawn for, or the next one."""
        width = int(size.max())
        differs = (self.ids[active, :width] != ids[active, :width]) & (np.arange(width) < size[:, None])
        return (self.first[active] <= size) & (size <= self.known[active]) & ~differs.any(1)

    def _write(self, size: np.ndarray, start: np.ndarray, active: np.ndarray) -> None:
        """A window of tokens after each prefix of ``size`` [n] tokens, and one at least after what is known."""
        longest = self.decoder.longest
        window = min(self.most, 1 + self.calm // self.patience)
        begin = np.minimum(self.known[active], longest) - 1
        end = np.clip(size + window - 2, begin, longest - 1)
        position = np.minimum(begin + np.arange(int((end - begin).max()) + 1)[:, None], end)  # [m, n], of what is fed
        moves = np.diff(position, axis=0) > 0
        lengths = np.zeros(len(self.known), np.int64)
        lengths[active] = begin + 1

        hidden = self.decoder.hidden(self.ids, lengths, start, active)
        planned = np.stack([uniforms(self.sampling.seed, self.episode[active], where + 1) for where in position])
        uniform, moved, token = (upload(x, self.decoder.device) for x in (planned, moves, self.ids[active, begin]))
        drawn, logp = self.decoder.draw(hidden, uniform[0], self.sampling.temperature)
        tokens, logps = [drawn], [logp]
        if len(position) > 1:
            self.decoder.plan(active, position[1:])
        for step in range(len(position) - 1):
            token = torch.where(moved[step], drawn, token)
            drawn, logp = self.decoder.draw(
                self.decoder.follow(step, token), uniform[step + 1], self.sampling.temperature
            )
            tokens.append(drawn)
            logps.append(logp)
        drawn_and_scored = torch.stack((torch.stack(tokens).double(), torch.stack(logps).double())).cpu().numpy()
        self.ids[active, position + 1], self.logp[active, position + 1] = drawn_and_scored
        self.known[active] = end + 2
        self.decoder.hold(self.ids, end + 1, active)
