"""The deck: dealt in order, drained to the last episode, whatever the actions and the number of slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.vector import MathReasonVector
from registry import UsageError
from tests.oracles.env_oracles import SHORT, eos_of


@pytest.fixture(scope="module")
def venv() -> Iterator[MathReasonVector]:
    env = MathReasonVector(num_envs=3, **SHORT)
    yield env
    env.close()


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


def test_a_part_of_a_deck_keeps_its_numbers_and_verdicts_are_timed(venv: MathReasonVector) -> None:
    _, info = venv.reset(options={"deck": [4, 5], "group_size": 2, "first_group": 3})
    assert info["episode_id"].tolist() == [6, 7, 8] and info["group_id"].tolist() == [3, 3, 4]
    assert venv.reward_seconds == 0.0
    drain(venv, [4, 5], 2, lambda episode, position: 5)
    assert venv.reward_seconds > 0.0
    with pytest.raises(UsageError, match="first_group"):
        venv.reset(options={"first_group": 3})
