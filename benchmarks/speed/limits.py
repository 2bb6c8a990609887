"""What the machine allows, probed in the same process: matrix products alone, and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from policies import Policy, with_int8
from policies.model.products import outer_product, product


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for; a CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The fastest of five calls after one to warm up: a limit is what the machine can do, not what it did."""
    call()
    seconds = []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@torch.inference_mode()
def product_limit(policy: Policy, rows: int, int8: bool = False) -> float:
    """Tokens per second of one decode step's packed matrix products on ``rows`` rows, all layers and the head, and
    nothing else: by the kernels, the layout and the threads that the engine uses. A compiled head draws on the way."""
    behavior = policy.behavior(with_int8(tuple(range(policy.num_layers)), int8), rows, 1)
    head = policy.rollout_weights(int8).head
    uniform = torch.rand(rows, dtype=torch.float64)
    hidden = torch.randn(rows, policy.architecture.width, device=policy.device)

    def project() -> object:
        return head.draw(hidden, uniform, 1.0) if head.draws else head.logits(hidden)

    layers = best_seconds(lambda: behavior.decoder.products(rows), policy.device)
    return rows / (layers + best_seconds(project, policy.device))


@torch.inference_mode()
def update_seconds(policy: Policy, tokens: int, scored: int, budget: int) -> float:
    """Seconds of an update's matrix products alone, forward and both backwards: all layers' on ``tokens`` packed tokens
    in micro-batches of ``budget``, and the head's on ``scored``, at the rate of the layers'. Attention is not part."""
    a, rows, device = policy.architecture, min(tokens, budget), policy.device
    heads, inner = (a.query_heads + 2 * a.key_heads) * a.head_dim, policy.config.intermediate_size
    sizes = ((heads, a.width), (a.width, a.query_heads * a.head_dim), (2 * inner, a.width), (a.width, inner))
    weights = [torch.randn(size, device=device).to(policy.dtype) for size in sizes]
    inputs = [torch.randn(rows, size[1], device=device).to(policy.dtype) for size in sizes]
    slopes = [torch.randn(rows, size[0], device=device).to(policy.dtype) for size in sizes]

    def layer() -> None:
        for weight, x, slope in zip(weights, inputs, slopes, strict=True):
            product(x, weight)
            product(slope, weight.t())
            outer_product(slope, x)

    one = best_seconds(layer, device) / rows
    return one * (a.layers * tokens + scored * a.vocabulary * a.width / sum(weight.numel() for weight in weights))


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading 256 MB once."""
    data = torch.zeros(2**26, device=device)
    return data.numel() * data.element_size() / best_seconds(data.sum, device)


def bandwidth_limit(policy: Policy, rows: int, context: float, int8: bool = False) -> float:
    """Tokens per second if a step only read all weights once and ``rows`` rows' keys and values of ``context``
    tokens each."""
    a = policy.architecture
    size = torch.finfo(policy.dtype).bits // 8
    weights = sum(parameter.numel() for parameter in policy.model.parameters()) * (1 if int8 else size)
    kv = rows * context * a.layers * a.kv_width * size
    return rows / ((weights + kv) / bandwidth(policy.device))
