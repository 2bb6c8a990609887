"""Both agents inside stable-baselines3's own machinery, and the PPO policy against a plain transformers forward."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents import ReFT
from agents.actor_critic import longest_prefixes
from agents.sb3_ppo import SB3PPO
from benchmarks.evaluation import HeldOut
from envs.sb3 import SB3VecEnv
from envs.task import BUILTIN_TOKENIZER
from envs.vector import MathReasonVector
from policies import Policy
from registry import UsageError
from registry import agents as agent_registry

QUESTIONS = 8
AGENTS = {
    "reft": (ReFT, {"group_size": 4, "problems_per_batch": 4, "slots": 4, "minibatches": 2}),
    "sb3-ppo": (SB3PPO, {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "slots": 4}),
}


class World(NamedTuple):
    """A model that answers every question of a file sometimes rightly and sometimes wrongly: mostly right where the
    question's number is even, mostly wrong where it is odd."""

    model: str
    env: dict[str, Any]

    def vector(self, slots: int = 4) -> MathReasonVector:
        return gym.make_vec("MathReason-v0", num_envs=slots, **self.env)  # type: ignore[return-value]

    def agent(self, name: str, policy: Any = None, **kwargs: Any) -> Any:
        cls, small = AGENTS[name]
        return cls(
            policy or self.model, self.vector(small["slots"]), seed=5, **{"learning_rate": 1e-3, **small, **kwargs}
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BUILTIN_TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    lines, rows = [], []
    for n in range(QUESTIONS):
        lines.append(json.dumps({"question": f"What is {n} plus 2?", "answer": str(n + 2)}))
        for answer in (n + 2, n + 3, n + 2 + n % 2):
            text = f"Question: What is {n} plus 2?\nAnswer: #### {answer}"
            rows.append(torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]))
    (folder / "problems.jsonl").write_text("\n".join(lines))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    kwargs = {"problems": str(folder / "problems.jsonl"), "max_prompt_tokens": 24, "max_new_tokens": 8}
    return World(str(folder / "model"), kwargs)


@pytest.fixture(params=sorted(AGENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weights(agent: Any) -> dict[str, torch.Tensor]:
    found = {name: value.detach().clone() for name, value in agent.target.model.state_dict().items()}
    if hasattr(agent, "critic"):
        found |= {f"critic.{name}": value.detach().clone() for name, value in agent.critic.state_dict().items()}
    return found


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
    measured = {"reft": "reft/rollout_accuracy", "sb3-ppo": "rollout/success_rate"}[name]
    for column in (measured, "eval/mean_reward"):
        values = [float(row[column]) for row in rows if row[column]]
        assert values and all(0 <= value <= 1 for value in values)
    assert len(list((tmp_path / "log").glob("events.out.tfevents.*"))) == 1
    for folder in ((tmp_path / "best" / "best_model"), *(tmp_path / "saved").iterdir()):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_callback_stops_training(world: World, name: str) -> None:
    agent = world.agent(name)
    agent.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=2))
    assert 0 < agent.num_timesteps < 10_000 and agent.iteration == 0
    tokens: list[int] = []
    agent.learn(10_000, callback=lambda local, _: tokens.append(len(local["infos"])) or len(tokens) < 3)
    assert tokens == [4, 4, 4]


