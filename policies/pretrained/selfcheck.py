"""The check at load that the functional layers are the checkpoint's: against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.pretrained.architecture import Architecture
from policies.pretrained.reference import reference_logits

_LOGIT_TOLERANCE = 1e-3  # float32, between transformers' whole forward and its layers one by one
_LOGP_TOLERANCE = 2e-3  # float32, between two orders of summation


@torch.no_grad()
def agrees(model: Any, architecture: Architecture, logprobs: Callable[..., Tensor]) -> bool:
    """Whether ``logprobs`` (of a ``Policy``, in float32) gives what transformers' ``model`` gives on random tokens,
    through all layers and through a random half of them."""
    rng = np.random.default_rng(0)
    windows, layers = architecture.windows, architecture.layers
    ids = torch.from_numpy(rng.integers(0, architecture.vocabulary, (2, 12))).to(model.lm_head.weight.device)
    half = tuple(sorted(rng.permutation(layers)[: max(1, layers // 2)].tolist()))
    full = model(ids, use_cache=False).logits.float()
    one_by_one = reference_logits(model, ids, tuple(range(layers)), windows)
    if not torch.allclose(full, one_by_one, atol=_LOGIT_TOLERANCE, rtol=1e-4):
        return False
    prompts, completion = list(ids[:, :4].unbind()), ids[:, 4:]
    mask = torch.ones_like(completion).bool()
    for subset, logits in ((None, full), (half, reference_logits(model, ids, half, windows))):
        found = logprobs(prompts, completion, mask, subset)
        wanted = logits[:, 3:-1].log_softmax(-1).gather(2, completion[:, :, None])[:, :, 0]
        if not torch.allclose(found, wanted, atol=_LOGP_TOLERANCE, rtol=1e-3):
            return False
    return True
