"""REINFORCE on whole completions: a model behind ``generate``, an environment that takes and judges text.

    python examples/reinforce_text.py --iterations 40

Several completions of a problem are each other's baseline (leave one out: RLOO, arXiv 2402.14740), and the loss is of
the tokens that were sampled, not of the text tokenized again.
"""

from __future__ import annotations

import argparse
import sys

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import envs  # noqa: F401 (registers the ids)
from envs.codec import load_tokenizer
from policies.pretrained.load import BUILT_IN
from registry import UsageError


def completion_logprobs(model: torch.nn.Module, sequences: Tensor, attention: Tensor, prompt: int) -> Tensor:
    """[B, T] log-probabilities of what follows the first ``prompt`` tokens of padded ``sequences`` [B, prompt + T]."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(sequences, attention_mask=attention, position_ids=positions).logits[:, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(2, sequences[:, prompt:, None])[:, :, 0]


def leave_one_out(rewards: Tensor) -> Tensor:
    """[N, G] rewards minus the mean of the group's others."""
    return (rewards - rewards.mean(1, keepdim=True)) * rewards.shape[1] / (rewards.shape[1] - 1)


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the mean reward of each iteration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a folder or a hub id")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--problems", type=int, default=16, help="of an iteration")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a problem")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.group_size < 2 or args.problems < 1 or args.iterations < 1:
        parser.error("--group-size must be at least 2, to compare one with others, --problems and --iterations 1")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    env = gym.make("TextMathReason-v0")
    tokenizer = load_tokenizer("builtin" if args.model in BUILT_IN else args.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(BUILT_IN.get(args.model, args.model), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    means = []
    for iteration in range(1, args.iterations + 1):
        indices = np.repeat(rng.integers(2**31, size=args.problems), args.group_size)
        prompts = [env.reset(options={"problem_index": int(index)})[0] for index in indices]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            sequences = model.generate(**inputs, **ends, do_sample=True, top_k=0, max_new_tokens=args.max_new_tokens)
        longest = inputs["input_ids"].shape[1]
        completions = sequences[:, longest:]
        ended = (completions == tokenizer.eos_token_id).int()
        mask = ended.cumsum(1) - ended == 0  # up to the first EOS, which counts

        rewards = []
        for index, completion, own in zip(indices, completions, mask, strict=True):
            env.reset(options={"problem_index": int(index)})
            _, reward, *_ = env.step(tokenizer.decode(completion[own], skip_special_tokens=True))
            rewards.append(reward)
        reward = torch.tensor(rewards).reshape(args.problems, args.group_size)

        attention = torch.cat([inputs["attention_mask"], mask.long()], 1)
        logprobs = completion_logprobs(model, sequences, attention, longest)
        advantage = leave_one_out(reward).reshape(-1, 1)
        loss = -(advantage * logprobs * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        means.append(float(reward.mean()))
        print(f"iteration {iteration}: mean reward {means[-1]:.1%}", flush=True)
    return means


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:  # bad input, no such model, no such server
        sys.exit(f"error: {error}")
