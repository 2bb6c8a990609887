"""What can be seen to be wrong before the first run of a comparison starts, without loading weights or data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agents.arguments import check_device
from benchmarks.comparison.grid import Arm
from benchmarks.experiment.spec import RunSpec, agent_arguments
from envs.problems import check_source
from policies.pretrained.load import load_config, locate
from registry import skip_samplers, templates


def rehearse(arms: Sequence[Arm], here: bool, hub: bool = True) -> None:
    """Raise UsageError for a run that would fail at its start: no such model, template, problem set or device, or a
    skip ratio that leaves no layer. ``here``: runs will be on this machine; ``hub``: models are looked for there."""
    layers: dict[str, int] = {}
    for arm in arms:
        spec = arm.specs[0]
        check_task(spec, here)
        if here:
            check_device(spec.device)
        source = locate(spec.policy) if here else spec.policy
        if source not in layers and ((here and hub) or Path(source).is_dir()):
            layers[source] = load_config(source).num_hidden_layers
        if "sampler" in spec.agent and source in layers:
            _, arguments = agent_arguments(spec.agent)
            skip_samplers.build(arguments["sampler"]).check(layers[source])


def check_task(spec: RunSpec, here: bool) -> None:
    """Raise UsageError for a template or a problem set that is not there."""
    templates.check(spec.env["template"])
    check_source(spec.env["problems"], spec.env["problem_options"], here)
    for name in (*spec.evaluated.sets, spec.evaluated.source):
        if name is not None:
            check_source(name, spec.evaluated.problem_options.get(name), here)
