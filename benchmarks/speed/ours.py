"""The engine in the throughput comparison: rollouts at some depth, with the seconds of their parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from agents.rollout import collect
from benchmarks.measuring.pairing import Block
from benchmarks.speed.limits import wait
from benchmarks.speed.work import Work
from policies import Nested, Policy


@dataclass
class Parts:
    """Seconds of the engine's blocks so far, and the slots that were busy in them."""

    total: float = 0.0
    layers: float = 0.0
    head: float = 0.0
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0  # of prompts that were prefilled
    slots: int = 1

    @property
    def occupancy(self) -> float:
        """Mean share of the slots that wrote a token."""
        return self.tokens / max(1, self.steps * self.slots)


class Engine:
    """Rollouts of a (patched, int8) layer subset through the environment: prefill, decode, refill, drain, verdicts."""

    def __init__(self, policy: Policy, work: Work, layers: Nested) -> None:
        self.policy = policy
        self.work = work
        self.layers = layers
        self.parts = Parts(slots=work.env.num_envs)

    def __call__(self) -> Block:
        """One whole rollout of the work's deck."""
        parts, longest = self.parts, self.work.env.unwrapped.task.max_length
        began = time.perf_counter()
        behavior = self.policy.nested(self.layers, self.work.env.num_envs, longest)
        decoder: Any = behavior._decoder
        layers, head = Clock(self.policy.device), Clock(self.policy.device)
        clocks = {"hidden": layers, "follow": layers, "draw": head}
        timed = [name for name in clocks if hasattr(decoder, name)]
        for name in timed:
            setattr(decoder, name, clocks[name].timed(getattr(decoder, name)))

        def count(tokens: int, done: Any, infos: Any) -> bool:
            parts.steps += 1
            parts.tokens += tokens
            return True

        rollout = collect(behavior, self.work.env, self.work.problems, self.work.group_size, count)
        seconds = time.perf_counter() - began
        for name in timed:
            delattr(decoder, name)  # they refer to the decoder, whose slots would outlive the block
        parts.total += seconds
        parts.prompt_tokens += sum(len(self.work.prompt(problem)) for problem in self.work.problems)
        parts.layers += layers.seconds()
        parts.head += head.seconds()
        return Block(int(rollout.mask.sum()), seconds)


class Clock:
    """Seconds spent in calls, by events where they run on a GPU: to wait for each would keep it from running ahead."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, counted."""

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            self.spent += time.perf_counter() - began
            return result

        def recorded(*arguments: Any) -> Any:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = call(*arguments)
            end.record()
            self.events.append((begin, end))
            return result

        return recorded if self.device.type == "cuda" else timed

    def seconds(self) -> float:
        """So far; waits for the device."""
        wait(self.device)
        return self.spent + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
