"""What a skip sampler may measure on the target before training: each layer's influence and divergence, on a few texts.

    probe = Probe(policy, prompts, Length(32, stop))
    sampler.prepare(probe)

Everything is measured once, when first asked for, on completions that the full model writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import Tensor

from policies.nested import Block, LayerSubset, without
from policies.policy import Policy
from policies.skipping.divergence import (
    Divergence,
    Length,
    Text,
    compare,
    influence,
    states,
    states_without_each,
    write,
)


class Probe:
    """Scores of the target's layers.

    Args:
        policy: the target.
        prompts: B int64 tensors; share an object among completions of one prompt.
        length: of the completions it is measured on.
        seed: of the completions.
        longest: tokens of the longest completion that rollouts may write, for samplers that budget whole completions;
            by default ``length.tokens``.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Tensor],
        length: Length,
        seed: int = 0,
        longest: int | None = None,
    ) -> None:
        self.policy = policy
        self.prompts = prompts
        self.length = length
        self.seed = seed
        self.longest = longest or length.tokens
        self._each: dict[str | None, list[Divergence]] = {}

    @property
    def num_layers(self) -> int:
        """L."""
        return self.policy.num_layers

    @cached_property
    def text(self) -> Text:
        """What the full model wrote."""
        return write(self.policy, self._full, self.prompts, self.length, self.seed)

    @property
    def _full(self) -> LayerSubset:
        return tuple(range(self.num_layers))

    @cached_property
    def _target(self) -> Tensor:
        return states(self.policy, self.text, self._full)

    def each(self, half: str | None = None) -> list[Divergence]:
        """[L] the divergence of the mu that skips one layer alone, or its ``half`` (attention or mlp)."""
        if half not in self._each:
            hidden = states_without_each(self.policy, self.text, half)
            self._each[half] = [compare(self.policy, self._target, [one])[0] for one in hidden]
        return self._each[half]

    def kl(self, half: str | None = None) -> list[float]:
        """[L] KL(mu || pi) per token, as ``each``."""
        return [one.kl for one in self.each(half)]

    def set_kl(self, skipped: Iterable[Block]) -> float:
        """KL(mu || pi) per token of the mu that skips a set of layers or halves."""
        hidden = states(self.policy, self.text, without(skipped, self.num_layers))
        return compare(self.policy, self._target, [hidden])[0].kl

    @cached_property
    def influence(self) -> list[float]:
        """[L] block influence, see ``divergence.influence``."""
        return influence(self.policy, self.text)
