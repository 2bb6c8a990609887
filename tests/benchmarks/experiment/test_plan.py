"""What a run is said to need before it starts: a config says what its loaded policy says, and the page shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from agents import ReFT
from agents.memory import ModelSize, plan
from agents.sb3_policy import choose_trained
from benchmarks.experiment.memory import CARDS, CONTEXT, memory_of, memory_table, planned_bytes, size_of
from benchmarks.experiment.resolve import resolve
from benchmarks.run import main
from policies import Policy
from policies.pretrained.load import load_config

PAGE = Path(__file__).parents[3] / "docs" / "cluster.md"
COMMON = {"num_hidden_layers": 28}
QWEN = {
    "1.5B": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "7B": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "tie_word_embeddings": False},
}


def on_gpus(name: str) -> ModelSize:
    config = Qwen2Config(**COMMON, **QWEN[name])
    return size_of(config, torch.bfloat16, torch.device("cuda"), gradient_checkpointing=True)


def test_the_page_shows_what_the_planner_says() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition("<!-- memory -->\n")[2].partition("<!-- end of memory -->")[0]
    tables = (f"**{name}**\n\n{memory_table(on_gpus(name), 512, 1024, 8192).markdown()}" for name in QWEN)
    assert "\n\n".join(tables) == shown.strip()


def test_seven_billion_weights_by_hand() -> None:
    """16 bytes a weight split over n, the bfloat16 copy and the float32 embedding whole; published: 7.62 G weights."""
    size = on_gpus("7B")
    assert size.weights == pytest.approx(7.615e9, rel=1e-3)
    one = plan(replace(size, processes=4), 0, 512, 1024, 8192)
    assert one.weights + one.gradients + one.moments == pytest.approx(16 * size.weights / 4)
    assert one.copy == 2 * size.weights + 4 * 152064 * 3584
    assert one.total == one.weights + one.gradients + one.moments + max(one.copy, one.update)
    whole = plan(size, 10, 512, 1024, 8192)
    assert whole.total == 18 * size.weights + max(10 * size.slot(512, 1024), whole.update)
    rows = memory_table(size, 512, 1024, 8192).rows
    for row, count in zip(rows, (1, 2, 4, 8), strict=True):
        for cell, card in zip(row[-2:], CARDS, strict=True):
            slots = 0 if cell == "none" else int(cell)
            for more, fits in ((0, cell != "none"), (1, False)):
                needed = plan(replace(size, processes=count), slots + more, 512, 1024, 8192).total
                assert (needed <= card * 1e9 - CONTEXT) == fits


@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_config_says_what_its_loaded_policy_says(folder: str, rank: int, layers: list[int] | None) -> None:
    policy = Policy.load(folder, dtype="float32")
    choose_trained(policy, rank, layers, seed=0)
    size = size_of(load_config(folder), torch.float32, torch.device("cpu"), rank, len(layers or ()))
    assert size == ModelSize.of(policy)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({}, 0),
        ({"ema_decay": 0.9}, 1),
        ({"anchor": "kl"}, 1),
        ({"anchor": "kl-convex", "batch": "stale", "correction": "truncated-is", "ema_decay": 0.9}, 4),
        ({"batch": "stale", "correction": "truncated-is", "lora_rank": 2}, 1),
    ],
)
def test_further_sets_of_weights_are_planned(settings: dict[str, Any], copies: int) -> None:
    """As many as the agent itself keeps, of what is trained."""
    spec = resolve("reft", settings=settings)
    agent = ReFT("tiny", "MathReason-v0", group_size=2, problems_per_batch=2, **settings)
    kept = [*agent.anchoring.copies, *agent.batching.copies, *filter(None, [agent.average])]
    assert len(kept) == copies
    held = sum(4 * weight.numel() for copy in kept for weight in copy._weights.values())
    plain = planned_bytes(resolve("reft", settings={"lora_rank": settings.get("lora_rank", 0)}))
    assert planned_bytes(spec) - plain == held
    assert ("copies" in memory_of(spec).heads) == bool(copies)


def test_a_dry_run_trains_nothing(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["env.tokenizer=builtin", "env.max_new_tokens=24", "microbatch_tokens=96", "lora_rank=2"]
    command = ["--policy", folder, "--runs", str(tmp_path / "runs"), "--dry-run"]
    assert main([*command, *(word for setting in settings for word in ("--set", setting))]) == 0
    told = capsys.readouterr().out
    assert "64 + 24 tokens" in told and "update is of 96 tokens" in told
    assert not (tmp_path / "runs").exists()
