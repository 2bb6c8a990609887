# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Which layers to skip
#
# A nested rollout leaves layers out. Which ones decides how far its policy mu is from the target pi, more than how
# many. This measures it on a model of yours: `NESTED_REFT_POLICY` is a Hugging Face folder or hub id, and `tiny`, the
# built-in model, is the default. `python -m benchmarks.divergence` is the same with every sampler, patches and speeds.

# %%
import os

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch

import envs
from policies import Length, Policy, Probe, UniformSkip, with_int8
from policies.skipping.divergence import compare, states, write
from registry import patches, skip_samplers

name = os.environ.get("NESTED_REFT_POLICY", "tiny")
policy = Policy.load(name)
everything = tuple(range(policy.num_layers))
settings = {"tokenizer": "builtin" if name == "tiny" else name, "max_prompt_tokens": 128}
task = gym.make("MathReason-v0", split="test", **settings, vocab_size=policy.vocab_size).unwrapped.task
held_out = [torch.from_numpy(task.prompt(i)) for i in range(16)]
others = [torch.from_numpy(task.prompt(i)) for i in range(100, 116)]
length = Length(32, tuple(task.stop_token_ids))
print(f"{name}: {policy.num_layers} layers, {policy.vocab_size} tokens")

# %% [markdown]
# ## One layer at a time
#
# The divergence of the policy that lacks one layer, KL(mu || pi) per token over the whole vocabulary, and the layer's
# influence on its input. The first and the last layers are dear; most of the others are not.

# %%
probe = Probe(policy, others, length)
cost = probe.kl()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.bar(everything, cost)
left.set(yscale="log", xlabel="layer left out", ylabel="KL per token, nats")
right.bar(everything, probe.influence, color="tab:orange")
right.set(xlabel="layer", ylabel="block influence")

# %% [markdown]
# ## Sets of layers
#
# Samplers choose sets by position, at random or by such scores. Each set is judged on what *it* writes for held-out
# prompts.


# %%
def divergence(nested, int8=False):
    """KL per token and D per completion, of a nested policy on its own completions."""
    text = write(policy, nested, held_out, length)
    gap = compare(policy, states(policy, text, everything), [states(policy, text, nested)], int8=int8)[0]
    return gap.kl, gap.kl * text.mean_length


def kept_by(id, count, seed=0):
    """The layers that a sampler keeps where it leaves out ``count``."""
    sampler = skip_samplers.make(id, ratio=count / policy.num_layers)
    sampler.prepare(probe)
    return sampler.sample(policy.num_layers, np.random.default_rng(seed))


counts = [1, 2, 4] if policy.num_layers < 24 else [2, 4, 8]
chosen = ("lowest-kl", "block-influence", "middle", "even", "early-exit")
curves = {id: [divergence(kept_by(id, count)) for count in counts] for id in chosen}
curves["uniform"] = [
    tuple(np.mean([divergence(kept_by("uniform", count, seed)) for seed in range(4)], axis=0)) for count in counts
]

figure, panel = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for id, points in curves.items():
    panel.plot(counts, [d for _, d in points], marker="o", label=id)
panel.axhspan(1e-3, 0.3, color="tab:green", alpha=0.12)
panel.axhline(2, color="tab:red", linestyle=":", linewidth=1)
panel.set(
    yscale="log", xlabel=f"layers left out of {policy.num_layers}", ylabel="D per completion, nats", xticks=counts
)
panel.legend(frameon=False, fontsize="small")
# %% [markdown]
# Green: any off-policy correction works. Above the red line only `defensive` is unbiased and still of use.
#
# ## What the layers kept can make up for
#
# A patch refits output maps by ridge regression, at no cost in rollouts; rollouts by products on bytes are the other
# way to write faster.

# %%
subset = kept_by("lowest-kl", counts[1])
fitted = patches.make("heal").fit(policy, write(policy, everything, others, length, seed=1), subset).subset
bytes_only = with_int8(everything)
figures = {
    "plain": divergence(subset),
    "heal": divergence(fitted),
    "all layers, bytes": divergence(bytes_only, int8=True),
}

figure, panel = plt.subplots(figsize=(5, 2.4), layout="constrained")
panel.barh(list(figures), [kl for kl, _ in figures.values()], color=["tab:blue", "tab:green", "tab:purple"])
panel.set(xscale="log", xlabel=f"KL per token, {counts[1]} layers left out (bytes: none)")
# %%
assert len(subset) == policy.num_layers - counts[1] and all(kl > 0 for kl, _ in figures.values())
assert UniformSkip().ratio > 0 and divergence(everything)[0] < 1e-3
