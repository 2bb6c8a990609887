"""The examples in docstrings run, as they stand there."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "agents.reft",
    "envs",
    "envs.math_reason",
    "envs.problem",
    "envs.problems.load",
    "envs.shaping",
    "envs.templates",
    "envs.text_math_reason",
    "envs.verifier.verdicts",
    "integrations",
    "integrations.trl",
    "policies.nested",
    "policies.policy",
    "policies.skipping.samplers",
    "registry.registry",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert attempted > 0 and failed == 0
