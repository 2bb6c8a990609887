"""The engine in the throughput comparison: rollouts at some depth, with the seconds of their parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        began, busy = time.perf_counter(), time.process_time()
        clock = Clock(self.policy.device)
        behavior = self.policy.behavior(self.layers, self.work.env.num_envs, longest, clock=clock)

        def count(tokens: int, seen: dict[str, Any]) -> bool:
            parts.steps += 1
            parts.tokens += tokens
            return True

        rollout = collect(behavior, self.work.env, self.work.problems, self.work.group_size, count)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        parts.total += seconds
        parts.prompt_tokens += sum(len(self.work.prompt(problem)) for problem in self.work.problems)
        parts.layers += clock.seconds("layers")
        parts.head += clock.seconds("head")
        return Block(int(rollout.mask.sum()), seconds, busy)


class Clock:
    """Seconds spent in the parts of a decode step, a ``policies.engine.decoder.Clock``: by events on a GPU, since to
    wait for each would keep it from running ahead."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent = {"layers": 0.0, "head": 0.0}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what is inside."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.events.append((part, begin, end))
            return
        began = time.perf_counter()
        yield
        self.spent[part] += time.perf_counter() - began

    def seconds(self, part: str) -> float:
        """So far; waits for the device."""
        wait(self.device)
        recorded = (begin.elapsed_time(end) for name, begin, end in self.events if name == part)
        return self.spent[part] + sum(recorded) / 1000
