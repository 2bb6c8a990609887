"""Writers beside the project's engine: completions that exist already, played as if they were being written, and a
vLLM that is transformers' own forward (``tests/oracles/slow_vllm``) behind the real process, files and agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.rollout import GroupMixture, Rollout, collect
from agents.writing import Deck, VLLMWriter, Written, episode_seed
from policies import Policy
from policies.vllm.engine import Engine
from registry import UsageError
from tests.oracles.policy_checkpoints import random_model
from tests.oracles.reft_agents import SKIP, CoinFlips, make, numbers, weights

SLOW = Path(__file__).resolve().parents[1] / "oracles" / "slow_vllm"
FEW = {"problems_per_batch": 2, "group_size": 2, "correction": "token-is", "sampler": SKIP}
LAYERS = (0, 3)


@pytest.fixture
def slow_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SLOW), os.environ.get("PYTHONPATH", "")]))


def same(ours: Rollout, theirs: Rollout) -> None:
    for name in ("tokens", "mask", "behavior_logp", "reward", "group"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.episodes == theirs.episodes


def written_of(rollout: Rollout, first: int) -> Written:
    prompts, length = np.array([len(prompt) for prompt in rollout.prompts]), rollout.mask.sum(1).numpy()
    return Written(first, prompts, length, rollout.tokens.numpy(), rollout.behavior_logp.numpy())


@pytest.mark.parametrize("slots", [1, 5, 16])
def test_played_completions_give_the_rollout_that_they_were(folder: str, slots: int) -> None:
    policy, envs, problems = Policy.load(folder, dtype="float32"), CoinFlips(6), [3, 1, 4]
    mu = policy.behavior((0, 1, 3), 6, envs.task.max_length, seed=5)
    wrote = collect(mu, envs, problems, 4, first_group=2)
    same(collect(written_of(wrote, first=8), CoinFlips(slots), problems, 4, first_group=2), wrote)


def test_the_parts_of_a_defensive_group_are_played_side_by_side(folder: str) -> None:
    policy, envs, problems = Policy.load(folder, dtype="float32"), CoinFlips(6), [3, 1, 4]
    deck = Deck(envs.task, 6, problems, 4, 0, range(4))
    nested, target = deck.shared(1)
    assert (*target.members, *nested.members) == tuple(range(4)) and target.by_target and not nested.by_target
    parts = [policy.behavior(layers, 6, envs.task.max_length, seed=5) for layers in ((0, 3), (0, 1, 2, 3))]
    wrote = collect(GroupMixture(*parts, group_size=4, target_written=1), envs, problems, 4)
    whole = written_of(wrote, first=0)
    same(collect(GroupMixture(whole, whole, group_size=4, target_written=1), CoinFlips(5), problems, 4), wrote)


def test_an_episode_that_outlasts_its_completion_is_an_error() -> None:
    one = np.array([[7, 8]])
    written = Written(first=4, prompt_length=np.array([3]), length=np.array([1]), tokens=one, logp=-one.astype("f"))
    obs = {"input_ids": np.zeros((2, 9), int), "length": np.array([[0], [3]])}
    start, episode = np.zeros(2, bool), np.array([-1, 4])
    tokens, logp = written.act(obs, start, episode)
    assert tokens.tolist() == [0, 7] and logp.tolist() == [0.0, -7.0]
    with pytest.raises(RuntimeError, match="episode 4 goes on"):
        written.act({**obs, "length": np.array([[0], [4]])}, start, episode)


def test_every_episode_has_a_seed_of_its_own() -> None:
    seeds = {episode_seed(seed, episode) for seed in range(20) for episode in range(50)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert episode_seed(3, 4) == episode_seed(3, 4) != episode_seed(4, 3)


def test_an_agent_learns_from_what_vllm_wrote(folder: str, slow_vllm: None) -> None:
    """Two iterations: log mu is that of the layers drawn and of the weights of the moment, the noise is float32's,
    and an equal agent repeats."""
    agent = make(folder, writer="vllm", **FEW)
    first, second = agent.iterate(), agent.iterate()
    agent.iteration = 0  # measured every tenth
    before = weights(agent)
    third = agent.iterate()
    assert not torch.equal(before, weights(agent))
    for metrics in (first, third):
        assert 0 <= metrics["behavior_noise_max"] < 1e-4 and "noise_max" not in metrics
        assert metrics["kl_k3"] > 100 * metrics["behavior_noise_kl"]
    again = make(folder, writer={"id": "vllm", "python": ""}, **FEW)
    assert numbers(again.iterate()) == numbers(first) and numbers(again.iterate()) == numbers(second)


def test_all_layers_by_vllm_are_the_control(folder: str, slow_vllm: None) -> None:
    metrics = make(folder, writer="vllm", **{**FEW, "sampler": "full"}).iterate()
    assert metrics["noise_max"] < 1e-4 and metrics["skip_ratio"] == 0 and "behavior_noise_max" not in metrics
    assert abs(metrics["kl_k1"]) < 1e-4


def test_defensive_groups_have_an_engine_for_each_part(folder: str, slow_vllm: None) -> None:
    agent = make(folder, writer="vllm", **{**FEW, "correction": "defensive"})
    agent.iterate()
    engines = agent.writing._engines  # type: ignore[attr-defined]
    assert {part: len(engine.shape.windows) for part, engine in engines.items()} == {False: 2, True: 4}


def test_an_engine_is_started_anew_for_more_layers_alone(folder: str, slow_vllm: None) -> None:
    policy = Policy.load(folder, dtype="float32")
    writing, envs = VLLMWriter().open(policy), CoinFlips(4)
    pids = []
    for layers in ((0, 1, 2, 3), (0, 2), (1, 3), (3,), (0, 1, 2), (0, "1.mlp", 3)):
        deck = Deck(envs.task, 4, [1], 4, 0, range(4))
        rollout = collect(writing.behavior(layers, 0, deck), envs, [1], 4)
        pids.append(writing._engines[False]._process.pid)  # type: ignore[attr-defined]
        with torch.no_grad():
            ours = policy.logprobs(rollout.prompts, rollout.tokens, rollout.mask, layers=layers)
        assert float((ours - rollout.behavior_logp)[rollout.mask].abs().max()) < 1e-4
    assert [a == b for a, b in pairwise(pids)] == [False, True, True, False, True]


def test_another_model_is_refused(folder: str, slow_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW_VLLM", "deaf")  # to new weights
    policy, envs = Policy.load(folder, dtype="float32"), CoinFlips(4)
    writing, deck = VLLMWriter().open(policy), Deck(envs.task, 4, [1], 4, 0, range(4))
    writing.behavior(LAYERS, 0, deck)
    with pytest.raises(UsageError, match=r"vLLM computes another model: .* nats a token; use writer='own'"):
        writing.behavior((0, 1), 0, deck)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("old", r"writer=vllm needs vLLM 0.32 or newer in .* \(vLLM is 0.20.0\): pip install"),
        ("memory", r"no memory for the keys and values of 16 slots of \d+ tokens .* take fewer slots, or lower"),
        ("killed", r"the vLLM process has ended \(signal SIGKILL.*the same command goes on from the last checkpoint"),
    ],
)
def test_what_fails_is_one_line(
    fails: str, message: str, folder: str, slow_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_VLLM", fails)
    with pytest.raises(UsageError, match=message) as raised:
        make(folder, writer="vllm", **FEW).iterate()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("no/such/python", r"writer.python='no/such/python' cannot be started \(No such file or directory\)"),
        ("/bin/false", r"writer.python='/bin/false' cannot be started \(status 1\)"),
        (sys.executable, r"writer=vllm needs vLLM 0.32 or newer in .*No module named 'vllm'"),
    ],
)
def test_an_interpreter_without_vllm_is_named(python: str, message: str, folder: str) -> None:
    if python == sys.executable and subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode == 0:
        pytest.skip("this environment has vLLM")
    with pytest.raises(UsageError, match=message):
        make(folder, writer={"id": "vllm", "python": python}, **FEW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rollout_dtype": "int8"}, "rollout_dtype=int8 is of the project's own engine"),
        (
            {"correction": "defensive", "writer": {"id": "vllm", "quantization": "fp8"}},
            "writer.quantization='fp8' with target_written=1",
        ),
        ({"writer": "vlm"}, "unknown rollout writer 'vlm': did you mean 'vllm'"),
    ],
)
def test_what_vllm_cannot_write_is_refused_before_anything_runs(
    arguments: dict[str, Any], message: str, folder: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make(folder, **{**FEW, "writer": "vllm", **arguments})


def test_patches_need_biases_that_vllm_has() -> None:
    with pytest.raises(UsageError, match="vLLM's qwen3 has none"):
        make(Policy(random_model("qwen3", vocab_size=512, head_dim=32)), patch="absorb", writer="vllm", **FEW)  # type: ignore[arg-type]


def test_the_process_leaves_with_the_one_that_started_it(folder: str, slow_vllm: None) -> None:
    """Killed, so that nothing of its own end runs; the folder goes, too."""
    text = f"""
import sys
from policies import Policy
from policies.vllm.engine import Engine
engine = Engine(Policy.load({folder!r}, dtype="float32"), (0, 1), 2, 8)
print(engine._process.pid, engine._folder, flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", text], **pipes) as parent:  # type: ignore[call-overload]
        pid, where = parent.stdout.readline().split()
        assert Path(where).is_dir()
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 30
    while Path(where).exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(where).exists()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_an_engine_that_is_dropped_ends(folder: str, slow_vllm: None) -> None:
    engine = Engine(Policy.load(folder, dtype="float32"), (0, 1), 2, 8)
    process, where = engine._process, engine._folder
    del engine
    assert process.poll() is not None and not where.exists()
