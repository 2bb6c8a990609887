"""A small world for the agents: a model that hesitates, and the questions that it hesitates over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents import ReFT
from agents.sb3_ppo import SB3PPO
from agents.sft import SFT
from benchmarks.experiment.resolve import resolve
from benchmarks.experiment.spec import RunSpec
from benchmarks.measuring.durable import read_rows
from envs.task import BUILTIN_TOKENIZER
from envs.vector import MathReasonVector

QUESTIONS = 8
AGENTS = {
    "reft": (ReFT, {"group_size": 4, "problems_per_batch": 4, "slots": 4, "minibatches": 2}),
    "sb3-ppo": (SB3PPO, {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "slots": 4}),
    "sft": (SFT, {"batch_size": 3, "gradient_steps": 2, "slots": 4}),
}
WRITERS = ("reft", "sb3-ppo")  # agents whose steps are tokens that they write


class World(NamedTuple):
    """A model that answers every question of a file sometimes rightly and sometimes wrongly: mostly right where the
    question's number is even, mostly wrong where it is odd."""

    model: str
    env: dict[str, Any]

    def vector(self, slots: int = 4) -> MathReasonVector:
        return gym.make_vec("MathReason-v0", num_envs=slots, **self.env)  # type: ignore[return-value]

    def agent(self, name: str, policy: Any = None, **kwargs: Any) -> Any:
        cls, small = AGENTS[name]
        return cls(
            policy or self.model, self.vector(small["slots"]), seed=5, **{"learning_rate": 1e-3, **small, **kwargs}
        )


def make_world(folder: Path) -> World:
    """Train the model and write it and its questions into ``folder``; the same every time."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BUILTIN_TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    lines, rows = [], []
    for n in range(QUESTIONS):
        row = {"question": f"What is {n} plus 2?", "answer": str(n + 2), "solution": f" #### {n + 2}"}
        lines.append(json.dumps(row))
        for answer in (n + 2, n + 3, n + 2 + n % 2):
            text = f"Question: What is {n} plus 2?\nAnswer: #### {answer}"
            rows.append(torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]))
    (folder / "problems.jsonl").write_text("\n".join(lines))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    kwargs = {"problems": str(folder / "problems.jsonl"), "max_prompt_tokens": 24, "max_new_tokens": 8}
    return World(str(folder / "model"), kwargs)


def weights(agent: Any) -> dict[str, torch.Tensor]:
    found = {name: value.detach().clone() for name, value in agent.target.model.state_dict().items()}
    if hasattr(agent, "critic"):
        found |= {f"critic.{name}": value.detach().clone() for name, value in agent.critic.state_dict().items()}
    return found


SMALL = {
    "iterations": 6,
    "checkpoint_every": 2,
    "problems_per_batch": 3,
    "group_size": 3,
    "env.max_new_tokens": 12,
    "env.reward": "random",  # always a signal, so that every iteration moves weights and optimizer
    "evaluation.problems": 8,
    "evaluation.every": 3,
    "evaluation.samples": 2,
}


AGENT = "nested-reft/uniform/token-is"


def small(**given) -> RunSpec:
    """A spec of a run of a few seconds, with a sampler and a curriculum that carry state."""
    return resolve(AGENT, settings={**SMALL, "problem_sampler": "curriculum", "problem_sampler.pool": 8}, **given)


def numbers(folder: Path) -> list[dict]:
    """The rows without what a clock measured."""
    rows, damaged = read_rows(folder / "metrics.jsonl")
    assert damaged is None
    return [{k: v for k, v in row.items() if "time" not in k.split("/") and "second" not in k} for row in rows]
