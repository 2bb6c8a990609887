"""Tables: every cell arrives, in a terminal, in Markdown and in HTML, whatever it holds."""

from __future__ import annotations

import io
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from benchmarks.measuring.plots import style
from benchmarks.measuring.table import UNSEEN, Table, markdown_text

CELL = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=8)
ROWS = st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=4)


class Cells(HTMLParser):
    """The texts of a table's cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data != "\n":
            self.rows[-1][-1] += data


@given(ROWS)
def test_html_holds_the_cells(rows):
    assert Cells(Table(("a", "<b>", "c & d"), rows).html()).rows == [["a", "<b>", "c & d"], *map(list, rows)]


@given(ROWS)
def test_markdown_holds_the_cells_with_escaped_pipes(rows):
    head, rule, *lines = Table(("a", "b|c", "d"), rows).markdown().split("\n")
    assert head == "| a | b\\|c | d |" and rule == "|---|---:|---:|"
    written = [[markdown_text(cell).replace("|", "\\|") for cell in row] for row in rows]
    assert [line[2:-2].split(" | ") for line in lines] == written


@given(st.text(st.characters(exclude_characters="`"), max_size=30))
def test_untrusted_text_is_one_line_without_elements_and_links(text):
    shown = markdown_text(text)
    assert len(shown.splitlines()) <= 1 and "](" not in shown and not re.search("<[a-zA-Z/!?]", shown)
    assert not UNSEEN & set(map(unicodedata.category, shown))
    assert markdown_text("p < .001, +0.0 [-1.0, +1.0]) ü 数") == "p < .001, +0.0 [-1.0, +1.0]) ü 数"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`min_{s<t} rho`", "`min_{s<t} rho`"),
        ("``a`<i``", "``a`<i``"),
        ("`x` <b>[a](u)", "`x` &lt;b>[a]\\(u)"),
        ("`<img>``", "`&lt;img>``"),  # no code: runs of backticks of two lengths
        ("``<img>`", "``&lt;img>`"),
    ],
)
def test_code_is_text_as_it_is(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


def test_a_table_without_rows_is_nothing_on_a_page():
    assert Table(("a",), []).html() == Table(("a",), []).markdown() == ""


def printed(table: Table, width: int) -> list[list[str]]:
    """The cells of each line in a terminal, without those of the heads."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    return [cells for line in lines if (cells := [cell.strip() for cell in line.split("│")[1:-1]])]


def test_a_narrow_terminal_breaks_what_no_line_can_hold_and_loses_nothing():
    """Brackets are no markup, and a cell that is too long goes on below."""
    lines = printed(Table(("agent", "words"), [["nested-reft/uniform/base", "[bold] " + "word" * 20]]), 50)
    agents, words = zip(*lines, strict=True)
    assert agents[0] == "nested-reft/uniform/base" and set(agents[1:]) == {""}
    assert "".join(words) == "[bold]" + "word" * 20


NAMES = st.lists(st.text("abc/", min_size=1, max_size=30), min_size=1, max_size=3)


@settings(deadline=None)
@given(NAMES, st.lists(st.text("0123456789.", min_size=1, max_size=20), min_size=1, max_size=9), st.integers(60, 200))
def test_columns_that_do_not_fit_go_below_and_no_number_is_broken(names, numbers, width):
    """At any width of at least twice the longest name, every row's cells stand in order in the lines of its parts."""
    table = Table(["agent", *("a head of some words" for _ in numbers)], [[name, *numbers] for name in names])
    lines = printed(table, width)
    assert len(lines) % len(names) == 0
    for n, name in enumerate(names):
        parts = lines[n :: len(names)]
        assert {part[0] for part in parts} == {name} and [cell for part in parts for cell in part[1:]] == numbers


def test_columns_are_heads_and_what_they_say():
    table = Table.of([3, 4], {"n": str, "square": lambda n: str(n * n)}, title="Squares")
    assert (table.heads, table.rows, table.title) == (["n", "square"], [["3", "9"], ["4", "16"]], "Squares")


def test_series_are_told_apart():
    looks = [style(n) for n in range(64)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 64
