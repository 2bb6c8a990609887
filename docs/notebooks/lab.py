# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # The exact lab, on a correction of your own
#
# A correction is a weight on every token. Before any training the lab can say what it does to the gradient: it
# enumerates every completion of a small token MDP, so bias and variance are sums without noise.

# %%
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

import agents
from benchmarks.estimators.contract import check, relative_bias
from benchmarks.estimators.moments import moments
from benchmarks.estimators.settings import Grouping, Sweep
from benchmarks.estimators.sweep import noisy_cell, rows
from registry import advantages, corrections


@corrections.register("soft-cap")
@dataclass(frozen=True)
class SoftCap:
    """W = rho / (1 + rho / cap): near rho where it is small, never above cap."""

    scope = "token"
    on_policy = None  # where pi = mu the weight is below 1
    cap: float = 4.0

    def __call__(self, logp, rollout, advantage):  # [B, T], detached -> weight [B, T]
        rho = torch.exp((logp - rollout.behavior_logp).clamp(max=80.0))
        return rho / (1 + rho / self.cap) * rollout.mask


# %% [markdown]
# ## Is it sound?
#
# The contract tests hold it to what it declares. An empty string means that all is well.

# %%
check(corrections.make("soft-cap"))

# %% [markdown]
# ## What weight does it give?

# %%
rho = torch.logspace(-2, 1.5, 200)
shapes = {
    "none": torch.ones_like(rho),
    "token-is": rho,
    "truncated-is": rho.clamp(max=2.0),
    "masked-is": rho.where((rho >= 0.5) & (rho <= 5.0), torch.zeros(())),
    "soft-cap": rho / (1 + rho / 4.0),
}
figure, panel = plt.subplots(figsize=(6, 3), layout="constrained")
for name, weight in shapes.items():
    panel.plot(rho, weight, label=name, linewidth=3 if name == "soft-cap" else 1.5)
panel.set(xscale="log", ylim=(0, 8), xlabel="rho = pi / mu of a token", ylabel="weight W")
panel.legend(frameon=False)
# %% [markdown]
# ## What does it do to a gradient step?
#
# The ascent efficiency is the share of an on-policy step's ascent that a step with this correction keeps, bias and
# variance together, here for a batch of 256 completions. D is the divergence of a whole completion in nats.

# %%
names = ("none", "token-is", "truncated-is", "sequence-is", "v-trace", "defensive", "soft-cap")
sweep = Sweep(divergences=(0.03, 0.1, 0.3, 1.0, 2.0), horizons=(5,), successes=(0.5, 0.1), skips=(), seeds=2)
table = list(rows(sweep, {name: corrections.make(name) for name in names}))


def mean(name, level, figure):
    """Of a figure over the cells of one divergence."""
    chosen = [row for row in table if row["correction"] == name and row["level"] == level]
    return sum(figure(row) for row in chosen) / len(chosen)


figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name in names:
    wide = 3 if name == "soft-cap" else 1.5
    kept = [mean(name, d, lambda row: row["efficiency"] / row["on_policy_efficiency"]) for d in sweep.divergences]
    bias = [mean(name, d, lambda row: row["relative_bias"]) for d in sweep.divergences]
    panels[0].plot(sweep.divergences, kept, marker="o", label=name, linewidth=wide)
    panels[1].plot(sweep.divergences, bias, marker="o", linewidth=wide)
panels[0].set(xscale="log", xlabel="D", ylabel="share of the on-policy ascent", ylim=(0, 1.02))
panels[1].set(xscale="log", xlabel="D", ylabel="relative bias")
panels[0].legend(frameon=False, fontsize="small")
# %% [markdown]
# ## Bias against variance, cap by cap
#
# One cell, at D = 1: a low cap is calm and biased, a high one is `token-is`.

# %%
cell = noisy_cell(4, 5, 0.5, 1.0, seed=0)
truth = cell.true_gradient()
baseline = advantages.make("reinforce", baseline=0.5)


def bias_and_variance(correction):
    """Exact, relative to the gradient's norm and to the on-policy variance."""
    estimate = moments(cell, correction, baseline, Grouping())
    on_policy = moments(cell.on_policy(), corrections.make("none"), baseline, Grouping())
    return float((estimate.mean - truth).norm() / truth.norm()), estimate.variance / on_policy.variance


figure, panel = plt.subplots(figsize=(5, 3.2), layout="constrained")
caps = (0.5, 1, 2, 4, 8, 32)
panel.plot(*zip(*(bias_and_variance(corrections.make("soft-cap", cap=cap)) for cap in caps), strict=True), marker="o")
for name in ("none", "token-is", "truncated-is", "sequence-is"):
    bias, variance = bias_and_variance(corrections.make(name))
    panel.plot(bias, variance, "s")
    panel.annotate(name, (bias, variance), xytext=(5, 3), textcoords="offset points", fontsize="small")
panel.set(xlabel="relative bias", ylabel="variance / on-policy", title="soft-cap at caps 0.5 to 32")
# %% [markdown]
# The lab ranks estimators for one step at short horizons; it does not predict accuracy. To have it on every command
# line, put the class into a package with an entry point of the group `nested_reft`.

# %%
assert not any(check(corrections.make("soft-cap")).values())
assert relative_bias(corrections.make("sequence-is")) < 1e-10 < relative_bias(corrections.make("soft-cap"))
