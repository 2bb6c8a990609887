"""Language-model policies: a target, its nested (layer-subset) behaviours, and the samplers of layer subsets.

    policy = Policy.load("tiny")
    layers = skip_samplers.make("uniform", ratio=0.15).sample(policy.num_layers, rng)
    behavior = policy.behavior(layers, slots=64, max_length=256)
    tokens, logp = behavior.act(obs, start, episode)
    logp = policy.logprobs(prompts, tokens, mask)

Importing this package registers the skip samplers; transformers is imported only when a policy is loaded.
"""

from policies.engine.behavior import Behavior
from policies.engine.drafts import Drafter, Lenience, StoredDrafts
from policies.nested import LayerSubset, Nested, PatchedSubset, check_subset, with_int8
from policies.policy import Policy
from policies.skipping.budget import BudgetAllowsNothing, BudgetSkip
from policies.skipping.by_score import AttentionOnly, BlockInfluence, LowestKL, MLPOnly, SoftmaxSkip
from policies.skipping.divergence import Length
from policies.skipping.patches import Absorb, Heal, NoPatch
from policies.skipping.probe import Probe
from policies.skipping.samplers import (
    EarlyExit,
    EvenSkip,
    FixedSkip,
    FullDepth,
    MiddleSkip,
    NestedDraft,
    SkipSampler,
    UniformSkip,
)

__all__ = [
    "Absorb",
    "AttentionOnly",
    "Behavior",
    "BlockInfluence",
    "BudgetAllowsNothing",
    "BudgetSkip",
    "Drafter",
    "EarlyExit",
    "EvenSkip",
    "FixedSkip",
    "FullDepth",
    "Heal",
    "LayerSubset",
    "Length",
    "Lenience",
    "LowestKL",
    "MLPOnly",
    "MiddleSkip",
    "Nested",
    "NestedDraft",
    "NoPatch",
    "PatchedSubset",
    "Policy",
    "Probe",
    "SkipSampler",
    "SoftmaxSkip",
    "StoredDrafts",
    "UniformSkip",
    "check_subset",
    "with_int8",
]
