"""Where a layer's weights come from: the trainable parameters for updates, or their rollout form.

The rollout form is one shadow of the whole policy, shared by all its behaviours: maps with the same input (query, key
and value; gate and up) side by side, in the compute dtype, and on a CPU in oneDNN's blocked layout.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.model.compute import calls_onednn, drawing_head_kernels, kernels_for, product_dtype, takes_whole_steps
from policies.model.head import logp_of
from policies.model.layers import LayerWeights, Linear
from policies.model.products import adapted_linear, float_product, linear, operand
from policies.native import Kernels
from policies.native.step import Panels
from policies.nested import Change
from policies.pretrained.adapters import factors, merged_weight
from policies.pretrained.architecture import Architecture
from policies.sharding import trainable, whole, whole_shape

_ROWS_HINT = 128  # oneDNN picks a blocked layout for about this many rows; other numbers work with it, too


class RolloutLinear:
    """The inference form of one linear map, or of several with the same input, their outputs concatenated.

    Calling it maps [N, in] of any float dtype to [N, out] in the compute dtype.
    """

    _gathered: Tensor | None = None  # split weights in plain order, where others are made of them

    def __init__(self, modules: list[nn.Linear], dtype: torch.dtype, change: Change | None = None) -> None:
        self.modules = modules
        self.dtype = dtype
        self.change = change
        self.bias: Tensor | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the modules' present weights; where there are several forms of them, each when first asked for."""
        self._panels: Panels | None = None
        self._blocked: Tensor | None = None
        device = self.modules[0].weight.device
        self.by_onednn = calls_onednn(device)
        self.product_dtype = product_dtype(device, self.dtype)
        if not self.by_onednn:
            self.weight = self._concatenated(self.dtype)
        elif any(whole_shape(module.weight) for module in self.modules):
            self._gathered = self._concatenated(self.dtype)  # by all processes now, not by each when it first asks
        bias = self._bias()
        self.bias = None if bias is None else bias.to(self.dtype)

    def _concatenated(self, dtype: torch.dtype) -> Tensor:
        return _merged(self.modules, self.change, dtype)

    def _bias(self) -> Tensor | None:
        if self.change is None and all(module.bias is None for module in self.modules):
            return None
        bias = torch.cat([_bias(module) for module in self.modules])
        return bias if self.change is None else bias + self.change.bias

    @torch.no_grad()
    def blocked(self) -> Tensor:
        """The weights in oneDNN's layout, made when first asked for."""
        if self._blocked is None:
            weight = self._plain().to(self.product_dtype)
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        return self._blocked

    def _plain(self) -> Tensor:
        return self._concatenated(self.dtype) if self._gathered is None else self._gathered

    def reorder(self) -> None:
        """Keep split weights in oneDNN's layout alone."""
        if self._gathered is not None:
            self.blocked()
            self._gathered = None

    @torch.no_grad()
    def panels(self, kernels: Kernels, gated: bool) -> Panels:
        """The same map for whole steps (``Panels``), made when first asked for."""
        if self._panels is None:
            self._panels = kernels.steps.pack(self._plain(), self.bias, gated)
        return self._panels

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.by_onednn:
            bias = None if self.bias is None else self.bias.to(self.product_dtype)
            rows = x.to(self.product_dtype)
            return torch.ops.mkldnn._linear_pointwise(rows, self.blocked(), bias, "none", [], "").to(self.dtype)
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def _merged(modules: list[nn.Linear], change: Change | None, dtype: torch.dtype) -> Tensor:
    """The weights of maps with the same input, adapters and a change included, next to each other."""
    weight = torch.cat([merged_weight(module) for module in modules])
    return (weight if change is None else weight + change.weight).to(dtype)


def _bias(module: nn.Linear) -> Tensor:
    if module.bias is None:
        return module.weight.new_zeros(module.out_features)
    return module.bias.detach()


