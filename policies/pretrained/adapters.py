"""Low-rank adapters (LoRA, Hu et al. 2021) by the optional package peft: trained in their factored form, merged for
rollouts and on disk."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from registry import UsageError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = "default"


def add_adapters(model: Any, rank: int, alpha: int) -> None:
    """Put adapters into every projection of a transformers CausalLM, in place, and freeze everything else.

    They start at zero, so the model computes what it did. Raises ``UsageError`` without peft or for a rank below 1."""
    if rank < 1:
        raise UsageError(f"rank={rank}: a low-rank adapter needs a rank of at least 1")
    if any(factors(module) for module in model.modules()):
        raise UsageError("the model has low-rank adapters already: load it anew")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError("low-rank adapters need the package peft: pip install 'nested-reft[lora]'") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(TARGETS), bias="none")
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def factors(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """A [rank, in], B [out, rank] and the scale of a projection's adapter; None where it has none."""
    if not hasattr(module, "lora_A"):
        return None
    adapter: Any = module
    return adapter.lora_A[_NAME].weight, adapter.lora_B[_NAME].weight, float(adapter.scaling[_NAME])


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """The [out, in] weight that a projection amounts to, its adapter included; no gradient."""
    found = factors(module)
    weight = module.weight.detach()
    if found is None:
        return weight
    down, up, scale = found
    return weight + scale * (up @ down)


def merged_copy(model: Any) -> Any:
    """A copy of the CausalLM whose weights have the adapters merged in and whose modules are transformers' own."""
    merged = copy.deepcopy(model)
    for parent in list(merged.modules()):
        for name, module in list(parent.named_children()):
            if factors(module) is not None:
                plain = module.get_base_layer()
                with torch.no_grad():
                    plain.weight.copy_(merged_weight(module))
                setattr(parent, name, plain)
    return merged
