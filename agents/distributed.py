"""Data parallelism under torchrun: each process writes and scores its share, and every process then knows the whole.

Rollouts are shared out by whole groups and gathered, so that advantages, aggregation coefficients, corrections of any
scope and diagnostics see exactly what one process would see; what costs time (decoding, verdicts, forward and backward)
is done once. Gradients are summed. Randomness is keyed by episode, so the number of processes changes the order of sums
and nothing else. Everything that processes exchange is a sum of tensors in which each fills its own part, but for split
weights (``policies.sharding``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from agents.rollout import Interrupted, Rollout
from policies.dtype import available_device
from policies.sharding import most, peers, whole_shape
from registry import UsageError

T = TypeVar("T")
Write = Callable[[list[int], int], Rollout]  # (problems, number of the first group) -> whole groups


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone by default, and then nothing is exchanged."""

    rank: int = 0
    size: int = 1

    @property
    def leader(self) -> bool:
        """Whether this process is the one that writes files and logs."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` things: contiguous, and of nearly equal size for all."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def part(self, index: Tensor, cost: Tensor) -> Tensor:
        """This process's part of ``index`` [N]: contiguous, and of nearly equal ``cost`` [N] for all."""
        if self.size == 1:
            return index
        middle = cost.double().cumsum(0) - cost.double() / 2
        return index[(middle * self.size / cost.sum()).long().clamp(max=self.size - 1) == self.rank]

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor``, in place, summed over the processes; a sum of parts that are 0 elsewhere gathers them."""
        if self.size > 1:
            with peers():
                distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Every process's gradients become the sum of all of them; those of split matrices are summed already."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if whole_shape(parameter) is None:
                self.sum(parameter.grad)

    def norm(self, parameters: Iterable[torch.nn.Parameter], of: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """The norm of all processes' gradients as of one vector, by ``of``, the norm of some tensors."""
        given = [parameter for parameter in parameters if parameter.grad is not None]
        parts = [p.grad for p in given if p.grad is not None and whole_shape(p) is not None]
        rest = [p.grad for p in given if p.grad is not None and whole_shape(p) is None]
        if not parts:
            return of(rest)
        mine = of(parts)
        squares = self.sum(mine.double().square())
        return (squares + of(rest).double().square() if rest else squares).sqrt().to(mine.dtype)

    def agree(self, value: int) -> int:
        """The leader's value, for every process."""
        return int(self.sum(torch.tensor(int(value) if self.leader else 0)))

    def agree_on(self, text: str) -> str:
        """The leader's text, for every process."""
        return text if self.size == 1 else self._texts(text)[0]

    def in_turn(self, act: Callable[[], T]) -> T:
        """What ``act`` gives, done by one process of a machine after the other: it takes much memory for a while."""
        turn = _whole_number("LOCAL_RANK", self.rank)
        turns = most(_whole_number("LOCAL_WORLD_SIZE", self.size))
        for _ in range(turn):
            self.sum(torch.zeros(1))
        made = act()
        for _ in range(turn, turns):
            self.sum(torch.zeros(1))
        return made

    def require_equal(self, seed: int, weights: float) -> None:
        """Raise UsageError unless all processes have the same seed and the same ``weights`` (``total_weight``)."""
        if self.size == 1:
            return
        values = torch.zeros(self.size, 2, dtype=torch.float64)
        values[self.rank] = torch.tensor([seed, weights])
        for what, column in zip(("seeds", "weights"), self.sum(values).unbind(1), strict=True):
            if len(column.unique()) > 1:
                raise UsageError(f"the processes of this run have different {what}: start all of them with the same")

    def rollout(self, write: Write, problems: Sequence[int]) -> Rollout:
        """All groups of ``problems``, each written by one of the processes.

        Raises:
            Interrupted: in every process, if one of them was.
        """
        if self.size == 1:
            return write(list(problems), 0)
        part = self.share(len(problems))
        try:
            mine = write(list(problems[part]), part.start)
        except Interrupted:
            mine = None
        told = [json.loads(text) for text in self._texts(json.dumps(_described(mine), default=lambda v: v.item()))]
        if None in told:
            raise Interrupted
        assert mine is not None
        sizes = [len(one["episodes"]) for one in told]
        first, total = sum(sizes[: self.rank]), sum(sizes)
        width = max(one["width"] for one in told)
        gathered: dict[str, Any] = {}
        for field in fields(mine):
            value = getattr(mine, field.name)
            if isinstance(value, Tensor):
                whole = torch.zeros((total, width)[: value.dim()], dtype=value.dtype)
                whole[first : first + len(mine), *(slice(size) for size in value.shape[1:])] = value
                gathered[field.name] = self.sum(whole.byte()).bool() if whole.dtype == torch.bool else self.sum(whole)
        groups = [torch.tensor(ids, dtype=torch.int64) for one in told for ids in one["prompts"]]
        each = total // max(len(groups), 1)
        return Rollout(
            prompts=tuple(prompt for prompt in groups for _ in range(each)),  # one object a group: computed once
            episodes=tuple(episode for one in told for episode in one["episodes"]),
            **gathered,
        )

    def together(self, act: Callable[[], T]) -> T:
        """What ``act`` gives in this process. Raises Interrupted in every process, if one of them was."""
        made = None
        with suppress(Interrupted):
            made = act()
        if self.sum(torch.tensor(int(made is None))) or made is None:
            raise Interrupted
        return made

    def _texts(self, text: str) -> list[str]:
        """Every process's text."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(data)
        self.sum(lengths)
        whole = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8)
        whole[self.rank, : len(data)] = data
        self.sum(whole)
        return [bytes(row[:length].tolist()).decode() for row, length in zip(whole, lengths.tolist(), strict=True)]


ALONE = Ranks()


def total_weight(parameters: Iterable[torch.nn.Parameter]) -> float:
    """A number that tells one set of weights from another."""
    return sum(float(parameter.detach().abs().sum()) for parameter in parameters)


def _described(rollout: Rollout | None) -> dict[str, Any] | None:
    """What of a rollout is no tensor of one row a sequence; None for an interrupted one."""
    if rollout is None:
        return None
    prompts = dict(zip(rollout.group.tolist(), rollout.prompts, strict=True))
    return {
        "width": rollout.mask.shape[1],
        "prompts": [prompt.tolist() for prompt in prompts.values()],
        "episodes": rollout.episodes,
    }


def join(device: str = "cpu") -> Ranks:
    """This process's place in the run, as torchrun's environment or a process group made before says; else alone."""
    if distributed.is_available() and not distributed.is_initialized() and _whole_number("WORLD_SIZE", 1) > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UsageError(f"WORLD_SIZE is set, but not {missing[0]}: start the processes with torchrun")
        _whole_number("MASTER_PORT", 0)
        if _whole_number("RANK", 0) >= _whole_number("WORLD_SIZE", 1):
            raise UsageError(f"RANK={os.environ['RANK']} is not below WORLD_SIZE={os.environ['WORLD_SIZE']}")
        with peers():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    if not (distributed.is_available() and distributed.is_initialized()):
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _whole_number(name: str, default: int) -> int:
    """An environment variable that torchrun sets; schedulers and notebooks leave it empty for a process alone."""
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal():
        raise UsageError(f"{name}={text!r} in the environment is no whole number: unset it, or start with torchrun")
    return int(text)


def local_device(device: str) -> str:
    """``device``, or for a bare ``cuda`` under torchrun this process's own GPU; UsageError if there is none such."""
    available_device(device)
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and os.environ.get("LOCAL_RANK") else device