def _map(x: Tensor, modules: list[nn.Linear], change: Change | None = None) -> Tensor:
    """[N, out] of maps with the same input, their outputs concatenated."""
    adapters = [adapter for adapter in map(factors, modules) if adapter is not None]
    if 0 < len(adapters) < len(modules):
        return torch.cat([_map(x, [module]) for module in modules], dim=1)
    if adapters:
        y = adapted_linear(x, lambda: _merged(modules, change, x.dtype), adapters)
        biases = _biases(modules) if change is None else [_changed_bias(modules[0], change)]
        return y + torch.cat(biases).to(y.dtype) if biases else y
    if change is None:
        return linear(x, [module.weight for module in modules], _biases(modules))
    return linear(x, [trainable(modules[0].weight) + change.weight], [_changed_bias(modules[0], change)])


def _changed_bias(module: nn.Linear, change: Change) -> Tensor:
    return (module.bias if module.bias is not None else 0) + change.bias


def _biases(modules: list[nn.Linear]) -> list[Tensor]:
    if all(module.bias is None for module in modules):
        return []
    return [module.bias if module.bias is not None else _bias(module) for module in modules]


def _trainable(modules: list[nn.Linear], dtype: torch.dtype) -> Linear:
    return lambda x: _map(x.to(dtype), modules)


