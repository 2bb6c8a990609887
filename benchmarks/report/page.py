"""A report as a page: one list of sections, shown in HTML with its pictures and in Markdown without them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measuring.table import Table, html_text, markdown_text, one_line
from benchmarks.report.charts import script_json
from benchmarks.report.figures import svg

STYLE = Path(__file__).parent / "style.css"
SCRIPT = Path(__file__).parent / "page.js"
LIVE = """<section id="live" data-version="{}"><p role="status"></p><div class="scroll"><table></table></div>
<p class="soft">This page is of runs that go on: figures are of what is there so far, and intervals do not allow for
looking again and again. <label><input type="checkbox" checked> show new evaluations as they come</label></p>
</section>"""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. Nothing is shown of a section that has nothing to show, heading included.

    Attributes:
        table: shown in both; without rows it is nothing.
        note: on what the section shows.
        extra: further HTML.
        pictures: in HTML alone, beside each other: what each shows, for screen readers, and what draws it.
        level: of the heading.
    """

    heading: str
    table: Table | None = None
    note: str = ""
    extra: str = ""
    pictures: Sequence[tuple[str, Callable[[], Figure]]] = ()
    level: int = 3

    def html(self) -> str:
        """Lines, or none."""
        pictures = "".join(f"<figure>{svg(draw(), words)}</figure>" for words, draw in self.pictures)
        shown = [
            self.table.html() if self.table else "",
            self.extra,
            pictures and f'<div class="figures">{pictures}</div>',
        ]
        if not any(shown):
            return ""
        note = self.note and f'<p class="soft">{escape(self.note)}</p>'
        return "\n".join([f"<h{self.level}>{html_text(self.heading)}</h{self.level}>", *filter(None, [*shown, note])])

    def markdown(self) -> str:
        """Paragraphs, or none."""
        table = self.table.markdown() if self.table else ""
        return table and "\n\n".join(
            filter(None, [f"{'#' * self.level} {markdown_text(self.heading)}", table, self.note])
        )


@dataclass(frozen=True)
class Report:
    """Everything that is shown of a comparison.

    Attributes:
        sentences: the findings.
        command: repeats it.
        facts: names and values of where the numbers come from.
        note: on the command.
        data: what the page's script draws (``charts.page_data``).
    """

    title: str
    sentences: Sequence[str]
    sections: Sequence[Section]
    command: str
    facts: Sequence[tuple[str, str]]
    note: str
    data: Any = ()

    def html(self, live: str | None = None) -> str:
        """A self-contained page: its one script is its own, by hash, and nothing is fetched from anywhere.

        ``live`` names this version of it where a comparison that still runs serves it: it then asks its own server how
        far the runs are, and for a newer version.
        """
        script = SCRIPT.read_text(encoding="utf-8")
        findings = "".join(f"<li>{html_text(sentence)}</li>" for sentence in self.sentences)
        facts = "".join(f"<dt>{html_text(name)}</dt><dd>{html_text(value)}</dd>" for name, value in self.facts)
        parts = [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(script, live is not None)}">',
            f'<title>{html_text(self.title)}</title>\n<link rel="icon" href="data:,">',
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>",
            f"<h1>{html_text(self.title)}</h1>",
            LIVE.format(live) if live is not None else "",
            findings and f'<ul class="summary">{findings}</ul>',
            *(section.html() for section in self.sections),
            f"<h2>Repeat</h2>\n<pre>{html_text(self.command)}</pre>",
            f'<p class="soft">{escape(self.note)}</p>\n<dl>{facts}</dl>',
            f'<script type="application/json" id="data">{script_json(self.data)}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
        return _encodable("\n".join(filter(None, parts)))

    def markdown(self) -> str:
        """Refers to curves.png beside it."""
        parts = [
            f"# {markdown_text(self.title)}",
            "\n".join(f"- {markdown_text(sentence)}" for sentence in self.sentences),
            *(section.markdown() for section in self.sections),
            "![Learning curves](curves.png)\n\n## Repeat",
            f"    {one_line(self.command)}",
            self.note,
            "\n".join(f"- {name}: {markdown_text(value)}" for name, value in self.facts),
        ]
        return _encodable("\n\n".join(filter(None, parts)) + "\n")


def _policy(script: str, live: bool) -> str:
    """Content Security Policy: only this script runs, and nothing is loaded from anywhere. Styles are the page's own
    and those that matplotlib writes into its pictures."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if live else "")
    )


def _encodable(text: str) -> str:
    """Lone surrogates, which no file can hold, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
