"""Loading a Hugging Face checkpoint, with errors that say what to do."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from policies.pretrained.architecture import Architecture, read_architecture
from registry import UsageError
from registry.hub import hub_unreachable, is_lfs_pointer
from registry.memory import available_bytes

BUILT_IN = {"tiny": Path(__file__).parents[1] / "tiny"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(name_or_path: str) -> str:
    """A folder with a config.json, or a hub id; raises ``UsageError`` for a folder that is not there."""
    if name_or_path in BUILT_IN:
        folder = BUILT_IN[name_or_path]
        if not (folder / "config.json").is_file():
            raise UsageError(f"the built-in model {name_or_path!r} is not at {folder}: reinstall, or train it anew")
        return str(folder)
    if not name_or_path:
        raise UsageError("'' names no model: give a folder, a hub id (org/name) or 'tiny'")
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise UsageError(f"{folder} is a peft adapter of {_adapted(folder)}: {_HOW_TO_MERGE}, and give MERGED")
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} has no config.json: give a folder written by save_pretrained")
        return str(folder)
    if folder.exists():
        raise UsageError(f"{folder} is not a folder: give the folder that holds config.json")
    if near := get_close_matches(name_or_path, BUILT_IN, n=1, cutoff=0.8):
        raise UsageError(f"no model {name_or_path!r}: did you mean {near[0]!r}?")
    if not _HUB_ID.fullmatch(name_or_path) or name_or_path.startswith("."):
        raise UsageError(f"no such model folder: {name_or_path}; give a folder, a hub id (org/name) or 'tiny'")
    return name_or_path


def load_config(name_or_path: str) -> Any:
    """The transformers config of a folder, a hub id or a built-in name."""
    source = locate(name_or_path)
    import transformers

    remedy = "give an existing folder, or a hub id while the hub is reachable"
    config = None
    with one_line(source, f"cannot read a model config from {source!r}", remedy):
        config = transformers.AutoConfig.from_pretrained(
            source, local_files_only=_only_local(source), trust_remote_code=False
        )
    return config


def load_checkpoint(name_or_path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers CausalLM of a folder, a hub id or a built-in name, in float32, on the CPU.

    Where its config says bfloat16, and ``dtype``, what it will be multiplied in, is float32, its weights are rounded
    to bfloat16. Those of a training in bfloat16 are float32 sums of its steps, of which no product has seen more than
    that: unrounded they are another model, which nobody has trained.

    Raises:
        UsageError: the weights are quantised, damaged, not there, of other shapes, do not give the whole model, or do
            not fit into memory.
    """
    import transformers

    source, config = locate(name_or_path), load_config(name_or_path)
    architecture: Any = None
    with one_line(source, f"cannot use the config of {source!r}", "mend its config.json, or fetch it anew"):
        architecture = read_architecture(config)
    with one_line(source, f"cannot load the weights of {source!r}", "make its files readable"):
        _check_full_precision(source, config)
    _check_room(source, architecture, getattr(config, "tie_word_embeddings", False))
    remedy = "the folder needs model.safetensors that matches its config.json"
    rounded = dtype == torch.float32 and _stated(getattr(config, "dtype", None)) == "bfloat16"
    model: Any
    about: dict[str, Any] = {}
    with one_line(source, f"cannot load the weights of {source!r}", remedy):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=_only_local(source),
            output_loading_info=True,
        )
        model, about = loaded
    for what in ("missing", "mismatched"):
        keys = [key if isinstance(key, str) else key[0] for key in about.get(f"{what}_keys", ())]
        if keys:
            raise UsageError(
                f"{source!r} has {what} weights, which would be random numbers: {_named(keys)}; save the whole model "
                "anew, or mend what its config.json says of shapes and tied weights"
            )
    if about.get("unexpected_keys"):
        warnings.warn(
            f"{source!r} holds weights that its config.json has no place for, and they are left out: "
            f"{_named(about['unexpected_keys'])}",
            stacklevel=3,
        )
    if rounded:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16())
    return model


