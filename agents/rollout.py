"""A rollout: completions as the behaviour policy wrote them, with the log-probabilities they were sampled with."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """Completions of one behaviour policy, or a minibatch of them. Shape letters: B sequences, T completion tokens.

    Padding (``mask`` false) may hold anything finite; nothing may depend on it.

    Attributes:
        prompts: B one-dimensional int64 tensors; completions of one group share the same object.
        tokens: [B, T] int64, completion tokens, the final EOS included.
        mask: [B, T] bool, true on completion tokens.
        behavior_logp: [B, T] float32, log mu of each token under the distribution it was sampled from.
        reward: [B] float32, the verdict's reward in {0, 1} (or shaped, through a wrapper).
        group: [B] int64, which completions answer the same dealt problem (equal numbers, any values).
        old_logp: [B, T] float32, log pi_old of each token: the target at rollout time, for trust regions. None until
            the agent has computed it; with one update per rollout it equals the current log pi.
        by_target: [B] bool, true where the *full* model wrote the completion (defensive groups); None means nowhere.
    """

    prompts: tuple[Tensor, ...]
    tokens: Tensor
    mask: Tensor
    behavior_logp: Tensor
    reward: Tensor
    group: Tensor
    old_logp: Tensor | None = None
    by_target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: Tensor) -> Rollout:
        """The sequences at ``index`` ([N] int64), trimmed to their longest completion."""
        length = int(self.mask[index].sum(1).max()) if len(index) else 0
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                chosen[field.name] = value[index][:, :length] if value.dim() == 2 else value[index]
        return replace(self, prompts=tuple(self.prompts[i] for i in index.tolist()), **chosen)
