"""Paths that a user names on a command line, as argparse's ``type``.

What cannot be read or written is refused while the arguments are read, in one line that names it and the remedy, and
not after the work.

    parser.add_argument("--json", type=file_to_write)
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

PICTURES = (".png", ".svg", ".pdf")


def file_to_read(text: str) -> Path:
    """A file that is there; a pipe will do."""
    path = _to_read(text, "file")
    if path.is_dir():
        raise ArgumentTypeError(f"{text!r} is a folder: name a file in it")
    return path


def folder_to_read(text: str) -> Path:
    """A folder that is there."""
    path = _to_read(text, "folder")
    if not path.is_dir():
        raise ArgumentTypeError(f"{text!r} is a file: name a folder")
    return path


def path_to_read(text: str) -> Path:
    """A file or a folder that is there."""
    return _to_read(text, "file or folder")


def file_to_write(text: str) -> Path:
    """A file that can be written, or a device; folders around it that are not there are made."""
    path = _named(text, "file")
    with _refused(text, "written", "file"):
        if path.is_dir():
            raise ArgumentTypeError(f"{text!r} is a folder: name a file in it")
        if path.exists() and not path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _try(path.parent)
        if path.exists():
            path.open("ab").close()
    return path


def picture_to_write(text: str) -> Path:
    """See ``file_to_write``; its name says what kind of picture."""
    if text and Path(text).suffix.lower() not in PICTURES:
        raise ArgumentTypeError(f"{text!r} says no kind of picture: let its name end in {', '.join(PICTURES)}")
    return file_to_write(text)


def folder_to_write(text: str) -> Path:
    """A folder that files can be written into, or that can be made once there is something to write."""
    path = _named(text, "folder")
    if path.is_file():
        raise ArgumentTypeError(f"{text!r} is a file: name a folder")
    with _refused(text, "written", "folder"):
        _try(next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place)))
    return path


def _to_read(text: str, kind: str) -> Path:
    path = _named(text, kind)
    with _refused(text, "read", kind):
        path.stat()
        if path.is_dir():
            next(path.iterdir(), None)
        elif not os.access(path, os.R_OK):
            raise PermissionError(None, "Permission denied")
    return path


def _named(text: str, kind: str) -> Path:
    if not text.strip():
        raise ArgumentTypeError(f"{text!r} names no {kind}: give one" + (", such as ." if "folder" in kind else ""))
    return Path(text)


def _try(folder: Path) -> None:
    """Raise OSError where no file can be made."""
    with TemporaryFile(dir=folder):
        pass


@contextmanager
def _refused(text: str, done: str, kind: str) -> Iterator[None]:
    """OSError as what argparse prints."""
    try:
        yield
    except FileNotFoundError:
        raise ArgumentTypeError(f"there is no {kind} {text!r}: mind the spelling, and what folder this is") from None
    except OSError as error:
        raise ArgumentTypeError(
            f"{text!r} cannot be {done} ({error.strerror or error}): name another {kind}, or change its permissions"
        ) from None
