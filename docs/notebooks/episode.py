# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # An episode by hand, and in a PPO loop of your own
#
# `MathReason-v0` is a `gymnasium.Env`. Nothing below needs this project's agents: the loop is forty lines of torch.

# %%
import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch

import envs
from agents import collect
from policies import Policy

torch.manual_seed(0)
env = gym.make("MathReason-v0", render_mode="ansi", problem_options={"level": 1})
observation, info = env.reset(seed=3)
print(env.render())

# %% [markdown]
# What would the built-in model write next? Its distribution over the first token, and then the whole episode, token by
# token.

# %%
policy = Policy.load("tiny")
everything = tuple(range(policy.num_layers))
task = env.unwrapped.task

prompt = torch.from_numpy(observation["input_ids"][: observation["length"][0]])
first = torch.arange(policy.vocab_size)[:, None]
with torch.no_grad():
    logp = policy.logprobs([prompt] * len(first), first, torch.ones_like(first, dtype=torch.bool))[:, 0]
likely = logp.argsort(descending=True)[:12]

figure, panel = plt.subplots(figsize=(7, 2.4), layout="constrained")
panel.bar([repr(task.tokenizer.decode([t])) for t in likely.tolist()], logp[likely].exp())
panel.set_ylabel("probability")
panel.set_title("first token of the completion", loc="left")
# %%
behavior = policy.behavior(everything, slots=1, max_length=task.max_length, seed=1)
start, done = True, False
while not done:
    batch = {name: value[None] for name, value in observation.items()}
    token, _ = behavior.act(batch, np.array([start]), np.array([0]))
    observation, reward, terminated, truncated, info = env.step(token[0])
    start, done = False, terminated or truncated
print(env.render())

# %% [markdown]
# ## PPO, written out
#
# The native vector environment writes 16 problems times 8 completions in one call of `collect`. The advantage is a
# reward less its group's mean; the loss is PPO's clip, two steps a rollout.

# %%
venv = gym.make_vec("MathReason-v0", num_envs=128, problem_options={"level": 1})
problems, group = 16, 8
optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
draw = np.random.default_rng(0)
rewards, clipped = [], []

for iteration in range(12):
    behavior = policy.behavior(everything, slots=128, max_length=venv.task.max_length, seed=iteration)
    rollout = collect(behavior, venv, draw.integers(10**6, size=problems).tolist(), group)
    by_group = rollout.reward.view(problems, group)
    advantage = (by_group - by_group.mean(1, keepdim=True)).view(-1, 1)
    for _ in range(2):
        logp = policy.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
        ratio = (logp - rollout.behavior_logp).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = -surrogate[rollout.mask].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        policy.refresh()
    rewards.append(float(rollout.reward.mean()))
    outside = ((ratio - 1).abs() > 0.2) & rollout.mask
    clipped.append(float(outside.sum() / rollout.mask.sum()))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
left.plot(rewards, marker="o")
left.set(xlabel="iteration", ylabel="share of right completions")
right.plot(clipped, marker="s", color="tab:orange")
right.set(xlabel="iteration", ylabel="tokens outside of the clip")
# %% [markdown]
# That is on-policy ReFT. `agents.ReFT` adds what a run needs: layer subsets and corrections, diagnostics, checkpoints,
# evaluation, resuming to the same numbers.

# %%
assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards
