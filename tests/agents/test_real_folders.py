"""From a folder and a file to a verdict by the path that users take, over drawn tokenizers, templates, checkpoints and
data files. ``FUZZ=20`` draws twenty times as many."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from agents import ReFT
from agents.supervised import demonstrations
from policies import Policy
from registry import UsageError
from tests.oracles.byte_checkpoints import (
    CHATML,
    IN_PARTS,
    THINKING,
    byte_tokenizer,
    metaspace_tokenizer,
    write_checkpoint,
    write_problems,
)

ROWS = [{"question": f"What is {n} + 9?", "answer": str(n + 9), "solution": f"{n} + 9 = {n + 9}"} for n in range(3)]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 24},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
}


def draw(rng: np.random.Generator, *options: Any) -> Any:
    return options[rng.integers(len(options))]


def write_folder(folder: Path, rng: np.random.Generator) -> tuple[Any, int]:
    """A drawn checkpoint with its tokenizer; returns the tokenizer and the number of logits."""
    bos = draw(rng, None, "<s>")
    special = (*draw(rng, (), TAGS), *draw(rng, (), ("<|im_start|>", "<|im_end|>")))
    make = draw(rng, byte_tokenizer, metaspace_tokenizer)
    tokenizer = make(special, bos=bos, adds=draw(rng, "", "bos", "eos", "bos eos"))
    tokenizer.chat_template = draw(rng, CHATML, THINKING, IN_PARTS)
    pad = draw(rng, None, "</s>", "<pad>")
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    spare = draw(rng, 0, 1)
    tokenizer.add_tokens([f"<spare_{n}>" for n in range(spare)])
    tokenizer.save_pretrained(folder)
    family = draw(rng, *FAMILIES)
    logits = len(tokenizer) - spare + draw(rng, 0, 0, 40)
    model = write_checkpoint(folder, family, logits, **FAMILIES[family], tie_word_embeddings=draw(rng, True, False))
    dtype = draw(rng, torch.float32, torch.bfloat16, torch.float16)
    (folder / "model.safetensors").unlink()
    model.to(dtype).save_pretrained(folder, max_shard_size=draw(rng, "5GB", "45KB"))
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([t for t in special if t == "<|im_end|>"])]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": draw(rng, ends, ends[0], ends[-1])}))
    return tokenizer, logits


def write_rows(folder: Path, rng: np.random.Generator) -> str:
    """``ROWS`` as other software would write them: another kind of file, encoding, line ending, type of gold answer,
    with nulls and columns beside them that nobody needs."""
    gold = draw(rng, str, int, float, lambda text: [text], lambda text: [text, f"{text}.0"], lambda text: f"${text}$")
    extra = draw(rng, {}, {"level": None}, {"meta": {"source": None, "tags": []}})
    rows = [{**extra, **row, "answer": gold(row["answer"])} for row in ROWS]
    kind = draw(rng, ".jsonl", ".json", ".csv", ".parquet")
    path = folder / f"problems{kind}"
    if kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    if kind == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator=draw(rng, "\n", "\r\n"))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    else:
        end = draw(rng, "\n", "\r\n", "\n\n")
        content = json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + end for row in rows)
    path.write_bytes(content.encode(draw(rng, "utf-8", "utf-8-sig")))
    return str(path)


@pytest.mark.parametrize("seed", range(12 * int(os.environ.get("FUZZ", "1"))))
def test_from_a_folder_to_a_verdict(tmp_path, seed):
    rng = np.random.default_rng(seed)
    tokenizer, logits = write_folder(tmp_path, rng)
    template = draw(rng, "plain", "chat", "qwen-math", "r1")
    problems = write_rows(tmp_path, rng)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the assistant's turn ends with")
        envs = gym.make_vec(
            "MathReason-v0",
            num_envs=4,
            problems=problems,
            tokenizer=str(tmp_path),
            template=template,
            vocab_size=logits,
            max_prompt_tokens=400,
            max_new_tokens=80,
        )
    task = envs.unwrapped.task
    assert {tokenizer.eos_token_id} <= task.stop_token_ids
    for index, (prompt, completion) in enumerate(demonstrations(task, 0)):
        shown = task.template.prompt(ROWS[index]["question"], tokenizer)
        written = tokenizer.decode(prompt, skip_special_tokens=False)
        if "▁" in tokenizer.get_vocab():  # it puts blanks after special tokens
            written, shown = "".join(written.split()), "".join(shown.split())
        assert written.removeprefix("<s>") == shown.removeprefix("<s>")
        assert task.codec.ends_once(completion.numpy())
        assert task.verdict(completion.numpy(), index).result().status == "right"
    agent = ReFT(str(tmp_path), envs, group_size=2, problems_per_batch=2, learning_rate=1e-3)
    assert agent.target.functional
    agent.iterate()
    agent.save(tmp_path / "trained")
    again = Policy.load(str(tmp_path / "trained"), dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), agent.target.parameters(), strict=True))
    settings = json.loads((tmp_path / "trained" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]


def test_a_policy_of_fewer_positions_than_the_task_is_refused_when_the_agent_is_made(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    write_checkpoint(tmp_path, vocabulary=257, max_position_embeddings=64)
    problems = write_problems(tmp_path / "problems.jsonl", ROWS)
    budgets = {"max_prompt_tokens": 40, "max_new_tokens": 25}
    envs = gym.make_vec("MathReason-v0", num_envs=2, problems=problems, tokenizer=str(tmp_path), **budgets)
    with pytest.raises(UsageError, match=r"65 tokens .* 64 positions"):
        ReFT(str(tmp_path), envs)
