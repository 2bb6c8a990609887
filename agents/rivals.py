"""Rivals: what others do for cheaper or better rollouts, each a recipe of the components that ``reft`` has.

An id sets components and their fields; whatever is set beside it wins. What a docstring calls a reading is settled by
no source. ``sampler`` and ``rollout_dtype`` combine with all of them: ``--agent remix --set sampler=uniform``.
"""

from __future__ import annotations

from agents.reft import ReFT
from registry import agents


@agents.register(
    "reft-original",
    fixed={
        "correction": "ppo-clip",
        "reward": "partial",
        "anchor": {"id": "kl", "beta": 0.05, "estimator": "k1", "place": "reward"},
        "epochs": 2,
    },
)
class OriginalReFT(ReFT):
    """ReFT's own reward of 1, .1 or 0 less a KL to the start, two updates a rollout (arXiv 2401.08967).

    The paper's: reward, KL inside the reward, clip and epochs. Ours: group-relative advantages for its value head,
    which ``sb3-ppo`` has.

    Use: to hold ``reft`` against the reward and the penalty of the first paper.
    """


@agents.register(
    "remix",
    fixed={
        "correction": "mix-ppo",
        "batch": {"id": "replay", "share": 0.4, "window": 2, "until": 50},
        "anchor": {"id": "kl-convex", "beta": 0.01, "restart": 50},
        "epochs": 2,
    },
)
class ReMix(ReFT):
    """ReMix: replay with its own clip, KL-Convex, and a reincarnation that ends both (arXiv 2507.06892).

    The paper's: p, N, two updates a batch, the clip, the shape of KL-Convex. Readings: beta, its estimator, and
    iteration 50 for the reincarnation, which the paper has midway.

    Use: where writing takes most of an iteration.
    """


@agents.register("chord", fixed={"correction": "truncated-is*ppo-clip", "batch": {"id": "expert", "weight": 0.1}})
class CHORD(ReFT):
    """CHORD-phi: a tenth of the loss is of worked solutions, by p (1 - p) of each token (arXiv 2508.11408).

    The paper's: the weights of tokens and a constant share of .05 to .2; ``batch.warmup`` and ``batch.decay`` make
    CHORD-mu of it. Reading: 32 solutions an iteration.

    Use: where worked solutions exist and rewards are rare at first.
    """


@agents.register(
    "r3",
    fixed={
        "correction": "truncated-is*ppo-clip",
        "batch": {"id": "contrast", "answers": 2, "scale": 1.0},
        "reward": "entropy-rank",
    },
)
class R3(ReFT):
    """R^3: stored answers join groups without signal, and entropies rank truncated ones (arXiv 2601.19620).

    Left out: its reflection prompts, a second prompt with a stored wrong answer for problems of low reward. Readings:
    k, alpha, R_max, p, and the correction of stored completions.

    Use: with a finite set of problems, many of which are never or always solved.
    """


@agents.register(
    "upft",
    fixed={
        "correction": {"id": "first-tokens", "tokens": 8, "whole": 10},
        "advantage": "unlabelled",
        "group_size": 1,
        "problems_per_batch": 256,
        "epochs": 2,
    },
)
class UPFT(ReFT):
    """UPFT: a supervised loss on the first tokens of unlabelled completions, one a problem (arXiv 2503.02875).

    The paper's: k, no labels, one sample. Readings: a tenth of whole traces, sampling anew in every iteration, and two
    epochs, of which the first has no gradient but chance. Completions are written to their end all the same, so that
    what the paper saves in tokens is not saved here.

    Use: where no answers are known.
    """


@agents.register(
    "reval",
    fixed={
        "correction": "none",
        "advantage": "dr-grpo",
        "aggregation": "constant",
        "anchor": {"id": "kl", "beta": 0.02, "estimator": "k1", "place": "reward", "every": 200},
        "batch": {"id": "replay", "share": 0.5, "window": 20, "by": "group"},
    },
)
class ReVal(ReFT):
    """ReVal: squared errors of r / beta against log pi / ref over fresh and stored completions (arXiv 2603.23355).

    With d = sum log pi / ref - r / beta less its group's mean, the gradient of d^2 is W A = -2 d: an advantage of
    reward less KL, centred and without a ratio to mu, which a squared error needs none of. The paper's: beta, the reset
    of the reference, half of a batch replayed, 5,120 stored (of 256 an iteration, 20). Left out: its value term, a
    log-partition at the first position whose gradient is none of a log-probability; the group's mean stands for it.

    Use: to hold off-policy learning without ratios against corrections.
    """


@agents.register("drer", fixed={"correction": "ppo-clip", "reward": "reasoning-gain"})
class DRER(ReFT):
    """DRER: adds how much the reasoning raises the likelihood of the right answer (arXiv 2509.06024).

    The paper's: the reward. Left out: its decay of advantages by length. Readings:
    ``agents.objective.rewards.ReasoningGain``.

    Use: where solutions show their reasoning, and verdicts alone teach too little.
    """


@agents.register("mopps", fixed={"correction": "ppo-clip", "problem_sampler": "curriculum"})
class MoPPS(ReFT):
    """MoPPS: problems that the policy likely solves half of the time, by Thompson sampling (arXiv 2507.04632).

    Use: where most problems are too easy or too hard.
    """
