"""The single-file examples run, and their formulas are those of their papers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs.problems import load_problems
from envs.verifier import Verifier
from examples import ask_server, best_of_n, ppo_tokens, reinforce_text
from tests.oracles.chat_server import ChatServer

ROOT = Path(__file__).parents[2]


class TestPPO:
    def test_advantages_are_the_discounted_sums_of_temporal_differences(self) -> None:
        rng = np.random.default_rng(0)
        steps, slots, gamma, lam = 7, 3, 0.9, 0.8
        rewards, values = rng.normal(size=(steps, slots)), rng.normal(size=(steps + 1, slots))
        dones = rng.random((steps, slots)) < 0.3
        found = ppo_tokens.advantages(
            torch.from_numpy(rewards),
            torch.from_numpy(values[:-1]),
            torch.from_numpy(dones).double(),
            torch.from_numpy(values[-1]),
            gamma,
            lam,
        )
        for slot in range(slots):
            for start in range(steps):
                expected, weight = 0.0, 1.0
                for t in range(start, steps):
                    after = 0.0 if dones[t, slot] else values[t + 1, slot]
                    expected += weight * (rewards[t, slot] + gamma * after - values[t, slot])
                    if dones[t, slot]:
                        break
                    weight *= gamma * lam
                assert found[start, slot] == pytest.approx(expected)

    def test_the_next_tokens_distribution_is_the_models_whatever_the_padding(self) -> None:
        agent = ppo_tokens.Agent(ppo_tokens.Args.model)
        ids, length = torch.randint(512, (2, 9)), torch.tensor([9, 4])
        with torch.no_grad():
            distribution, value = agent(ids, length)
            alone = agent.model(ids[1:, :4]).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(distribution.logits[1], alone, atol=1e-4, rtol=1e-4)
        assert value.tolist() == [0.0, 0.0]

    def test_it_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        budget = ["--total-timesteps", "400", "--num-envs", "4", "--num-steps", "50", "--num-minibatches", "2"]
        rates = ppo_tokens.main([*budget, "--update-epochs", "1"])
        assert len(rates) == 2 and all(0.0 <= rate <= 1.0 for rate in rates)
        assert "iteration 2: success" in capsys.readouterr().out


class TestReinforce:
    def test_the_baseline_leaves_one_out(self) -> None:
        rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
        expected = [[r - (sum(row) - r) / 3 for r in row] for row in rewards.tolist()]
        torch.testing.assert_close(reinforce_text.leave_one_out(rewards), torch.tensor(expected))

    def test_log_probabilities_do_not_depend_on_padding(self) -> None:
        model = ppo_tokens.Agent(ppo_tokens.Args.model).model
        ids = torch.randint(5, 512, (1, 10))
        alone = model(ids).logits[0, 5:-1].log_softmax(-1).gather(1, ids[0, 6:, None])[:, 0]
        padded = torch.cat([torch.zeros(1, 3).long(), ids], 1)
        attention = torch.cat([torch.zeros(1, 3), torch.ones(1, 10)], 1).long()
        found = reinforce_text.completion_logprobs(model, padded, attention, 9)
        torch.testing.assert_close(found[0], alone, atol=1e-4, rtol=1e-4)

    def test_it_runs_to_the_same_rewards(self) -> None:
        arguments = ["--iterations", "2", "--problems", "2", "--group-size", "3", "--max-new-tokens", "24"]
        means = reinforce_text.main(arguments)
        assert len(means) == 2 and means == reinforce_text.main(arguments)


class TestBestOfN:
    def test_a_vote_compares_as_mathematics(self) -> None:
        verifier = Verifier()
        assert best_of_n.vote(["3", "1/2", "0.5", "3.0", "\\frac{1}{2}"], verifier) == "1/2"
        assert best_of_n.vote(["", "7", ""], verifier) == "7"
        assert best_of_n.vote(["", ""], verifier) == ""

    def test_it_runs(self) -> None:
        accuracy = best_of_n.main(["--problems", "12", "--samples", "4"])
        assert 0.0 < accuracy.mean <= accuracy.best <= 1.0
        assert accuracy.vote <= accuracy.best


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (reinforce_text.main, ["--group-size", "1"], "--group-size must be at least 2"),
        (reinforce_text.main, ["--problems", "0"], "--problems and --iterations 1"),
        (reinforce_text.main, ["--iterations", "0"], "--problems and --iterations 1"),
        (ask_server.main, ["localhost:1", "--model", "m"], "from http:// on"),
        (best_of_n.main, ["--problems", "0"], "must be at least 1"),
        (best_of_n.main, ["--samples", "0"], "must be at least 1"),
        (ppo_tokens.main, ["--num-envs", "1", "--num-steps", "4"], "4 tokens (steps * envs) must be at least 2"),
        (ppo_tokens.main, ["--num-minibatches", "0"], "at least 2 a minibatch"),
        (ppo_tokens.main, ["--total-timesteps", "10"], "at most --total-timesteps"),
    ],
)
def test_numbers_that_leave_nothing_to_compute_are_refused(
    main: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_server_is_asked_all_problems_where_there_are_fewer_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": 2}\n{"question": "1 + 2?", "answer": 3}\n')
    with ChatServer(lambda prompt, body: "\\boxed{3}").running() as served:
        arguments = [served.url, "--model", "oracle", "--problems", str(path), "--limit", "50"]
        assert ask_server.main(arguments) == 0.5


def test_a_server_is_asked() -> None:
    golds = {problem.question: problem.answer for problem in load_problems("arithmetic", split="test", limit=4)}

    def reply(prompt: str, body: dict[str, Any]) -> str:
        question = prompt.partition("\n")[0]
        place = list(golds).index(question)
        return f"\\boxed{{{golds[question] if place < 3 else -1}}}"

    with ChatServer(reply).running() as served:
        assert ask_server.main([served.url, "--model", "oracle", "--limit", "4"]) == 0.75


def test_a_models_own_tokenizer_is_taken(tmp_path: Path) -> None:
    """Of a folder, whose vocabulary is not the built-in one's: a padded copy of the built-in model."""
    from transformers import AutoModelForCausalLM

    from envs.codec import load_tokenizer
    from policies.pretrained.load import BUILT_IN

    model = AutoModelForCausalLM.from_pretrained(BUILT_IN["tiny"])
    model.resize_token_embeddings(520, mean_resizing=False)
    model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("builtin")
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path)
    few = ["--total-timesteps", "64", "--num-envs", "4", "--num-steps", "16", "--num-minibatches", "2"]
    assert len(ppo_tokens.main(["--model", str(tmp_path), *few])) == 1
    few = ["--iterations", "1", "--problems", "2", "--group-size", "2", "--max-new-tokens", "8"]
    assert len(reinforce_text.main(["--model", str(tmp_path), *few])) == 1


@pytest.mark.parametrize(
    ("example", "arguments", "said"),
    [
        ("best_of_n", ["--temperature", "-1"], "error: temperature=-1"),
        ("ask_server", ["http://127.0.0.1:9", "--model", "m", "--limit", "1"], "error: <urlopen error"),
        ("reinforce_text", ["--model", "./nowhere"], "error: "),
    ],
)
def test_what_is_refused_later_is_one_error_without_a_traceback(example: str, arguments: list[str], said: str) -> None:
    command = [sys.executable, f"examples/{example}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
