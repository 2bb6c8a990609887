"""The peers of the throughput comparison: transformers' generate and its continuous batching."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.measuring.pairing import Block
from benchmarks.speed.work import Work
from policies import Policy
from registry import UsageError

PAGE = 256  # tokens of a page of transformers' continuous batching, its default


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
        began, busy = time.perf_counter(), time.process_time()
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
        completions = out[:, ids.shape[1] :].cpu()
        return Block(self.count_tokens(completions), time.perf_counter() - began, time.process_time() - busy)

    def _prompts(self) -> list[torch.Tensor]:
        """The prompts of the next ``batch`` completions."""
        rows = [(self.next + row) // self.work.group_size % len(self.work.problems) for row in range(self.batch)]
        self.next += self.batch
        return [torch.from_numpy(self.work.prompt(self.work.problems[row])) for row in rows]

    def count_tokens(self, completions: torch.Tensor) -> int:
        """Tokens of [B, T] completions, up to and including the first stop token of each row."""
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
        tokens = sum(len(request.generated_tokens) for request in out.values())
        if not tokens:
            raise UsageError("transformers' generate_batch failed on this model (its log says why): drop --continuous")
        return Block(tokens, seconds)
