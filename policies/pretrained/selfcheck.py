"""The check at load that the functional layers are the checkpoint's: against transformers' own forward, on sequences
within every window and on one beyond them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.nested import LayerSubset
from policies.pretrained.architecture import Architecture
from policies.pretrained.reference import reference_hidden, reference_logits
from registry import UsageError

_LOGIT_TOLERANCE = 1e-3  # float32, between transformers' whole forward and its layers one by one
_LOGP_TOLERANCE = 2e-3  # float32, between two orders of summation
_SHORT = 12  # tokens
_WHOLE = 2e11  # products of weights and tokens; beyond, a long sequence goes through one layer of each kind


@torch.no_grad()
def agrees(model: Any, architecture: Architecture, logprobs: Callable[..., Tensor]) -> bool:
    """Whether ``logprobs`` (of a ``Policy``, in float32) gives what transformers' ``model`` gives on random tokens,
    through all layers and through a random half of them. Raises UsageError if the model's logits are not finite."""
    rng = np.random.default_rng(0)
    windows, layers = architecture.windows, architecture.layers
    ids = torch.from_numpy(rng.integers(0, architecture.vocabulary, (2, _SHORT))).to(model.lm_head.weight.device)
    half = tuple(sorted(rng.permutation(layers)[: max(1, layers // 2)].tolist()))
    full = model(ids, use_cache=False).logits.float()
    if not torch.isfinite(full).all():
        raise UsageError("the model's logits are not finite: its weights overflow, so take another checkpoint")
    one_by_one = reference_logits(model, ids, tuple(range(layers)), windows)
    if not torch.allclose(full, one_by_one, atol=_LOGIT_TOLERANCE, rtol=1e-4):
        return False
    prompts, completion = list(ids[:, :4].unbind()), ids[:, 4:]
    mask = torch.ones_like(completion).bool()
    for subset, logits in ((None, full), (half, reference_logits(model, ids, half, windows))):
        wanted = logits[:, 3:-1].log_softmax(-1).gather(2, completion[:, :, None])[:, :, 0]
        if not _close(logprobs(prompts, completion, mask, subset), wanted):
            return False
    return _agrees_beyond_windows(model, architecture, logprobs, rng)


def _agrees_beyond_windows(
    model: Any, architecture: Architecture, logprobs: Callable[..., Tensor], rng: np.random.Generator
) -> bool:
    """The same of one sequence that is longer than every window that the model can fill, by its last tokens."""
    windows = architecture.windows
    limit = architecture.reach or 2**62
    longest = max((window for window in windows if window is not None and window + _SHORT <= limit), default=0)
    if not longest:
        return True
    device = model.lm_head.weight.device
    ids = torch.from_numpy(rng.integers(0, architecture.vocabulary, (1, longest + _SHORT))).to(device)
    layers: LayerSubset = tuple(range(architecture.layers))
    if architecture.layers * architecture.layer_weights * ids.shape[1] <= _WHOLE:
        hidden = model.model(ids, use_cache=False).last_hidden_state
    else:
        layers = tuple(sorted({window: n for n, window in enumerate(windows)}.values()))
        hidden = reference_hidden(model, ids, layers, windows)
    last = ids[:, -4:]
    logits = model.lm_head(hidden[:, -5:-1]).float()
    wanted = logits.log_softmax(-1).gather(2, last[:, :, None])[:, :, 0]
    return _close(logprobs([ids[0, :-4]], last, torch.ones_like(last).bool(), layers), wanted)


def _close(ours: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(ours, wanted, atol=_LOGP_TOLERANCE, rtol=1e-3)
