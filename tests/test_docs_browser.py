"""The built site in a browser, from its folder and without a network: it reads at two widths in both themes, and its
search answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.oracles.browser import SCHEMES, WIDTHS, opened

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SITE = Path(__file__).resolve().parents[1] / "build" / "site"
PAGES = (
    "index.html",
    "docs/tutorial.html",
    "docs/environment.html",
    "docs/papers.html",
    "docs/notebooks/layers.html",
    "docs/api/agents.html",
    "components/corrections/truncated-is.html",
    "components/agents/reft.html",
    "CHANGELOG.html",
)

pytestmark = pytest.mark.skipif(not SITE.is_dir(), reason="no site: mkdocs build --strict")


def asks_elsewhere(asked: list[str]) -> list[str]:
    """The addresses that are no file of the site."""
    return [url for url in asked if not url.startswith((SITE.as_uri(), "data:", "blob:"))]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pages_read_at_every_width_in_both_themes(browser: Any, width: int, scheme: str) -> None:
    for name in PAGES:
        with opened(browser, SITE / name, width, scheme) as (page, asked):
            assert page.locator("h1").first.is_visible(), name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.evaluate("[...document.images].filter((one) => !one.complete || !one.naturalWidth).length") == 0
            dark = page.evaluate("document.body.dataset.mdColorScheme") == "slate"
            assert dark == (scheme == "dark"), name
            assert not asks_elsewhere(asked), name


@pytest.mark.parametrize(
    ("words", "page_name"),
    [
        ("Ionides", "components/corrections/truncated-is.html"),  # in brackets
        ("2503.20783", "docs/papers.html"),
        ("learning_rate", "docs/api/agents.html"),
    ],
)
def test_search_answers_without_a_server(browser: Any, words: str, page_name: str) -> None:
    with opened(browser, SITE / "docs" / "tutorial.html") as (page, asked):
        query = page.locator("input.md-search__input")
        query.fill(words)
        query.press("End")  # the theme listens to keys
        playwright.expect(page.locator(f".md-search-result__link[href*='{page_name}']").first).to_be_attached()
        assert not asks_elsewhere(asked)
