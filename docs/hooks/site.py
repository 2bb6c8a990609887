"""The site's pages that are not files of ``docs/``: the repository's own Markdown under its own paths, so that a link
that works there works here; pages made from the registries and the code; and the notebooks with their outputs."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import components
import environment
import notebooks
import papers

ROOT = Path(__file__).resolve().parents[2]
OWN = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
RESULTS = "benchmarks/results"
LINK = re.compile(r"\]\(([^)#\s]+)")
FENCE = re.compile(r"^(```|~~~)")


def on_config(config: Any) -> Any:
    """Puts what is generated into the nav."""
    for entry in config.nav:
        [(title, where)] = entry.items()
        if title == "Components":
            entry[title] = components.navigation()
        elif title == "Results":
            entry[title] = _results_navigation()
        elif title == "Learn":
            where[-1] = {"Notebooks": [{notebooks.title(one): _page_of(one)} for one in notebooks.sources()]}
    return config


def on_files(files: Files, config: Any) -> Files:
    """The files of ``docs/`` under that path, beside the repository's and the generated ones."""
    for file in list(files):
        own = file.abs_src_path is not None and Path(file.abs_src_path).is_relative_to(
            config.docs_dir
        )  # or the theme's
        if own and not file.inclusion.is_excluded():
            files.remove(file)
            files.append(_file(f"docs/{file.src_uri}", config, source=Path(str(file.abs_src_path))))
    for path in repository_pages():
        files.append(_file(path, config, source=ROOT / path))
    for path in linked_files():
        files.append(_file(path, config, source=ROOT / path))
    for path, text in {**components.pages(), "docs/papers.md": papers.page()}.items():
        files.append(_file(path, config, content=text))
    for source in notebooks.sources():
        text, pictures = notebooks.render(source)
        files.append(_file(_page_of(source), config, content=text))
        for name, data in pictures.items():
            files.append(_file(f"docs/notebooks/{name}", config, content=data))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """GitHub's Markdown as Python-Markdown reads it, and the tables that a page asks for. On GitHub a notebook is its
    source, here its page."""
    markdown = re.sub(r"\]\((notebooks/[\w-]+)\.py\)", r"](\1.md)", markdown)
    return environment.fill(without_folder_links(as_python_markdown(markdown), page.file.src_uri))


def repository_pages() -> list[str]:
    """Markdown of the repository that is shown as it stands."""
    results = sorted((ROOT / RESULTS).rglob("*.md"))
    return [*OWN, *(path.relative_to(ROOT).as_posix() for path in results)]


def linked_files() -> list[str]:
    """Pictures, rows and sources that those pages link to."""
    linked = set()
    for page in repository_pages():
        for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = (ROOT / page).parent / target
            if "://" not in target and path.is_file() and path.suffix != ".md" and path.parent != notebooks.SOURCES:
                linked.add(path.resolve().relative_to(ROOT).as_posix())
    return sorted(linked)


def as_python_markdown(text: str) -> str:
    """On GitHub alone a list may follow a paragraph directly, and a pipe in the code of a table has a backslash."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            before = lines[-1] if lines else ""
            begins = re.match(r"(- |\d+\. )", line) and before.strip() and not re.match(r"(- |\d+\. |\s)", before)
            if begins and not _in_list(lines):
                lines.append("")
            if line.startswith("|"):
                line = re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def without_folder_links(text: str, path: str) -> str:
    """A folder of the repository has no page: what links to one is the text of the link alone."""
    folder = (ROOT / path).parent

    def shown(link: re.Match[str]) -> str:
        return link[1] if "://" not in link[2] and (folder / link[2]).is_dir() else link[0]

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]+)\)", shown, text)


def _in_list(lines: list[str]) -> bool:
    """Whether the last line goes on with a list item without an indent."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if re.match(r"(- |\d+\. )", line):
            return True
    return False


def _file(path: str, config: Any, *, source: Path | None = None, content: str | bytes | None = None) -> File:
    if source is not None:
        return File.generated(config, path, abs_src_path=str(source))
    return File.generated(config, path, content=content)


def _page_of(source: Path) -> str:
    return f"docs/notebooks/{source.stem}.md"


def _results_navigation() -> list[Any]:
    """Results by folder: its own text first, then its reports."""
    nav: list[Any] = ["docs/results.md"]
    pages = [PurePosixPath(path) for path in repository_pages() if path.startswith(RESULTS)]
    folders = sorted({page.parts[2] for page in pages})
    for folder in folders:
        own = sorted((p for p in pages if p.parts[2] == folder), key=lambda p: (len(p.parts), p.name != "README.md", p))
        if len(own) == 1:
            nav.append({folder.removesuffix(".md"): str(own[0])})
        else:
            nav.append({folder: [{_title(page): str(page)} for page in own]})
    return nav


def _title(page: PurePosixPath) -> str:
    heading = next(line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return heading.lstrip("# ").replace("`", "")
