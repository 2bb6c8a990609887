"""What every command's ``--help`` says."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NEEDS = {"integrations.openenv": "openenv"}


def commands(*packages: str) -> list[str]:
    """The modules that are run with ``python -m``."""
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    found = [file for file in files if "@command(" in file.read_text(encoding="utf-8")]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in found)


class Captured(Exception):
    """Instead of parsing."""


@pytest.fixture
def parser_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def parser_of(name: str) -> argparse.ArgumentParser:
        seen: list[argparse.ArgumentParser] = []

        def capture(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
            seen.append(self)
            raise Captured

        for parse in ("parse_args", "parse_intermixed_args"):
            monkeypatch.setattr(argparse.ArgumentParser, parse, capture)
        with pytest.raises(Captured):
            importlib.import_module(name).main([])
        return seen[0]

    return parser_of


@pytest.mark.parametrize("name", commands("registry", "envs", "policies", "agents", "integrations", "benchmarks"))
def test_help_says_what_each_argument_is(name: str, parser_of: Any) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    parser = parser_of(name)
    assert parser.description and "exit status" not in parser.format_help()
    assert [action.option_strings or action.dest for action in parser._actions if not action.help] == []
