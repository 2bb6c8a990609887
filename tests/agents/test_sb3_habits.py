"""What stable-baselines3's users do with an algorithm: other environments, parameters, logs, callbacks, wrappers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TransformReward
from gymnasium.wrappers.vector import TransformReward as VectorTransformReward
from stable_baselines3.common.callbacks import BaseCallback, LogEveryNTimesteps
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor

from agents.arguments import check_seed
from agents.environments import vector_env_of
from agents.sb3_ppo import BudgetEndsEpisodes
from envs.math_reason import MathReason
from envs.sb3 import SB3VecEnv
from envs.shaping import LengthPenalty, ShapedReward, ShapedRewardVector
from envs.vector import MathReasonVector
from registry import UsageError
from tests.oracles.reft_agents import numbers, write_batch
from tests.oracles.small_world import AGENTS, WRITERS, World, make_world, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=sorted(AGENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Kept(KVWriter):
    """Every row that was logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        """Nothing is open."""


# --- environments -------------------------------------------------------------------------------------------------


def test_set_env_takes_what_the_constructor_takes(world: World, name: str) -> None:
    expected = numbers(world.agent(name).iterate())
    single = gym.make("MathReason-v0", **world.env)
    for env in (world.vector(), SB3VecEnv(world.vector()), single, Monitor(single)):
        agent = world.agent(name)
        agent.set_env(env)
        assert numbers(agent.iterate()) == expected
        assert (type(agent.env) is BudgetEndsEpisodes) == (name == "sb3-ppo")
    for wrong, needle in ((world.vector(3), "3 slots and the agent 4"), (gym.make("CartPole-v1"), "no MathReason")):
        with pytest.raises(UsageError, match=needle):
            agent.set_env(wrong)


@pytest.mark.parametrize("observation", [np.zeros(3), {"x": 1}, None])
def test_predict_says_what_an_observation_is(world: World, name: str, observation: Any) -> None:
    with pytest.raises(UsageError, match="'input_ids'"):
        world.agent(name).predict(observation)


def test_a_budget_that_is_no_number_is_refused(world: World) -> None:
    agent = world.agent("reft")
    with pytest.raises(UsageError, match="total_timesteps='x'"):
        agent.learn("x")  # type: ignore[arg-type]
    assert agent.learn(1e1).num_timesteps >= 10  # type: ignore[arg-type]


def test_the_budget_goes_on_to_end_episodes_after_set_env(world: World) -> None:
    agent = world.agent("sb3-ppo")
    agent.set_env(SB3VecEnv(world.vector()))
    torch.nn.init.constant_(agent.critic.bias, 5.0)
    agent.collect_rollouts(agent.env, agent._init_callback(None), agent.rollout_buffer, agent.n_steps)
    assert set(np.unique(agent.rollout_buffer.rewards)) <= {0.0, 1.0}


def test_reward_parts_of_a_single_env_are_carried_over(world: World) -> None:
    single = ShapedReward(ShapedReward(gym.make("MathReason-v0", **world.env), [LengthPenalty(0.5)]), [Constant()])
    venv = vector_env_of(single, 3)
    assert isinstance(venv, ShapedRewardVector) and venv.num_envs == 3
    venv.reset(options={"problem_index": 2})
    single.reset(options={"problem_index": 2})
    eos = single.unwrapped.task.tokenizer.eos_token_id  # type: ignore[attr-defined]
    assert venv.step(np.full(3, eos))[1].tolist() == [single.step(eos)[1]] * 3 == [9.5] * 3


def test_what_a_vector_wrapper_pays_before_the_end_counts(world: World) -> None:
    agent = AGENTS["reft"][0](
        world.model,
        VectorTransformReward(world.vector(), lambda reward: reward - 0.5),
        group_size=2,
        problems_per_batch=2,
    )
    rollout, _ = write_batch(agent, np.random.default_rng(0))
    success = torch.tensor([float(info["is_success"]) for info in rollout.episodes])
    torch.testing.assert_close(rollout.reward, success - 0.5 * rollout.mask.sum(1))


class Constant:
    name = "constant"

    def __call__(self, info: Any) -> float:
        return 10.0


