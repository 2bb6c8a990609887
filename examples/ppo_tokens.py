"""PPO on tokens in one file: a language model with a value head on the native vector environment.

    python examples/ppo_tokens.py --total-timesteps 300000

The loop is the usual one (Schulman et al. 2017, arXiv 1707.06347), with generalised advantages (arXiv 1506.02438). Two
things are of this environment: the observation is the prefix with its length, and an episode that its token budget ends
(``truncated``) has its whole reward, so that nothing is bootstrapped there.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, fields

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import envs  # noqa: F401 (registers the ids)
from policies.pretrained.load import BUILT_IN
from registry import UsageError


@dataclass
class Args:
    """Hyper-parameters; each is an option of the command line."""

    model: str = "tiny"
    env_id: str = "MathReason-v0"
    seed: int = 1
    total_timesteps: int = 300_000
    num_envs: int = 32
    num_steps: int = 64
    learning_rate: float = 1e-4
    gamma: float = 1.0
    gae_lambda: float = 0.98
    update_epochs: int = 2
    num_minibatches: int = 8
    clip_coef: float = 0.2
    vf_coef: float = 0.1
    max_grad_norm: float = 1.0


class Agent(nn.Module):
    """A causal language model; the value is a linear function of the last hidden state, zero at first."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(BUILT_IN.get(model, model), dtype=torch.float32)
        self.value = nn.Linear(self.model.config.hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, ids: Tensor, length: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        """Prefixes [B, L] of ``length`` [B] -> the distribution of the next token and the value [B]."""
        longest = int(length.max())
        mask = torch.arange(longest) < length[:, None]
        hidden = self.model.model(ids[:, :longest], attention_mask=mask.long()).last_hidden_state
        last = hidden[torch.arange(len(ids)), length - 1]
        return torch.distributions.Categorical(logits=self.model.lm_head(last)), self.value(last)[:, 0]


def advantages(
    rewards: Tensor, values: Tensor, dones: Tensor, next_value: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantages [T, S]; ``dones[t]`` says that the episode ended with step t."""
    result, running = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        going_on = 1.0 - dones[t]
        delta = rewards[t] + gamma * next_value * going_on - values[t]
        running = delta + gamma * gae_lambda * going_on * running
        result[t], next_value = running, values[t]
    return result


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the success rate of the episodes of each iteration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Args):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = Args(**vars(parser.parse_args(argv)))
    size = args.num_steps * args.num_envs
    if not 2 <= 2 * args.num_minibatches <= size <= args.total_timesteps:
        parser.error(f"{size} tokens (steps * envs) must be at least 2 a minibatch and at most --total-timesteps")
    torch.manual_seed(args.seed)

    agent = Agent(args.model)
    own = {} if args.model in BUILT_IN else {"tokenizer": args.model, "vocab_size": agent.model.config.vocab_size}
    venv = gym.make_vec(args.env_id, num_envs=args.num_envs, **own)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, weight_decay=0.0)
    shape, longest = (args.num_steps, args.num_envs), venv.single_observation_space["input_ids"].shape[0]
    ids, lengths, actions = torch.zeros(*shape, longest).long(), torch.zeros(shape).long(), torch.zeros(shape).long()
    logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))
    observation, _ = venv.reset(seed=args.seed)
    success_rates, start = [], time.perf_counter()

    for iteration in range(1, args.total_timesteps // size + 1):
        successes: list[bool] = []
        for step in range(args.num_steps):
            ids[step] = torch.from_numpy(observation["input_ids"])
            lengths[step] = torch.from_numpy(observation["length"][:, 0])
            with torch.no_grad():
                distribution, values[step] = agent(ids[step], lengths[step])
                actions[step] = distribution.sample()
                logprobs[step] = distribution.log_prob(actions[step])
            observation, reward, terminated, truncated, info = venv.step(actions[step].numpy())
            rewards[step] = torch.from_numpy(reward)
            dones[step] = torch.from_numpy(terminated | truncated)
            if "final_info" in info:
                successes += info["final_info"]["is_success"][info["_final_info"]].tolist()

        with torch.no_grad():
            _, next_value = agent(
                torch.from_numpy(observation["input_ids"]), torch.from_numpy(observation["length"][:, 0])
            )
        advantage = advantages(rewards, values, dones, next_value, args.gamma, args.gae_lambda)
        returns = advantage + values

        for _ in range(args.update_epochs):
            for batch in torch.randperm(size).tensor_split(args.num_minibatches):
                distribution, value = agent(ids.flatten(0, 1)[batch], lengths.flatten()[batch])
                ratio = (distribution.log_prob(actions.flatten()[batch]) - logprobs.flatten()[batch]).exp()
                a = advantage.flatten()[batch]
                a = (a - a.mean()) / (a.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(ratio * a, clipped * a).mean()
                value_loss = 0.5 * (value - returns.flatten()[batch]).square().mean()
                optimizer.zero_grad()
                (policy_loss + args.vf_coef * value_loss).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        success_rates.append(float(np.mean(successes)) if successes else float("nan"))
        speed = f"{iteration * size / (time.perf_counter() - start):.0f} steps/s"
        print(f"iteration {iteration}: success {success_rates[-1]:.1%} of {len(successes)}, {speed}", flush=True)
    venv.close()
    return success_rates


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:  # bad input, no such model, no such server
        sys.exit(f"error: {error}")
