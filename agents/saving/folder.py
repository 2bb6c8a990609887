"""The folders that agents are saved to: what a name stands for, written whole or not at all, nobody's files lost.

A name that ends in ``.zip``, as stable-baselines3's callbacks give it, names the folder without that ending.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from registry import UsageError


def folder_of(target: Any) -> Path:
    """The folder that a path names, which may end in ``.zip``."""
    path = Path(target)
    return path.with_suffix("") if path.suffix == ".zip" else path


def free_folder(target: Any, mark: str) -> Path:
    """The folder that ``target`` names, if an agent may be written there: a new one, or one that has a file ``mark``.
    Its parents are made.

    Raises:
        UsageError: it is no name, nothing can be made there, or it is a folder of other things, which would be lost.
    """
    try:
        folder = folder_of(target)
        if not folder.name or folder.name == "..":
            raise ValueError("it names no folder of its own")
        folder = folder.resolve()  # of a link, the folder itself
        if folder.exists() and not folder.is_dir():
            raise ValueError("that is a file, which would be lost")
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / mark).is_file():
                raise ValueError("that folder holds a model, or other files, which would be lost")
        else:
            scratch_of(folder).mkdir(parents=True, exist_ok=True)
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(
            f"the agent cannot be saved as {target!r}: {error}; name a new folder, or a saved agent"
        ) from None
    return folder


def find(source: Any) -> Any:
    """Where a saved agent is: a folder, or a zip file of one.

    Raises:
        UsageError: there is none of this name.
    """
    if hasattr(source, "read"):
        return source
    folder = folder_of(source)
    put_back(folder)
    for path in (folder, Path(source), folder.with_name(folder.name + ".zip")):
        if path.exists():
            return path
    raise UsageError(f"{folder} is no saved agent: there is no such folder, nor {folder.name}.zip")


def unpack(archive: Any) -> Path:
    """A new folder with what is in a zip file."""
    folder = Path(tempfile.mkdtemp(prefix="agent-"))
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    except zipfile.BadZipFile as error:
        shutil.rmtree(folder)
        raise UsageError(f"{archive} is no saved agent: {error}; give what save wrote") from None
    return folder


def write_whole_folder(path: Path, write: Callable[[Path], None], own: Sequence[str]) -> None:
    """``write`` a folder whole or not at all: into one beside it, then renamed. What could not be written whole goes,
    since the disk may be full of it. Of a folder that is there, what has other names than its ``own`` (patterns) stays
    in it."""
    scratch = scratch_of(path)
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        _keep_others(path, scratch, own)
    except Exception:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if not path.exists():
        scratch.rename(path)
        return
    old = path.with_name(path.name + f".old-{os.getpid()}")
    path.rename(old)
    try:
        scratch.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _keep_others(path: Path, scratch: Path, own: Sequence[str]) -> None:
    """Into what will be ``path``, the files there that are none of its ``own``: links, where the disk has any."""

    def link(source: Any, target: Any) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for file in path.iterdir() if path.is_dir() else ():
        if any(file.match(part) for part in own) or (scratch / file.name).exists():
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.copytree(file, scratch / file.name, symlinks=True, copy_function=link)
        elif file.is_symlink():
            (scratch / file.name).symlink_to(file.readlink())
        else:
            link(file, scratch / file.name)


def scratch_of(path: Path) -> Path:
    """Where ``path`` is written before it has its name."""
    return path.with_name(path.name + f".partial-{os.getpid()}")


def put_back(path: Path) -> None:
    """Give a saved agent its name again that a kill of ``save`` caught between its two renames."""
    if not path.exists():
        for old in sorted(path.parent.glob(f"{glob.escape(path.name)}.old-*"))[-1:]:
            old.rename(path)


def clear_partial(path: Path) -> None:
    """Drop what a kill of ``save`` left half-written beside ``path``; a folder caught between its two renames is put
    back."""
    put_back(path)
    for old in path.parent.glob(f"{path.name}.old-*"):
        shutil.rmtree(old)
    for scratch in path.parent.glob(f"{path.name}.partial-*"):
        shutil.rmtree(scratch)
