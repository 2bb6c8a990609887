"""The warm-up of any policy: what it learns from, its steps against transformers' loss, and its command."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from agents.supervised import linear_warmup_and_decay
from agents.warm_up import SupervisedWarmup, demonstrations, draw_layers, main, warm_up
from envs.task import Task
from policies import Policy
from registry import UsageError


def task_of(**arguments) -> Task:
    return gym.make("MathReason-v0", **arguments).unwrapped.task


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
    for changes in ({"epochs": 0}, {"batch": 0}, {"skip": 1.5}, {"learning_rate": 0.0}, {"problems": -1}):
        with pytest.raises(UsageError, match=next(iter(changes))):
            SupervisedWarmup(**changes)


def test_its_steps_are_those_of_transformers_own_loss(folder: str) -> None:
    task, spec = task_of(), SupervisedWarmup(epochs=2, batch=5, learning_rate=1e-3, problems=10, seed=4)
    policy, model = Policy.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses = warm_up(policy, task, spec)
    pairs, rng = demonstrations(task, 10), np.random.default_rng(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    expected, factor = [], linear_warmup_and_decay(4, 0, 0.0)
    for step in range(4):
        if step % 2 == 0:
            halves = np.array_split(rng.permutation(10), 2)
        total, count = torch.zeros(()), 0
        for index in halves[step % 2]:
            prompt, completion = pairs[index]
            labels = torch.cat((torch.full_like(prompt, -100), completion))[None]
            loss = model(torch.cat((prompt, completion))[None], labels=labels).loss
            total, count = total + loss * len(completion), count + len(completion)
        rng.random()  # whether layers are left out
        optimizer.zero_grad()
        (total / count).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * factor(step)
        optimizer.step()
        expected.append(float(total.detach() / count))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    policy.behavior(tuple(range(policy.num_layers)), 1, 8)  # fresh: rollouts may begin


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


def test_the_command_writes_a_folder_that_agents_take(folder: str, tmp_path: Path, capsys) -> None:
    source = tmp_path / "source"
    Policy.load(folder).save(source)
    task_of().tokenizer.save_pretrained(source)
    out = tmp_path / "warm"
    given = ["--policy", str(source), "--out", str(out), "--epochs", "1", "--batch", "4", "--problems", "8"]
    assert main([*given, "--learning-rate", "1e-3"]) == 0
    assert "nats per token" in capsys.readouterr().out
    before, after = Policy.load(str(source)), Policy.load(str(out))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert len(task_of(tokenizer=str(out)).tokenizer) == after.vocab_size
    assert main([*given, "--epochs", "0"]) == 2
    assert "epochs" in capsys.readouterr().err