def test_learn_shows_a_progress_bar(world: World, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    agent = world.agent(name)
    with pytest.warns(Warning, match="rich is experimental"):
        agent.learn(40, progress_bar=True)
    assert "100%" in capsys.readouterr().out


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


# --- sb3-ppo ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=9))
def test_longest_prefixes_against_every_pair(rows: list[list[int]]) -> None:
    ids = np.full((len(rows), 6), 9)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
    whole, within = longest_prefixes(ids, np.array([len(row) for row in rows]))
    for row, place in zip(rows, within, strict=True):
        assert rows[whole[place]][: len(row)] == row
    kept = [rows[n] for n in whole]
    assert not any(a is not b and b[: len(a)] == a for a in kept for b in kept)


@pytest.fixture
def batch(world: World) -> dict[str, torch.Tensor]:
    """Prefixes of a few episodes in disorder, and others; padded well beyond the longest."""
    rng = np.random.default_rng(0)
    ids, length = np.ones((9, 32), dtype=np.int64), np.array([12, 5, 1, 12, 9, 9, 3, 17, 16])
    episode = rng.integers(2, 500, (2, 32))
    for n, size in enumerate(length):
        ids[n, :size] = episode[n % 2, :size]
    return {"input_ids": torch.from_numpy(ids), "length": torch.from_numpy(length)[:, None]}


@pytest.mark.parametrize("detached", [True, False])
def test_evaluate_actions_equals_one_plain_forward_a_prefix(
    world: World, batch: dict[str, torch.Tensor], detached: bool
) -> None:
    agent = world.agent("sb3-ppo", detached_critic=detached)
    torch.nn.init.normal_(agent.critic.weight)
    policy, model = agent.policy, agent.target.model
    actions = torch.arange(9) * 7
    value, logp, entropy = policy.evaluate_actions(batch, actions)
    (logp.sum() + 0.3 * entropy.sum() + 0.5 * (value**2).sum()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    policy.zero_grad()
    loss = torch.zeros(())
    for n in range(9):
        ids = batch["input_ids"][n : n + 1, : int(batch["length"][n])]
        out = model(ids, output_hidden_states=True)
        distribution = torch.distributions.Categorical(logits=out.logits[0, -1])
        hidden = out.hidden_states[-1][0, -1]
        expected = agent.critic.weight[0] @ (hidden.detach() if detached else hidden) + agent.critic.bias[0]
        torch.testing.assert_close(value[n, 0], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logp[n], distribution.log_prob(actions[n]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(entropy[n], distribution.entropy(), atol=1e-5, rtol=1e-4)
        loss = loss + distribution.log_prob(actions[n]) + 0.3 * distribution.entropy() + 0.5 * expected**2
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_the_policy_interface_agrees_with_itself(world: World, batch: dict[str, torch.Tensor]) -> None:
    policy = world.agent("sb3-ppo").policy
    torch.nn.init.normal_(policy.value_net.weight)
    value, logp, _ = policy.evaluate_actions(batch, torch.arange(9))
    torch.testing.assert_close(policy.predict_values(batch), value)
    torch.testing.assert_close(policy.get_distribution(batch).log_prob(torch.arange(9)), logp)
    greedy, _, _ = policy(batch, deterministic=True)
    assert torch.equal(greedy, policy.get_distribution(batch).mode())
    assert torch.equal(
        greedy, torch.from_numpy(policy.predict({k: v.numpy() for k, v in batch.items()}, deterministic=True)[0])
    )


def test_rollouts_through_kv_slots_equal_the_plain_forward(world: World) -> None:
    agent = world.agent("sb3-ppo")
    torch.nn.init.normal_(agent.critic.weight)
    for iteration in range(2):  # in the second the weights have moved
        agent.collect_rollouts(agent.env, agent._init_callback(None), agent.rollout_buffer, agent.n_steps)
        buffer = agent.rollout_buffer
        assert buffer.episode_starts[1:].any(), "some slot was reused"
        for data in buffer.get(16):
            assert len(data.actions) == 16
            values, logp, _ = agent.policy.evaluate_actions(data.observations, data.actions.long().flatten())
            torch.testing.assert_close(values.flatten(), data.old_values, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logp, data.old_log_prob, atol=1e-5, rtol=1e-4)
        if iteration == 0:
            before = weights(agent)
            agent.train()
            assert any(not torch.equal(before[key], value) for key, value in weights(agent).items())


def test_one_step_of_ppo_is_on_policy_and_its_rewards_are_the_verdicts(world: World) -> None:
    agent = world.agent("sb3-ppo", n_epochs=1, n_steps=16, batch_size=64)
    metrics = agent.iterate()
    assert abs(metrics["approx_kl"]) < 1e-6 and metrics["clip_fraction"] == 0 and metrics["tokens"] == 64
    rewards = agent.rollout_buffer.rewards
    assert rewards.sum() == metrics["rollout_accuracy"] * metrics["episodes"] > 0
    assert set(np.unique(rewards)) == {0.0, 1.0}  # nothing is bootstrapped where the budget ends an episode


def test_sb3_ppo_raises_the_reward(world: World) -> None:
    agent = SB3PPO(world.model, world.vector(16), learning_rate=1e-3, n_steps=16, batch_size=256, seed=5)
    held_out = HeldOut(agent.envs.unwrapped.task, QUESTIONS)
    assert held_out(agent.target).bits == "10101010"  # what the world was made for
    for _ in range(15):
        agent.iterate()
    assert held_out(agent.target, 16, 1.0).mean > 0.75


def test_the_registry_makes_it_and_bad_numbers_are_usage_errors(world: World) -> None:
    agent = agent_registry.make("sb3-ppo", Policy.load(world.model), world.vector(), n_steps=8, batch_size=32)
    assert isinstance(agent, SB3PPO) and agent.layers == (0, 1)
    for wrong, needle in (
        ({"n_steps": 4}, "n_steps=4"),
        ({"n_steps": 8, "batch_size": 12}, "batch_size=12"),
        ({"slots": 3}, "slots=3"),
    ):
        with pytest.raises(UsageError, match=needle):
            SB3PPO(world.model, world.vector(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="vocab_size=512"):
        SB3PPO(world.model, gym.make_vec("MathReason-v0", num_envs=16, vocab_size=600))
