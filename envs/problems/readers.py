"""Rows of problems as they are stored: in files, in folders, on the hub.

Whatever a library raises over them ends here, in ``unreadable``, as one line with a remedy.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np

from registry import UsageError
from registry.errors import did_you_mean
from registry.hub import hub_unreachable

Row = dict[str, Any]
POINTER = b"version https://git-lfs"
SHOWN = 300  # characters of another library's message


@contextmanager
def unreadable(failure: str, remedy: str = "") -> Iterator[None]:
    """Whatever is raised inside becomes a ``UsageError`` of one line: ``failure``, why, and the remedy."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # pyarrow, datasets, csv, json and gzip raise many kinds; each means the same here
        raise UsageError(f"{failure}: {_reason(error)}{f'; {remedy}' if remedy else ''}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"the byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
    if isinstance(error, MemoryError):
        return "it does not fit into memory; give a part of it"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = str(error).strip().partition("\n")[0][:SHOWN]
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A text file to read: UTF-8, with or without a byte order mark, compressed if its name ends in ``.gz``."""
    if path.suffix.lower() == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=newline))
    return path.open(encoding="utf-8-sig", newline=newline)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1. Files that were put together may have a
    byte order mark in their midst."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.lstrip("\ufeff")
            if text.strip():
                yield number, text


def kind_of(path: Path) -> str:
    """The ending that tells how a file is read, in small letters; ``.gz`` aside."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_file_name(path: Path) -> bool:
    """Whether the name alone says that it is a file of problems."""
    return kind_of(path) in READERS


def read_path(path: Path, split: str) -> list[Row]:
    """Rows of a file, or of the split of a folder. Raises ``UsageError`` where there are none."""
    check_exists(path)
    if path.is_dir():
        return _read_folder(path, split)
    kind = kind_of(path)
    reader = READERS.get(kind)
    if reader is None:
        raise UsageError(f"{path}: unknown kind of file {path.suffix!r}; give one of {', '.join(sorted(READERS))}")
    with unreadable(f"{path} cannot be read as {kind[1:]}"):
        with path.open("rb") as start:
            if start.read(len(POINTER)) == POINTER:
                raise UsageError(f"{path} is a git-lfs pointer, not the data: run 'git lfs pull' where it was cloned")
        rows = reader(path)
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows


def check_exists(path: Path) -> None:
    """Raise ``UsageError`` unless there is a file or folder at ``path``."""
    with unreadable(f"{str(path)[:SHOWN]!r} cannot be looked for", "give the path of a file or folder"):
        exists = path.exists()
    if not exists:
        raise UsageError(f"no problem file or folder {str(path)!r} (looked in {Path.cwd()})")


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder holds a split, in one of the forms that ``read_path`` takes."""
    return folder.is_dir() and (_is_arrow(folder) or bool(_split_files(folder, split)))


def is_one_table(path: Path) -> bool:
    """Whether ``read_path`` gives the same rows for every split: a file, or one data set saved by itself."""
    return path.is_file() or (_is_arrow(path) and not (path / "dataset_dict.json").exists())


def _is_arrow(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists()


def _read_folder(path: Path, split: str) -> list[Row]:
    if _is_arrow(path):
        return _read_arrow(path, split)
    if not isinstance(split, str) or not re.fullmatch(r"\w[^/\\]*", split):  # never a way out of the folder
        raise UsageError(f"split={split!r} is not the name of a split, such as 'train'")
    with unreadable(f"{path} cannot be searched"):
        files = _split_files(path, split)
        held = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    if not files:
        raise UsageError(
            f"{path} is neither an Arrow folder (datasets.save_to_disk) nor has it a file {split}.jsonl, "
            f"{split}-00000-of-00001.parquet or the like, here or one folder down; it holds "
            f"{', '.join(held[:10]) or 'nothing'}{' ...' if len(held) > 10 else ''}"
        )
    return [row for file in files for row in read_path(file, split)]


def _read_arrow(path: Path, split: str) -> list[Row]:
    from datasets import DatasetDict, load_from_disk

    with unreadable(f"{path} cannot be read as an Arrow folder", "copy it again, or save it by datasets.save_to_disk"):
        loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise UsageError(f"{path} has no split {split!r}: {did_you_mean(split, [str(key) for key in loaded])}")
            loaded = loaded[split]
        return dataset_rows(loaded)


def dataset_rows(dataset: Any) -> list[Row]:
    """The rows of a ``datasets.Dataset``; of a class label its name, not its number."""
    rows = arrow_rows(dataset.with_format("arrow")[:])
    for column, feature in dataset.features.items():
        if hasattr(feature, "int2str"):
            for row in rows:
                number = row[column]
                row[column] = None if number is None or number < 0 else feature.int2str(number)
    return rows


def arrow_rows(table: Any) -> list[Row]:
    """The rows of a ``pyarrow.Table``, numbers of 16 and 32 bits as ``shortest`` has them."""
    rows = table.to_pylist()
    for column in table.schema:
        if _holds_short_numbers(column.type):
            for row in rows:
                row[column.name] = _shortened(row[column.name], column.type)
    return rows


def _holds_short_numbers(kind: Any) -> bool:
    """Whether a type of pyarrow is, or has inside of it, numbers of 16 or 32 bits."""
    from pyarrow import types

    inside = [kind.field(n).type for n in range(kind.num_fields)]
    return types.is_float16(kind) or types.is_float32(kind) or any(map(_holds_short_numbers, inside))


def _shortened(value: Any, kind: Any) -> Any:
    """A value of a type of pyarrow, with its numbers of 16 and 32 bits as ``shortest`` has them."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_float16(kind) or types.is_float32(kind):
        return shortest(value, np.float16 if types.is_float16(kind) else np.float32)
    if isinstance(value, dict):
        return {name: _shortened(one, kind.field(name).type) for name, one in value.items()}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_shortened(one, kind.value_type) for one in value]
    return value


