"""Where numbers come from: versions, machine, commit and command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("nested-reft", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy", "math-verify", "sympy")


def provenance() -> dict[str, Any]:
    """JSON-able facts about this process; a commit of None means that the code is not in a git checkout."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "command": command_line(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command that started this process, as one would type it."""
    program = Path(sys.argv[0])
    known = program.parent.name == "benchmarks" and program.suffix == ".py"
    name = f"python -m benchmarks.{program.stem}" if known else program.name
    return " ".join([name, *(f"'{word}'" if set(word) & set(" *?[]") else word for word in sys.argv[1:])])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