class Own(MathReason):
    """An environment that does something else."""


WRAPPERS = {
    "TransformReward": (lambda env: TransformReward(env, lambda r: r - 100), r"wrappers\.vector\.TransformReward"),
    "TimeLimit": (lambda env: gym.wrappers.TimeLimit(env, 3), "max_new_tokens=3"),
    "RecordEpisodeStatistics": (gym.wrappers.RecordEpisodeStatistics, r"vector\.RecordEpisodeStatistics"),
    "below a check": (lambda env: gym.wrappers.OrderEnforcing(TransformReward(env, float)), "TransformReward"),
    "a subclass": (lambda env: type("Louder", (ShapedReward,), {})(env, ["format"]), "Louder"),
    "an env of one's own": (lambda env: Own(max_new_tokens=8), "Own"),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_a_wrapper_of_a_single_env_is_never_dropped(case: str) -> None:
    wrap, needle = WRAPPERS[case]
    with pytest.raises(UsageError, match=needle):
        vector_env_of(wrap(gym.make("MathReason-v0", max_new_tokens=8)), 2)


def test_a_wrapper_between_policy_and_environment_is_refused() -> None:
    venv = gym.make_vec("MathReason-v0", num_envs=2)
    for wrapper in (type("Other", (gym.vector.VectorActionWrapper,), {}), gym.wrappers.vector.DictInfoToList):
        with pytest.raises(UsageError, match=r"Other|DictInfoToList"):
            vector_env_of(gym.wrappers.vector.TransformReward(wrapper(venv), float), 2)
    assert vector_env_of(gym.wrappers.vector.TransformReward(venv, float), 2)


def test_numbers_of_numpy_are_numbers(world: World, name: str) -> None:
    agent = world.agent(name, learning_rate=np.float32(1e-3))
    assert numbers(agent.iterate()) == numbers(world.agent(name, learning_rate=float(np.float32(1e-3))).iterate())
    assert check_seed(np.int64(3)) == 3 and type(check_seed(np.uint8(3))) is int


def test_envs_that_cannot_be_dealt_a_deck_are_refused() -> None:
    gym.register("Plain-v0", entry_point="envs.math_reason:MathReason")
    try:
        with pytest.raises(UsageError, match="vector_entry_point="):
            vector_env_of("Plain-v0", 2)
    finally:
        del gym.registry["Plain-v0"]
    same = {"autoreset_mode": AutoresetMode.SAME_STEP}
    sync = gym.make_vec("MathReason-v0", num_envs=2, vectorization_mode="sync", vector_kwargs=same)
    for env in (sync, SB3VecEnv(sync)):
        with pytest.raises(UsageError, match="SyncVectorEnv"):
            vector_env_of(env, 2)
    for id in ("CartPole-v1", "MathReson-v0"):
        with pytest.raises(UsageError, match=id):
            vector_env_of(id, 2)


def test_a_limit_of_steps_below_the_budget_is_refused_and_another_does_nothing(world: World, name: str) -> None:
    single = gym.make("MathReason-v0", max_episode_steps=8, **world.env)
    agent = world.agent(name)
    agent.set_env(single)
    assert numbers(agent.iterate()) == numbers(world.agent(name).iterate())
    short = gym.make_vec("MathReason-v0", num_envs=4, max_episode_steps=3, **world.env)
    with pytest.raises(UsageError, match="max_new_tokens=3"):
        agent.set_env(short)


# --- parameters ---------------------------------------------------------------------------------------------------


def test_parameters_go_from_one_agent_to_another(world: World, name: str) -> None:
    agent, other = world.agent(name), world.agent(name)
    agent.iterate()
    parameters = copy.deepcopy(agent.get_parameters())
    assert parameters.keys() == {"policy", "policy.optimizer"}
    other.set_parameters(parameters)
    other.iteration, other.num_timesteps = agent.iteration, agent.num_timesteps
    assert all(torch.equal(value, weights(agent)[key]) for key, value in weights(other).items())
    assert numbers(other.iterate()) == numbers(agent.iterate())
    with pytest.raises(ValueError, match="do not match"):
        other.set_parameters({"policy": parameters["policy"]})
    other.set_parameters({"policy": parameters["policy"]}, exact_match=False)
    with pytest.raises(UsageError, match="load"):
        other.set_parameters("saved.zip")


def test_weights_loaded_into_the_policy_are_seen_by_rollouts(world: World, name: str) -> None:
    agent, other = world.agent(name), world.agent(name)
    agent.iterate()
    obs, _ = world.vector().reset(seed=0)
    for give in (
        lambda: other.policy.load_state_dict(agent.policy.state_dict()),
        lambda: other.policy.load_from_vector(agent.policy.parameters_to_vector()),
    ):
        other.predict(obs)  # packs the weights
        give()
        assert (other.predict(obs, deterministic=True)[0] == agent.predict(obs, deterministic=True)[0]).all()
    other.learn(1)


# --- logs and callbacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_both_log_what_sb3_logs_of_episodes(world: World, name: str) -> None:
    agent, kept = world.agent(name), Kept()
    agent.set_logger(Logger(None, [kept]))
    agent.learn(100, log_interval=1)
    row = kept.rows[-1]
    assert 0 <= row["rollout/ep_rew_mean"] == row["rollout/success_rate"] <= 1
    assert 1 <= row["rollout/ep_len_mean"] <= 8
    assert {"r", "l"} <= agent.ep_info_buffer[0].keys()
    kept.rows.clear()
    agent.learn(100, callback=LogEveryNTimesteps(20), log_interval=None)
    assert kept.rows
    agent.dump_logs()


class Watch(BaseCallback):
    """Keeps what each step shows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.seen.append({key: self.locals[key] for key in ("rewards", "actions", "new_obs", "dones", "infos")})
        return True


@pytest.mark.parametrize("name", WRITERS)
def test_callbacks_see_the_transition_and_the_episode(world: World, name: str) -> None:
    watch, agent = Watch(), world.agent(name)
    agent.learn(60, callback=watch)
    ended = 0
    for before, step in zip(watch.seen, watch.seen[1:], strict=False):
        assert step["rewards"].shape == step["actions"].shape == step["dones"].shape == (4,)
        for slot in range(4):
            length = int(step["new_obs"]["length"][slot, 0])
            if step["dones"][slot]:
                ended += 1
                info = step["infos"][slot]
                assert info["episode"]["r"] == step["rewards"][slot] == info["is_success"]
                assert info["episode"]["l"] == info["response_len"] and info["episode"]["t"] >= 0
            elif length == before["new_obs"]["length"][slot, 0] + 1:  # not the first step of a rollout
                assert step["new_obs"]["input_ids"][slot, length - 1] == step["actions"][slot]
    assert ended > 4


def test_no_callback_sees_a_pending_verdict(world: World, tmp_path: Any) -> None:
    path = tmp_path / "symbolic.jsonl"
    path.write_text('{"question": "Sum?", "answer": "\\\\sqrt{5+2\\\\sqrt{6}}"}\n')
    venv = gym.make_vec("MathReason-v0", num_envs=4, problems=str(path), max_prompt_tokens=24, max_new_tokens=8)
    agent = AGENTS["reft"][0](world.model, venv, group_size=2, problems_per_batch=2)
    answers = iter(range(10**6))  # so that a worker has to settle each completion
    task = venv.unwrapped.task  # type: ignore[attr-defined]
    task.text = lambda completion: f"\\boxed{{\\sqrt{{2}}+\\sqrt{{3}}+{next(answers)}}}"
    watch = Watch()
    agent.learn(1, callback=watch)
    statuses = [info["status"] for step in watch.seen for info in step["infos"] if info]
    assert len(statuses) == 4 and "pending" not in statuses


# --- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_sb3s_vec_env_can_be_copied(duplicate: Any) -> None:
    env = SB3VecEnv(MathReasonVector(num_envs=2, max_new_tokens=8))
    env.seed(3)
    env.reset()
    env.step(np.array([5, 6]))
    other = duplicate(env)
    for _ in range(12):
        mine, its = env.step(np.array([7, 8])), other.step(np.array([7, 8]))
        assert (mine[0]["input_ids"] == its[0]["input_ids"]).all() and (mine[1] == its[1]).all()
