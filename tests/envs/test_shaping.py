"""Optional reward parts: off by default, added on the last token, and the verdict untouched."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import envs  # noqa: F401  (registers the environments)
from envs.shaping import FormatReward, LengthPenalty, ShapedReward, ShapedRewardVector
from registry import UsageError

PARTS = [FormatReward(0.5), LengthPenalty(0.01, free_tokens=1)]


def tokens(env: Any, text: str) -> list[int]:
    (eos,) = env.unwrapped.task.stop_token_ids
    return [*env.unwrapped.task.tokenizer(text, add_special_tokens=False)["input_ids"], eos]


@pytest.mark.parametrize(
    ("text", "form"), [("#### {gold}", 0.5), ("#### {gold}1", 0.5), ("no idea", 0.0), ("####", 0.0)]
)
def test_single(text: str, form: float) -> None:
    env = ShapedReward(gym.make("MathReason-v0"), PARTS)
    _, start = env.reset(options={"problem_index": 3})
    gold = env.unwrapped.task.problem(start["problem_index"]).answer  # type: ignore[attr-defined]
    ids = tokens(env, text.format(gold=gold))
    for n, token in enumerate(ids):
        _, reward, terminated, _, info = env.step(np.int64(token))
        assert terminated == (n == len(ids) - 1)
        assert terminated or reward == 0.0
    length = -0.01 * (len(ids) - 1)
    assert (info["format_reward"], info["length_penalty"]) == (form, pytest.approx(length))
    assert info["verdict_reward"] == float(info["is_success"])
    assert reward == pytest.approx(info["verdict_reward"] + form + length)


def test_vector_equals_single() -> None:
    venv = ShapedRewardVector(gym.make_vec("MathReason-v0", num_envs=2), PARTS)
    venv.reset(options={"problem_indices": np.array([3, 4])})
    gold = venv.unwrapped.task.problem(3).answer  # type: ignore[attr-defined]
    texts = [tokens(venv, f"#### {gold}"), tokens(venv, "none, I think, or 5")]
    ended: dict[int, tuple[float, float, float, float]] = {}
    for step in range(max(map(len, texts))):
        actions = np.array([ids[min(step, len(ids) - 1)] for ids in texts])
        _, rewards, terminated, _, infos = venv.step(actions)
        for slot in np.flatnonzero(terminated):
            final = infos["final_info"]
            shares = [final[key][slot] for key in ("verdict_reward", "format_reward", "length_penalty")]
            ended.setdefault(int(slot), (float(rewards[slot]), *map(float, shares)))
    assert ended[0][1:3] == (1.0, 0.5)
    assert ended[1][1:3] == (0.0, 0.0)
    for slot, (reward, *shares) in ended.items():
        assert reward == pytest.approx(sum(shares))
        assert shares[2] == pytest.approx(-0.01 * (len(texts[slot]) - 1))
    venv.close()


def test_names_must_differ() -> None:
    with pytest.raises(UsageError, match="one name"):
        ShapedReward(gym.make("MathReason-v0"), [FormatReward(), FormatReward()])
