"""Files that survive a kill: whole or not at all, rows up to the first damaged line, one writer a folder."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from safetensors import SafetensorError

from registry import UsageError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def json_text(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that every reader takes: null where a number is not finite, which JSON cannot say."""
    return json.dumps(strict(value), indent=indent, allow_nan=False)


def strict(value: Any) -> Any:
    """``value`` with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step: a reader, or a kill, sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """The rows of a JSON-lines file up to its first damaged line, and that line's number (None: all are whole)."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [""]
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return rows, number
        if not isinstance(row, dict) or "iteration" not in row:
            return rows, number
        rows.append(row)
    return rows, None


@contextmanager
def storage_errors(folder: Path, option: str = "--runs") -> Iterator[None]:
    """A failing disk (full, read-only, over a quota) as a ``UsageError``, which names the option that chose the folder
    and says of a run's that nothing is lost."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kind, kept = ("run ", "; the same command goes on from the last checkpoint") if option == "--runs" else ("", "")
        raise UsageError(
            f"{kind}folder {str(folder)!r} cannot be written ({reason}): free some space, or choose another {option} "
            f"folder{kept}"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; a second process gets a clear error instead of corrupting it."""
    with storage_errors(folder):
        file = (folder / "lock").open("a")
    with file:
        if not _take(file, True, attempts=5):
            raise UsageError(f"{folder} is in use by another process: wait for it, or use another --runs folder")
        yield


def _take(file: TextIO, alone: bool, attempts: int) -> bool:
    """Whether the lock was had; several attempts, since a comparison that only looks holds it for a moment."""
    if fcntl is None:
        raise UsageError("this system has no file locks (fcntl), which run folders need: use Linux, macOS or WSL")
    for attempt in range(attempts):
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < attempts:
                time.sleep(0.1)
    return False


def in_use(folder: Path) -> bool:
    """Whether a process holds the run folder."""
    lock = folder / "lock"
    if not lock.is_file():
        return False
    with lock.open("r") as file:
        return not _take(file, False, attempts=1)
