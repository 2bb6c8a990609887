"""Which files a run's problems are read from, so that work on some is never taken for work on others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from registry import problem_sources

CHUNK = 1 << 20


def fingerprint_data(names: Iterable[Any]) -> str | None:
    """12 hex digits of the contents of those problem sets that are files or folders; None where none is one."""
    digest, found = hashlib.sha256(), False
    for name in names:
        path = Path(name).expanduser() if isinstance(name, str) and name and name not in problem_sources else None
        if path is None or not path.exists():
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found = True
                digest.update(f"{file.relative_to(path) if path.is_dir() else ''} {file.stat().st_size}\n".encode())
                with file.open("rb") as opened:
                    while chunk := opened.read(CHUNK):
                        digest.update(chunk)
    return digest.hexdigest()[:12] if found else None