def shortest(value: float | None, kind: type[np.floating]) -> Decimal | None:
    """A number of fewer bits than Python's as the shortest one that rounds to it: .1, not .10000000149."""
    return None if value is None else Decimal(str(kind(value)))


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in a folder or in one of its folders (``data/``, a configuration's); none if there are
    none. Raises ``UsageError`` where several folders have it, or a part is missing."""
    if files := _files_here(folder, split):
        return files
    below = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    holders = {entry: files for entry in below if (files := _files_here(entry, split))}
    if len(holders) > 1:
        names = ", ".join(repr(str(holder)) for holder in holders)
        raise UsageError(f"{folder} has the split {split!r} in several folders; give one of them: {names}")
    return next(iter(holders.values()), [])


def _files_here(folder: Path, split: str) -> list[Path]:
    """``train.jsonl``, the parts ``train-00000-of-00002.parquet``, or all files of one kind in a folder ``train``."""
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and is_file_name(entry))
    inner = folder / split
    shards = sorted(entry for entry in inner.iterdir() if entry.is_file()) if inner.is_dir() else []
    part = re.compile(rf"{re.escape(split)}-(\d+)(?:-of-(\d+))?(?:-\w+)?")
    for kind in READERS:
        of_kind = {file: file.name[: file.name.lower().rindex(kind)] for file in files if kind_of(file) == kind}
        whole = [file for file, stem in of_kind.items() if stem == split]
        if whole:
            return whole[:1]
        parts = {file: match for file, stem in of_kind.items() if (match := part.fullmatch(stem))}
        if parts:
            _check_parts(folder, split, list(parts.values()))
            return list(parts)
        if inner_files := [file for file in shards if kind_of(file) == kind]:
            return inner_files
    return []


def _check_parts(folder: Path, split: str, parts: Sequence[re.Match[str]]) -> None:
    totals = {int(part[2]) for part in parts if part[2]}
    if totals and (len(totals) > 1 or {int(part[1]) for part in parts} != set(range(max(totals)))):
        raise UsageError(
            f"{folder} has {len(parts)} parts of the split {split!r}, and their names say {max(totals)}: "
            "download the folder again, or remove the parts of another version"
        )


def parse_json(text: str) -> Any:
    """JSON in which a number keeps all its digits."""
    return json.loads(text, object_pairs_hook=_object, parse_float=Decimal)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """An object; of a name that it has twice, one value would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


def _read_json(path: Path) -> list[Row]:
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        return []
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name of JSON
            return _read_jsonl(path)
        raise
    if isinstance(content, dict):
        lists = [value for value in content.values() if _is_table(value)]
        if len(lists) != 1:
            raise ValueError(f"expected a list of objects, or an object with one such list, not one with {len(lists)}")
        content = lists[0]
    if not isinstance(content, list):
        raise ValueError(f"expected a list of objects, not {type(content).__name__}")
    return content


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in numbered_lines(path):
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _read_csv(path: Path) -> list[Row]:
    """Of several columns without a name, as spreadsheets write them, none may have values."""
    limit = csv.field_size_limit(sys.maxsize)  # a worked solution may be longer than csv's 131,072 characters
    try:
        with open_text(path, newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(filter(None, reader), [])
            nameless = {n for n, name in enumerate(header) if not name.strip()}
            kept = [n for n in range(len(header)) if n not in nameless or len(nameless) == 1]
            check_distinct([header[n] for n in kept])
            rows = []
            for values in filter(None, reader):
                _check_fit(values, header, kept, reader.line_num)
                rows.append({header[n]: values[n] if n < len(values) else None for n in kept})
            return rows
    finally:
        csv.field_size_limit(limit)


def _check_fit(values: list[str], header: list[str], kept: list[int], line: int) -> None:
    """Raise ``ValueError`` for values that no column of the ``kept`` ones would hold."""
    if len(values) > len(header):
        raise ValueError(
            f"line {line} has {len(values)} values for {len(header)} columns; put a value that has a comma in double "
            "quotes"
        )
    lost = [value for n, value in enumerate(values) if n not in kept and value.strip()]
    if lost:
        raise ValueError(f"line {line} has {lost[0][:40]!r} in a column without a name; name it")


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        table = file.read()
    check_distinct(table.column_names)
    return arrow_rows(table)


def check_distinct(columns: list[str]) -> None:
    """Of two columns of one name a row could keep but one."""
    for name in columns:
        if columns.count(name) > 1:
            raise ValueError(f"the column {name!r} is there twice; rename or remove one")


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
    remedy = (
        "offline, give a file or folder by its path, or data_dir=... (or NESTED_REFT_DATA) for the published sets; "
        "'arithmetic' needs no data"
    )
    with unreadable(f"problem set {id!r}, split {split!r}, could not be loaded from the hub", remedy):
        return dataset_rows(load_dataset(id, config, split=split))
