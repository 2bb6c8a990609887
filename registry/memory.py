"""How much memory this process may still take, and giving back what it does not need: where a process takes more than
there is, the kernel ends it without a word."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes() -> int | None:
    """Free memory, or less in a control group with a limit: of a container, of a scheduler's job; None where nothing
    tells."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([free, *_rooms()]))


def return_freed() -> None:
    """Give the system what was freed, on glibc.

    The compiled kernels tell the allocator to keep it (``nr_keep_freed_memory``), since updates take it again at once.
    But every update takes other sizes, and small things that stay come to lie between them: what is free and does not
    serve grows with a run's length. To touch memory again that has gone back costs a small model up to a tenth of an
    iteration's time, so it does not go back after each.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _rooms() -> Iterator[int]:
    """What each group with a limit leaves, of those that hold this process, one inside the other."""
    for folder, (limit, used, cache) in _groups():
        with suppress(OSError, KeyError, ValueError):  # no such group here, or one without a limit ("max")
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield room + int(statistics[cache])


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of this process's groups and of those around them, in both versions of control groups. In a container
    the names may be those of the host, whose root is then the container's own group."""
    places = {("", "/"), ("memory", "/")}
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                places.add((controllers and "memory", path))
    for mount, path in places:
        root, inside = CGROUP / mount, PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            yield root / group, V1 if mount else V2
