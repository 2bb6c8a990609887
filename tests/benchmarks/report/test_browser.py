"""The page of a report in a browser: no error, no request, two widths, two themes, charts and filters that work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.files import write
from benchmarks.report.live import LivePage
from tests.benchmarks.report.test_live import half_done
from tests.benchmarks.report.test_page import AGENTS, HOSTILE, compared, sample
from tests.oracles import browser as browsing
from tests.oracles.browser import SCHEMES, WIDTHS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two arms: hostile completions, then a right one, a wrong one, and one that was cut off."""
    folder = tmp_path_factory.mktemp("report")
    shown = [sample(text) for text in HOSTILE]
    shown += [sample("4", "right"), sample("5", "wrong"), sample("6 + ", "no_answer", "length")]
    write(compared(folder / "runs", shown), folder / "out")
    return folder / "out" / "report.html"


@contextmanager
def opened(browser: Any, report: Path, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """The page; at the end it has asked for nothing but itself, and nothing of the completions has run."""
    with browsing.opened(browser, report, width, scheme) as (page, asked):
        yield page
        assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
        assert page.evaluate("window.harmed") is None


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility() || one.closest("svg:not(.chart svg), script, option")) continue;
    const layers = [];
    for (let place = one; place; place = place.parentElement) {
      layers.push(rgba(getComputedStyle(place).backgroundColor));
      if (layers[layers.length - 1][3] === 255) break;
    }
    const over = (below, above) => below.map((c, n) => c + (above[n] - c) * above[3] / 255);
    const ground = layers.reverse().reduce(over);
    const style = getComputedStyle(one);
    const ink = one.namespaceURI.endsWith("svg") ? style.fill : style.color;
    found.push([one.tagName + "." + (one.getAttribute("class") || ""), rgba(ink), ground]);
  }
  return found;
}"""


def luminance(rgba: list[int]) -> float:
    """WCAG 2's relative luminance of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (one / 255 for one in rgba[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_it_reads_at_every_width_in_both_themes(browser, report, width, scheme):
    with opened(browser, report, width, scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        texts = page.evaluate(CONTRAST)
        heading = next(ground for name, _, ground in texts if name == "H1.")
        assert len(texts) > 100 and (luminance(heading) > 0.5) == (scheme == "light")
        for name, ink, ground in texts:
            light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ink, ground)


def test_a_chart_shows_values_axes_and_arms(browser, report):
    with opened(browser, report) as page:
        figure = page.locator(".chart").first
        svg, tip = figure.locator("svg"), figure.locator(".tip")
        assert not tip.is_visible() and svg.locator("path.mean").count() == 2 and svg.locator("path.run").count() == 4
        box = svg.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 15, box["y"] + box["height"] / 2)
        assert tip.is_visible() and tip.locator("b").text_content() == "4 iterations"
        assert tip.locator("div").all_text_contents() == [f"{label}: 75" for label in AGENTS]
        svg.press("ArrowLeft")
        assert tip.locator("div").all_text_contents() == [f"{label}: 50" for label in AGENTS]
        page.locator(".charts .choices select").first.select_option("tokens")
        assert "rollout tokens" in svg.locator("text").all_text_contents()
        page.locator(".charts .choices input").first.uncheck()
        assert svg.locator("path.mean").count() == 1 and svg.locator("path.run").count() == 2
        assert page.locator("article[data-arm='0']:visible").count() == 0


def test_completions_are_chosen_by_step_and_verdict(browser, report):
    with opened(browser, report) as page:
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        cells, each = page.locator("article:visible"), 3 * len(AGENTS)
        assert cells.count() == each * (len(HOSTILE) + 3)
        step, verdict = (page.locator(".reader .choices select").nth(n) for n in range(2))
        assert step.locator("option").all_text_contents() == ["all", "iteration 0", "iteration 2", "iteration 4"]
        verdict.select_option("right")
        assert cells.count() == each and "right: 4" in cells.first.inner_text()
        verdict.select_option("cut")
        assert cells.count() == each and "cut off" in cells.first.inner_text()
        step.select_option("2")
        assert cells.count() == len(AGENTS) and page.locator(".problem:visible").count() == 1
        verdict.select_option("apart")
        assert cells.count() == 0


def test_hostile_text_reads_as_what_it_is(browser, report):
    with opened(browser, report) as page:
        texts = page.locator("p.written").evaluate_all("all => all.map((one) => one.textContent)")
        assert set(HOSTILE.values()) <= set(texts)


def test_the_data_is_that_of_the_page(browser, report):
    with opened(browser, report) as page:
        (group,) = json.loads(page.locator("#data").text_content())
        assert [arm["label"] for arm in group["arms"]] == list(AGENTS)


def test_a_live_page_follows_the_runs_and_keeps_what_was_chosen(browser, tmp_path):
    runs, labels, read = half_done(tmp_path, rows=4)
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    with LivePage(0) as live:
        live.follow(runs, labels, 1, read, tmp_path / "out")
        page.clock.install()
        page.goto(live.url)
        status, cells = page.locator("#live [role=status]"), page.locator("#live td")
        playwright.expect(status).to_contain_text("1 of 2 runs done")
        assert cells.all_text_contents()[:5] == ["reft", "0", "finished", "4/4", "75.0%"]
        page.locator(".charts select").first.select_option("tokens")
        page.locator(".problem").first.evaluate("(one) => { one.open = false; }")
        with (runs[1].folder / "metrics.jsonl").open("a") as file:
            file.write((runs[0].folder / "metrics.jsonl").read_text().splitlines(keepends=True)[-1])
        runs[1].look()
        before = page.locator("#live").get_attribute("data-version")
        page.clock.fast_forward(16_000)
        playwright.expect(page.locator("#live")).not_to_have_attribute("data-version", before)
        assert page.locator(".charts select").first.input_value() == "tokens"
        assert page.locator(".problem").first.get_attribute("open") is None
        assert said == []
    page.clock.fast_forward(3_000)
    playwright.expect(status).to_contain_text("No answer")
    context.close()
