"""Notebooks are Python files of the percent format. They are executed once, and shown with what they printed."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "docs" / "notebooks"
EXECUTED = ROOT / "build" / "notebooks"
SECONDS = 300


def sources() -> list[Path]:
    """The notebooks, in the order of their names."""
    return sorted(SOURCES.glob("*.py"))


def execute(source: Path) -> Any:
    """The notebook with its outputs, kept in ``build/notebooks``; a cell that fails raises ``CellExecutionError``."""
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    where = {"metadata": {"path": str(SOURCES)}}
    searched = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where)
    client.execute(env={**os.environ, "PYTHONPATH": searched})
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, _kept(source))
    return notebook


def executed(source: Path) -> Any:
    """The notebook as it was executed last, if its source is the same; else it is executed now."""
    kept = _kept(source)
    return nbformat.read(kept, as_version=4) if kept.exists() else execute(source)


def render(source: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown, and the pictures by the names that it gives them. A cell that draws shows its pictures alone."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in executed(source).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        drawn = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        parts += [_shown(output, source.stem, pictures) for output in drawn or cell.outputs]
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def title(source: Path) -> str:
    """Its first heading."""
    return next(line for line in source.read_text(encoding="utf-8").splitlines() if line.startswith("# # "))[4:]


def _shown(output: Any, stem: str, pictures: dict[str, bytes]) -> str:
    if output.output_type == "stream":
        return f"```{{.text .output}}\n{output.text.rstrip()}\n```" if output.name == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}-{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![picture {len(pictures)} of this notebook]({name})"
    if "text/markdown" in data:
        return data["text/markdown"]
    return f"```{{.text .output}}\n{data['text/plain']}\n```" if "text/plain" in data else ""


def _kept(source: Path) -> Path:
    return EXECUTED / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.ipynb"


if __name__ == "__main__":
    for one in map(Path, sys.argv[1:]) if sys.argv[1:] else sources():
        execute(one.resolve())
