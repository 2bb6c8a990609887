"""The environment against oracles: gymnasium's SyncVectorEnv and checkers, and the properties of a dealt deck."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from transformers import PreTrainedTokenizerFast

import envs
from envs.math_reason import MathReason
from envs.task import BUILTIN_TOKENIZER
from envs.vector import MathReasonVector
from registry import UsageError

R1 = {"template": "r1", "max_prompt_tokens": 512, "max_new_tokens": 12}
SHORT = {"max_new_tokens": 8}
EOS_SHARE = 0.2


@pytest.fixture(scope="module")
def venv() -> Iterator[MathReasonVector]:
    env = MathReasonVector(num_envs=3, **SHORT)
    yield env
    env.close()


def eos_of(env: Any) -> int:
    (token,) = env.unwrapped.task.stop_token_ids
    return int(token)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the last key, type and element."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), where
        for n, value in enumerate(expected):
            assert_same(found[n], value, f"{where}({n})")
    elif isinstance(expected, np.ndarray) and expected.dtype == object:
        assert isinstance(found, np.ndarray) and found.dtype == object and found.shape == expected.shape, where
        for n, value in enumerate(expected):
            assert_same(found[n], value, f"{where}[{n}]")
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray) and found.dtype == expected.dtype, where
        np.testing.assert_array_equal(found, expected, err_msg=where)
    else:
        assert type(found) is type(expected) and found == expected, where


class Typist:
    """Random tokens per slot, now and then EOS or a whole text such as a stop string."""

    def __init__(self, env: Any, seed: int, texts: tuple[str, ...] = ()) -> None:
        task = env.unwrapped.task
        self.rng = np.random.default_rng(seed)
        self.vocabulary, self.eos = task.vocab_size, eos_of(env)
        self.texts = [task.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.pending: list[list[int]] = [[] for _ in range(env.num_envs)]

    def __call__(self) -> np.ndarray:
        return np.array([self._token(pending) for pending in self.pending])

    def _token(self, pending: list[int]) -> int:
        if not pending:
            if self.rng.random() < EOS_SHARE:
                return self.eos
            if self.texts and self.rng.random() < 0.5:
                pending.extend(self.texts[self.rng.integers(len(self.texts))])
            else:
                pending.append(int(self.rng.integers(self.vocabulary)))
        return pending.pop(0)


# --- equal to SyncVectorEnv ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("kwargs", [SHORT, R1, {**SHORT, "reward": "random"}], ids=["plain", "r1", "random reward"])
def test_native_vector_env_equals_sync_vector_env(seed: int, kwargs: dict[str, Any]) -> None:
    native = MathReasonVector(num_envs=4, **kwargs)
    sync = SyncVectorEnv([lambda: MathReason(**kwargs)] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    assert native.metadata["autoreset_mode"] == sync.metadata["autoreset_mode"]
    assert native.observation_space == sync.observation_space and native.action_space == sync.action_space
    assert_same(native.reset(seed=seed), sync.reset(seed=seed))
    typist = Typist(native, seed, ("</think> <answer> \\boxed{4}</answer>", " #### 12"))
    reasons = set()
    for step in range(60):
        if step == 40:  # a reset in mid-episode, of some slots
            mask = np.array([True, False, True, False])
            assert_same(native.reset(options={"reset_mask": mask}), sync.reset(options={"reset_mask": mask}))
        actions = typist()
        found, expected = native.step(actions), sync.step(actions)
        for part in range(5):
            assert_same(found[part], expected[part], f"step {step} part {part}")
        if "final_info" in found[4]:
            reasons |= {r for r in found[4]["final_info"]["finish_reason"] if r}
    assert reasons >= {"eos", "length"} and (kwargs is not R1 or "stop" in reasons)


def test_seeds_per_slot_and_continued_resets_equal_sync_vector_env() -> None:
    native = MathReasonVector(num_envs=3, **SHORT)
    sync = SyncVectorEnv([lambda: MathReason(**SHORT)] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    for arguments in ({"seed": [5, 5, 9]}, {}, {"seed": 2}, {"options": {"problem_index": 17}}, {}):
        assert_same(native.reset(**arguments), sync.reset(**arguments), str(arguments))  # type: ignore[arg-type]


def test_async_vector_env_runs_and_equals_the_native_one() -> None:
    native = MathReasonVector(num_envs=2, **SHORT)
    parallel = AsyncVectorEnv([lambda: MathReason(**SHORT)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    try:
        assert_same(native.reset(seed=3), parallel.reset(seed=3))
        typist = Typist(native, 3)
        for _ in range(12):
            actions = typist()
            for found, expected in zip(native.step(actions), parallel.step(actions), strict=True):
                assert_same(found, expected)
    finally:
        parallel.close()


def test_observations_are_copies_unless_asked_otherwise() -> None:
    for copy in (True, False):
        env = MathReasonVector(num_envs=2, copy=copy, **SHORT)
        before, _ = env.reset(seed=0)
        length = before["length"].copy()
        env.step(np.array([5, 6]))
        assert (before["length"] == length).all() == copy


# --- registration and checkers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("render_mode", [None, "ansi", "human"])
def test_both_env_checkers_are_silent(render_mode: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("MathReason-v0", render_mode=render_mode)
        check_env(env.unwrapped)
        sb3_check_env(env.unwrapped, warn=True)
        env.close()


def test_ids_specs_and_the_native_vector_env() -> None:
    env = gym.make("MathReason-v0", problem_options={"level": 2}, max_new_tokens=40)
    assert env.spec is not None
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.task.spec == env.unwrapped.task.spec  # type: ignore[attr-defined]
    assert env.spec.max_episode_steps is None
    vector = gym.make_vec("MathReason-v0", num_envs=5)
    assert isinstance(vector, MathReasonVector) and vector.num_envs == 5
    assert isinstance(gym.make_vec("MathReason-v0", num_envs=2, vectorization_mode="sync"), SyncVectorEnv)
    assert json.loads(vector.spec.to_json())["id"] == "MathReason-v0"  # type: ignore[union-attr]
    for name in envs.PROBLEM_SETS:
        gym.spec(f"MathReason/{name}-v0").to_json()


def test_a_fresh_interpreter_makes_it_by_module_and_id_without_torch() -> None:
    code = (
        "import sys, gymnasium as gym; env = gym.make('envs:MathReason-v0'); env.reset(seed=1); "
        "env.step(env.action_space.sample()); assert 'torch' not in sys.modules; print(env.spec.id)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "MathReason-v0"


# --- the deck -----------------------------------------------------------------------------------------------------


def drain(
    env: MathReasonVector, deck: list[int], group_size: int, choose: Callable[[int, int], int]
) -> dict[int, tuple[Any, ...]]:
    """Every episode's (problem, group, sample, prefix at the end, reward); ``choose(episode, position)`` is a token."""
    done: dict[int, tuple[Any, ...]] = {}
    episode = np.full(env.num_envs, -1)
    dealt: list[int] = []

    def begin(info: dict[str, Any]) -> None:
        for slot in np.flatnonzero(info.get("_episode_id", np.zeros(env.num_envs, bool))):
            episode[slot] = info["episode_id"][slot]
            dealt.append(int(episode[slot]))

    obs, info = env.reset(options={"deck": deck, "group_size": group_size})
    begin(info)
    for _ in range(len(deck) * group_size * env.task.spec.max_new_tokens + 1):
        live = obs["length"][:, 0] > 0
        assert (live == env.live).all()
        if not live.any():
            assert dealt == list(range(len(deck) * group_size))  # in order
            return done
        idle = -9  # no token at all: an idle slot's action is ignored
        actions = np.array(
            [choose(episode[s], int(obs["length"][s, 0])) if live[s] else idle for s in range(len(live))]
        )
        obs, rewards, terminated, truncated, info = env.step(actions)
        ended = terminated | truncated
        assert not (terminated & truncated).any() and not ended[~live].any() and not rewards[~ended].any()
        for slot in np.flatnonzero(ended):
            final = {key: value[slot] for key, value in info["final_info"].items() if key[0] != "_"}
            prefix = info["final_obs"][slot]
            text = prefix["input_ids"][: prefix["length"][0]].tolist()
            assert final["episode_id"] == episode[slot] and final["episode_id"] not in done
            assert len(text) == final["prompt_len"] + final["response_len"]
            done[final["episode_id"]] = (
                final["problem_index"],
                final["group_id"],
                final["sample_idx"],
                text,
                rewards[slot],
            )
        begin(info)
    raise AssertionError("the deck was not drained in the time that its longest episodes take")