def _stated(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def folder_dtype(name_or_path: str) -> str | None:
    """The dtype that a folder's config says its weights are used in; None where it says none, or is no folder."""
    path = Path(name_or_path).expanduser() / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whoever loads it says so
    return _stated(said.get("dtype", said.get("torch_dtype"))) if isinstance(said, dict) else None


def state_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Let a saved folder's config say that its weights are used in ``dtype``, whatever they are kept in: what
    ``from_pretrained`` loads them in unless it is told otherwise."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_finite(model: torch.nn.Module) -> None:
    """Raise ``UsageError`` naming the first weight that is not a number or infinite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UsageError(f"the weight {name} is not finite: the checkpoint is of a run that diverged; take another")


@contextmanager
def one_line(source: str, failure: str, remedy: str) -> Iterator[None]:
    """Turn whatever torch, safetensors and transformers raise of files into a ``UsageError``: ``failure``, and the
    damaged file, if there is one, or else the first line of what was raised and ``remedy``."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        damage = damage_of(Path(source)) if Path(source).is_dir() else None
        said = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UsageError(f"{failure}: {damage}" if damage else f"{failure} ({said}): {remedy}") from error


def damage_of(folder: Path) -> str | None:
    """What is wrong with a file of weights or settings in ``folder``, and what to do; None if they can be read."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        if not path.is_file():
            return f"{path} is a link to a file that is not there, or no file at all: copy or download it anew"
        if is_lfs_pointer(path):
            return f"{path} is a git-lfs pointer, not the file: run git lfs pull in {folder}, or download it anew"
        whole = _is_whole(path) if path.suffix == ".safetensors" else _is_json(path)
        if not whole:
            return f"{path} is damaged or cut off ({path.stat().st_size} bytes): copy or download it anew"
    return None


def weights_fault(folder: Path) -> str | None:
    """Which tensor of a saved folder's files is missing or not finite; None where all are there."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for path in sorted({*folder.glob("*.safetensors"), *(folder / name for name in names)}):
        if not path.is_file():
            return f"{folder} lacks {path.name}"
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    return f"{name} in {path} is not finite"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file has as many bytes as its header says."""
    header = _header(path)
    if header is None:
        return False
    try:
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
        return path.stat().st_size == 8 + length + max(ends, default=0)
    except (KeyError, TypeError, IndexError):
        return False


def _header(path: Path) -> dict[str, Any] | None:
    """What a safetensors file says of its tensors; None where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else path.stat().st_size
        if length > path.stat().st_size - 8:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    return header if isinstance(header, dict) and all(isinstance(about, dict) for about in header.values()) else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


_HOW_TO_MERGE = (
    "merge it with peft, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)"
    ".merge_and_unload().save_pretrained(MERGED)"
)


def _adapted(folder: Path) -> str:
    """The base model that an adapter's folder names."""
    base = None
    with one_line(str(folder), f"cannot read {folder / 'adapter_config.json'}", "fetch it anew"):
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    return repr(base) if base else "a base model that it does not name"


def _check_full_precision(source: str, config: Any) -> None:
    """Raise ``UsageError`` for a quantised checkpoint."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", settings)
    for file in ("quantize_config.json", "quant_config.json"):  # of GPTQ and AWQ before transformers knew them
        method = method or (file if (Path(source) / file).is_file() else None)
    if settings or method:
        raise UsageError(
            f"{source!r} is quantised ({getattr(method, 'value', method) or 'quantization_config'}), and such weights "
            "cannot be trained: give the checkpoint that it was made from"
        )
    for path in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []:
        for name, about in (_header(path) or {}).items():
            if name.endswith((".weight", ".bias")) and about.get("dtype") not in _FLOATS:
                raise UsageError(
                    f"{path} holds {name} as {about.get('dtype')}, which is quantised, and such weights cannot be "
                    "trained: give the checkpoint that it was made from"
                )


def _check_room(source: str, a: Architecture, tied: bool) -> None:
    """Raise ``UsageError`` where the weights alone do not fit into memory."""
    needed = 4 * (a.layers * a.layer_weights + (1 if tied else 2) * a.vocabulary * a.width)
    free = available_bytes()
    if free is not None and needed > free:
        raise UsageError(
            f"not enough memory: the weights of {source!r} need {needed / 1e9:.3g} GB in float32, and {free / 1e9:.3g} "
            "GB are free: take a smaller model, or a machine with more memory"
        )


def _named(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _only_local(source: str) -> bool:
    """Whether a folder, or the cache, is all there is to load from."""
    return Path(source).is_dir() or hub_unreachable()
