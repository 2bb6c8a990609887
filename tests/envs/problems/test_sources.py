"""What every source promises: a finite one has a length, bounds and an end, an unlimited one says that it has none; and
every registered environment can be made as it is registered."""

from __future__ import annotations

import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs.registration import registry

from envs import check_id
from envs.problem import Problem
from envs.problems import load_problems
from envs.problems.sources import PUBLISHED
from envs.verifier.scorers import entries
from registry import UsageError

ROWS = [{"question": f"What is {n} + 2?", "answer": str(n + 2)} for n in range(3)]
IDS = sorted(id for id in registry if id.startswith("MathReason"))


class Endless:
    """A reasoning-gym data set: it gives an entry for any index."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{index}?", "answer": str(index)}


@pytest.fixture
def reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for the library."""
    library, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    library.create_dataset = lambda task, **given: Endless()  # type: ignore[attr-defined]
    factory.DATASETS = {"chess": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    entries.cache_clear()
    yield
    entries.cache_clear()


FINITE: dict[str, tuple[Any, dict[str, Any]]] = {
    "generated": ("arithmetic", {"limit": 3}),
    "rows": (ROWS, {}),
    "reasoning-gym, limited": ("reasoning_gym:chess", {"limit": 3}),
    "reasoning-gym": ("reasoning_gym:chess", {"size": 3, "split": "test"}),
}


@pytest.mark.usefixtures("reasoning_gym")
@pytest.mark.parametrize("case", FINITE)
def test_a_finite_source_is_a_sequence(case: str) -> None:
    name, options = FINITE[case]
    problems: Any = load_problems(name, **options)
    listed = list(problems)
    assert len(listed) == len(problems) == problems.size == 3
    assert listed == [problems[index] for index in range(3)] == [problems[index] for index in range(-3, 0)]
    assert all(isinstance(problem, Problem) for problem in listed)
    assert len({problem.id for problem in listed}) == 3
    for index in (3, -4, 10**9):
        with pytest.raises(IndexError):
            problems[index]
    assert list(reversed(problems)) == listed[::-1]


def test_an_unlimited_source_has_neither_length_nor_end() -> None:
    problems: Any = load_problems("arithmetic")
    for act in (len, list, tuple, sorted):
        with pytest.raises(UsageError, match="pass limit="):
            act(problems)
    assert problems and isinstance(next(iter(problems)), Problem)


@pytest.mark.usefixtures("reasoning_gym")
@pytest.mark.parametrize("options", [{"size": 0}, {"size": -1}, {"size": "3"}, {"limit": 0}, {"limit": True}])
def test_sizes_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be an integer of at least 1"):
        load_problems("reasoning_gym:chess", **options)


@pytest.mark.parametrize("id", IDS)
def test_every_registered_environment_can_be_made_as_it_is_registered(
    id: str, shared_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under every template that needs no tokenizer of its own, and without a word about the prompts' length."""
    data = shared_dir / "data"
    monkeypatch.setenv("NESTED_REFT_DATA", str(data))
    published = PUBLISHED.get(id.removeprefix("MathReason/").removesuffix("-v0"))
    if published is not None:
        files = published.files[published.default_split]
        if not any((data / file.partition("#")[0]).exists() for file in files):
            pytest.skip(f"no data for {id}")
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    gym.make(id).close()
    for template in ("plain", "qwen-math", "r1"):
        arguments: dict[str, Any] = {"template": template}
        if published is None:
            arguments["max_prompt_tokens"] = 512  # generated problems with a preamble
        env = gym.make(id, **arguments)
        observation, _ = env.reset(seed=0)
        assert observation in env.observation_space
        env.close()
    assert "longer than the specified maximum" not in caplog.text


@pytest.mark.parametrize("id", ["MathReason/gsm8-v0", "MathReason/xyz-v0", "MathReason/gsm8k-v1", "gsm8k", "foo", ""])
def test_an_unknown_id_lists_the_known_ones(id: str) -> None:
    for known in IDS:
        check_id(known)
        with pytest.raises(UsageError, match=re.escape(f"env {id!r}: ") + f".*{known}"):
            check_id(id)