def _layer_weights(block: Any, window: int | None, make: Any, dtype: torch.dtype) -> LayerWeights:
    attention, mlp = block.self_attn, block.mlp
    normed_after = hasattr(block, "pre_feedforward_layernorm")  # Gemma
    return LayerWeights(
        attention_norm=block.input_layernorm.weight,
        qkv=make([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        out=make([attention.o_proj]),
        mlp_norm=(block.pre_feedforward_layernorm if normed_after else block.post_attention_layernorm).weight,
        gate_up=make([mlp.gate_proj, mlp.up_proj]),
        down=make([mlp.down_proj]),
        window=window,
        dtype=dtype,
        attention_out_norm=block.post_attention_layernorm.weight if normed_after else None,
        mlp_out_norm=block.post_feedforward_layernorm.weight if normed_after else None,
    )


def trainable_layers(model: Any, architecture: Architecture, dtype: torch.dtype) -> list[LayerWeights]:
    """All layers of a transformers CausalLM, computing with its own parameters in ``dtype``."""
    return [
        _layer_weights(block, window, lambda modules: _trainable(modules, dtype), dtype)
        for block, window in zip(model.model.layers, architecture.windows, strict=True)
    ]


def _with_output(weights: LayerWeights, half: int, output: Linear) -> LayerWeights:
    """``weights`` with the output map of its even (attention) or odd (MLP) half replaced."""
    return replace(weights, down=output) if half % 2 else replace(weights, out=output)


def changed_trainable(
    layers: list[LayerWeights], model: Any, changes: Mapping[int, Change], dtype: torch.dtype
) -> list[LayerWeights]:
    """The trainable ``layers`` of all of ``model`` with ``changes`` (by half layer) added to their output maps."""
    changed = list(layers)
    for half, change in changes.items():
        block = model.model.layers[half // 2]
        module = block.mlp.down_proj if half % 2 else block.self_attn.o_proj

        def apply(x: Tensor, module: nn.Linear = module, change: Change = change) -> Tensor:
            return _map(x.to(dtype), [module], change)

        changed[half // 2] = _with_output(changed[half // 2], half, apply)
    return changed


class RolloutHead:
    """The inference form of the output projection; its logits are float32 whatever the compute dtype.

    bfloat16 logits are 0.125 apart at 16 to 32, too coarse for ratios of probabilities. So bfloat16 weights go either
    through the compiled head, which accumulates and keeps float32, or through ``wide.float_product``.

    Attributes:
        gathered: [V, width] float32, of a split projection; None of others.
    """

    gathered: Tensor | None = None

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype
        self._kernels = drawing_head_kernels(module.weight.device, module.out_features, module.in_features, dtype)
        self.refresh()

    @property
    def draws(self) -> bool:
        """Whether projection and draw are one call, ``draw``; else ``logits`` are drawn from."""
        return self._kernels is not None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the module's present weights."""
        weight = whole(self.module.weight)
        self._plain: Linear | None = None
        if whole_shape(self.module.weight):
            self.gathered = weight
            self._plain = self._product(weight) if self._kernels is None else None
        if self._kernels is not None:
            self._prepared: Tensor | Panels = (
                self._kernels.steps.pack(weight)
                if self.dtype == torch.float32
                else self._kernels.pack_head(weight.to(self.dtype).contiguous())
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 from ``hidden`` [n, width] float32."""
        if self._plain is None:
            self._plain = self._product(self.module.weight)
        return self._plain(hidden.to(self.dtype))

    def _product(self, weight: Tensor) -> Linear:
        weight = operand(weight, self.dtype)
        if weight.dtype != torch.float32:
            return partial(float_product, weight=weight)
        rounded = nn.Linear(self.module.in_features, self.module.out_features, bias=False, device="meta")
        rounded.weight = nn.Parameter(weight, requires_grad=False)
        return RolloutLinear([rounded], torch.float32)

    def logp(self, hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
        """[N] float32 log-probabilities of ``token`` [N], without gradient."""
        return logp_of(self.logits, hidden, token, temperature)

    def draw(self, hidden: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Tokens [n] and log-probabilities [n] float32 without the logits in memory; only where it ``draws``."""
        assert self._kernels is not None
        rows = hidden.to(self.dtype).contiguous()
        if isinstance(self._prepared, Panels):
            return self._kernels.steps.draw(rows, self._prepared, temperature, uniform)
        return self._kernels.head_draw(rows, self._prepared, self.module.out_features, temperature, uniform)


def _frozen_stamp(parameters: list[nn.Parameter]) -> int | None:
    if any(one.requires_grad or whole_shape(one) for one in parameters):
        return None
    return sum(one._version for one in parameters)


class RolloutWeights:
    """The inference shadow of a whole transformers CausalLM."""

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        dtype: torch.dtype,
        linear: type[RolloutLinear] = RolloutLinear,
        head: type[RolloutHead] = RolloutHead,
    ) -> None:
        self.version = 0  # of the policy's weights that these are of
        self.dtype = dtype
        self.linear = linear
        self.architecture = architecture
        self._linears: list[RolloutLinear] = []
        self._embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight
        self.layers = [
            _layer_weights(block, window, self._pack, dtype)
            for block, window in zip(model.model.layers, architecture.windows, strict=True)
        ]
        self.head = head(model.lm_head, dtype)
        self._stamps = self._frozen_stamps()
        self._settle()

    def with_changes(self, changes: Mapping[int, Change]) -> RolloutWeights:
        """These weights with ``changes`` (by half layer) added to their output maps; all others are shared. The changed
        maps are of the present weights and no ``refresh`` reaches them."""
        if not changes:
            return self
        changed = copy.copy(self)
        changed.layers = list(self.layers)
        for half, change in changes.items():
            weights = changed.layers[half // 2]
            old: Any = weights.down if half % 2 else weights.out
            output = self.linear(old.modules, self.dtype, change)
            changed.layers[half // 2] = _with_output(weights, half, output)
        return changed

    def _pack(self, modules: list[nn.Linear]) -> RolloutLinear:
        linear = self.linear(modules, self.dtype)
        self._linears.append(linear)
        return linear

    def refresh(self) -> None:
        """Take over the model's present weights. What a store has made of the old ones (``panels``) stays old: a
        behaviour made before refuses to act."""
        maps: list[RolloutLinear | RolloutHead] = [*self._linears, self.head]
        stamps = self._frozen_stamps()
        for packed, before, now in zip(maps, self._stamps, stamps, strict=True):
            if now is None or now != before:
                packed.refresh()
        self._stamps = stamps
        self._settle()

    def _frozen_stamps(self) -> list[int | None]:
        """By map what changes with its weights, of those that nobody trains; None of the others."""
        parts: list[list[nn.Linear]] = [*(packed.modules for packed in self._linears), [self.head.module]]
        return [_frozen_stamp([one for module in modules for one in module.parameters()]) for modules in parts]

    def _settle(self) -> None:
        """What is split is gathered now; its maps stay in plain order only where whole steps make panels of them."""
        tied = self.head.module.weight is self._embedding
        shared = self.head.gathered if tied else None
        self.embedding = whole(self._embedding) if shared is None else shared
        self.head.gathered = None
        kernels = kernels_for(self._embedding.device)
        if kernels is None or not takes_whole_steps(kernels, self.architecture, self.dtype):
            for packed in self._linears:
                packed.reorder()
