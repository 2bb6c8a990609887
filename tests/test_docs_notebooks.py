"""The notebooks run from their first cell to their last; their assertions are among the cells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HOOKS = Path(__file__).resolve().parents[1] / "docs" / "hooks"
pytest.importorskip("nbclient", reason="the notebooks need the extra docs")
pytest.importorskip("jupytext", reason="the notebooks need the extra docs")
sys.path.insert(0, str(HOOKS))

import notebooks  # noqa: E402


def test_there_are_four() -> None:
    assert [source.stem for source in notebooks.sources()] == ["episode", "lab", "layers", "reading"]


@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_a_notebook_runs(source: Path) -> None:
    notebook = notebooks.execute(source)
    text, pictures = notebooks.render(source)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert len(pictures) >= 2 and all(f"]({name})" in text for name in pictures)
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert words < 120 * len(pictures), "pictures, not walls of text"
