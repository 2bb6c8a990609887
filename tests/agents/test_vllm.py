"""The real vLLM as a writer: ``NESTED_REFT_VLLM=.venv-vllm/bin/python pytest -m vllm``. Each test starts engines, which
takes most of a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from agents.writing import episode_seed
from policies import LayerSubset, Nested, PatchedSubset, Policy
from policies.nested import Change
from policies.vllm.checkpoint import head_channels
from policies.vllm.engine import Engine, Request
from registry import UsageError
from tests.oracles.policy_checkpoints import random_model
from tests.oracles.reft_agents import make, numbers

PYTHON = os.environ.get("NESTED_REFT_VLLM", "")
NOISE = 1e-3  # nats of one token, float32


def works() -> str:
    """What keeps vLLM from being imported, if anything does."""
    done = subprocess.run([PYTHON or sys.executable, "-c", "import vllm"], capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    if missing := works():
        pytest.skip(f"no vLLM here ({missing}): set NESTED_REFT_VLLM to an interpreter that has it")


pytestmark = pytest.mark.vllm


def request(policy: Policy, completions: int = 24, length: int = 24, seed: int = 1) -> Request:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, policy.vocab_size, n) for n in rng.integers(1, 40, completions // 4)]
    seeds = [episode_seed(seed, n) for n in range(completions)]
    return Request(prompts, [n // 4 for n in range(completions)], seeds, policy.temperature, length, (0,))


Written = tuple[list[list[int]], list[list[float]]]


def written(policy: Policy, engine: Engine, nested: Nested) -> Written:
    """Completions, after a comparison of their log-probabilities with the policy's own."""
    asked = request(policy)
    engine.hold(nested)
    tokens, logp = engine.write(asked)
    longest = max(map(len, tokens))

    def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])

    mask = padded([[1] * len(row) for row in tokens]).bool()
    prompts = [torch.as_tensor(asked.prompts[n]) for n in asked.of]
    with torch.no_grad():
        ours = policy.logprobs(prompts, padded(tokens), mask, layers=nested)
    assert float((ours - padded(logp))[mask].abs().max()) < NOISE
    assert all(row[-1] == 0 or len(row) == asked.max_tokens for row in tokens)
    assert all(0 not in row[:-1] for row in tokens)
    return tokens, logp


def engine_of(policy: Policy, nested: Nested) -> Engine:
    return Engine(policy, nested, 24, 64, PYTHON)


def move(policy: Policy, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy.refresh()


def test_layers_and_weights_change_in_place() -> None:
    """And an engine that is started with them writes the same, to the bit: so a run that is killed repeats."""
    policy = Policy.load("tiny")
    subsets: list[LayerSubset] = [(0, 1, 2, 4, 7, 11), (0, 3, 5, 6, 9, 11), (0, "1.attention", "5.mlp", 11)]
    engine = engine_of(policy, subsets[0])
    first = [written(policy, engine, layers) for layers in subsets]
    assert first[0] != first[1] != first[2]
    assert written(policy, engine, subsets[0]) == first[0]
    policy.temperature = 0.7
    assert written(policy, engine, subsets[0]) != first[0]
    policy.temperature = 1.0
    move(policy, 0)
    moved = written(policy, engine, subsets[1])
    engine.close()
    assert written(policy, engine_of(policy, subsets[1]), subsets[1]) == moved


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
def test_every_family_is_the_same_model(family: str) -> None:
    policy = Policy(random_model(family, head_dim=32))
    engine = engine_of(policy, (0, 1, 2))
    for nested in ((0, 1, 2), (2, "3.mlp")) if family != "gemma3" else ((0, 1, 2), (0, "1.mlp", 2)):
        written(policy, engine, nested)
    move(policy, 1)
    written(policy, engine, (0, 1, 2))


def test_patches_are_written_by() -> None:
    policy, layers = Policy(random_model("qwen2", head_dim=32)), (0, 2)
    change = Change(0.1 * torch.randn(64, 128), 0.1 * torch.randn(64))
    nested = PatchedSubset(layers, {0: change})
    engine = engine_of(policy, nested)
    written(policy, engine, nested)
    written(policy, engine, layers)


def test_tokens_are_drawn_from_what_their_log_probabilities_say() -> None:
    """Mean log mu is minus the mean entropy; with another temperature, or a tail cut off, it would not be.
    The prompts are more than a step of vLLM takes."""
    policy = Policy.load("tiny")
    layers = tuple(range(policy.num_layers))
    asked = request(policy, completions=400, length=8)
    assert sum(len(asked.prompts[n]) for n in asked.of) > 4096
    engine = Engine(policy, layers, 400, 64, PYTHON)
    tokens, logp = engine.write(asked)
    longest = max(map(len, tokens))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens])
    mask = torch.tensor([[n < len(row) for n in range(longest)] for row in tokens])
    prompts = [torch.as_tensor(asked.prompts[n]) for n in asked.of]
    with torch.no_grad():
        _, entropy = policy.logprobs_and_entropies(prompts, padded, mask)
    gaps = [sum(row) + float(own[: len(row)].sum()) for row, own in zip(logp, entropy, strict=True)]
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / len(gaps) ** 0.5


def test_an_agent_trains_and_repeats() -> None:
    few = {"problems_per_batch": 4, "group_size": 4, "sampler": "even", "correction": "truncated-is"}
    runs = []
    for _ in range(2):
        agent = make("tiny", writer={"id": "vllm", "python": PYTHON}, learning_rate=1e-3, **few)
        runs.append([numbers(agent.iterate()) for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0]["behavior_noise_max"] < NOISE < runs[0][0]["kl_k3"]


def test_a_cache_that_memory_does_not_hold_is_one_line() -> None:
    """Of tens of thousands of slots: more than vLLM's steps have tokens if it is not told otherwise."""
    policy, longest = Policy.load("tiny"), 512
    a, memory = policy.architecture, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    a_slot = 2 * 2 * 4 * a.key_heads * head_channels(policy) * longest  # of two layers, keys and values, float32
    slots = 2 * memory // a_slot
    with pytest.raises(UsageError, match=f"no memory for the keys and values of {slots} slots"):
        Engine(policy, (0, 1), slots, longest, PYTHON)
