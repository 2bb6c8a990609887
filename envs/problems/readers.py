"""Rows of problems as they are stored: in files, in Arrow folders, on the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry import UsageError
from registry.errors import did_you_mean
from registry.hub import hub_unreachable

Row = dict[str, Any]


def read_path(path: Path, split: str) -> list[Row]:
    """Rows of a file, or of the split of a folder. Raises ``UsageError`` where there are none."""
    check_exists(path)
    if path.is_dir():
        return _read_folder(path, split)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: unknown kind of file {path.suffix!r}; give one of {', '.join(sorted(READERS))}")
    try:
        rows = reader(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows


def check_exists(path: Path) -> None:
    """Raise ``UsageError`` unless there is a file or folder at ``path``."""
    if not path.exists():
        raise UsageError(f"no problem file or folder {str(path)!r} (looked in {Path.cwd()})")


def _read_folder(path: Path, split: str) -> list[Row]:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        from datasets import DatasetDict, load_from_disk

        loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise UsageError(f"{path} has no split {split!r}: {did_you_mean(split, [str(key) for key in loaded])}")
            loaded = loaded[split]
        return loaded.to_list()
    for suffix in READERS:
        if (path / f"{split}{suffix}").exists():
            return read_path(path / f"{split}{suffix}", split)
    raise UsageError(f"{path} is neither an Arrow folder (datasets.save_to_disk) nor has it a file {split}.jsonl")


def _read_json(path: Path) -> list[Row]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError("expected one list of objects")
        content = lists[0]
    return content


def _read_jsonl(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def read_hub(id: str, split: str, config: str | None = None) -> list[Row]:
    """Rows of a hub data set. Raises ``UsageError`` that says what to do instead where they cannot be had."""
    from datasets import config as client
    from datasets import load_dataset

    client.HF_HUB_OFFLINE = client.HF_HUB_OFFLINE or hub_unreachable()  # then only its cache is looked through
    try:
        return load_dataset(id, config, split=split).to_list()
    except Exception as error:  # the hub client raises many kinds; each means that these rows cannot be had
        raise UsageError(
            f"problem set {id!r}, split {split!r}, could not be loaded from the hub: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Offline, give a file or folder by its path, "
            "or data_dir=... (or NESTED_REFT_DATA) for the published sets; 'arithmetic' needs no data"
        ) from error
