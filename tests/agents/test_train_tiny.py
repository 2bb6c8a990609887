"""The making of the built-in model: what it learns from, which tokens are scored, which layers run; and it repeats."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from random import Random

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from agents.train_tiny import (
    DEPTH,
    TERSE_SHARE,
    TinySpec,
    batches,
    completion_loss,
    demonstration,
    draw_kept,
    main,
    new_model,
    only_layers,
    rate_factor,
    save,
    train,
)
from envs.problems.arithmetic import Arithmetic
from envs.problems.scenes import THEMES
from envs.train_tokenizer import TOKENIZER
from registry import UsageError

SMALL = TinySpec(width=32, steps=4, batch=3, worked_only=0.0, full_depth=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return new_model(32, tokenizer).eval()


def test_batches_show_each_problem_once_and_label_its_completion_alone(tokenizer) -> None:
    seen = []
    for tokens, labels in islice(batches(SMALL, tokenizer), 16):
        for row, label in zip(tokens, labels, strict=True):
            scored = label != -100
            assert torch.equal(row[scored], label[scored])
            first, last = int(scored.nonzero()[0]), int(scored.nonzero()[-1])
            assert scored[first : last + 1].all() and row[last] == tokenizer.eos_token_id
            assert (row[last + 1 :] == tokenizer.pad_token_id).all()
            seen.append((tokenizer.decode(row[:first]), tokenizer.decode(row[first:last])))
    problems = [Arithmetic("train", SMALL.levels, SMALL.seed)[i] for i in range(48)]
    solutions = {f"Question: {p.question}\nAnswer:": (p.solution, f" #### {p.answer}") for p in problems}
    assert sorted(prompt for prompt, _ in seen) == sorted(solutions)
    assert all(completion in solutions[prompt] for prompt, completion in seen)
    assert any("=" not in completion for _, completion in seen)


def test_no_demonstration_is_terse_in_the_worked_stage(tokenizer) -> None:
    spec = replace(SMALL, steps=40, worked_only=0.8)  # 96 of 120 problems, the first 32 batches
    texts = [
        [tokenizer.decode(label[label != -100]) for label in labels]
        for _, labels in islice(batches(spec, tokenizer), 64)
    ]
    assert all("=" in text for batch in texts[:32] for text in batch)
    assert any("=" not in text for batch in texts[32:] for text in batch)


def test_terse_shares_are_as_declared() -> None:
    assert set(TERSE_SHARE) == {theme.name for theme in THEMES} | {"comparison", "purchase"}
    rng, problems = Random(0), [Arithmetic("train")[i] for i in range(4000)]
    for theme, share in TERSE_SHARE.items():
        own = [p for p in problems if p.id.startswith(theme)]
        terse = sum(demonstration(p, rng) == f" #### {p.answer}" for p in own) / len(own)
        assert abs(terse - share) < 4 * (share * (1 - share) / len(own)) ** 0.5


def test_completion_loss_is_the_loss_of_transformers(tokenizer, model) -> None:
    for tokens, labels in islice(batches(SMALL, tokenizer), 3):
        mask = (tokens != tokenizer.pad_token_id).long()
        expected = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(completion_loss(model, tokens, labels), expected)


def test_only_layers_is_the_model_without_the_others(tokenizer, model) -> None:
    kept = [0, 2, 3, 7, 11]
    shorter = deepcopy(model)
    shorter.model.layers = nn.ModuleList([shorter.model.layers[i] for i in kept])
    shorter.config.num_hidden_layers = len(kept)
    tokens = torch.randint(0, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(0))
    full = model(tokens, use_cache=False).logits
    with only_layers(model, kept):
        nested = model(tokens, use_cache=False).logits
    torch.testing.assert_close(nested, shorter(tokens, use_cache=False).logits)
    assert torch.equal(model(tokens, use_cache=False).logits, full) and not torch.allclose(nested, full)
    with pytest.raises(RuntimeError, match="inside"), only_layers(model, kept):
        raise RuntimeError("inside")
    assert len(model.model.layers) == DEPTH


def test_skipped_layers_are_uniform_and_never_at_the_border() -> None:
    rng, gone = Random(0), [0] * DEPTH
    for _ in range(3000):
        kept = draw_kept(3, rng)
        assert kept == sorted(set(kept)) and len(kept) == DEPTH - 3
        for layer in set(range(DEPTH)) - set(kept):
            gone[layer] += 1
    assert gone[0] == gone[-1] == 0
    assert all(abs(count - 900) < 4 * 900**0.5 for count in gone[1:-1])


def test_training_repeats_and_depends_on_the_seed(tokenizer) -> None:
    torch.set_num_threads(1)
    first, again, other = (train(spec, tokenizer).state_dict() for spec in (SMALL, SMALL, replace(SMALL, seed=1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("steps", [1, 7, 20, 100, 2000])
def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth_in_a_straight_line(steps) -> None:
    up = max(1, steps // 20)
    for step in range(steps):
        down = 1 - Fraction(9, 10) * Fraction(step - up, max(1, steps - up))
        assert rate_factor(step, steps) == pytest.approx(float(Fraction(step + 1, up) if step < up else down))
    assert max(rate_factor(step, steps) for step in range(steps)) == 1


@pytest.mark.slow
def test_training_learns(tokenizer) -> None:
    spec = replace(SMALL, steps=150, batch=16, full_depth=1.0)
    tokens, labels = next(batches(replace(spec, seed=9), tokenizer))
    torch.manual_seed(0)
    before = completion_loss(new_model(spec.width, tokenizer), tokens, labels)
    after = completion_loss(train(spec, tokenizer), tokens, labels)
    assert after < 0.5 * before


def test_save_replaces_the_files_and_leaves_nothing_else(tokenizer, model, tmp_path) -> None:
    out = tmp_path / "model"
    for _ in range(2):
        save(model, tokenizer, out)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        names = {path.name for path in out.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"batch": 0}, {"width": 48}, {"skipped": (1,) * DEPTH}, {"skipped": (0, 0)}]
)
def test_impossible_specs_are_usage_errors(changes) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        TinySpec(**changes)


def test_command_exits_with_2_on_a_bad_value(tmp_path, capsys) -> None:
    assert main(["--out", str(tmp_path / "x"), "--steps", "0"]) == 2
    assert "steps=0" in capsys.readouterr().err
