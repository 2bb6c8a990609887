"""Random checkpoints of every supported family, and slow references to compare with."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies import LayerSubset, Policy

VOCABULARY = 101
LAYERS = 4
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-rope-scaled": (
        "llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-window": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "pad_token_id": None,  # nn.Embedding gives no gradient to a padding token
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}),
}


def random_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A transformers CausalLM with random weights, biases and norms, wide enough apart for a peaked softmax."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, special = FAMILIES[family]
    shapes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
    }
    config = AutoConfig.for_model(kind, **{**shapes, **special, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


@cache
def shared_policy(family: str = "llama") -> Policy:
    """One policy per family for tests that leave the weights alone."""
    return Policy(random_model(family))


def without_layers(model: Any, layers: LayerSubset) -> Any:
    """A copy of ``model`` from which the other layers are really removed."""
    smaller = copy.deepcopy(model)
    smaller.model.layers = nn.ModuleList(smaller.model.layers[index] for index in layers)
    for index, block in enumerate(smaller.model.layers):
        block.self_attn.layer_idx = index
    if getattr(smaller.config, "layer_types", None):
        smaller.config.layer_types = [model.config.layer_types[index] for index in layers]
    smaller.config.num_hidden_layers = len(layers)
    return smaller


def plain_logp(model: Any, prompts: list[Tensor], tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, T]: transformers' forward on one sequence at a time, full logits, log_softmax."""
    rows = []
    for prompt, completion, scored in zip(prompts, tokens, mask, strict=True):
        logits = model(torch.cat((prompt, completion))[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = (logits.float() / temperature).log_softmax(-1).gather(1, completion[:, None])[:, 0]
        rows.append(logp * scored)
    return torch.stack(rows)


def random_batch(
    groups: int = 3, group_size: int = 2, longest: int = 9, seed: int = 0, vocabulary: int = VOCABULARY
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts (one object per group), completions and prefix masks of differing lengths."""
    rng = np.random.default_rng(seed)
    distinct = [torch.from_numpy(rng.integers(0, vocabulary, rng.integers(1, 12))) for _ in range(groups)]
    prompts = [distinct[i // group_size] for i in range(groups * group_size)]
    tokens = torch.from_numpy(rng.integers(0, vocabulary, (len(prompts), longest)))
    length = torch.from_numpy(rng.integers(1, longest + 1, len(prompts)))
    return prompts, tokens, torch.arange(longest) < length[:, None]


def zeroed(model: Any, layers: LayerSubset) -> Any:
    """A copy of ``model`` in which every half layer outside of ``layers`` adds zero to the residual stream."""
    kept = set(layers)
    whole = copy.deepcopy(model)
    for n, block in enumerate(whole.model.layers):
        if n not in kept and f"{n}.attention" not in kept:
            block.self_attn.register_forward_hook(lambda _m, _i, out: (torch.zeros_like(out[0]), *out[1:]))
        if n not in kept and f"{n}.mlp" not in kept:
            block.mlp.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out))
    return whole
