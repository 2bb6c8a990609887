# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Reading a comparison
#
# `python -m benchmarks.compare` leaves a report and `outcomes.json`: what every arm's models answered, by seed and
# question. This reads the committed file of the default comparison, three seeds and their held-out questions, and finds
# the report's figures in it.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.comparison.differences import against, among_all
from benchmarks.comparison.stored import read
from benchmarks.measuring.statistics import Components, mean_interval

root = next(folder for folder in Path.cwd().resolve().parents if (folder / "benchmarks" / "results").is_dir())
stored = read([root / "benchmarks/results/smoke/outcomes.json"])
arms = {arm.label: arm for arm in stored.arms}
print(stored.task, "-", ", ".join(arms))

# %% [markdown]
# ## 1. Did anything learn?
#
# Thin lines are runs, thick ones their mean. The control, `reft` with a coin for a reward, must stay where it was.

# %%
figure, panel = plt.subplots(figsize=(7, 3.2), layout="constrained")
for number, arm in enumerate(arms.values()):
    for run in arm.runs:
        panel.plot(run.spent("iteration"), 100 * np.array(run.greedy), color=f"C{number}", alpha=0.3, linewidth=0.8)
    mean = 100 * np.mean([run.greedy for run in arm.runs], axis=0)
    panel.plot(arm.runs[0].spent("iteration"), mean, color=f"C{number}", linewidth=2, label=arm.label)
panel.set(xlabel="iteration", ylabel="held-out accuracy, %")
panel.legend(frameon=False, fontsize="small")
# %% [markdown]
# ## 2. The data are questions by seeds
#
# White: right; below, what the second arm of the report has over `reft`. Rows are seeds, columns questions in the
# order of how often they are solved. Most questions are solved by all seeds or by none, so seeds times questions are
# far from as many independent answers.

# %%
one, other = stored.arms[:2]
order = np.argsort(one.ends(-1).mean(0) + other.ends(-1).mean(0))
figure, panels = plt.subplots(3, 1, figsize=(9, 3), layout="constrained", sharex=True)
for panel, (title, table) in zip(
    panels,
    {"reft": one.ends(-1), "other": other.ends(-1), "difference": other.ends(-1) - one.ends(-1)}.items(),
    strict=True,
):
    panel.imshow(
        table[:, order], aspect="auto", cmap="RdBu" if title == "difference" else "gray", interpolation="nearest"
    )
    panel.set(yticks=[], ylabel=title)
panels[-1].set_xlabel("question")
# %% [markdown]
# ## 3. So the error has parts
#
# Where the variance of one outcome comes from. Pairing takes the questions' part away, which is why the difference of
# two arms is known far better than either's accuracy.

# %%
parts = {"reft": Components.of(one.ends(-1)), "difference": Components.of(other.ends(-1) - one.ends(-1))}
figure, panel = plt.subplots(figsize=(6, 2), layout="constrained")
left = np.zeros(len(parts))
for name in ("seeds", "questions", "rest"):
    width = np.array([getattr(part, name) for part in parts.values()])
    panel.barh(list(parts), width, left=left, label=name)
    left += width
panel.set_xlabel("variance of an outcome")
panel.legend(frameon=False)
# %% [markdown]
# ## 4. What may be concluded
#
# Each bar is a 95 % interval of the paired difference at equal steps. An interval that holds zero says "not
# distinguishable"; *equivalent* is a claim of its own, and needs the 90 % interval within the margin of two points.

# %%
pairs = among_all([against(arm, one) for label, arm in arms.items() if label != "reft"])
figure, panel = plt.subplots(figsize=(8, 2.4), layout="constrained")
for place, pair in enumerate(pairs):
    found = pair.at_equal["iteration"]
    value, low, high = (100 * figure for figure in found.difference)
    panel.plot([low, high], [place, place], color="black")
    panel.plot(value, place, "o", color="black")
    said = "equivalent" if found.equivalent else found.verdict_holm
    panel.annotate(f"  {said}", (high, place), va="center", fontsize="small")
panel.axvspan(-2, 2, color="tab:green", alpha=0.15)
panel.axvline(0, color="gray", linewidth=0.8)
panel.set(
    yticks=range(len(pairs)), yticklabels=[pair.label for pair in pairs], xlabel="points against reft", xlim=(-50, 14)
)
# %% [markdown]
# ## 5. What would more seeds tell?
#
# The half width of the interval by seeds, at today's variances: the plan that `--dry-run` prints.

# %%
seeds = np.arange(2, 17)
figure, panel = plt.subplots(figsize=(5, 2.6), layout="constrained")
for title, part in parts.items():
    panel.plot(
        seeds, [100 * part.half_width(int(count), order.size) for count in seeds], marker="o", markersize=3, label=title
    )
panel.set(xlabel="seeds", ylabel="half width, points", ylim=(0, None))
panel.legend(frameon=False)
# %%
report = json.loads((root / "benchmarks/results/smoke/results.json").read_text())["groups"][0]
gain = mean_interval(one.ends(-1) - one.ends(0))
assert np.allclose(gain, report["arms"][0]["gain"])  # the report's figures
assert np.allclose(pairs[0].at_equal["iteration"].difference, report["pairs"][0]["iteration"]["difference"])
