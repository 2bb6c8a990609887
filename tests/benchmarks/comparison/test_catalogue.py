"""What the list shows can be typed, and says what it is in one sentence."""

from __future__ import annotations

import pytest

from benchmarks.compare import _parser as parser
from benchmarks.compare import grid_of
from benchmarks.comparison.arms import arms
from benchmarks.comparison.catalogue import catalogue, components, first_sentence
from benchmarks.comparison.rehearse import rehearse
from benchmarks.run import main
from registry import Registry

KINDS = catalogue()
COMMANDS = [line.split("  ")[0].split() for kind in KINDS for line in kind.lines() if not line.startswith("#")]


def is_literal(words: list[str]) -> bool:
    """Whether no word stands for something, as FILE, ``<sampler>`` and ``reasoning_gym:TASK`` do."""
    return not any(word.partition("=")[2].isupper() or set(word) & set("<:") for word in words)


@pytest.mark.parametrize("words", list(filter(is_literal, COMMANDS)), ids=" ".join)
def test_every_line_begins_with_what_is_typed(words: list[str]) -> None:
    agents = [] if words[0] in ("--agent", "--preset") else ["--agents", "nested-reft"]
    line = ["--agents" if word == "--agent" else word for word in words]
    line += ["--policy", "owner/model"]  # which may have any template and length
    line += ["--set", "env.max_new_tokens=20480"] if "env.reward_parts=overlong" in words else []  # its own default
    rehearse(arms(grid_of(parser().parse_args([*agents, *line]))), here=False)


def test_every_name_has_its_sentence() -> None:
    for kind in KINDS:
        for name, about in kind.about.items():
            assert 10 < len(about) <= 220, (kind.name, name)


def test_first_sentences() -> None:
    def documented(text: str) -> object:
        return type("Documented", (), {"__doc__": text})

    for text, first in (
        ("One. Two.", "One."),
        (
            "``W = 1``: so (Munos et al. 2016,\n    eq. 3). More.",
            "`W = 1`: so (Munos et al. 2016, eq. 3).",
        ),
        ("No end\n\nAnother paragraph.", "No end"),
        ("The first. ``code`` begins the second.", "The first."),
    ):
        assert first_sentence(documented(text)) == first


def test_tables_are_markdown() -> None:
    registry = Registry("thing")
    one = type("One", (), {"__doc__": "A ``|`` B."})
    registry.register("a")(one)
    registry.register("b")(one)
    assert components("thing", registry).markdown().splitlines() == [
        "| `--set thing=` | things |",
        "|---|---|",
        "| `a` | A `\\|` B. The same as `b`. |",
        "| `b` | A `\\|` B. The same as `a`. |",
    ]


def test_the_command_lists_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("#")] == [f"# {kind.name}" for kind in KINDS]
    assert sum(line.startswith("--") for line in shown) == len(COMMANDS)
