"""What a user can get wrong, and playing an episode by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs.math_reason import MathReason
from envs.vector import MathReasonVector
from registry import UsageError
from tests.oracles.env_oracles import SHORT, assert_same, eos_of


@pytest.fixture(scope="module")
def venv() -> Iterator[MathReasonVector]:
    env = MathReasonVector(num_envs=3, **SHORT)
    yield env
    env.close()


IN_THE_CONSTRUCTOR = {
    "no slots": ({"num_envs": 0}, "at least 1"),
    "slots of another type": ({"num_envs": 2.5}, "integer"),
    "a truth value of slots": ({"num_envs": True}, "integer"),
    "a truth value of tokens": ({"max_prompt_tokens": True}, "max_prompt_tokens=True must be an integer"),
    "unknown argument": ({"max_new_token": 5}, "max_new_tokens"),
    "unknown template": ({"template": "plian"}, "plain"),
    "a template of another type": ({"template": 3}, "template 3 is int: give a name.*plain"),
    "problems of another type": ({"problems": ["a", "b"]}, "is list.*path as text"),
    "options of another type": ({"problem_options": ["level"]}, "is no mapping"),
    "prompt over budget": ({"max_prompt_tokens": 3}, "raise"),
    "some prompts over budget": (
        {"problem_options": {"level": [3, 4]}, "max_prompt_tokens": 44},
        "some of 256 prompts of arithmetic/train are longer than max_prompt_tokens=44 .*raise max_prompt_tokens",
    ),
    "no file": ({"problems": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    "no tokenizer": ({"tokenizer": "./no-such-folder"}, "builtin"),
    "no split": ({"split": "tset"}, "test"),
    "a split of another type": ({"split": None}, "split=None is NoneType"),
    "a split among the options": ({"problem_options": {"split": "test"}}, "argument of its own, split='test'"),
    "no such level": ({"problem_options": {"level": 99}}, "99"),
    "a level of another type": ({"problem_options": {"level": 2.0}}, "level 2.0 is unknown: give one or several of 1"),
    "no level": ({"problem_options": {"level": None}}, "level None is unknown"),
    "no name of a tokenizer": ({"tokenizer": None}, "tokenizer='None' is NoneType: give 'builtin', a folder or a hub"),
    "a tokenizer in memory": ({"tokenizer": object()}, "is object: give 'builtin'.*save_pretrained"),
    "one token": ({"max_new_tokens": 1}, "at least 2"),
    "a smaller vocabulary": ({"vocab_size": 5}, "tokenizer"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size=0 must be an integer of at least 1"),
    "a vocabulary of another type": ({"vocab_size": "512"}, "vocab_size='512' must be an integer"),
    "a truth value of tokens to choose from": ({"vocab_size": True}, "vocab_size=True must be an integer"),
    "unknown reward": ({"reward": "randm"}, "random"),
    "no reward": ({"reward": None}, "reward=None: known: random, verified"),
}
IN_RESET = {
    "unknown option": ({"options": {"problem_idx": 3}}, "problem_index"),
    "no such problem": ({"options": {"deck": [-1]}}, "-1"),
    "empty groups": ({"options": {"deck": [1], "group_size": 0}}, "group_size=0"),
    "groups of nothing": ({"options": {"group_size": 2}}, "deck"),
    "too few problems": ({"options": {"problem_indices": [1, 2]}}, "num_envs=3"),
    "a mask of another shape": ({"options": {"reset_mask": np.ones(2, dtype=bool)}}, r"\(3,\)"),
    "a mask of nothing": ({"options": {"reset_mask": np.zeros(3, dtype=bool)}}, "at least one"),
    "deck for some slots": ({"options": {"deck": [1], "reset_mask": np.array([True, False, False])}}, "not both"),
    "too few seeds": ({"seed": [1, 2]}, "num_envs=3"),
}


@pytest.mark.parametrize("case", IN_THE_CONSTRUCTOR)
def test_errors_of_the_constructor_name_the_value_and_the_remedy(case: str) -> None:
    kwargs, needle = IN_THE_CONSTRUCTOR[case]
    with pytest.raises(UsageError, match=needle):
        gym.make_vec("MathReason-v0", **{"num_envs": 2, **kwargs})
    if "num_envs" not in kwargs:
        with pytest.raises(UsageError, match=needle):
            gym.make("MathReason-v0", **kwargs)


@pytest.mark.parametrize("case", IN_RESET)
def test_errors_of_reset_name_the_value_and_the_remedy(case: str, venv: MathReasonVector) -> None:
    arguments, needle = IN_RESET[case]
    with pytest.raises(UsageError, match=needle):
        venv.reset(**arguments)  # type: ignore[arg-type]


def test_errors_of_step(venv: MathReasonVector) -> None:
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        MathReasonVector(num_envs=1).step(np.array([1]))
    venv.reset(seed=0)
    for actions, needle in (
        (np.array([1, 2]), r"\(3,\) integers needed"),
        (np.array([[1], [2], [3]]), r"\(3,\) integers needed"),
        (np.array([1.5, 2.0, 3.0]), "float64"),
        (np.array([1, 2, 10**9]), "1000000000"),
        (np.array([1, -2, 3]), "-2"),
    ):
        with pytest.raises(UsageError, match=needle):
            venv.step(actions)
    single = MathReason()
    single.reset(seed=0)
    for action, needle in ((np.int64(-1), "-1"), (10**9, "1000000000"), (1.5, "1.5"), ("7", "'7'"), (None, "None")):
        with pytest.raises(UsageError, match=f"action=.*{needle}.* is not a token"):
            single.step(action)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="problem_index"):
        single.reset(options={"problem": 3})


@pytest.mark.parametrize(
    ("typed", "shown"),
    [("so\n#### {answer}\n\n", "[right: reward 1"), ("#### {answer}", "[right: reward 1"), ("", "reward 0")],
    ids=["lines", "end of input", "nothing"],
)
def test_a_person_plays_an_episode(typed: str, shown: str) -> None:
    problem = MathReason().task.problem(4)
    done = subprocess.run(
        [sys.executable, "-m", "envs.play", "--problem", "4"],
        input=typed.format(answer=problem.answer),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert problem.question in done.stdout and shown in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--problem", "-1"], "problem_index=-1"), (["--env", "CartPole-v1"], "CartPoleEnv takes no tokens")],
)
def test_play_says_what_is_wrong_without_a_traceback(arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "envs.play", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f"error: {said}" in done.stderr and "Trace" not in done.stderr


NO_INDICES = [3.9, "3", True, None, np.True_, np.array([1]), np.array([[0, 1]]), np.array(1.5), torch.tensor(1.5)]


@pytest.mark.parametrize("index", NO_INDICES, ids=repr)
def test_an_index_of_reset_options_is_an_integer(index: Any, venv: MathReasonVector) -> None:
    single = gym.make("MathReason-v0")
    for env, options in (
        (single, {"problem_index": index}),
        (venv, {"problem_index": index}),
        (venv, {"deck": [index]}),
    ):
        with pytest.raises(UsageError, match=r"^[^\n]* is no integer$"):
            env.reset(options=options)
    for three in (np.int64(3), np.array(3), torch.tensor(3)):
        assert single.reset(options={"problem_index": three})[1]["problem_index"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"deck": 3},
        {"deck": np.array(3)},
        {"problem_indices": 3},
        {"problem_indices": np.array(3)},
        {"deck": [1], "problem_index": 2},
        {"problem_index": 1, "problem_indices": [0, 0, 0]},
    ],
)
def test_decks_and_indices_are_lists_and_one_of_them(options: dict[str, Any], venv: MathReasonVector) -> None:
    with pytest.raises(UsageError, match=r"no list of problem indices|not both"):
        venv.reset(options=options)


@pytest.mark.parametrize("options", [{"problem_index": -1}, {"problem_indices": [5, None, 2**31]}])
def test_a_reset_to_a_problem_that_is_not_there_changes_nothing(options: dict[str, Any]) -> None:
    env, other = MathReasonVector(num_envs=3, **SHORT), MathReasonVector(num_envs=3, **SHORT)
    assert_same(env.reset(seed=1), other.reset(seed=1))
    with pytest.raises(UsageError, match=r"problem_index=.* is outside"):
        env.reset(seed=2, options=options)
    for _ in range(9):
        assert_same(env.step(np.array([5, 6, 7])), other.step(np.array([5, 6, 7])))


def test_an_episode_whose_prompt_cannot_be_had_leaves_its_slot_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    env = MathReasonVector(num_envs=2, copy=False, **SHORT)
    observation, _ = env.reset(seed=0)
    before, eos = observation["input_ids"][0].copy(), eos_of(env)
    length = observation["length"][0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(env.task, "_tokenize", lambda index: np.zeros(65, dtype=np.int64))
        with pytest.raises(UsageError, match="has 65 tokens, over max_prompt_tokens=64"):
            env.step(np.array([eos, 5]))
    before[length] = eos
    np.testing.assert_array_equal(env._ids[0], before)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.array([5, 5]))
    env.reset(seed=0)
    env.step(np.array([5, 5]))
