"""Both agents inside stable-baselines3's own machinery."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.algorithm import TokenBar
from benchmarks.experiment.held_out import HeldOut
from envs.sb3 import SB3VecEnv
from registry import UsageError
from tests.oracles.small_world import AGENTS, QUESTIONS, WRITERS, World, make_world, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=sorted(AGENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_equal_weights(found: Any, expected: Any) -> None:
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluate_policy_gives_the_evaluators_verdict_on_every_problem(world: World, name: str) -> None:
    agent = world.agent(name)
    agent.iterate()  # so that the weights are not those that were loaded
    right = HeldOut(agent.envs.unwrapped.task, QUESTIONS)(agent.target).right[:, 0]
    assert 0 < right.mean() < 1
    single = Monitor(gym.make("MathReason-v0", **world.env))
    for env in (single, VecMonitor(SB3VecEnv(world.vector(3)))):
        seen: list[tuple[int, bool]] = []

        def note(local: dict[str, Any], _: Any, seen: list[tuple[int, bool]] = seen) -> None:
            if local["done"]:
                seen.append((local["info"]["problem_index"], local["info"]["is_success"]))

        rewards, lengths = evaluate_policy(
            agent, env, n_eval_episodes=12, deterministic=True, callback=note, return_episode_rewards=True
        )
        assert len(rewards) == 12 and all(1 <= length <= 8 for length in lengths)
        assert len({index for index, _ in seen}) > 3 and all(right[index] == success for index, success in seen)
        assert sum(rewards) == sum(success for _, success in seen)


def test_predict_is_the_argmax_of_a_plain_forward_and_single_like_vectorised(world: World, name: str) -> None:
    agent = world.agent(name)
    env = world.vector(3)
    obs, _ = env.reset(seed=1)
    actions, state = agent.predict(obs, deterministic=True)
    for _ in range(3):
        for slot in range(3):
            length = int(obs["length"][slot, 0])
            logits = agent.target.model(torch.from_numpy(obs["input_ids"][slot : slot + 1, :length])).logits
            assert actions[slot] == int(logits[0, -1].argmax())
            one, _ = agent.predict({key: value[slot] for key, value in obs.items()}, deterministic=True)
            assert one == actions[slot] and np.ndim(one) == 0
        obs, _, terminated, truncated, _ = env.step(actions)
        actions, state = agent.predict(obs, state, terminated | truncated, deterministic=True)


def test_predict_samples_from_the_model(world: World, name: str) -> None:
    agent = world.agent(name)
    env = world.vector(64)
    obs, _ = env.reset(options={"problem_index": 0})
    for _ in range(8):
        prefix = torch.from_numpy(obs["input_ids"][:1, : int(obs["length"][0, 0])])
        chance = agent.target.model(prefix).logits[0, -1].detach().softmax(-1)
        if chance.max() < 0.9:
            break
        obs, *_ = env.step(np.full(64, int(chance.argmax())))
    assert 0.2 < chance.max() < 0.9, "the model was made to hesitate over the answer"
    drawn = np.concatenate([agent.predict(obs)[0] for _ in range(8)])
    share = float((drawn == int(chance.argmax())).mean())
    assert abs(share - float(chance.max())) < 4 * (0.25 / len(drawn)) ** 0.5


# --- callbacks and logs -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_callbacks_and_loggers(world: World, name: str, tmp_path: Path) -> None:
    agent = world.agent(name)
    agent.set_logger(configure(str(tmp_path / "log"), ["csv", "tensorboard"]))
    evaluation = EvalCallback(
        VecMonitor(SB3VecEnv(world.vector(2))),
        n_eval_episodes=4,
        eval_freq=5,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path),
        verbose=0,
    )
    saving = CheckpointCallback(save_freq=6, save_path=str(tmp_path / "saved"), name_prefix="agent")
    agent.learn(150, callback=[evaluation, saving], log_interval=1)
    assert agent.num_timesteps >= 150 and agent.iteration >= 2
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == evaluation.n_calls // 5
    rows = list(csv.DictReader((tmp_path / "log" / "progress.csv").open()))
    measured = {"reft": "reft/rollout_accuracy", "sb3-ppo": "rollout/success_rate"}.get(name, "eval/mean_reward")
    for column in (measured, "eval/mean_reward"):
        values = [float(row[column]) for row in rows if row[column]]
        assert values and all(0 <= value <= 1 for value in values)
    assert len(list((tmp_path / "log").glob("events.out.tfevents.*"))) == 1
    for folder in ((tmp_path / "best" / "best_model"), *(tmp_path / "saved").iterdir()):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_callback_stops_training(world: World, name: str) -> None:
    agent = world.agent(name)
    agent.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=2))
    assert 0 < agent.num_timesteps < 10_000 and agent.iteration == 0
    tokens: list[int] = []
    agent.learn(10_000, callback=lambda local, _: tokens.append(len(local["infos"])) or len(tokens) < 3)
    assert tokens == [4, 4, 4]


@pytest.mark.parametrize("name", WRITERS)
def test_learn_shows_a_progress_bar(world: World, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    agent = world.agent(name)
    with pytest.warns(Warning, match="rich is experimental"):
        agent.learn(40, progress_bar=True)
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize("again", [True, False])
def test_the_bar_counts_tokens(world: World, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[TokenBar] = []
    monkeypatch.setattr(TokenBar, "_on_training_end", lambda bar: bars.append(bar))
    agent = world.agent("reft")
    agent.learn(10)
    before = 0 if again else agent.num_timesteps
    steps: list[dict[str, Any]] = []
    with pytest.warns(Warning, match="rich is experimental"):
        agent.learn(40, lambda seen, _: steps.append(seen) is None, reset_num_timesteps=again, progress_bar=True)
    assert steps and bars[0].pbar.n == agent.num_timesteps - before and bars[0].pbar.total == 40
    bars[0].pbar.close()


def test_an_sb3_wrapper_that_training_would_bypass_is_refused(world: World, name: str) -> None:
    with pytest.raises(UsageError, match="bypassed"):
        AGENTS[name][0](world.model, VecMonitor(SB3VecEnv(world.vector())))


# --- saving -------------------------------------------------------------------------------------------------------


def test_a_loaded_agent_goes_on_with_the_same_numbers(world: World, name: str, tmp_path: Path) -> None:
    agent = world.agent(name)
    for _ in range(2):
        agent.iterate()
    agent.save(tmp_path / "agent")
    small = {"learning_rate": 1e-3, **AGENTS[name][1]}
    loaded = AGENTS[name][0].load(tmp_path / "agent", world.vector(small["slots"]), seed=5, **small)
    assert_equal_weights(loaded, agent)
    assert (loaded.iteration, loaded.num_timesteps) == (2, agent.num_timesteps)
    assert_equal_state(loaded.optimizer.state_dict(), agent.optimizer.state_dict())
    for _ in range(2):
        mine, its = agent.iterate(), loaded.iterate()
        assert {k: v for k, v in mine.items() if "time" not in k and "second" not in k} == {
            k: v for k, v in its.items() if "time" not in k and "second" not in k
        }
    assert_equal_weights(loaded, agent)
    assert_equal_state(loaded.optimizer.state_dict(), agent.optimizer.state_dict())


def assert_equal_state(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal_state(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal_state(one, other)
    else:
        assert found == expected


def test_equal_seeds_repeat_and_learn_is_iterate(world: World, name: str) -> None:
    first, second = world.agent(name), world.agent(name)
    first.iterate()
    torch.rand(7)
    np.random.rand(7)
    second.learn(1)
    assert first.iteration == second.iteration == 1 and first.num_timesteps == second.num_timesteps
    assert_equal_weights(first, second)
    other = AGENTS[name][0](world.model, world.vector(4), seed=6, **{"learning_rate": 1e-3, **AGENTS[name][1]})
    other.iterate()
    assert any(not torch.equal(a, b) for a, b in zip(weights(other).values(), weights(first).values(), strict=True))


def test_the_saved_folder_is_a_hugging_face_model_without_pickles(world: World, name: str, tmp_path: Path) -> None:
    agent = world.agent(name)
    agent.iterate()
    agent.save(tmp_path / "agent")
    files = sorted(path.name for path in (tmp_path / "agent").iterdir())
    assert {Path(file).suffix for file in files} <= {".json", ".safetensors", ".jinja"}, files
    assert ("critic.safetensors" in files) == (name == "sb3-ppo")
    ids = torch.arange(10)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "agent")
    assert torch.equal(model(ids).logits, agent.target.model(ids).logits) and len(tokenizer) == agent.target.vocab_size
