"""What agents and components are given, value by value: such a number as the annotation says, or refused in one line
that names it."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import registry
from agents import SB3PPO, SFT, ReFT
from agents.arguments import settle_device
from agents.trl_grpo import TRLGRPO
from policies import Policy
from registry import Registry, UsageError, corrections, fields_of

NONSENSE = [-1, -0.5, 0.5, math.nan, math.inf, -math.inf, "x", "1", None, True, 2**70, [1], object()]
NUMBERS: dict[Any, tuple[type, ...]] = {
    int: (int, np.integer),
    float: (int, float, np.integer, np.floating),
    bool: (bool,),
    int | None: (int, type(None)),
    float | None: (int, float, type(None)),
}
AGENTS = [ReFT, SFT, SB3PPO, TRLGRPO]
COMPONENTS = [
    registry.skip_samplers,
    registry.patches,
    registry.corrections,
    registry.advantages,
    registry.aggregations,
    registry.problem_samplers,
    registry.schedules,
    registry.anchors,
    registry.batches,
    registry.rewards,
    registry.reward_parts,
]


def is_of(value: Any, kind: Any) -> bool:
    """By the annotation alone: a bool is no number, NaN none either."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, NUMBERS[kind]) and not (isinstance(value, float) and math.isnan(value))


@pytest.mark.parametrize("agent", AGENTS)
def test_a_number_of_an_agent_is_one_or_is_refused_by_name(agent: type) -> None:
    numeric = {name: field for name, field in fields_of(agent).items() if field.type in NUMBERS}
    assert {"weight_decay", "max_grad_norm", "lora_rank"} & set(numeric)
    for name, field in numeric.items():
        for value in NONSENSE:
            is_nonsense = not is_of(value, field.type) or (value == math.inf and name != "max_grad_norm")
            below = isinstance(value, int | float) and value < 0 and name != "verbose"
            if is_nonsense or below:
                with pytest.raises(UsageError, match=name):
                    agent("tiny", "MathReason-v0", **{name: value}, _init_setup_model=False)


@pytest.mark.parametrize("components", COMPONENTS, ids=lambda components: components.kind)
def test_a_number_of_a_component_is_one_or_is_refused_by_name(components: Registry) -> None:
    tried = 0
    for id in components.ids():
        if "*" in id:
            continue
        for name, field in components.fields(id).items():
            for value in NONSENSE if field.type in NUMBERS else ():
                if not is_of(value, field.type):
                    with pytest.raises(UsageError, match=name):
                        components.make(id, **{name: value})
                    tried += 1
    assert tried or components is registry.advantages


def test_numpy_numbers_are_numbers() -> None:
    sampler = registry.skip_samplers.make("uniform", ratio=np.float32(0.25), border=np.int64(1))
    assert sampler.sample(8, np.random.default_rng(0)) == registry.skip_samplers.make("uniform", ratio=0.25).sample(
        8, np.random.default_rng(0)
    )
    assert ReFT("tiny", group_size=np.int64(2), weight_decay=np.float64(0.1), slots=2).group_size == 2


@pytest.mark.parametrize("name", ["learning_rate", "clip_range"])
@pytest.mark.parametrize("later", [math.nan, math.inf, None])
def test_schedules_are_asked_before_every_update(name: str, later: Any) -> None:
    schedule = {name: lambda remaining: 1e-3 if remaining == 1 else later}
    agent = SB3PPO("tiny", n_steps=40, batch_size=80, slots=2, **schedule)
    before = [parameter.clone() for parameter in agent.policy.parameters()]
    agent._current_progress_remaining = 0.5
    with pytest.raises(UsageError, match=f"{name}.*0.5"):
        agent.train()
    assert all(map(lambda old, new: bool((old == new).all()), before, agent.policy.parameters()))
    with pytest.raises(UsageError, match=name):
        SB3PPO("tiny", n_steps=40, batch_size=80, slots=2, **{name: lambda remaining: later})


def test_what_a_policy_has_already_is_not_dropped() -> None:
    policy = Policy.load("tiny")
    assert ReFT(policy, dtype="float32", slots=2).target is policy
    with pytest.raises(UsageError, match=r"dtype='bfloat16'.*float32"):
        ReFT(policy, dtype="bfloat16", slots=2)
    with pytest.raises(UsageError, match=r"rank=193.*192"):
        ReFT("tiny", lora_rank=193, slots=2)


@pytest.fixture(scope="module")
def agent() -> ReFT:
    return ReFT("tiny", slots=2)