SLOT_ENVS = {slots: MathReasonVector(num_envs=slots, **SHORT) for slots in (1, 2, 5)}


@settings(deadline=None, max_examples=40)
@given(
    slots=st.sampled_from(sorted(SLOT_ENVS)),
    deck=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    group_size=st.integers(1, 3),
    eos_share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_every_dealt_episode_ends_exactly_once(
    slots: int, deck: list[int], group_size: int, eos_share: float, seed: int
) -> None:
    env = SLOT_ENVS[slots]
    eos = eos_of(env)

    def choose(episode: int, position: int) -> int:
        rng = np.random.default_rng([seed, episode, position])
        return eos if rng.random() < eos_share else int(rng.integers(env.task.vocab_size))

    done = drain(env, deck, group_size, choose)
    assert sorted(done) == list(range(len(deck) * group_size))
    for episode, (problem, group, sample, _, _) in done.items():
        assert (problem, group, sample) == (deck[episode // group_size], episode // group_size, episode % group_size)
    others = [drain(SLOT_ENVS[n], deck, group_size, choose) for n in SLOT_ENVS if n != slots]
    assert all(other == done for other in others)


def test_a_new_deck_replaces_what_is_left_of_the_old_one(venv: MathReasonVector) -> None:
    venv.reset(options={"deck": [1, 2, 3, 4], "group_size": 2})
    venv.step(np.array([eos_of(venv), 5, 6]))
    assert sorted(drain(venv, [9], 1, lambda *_: eos_of(venv))) == [0]
    _, info = venv.reset(seed=0)  # and without a deck problems are drawn again
    assert info["_problem_index"].all() and venv.live.all()


def test_problem_indices_and_reset_mask(venv: MathReasonVector) -> None:
    _, info = venv.reset(seed=0, options={"problem_indices": [4, 8, 15]})
    assert info["problem_index"].tolist() == [4, 8, 15]
    assert info["problem_id"].tolist() == [venv.task.problem(n).id for n in (4, 8, 15)]
    _, info = venv.reset(options={"problem_index": 23})
    assert info["problem_index"].tolist() == [23] * 3
    before, *_ = venv.step(np.array([5, 6, 7]))
    after, info = venv.reset(options={"reset_mask": np.array([False, True, False]), "problem_indices": [0, 16, 0]})
    assert info["_problem_index"].tolist() == [False, True, False] and info["problem_index"][1] == 16
    for slot in (0, 2):
        np.testing.assert_array_equal(after["input_ids"][slot], before["input_ids"][slot])


# --- rewards and ends ---------------------------------------------------------------------------------------------


def gold_tokens(task: Any, index: int) -> list[int]:
    problem = task.problem(index)
    return [*task.tokenizer(problem.solution, add_special_tokens=False)["input_ids"], min(task.stop_token_ids)]


def test_the_gold_answer_scores_one_and_another_zero() -> None:
    single, vector = MathReason(), MathReasonVector(num_envs=1)
    for index in range(60):
        tokens = gold_tokens(single.task, index)
        for wrong in (False, True):
            if wrong:
                text = f" #### {int(single.task.problem(index).answer) + 1}"
                tokens = [*single.task.tokenizer(text, add_special_tokens=False)["input_ids"], eos_of(single)]
            single.reset(options={"problem_index": index})
            vector.reset(options={"deck": [index]})
            for token in tokens:
                _, reward, terminated, truncated, info = single.step(np.int64(token))
                _, rewards, ends, _, infos = vector.step(np.array([token]))
                assert rewards[0] == reward and ends[0] == terminated and not truncated
                assert terminated or reward == 0.0
            assert terminated and reward == float(not wrong), single.task.problem(index)
            assert info["is_success"] is (not wrong) and info["finish_reason"] == "eos"
            assert info["status"] == infos["final_info"]["status"][0] == ("wrong" if wrong else "right")
            assert info["response_len"] == len(tokens)


def test_a_file_of_problems_is_scored_through_the_env(tmp_path: Any) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Two and two?", "answer": "4"}\n{"question": "A half of 3?", "answer": "1.5"}\n')
    env = gym.make("MathReason-v0", problems=str(path))
    for index, said in ((0, "4"), (1, "3/2")):
        env.reset(options={"problem_index": index})
        task = env.unwrapped.task  # type: ignore[attr-defined]
        for token in task.tokenizer(f" #### {said}", add_special_tokens=False)["input_ids"]:
            assert env.step(token)[1] == 0.0
        assert env.step(eos_of(env))[1] == 1.0


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_gold_answers_of_real_sets_score_one_through_the_env(name: str, shared_dir: Path) -> None:
    options = {"data_dir": str(shared_dir / "data"), "limit": 60}
    env = gym.make_vec(f"MathReason/{name}-v0", num_envs=1, problem_options=options, split="test")
    task = env.unwrapped.task  # type: ignore[attr-defined]
    for index in range(task.problems.size):
        env.reset(options={"deck": [index]})
        said = f" #### {task.problem(index).answer}"
        tokens = [*task.tokenizer(said, add_special_tokens=False)["input_ids"], eos_of(env)]
        rewards = [env.step(np.array([token]))[1][0] for token in tokens]
        assert rewards == [0.0] * (len(tokens) - 1) + [1.0], task.problem(index)


@pytest.mark.parametrize("last_is_eos", [True, False])
def test_eos_on_the_last_allowed_token_terminates(last_is_eos: bool) -> None:
    env = MathReason(**SHORT)  # type: ignore[arg-type]
    env.reset(seed=0)
    flags = [env.step(np.int64(5))[2:4] for _ in range(7)]
    assert flags == [(False, False)] * 7
    _, _, terminated, truncated, info = env.step(np.int64(eos_of(env) if last_is_eos else 5))
    assert (terminated, truncated) == (last_is_eos, not last_is_eos)
    assert info["finish_reason"] == ("eos" if last_is_eos else "length") and info["response_len"] == 8
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.int64(5))


def test_a_stop_string_terminates_wherever_its_tokens_are_cut() -> None:
    env = MathReason(**{**R1, "max_new_tokens": 48})  # type: ignore[arg-type]
    tokenizer = env.task.tokenizer
    for written in (
        tokenizer("so </think><answer>\\boxed{9}</answer>", add_special_tokens=False)["input_ids"],
        [t for letter in "x</answer>" for t in tokenizer(letter, add_special_tokens=False)["input_ids"]],
    ):
        env.reset(seed=0)
        ends = [env.step(np.int64(token))[2:4] for token in written]
        assert ends == [(False, False)] * (len(written) - 1) + [(True, False)]


def test_stop_strings_that_are_special_tokens_terminate(tmp_path: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BUILTIN_TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path)
    env = MathReason(tokenizer=str(tmp_path), template="qwen-math", max_prompt_tokens=512)  # type: ignore[arg-type]
    env.reset(seed=0)
    tokens = tokenizer("\\boxed{3}<|im_end|>", add_special_tokens=False)["input_ids"]
    ends = [env.step(np.int64(token))[2:4] for token in tokens]
    assert ends == [(False, False)] * (len(tokens) - 1) + [(True, False)]


def test_equal_seeds_give_equal_episodes_and_the_splits_differ() -> None:
    first, second = (MathReason() for _ in range(2))
    for seed in (0, 11, None):
        assert_same(first.reset(seed=seed), second.reset(seed=seed))
    assert MathReason(split="test").task.problem(0).question != first.task.problem(0).question


def test_rendering(capsys: pytest.CaptureFixture[str]) -> None:
    human, ansi = MathReason(render_mode="human"), MathReason(render_mode="ansi")
    vector = MathReasonVector(num_envs=2, render_mode="ansi")
    for env in (human, ansi):
        env.reset(options={"problem_index": 3})
        for token in gold_tokens(env.task, 3):
            env.step(np.int64(token))
    printed, shown = capsys.readouterr().out, ansi.render()
    assert human.render() is None and shown == printed
    problem = ansi.task.problem(3)
    assert shown is not None and problem.question in shown and problem.solution.strip() in shown
    assert f"[right: reward 1, answered {problem.answer}, gold {problem.answer}]" in shown
    vector.reset(options={"problem_index": 3})
    vector.step(np.array([eos_of(vector), 5]))
    texts = vector.render()
    assert texts is not None and len(texts) == 2 and "reward 0" in texts[0] and problem.question in texts[1]


# --- errors -------------------------------------------------------------------------------------------------------

IN_THE_CONSTRUCTOR = {
    "no slots": ({"num_envs": 0}, "at least 1"),
    "slots of another type": ({"num_envs": 2.5}, "integer"),
    "unknown argument": ({"max_new_token": 5}, "max_new_tokens"),
    "unknown template": ({"template": "plian"}, "plain"),
    "prompt over budget": ({"max_prompt_tokens": 3}, "raise"),
    "no file": ({"problems": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    "no tokenizer": ({"tokenizer": "./no-such-folder"}, "builtin"),
    "no split": ({"split": "tset"}, "test"),
    "no such level": ({"problem_options": {"level": 99}}, "99"),
    "one token": ({"max_new_tokens": 1}, "at least 2"),
    "a smaller vocabulary": ({"vocab_size": 5}, "tokenizer"),
    "unknown reward": ({"reward": "randm"}, "random"),
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
    with pytest.raises(UsageError, match="action=-1"):
        single.step(np.int64(-1))
    with pytest.raises(UsageError, match="problem_index"):
        single.reset(options={"problem": 3})


# --- playing ------------------------------------------------------------------------------------------------------


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


def test_play_says_what_is_wrong_without_a_traceback() -> None:
    command = [sys.executable, "-m", "envs.play", "--problem", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: problem_index=-1") and "Trace" not in done.stderr
