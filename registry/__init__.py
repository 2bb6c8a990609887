"""Names -> components.

A component is its own configuration: a frozen dataclass (or a class with an annotated ``__init__``) whose fields are
its hyper-parameters. Registering it makes it reachable by id, on every command line, in every comparison and in the
contract tests.

    from dataclasses import dataclass
    from registry import corrections

    @corrections.register("half-is")
    @dataclass(frozen=True)
    class HalfIS:
        power: float = 0.5
        def __call__(self, logp, rollout, advantage): ...

    corrections.make("half-is", power=0.25)

Third parties are found through one entry-point group, ``nested_reft``: each entry point names a module whose import
registers components.
"""

from registry.errors import UnknownField, UnknownName, UsageError, WrongType, did_you_mean
from registry.fields import Field, check_at_least, check_number, fields_of, parse_value
from registry.registry import ENTRY_POINT_GROUP, Registry

corrections: Registry = Registry("correction", product=True)
advantages: Registry = Registry("advantage")
aggregations: Registry = Registry("aggregation")
skip_samplers: Registry = Registry("skip sampler")
problem_samplers: Registry = Registry("problem sampler")
patches: Registry = Registry("patch")
anchors: Registry = Registry("anchor")
batches: Registry = Registry("batch source", product=True)
rewards: Registry = Registry("reward")
schedules: Registry = Registry("learning-rate schedule")
writers: Registry = Registry("rollout writer")
agents: Registry = Registry("agent")
problem_sources: Registry = Registry("problem source")
templates: Registry = Registry("template")
reward_parts: Registry = Registry("reward part")

__all__ = [
    "ENTRY_POINT_GROUP",
    "Field",
    "Registry",
    "UnknownField",
    "UnknownName",
    "UsageError",
    "WrongType",
    "advantages",
    "agents",
    "aggregations",
    "anchors",
    "batches",
    "check_at_least",
    "check_number",
    "corrections",
    "did_you_mean",
    "fields_of",
    "parse_value",
    "patches",
    "problem_samplers",
    "problem_sources",
    "reward_parts",
    "rewards",
    "schedules",
    "skip_samplers",
    "templates",
    "writers",
]
