"""What writes completions in the throughput comparison: the engine at some depth, and transformers' generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agents.rollout import collect
from benchmarks.limits import wait
from benchmarks.pairing import Block
from policies import Nested, Policy
from registry import UsageError

PAGE = 256  # tokens of a page of transformers' continuous batching, its default


@dataclass(frozen=True)
class Work:
    """The prompts of a block and how long completions may get.

    Attributes:
        env: a native vector env of the task; its slots are the engine's. Forced length: it has no stop tokens.
        problems: indices of the env's problems.
        group_size: G, completions per problem.
        stop: tokens that end a completion; none for forced length.
    """

    env: Any
    problems: tuple[int, ...]
    group_size: int
    stop: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        """The longest completion."""
        return self.env.unwrapped.task.spec.max_new_tokens

    def prompt(self, problem: int) -> np.ndarray:
        """Token ids [P] of a problem."""
        return self.env.unwrapped.task.prompt(problem)


@dataclass
class Parts:
    """Seconds of the engine's blocks so far, and the slots that were busy in them."""

    total: float = 0.0
    layers: float = 0.0
    head: float = 0.0
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0  # of prompts that were prefilled
    slots: int = field(default=1)

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


class Generate:
    """transformers' generate on batches of completions of the same prompts, one batch a block."""

    def __init__(self, policy: Policy, work: Work, batch: int, model: Any = None) -> None:
        from transformers import AutoModelForCausalLM

        if model is None:
            model = AutoModelForCausalLM.from_config(policy.config, dtype=policy.dtype, attn_implementation="sdpa")
            model.load_state_dict(policy.model.state_dict())
        self.model = model.to(policy.device, policy.dtype).eval()
        self.work = work
        self.batch = batch
        self.next = 0

    @torch.inference_mode()
    def __call__(self) -> Block:
        """The next batch; generate itself pads, samples, and goes on until its last row has ended."""
        prompts = self._prompts()
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
        shown = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"
        )
        ids, shown = ids.to(self.model.device), shown.to(self.model.device)
        began = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=shown,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.work.new_tokens,
            eos_token_id=list(self.work.stop) or None,
            min_new_tokens=None if self.work.stop else self.work.new_tokens,
            pad_token_id=0,
        )
        written = out[:, ids.shape[1] :].cpu()
        return Block(self._written(written), time.perf_counter() - began)

    def _prompts(self) -> list[torch.Tensor]:
        """The prompts of the next ``batch`` completions."""
        rows = [(self.next + row) // self.work.group_size % len(self.work.problems) for row in range(self.batch)]
        self.next += self.batch
        return [torch.from_numpy(self.work.prompt(self.work.problems[row])) for row in rows]

    def _written(self, completions: torch.Tensor) -> int:
        """Tokens up to and including the first stop token of each row."""
        if not self.work.stop:
            return completions.numel()
        ended = torch.isin(completions, torch.tensor(self.work.stop)).int()
        return int((ended.cumsum(1) - ended == 0).sum())


class ContinuousBatching(Generate):
    """transformers' generate_batch: paged keys and values, admission as requests end."""

    @torch.no_grad()
    def __call__(self) -> Block:
        """The next ``batch`` completions as one call."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        stop = self.work.stop[0] if self.work.stop else -1
        config = GenerationConfig(
            max_new_tokens=self.work.new_tokens, do_sample=True, top_k=0, top_p=1.0, eos_token_id=stop, pad_token_id=0
        )
        prompts = [prompt.tolist() for prompt in self._prompts()]
        # Left to itself it takes most of the machine's memory for its cache, and most of its time to clear that.
        pages = sum(-(-(len(prompt) + self.work.new_tokens) // PAGE) for prompt in prompts)
        cache = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages + 1)
        began = time.perf_counter()
        out = self.model.generate_batch(prompts, generation_config=config, continuous_batching_config=cache)
        seconds = time.perf_counter() - began
        written = sum(len(request.generated_tokens) for request in out.values())
        if not written:
            raise UsageError("transformers' generate_batch failed on this model (its log says why): drop --continuous")
        return Block(written, seconds)
