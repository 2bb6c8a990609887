"""The built site (``mkdocs build --strict``): complete, without a dead link, and without a request to elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import agents  # noqa: F401  registers the components
import registry

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
KINDS = {
    "agents": registry.agents,
    "corrections": registry.corrections,
    "samplers": registry.skip_samplers,
    "advantages": registry.advantages,
    "batches": registry.batches,
}
OWN = ("agents", "policies", "envs")

pytestmark = pytest.mark.skipif(not PAGES, reason="no site: mkdocs build --strict")


class Page(HTMLParser):
    """The ids, links and loaded files of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next"):
            return
        self.loaded += [given[name] for name in given if (tag, name) in LOADED]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    return {path: Page(path) for path in PAGES}


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for source in page.loaded:
            assert not urlsplit(source).netloc, f"{path}: {source}"
            if not source.startswith("data:") and path.name != "404.html":  # which a server may show anywhere
                assert (path.parent / unquote(urlsplit(source).path)).resolve().exists(), f"{path}: {source}"
    for sheet in SITE.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\"'\s]*(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].ids if target in pages else set()
            if not target.exists() or (parts.fragment and target in pages and unquote(parts.fragment) not in known):
                dead.append(f"{path.relative_to(SITE)}: {link}")
    assert not dead, "\n".join(dead)


@pytest.mark.parametrize("folder", KINDS)
def test_every_component_has_a_page(folder: str, pages: dict[Path, Page]) -> None:
    titles = {
        name for path, page in pages.items() if path.parent.name == folder for name in re.findall(r"[\w*-]+", page.text)
    }
    for id in KINDS[folder]:
        if KINDS[folder].get(id).__module__.split(".")[0] in OWN:
            assert id in titles, id


def test_a_page_says_what_its_component_is(pages: dict[Path, Page]) -> None:
    """Formula, source, fields with defaults, tests and a committed result, on a page that has all of them."""
    page = pages[SITE / "components" / "corrections" / "truncated-is.html"]
    text = " ".join(page.text.split())
    assert "W = min(w, cap)" in text and "Ionides 2008" in text
    assert re.search(r"cap float 2\.0", text) and "When to use it" in text
    assert "tests/agents/corrections/test_corrections.py" in text
    assert "lab efficiency" in text and "lab-against-training.html" in " ".join(page.links)


@pytest.mark.parametrize("folder", KINDS)
def test_every_component_says_when_to_use_it(folder: str) -> None:
    """A paragraph of its docstring begins with ``Use:``."""
    components = {KINDS[folder].get(id) for id in KINDS[folder]}
    own = [one for one in components if one.__module__.split(".")[0] in OWN]
    assert own and not [one.__name__ for one in own if "\n\n    Use: " not in (one.__doc__ or "")]


def test_the_index_has_every_paper_that_the_code_cites(pages: dict[Path, Page]) -> None:
    cited = set()
    for package in ("agents", "benchmarks", "envs", "policies"):
        for path in (*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.toml")):
            cited |= set(re.findall(r"arXiv[:\s#]*(\d{4}\.\d{4,5})", path.read_text(encoding="utf-8")))
    index = pages[SITE / "docs" / "papers.html"]
    assert len(cited) > 50
    assert not {id for id in cited if f"https://arxiv.org/abs/{id}" not in index.links}


def test_search_works_without_a_server() -> None:
    index = (SITE / "search" / "search_index.js").read_text(encoding="utf-8")
    assert "truncated importance sampling" in index and "components/corrections/truncated-is.html" in index
