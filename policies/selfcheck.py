"""The check at load that the functional layers are the checkpoint's: against transformers' own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from policies.reference import reference_logits

if TYPE_CHECKING:
    from policies.policy import Policy

_LOGIT_TOLERANCE = 1e-3  # float32, between transformers' whole forward and its layers one by one
_LOGP_TOLERANCE = 2e-3  # float32, between two orders of summation


@torch.no_grad()
def agrees(policy: Policy) -> bool:
    """Whether ``policy.logprobs`` (in float32) gives what transformers gives on random tokens, through all layers and
    through a random half of them."""
    rng = np.random.default_rng(0)
    model, windows, layers = policy.model, policy.architecture.windows, policy.num_layers
    ids = torch.from_numpy(rng.integers(0, policy.vocab_size, (2, 12))).to(policy.device)
    half = tuple(sorted(rng.permutation(layers)[: max(1, layers // 2)].tolist()))
    full = model(ids, use_cache=False).logits.float()
    one_by_one = reference_logits(model, ids, tuple(range(layers)), windows)
    if not torch.allclose(full, one_by_one, atol=_LOGIT_TOLERANCE, rtol=1e-4):
        return False
    prompts, completion = list(ids[:, :4].unbind()), ids[:, 4:]
    mask = torch.ones_like(completion).bool()
    for subset, logits in ((None, full), (half, reference_logits(model, ids, half, windows))):
        found = policy.logprobs(prompts, completion, mask, subset)
        wanted = logits[:, 3:-1].log_softmax(-1).gather(2, completion[:, :, None])[:, :, 0]
        if not torch.allclose(found, wanted, atol=_LOGP_TOLERANCE, rtol=1e-3):
            return False
    return True