def test_an_agent_is_saved_or_the_path_is_named(agent: ReFT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    kept = tmp_path / "papers"
    kept.mkdir()
    (kept / "thesis.tex").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    bad = ["", ".", "..", "/", tmp_path / "file" / "m", kept, "a\0b", "x" * 300, "/proc/m", None, 3]
    for path in bad:
        with pytest.raises(UsageError, match="cannot be saved"):
            agent.save(path)
    assert (kept / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "papers", "empty"}
    agent.save(tmp_path / "empty")
    agent.save(tmp_path / "empty")  # over itself
    assert ReFT.load(tmp_path / "empty").num_timesteps == 0


@pytest.mark.parametrize("act", [copy.deepcopy, copy.copy, pickle.dumps])
def test_an_agent_is_neither_copied_nor_pickled(agent: ReFT, act: Any) -> None:
    with pytest.raises(UsageError, match=r"agent\.save"):
        act(agent)


def test_an_agent_computes_where_the_policy_given_is(monkeypatch) -> None:
    """Not where its default says: micro-batches and memory are those of that device."""
    policy = Policy.load("tiny")
    monkeypatch.setattr(Policy, "device", property(lambda self: torch.device("cuda:1")))
    assert [settle_device(policy, given) for given in ("cpu", "cuda", "cuda:1")] == ["cuda:1"] * 3
    with pytest.raises(UsageError, match=r"device='cuda:0', but the policy given is on cuda:1: leave device out"):
        settle_device(policy, "cuda:0")
    assert settle_device("tiny", "cuda:0") == "cuda:0"


SMALL: dict[str, Any] = {"group_size": 4, "problems_per_batch": 4, "slots": 4}


class OfNumpy:
    """A correction that forgets that weights are tensors."""

    def __call__(self, logp: Any, rollout: Any, advantage: Any) -> Any:
        return np.ones(logp.shape)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"advantage": lambda reward, group: torch.ones(1)}, r"shape \(1,\).*\[16\]"),  # would be broadcast
        ({"advantage": lambda reward, group: reward.mean()}, r"shape \(\).*\[16\]"),
        ({"advantage": lambda reward, group: np.ones(16)}, r"a ndarray.*\[16\]"),
        ({"reward": lambda batch, task, update: [1.0] * 16}, r"a list.*\[16\]"),
        ({"reward": lambda batch, task, update: torch.ones(16, 1)}, r"shape \(16, 1\).*\[16\]"),
        ({"correction": OfNumpy()}, r"a ndarray; return a tensor \[B, T\]"),
    ],
)
def test_a_component_gives_a_number_for_each_completion_or_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ReFT("tiny", "MathReason-v0", **given, **SMALL).iterate()


def test_what_is_no_policy_and_no_environment_of_ours_is_said() -> None:
    with pytest.raises(UsageError, match="neither a name nor a Policy"):
        ReFT(torch.nn.Linear(2, 2), "MathReason-v0", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'CartPole-v1' is no id of a MathReason environment"):
        ReFT("tiny", "CartPole-v1", **SMALL)


@pytest.mark.parametrize("name", ["consistency", "target_written"])
def test_what_has_no_effect_beside_a_target_that_writes_is_warned_of(name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name}=1 has no effect"):
        ReFT("tiny", "MathReason-v0", **{name: 1}, **SMALL)


def test_what_is_set_on_an_agent_counts_from_its_next_iteration_on() -> None:
    agent = ReFT("tiny", "MathReason-v0", learning_rate=1e-3, **SMALL)
    other = ReFT(agent.target, "MathReason-v0", temperature=1.5, **SMALL)  # of one policy, which has one temperature
    agent.iterate()
    assert agent.target.temperature == 1.0
    other.iterate()
    assert agent.target.temperature == 1.5
    agent.temperature, agent.learning_rate, agent.minibatches, agent.max_grad_norm = 0.5, 1e-4, 2, 0.1
    metrics = agent.iterate()
    assert metrics["learning_rate"] == 1e-4 and agent.update.minibatches == 2
    assert agent.target.temperature == 0.5 and agent.update.max_grad_norm == 0.1
    for name, value in (("entropy_bonus", -1.0), ("epochs", 0), ("max_grad_norm", math.nan), ("consistency", -1.0)):
        before = getattr(agent, name)
        with pytest.raises(UsageError, match=name):
            setattr(agent, name, value)
        assert getattr(agent, name) == getattr(agent.update, name) == before
    agent.update.entropy_bonus = 0.01  # of one owner
    agent.correction = corrections.make("retrace")
    assert agent.entropy_bonus == 0.01 and agent.update.correction is agent.correction
    agent.iterate()
