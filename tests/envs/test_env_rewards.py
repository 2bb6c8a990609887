"""Right answers score 1 through the environment, and episodes end where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from envs.math_reason import MathReason
from envs.task import BUILTIN_TOKENIZER
from envs.vector import MathReasonVector
from tests.oracles.env_oracles import R1, SHORT, assert_same, eos_of


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


def test_the_coin_is_another_one_by_seed_and_slot() -> None:
    env = gym.make("MathReason-v0", reward="random")

    def coin(seed: int) -> float:
        env.reset(seed=seed, options={"problem_index": 5})
        return float(env.step(0)[1])

    coins = [coin(seed) for seed in range(40)]
    assert 8 < sum(coins) < 32
    assert coins == [coin(seed) for seed in range(40)]
    venv = gym.make_vec("MathReason-v0", num_envs=64, reward="random")
    venv.reset(seed=0, options={"problem_index": 5})
    slots = venv.step(np.zeros(64, dtype=np.int64))[1]
    assert slots[:40].tolist() == coins and 16 < slots.sum() < 48
