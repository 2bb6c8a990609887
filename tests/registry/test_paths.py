"""Every path that any command takes: a bad one is refused by the parser, in a line that names it and the remedy."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from registry import paths

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("registry", "envs", "policies", "agents", "integrations", "benchmarks", "examples")
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8") and path != Path(paths.__file__)
)
NAMED = {"policy", "problems", "sets", "preset", "tokenizer", "model"}  # options that take a name as well as a path
OF_NO_FILE = {"label"}
NOWHERE = "/proc/nowhere" if sys.platform == "linux" else "/nowhere"  # where root can make nothing either

# What is wrong with a path, by type; {} is a folder with a file and a folder in it.
BAD: dict[Any, list[str]] = {
    paths.file_to_read: ["", " ", "{}/missing", "{}/file/below", "{}/folder", "{}/" + "x" * 300],
    paths.folder_to_read: ["", "{}/missing", "{}/file", "{}/file/below"],
    paths.path_to_read: ["", "{}/missing", "{}/file/below"],
    paths.file_to_write: ["", "{}/folder", "{}/file/below", f"{NOWHERE}/rows.json", "{}/" + "x" * 300],
    paths.folder_to_write: ["", "{}/file", "{}/file/below", "{}/file/far/below", NOWHERE, f"{NOWHERE}/far/below"],
    paths.picture_to_write: ["", "{}/folder", "{}/picture", "{}/picture.txt", "{}/file/below.png", f"{NOWHERE}/a.png"],
}
GOOD: dict[Any, list[str]] = {
    paths.file_to_read: ["{}/file", os.devnull],
    paths.folder_to_read: ["{}/folder"],
    paths.path_to_read: ["{}/file", "{}/folder"],
    paths.file_to_write: ["{}/file", "{}/new", "{}/new/below", os.devnull],
    paths.folder_to_write: ["{}/folder", "{}/new", "{}/new/below"],
    paths.picture_to_write: ["{}/new.png", "{}/new/below.SVG"],
}


class Parsed(Exception):
    """A command has come to its arguments."""


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser with which a command's ``main`` reads its arguments."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed(parser)

    name = command.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, ROOT / command)
    assert spec is not None and spec.loader is not None
    module = sys.modules.get(name)
    if module is None:
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            if error.name in sys.stdlib_module_names or (error.name or "").split(".")[0] in ROOMS:
                raise
            pytest.skip(f"{command} needs {error.name}")
    with monkeypatch.context() as patched, pytest.raises(Parsed) as caught:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
        module.main()
    return caught.value.args[0]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    return tmp_path


def test_all_commands_are_known() -> None:
    assert {"benchmarks/run.py", "benchmarks/compare.py", "benchmarks/estimators/__main__.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_paths_are_refused_by_the_parser(command: str, place: Path, monkeypatch, capsys) -> None:
    parser = parser_of(command, monkeypatch)
    before = sorted(place.rglob("*"))
    for action in parser._actions:
        assert action.type is not Path, f"{action.dest}: say what the path is for, by a type of registry.paths"
        if action.type is None and re.search(r"\b(files?|folders?)\b", action.help or "", re.IGNORECASE):
            assert action.dest in NAMED | OF_NO_FILE, f"{action.dest}: a path by a type of registry.paths"
        for bad in BAD.get(action.type, ()):
            value = bad.format(place)
            with pytest.raises(SystemExit, match="2"):
                parser.parse_args([*action.option_strings[:1], value])
            told = capsys.readouterr().err.splitlines()[-1]
            assert re.fullmatch(r".*: error: argument .*?: (.+)", told), told
            assert repr(value) in told and re.search(r": (name|give|mind|let) ", told), told
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_other_paths_are_taken(kind: Any, place: Path) -> None:
    for good in GOOD[kind]:
        assert kind(good.format(place)) == Path(good.format(place))
    assert (place / "file").read_text() == "" and not (place / "new").is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_what_permissions_forbid_is_refused(place: Path) -> None:
    (place / "file").chmod(0)
    (place / "folder").chmod(0o500)
    for kind, name in (
        (paths.file_to_read, "file"),
        (paths.file_to_write, "file"),
        (paths.file_to_write, "folder/new"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match="Permission denied"):
            kind(str(place / name))
    with pytest.raises(argparse.ArgumentTypeError, match="Permission denied"):
        paths.folder_to_write(str(place / "folder" / "new"))
