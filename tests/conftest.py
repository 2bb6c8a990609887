"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import agents  # noqa: F401 (xdist remakes workers' warnings in a thread each: two first imports of a cycle are a deadlock)


@pytest.fixture(autouse=True)
def float32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests compute the same on every machine: what ``dtype="auto"`` makes of a machine has tests of its own."""
    monkeypatch.setattr("policies.dtype.fast_dtype", lambda device: ("float32", "tests"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Optional data beside the checkout (public data sets in their original formats, reward cases, model scripts)."""
    named = os.environ.get("NESTED_REFT_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared data: set NESTED_REFT_SHARED to a folder that has data/ and reward_cases/")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with the built-in tokenizer's vocabulary."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, tie_word_embeddings=True, **shape)
    made = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # random weights are nearly uniform; sharper ones make subsets differ
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(made)
    return str(made)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of W&B's offline runs."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    wandb.teardown()  # it has read these variables


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; tests of pages are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    quiet = ("no-sandbox", "disable-background-networking", "disable-component-update", "disable-sync")
    with playwright.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                args=[f"--{one}" for one in quiet],
            )
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        playwright.expect.set_options(timeout=60_000)  # of a busy machine
        yield chromium
        chromium.close()
