"""Language-model policies: a target, its nested (layer-subset) behaviours, and the samplers of layer subsets.

    policy = Policy.load("tiny")
    layers = skip_samplers.make("uniform", ratio=0.15).sample(policy.num_layers, rng)
    behavior = policy.nested(layers, slots=64, max_length=256)
    tokens, logp = behavior.act(obs, start, episode)
    logp = policy.logprobs(prompts, tokens, mask)

Importing this package registers the skip samplers; transformers is imported only when a policy is loaded.
"""

from policies.behavior import Behavior
from policies.budget import BudgetAllowsNothing, BudgetSkip
from policies.divergence import Length
from policies.measured import AttentionOnly, BlockInfluence, LowestKL, MLPOnly, SoftmaxSkip
from policies.patched import Nested, PatchedSubset, with_int8
from policies.patches import Absorb, Heal, NoPatch
from policies.policy import Policy
from policies.probe import Probe
from policies.samplers import EarlyExit, EvenSkip, FixedSkip, FullDepth, MiddleSkip, UniformSkip
from policies.subset import LayerSubset, check_subset

__all__ = [
    "Absorb",
    "AttentionOnly",
    "Behavior",
    "BlockInfluence",
    "BudgetAllowsNothing",
    "BudgetSkip",
    "EarlyExit",
    "EvenSkip",
    "FixedSkip",
    "FullDepth",
    "Heal",
    "LayerSubset",
    "Length",
    "LowestKL",
    "MLPOnly",
    "MiddleSkip",
    "Nested",
    "NoPatch",
    "PatchedSubset",
    "Policy",
    "Probe",
    "SoftmaxSkip",
    "UniformSkip",
    "check_subset",
    "with_int8",
]
