"""What the project asks of vLLM, by transformers' own forward, one sequence and one token at a time.

Its folder on PYTHONPATH stands for vLLM in tests of everything around the engine; ``SLOW_VLLM`` says how it fails.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

FAILS = os.environ.get("SLOW_VLLM", "")
__version__ = "0.20.0" if FAILS == "old" else "0.32.0"


class SamplingParams(SimpleNamespace):
    """The fields as they are given."""


class LLM:
    """A model that is in ``model``, a folder."""

    def __init__(self, model: str, **settings: Any) -> None:
        if FAILS == "memory":
            raise ValueError("Available memory on node 0 is less than requested memory for kv (9 GiB)")
        assert settings["logprobs_mode"] == "processed_logprobs" and settings["generation_config"] == "vllm"
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()

    def collective_rpc(self, method: str, kwargs: dict[str, Iterator[tuple[str, torch.Tensor]]]) -> None:
        """``reload_weights`` of all the weights."""
        assert method == "reload_weights"
        if FAILS != "deaf":
            self.model.load_state_dict({name: tensor.clone() for name, tensor in kwargs["weights_iterator"]})

    def reset_prefix_cache(self) -> bool:
        """There is none."""
        return True

    @torch.no_grad()
    def generate(self, prompts: list[Any], sampling: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        """Each prompt's completion, drawn by a generator of its own."""
        if FAILS == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return [self._one(prompt["prompt_token_ids"], how) for prompt, how in zip(prompts, sampling, strict=True)]

    def _one(self, prompt: list[int], how: SamplingParams) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(how.seed)
        ids, logprobs = list(prompt), []
        while len(logprobs) < how.max_tokens and not (logprobs and ids[-1] in how.stop_token_ids):
            assert len(ids) < self.settings["max_model_len"]
            logp = (self.model(torch.tensor([ids])).logits[0, -1].float() / how.temperature).log_softmax(-1)
            ids.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            logprobs.append({ids[-1]: SimpleNamespace(logprob=float(logp[ids[-1]]))})
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=logprobs)])
