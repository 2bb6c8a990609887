"""TRL's GRPOTrainer as an agent: its step is the one that ``reft`` takes on the same completions."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import TRLGRPO, ReFT
from agents.rollout import Rollout
from registry import UsageError
from tests.oracles.small_world import weights

SMALL = {"learning_rate": 1e-3, "group_size": 4, "problems_per_batch": 4}


def test_without_trl_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(UsageError, match=r"nested-reft\[trl\]"):
        TRLGRPO("tiny", "MathReason-v0", **SMALL)


@pytest.mark.parametrize(("size", "message"), [(3, "must divide the 16 completions"), (-1, "must divide")])
def test_a_backward_size_that_does_not_divide_the_batch(size, message):
    with pytest.raises(UsageError, match=message):
        TRLGRPO("tiny", "MathReason-v0", backward_size=size, **SMALL)


class TestWithTRL:
    @pytest.fixture(autouse=True)
    def trl(self):
        pytest.importorskip("trl")

    @pytest.fixture
    def agent(self):
        return TRLGRPO("tiny", "MathReason-v0", seed=3, **SMALL)

    def test_its_problems_are_those_of_reft(self, agent):
        metrics = agent.iterate()
        rng = np.random.default_rng([3, 0])
        ours = ReFT("tiny", "MathReason-v0", seed=3, **SMALL)._draw_problems(rng)
        assert [info["problem_index"] for info in agent._finals][:: agent.group_size] == ours
        assert metrics["tokens"] == agent.num_timesteps == sum(info["response_len"] for info in agent._finals)

    def test_its_step_is_that_of_reft_on_the_same_completions(self, agent, monkeypatch):
        """TRL's gradient and AdamW step against the one estimator's, on what TRL wrote."""
        ours = ReFT("tiny", "MathReason-v0", seed=3, **SMALL)
        written = {}
        judge = agent._trainer.reward_funcs[0]

        def record(completion_ids, problem, **more):
            written.update(ids=completion_ids, problem=problem, reward=judge(completion_ids, problem, **more))
            return written["reward"]

        agent._trainer.reward_funcs[0] = record
        for seed in range(20):  # until a group has mixed rewards
            torch.manual_seed(seed)
            metrics = agent.iterate()
            if metrics["groups_with_signal"]:
                break
            assert metrics["grad_norm"] == 0
        assert metrics["groups_with_signal"] > 0
        task = ours.envs.unwrapped.task
        prompts = {index: torch.as_tensor(task.prompt(index)) for index in set(written["problem"])}
        tokens = [torch.tensor(ids) for ids in written["ids"]]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(ids)] for ids in tokens])
        prompts = tuple(prompts[index] for index in written["problem"])
        with torch.no_grad():
            logp = ours.target.logprobs(prompts, padded, mask)
        group = torch.arange(16) // 4
        rollout = Rollout(prompts, padded, mask, logp, torch.tensor(written["reward"]), group)
        before = {name: value.clone() for name, value in weights(ours).items()}
        told = ours.update(rollout, ours.advantage(rollout.reward, group), np.random.default_rng(0))
        assert metrics["grad_norm"] == pytest.approx(told["grad_norm"], rel=1e-3)
        theirs = weights(agent)
        moved = torch.cat([(value - before[name]).flatten() for name, value in weights(ours).items()])
        by_trl = torch.cat([(theirs[name] - before[name]).flatten() for name in before])
        assert torch.nn.functional.cosine_similarity(moved, by_trl, dim=0) > 0.99

    def test_saved_and_loaded_it_goes_on_to_the_same_numbers(self, agent, tmp_path):
        agent.iterate()
        agent.save(tmp_path / "a")
        again = TRLGRPO.load(tmp_path / "a")
        first, second = agent.iterate(), again.iterate()
        unequal = {
            name for name in first if "time" not in name and "second" not in name and first[name] != second[name]
        }
        assert not unequal and all(torch.equal(value, weights(again)[name]) for name, value in weights(agent).items())

    def test_a_gradient_that_is_not_finite_is_no_step(self, agent):
        before = {name: value.clone() for name, value in weights(agent).items()}

        parameter = next(agent.target.model.parameters())
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(UsageError, match="iteration 1: the gradient's norm is nan"):
            agent.iterate()
        assert all(torch.equal(value, before[name]) for name, value in weights(agent).items())

    def test_a_template_that_ends_at_strings_is_refused_with_a_remedy(self):
        envs = gym.make_vec("MathReason-v0", num_envs=1, copy=False, template="r1", max_prompt_tokens=400)
        with pytest.raises(UsageError, match=r"ends completions at strings.*use a template without"):
            TRLGRPO("tiny", envs, **SMALL)
