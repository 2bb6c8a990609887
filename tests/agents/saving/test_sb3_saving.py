"""Saving as stable-baselines3's users know it: what load restores, names, buffers, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoModelForCausalLM

from agents import SB3PPO, SFT, ReFT
from agents.saving.configuration import COMPONENTS, describe
from envs.shaping import ShapedRewardVector
from policies import Policy
from registry import UsageError, advantages, aggregations, corrections, problem_samplers, rewards, schedules
from tests.oracles.reft_agents import numbers
from tests.oracles.small_world import AGENTS, WRITERS, World, make_world, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=sorted(AGENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


GIVEN: dict[str, dict[str, Any]] = {
    "reft": {
        "learning_rate": 2e-3,
        "sampler": {"id": "fixed", "layers": (0,)},
        "correction": "truncated-is*ppo-clip",
        "advantage": "rloo",
        "aggregation": {"id": "constant", "max_tokens": 8},
        "problem_sampler": {"id": "curriculum", "target": 0.4},
        "epochs": 2,
        "temperature": 0.9,
        "consistency": 0.1,
        "weight_decay": 0.05,
        "max_grad_norm": 0.5,
        "rollout_dtype": "int8",
        "verbose": 0,
    },
    "sb3-ppo": {
        "learning_rate": 2e-3,
        "gamma": 0.9,
        "gae_lambda": 0.8,
        "clip_range": 0.3,
        "ent_coef": 0.01,
        "vf_coef": 0.2,
        "target_kl": 0.5,
        "detached_critic": False,
        "normalize_advantage": False,
    },
    "sft": {
        "learning_rate": 2e-3,
        "schedule": {"id": "linear", "warmup": 2, "iterations": 5},
        "problems": 7,
        "skip": 0.5,
        "weight_decay": 0.05,
        "max_grad_norm": 0.5,
        "gradient_checkpointing": True,
        "microbatch_tokens": 30,
    },
}


@dataclass(frozen=True)
class Mine:
    """A correction that no registry knows."""

    def __call__(self, logp: torch.Tensor, rollout: Any, advantage: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(logp)


def test_load_goes_on_with_everything_that_was_given(world: World, name: str, tmp_path: Path) -> None:
    """Without one argument: the numbers of the next iteration are those of the agent that was saved."""
    agent = world.agent(name, **GIVEN[name])
    agent.iterate()
    agent.save(tmp_path / "agent")
    loaded = AGENTS[name][0].load(tmp_path / "agent")
    for argument in GIVEN[name]:
        assert loaded.arguments[argument] == agent.arguments[argument], argument
    assert loaded.seed == 5 and loaded.n_envs == agent.n_envs
    assert loaded.envs.task.spec == agent.envs.task.spec
    assert numbers(loaded.iterate()) == numbers(agent.iterate())
    assert all(torch.equal(value, weights(agent)[key]) for key, value in weights(loaded).items())


def test_arguments_of_load_are_over_those_saved(world: World, name: str, tmp_path: Path) -> None:
    agent = world.agent(name)
    agent.max_grad_norm = 0.25  # changed since, as SB3's users do
    agent.save(tmp_path / "agent")
    loaded = AGENTS[name][0].load(tmp_path / "agent", learning_rate=1e-5, custom_objects={"max_grad_norm": 0.75})
    assert loaded.learning_rate == 1e-5 and loaded.max_grad_norm == 0.75
    assert AGENTS[name][0].load(tmp_path / "agent", slots=8).n_envs == 8
    assert AGENTS[name][0].load(tmp_path / "agent", world.vector(2)).max_grad_norm == 0.25
    for wrong, needle in (
        ({"learning_rat": 1}, "learning_rate"),
        ({"custom_objects": {"lr_schedule": abs}}, "lr_schedule"),
        ({"policy": "tiny"}, "leave policy out"),
    ):
        with pytest.raises(UsageError, match=needle):
            AGENTS[name][0].load(tmp_path / "agent", **wrong)


def test_weight_decay_given_to_load_decays(world: World, tmp_path: Path) -> None:
    agent = world.agent("reft", weight_decay=0.1)
    agent.iterate()
    agent.save(tmp_path / "agent")
    assert ReFT.load(tmp_path / "agent").optimizer.param_groups[0]["weight_decay"] == 0.1
    assert ReFT.load(tmp_path / "agent", weight_decay=0.0).optimizer.param_groups[0]["weight_decay"] == 0.0


def test_what_json_cannot_hold_is_asked_for(world: World, name: str, tmp_path: Path) -> None:
    cls = AGENTS[name][0]
    world.agent(name, learning_rate=LinearSchedule(1e-3, 0.0, 1.0)).save(tmp_path / "agent")
    with pytest.raises(UsageError, match=r"learning_rate.*LinearSchedule.*pass it"):
        cls.load(tmp_path / "agent")
    assert cls.load(tmp_path / "agent", learning_rate=1e-3).learning_rate == 1e-3
    agent = world.agent(name)
    agent.set_env(ShapedRewardVector(world.vector(), ["format"]))
    agent.save(tmp_path / "shaped")
    with pytest.raises(UsageError, match=r"ShapedRewardVector.*load\(path, env\)"):
        cls.load(tmp_path / "shaped")
    assert cls.load(tmp_path / "shaped", world.vector()).n_envs == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("correction", corrections.make("truncated-is", cap=1.5)),
        ("aggregation", aggregations.make("constant")),
        ("advantage", advantages.make("rloo")),
        ("schedule", schedules.make("linear", iterations=3)),
        ("reward", rewards.make("entropy-rank")),
        ("problem_sampler", problem_samplers.make("curriculum")),
        ("target_written", 2),
        ("consistency", 1.0),
        ("epochs", 2),
    ],
)
def test_what_was_set_on_an_agent_is_in_force_after_load(world: World, tmp_path: Path, name: str, value: Any) -> None:
    agent = world.agent("reft", sampler={"id": "fixed", "layers": (0,)}, correction="token-is", consistency=0.1)
    agent.iterate()
    setattr(agent, name, value)
    agent.save(tmp_path / "agent")
    loaded = ReFT.load(tmp_path / "agent")
    assert numbers(loaded.iterate()) == numbers(agent.iterate())
    assert all(torch.equal(one, weights(agent)[key]) for key, one in weights(loaded).items())


@pytest.mark.parametrize(("name", "value"), [("correction", Mine()), ("learning_rate", LinearSchedule(1e-3, 0.0, 1.0))])
def test_what_was_set_and_json_cannot_hold_is_asked_for(world: World, tmp_path: Path, name: str, value: Any) -> None:
    agent = world.agent("reft")
    setattr(agent, name, value)
    agent.save(tmp_path / "agent")
    with pytest.raises(UsageError, match=rf"{name}.*{type(value).__name__}.*pass it"):
        ReFT.load(tmp_path / "agent")


def test_numpys_numbers_are_stored_as_numbers(world: World, tmp_path: Path) -> None:
    venv = gym.make_vec("MathReason-v0", num_envs=4, **{**world.env, "max_new_tokens": np.int64(8)})
    kwargs = {"group_size": np.int64(2), "problems_per_batch": 2, "seed": np.int64(3), "temperature": np.float32(0.5)}
    agent = ReFT(world.model, venv, **kwargs)  # type: ignore[arg-type]
    agent.iterate()
    agent.save(tmp_path / "agent")
    loaded = ReFT.load(tmp_path / "agent")
    assert (loaded.group_size, loaded.seed, loaded.temperature) == (2, 3, 0.5)
    assert loaded.envs.task.spec.max_new_tokens == 8
    assert numbers(loaded.iterate()) == numbers(agent.iterate())


class WithOwnArgument(ReFT):
    def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra


def test_objects_are_stored_as_their_ids_and_unknown_ones_asked_for(world: World, tmp_path: Path) -> None:
    for registry in COMPONENTS.values():
        for id in registry:
            component = registry.make(id)
            described = json.loads(json.dumps(describe(component, registry)))
            assert type(registry.build(described)) is type(component), id
    product = corrections.make("truncated-is*ppo-clip", cap=3.0)
    assert corrections.build(describe(product, corrections)) == product
    world.agent("reft", correction=product).save(tmp_path / "known")
    assert ReFT.load(tmp_path / "known").correction == product
    world.agent("reft", correction=Mine()).save(tmp_path / "unknown")
    with pytest.raises(UsageError, match=r"correction \(Mine\(\)\)"):
        ReFT.load(tmp_path / "unknown")
    kwargs = {"group_size": 2, "problems_per_batch": 2, "extra": 7}
    WithOwnArgument(world.model, world.vector(), **kwargs).save(tmp_path / "own")
    assert WithOwnArgument.load(tmp_path / "own").extra == 7


def test_a_policy_object_brings_what_load_goes_on_with(world: World, tmp_path: Path) -> None:
    agent = world.agent("reft", Policy.load(world.model, dtype="bfloat16"))
    agent.save(tmp_path / "agent")
    assert ReFT.load(tmp_path / "agent").target.dtype is torch.bfloat16


@pytest.mark.filterwarnings("ignore:the budget of D")
def test_a_learned_state_without_a_taker_is_refused(world: World, tmp_path: Path) -> None:
    agent = world.agent("reft", sampler="budget", problem_sampler="curriculum", patch="absorb", correction="tempered")
    agent.iterate()
    agent.save(tmp_path / "agent")
    assert numbers(ReFT.load(tmp_path / "agent").iterate()) == numbers(agent.iterate())
    for other, needle in (
        ({"sampler": "full"}, "sampler=FullDepth"),
        ({"sampler": "lowest-kl"}, "sampler=LowestKL"),
        ({"problem_sampler": "uniform"}, "problem_sampler=Uniform"),
        ({"patch": "none"}, "patch="),
    ):
        with pytest.raises(UsageError, match=needle):
            ReFT.load(tmp_path / "agent", **other)


@pytest.mark.parametrize("name", WRITERS)
def test_saved_inside_an_iteration_it_goes_on_from_that_iterations_begin(
    world: World, name: str, tmp_path: Path
) -> None:
    """What the unfinished iteration has written is written again, so that it counts once."""
    given = {"schedule": "linear"} if name == "reft" else {}
    first, straight = world.agent(name, **given), world.agent(name, **given)
    first.iterate(spent=lambda iterations, tokens: tokens / 400)

    def save(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if straight.iteration == 1 and straight.num_timesteps > first.num_timesteps + 4:
            straight.save(tmp_path / "agent")
        return True

    straight.learn(400, callback=save)
    resumed = AGENTS[name][0].load(tmp_path / "agent")
    assert (resumed.iteration, resumed.num_timesteps) == (1, first.num_timesteps)
    resumed.learn(400 - resumed.num_timesteps, reset_num_timesteps=False)
    assert (resumed.iteration, resumed.num_timesteps) == (straight.iteration, straight.num_timesteps)
    assert all(torch.equal(value, weights(straight)[key]) for key, value in weights(resumed).items())


@pytest.mark.parametrize("name", WRITERS)
def test_names_with_and_without_zip_are_the_same(world: World, name: str, tmp_path: Path) -> None:
    cls, agent = AGENTS[name][0], world.agent(name)
    saving = CheckpointCallback(save_freq=8, save_path=str(tmp_path), name_prefix="model")
    agent.learn(32, callback=saving)
    saved = tmp_path / "model_32_steps"
    AutoModelForCausalLM.from_pretrained(saved)
    for path in (saved, f"{saved}.zip"):
        assert cls.load(path).num_timesteps == 0  # inside the first iteration, which is written again
    agent.save(f"{saved}.zip")  # over the folder
    assert cls.load(saved).num_timesteps == agent.num_timesteps
    shutil.make_archive(str(tmp_path / "packed"), "zip", saved)
    for path in (tmp_path / "packed", tmp_path / "packed.zip"):
        assert cls.load(path).num_timesteps == agent.num_timesteps
    with pytest.raises(UsageError, match="no such folder"):
        cls.load(tmp_path / "nothing")


def test_buffers_and_open_files(world: World, name: str, tmp_path: Path) -> None:
    cls, agent = AGENTS[name][0], world.agent(name)
    agent.iterate()
    buffer = io.BytesIO()
    agent.save(buffer)
    with (tmp_path / "file.bin").open("wb") as file:
        agent.save(file)
    buffer.seek(0)
    with (tmp_path / "file.bin").open("rb") as file:
        for source in (buffer, file):
            loaded = cls.load(source)
            assert all(torch.equal(value, weights(agent)[key]) for key, value in weights(loaded).items())
    assert numbers(loaded.iterate()) == numbers(agent.iterate())
    with pytest.raises(UsageError, match="not a zip"):
        cls.load(io.BytesIO(b"nothing"))
    with pytest.raises(UsageError, match="exclude"):
        agent.save(tmp_path / "part", exclude=["policy"])


def test_folders_of_others_are_told_apart(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.agent("reft").save(tmp_path / "reft")
    world.agent("sb3-ppo").save(tmp_path / "ppo")
    with pytest.raises(UsageError, match="saved by SB3PPO"):
        ReFT.load(tmp_path / "ppo")
    with pytest.raises(UsageError, match="saved by ReFT"):
        SB3PPO.load(tmp_path / "reft")
    with pytest.raises(UsageError, match="saved by ReFT"):
        SFT.load(tmp_path / "reft")
    with pytest.raises(UsageError, match="policy="):
        ReFT.load(world.model)
    state = json.loads((tmp_path / "reft" / "agent.json").read_text())
    del state["arguments"]
    (tmp_path / "reft" / "agent.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match="older version"):
        ReFT.load(tmp_path / "reft")
    (tmp_path / "reft" / "agent.json").write_text("{")
    with pytest.raises(UsageError, match=r"agent\.json is damaged"):
        ReFT.load(tmp_path / "reft")
    SB3PPO.load(tmp_path / "ppo", print_system_info=True, force_reset=False, device="cpu")
    assert "SYSTEM INFO" in capsys.readouterr().out


def test_files_that_no_save_wrote_are_never_lost(world: World, tmp_path: Path) -> None:
    agent = world.agent("reft")
    agent.save(tmp_path / "model")
    (tmp_path / "model" / "notes.md").write_text("mine")
    (tmp_path / "model" / "figures").mkdir()
    (tmp_path / "model" / "figures" / "a.txt").write_text("mine, too")
    (tmp_path / "model" / "critic.safetensors").write_bytes(b"of another save")
    agent.save(tmp_path / "model")
    assert (tmp_path / "model" / "notes.md").read_text() == "mine"
    assert (tmp_path / "model" / "figures" / "a.txt").read_text() == "mine, too"
    assert not (tmp_path / "model" / "critic.safetensors").exists()

    agent.target.save(tmp_path / "base")  # a model that is no saved agent, with its owner's files
    (tmp_path / "base" / "thesis.tex").write_text("mine")
    (tmp_path / "keep").write_text("a file")
    for taken in ("base", "keep", "keep.zip"):
        with pytest.raises(UsageError, match="would be lost"):
            agent.save(tmp_path / taken)
    assert (tmp_path / "base" / "thesis.tex").is_file() and (tmp_path / "keep").read_text() == "a file"


def test_a_save_that_fails_at_the_last_keeps_the_name(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = world.agent("reft")
    agent.save(tmp_path / "model")
    rename = Path.rename

    def refuse(self: Path, target: Any) -> Path:
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        agent.save(tmp_path / "model")
    monkeypatch.undo()
    assert ReFT.load(tmp_path / "model").iteration == agent.iteration
    (tmp_path / "model").rename(tmp_path / "model.old-77")  # killed between the two renames
    assert ReFT.load(tmp_path / "model").iteration == agent.iteration

    (tmp_path / "latest").symlink_to(tmp_path / "model")
    agent.save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and ReFT.load(tmp_path / "latest").iteration == agent.iteration


def test_other_problems_than_those_stored_are_not_taken_for_them(world: World, tmp_path: Path) -> None:
    rows = (Path(world.env["problems"])).read_text().splitlines()
    (tmp_path / "others.jsonl").write_text("\n".join(rows[1:] + rows[:1]))
    agent = world.agent("reft", batch={"id": "replay", "window": 2}, problem_sampler="curriculum")
    agent.iterate()
    agent.save(tmp_path / "agent")
    others = {**world.env, "problems": str(tmp_path / "others.jsonl")}

    def make() -> Any:
        return gym.make_vec("MathReason-v0", num_envs=4, **others)

    assert ReFT.load(tmp_path / "agent", env=world.vector()).batching.kept
    with pytest.warns(UserWarning, match="other problems"):
        loaded = ReFT.load(tmp_path / "agent", env=make())
    assert not loaded.batching.kept and not loaded.problem_sampler.state_dict()
    agent.set_env(world.vector())
    assert agent.batching.kept
    with pytest.warns(UserWarning, match="other problems"):
        agent.set_env(make())
    assert not agent.batching.kept
    assert not agent.problem_sampler.state_dict()
    agent.iterate()

    taught = world.agent("reft", batch={"id": "expert", "solutions": 8})
    taught.iterate()
    taught.set_env(make())
    assert taught.update.experts is taught.experts  # of the new environment's solutions
    assert taught.experts.order.task is taught.envs.unwrapped.task
    taught.iterate()


def test_the_tokenizer_is_the_saved_one(world: World, tmp_path: Path) -> None:
    venv = gym.make_vec("MathReason-v0", num_envs=4, tokenizer=world.model, **world.env)
    ReFT(world.model, venv, group_size=2, problems_per_batch=2).save(tmp_path / "agent")
    moved = tmp_path / "elsewhere"
    (tmp_path / "agent").rename(moved)
    assert ReFT.load(moved).envs.task.spec.tokenizer == str(moved)


def test_policies_are_saved_apart(world: World, name: str, tmp_path: Path) -> None:
    agent = world.agent(name)
    agent.iterate()
    agent.policy.save(tmp_path / "policy.zip")
    policy = type(agent.policy).load(tmp_path / "policy")
    obs, _ = world.vector().reset(seed=0)
    assert (policy.predict(obs, deterministic=True)[0] == agent.predict(obs, deterministic=True)[0]).all()
    for key, value in agent.policy.state_dict().items():
        assert torch.equal(value, policy.state_dict()[key])
    assert policy.observation_space == agent.observation_space and policy.action_space == agent.action_space
    agent.save(tmp_path / "agent")
    with pytest.raises(UsageError, match=r"policy\.json"):
        type(agent.policy).load(tmp_path / "agent")
    assert np.ndim(policy.predict({k: v[0] for k, v in obs.items()})[0]) == 0
