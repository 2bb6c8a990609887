"""Every path that any command takes: a bad one is refused by the parser, in a line that names it and the remedy."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from registry import UsageError, paths

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

# What is wrong with a path; {} is a folder with a file and a folder in it.
BAD: dict[Any, list[str]] = {
    paths.ReadFile: ["", " ", "{}/missing", "{}/file/below", "{}/folder", "{}/" + "x" * 300],
    paths.ReadFolder: ["", "{}/missing", "{}/file", "{}/file/below"],
    paths.ReadPath: ["", "{}/missing", "{}/file/below"],
    paths.WriteFile: ["", "{}/folder", "{}/file/below", f"{NOWHERE}/rows.json", "{}/" + "x" * 300],
    paths.WriteFolder: ["", "{}/file", "{}/file/below", "{}/file/far/below", NOWHERE, f"{NOWHERE}/far/below"],
    paths.WritePicture: ["", "{}/folder", "{}/picture", "{}/picture.txt", "{}/file/below.png", f"{NOWHERE}/a.png"],
}
GOOD: dict[Any, list[str]] = {
    paths.ReadFile: ["{}/file", os.devnull],
    paths.ReadFolder: ["{}/folder"],
    paths.ReadPath: ["{}/file", "{}/folder"],
    paths.WriteFile: ["{}/file", "{}/new", "{}/new/below", os.devnull],
    paths.WriteFolder: ["{}/folder", "{}/new", "{}/new/below"],
    paths.WritePicture: ["{}/new.png", "{}/new/below.SVG"],
}


class Parsed(Exception):
    """A command has come to its arguments."""


def module_name(command: str) -> str:
    return command.removesuffix(".py").replace("/", ".")


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser with which a command's ``main`` reads its arguments."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed(parser)

    name = module_name(command)
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
def test_bad_paths_are_refused_by_the_parser(command: str, place: Path, monkeypatch) -> None:
    parser = parser_of(command, monkeypatch)
    before = sorted(place.rglob("*"))
    for action in parser._actions:
        assert action.type is not Path, f"{action.dest}: say what the path is for, by an action of registry.paths"
        if not isinstance(action, paths.PathAction) and re.search(
            r"\b(files?|folders?)\b", action.help or "", re.IGNORECASE
        ):
            assert action.dest in NAMED | OF_NO_FILE, f"{action.dest}: a path has an action of registry.paths"
        for bad in BAD[type(action)] if isinstance(action, paths.PathAction) else ():
            value, name = bad.format(place), (*action.option_strings, action.dest)[0]
            with pytest.raises(UsageError) as refused:
                parser.parse_args([*action.option_strings[:1], value])
            told = str(refused.value)
            assert told.startswith(f"{name} {value!r} ") and re.search(r": (name|give|let) ", told), told
            assert "\n" not in told
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("examples")])
def test_no_name_is_not_the_folder_that_this_is(command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Such as of a variable that a shell script has not set."""
    parser = parser_of(command, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for action in parser._actions:
        if action.dest not in NAMED or action.type is not None:
            continue
        others = [
            "arithmetic"
            for one in parser._actions
            if one is not action and not one.option_strings and one.nargs is None
        ]
        given = [*others, *action.option_strings[:1], ""]
        with suppress(UsageError):
            assert sys.modules[module_name(command)].main(given) == 2
            told = capsys.readouterr().err.splitlines()[-1]
            assert told.startswith("error: ") and ("''" in told or f"--{action.dest}" in told), told


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_other_paths_are_taken(kind: Any, place: Path) -> None:
    for good in GOOD[kind]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--one", action=kind)
        parser.add_argument("--several", nargs="+", action=kind)
        parser.add_argument("--none", action=kind, default=Path("x"))
        value = good.format(place)
        given = parser.parse_args(["--one", value, "--several", value, value])
        assert given.one == Path(value) and given.several == [Path(value)] * 2 and given.none == Path("x")
    assert (place / "file").read_text() == "" and not (place / "new").is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_what_permissions_forbid_is_refused(place: Path) -> None:
    (place / "file").chmod(0)
    (place / "folder").chmod(0o500)
    for kind, name in (
        (paths.ReadFile, "file"),
        (paths.WriteFile, "file"),
        (paths.WriteFile, "folder/new"),
        (paths.WriteFolder, "folder/new"),
    ):
        with pytest.raises(PermissionError):
            kind([], "path").check(place / name)
