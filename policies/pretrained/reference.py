"""transformers' own layers, applied one by one to padded batches without any cache: slow, and right by construction.

The oracle of the self-check at load, and the path that is used where the functional layers disagree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from policies.nested import LayerSubset, kept_blocks


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, length, length] bool, true where a query (row) attends to a key (column)."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None, None]


def _normed_after(layer: Any) -> bool:
    """Whether what its halves add is normed, as in Gemma."""
    return hasattr(layer, "pre_feedforward_layernorm")


def reference_hidden(model: Any, ids: Tensor, layers: LayerSubset, windows: tuple[int | None, ...]) -> Tensor:
    """Final hidden states [B, N, width] of right-padded ``ids`` [B, N] through ``layers`` of a transformers CausalLM.

    Padding needs no mask: causal attention never looks to the right."""
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    kinds = getattr(decoder.rotary_emb, "layer_types", None)  # Gemma has a table for each
    named = [{"layer_type": kind} for kind in decoder.config.layer_types] if kinds else [{}] * len(windows)
    masks = {window: causal_mask(ids.shape[1], window, ids.device) for window in set(windows)}
    for index, attends, transforms in kept_blocks(layers):
        layer = decoder.layers[index]
        rotary = decoder.rotary_emb(hidden, position_ids=positions, **named[index])
        context = {"attention_mask": masks[windows[index]], "position_embeddings": rotary}
        if attends and transforms:
            hidden = layer(hidden, position_ids=positions, use_cache=False, **context)
        elif attends:
            added = layer.self_attn(layer.input_layernorm(hidden), **context)[0]
            hidden = hidden + (layer.post_attention_layernorm(added) if _normed_after(layer) else added)
        elif _normed_after(layer):
            added = layer.mlp(layer.pre_feedforward_layernorm(hidden))
            hidden = hidden + layer.post_feedforward_layernorm(added)
        else:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return decoder.norm(hidden)


def scored_states(
    model: Any,
    prompts: Sequence[Tensor],
    tokens: Tensor,
    mask: Tensor,
    layers: LayerSubset,
    windows: tuple[int | None, ...],
) -> Tensor:
    """[M, width], the final hidden states from which the completion tokens ``tokens`` [B, T] are predicted where
    ``mask``; arguments as of ``reference_hidden``."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.cat((prompt.to(tokens.device), row)) for prompt, row in zip(prompts, tokens, strict=True)],
        batch_first=True,
    )
    states = reference_hidden(model, ids, layers, windows)
    row, column = mask.nonzero(as_tuple=True)
    size = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    return states[row, size[row] + column - 1]


def reference_logits(model: Any, ids: Tensor, layers: LayerSubset, windows: tuple[int | None, ...]) -> Tensor:
    """Logits [B, N, V] float32, as ``reference_hidden``."""
    return model.lm_head(reference_hidden(model, ids, layers, windows)).float()
