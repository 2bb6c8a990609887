"""The reward function for verl: its signature, its fields, its values, from many threads."""

from __future__ import annotations

import importlib.util
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integrations import verl
from integrations.verl import compute_score
from registry import UsageError

CASES = [
    ("#### 72", "72", 1.0, "right"),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0, "right"),
    ("\\boxed{0.5}", np.array(["1/3", "1/2"], dtype=object), 1.0, "right"),
    ("so it is 72", "72", 0.0, "no_answer"),
    ("#### 73", "Natalia sold 48/2 = 24. #### 72", 0.0, "wrong"),
    ("\\boxed{\\sqrt{18}}", "3\\sqrt{2}", 1.0, "right"),
]


def test_verls_managers_call_it_by_these_names() -> None:
    parameters = inspect.signature(compute_score).parameters
    assert list(parameters)[:4] == ["data_source", "solution_str", "ground_truth", "extra_info"]
    assert parameters["extra_info"].default is None
    assert any(one.kind is one.VAR_KEYWORD for one in parameters.values())


@pytest.mark.parametrize(("text", "gold", "score", "status"), CASES)
def test_values(text: str, gold: Any, score: float, status: str) -> None:
    found = compute_score(
        data_source="openai/gsm8k", solution_str=text, ground_truth=gold, extra_info={"index": 3}, reward_router=None
    )
    assert (found["score"], found["acc"], found["status"]) == (score, score == 1.0, status)
    assert type(found["score"]) is float and type(found["acc"]) is bool and type(found["pred"]) is str


def test_as_verl_loads_a_file_and_calls_it_from_threads() -> None:
    spec = importlib.util.spec_from_file_location("custom_module", Path(verl.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with ThreadPoolExecutor(8) as threads:
        scores = list(threads.map(lambda case: module.compute_score("mine", case[0], case[1])["score"], CASES * 8))
    assert scores == [case[2] for case in CASES] * 8


def test_a_template_and_an_opened_thought() -> None:
    text = "so</think> <answer>12"
    assert compute_score("mine", text, "12", template="r1")["score"] == 1.0
    assert compute_score("mine", text, "12")["score"] == 0.0
    assert compute_score("mine", "\\boxed{12}", "12", {"opens_thought": True})["status"] == "no_answer"


def test_a_gold_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(UsageError, match="gold answer"):
        compute_score("mine", "#### 1", "the sum x + 3 of them")
