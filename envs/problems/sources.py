"""Rows of a problem set, from files, Arrow folders or the hub.

Known sets are looked for under ``data_dir`` (or NESTED_REFT_DATA) first and on the hub otherwise.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import UsageError
from registry.errors import did_you_mean
from registry.hub import hub_unreachable

Row = dict[str, Any]
DATA_VARIABLE = "NESTED_REFT_DATA"
SVAMP_TRAIN = 700


@dataclass(frozen=True)
class Known:
    """Where a known set is found.

    Attributes:
        files: for each split, paths below the data folder, tried in order; ``path#key`` is a key of an Arrow folder.
        hub: hub id, and its configuration if it has several.
        hub_splits: for each split, its name on the hub where that differs.
    """

    files: dict[str, tuple[str, ...]]
    hub: tuple[str, str | None]
    hub_splits: dict[str, str] = field(default_factory=dict)


def _own_files(name: str, *splits: str) -> dict[str, tuple[str, ...]]:
    return {split: (f"{name}/{split}.jsonl", f"{name}/{split}.parquet", f"{name}_{split}.jsonl") for split in splits}


def _test_only(*files: str) -> dict[str, tuple[str, ...]]:
    return {"test": files}


KNOWN: dict[str, Known] = {
    "gsm8k": Known(_own_files("gsm8k", "train", "test"), ("openai/gsm8k", "main")),
    "svamp": Known(dict.fromkeys(("train", "test"), ("svamp/SVAMP.json", "SVAMP.json")), ("ChilleD/SVAMP", None)),
    "math": Known(_own_files("math", "train", "test"), ("DigitalLearningGmbH/MATH-lighteval", None)),
    "asdiv": Known(_test_only("asdiv/test.jsonl", "asdiv.jsonl"), ("EleutherAI/asdiv", None), {"test": "validation"}),
    "mawps": Known(_own_files("mawps", "train", "test"), ("MU-NLPC/Calc-mawps", None)),
    "math500": Known(_test_only("math500.jsonl", "evaluation_suite#math"), ("HuggingFaceH4/MATH-500", None)),
    "aime24": Known(
        _test_only("aime24.jsonl", "evaluation_suite#aime"), ("HuggingFaceH4/aime_2024", None), {"test": "train"}
    ),
    "amc23": Known(_test_only("amc23.jsonl", "evaluation_suite#amc"), ("math-ai/amc23", None)),
    "minerva": Known(_test_only("minerva.jsonl", "evaluation_suite#minerva"), ("math-ai/minervamath", None)),
    "olympiad": Known(
        _test_only("olympiad.jsonl", "evaluation_suite#olympiad_bench"),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP"),
        {"test": "train"},
    ),
}


def read_known(name: str, split: str, data_dir: str | None) -> list[Row]:
    """Rows of a known set."""
    known = KNOWN[name]
    if split not in known.files:
        raise UsageError(f"{name} has no split {split!r}: {did_you_mean(split, known.files)}")
    folder = data_dir or os.environ.get(DATA_VARIABLE)
    if folder is not None:
        if not Path(folder).is_dir():
            raise UsageError(f"data_dir={folder!r} is not a folder; give the one that holds {known.files[split][0]}")
        for file in known.files[split]:
            path, _, key = file.partition("#")
            if (Path(folder) / path).exists():
                rows = _read_existing(Path(folder) / path, key or split)
                return _svamp_split(rows, split) if name == "svamp" else rows
    return read_reference(known.hub[0], known.hub_splits.get(split, split), known.hub[1])


def _svamp_split(rows: list[Row], split: str) -> list[Row]:
    """SVAMP.json is one list of 1000. Its first 700 rows are the training split here and the last 300 the test split:
    the published sizes, and variations of one story, which stand side by side, stay together."""
    return rows[:SVAMP_TRAIN] if split == "train" else rows[SVAMP_TRAIN:]


def read_path(name: str, split: str) -> list[Row] | None:
    """Rows of a file or an Arrow folder; None if ``name`` is no path. Raises ``UsageError`` if it is a missing one."""
    path = Path(name).expanduser()
    if path.exists():
        return _read_existing(path, split)
    if path.suffix.lower() in READERS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(f"no problem file or folder {name!r} (looked in {Path.cwd()})")
    return None


def _read_existing(path: Path, split: str) -> list[Row]:
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
            return _read_existing(path / f"{split}{suffix}", split)
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


def read_reference(hub_id: str, split: str, config: str | None = None) -> list[Row]:
    """Rows of a hub data set; an unreachable hub is a ``UsageError`` that says what to do instead."""
    if "/" not in hub_id:
        known = did_you_mean(hub_id, [*KNOWN, "arithmetic"])
        raise UsageError(
            f"unknown problem set {hub_id!r}: {known} Or give a file, or a hub id of the form 'owner/name'"
        )
    from datasets import config as client
    from datasets import load_dataset

    client.HF_HUB_OFFLINE = client.HF_HUB_OFFLINE or hub_unreachable()  # then only its cache is looked through
    try:
        return load_dataset(hub_id, config, split=split).to_list()
    except Exception as error:  # the hub client raises many kinds; each means that these rows cannot be had
        raise UsageError(
            f"problem set {hub_id!r}, split {split!r}, could not be loaded from the hub: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Offline, give a file or folder by its path, "
            f"or data_dir=... (or {DATA_VARIABLE}) for the known sets; 'arithmetic' needs no data"
        ) from error
