"""The built-in model: what the repository promises of it. The slow tests measure what its card says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from agents.train_tiny import TinySpec, completion_loss, new_model
from benchmarks.model_card import main
from benchmarks.report.card import measure, report
from envs.problems.arithmetic import DEFAULT_LEVELS, Arithmetic
from envs.train_tokenizer import TOKENIZER
from policies import Policy, UniformSkip

FOLDER = Path(__file__).resolve().parents[3] / "policies" / "tiny"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


def test_it_is_small_deep_and_in_safetensors() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20
    assert {path.suffix for path in FOLDER.iterdir()} == {".json", ".safetensors", ".md"}


def test_it_is_what_the_warm_up_makes(model, tokenizer) -> None:
    made = new_model(TinySpec().width, tokenizer)
    assert model.config.num_hidden_layers >= 12
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, torch.float32) for n, p in made.named_parameters()
    }
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ignored = {"architectures", "_name_or_path", "transformers_version", "dtype"}
    ours, theirs = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (model, made))
    assert ours == theirs


def test_its_tokenizer_is_the_built_in_one(model, tokenizer) -> None:
    for file in TOKENIZER.iterdir():
        assert (FOLDER / file.name).read_bytes() == file.read_bytes(), file.name
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.bos_token_id is None


def test_it_knows_the_worked_steps_of_held_out_problems(model, tokenizer) -> None:
    """Uniform guessing costs log 512 = 6.2 nats a token."""
    losses = []
    for problem in map(Arithmetic("test", 1, seed=1).__getitem__, range(32)):
        prompt = tokenizer(f"Question: {problem.question}\nAnswer:")["input_ids"]
        answer = [*tokenizer(problem.solution)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(float(completion_loss(model, torch.tensor([prompt + answer]), labels)))
    assert np.mean(losses) < 0.5


def test_the_card_names_licence_command_and_figures() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "python -m agents.train_tiny --out policies/tiny" in card
    assert len(re.findall(r"^\| \d ", card, flags=re.MULTILINE)) >= 8


def test_card_command_reports_an_unknown_model(capsys) -> None:
    assert main(["no/such/folder/at-all"]) == 2
    assert "no/such/folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_starts_between_25_and_50_percent(temperature: float) -> None:
    policy = Policy.load("tiny")
    accuracy, _, _ = measure(policy, tuple(range(policy.num_layers)), temperature, 512, DEFAULT_LEVELS)
    assert 0.25 <= accuracy <= 0.50


@pytest.mark.slow
def test_two_skipped_layers_of_twelve_leave_it_usable() -> None:
    policy, rng = Policy.load("tiny"), np.random.default_rng(1)
    whole = tuple(range(policy.num_layers))
    subsets = [UniformSkip(ratio=2 / 12, border=1).sample(len(whole), rng) for _ in range(8)]
    full, _, none = measure(policy, whole, 1.0, 256, DEFAULT_LEVELS)
    found = [measure(policy, layers, 1.0, 256, DEFAULT_LEVELS) for layers in subsets]
    assert abs(none) < 1e-4
    assert np.mean([accuracy for accuracy, _, _ in found]) > 0.7 * full
    assert np.mean([divergence for _, _, divergence in found]) < 0.1


@pytest.mark.slow
def test_the_report_has_a_row_per_level_and_skip() -> None:
    rows = [line for line in report(Policy.load("tiny"), 8).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 5 + 1 + 4
