"""Loading a Hugging Face checkpoint, with errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from policies.pretrained.architecture import read_architecture
from registry import UsageError
from registry.hub import hub_unreachable

BUILT_IN = {"tiny": Path(__file__).parents[1] / "tiny"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(name_or_path: str) -> str:
    """A folder with a config.json, or a hub id; raises ``UsageError`` for a folder that is not there."""
    if name_or_path in BUILT_IN:
        folder = BUILT_IN[name_or_path]
        if not (folder / "config.json").is_file():
            raise UsageError(f"the built-in model {name_or_path!r} is not at {folder}: reinstall, or train it anew")
        return str(folder)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} has no config.json: give a folder written by save_pretrained")
        return str(folder)
    if folder.exists():
        raise UsageError(f"{folder} is not a folder: give the folder that holds config.json")
    if not _HUB_ID.fullmatch(name_or_path) or name_or_path.startswith("."):
        raise UsageError(f"no such model folder: {name_or_path}; give a folder, a hub id (org/name) or 'tiny'")
    return name_or_path


def load_config(name_or_path: str) -> Any:
    """The transformers config of a folder, a hub id or a built-in name."""
    source = locate(name_or_path)
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=_only_local(source))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read a model config from {source!r} ({_first_line(error)}): give an existing folder, or a hub id "
            "while the hub is reachable"
        ) from error


def load_checkpoint(name_or_path: str) -> Any:
    """The transformers CausalLM of a folder, a hub id or a built-in name, in float32, on the CPU."""
    import transformers

    source, config = locate(name_or_path), load_config(name_or_path)
    read_architecture(config)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=_only_local(source),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot load the weights of {source!r} ({_first_line(error)}): the folder needs model.safetensors that "
            "matches its config.json"
        ) from error


def checkpoint_dtype(config: Any) -> torch.dtype:
    """The dtype a checkpoint was saved in; float32 if it does not say."""
    saved = getattr(config, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _only_local(source: str) -> bool:
    """Whether a folder, or the cache, is all there is to load from."""
    return Path(source).is_dir() or hub_unreachable()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
