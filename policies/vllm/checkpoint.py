"""A nested model as a checkpoint of its own: embedding, the layers kept, numbered anew, norm and head.

An engine is started with a number of layers and then takes any subset that fits into them, by its weights alone. Where
less is kept than it has, an output map of zeros adds nothing to the residual stream, exactly: so half a layer, and a
whole spare one, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from policies.nested import KeptBlock, Nested, changes_of, kept_blocks, layers_of
from policies.policy import Policy
from policies.pretrained.adapters import merged_weight
from registry import UsageError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_OUTPUT_MAPS = ("self_attn.o_proj", "mlp.down_proj")  # in the order of ``nested.HALVES``
_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_AS_LLAMA = ("llama", "mistral", "qwen2")  # a Llama with biases computes what these do
_FEWEST_CHANNELS = 32  # of a head, in the attention of vLLM's CPU kernels


@dataclass(frozen=True)
class Shape:
    """What of an engine's model cannot change once it is started.

    Attributes:
        windows: of each of its layers, as ``Architecture.windows``.
        biases: whether it is a Llama whose output maps have biases, which patches need.
    """

    windows: tuple[int | None, ...]
    biases: bool = False

    def places(self, wanted: Shape) -> list[int] | None:
        """Which layer of this shape each layer of ``wanted`` can take, in order; None if they do not fit."""
        if wanted.biases and not self.biases:
            return None
        places, start = [], 0
        for window in wanted.windows:
            if window not in self.windows[start:]:
                return None
            places.append(self.windows.index(window, start))
            start = places[-1] + 1
        return places


def shape_of(policy: Policy, nested: Nested) -> Shape:
    """The smallest shape that holds ``nested``."""
    windows = policy.architecture.windows
    biases = bool(changes_of(nested)) or (_has_other_heads(policy) and not any(windows))
    return Shape(tuple(windows[block.layer] for block in kept_blocks(layers_of(nested))), biases)


def check_biases(policy: Policy) -> None:
    """Raise ``UsageError`` for a model whose output maps have no biases in vLLM."""
    kind, windows = policy.config.model_type, policy.architecture.windows
    if kind not in _AS_LLAMA or any(windows):
        raise UsageError(
            f"patches change biases of output maps, and vLLM's {kind}{' with windows' if any(windows) else ''} has "
            "none: use patch='none' or writer='own'"
        )


def check_heads(policy: Policy) -> None:
    """Raise ``UsageError`` for heads that vLLM's model of this kind cannot have."""
    channels, rope = policy.architecture.head_dim, getattr(policy.config, "rope_parameters", None) or {}
    plain = rope.get("rope_type", "default") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    if channels < _FEWEST_CHANNELS and not (policy.config.model_type in _AS_LLAMA and plain):
        raise UsageError(f"this model's heads have {channels} channels, and vLLM's at least 32: use writer='own'")
    if _has_other_heads(policy) and any(policy.architecture.windows):
        raise UsageError(
            f"vLLM's qwen2 has no heads of {head_channels(policy)} channels at a width of {policy.architecture.width}, "
            "and its llama no windows: use writer='own'"
        )


def head_channels(policy: Policy) -> int:
    """Channels of a head in vLLM, the narrow ones of a Llama filled up with zeros."""
    return max(policy.architecture.head_dim, _FEWEST_CHANNELS)


def _has_other_heads(policy: Policy) -> bool:
    """Whether vLLM's model divides its width by its heads where this one, or a wider head, does not."""
    a = policy.architecture
    return policy.config.model_type == "qwen2" and head_channels(policy) * a.query_heads != a.width


def save(policy: Policy, nested: Nested, shape: Shape, folder: Path) -> None:
    """Write config and weights of an engine of ``shape`` that computes ``nested``."""
    (folder / CONFIG).write_text(json.dumps(config(policy, shape), indent=1))
    save_weights(policy, nested, shape, folder / WEIGHTS)


def save_weights(policy: Policy, nested: Nested, shape: Shape, file: Path) -> None:
    """Write the weights alone, in the policy's dtype."""
    save_file({name: value.contiguous() for name, value in weights(policy, nested, shape)}, file)


