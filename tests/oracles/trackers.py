"""What Trackio and W&B store on this machine, read back: each point that arrived."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # Trackio reads it once, when it is imported


def trackio_points(project: str, name: str) -> list[dict[str, Any]]:
    """What Trackio stores of a run, a dict a step."""
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    return [{k: v for k, v in row.items() if k != "timestamp"} for row in storage.get_logs(project, name)]


def wandb_records(folder: Path) -> list[Any]:
    """Records of the offline runs in a folder, oldest run first: LevelDB's log format, each one a protobuf message."""
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        content, at, message = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", content[at : at + 7])
            message += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                found.append(record.FromString(message))
                message = b""
    return found


def wandb_points(folder: Path) -> list[dict[str, Any]]:
    """What W&B will be sent of the runs in a folder, a dict a step."""
    items = [record.history.item for record in wandb_records(folder) if record.HasField("history")]
    return [{one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in item} for item in items]
