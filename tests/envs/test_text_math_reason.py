"""The text-level environment: Gymnasium's own checks, and the token environment's verdicts."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

import envs  # noqa: F401 (registers the ids)
from envs.problems.sources import PUBLISHED
from envs.vector import MathReasonVector
from registry import UsageError

PARTS = [
    "#### ",
    "\\boxed{",
    "}",
    "12",
    "7",
    " The answer is ",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\n",
    "½",
]


@pytest.mark.parametrize("template", ["plain", "chat", "r1", "qwen-math"])
def test_gymnasiums_checker(template: str) -> None:
    env = gym.make("TextMathReason-v0", template=template, max_characters=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped, skip_render_check=False)


@cache
def pair(template: str) -> tuple[Any, Any]:
    """The token and the text environment on the same problems."""
    shared: dict[str, Any] = {"template": template, "problem_options": {"limit": 4}}
    tokens = gym.make("MathReason-v0", max_prompt_tokens=512, max_new_tokens=256, **shared)
    return tokens.unwrapped, gym.make("TextMathReason-v0", **shared).unwrapped


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("template", ["plain", "r1"])
def test_the_token_environment_pays_the_same_for_the_same_text(template: str, data: st.DataObject) -> None:
    tokens, texts = pair(template)
    options = {"problem_index": data.draw(st.integers(0, 3))}
    answer = tokens.task.problem(options["problem_index"]).answer
    text = "".join(data.draw(st.lists(st.sampled_from([*PARTS, answer]), max_size=8)))
    seen, start = tokens.reset(options=options)
    prompt, _ = texts.reset(options=options)
    assert prompt == tokens.task.tokenizer.decode(seen["input_ids"][: start["prompt_len"]])
    ids = tokens.task.tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in [*ids, tokens.task.tokenizer.eos_token_id]:
        _, reward, terminated, truncated, info = tokens.step(token)
        if terminated or truncated:
            break
    _, paid, ended, cut, told = texts.step(text)
    assert (paid, ended, cut) == (reward, terminated, truncated)
    assert told == {key: info[key] for key in told}
    assert set(info) - set(told) == {"group_id", "sample_idx", "prompt_len", "response_len"}


def test_a_text_over_the_budget_is_judged_by_its_beginning() -> None:
    env = gym.make("TextMathReason-v0", max_characters=20, problem_options={"limit": 1}).unwrapped
    answer = env.problem(0).answer
    env.reset()
    _, reward, terminated, truncated, info = env.step(f"#### {answer}\n" + "x" * 40)
    assert (reward, terminated, truncated, info["finish_reason"]) == (1.0, False, True, "length")
    env.reset()
    _, reward, terminated, truncated, _ = env.step("x" * 40 + f"#### {answer}")
    assert (reward, terminated, truncated) == (0.0, False, True)


def test_any_unicode_may_be_answered() -> None:
    env = gym.make("TextMathReason-v0", problem_options={"limit": 1})
    env.reset()
    _, reward, *_ = env.step(f"😀 答えは #### {env.unwrapped.problem(0).answer}")
    assert reward == 1.0


def test_prompts_of_any_characters_lie_in_the_observation_space(tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"question": "答え 😀 2 + 2?", "answer": "4"}) + "\n", encoding="utf-8")
    env = gym.make("TextMathReason-v0", problems=str(file))
    observation, _ = env.reset()
    assert observation in env.observation_space


def test_the_observation_of_chat_is_the_users_message() -> None:
    env = gym.make("TextMathReason-v0", template="chat", problem_options={"limit": 1})
    observation, _ = env.reset()
    assert observation.startswith(env.unwrapped.problem(0).question)
    assert observation.endswith("within \\boxed{}.")


def test_rendering_copies_and_spec() -> None:
    env = gym.make("TextMathReason-v0", render_mode="ansi", problem_options={"limit": 1})
    env.reset()
    copied = copy.deepcopy(env.unwrapped)
    pickled = pickle.loads(pickle.dumps(env.unwrapped))
    for one in (env, copied, pickled):
        one.step("#### x")
        assert "[wrong: reward 0" in one.render() or "[malformed: reward 0" in one.render()
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).make().reset()


def test_an_episode_is_one_step() -> None:
    env = gym.make("TextMathReason-v0", disable_env_checker=True).unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step("1")
    env.reset()
    env.step("1")
    with pytest.raises(gym.error.ResetNeeded):
        env.step("1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_characters": 0}, "max_characters=0"),
        ({"problems": ["a"]}, "'module:function'"),
        ({"problem_options": ["level"]}, "is no mapping"),
        ({"problem_options": {"split": "test"}}, "argument of its own, split='test'"),
        ({"problem_options": {"level": 2.0}}, "level 2.0 is unknown"),
        ({"split": None}, "split=None is NoneType"),
        ({"tmeplate": "chat"}, "did you mean 'template'"),
        ({"template": "plane"}, "did you mean 'plain'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gym.make("TextMathReason-v0", **arguments)


def test_bad_actions_and_options() -> None:
    env = gym.make("TextMathReason-v0", disable_env_checker=True, problem_options={"limit": 2}).unwrapped
    env.reset()
    with pytest.raises(UsageError, match="give the completion as text"):
        env.step(3)
    with pytest.raises(UsageError, match=r"0\.\.1"):
        env.reset(options={"problem_index": 2})
    with pytest.raises(UsageError, match="did you mean 'problem_index'"):
        env.reset(options={"problem": 1})


class TestVectorModes:
    """What ``gym.make_vec`` gives of every id in every mode."""

    @pytest.fixture
    def data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every published set, four problems each."""
        rows = [{"question": f"How much is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
        for source in PUBLISHED.values():
            path = tmp_path / source.files[source.default_split][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
            path.write_text(text)
        monkeypatch.setenv("NESTED_REFT_DATA", str(tmp_path))

    @pytest.mark.usefixtures("data")
    @pytest.mark.parametrize(
        "id", ["MathReason-v0", "TextMathReason-v0", *(f"MathReason/{name}-v0" for name in PUBLISHED)]
    )
    def test_sync_is_there_for_every_id(self, id: str) -> None:
        venv = gym.make_vec(id, num_envs=2, vectorization_mode="sync")
        assert isinstance(venv, SyncVectorEnv)
        observation, info = venv.reset(seed=3)
        assert observation in venv.observation_space
        assert all(0 <= index < 2**31 for index in info["problem_index"])
        _, rewards, *_ = venv.step(venv.action_space.sample())
        assert rewards.shape == (2,)
        venv.close()

    @pytest.mark.usefixtures("data")
    @pytest.mark.parametrize("id", ["MathReason-v0", *(f"MathReason/{name}-v0" for name in PUBLISHED)])
    @pytest.mark.parametrize("mode", [None, "vector_entry_point"])
    def test_the_native_one_is_what_token_ids_give_by_default(self, id: str, mode: str | None) -> None:
        venv = gym.make_vec(id, num_envs=3, vectorization_mode=mode)
        assert type(venv) is MathReasonVector
        assert venv.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        observation, _ = venv.reset(seed=3)
        assert observation in venv.observation_space

    def test_the_text_id_gives_sync_by_default_and_has_no_native_one(self) -> None:
        assert isinstance(gym.make_vec("TextMathReason-v0", num_envs=2), SyncVectorEnv)
        with pytest.raises(gym.error.Error, match="vector entry point"):
            gym.make_vec("TextMathReason-v0", num_envs=2, vectorization_mode="vector_entry_point")

    @pytest.mark.parametrize("id", ["MathReason-v0", "TextMathReason-v0"])
    def test_async_gives_what_sync_gives(self, id: str) -> None:
        """Of texts without shared memory, in which gymnasium 1.4 never reads them again."""
        own: dict[str, Any] = {"vector_kwargs": {"shared_memory": False}} if id.startswith("Text") else {}
        made = {
            "sync": gym.make_vec(id, num_envs=2, vectorization_mode="sync"),
            "async": gym.make_vec(id, num_envs=2, vectorization_mode="async", **own),
        }
        assert isinstance(made["async"], AsyncVectorEnv)
        made["sync"].action_space.seed(0)
        seen = [made[mode].reset(seed=5) for mode in made]
        for step in range(4):
            action = made["sync"].action_space.sample()
            if id.startswith("Text"):
                action = ("#### 12", "½ is #### 7")
            results = [made[mode].step(action) for mode in made]
            for mine, theirs in zip(*results, strict=True):
                assert _plain(mine) == _plain(theirs), step
        assert _plain(seen[0]) == _plain(seen[1])
        for venv in made.values():
            venv.close()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