def config(policy: Policy, shape: Shape) -> dict[str, Any]:
    """The transformers config of a model of ``shape``."""
    given = json.loads(policy.config.to_json_string(use_diff=False))
    given["architectures"] = [type(policy.model).__name__]  # without it vLLM guesses, a model of embeddings for some
    given["num_hidden_layers"] = len(shape.windows)
    given["dtype"] = str(policy.dtype).removeprefix("torch.")
    given["tie_word_embeddings"] = False  # a reload leaves the packed copy that a tied head has as it is
    if given.get("layer_types"):
        given["layer_types"] = ["sliding_attention" if window else "full_attention" for window in shape.windows]
    channels, own = head_channels(policy), policy.architecture.head_dim
    if channels != own:  # channel n of a half turns by theta ** (-2 n / channels)
        rope = given["rope_parameters"]
        given |= {
            "head_dim": channels,
            "rope_parameters": {**rope, "rope_theta": rope["rope_theta"] ** (channels / own)},
        }
    if shape.biases:
        given |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        given |= {"attention_bias": True, "mlp_bias": True}
    return given


@torch.no_grad()
def weights(policy: Policy, nested: Nested, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the checkpoint, by the policy's present weights.

    Raises:
        ValueError: ``nested`` does not fit into ``shape``.
    """
    places = shape.places(shape_of(policy, nested))
    if places is None:
        raise ValueError(f"{layers_of(nested)} does not fit into {shape}")
    kept = dict(zip(places, kept_blocks(layers_of(nested)), strict=True))
    model, dtype = policy.model, policy.dtype
    yield "model.embed_tokens.weight", model.model.embed_tokens.weight.to(dtype)
    for place in range(len(shape.windows)):
        block = kept.get(place, KeptBlock(0, attention=False, mlp=False))
        for name, value in _layer(policy, nested, block, shape.biases).items():
            yield f"model.layers.{place}.{name}", value.to(dtype, copy=place not in kept)  # a file shares no memory
    yield "model.norm.weight", model.model.norm.weight.to(dtype)
    yield "lm_head.weight", model.lm_head.weight.to(dtype, copy=True)


def _layer(policy: Policy, nested: Nested, block: KeptBlock, biases: bool) -> dict[str, Tensor]:
    """A layer's tensors by name, its adapters merged in, changes of its output maps added, and zeros for the output map
    of a half that is not kept."""
    tensors = dict(_merged(policy.model.model.layers[block.layer]))
    if biases:
        for name in [name for name in tensors if name.rpartition(".")[0].endswith(_BIASES)]:
            bias = name.removesuffix("weight") + "bias" if name.endswith("weight") else name
            tensors.setdefault(bias, tensors[name].new_zeros(len(tensors[name])))
    for half, (name, is_kept) in enumerate(zip(_OUTPUT_MAPS, (block.attention, block.mlp), strict=True)):
        change = changes_of(nested).get(2 * block.layer + half)
        for part in ("weight", "bias"):
            full = f"{name}.{part}"
            if full not in tensors:
                continue
            if not is_kept:
                tensors[full] = torch.zeros_like(tensors[full])
            elif change is not None:
                tensors[full] = tensors[full] + getattr(change, part).to(tensors[full])
    channels, own = head_channels(policy), policy.architecture.head_dim
    return tensors if channels == own else {name: _widened(name, t, own, channels) for name, t in tensors.items()}


def _widened(name: str, tensor: Tensor, own: int, channels: int) -> Tensor:
    """A layer's tensor for heads of ``channels`` instead of ``own`` channels, zeros at the end of each rotary half;
    queries are scaled, since attention scores are divided by the root of the channels."""
    module, _, part = name.removeprefix("self_attn.").rpartition(".")
    if module not in ("q_proj", "k_proj", "v_proj", "o_proj") or (module == "o_proj" and part == "bias"):
        return tensor
    by_head = tensor.T if module == "o_proj" else tensor
    halves = by_head.reshape(-1, own // 2, *by_head.shape[1:])  # [2 heads, own / 2, ...]
    wide = halves.new_zeros(len(halves), channels // 2, *by_head.shape[1:])
    wide[:, : own // 2] = halves * ((channels / own) ** 0.5 if module == "q_proj" else 1.0)
    wide = wide.flatten(0, 1)
    return wide.T if module == "o_proj" else wide


def _merged(layer: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors by the names that they have without adapters."""
    for name, parameter in layer.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        module = layer.get_submodule(plain.rpartition(".")[0])
        yield plain, merged_weight(module) if plain.endswith(".weight") else parameter.detach()
