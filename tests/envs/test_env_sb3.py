"""The native vector env behind stable-baselines3's interface: options, rendering and the info of an episode."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers.vector import RecordEpisodeStatistics, TransformReward
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from envs.sb3 import SB3VecEnv
from envs.vector import MathReasonVector
from registry import UsageError
from tests.oracles.env_oracles import SHORT, Typist, eos_of


def test_options_of_one_slot_are_its_own() -> None:
    env = SB3VecEnv(MathReasonVector(num_envs=3, **SHORT))
    env.set_options([{"problem_index": 3}, {"problem_index": 5}, {}])
    env.seed(1)
    env.reset()
    drawn = MathReasonVector(num_envs=3, **SHORT).reset(seed=1)[1]["problem_index"]
    assert [info["problem_index"] for info in env.reset_infos] == [3, 5, drawn[2]]
    env.reset()  # options hold for one reset
    assert env.reset_infos[0]["problem_index"] != 3
    env.set_options({"problem_index": 7})
    env.reset()
    assert [info["problem_index"] for info in env.reset_infos] == [7] * 3
    env.set_options([{"deck": [1, 2]}, {}, {}])
    with pytest.raises(UsageError, match="slots share all options but problem_index"):
        env.reset()


def test_the_info_of_an_ended_episode_says_how_it_went() -> None:
    """As ``VecMonitor`` says it, through a wrapper that pays at every step, too."""
    for wrap in (lambda venv: venv, lambda venv: TransformReward(venv, lambda reward: reward - 0.5)):
        env = SB3VecEnv(wrap(MathReasonVector(num_envs=4, **SHORT)))
        monitor = VecMonitor(SB3VecEnv(wrap(MathReasonVector(num_envs=4, **SHORT))))
        for one in (env, monitor):
            one.seed(3)
            one.reset()
        typist, ended = Typist(env.venv, 3), 0
        for _ in range(40):
            actions = typist()
            for mine, its in zip(env.step(actions)[3], monitor.step(actions)[3], strict=True):
                assert ("episode" in mine) == ("episode" in its)
                if "episode" in mine:
                    ended += 1
                    assert {**mine["episode"], "t": 0} == {**its["episode"], "t": 0}
                    assert mine["episode"]["l"] == mine["response_len"] and mine["episode"]["t"] >= 0
        assert ended > 10


def test_statistics_of_gymnasiums_wrapper_are_not_filed_under_the_next_episode() -> None:
    env = SB3VecEnv(RecordEpisodeStatistics(MathReasonVector(num_envs=2, **SHORT)))
    env.reset()
    _, _, dones, infos = env.step(np.full(2, eos_of(env.venv)))
    assert dones.all() and [info["episode"]["l"] for info in infos] == [1, 1]
    assert all("episode" not in info and "problem_index" in info for info in env.reset_infos)


def test_rendering(capsys: pytest.CaptureFixture[str]) -> None:
    env = SB3VecEnv(gym.make_vec("MathReason-v0", num_envs=2, render_mode="ansi", **SHORT))  # type: ignore[arg-type]
    env.reset()
    assert len(env.render()) == 2
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=16)
    evaluate_policy(model, env, n_eval_episodes=2, render=True, warn=False)
    capsys.readouterr()
    env.render("human")
    assert capsys.readouterr().out.count("Question") >= 2
    silent = SB3VecEnv(MathReasonVector(num_envs=2, **SHORT))
    with pytest.warns(UserWarning, match="render_mode='ansi'"):
        assert silent.render("human") is None


def test_stock_ppo_logs_its_episodes() -> None:
    env: Any = SB3VecEnv(MathReasonVector(num_envs=4, **SHORT))
    model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=64, n_epochs=1).learn(64)
    assert model.ep_info_buffer and all({"r", "l", "t"} == one.keys() for one in model.ep_info_buffer)
    assert len(model.ep_success_buffer or ()) == len(model.ep_info_buffer)


def test_a_reset_of_some_slots_leaves_the_others_episodes() -> None:
    env = SB3VecEnv(gym.make_vec("MathReason-v0", num_envs=2))
    env.seed(0)
    env.reset()
    before = env.reset_infos[1]
    for _ in range(10):
        env.step(np.array([5, 5]))
    env.set_options({"reset_mask": np.array([True, False])})
    env.reset()
    assert env.reset_infos[1] == before and env.reset_infos[0]["episode_id"] != before["episode_id"]
    (_, info) = env.step(np.array([5, eos_of(env.venv)]))[3]
    assert info["episode"]["l"] == info["response_len"] == 11


def test_attributes_of_slots_are_their_own() -> None:
    env = SB3VecEnv(gym.make_vec("MathReason-v0", num_envs=3))
    env.seed(4)
    env.reset()
    assert env.get_attr("action_space") == [env.action_space] * 3
    assert env.get_attr("observation_space") == [env.observation_space] * 3
    assert env.get_attr("np_random_seed") == [4, 5, 6]
    assert env.get_attr("np_random_seed", 2) == [6]
    assert env.get_attr("num_envs") == [3, 3, 3]


def test_options_of_slots_may_be_arrays() -> None:
    env = SB3VecEnv(MathReasonVector(num_envs=2, **SHORT))
    env.set_options([{"deck": np.array([4, 9])}, {"deck": np.array([4, 9])}])
    env.reset()
    assert [info["problem_index"] for info in env.reset_infos] == [4, 9]
    env.set_options([{"deck": np.array([4, 9])}, {"deck": np.array([4, 8])}])
    with pytest.raises(UsageError, match="differ"):
        env.reset()
