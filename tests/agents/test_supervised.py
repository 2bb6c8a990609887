"""The parts of supervised training: the step against one written out, demonstrations, the order of batches."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agents.supervised import Batches, clipped_step, demonstrations, draw_layers
from envs.task import Task
from registry import UsageError


def task_of(**arguments) -> Task:
    return gym.make("MathReason-v0", **arguments).unwrapped.task


# --- the step -----------------------------------------------------------------------------------------------------


def test_a_step_is_clipped_over_all_optimizers_together() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    optimizers = [torch.optim.SGD([first.weight], lr=0.1), torch.optim.SGD([first.bias], lr=0.3)]
    for number, x in enumerate(torch.randn(6, 5, 3) * 10):
        loss = first(x).square().mean()
        loss.backward()
        norm_before = clipped_step(list(first.parameters()), optimizers, number, float(loss.detach()), max_norm=0.5)
        gradients = torch.autograd.grad(second(x).square().mean(), [second.weight, second.bias])
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm_before == pytest.approx(float(norm), rel=1e-5)
        with torch.no_grad():
            for parameter, gradient, rate in zip(second.parameters(), gradients, (0.1, 0.3), strict=True):
                parameter -= rate * gradient / (norm / 0.5).clamp(min=1)
        assert first.weight.grad is None and first.bias.grad is None
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.bias, second.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(bad: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    (weight * bad).sum().backward()
    with pytest.raises(UsageError, match=r"step 2.*weights are those of before"):
        clipped_step([weight], [torch.optim.SGD([weight], lr=0.1)], 2, bad)
    assert torch.equal(weight.detach(), torch.ones(2))


# --- demonstrations -----------------------------------------------------------------------------------------------


def test_demonstrations_are_prompts_and_worked_solutions_that_end() -> None:
    task = task_of()
    pairs = demonstrations(task, 12)
    assert len(pairs) == 12
    for index, (prompt, completion) in enumerate(pairs):
        problem = task.problem(index)
        assert task.tokenizer.decode(prompt) == f"Question: {problem.question}\nAnswer:"
        assert task.tokenizer.decode(completion[:-1]) == problem.solution
        assert completion[-1] == task.tokenizer.eos_token_id
        assert task.verdict(completion.numpy(), index).result().reward == 1


def test_solutions_over_the_budget_are_left_out() -> None:
    lengths = [len(completion) for _, completion in demonstrations(task_of(), 40)]
    kept = demonstrations(task_of(max_new_tokens=20), 40)
    assert [len(completion) for _, completion in kept] == [length for length in lengths if length <= 20]
    with pytest.raises(UsageError, match="max_new_tokens=2"):
        demonstrations(task_of(max_new_tokens=2), 4)


def test_sources_that_cannot_be_learnt_from_say_why(tmp_path: Path) -> None:
    (tmp_path / "bare.jsonl").write_text('{"question": "What is 1 plus 1?", "answer": "2"}\n')
    with pytest.raises(UsageError, match="no worked solution"):
        demonstrations(task_of(problems=str(tmp_path / "bare.jsonl")), 0)
    with pytest.raises(UsageError, match="problems=N"):
        demonstrations(task_of(), 0)
    rows = [{"question": f"What is {n} plus 1?", "answer": str(n + 1), "solution": "It is #### 3"} for n in (1, 2)]
    (tmp_path / "wrong.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=r"1 of 2 worked solutions.*is wrong .answer '3', gold '2'"):
        demonstrations(task_of(problems=str(tmp_path / "wrong.jsonl")), 0)


# --- batches ------------------------------------------------------------------------------------------------------


def prompts_of(batch) -> list[tuple[int, ...]]:
    return [tuple(one.prompt.tolist()) for one in batch.demonstrations]


def test_an_epoch_shows_each_demonstration_once() -> None:
    task = task_of()
    batches = Batches(task, 10, 4, 12, 0.0, seed=3)
    assert batches.per_epoch == 3
    every = sorted(tuple(task.prompt(n).tolist()) for n in range(10))
    orders = []
    for epoch in range(3):
        shown = [prompts_of(batches[3 * epoch + step]) for step in range(3)]
        assert [len(batch) for batch in shown] == [4, 3, 3]
        assert sorted(prompt for batch in shown for prompt in batch) == every
        orders.append(shown)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(("size", "of_step"), [(4, 4), (5, 5), (9, 9), (10, 10), (32, 10)])
def test_across_epochs_every_step_is_full(size: int, of_step: int) -> None:
    task = task_of()
    batches = Batches(task, 10, size, 12, 0.0, seed=3, across=True)
    shown = [prompts_of(batches[step]) for step in range(10)]
    assert [len(batch) for batch in shown] == [of_step] * 10
    every = [prompt for batch in shown for prompt in batch]
    for epoch in range(of_step):
        assert len(set(every[10 * epoch : 10 * epoch + 10])) == 10
    if 10 % of_step == 0:
        assert shown == [prompts_of(Batches(task, 10, size, 12, 0.0, seed=3)[step]) for step in range(10)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_a_batch_is_a_function_of_its_step(steps: list[int], endless: bool, across: bool) -> None:
    """Whatever was asked for before: how a run that goes on sees what it would have seen."""
    problems = 0 if endless else 7
    whole = Batches(TASK, problems, 3, 12, 0.5, 1, across)
    in_order = [whole[step] for step in range(13)]
    asked = Batches(TASK, problems, 3, 12, 0.5, 1, across)
    for step in steps:
        batch = asked[step]
        assert prompts_of(batch) == prompts_of(in_order[step]) and batch.layers == in_order[step].layers


TASK = task_of()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_batch_of_an_unlimited_source_is_full_though_few_solutions_fit(size: int) -> None:
    task = task_of(max_new_tokens=20)
    batches = Batches(task, 0, size, 12, 0.0, seed=0)
    for step in range(20):
        shown = batches[step].demonstrations
        assert len(shown) == size and all(len(one.completion) <= 20 for one in shown)
    with pytest.raises(UsageError, match="no solution fits max_new_tokens=2"):
        Batches(task_of(max_new_tokens=2), 0, size, 12, 0.0, seed=0)


def test_an_unlimited_source_gives_fresh_problems_by_the_seed() -> None:
    first, second = (Batches(TASK, 0, 16, 12, 0.0, seed) for seed in (0, 1))
    assert first.per_epoch is None
    mine, other = ([prompt for step in range(8) for prompt in prompts_of(one[step])] for one in (first, second))
    assert len(set(mine)) > 120 and len(set(mine) & set(other)) < 5


def test_layers_are_left_out_uniformly_between_the_first_and_the_last() -> None:
    rng, whole, gone, counts = np.random.default_rng(0), 0, np.zeros(12), {1: 0, 2: 0}
    for _ in range(4000):
        layers = draw_layers(12, 0.5, rng)
        whole += len(layers) == 12
        if len(layers) < 12:
            counts[12 - len(layers)] += 1
            gone[list(set(range(12)) - set(layers))] += 1
    assert abs(whole - 2000) < 4 * 1000**0.5
    assert abs(counts[1] - counts[2]) < 4 * 2000**0.5
    assert gone[0] == gone[-1] == 0
    assert np.abs(gone[1:-1] - gone.sum() / 10).max() < 4 * (gone.sum() / 10) ** 0.5
    assert draw_layers(4, 1.0, rng) == (0, 1, 2, 3)  # too few to leave any out
