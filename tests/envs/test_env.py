"""The environment against gymnasium's own vector envs and both libraries' checkers."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import envs.task
from envs.math_reason import MathReason
from envs.problems.sources import PUBLISHED
from envs.task import Task, TaskSpec
from envs.vector import MathReasonVector
from registry import UsageError
from tests.oracles.env_oracles import R1, SHORT, Typist, assert_same


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
    for name in PUBLISHED:
        gym.spec(f"MathReason/{name}-v0").to_json()


def test_a_fresh_interpreter_makes_it_by_module_and_id_without_torch() -> None:
    code = (
        "import sys, gymnasium as gym; env = gym.make('envs:MathReason-v0'); env.reset(seed=1); "
        "env.step(env.action_space.sample()); assert 'torch' not in sys.modules; print(env.spec.id)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "MathReason-v0"


def test_generated_problems_and_their_prompts_take_no_more_memory_the_longer_a_run(monkeypatch) -> None:
    monkeypatch.setattr(envs.task, "REMEMBERED", 16)
    task, asked = Task(TaskSpec()), [0, 1, 2, *range(1000), 2, 1, 0]
    tracemalloc.start()
    prompts = [hash(task.prompt(index).tobytes()) for index in asked]
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 200_000  # 1000 problems take a megabyte
    assert prompts[:3] == prompts[3:6] == prompts[:-4:-1] and len(set(prompts)) > 900


def test_deferred_verdicts_come_later_and_equal_the_immediate_ones(tmp_path: Path) -> None:
    """A symbolic answer needs a worker: with ``defer`` no step waits for it, and the reward is the same in the end."""
    golds = [r"\sum_{k=1}^{3} \frac{1}{k^2}", r"\frac{49}{36}", "5"]
    rows = [{"question": f"What is number {n}?", "answer": gold} for n, gold in enumerate(golds)]
    path = tmp_path / "symbolic.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    envs = MathReasonVector(num_envs=2, problems=str(path), max_new_tokens=60)
    tokenizer = envs.task.tokenizer
    texts = [r"\boxed{\frac{49}{36}}", r"\boxed{\frac{49}{36}}", r"\boxed{6}"]
    scripts = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]

    seen = set()

    def play(defer: bool) -> tuple[dict[int, float], dict[int, str]]:
        obs, info = envs.reset(options={"deck": [0, 1, 2], "defer": defer})
        episode, position = np.array(info["episode_id"]), np.zeros(2, dtype=int)
        rewards, statuses = {}, {}
        while (live := obs["length"][:, 0] > 0).any():
            actions = [scripts[e][p] if up else 0 for e, p, up in zip(episode, position, live, strict=True)]
            position += 1
            obs, reward, terminated, _, info = envs.step(np.array(actions))
            for slot in np.flatnonzero(terminated):
                rewards[int(episode[slot])] = float(reward[slot])
                statuses[int(episode[slot])] = info["final_info"]["status"][slot]
                seen.add(statuses[int(episode[slot])])
            if "episode_id" in info:
                begun = info["_episode_id"]
                episode[begun], position[begun] = info["episode_id"][begun], 0
        for late, final in envs.settle():
            rewards[final["episode_id"]], statuses[final["episode_id"]] = late, final["status"]
        return rewards, statuses

    assert play(defer=True) == play(defer=False) == ({0: 1.0, 1: 1.0, 2: 0.0}, {0: "right", 1: "right", 2: "wrong"})
    assert "pending" in seen, "a worker needs longer than a step"
    with pytest.raises(UsageError, match="go with a deck"):
        envs.reset(options={"defer": True})
