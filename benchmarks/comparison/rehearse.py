"""What can be seen to be wrong before the first run of a comparison starts, without loading weights or data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agents.arguments import check_device
from benchmarks.comparison.grid import Arm
from benchmarks.experiment.spec import RunSpec, agent_arguments
from envs.problems.sources import KNOWN
from envs.templates import template
from policies.pretrained.load import load_config
from registry import UsageError, did_you_mean, skip_samplers


def rehearse(arms: Sequence[Arm], here: bool) -> None:
    """Raise UsageError for a run that would fail at its start: no such model, template, problem set or device, or a
    skip ratio that leaves no layer. ``here``: the runs will be on this machine."""
    layers: dict[str, int] = {}
    for arm in arms:
        spec = arm.specs[0]
        _check_task(spec)
        if here:
            check_device(spec.device)
        if spec.policy not in layers and (here or Path(spec.policy).is_dir()):
            layers[spec.policy] = load_config(spec.policy).num_hidden_layers
        if "sampler" in spec.agent and spec.policy in layers:
            _, arguments = agent_arguments(spec.agent)
            skip_samplers.build(arguments["sampler"]).check(layers[spec.policy])


def _check_task(spec: RunSpec) -> None:
    template(spec.env["template"])
    for name in (spec.env["problems"], *spec.evaluated.sets, spec.evaluated.source):
        if name is not None:
            _check_problems(name)


def _check_problems(name: str) -> None:
    """A bare word has to be a set that is known, or a path."""
    if name in KNOWN or name == "arithmetic" or "/" in name or ":" in name or Path(name).exists():
        return
    raise UsageError(f"unknown problem set {name!r}: {did_you_mean(name, [*KNOWN, 'arithmetic'])}")
