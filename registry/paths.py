"""Paths that a user names on a command line, as actions of argparse.

What cannot be read or written is refused while the arguments are read, in one line that names it and the remedy, and
not after the work.

    parser.add_argument("--json", action=WriteFile)
"""

from __future__ import annotations

import os
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar

from registry.errors import UsageError


class PathAction(Action):
    """A path, or several; raises ``UsageError``, which names the option, for one that will not do."""

    kind: ClassVar[str]
    done: ClassVar[str]  # what is done with the path

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None) -> None:
        several = isinstance(values, list)
        checked = [self._checked(text, option or self.dest) for text in (values if several else [values])]
        setattr(namespace, self.dest, checked if several else checked[0])

    def check(self, path: Path) -> None:
        """Raise ``Unfit``, or OSError, for a path that will not do."""
        raise NotImplementedError

    def _checked(self, text: str, name: str) -> Path:
        if not text.strip():
            raise UsageError(f"{name} {text!r} names no {self.kind}: give one, or leave {name} out")
        with _refused(f"{name} {text!r}", self.kind, self.done):
            self.check(Path(text))
        return Path(text)


class ReadPath(PathAction):
    """A file or a folder that is there."""

    kind, done = "file or folder", "read"

    def check(self, path: Path) -> None:
        path.stat()
        if path.is_dir():
            next(path.iterdir(), None)
        elif not os.access(path, os.R_OK):
            raise PermissionError(None, "Permission denied")


class ReadFile(ReadPath):
    """A file that is there; a pipe will do."""

    kind = "file"

    def check(self, path: Path) -> None:
        if path.is_dir():
            raise Unfit("is a folder: name a file in it")
        super().check(path)


class ReadFolder(ReadPath):
    """A folder that is there."""

    kind = "folder"

    def check(self, path: Path) -> None:
        super().check(path)
        if not path.is_dir():
            raise Unfit("is a file: name a folder")


class WriteFile(PathAction):
    """A file that can be written, or a device; folders around it that are not there are made."""

    kind, done = "file", "written"

    def check(self, path: Path) -> None:
        if path.is_dir():
            raise Unfit("is a folder: name a file in it")
        if path.exists() and not path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_a_file(path.parent)
        if path.exists():
            path.open("ab").close()


class WritePicture(WriteFile):
    """A file as ``WriteFile``, whose name says what kind of picture."""

    kinds = (".png", ".svg", ".pdf")

    def check(self, path: Path) -> None:
        if path.suffix.lower() not in self.kinds:
            raise Unfit(f"says no kind of picture: let it end in {', '.join(self.kinds)}")
        super().check(path)


class WriteFolder(PathAction):
    """A folder that files can be written into, or that can be made once there is something to write."""

    kind, done = "folder", "written"

    def check(self, path: Path) -> None:
        if path.is_file():
            raise Unfit("is a file: name a folder")
        _make_a_file(next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place)))


class Unfit(Exception):
    """Why a path will not do, and what would, as the end of a sentence."""


def _make_a_file(folder: Path) -> None:
    """For a moment; raises OSError where none can be made."""
    with TemporaryFile(dir=folder):
        pass


@contextmanager
def _refused(what: str, kind: str, done: str) -> Iterator[None]:
    """``Unfit`` and OSError as a ``UsageError`` of one line."""
    try:
        yield
    except Unfit as error:
        raise UsageError(f"{what} {error}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "mind the spelling" if isinstance(error, FileNotFoundError) else "mind its permissions"
        raise UsageError(f"{what} cannot be {done} ({reason}): name another {kind}, or {remedy}") from None
