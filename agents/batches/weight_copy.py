"""A second set of the trained weights beside the policy's own: a reference, or an average.

Only what is trained is copied: with low-rank adapters their factors, so that the frozen weights are shared. A copy is
used by changing places with the policy's weights, bit for bit, which needs no second model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from policies import Policy
from policies.sharding import collected, placed
from registry import UsageError


class WeightCopy:
    """The policy's trained weights as they are now, until ``take`` or ``average`` changes them.

    Attributes:
        is_in_place: whether it has changed places with the policy's own weights.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.is_in_place = False
        self._weights = {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, these are the policy's weights; afterwards its own are back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for copy, trained in self._pairs():
            kept = trained.clone()
            trained.copy_(copy)
            copy.copy_(kept)
        self.is_in_place = not self.is_in_place
        self._policy.refresh()

    @torch.no_grad()
    def take(self) -> None:
        """Become the policy's present weights."""
        for copy, trained in self._pairs():
            copy.copy_(trained)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Become ``decay`` times these weights plus 1 - ``decay`` times the policy's."""
        for copy, trained in self._pairs():
            copy.lerp_(trained, 1 - decay)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        trained = dict(self._policy.model.named_parameters())
        return ((copy, trained[name].data) for name, copy in self._weights.items())

    def state_dict(self) -> dict[str, Tensor]:
        """By the parameter's name; of a split one, see ``policies.sharding.collected``."""
        trained = dict(self._policy.model.named_parameters())
        return {name: collected(trained[name], copy) for name, copy in self._weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What ``state_dict`` gave. Raises UsageError for weights of another model."""
        if state.keys() != self._weights.keys():
            raise UsageError("the saved copy of the weights is of another model: start anew from the weights")
        trained = dict(self._policy.model.named_parameters())
        for name, copy in self._weights.items():
            copy.copy_(placed(trained[name], state[name]))
