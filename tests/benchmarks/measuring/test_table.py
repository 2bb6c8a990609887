"""Tables: every cell arrives, in a terminal, in Markdown and in HTML, whatever it holds."""

from __future__ import annotations

import io
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.measuring.plots import style
from benchmarks.measuring.table import Table

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
    assert [line[2:-2].split(" | ") for line in lines] == [[cell.replace("|", "\\|") for cell in row] for row in rows]


def test_a_table_without_rows_is_nothing_on_a_page():
    assert Table(("a",), []).html() == Table(("a",), []).markdown() == ""


def test_a_narrow_terminal_breaks_no_whole_column_and_loses_nothing():
    """Brackets are no markup, and a column that may be broken goes on below."""
    table = Table(("agent", "words"), [["nested-reft/uniform/base", "[bold] " + "word" * 20]], whole=(0,))
    console = Console(file=io.StringIO(), width=50)
    console.print(table.rich())
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    agents, words = zip(*(line for line in lines if line), strict=True)
    assert agents[0] == "nested-reft/uniform/base" and set(agents[1:]) == {""}
    assert "".join(words) == "[bold]" + "word" * 20


def test_columns_are_heads_and_what_they_say():
    table = Table.of([3, 4], {"n": str, "square": lambda n: str(n * n)}, title="Squares")
    assert (table.heads, table.rows, table.title) == (["n", "square"], [["3", "9"], ["4", "16"]], "Squares")


def test_series_are_told_apart():
    looks = [style(n) for n in range(64)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 64
