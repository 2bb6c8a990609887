"""What can be seen to be wrong before the first run of a comparison starts, without loading weights or data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from agents.environments import slots_of
from agents.trl_grpo import TRLGRPO, check_trl
from benchmarks.comparison.arms import Arm
from benchmarks.experiment.spec import RunSpec, agent_arguments
from benchmarks.experiment.training import make_envs
from envs.problems import check_source, load_problems
from policies.dtype import AUTO, available_device, settle_dtype
from policies.policy import numbered_layers
from policies.pretrained.adapters import check_peft
from policies.pretrained.architecture import read_architecture
from policies.pretrained.load import BUILT_IN, load_config, locate
from registry import skip_samplers, templates, writers

GENERATED = "arithmetic"
LONGEST_PROMPT = 4096  # of a generated problem under any template


def rehearse(arms: Sequence[Arm], here: bool, hub: bool = True) -> None:
    """Raise UsageError for a run that would fail at its start: no such model, template, problem set or device, a
    package that is not installed, a skip ratio that leaves no layer, or layers to train that the model has not.
    ``here``: runs will be on this machine; ``hub``: models are looked for there."""
    for arm in arms:
        rehearse_run(arm.specs[0], here, hub)


def rehearse_run(spec: RunSpec, here: bool = True, hub: bool = True) -> None:
    """``rehearse`` of one run."""
    check_task(spec, here)
    check_arguments(spec, here and hub)
    if here:
        check_installed(spec, available_device(spec.device))
    source = locate(spec.policy) if here else spec.policy
    if (here and hub) or Path(source).is_dir():
        layers = load_config(source).num_hidden_layers
        _, arguments = agent_arguments(spec.agent)
        if "sampler" in arguments:
            skip_samplers.build(arguments["sampler"]).check(layers)
        if arguments.get("trained_layers") is not None:
            numbered_layers(arguments["trained_layers"], layers)


def check_installed(spec: RunSpec, device: torch.device) -> None:
    """Raise UsageError for a package that the run needs and the project does not, where this machine lacks it."""
    component, arguments = agent_arguments(spec.agent)
    if arguments.get("lora_rank"):
        check_peft()
    if component is TRLGRPO:
        check_trl()
    if "writer" in arguments:
        writers.build(arguments["writer"]).check_installed(device)


def check_arguments(spec: RunSpec, hub: bool = True) -> None:
    """Raise UsageError for an argument that the run's agent or environment refuses, without loading weights or data:
    the agent is made without a model, in an environment of one slot whose problems are generated. ``hub``: a model's
    config and tokenizer are looked for there."""
    component, arguments = agent_arguments(spec.agent)
    if (dtype := arguments.get("dtype")) != AUTO:
        settle_dtype(dtype, spec.policy, spec.device)
    env = dict(spec.env)
    if env["problems"] != GENERATED:
        env |= {"problems": GENERATED, "split": "train", "problem_options": {}}
        env["max_prompt_tokens"] = max(LONGEST_PROMPT, env["max_prompt_tokens"]) if env["max_prompt_tokens"] > 0 else 0
    elif spec.evaluated.source is None:
        load_problems(GENERATED, spec.evaluated.split)
    if hub or spec.policy in BUILT_IN or Path(spec.policy).is_dir():
        config = load_config(spec.policy)
        longest = spec.env["max_prompt_tokens"] + spec.env["max_new_tokens"]
        read_architecture(config).check_length(longest, warn=False)
        if spec.policy not in BUILT_IN and env["tokenizer"] == spec.policy and env["vocab_size"] is None:
            env["vocab_size"] = int(config.vocab_size)
    if not hub and env["tokenizer"] != "builtin" and not Path(env["tokenizer"]).is_dir():
        env |= {"tokenizer": "builtin", "template": "plain", "vocab_size": None, "stop_token_ids": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will tell
        slots_of(env["id"], arguments.get("slots"), 1)
        envs = make_envs(env, {**arguments, "slots": 1})
        component(spec.policy, envs, **{**arguments, "slots": None}, seed=spec.seed, _init_setup_model=False)


def check_task(spec: RunSpec, here: bool) -> None:
    """Raise UsageError for a template or a problem set that is not there."""
    templates.check(spec.env["template"])
    check_source(spec.env["problems"], spec.env["problem_options"], here)
    for name in (*spec.evaluated.sets, spec.evaluated.source):
        if name is not None:
            check_source(name, spec.evaluated.problem_options.get(name), here)
