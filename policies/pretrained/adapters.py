"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) by the optional package peft: trained in their factored form,
merged for rollouts and on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from policies.sharding import collected, placed, whole
from registry import UsageError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = "default"


def check_peft() -> None:
    """Raise UsageError where peft is not installed, without importing it."""
    if find_spec("peft") is None:
        raise UsageError("low-rank adapters need the package peft: pip install 'nested-reft[lora]'")


def add_adapters(model: Any, rank: int, alpha: int, seed: int, layers: Sequence[int]) -> None:
    """Put adapters into all projections of these layers of a transformers CausalLM, in place; freeze everything else.

    A projection W becomes W + alpha / rank * B A. A is drawn from ``seed`` alone and B is zero, so the model computes
    what it did. Raises ``UsageError`` without peft or for a rank below 1."""
    if rank < 1:
        raise UsageError(f"rank={rank}: a low-rank adapter needs a rank of at least 1")
    width = max(model.config.hidden_size, model.config.intermediate_size)
    if rank > width:
        raise UsageError(f"rank={rank}: the model's projections have a rank of {width} at most; 8 or 16 is usual")
    if any(factors(module) for module in model.modules()):
        raise UsageError("the model has low-rank adapters already: load it anew")
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        layers_to_transform=list(layers),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def factors(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """A [rank, in], B [out, rank] and the scale of a projection's adapter; None where it has none."""
    if not hasattr(module, "lora_A"):
        return None
    adapter: Any = module
    return adapter.lora_A[_NAME].weight, adapter.lora_B[_NAME].weight, float(adapter.scaling[_NAME])


def adapter_state_dict(model: Any) -> dict[str, Tensor]:
    """By a projection's name: the factors ``lora_A`` [rank, in] and ``lora_B`` [out, rank], ``scaling`` [] float64, and
    the frozen ``base`` [out, in], which a merged weight less its adapter would not give to the bit."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        adapter = factors(module)
        if adapter is not None:
            state[f"{name}.lora_A"], state[f"{name}.lora_B"] = adapter[0].detach(), adapter[1].detach()
            state[f"{name}.scaling"] = torch.tensor(adapter[2], dtype=torch.float64)
            state[f"{name}.base"] = collected(module.weight)
    return state


@torch.no_grad()
def load_adapter_state_dict(model: Any, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of ``adapter_state_dict`` into a model that has adapters of the same rank, in place."""
    for name, module in model.named_modules():
        adapter = factors(module)
        if adapter is not None:
            adapter[0].copy_(state[f"{name}.lora_A"])
            adapter[1].copy_(state[f"{name}.lora_B"])
            module.scaling[_NAME] = float(state[f"{name}.scaling"])
            module.weight.copy_(placed(module.weight, state[f"{name}.base"]))


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """The [out, in] weight that a projection amounts to, its adapter included; no gradient."""
    adapter = factors(module)
    weight = whole(module.weight)
    if adapter is None:
        return weight
    down, up, scale = adapter
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
