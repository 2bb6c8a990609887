"""Optional reward parts: off by default, added on the last token, and the verdict untouched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs.math_reason import MathReason
from envs.shaping import (
    FormatReward,
    LengthPenalty,
    OverlongPunishment,
    ShapedReward,
    ShapedRewardVector,
    whole_parts,
)
from envs.task import INFO
from envs.vector import MathReasonVector
from registry import UsageError, reward_parts
from tests.oracles.env_oracles import SHORT, Typist, assert_same

SAME_STEP: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}
PARTS = [FormatReward(0.5), LengthPenalty(0.01, free_tokens=1)]
SUM = r"\sum_{k=1}^{4} \frac{1}{k^2}"  # asked for nowhere else: what is settled once is remembered
AS_FIELD = ({"id": "format", "weight": 0.5}, {"id": "length-penalty", "weight": 0.01, "free_tokens": 1})


def tokens(env: Any, text: str) -> list[int]:
    (eos,) = env.unwrapped.task.stop_token_ids
    return [*env.unwrapped.task.tokenizer(text, add_special_tokens=False)["input_ids"], eos]


def make_single(how: str, **task: Any) -> gym.Env:
    if how == "field":
        return gym.make("MathReason-v0", reward_parts=AS_FIELD, **task)
    return ShapedReward(gym.make("MathReason-v0", **task), PARTS)


@pytest.mark.parametrize("how", ["field", "wrapper"])
@pytest.mark.parametrize(
    ("text", "form"), [("#### {gold}", 0.5), ("#### {gold}1", 0.5), ("no idea", 0.0), ("####", 0.0)]
)
def test_single(how: str, text: str, form: float) -> None:
    env = make_single(how)
    _, start = env.reset(options={"problem_index": 3})
    gold = env.unwrapped.task.problem(start["problem_index"]).answer  # type: ignore[attr-defined]
    ids = tokens(env, text.format(gold=gold))
    for n, token in enumerate(ids):
        _, reward, terminated, _, info = env.step(np.int64(token))
        assert terminated == (n == len(ids) - 1)
        assert terminated or reward == 0.0
    length = -0.01 * (len(ids) - 1)
    assert (info["format_reward"], info["length_penalty"]) == (form, pytest.approx(length))
    assert info["verdict_reward"] == float(info["is_success"]) == float(text == "#### {gold}")
    assert reward == pytest.approx(info["verdict_reward"] + form + length)


@pytest.mark.parametrize("control", ["verified", "random"])
def test_field_of_the_vector_env_equals_field_of_the_single_env_and_both_wrappers(control: str) -> None:
    """The coin of the control arm stands in for the verdict's reward alone."""
    task: dict[str, Any] = {**SHORT, "reward": control}
    wrapped_singles = SyncVectorEnv(
        [lambda: ShapedReward(MathReason(**task), PARTS)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    )
    singles = SyncVectorEnv(
        [lambda: MathReason(**task, reward_parts=AS_FIELD)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    )
    native = MathReasonVector(num_envs=3, **task, reward_parts=AS_FIELD)
    others = [singles, wrapped_singles, ShapedRewardVector(MathReasonVector(num_envs=3, **task), PARTS)]
    bare = MathReasonVector(num_envs=3, **task)
    for env in (native, bare, *others):
        env.reset(seed=5)
    typist, rewards = Typist(native, 5, (" #### 12", "####")), set()
    for step in range(80):
        actions = typist()
        expected, unshaped = native.step(actions), bare.step(actions)
        for other in others:
            for part, value in enumerate(other.step(actions)):
                assert_same(value, expected[part], f"step {step} part {part}")
        final = expected[4].get("final_info", {})
        if final:
            rewards |= set(final["verdict_reward"][final["_verdict_reward"]].tolist())
            assert_same(final["verdict_reward"], unshaped[1])
            assert_same(final["is_success"], unshaped[4]["final_info"]["is_success"])
    assert rewards == ({0.0, 1.0} if control == "random" else {0.0}), "random typing solves nothing"


def test_a_deferred_verdict_gets_its_parts_when_it_is_settled(tmp_path: Path) -> None:
    rows = [{"question": "What is it?", "answer": SUM}, {"question": "What is five?", "answer": "5"}]
    path = tmp_path / "symbolic.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    env = MathReasonVector(num_envs=2, problems=str(path), max_new_tokens=60, reward_parts=AS_FIELD)
    scripts = [tokens(env, r"\boxed{\frac{205}{144}}"), tokens(env, r"\boxed{5}")]
    length = max(map(len, scripts))

    def play(defer: bool) -> tuple[dict[int, dict[str, Any]], set[str]]:
        env.reset(options={"deck": [0, 1], "defer": defer})
        outcomes: dict[int, dict[str, Any]] = {}
        statuses: set[str] = set()
        for step in range(length):
            _, rewards, ended, _, infos = env.step(np.array([ids[min(step, len(ids) - 1)] for ids in scripts]))
            for slot in np.flatnonzero(ended):
                final = {key: value[slot] for key, value in infos["final_info"].items() if key[0] != "_"}
                statuses.add(final["status"])
                assert final["status"] != "pending" or rewards[slot] == 0.0
                outcomes[int(final["episode_id"])] = {**final, "reward": float(rewards[slot])}
        outcomes |= {final["episode_id"]: {**final, "reward": late} for late, final in env.settle()}
        return outcomes, statuses

    (late, statuses), (immediate, _) = play(defer=True), play(defer=False)
    assert late == immediate and late[1]["reward"] == pytest.approx(1.5 - 0.01 * (len(scripts[1]) - 1))
    assert late[0]["reward"] == pytest.approx(1.0 + 0.5 - 0.01 * (len(scripts[0]) - 1))
    assert "pending" in statuses, "a worker needs longer than a step"


@dataclass(frozen=True)
class Hurry:
    """A part of a third party, which looks at another entry of the terminal info."""

    name: str = "hurry"

    def __call__(self, info: Any) -> float:
        return -1.0 if info["finish_reason"] == "length" else 0.0


def test_a_part_of_ones_own_sees_the_whole_terminal_info() -> None:
    single = ShapedReward(gym.make("MathReason-v0", **SHORT), ["format", Hurry()])
    venv = ShapedRewardVector(gym.make_vec("MathReason-v0", num_envs=1, **SHORT), ["format", Hurry()])
    single.reset(options={"problem_index": 3})
    venv.reset(options={"problem_index": 3})
    for _ in range(8):
        _, reward, _, _, info = single.step(np.int64(5))
        _, rewards, _, _, infos = venv.step(np.array([5]))
    assert info["hurry"] == infos["final_info"]["hurry"][0] == -1.0
    assert reward == rewards[0] == -1.0 + info["format_reward"]


def test_a_registered_part_of_ones_own_is_a_field_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_parts, "_known", dict(reward_parts._known))
    reward_parts.register("hurry")(Hurry)
    env = gym.make("MathReason-v0", reward_parts=({"id": "hurry", "name": "late"},), **SHORT)
    env.reset(seed=0)
    *_, (_, reward, _, truncated, info) = [env.step(np.int64(5)) for _ in range(8)]
    assert truncated and reward == info["late"] == -1.0


def test_without_parts_nothing_changes() -> None:
    env, plain = gym.make("MathReason-v0", reward_parts=(), **SHORT), gym.make("MathReason-v0", **SHORT)
    for one in (env, plain):
        one.reset(seed=3)
    for _ in range(8):
        assert_same(env.step(np.int64(5)), plain.step(np.int64(5)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("format", "format"), "one name"),
        (("formt",), "did you mean 'format'"),
        (({"id": "format", "wieght": 1.0},), "did you mean 'weight'"),
        (({"weight": 1.0},), "has no 'id'"),
        (({"id": "format", "weight": float("nan")},), "weight=nan must be a number"),
        ("format", "tuple of ids"),
        ((FormatReward(),), "ShapedReward"),
        (({"id": "format", "name": "status"},), "would hide 'status'"),
    ],
)
def test_wrong_parts(parts: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        env = MathReason(reward_parts=parts)
        env.reset(seed=0)
        env.step(np.int64(min(env.task.stop_token_ids)))


def test_names_must_differ() -> None:
    with pytest.raises(UsageError, match="one name"):
        ShapedReward(gym.make("MathReason-v0"), [FormatReward(), FormatReward()])
    twice = ShapedReward(gym.make("MathReason-v0", reward_parts=("format",)), ["format"])
    twice.reset(seed=0)
    with pytest.raises(UsageError, match="would hide 'format_reward'"):
        twice.step(np.int64(min(twice.unwrapped.task.stop_token_ids)))  # type: ignore[attr-defined]


def test_specs_are_json_and_whole() -> None:
    env = gym.make("MathReason-v0", reward_parts=("format", {"id": "length-penalty", "weight": 0.01}))
    assert env.spec is not None
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.task.reward_parts == env.unwrapped.task.reward_parts  # type: ignore[attr-defined]
    whole = whole_parts(env.unwrapped.task.spec.reward_parts)  # type: ignore[attr-defined]
    assert whole == [
        {"id": "format", "weight": 0.1, "name": "format_reward"},
        {"id": "length-penalty", "weight": 0.01, "free_tokens": 0, "name": "length_penalty"},
    ]
    assert MathReason(reward_parts=whole).task.reward_parts == env.unwrapped.task.reward_parts  # type: ignore[attr-defined]


def test_overlong_punishment_is_the_published_formula() -> None:
    longest, cache = 40, 12  # L_max and L_cache of DAPO (arXiv 2503.14476), eq. 13
    part = OverlongPunishment(free_tokens=longest - cache, max_tokens=longest)
    for length in range(1, 50):
        if length <= longest - cache:
            expected = 0.0
        elif length <= longest:
            expected = ((longest - cache) - length) / cache
        else:
            expected = -1.0
        assert part({"response_len": length}) == pytest.approx(expected, abs=1e-12)
    assert OverlongPunishment(0.3, 4, 8)({"response_len": 6}) == pytest.approx(-0.15)


def test_an_overlong_punishment_that_cannot_act_is_refused() -> None:
    with pytest.raises(UsageError, match="free_tokens=16384 is not below max_new_tokens=8"):
        gym.make("MathReason-v0", reward_parts=("overlong",), **SHORT)
    with pytest.raises(UsageError, match="not below max_new_tokens=8"):
        ShapedReward(gym.make("MathReason-v0", **SHORT), [OverlongPunishment(free_tokens=8, max_tokens=9)])
    with pytest.raises(UsageError, match="below max_tokens=8"):
        OverlongPunishment(free_tokens=8, max_tokens=8)
    part = {"id": "overlong", "free_tokens": 4, "max_tokens": 8}
    env = gym.make("MathReason-v0", reward_parts=(part,), **SHORT)
    env.reset(seed=0)
    *_, (_, reward, _, _, info) = [env.step(np.int64(5)) for _ in range(8)]
    assert info["overlong_punishment"] == reward == -1.0


def test_a_terminal_info_has_its_own_names_and_those_of_the_parts():
    """By these the agents' metrics tell the parts of a reward."""
    for parts, names in (((), set()), (("format",), {"verdict_reward", "format_reward"})):
        env = gym.make("MathReason-v0", reward_parts=parts, max_new_tokens=2)
        env.reset(seed=0)
        env.step(5)
        *_, info = env.step(5)
        assert set(info) == INFO | names


@pytest.mark.parametrize("other_ends", [False, True])
def test_an_episode_that_a_time_limit_cut_has_no_parts(other_ends: bool) -> None:
    eos = tokens(gym.make("MathReason-v0"), "")[0]
    for made, wrap in (
        (gym.make_vec("MathReason-v0", num_envs=2, max_episode_steps=3), ShapedRewardVector),
        (SyncVectorEnv([lambda: gym.make("MathReason-v0", max_episode_steps=3)] * 2, **SAME_STEP), ShapedRewardVector),
    ):
        env = wrap(made, ["format", "length-penalty"])
        env.reset(seed=0)
        for last in (5, 5, eos if other_ends else 5):
            _, rewards, *_, infos = env.step(np.array([5, last]))
        assert rewards[0] == 0.0
        assert rewards[1] == (pytest.approx(-0.003) if other_ends else 0.0)
        assert infos["final_info"].get("_format_reward", np.zeros(2, bool)).tolist() == [False, other_ends]
    single = ShapedReward(gym.make("MathReason-v0", max_episode_steps=3), ["format"])
    single.reset(seed=0)
    *_, (_, reward, terminated, truncated, _) = [single.step(5) for _ in range(3)]
    assert (reward, terminated, truncated) == (0.0, False, True)


def test_environments_without_what_a_part_reads_are_refused() -> None:
    with pytest.raises(UsageError, match=r"needs AutoresetMode\.SAME_STEP"):
        ShapedRewardVector(gym.make_vec("MathReason-v0", num_envs=2, vectorization_mode="sync"), ["format"])
    pole = ShapedReward(gym.make("CartPole-v1"), ["format"])
    pole.reset(seed=0)
    with pytest.raises(UsageError, match=r"has none \('status'\)"):
        for _ in range(200):
            pole.step(0)
    text = ShapedReward(gym.make("TextMathReason-v0"), ["length-penalty"])
    text.reset(seed=0)
    with pytest.raises(UsageError, match="'length_penalty' needs 'response_len'"):
        text.step("7")


@pytest.mark.parametrize("name", ["verdict_reward", "_status", "", None])
def test_names_that_infos_cannot_have_are_refused(name: Any) -> None:
    with pytest.raises(UsageError, match=f"the name {name!r}"):
        gym.make("MathReason-v0", reward_parts=({"id": "format", "name": name},))


def test_weights_are_any_numbers_and_free_tokens_are_there() -> None:
    assert FormatReward(np.float32(0.5))({"status": "right"}) == 0.5
    with pytest.raises(UsageError, match="free_tokens=-100 must be at least 0"):
        LengthPenalty(free_tokens=-100)
