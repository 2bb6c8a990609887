"""Matrices of a model split over the processes of a run: each keeps a part, and the whole is there while it is used.

ZeRO's third stage (arXiv 1910.02054), map by map: a product gathers its weights, its backward gathers them again, and
every process then gets its part of the gradient's sum. torch's ``fully_shard`` does this where a module is called; here
weights are arguments and no module is. A part is an nth of the matrix in row-major order, the last one filled up with
zeros, which have no gradient and stay zero. Vectors (norms, biases) are whole everywhere.

What gathers is a collective: all processes must do it equally often and in one order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from registry import UsageError
from registry.memory import return_freed

# torch 2.13 has new names for these
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class SplitMatrix(nn.Parameter):
    """This process's part [n] of a trained or frozen matrix.

    Attributes:
        whole_shape: of the matrix.
    """

    whole_shape: torch.Size


@contextmanager
def peers() -> Iterator[None]:
    """A lost process as a ``UsageError``; the processes of one run stand and fall together."""
    try:
        yield
    except RuntimeError as error:
        raise UsageError(
            f"another process of this run has ended, or cannot be reached ({str(error).splitlines()[0]}): its own "
            "message says why; the same command goes on from the last checkpoint"
        ) from error


def split(matrix: nn.Parameter, device: torch.device) -> SplitMatrix:
    """The parameter that takes the place of ``matrix``, on ``device``."""
    made = SplitMatrix(_part(matrix.detach()).to(device), requires_grad=matrix.requires_grad)
    made.whole_shape = matrix.shape
    return made


def split_matrices(model: nn.Module, device: torch.device) -> None:
    """Split the matrices of ``model`` in place, but for the factors of low-rank adapters, which are small; all of it
    moves to ``device``. Tied weights stay tied."""
    made: dict[int, SplitMatrix] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and "lora_" not in path:
                if id(parameter) not in made:
                    made[id(parameter)] = split(parameter, device)
                module._parameters[name] = made[id(parameter)]
    model.to(device)
    return_freed()  # what held whole matrices


def whole_shape(weight: Tensor) -> torch.Size | None:
    """The shape of the matrix that ``weight`` is a part of; None for a weight that is not split."""
    return getattr(weight, "whole_shape", None)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of the whole weight."""
    return whole_shape(weight) or weight.shape


def gather(part: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix of ``shape`` that every process has a ``part`` [n] of, in ``dtype``; no gradient. A collective."""
    sent = part.detach().to(dtype or part.dtype)
    whole = sent.new_empty(len(sent) * distributed.get_world_size())
    with peers():
        _all_gather(whole, sent)
    return whole[: shape.numel()].view(shape)


def sum_parts(grad: Tensor, shape: torch.Size) -> Tensor:
    """This process's part [n] of the sum of all processes' ``grad``, a matrix of ``shape``. A collective."""
    size = distributed.get_world_size()
    flat = grad.contiguous().view(-1)
    length = -(-len(flat) // size)
    if len(flat) < length * size:
        flat = torch.cat((flat, flat.new_zeros(length * size - len(flat))))
    part = flat.new_empty(length)
    with peers():
        _reduce_scatter(part, flat)
    return part


def whole(weight: Tensor) -> Tensor:
    """``weight`` itself, or the matrix that it is a part of; no gradient. A collective if it is split."""
    shape = whole_shape(weight)
    return weight.detach() if shape is None else gather(weight, shape)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return gather(part, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return sum_parts(grads[0], ctx.shape), None


def trainable(weight: Tensor) -> Tensor:
    """As ``whole``, in the weight's own dtype, with a gradient, which is summed over the processes if it is split."""
    shape = whole_shape(weight)
    return weight if shape is None else _Whole.apply(weight, shape)


def most(count: int) -> int:
    """The largest ``count`` of all processes. A collective."""
    agreed = torch.tensor(count)
    with peers():
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
    return int(agreed)


def leads() -> bool:
    """Whether this process is the one that writes files."""
    return distributed.get_rank() == 0


def collected(weight: Tensor, value: Tensor | None = None) -> Tensor:
    """``weight`` whole, for a file; or ``value``, which goes with it number by number (a moment). Of a split weight the
    matrix is on the host of the process that ``leads`` alone, and the others have an empty tensor. A collective then.
    """
    value = weight.detach() if value is None else value
    shape = whole_shape(weight)
    if shape is None:
        return value
    matrix = gather(value, shape)
    return matrix.cpu() if leads() else matrix.new_empty(0)


def whole_copy(model: nn.Module) -> nn.Module:
    """A copy of a split ``model`` with whole matrices, on the host of the process that ``leads``; elsewhere ``model``
    itself. A collective."""
    if not leads():
        for parameter in model.parameters():
            collected(parameter)
        return model
    made = copy.deepcopy(model)
    wholes = {
        id(copied): nn.Parameter(collected(parameter).cpu(), parameter.requires_grad)
        for copied, parameter in zip(made.parameters(), model.parameters(), strict=True)
    }
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = wholes[id(parameter)]
    return made


def placed(weight: Tensor, value: Tensor) -> Tensor:
    """What of a file's ``value`` belongs beside ``weight``: all of it, or this process's part of it."""
    return value if whole_shape(weight) is None else _part(value)


def _part(matrix: Tensor) -> Tensor:
    """[n], this process's."""
    flat = matrix.reshape(-1)
    length = -(-len(flat) // distributed.get_world_size())
    begin = length * distributed.get_rank()
    part = flat.new_zeros(length)
    mine = flat[begin : begin + length]
    part[: len(mine)] = mine
    return part
