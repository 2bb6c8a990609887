"""The page of a report: hostile text stays text, only its own script may run, charts hold the runs' numbers."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison.arms import arms
from benchmarks.comparison.grid import Grid
from benchmarks.comparison.stored import read
from benchmarks.report.charts import MOST_POINTS, mean_line, page_data, thinned
from benchmarks.report.comparison import Comparison
from benchmarks.report.completions import MOST_CHARACTERS, shortened
from benchmarks.report.files import write
from tests.oracles.finished_runs import finish

AGENTS = ("reft", "nested-reft/uniform/retrace")
RUNS = [{"seed": 0, "evaluations": [{"iteration": n, "outcomes": text} for n, text in enumerate(("0011", "0111"))]}]
SET = {"iterations": 4, "evaluation.every": 2, "evaluation.samples": 4}
HOSTILE = {  # a completion -> how it reads in the page
    "</script><script>window.harmed = 1</script>": "</script><script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1'>": "<img src=x onerror='window.harmed = 1'>",
    "</p></article></details></body><h1>mine": "</p></article></details></body><h1>mine",
    '<!-- <script> " & &amp; ]]>': '<!-- <script> " & &amp; ]]>',
    "a lone \ud800 surrogate": "a lone U+D800 surrogate",
    "12 \u202e34\u202c \u2066x": "12 U+202E34U+202C U+2066x",
    "nul \0 bell \a escape \x1b[31m": "nul U+0000 bell U+0007 escape U+001B[31m",
    "two\nlines\tand \u2028 another": "two\nlines\tand U+2028 another",
    " leading space, ünïcödé, 数学, $x^2$ ": " leading space, ünïcödé, 数学, $x^2$ ",
}


def compared(runs: Path, shown: list[dict] | None = None) -> Comparison:
    """A comparison of made-up runs; ``shown`` are the completions of every evaluation."""
    made = arms(Grid(title="Runs", agents=AGENTS, seeds=(0, 1), set=SET))
    for arm in made:
        for spec in arm.specs:
            folder = finish(spec, runs, 0.25, 0.75)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for row in rows:
                if "evaluation" in row and shown is not None:
                    row["evaluation"]["shown"] = shown
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Comparison.read(Grid(agents=AGENTS), made, runs, {}, "python -m benchmarks.compare")


def sample(completion: str, status: str = "wrong", finish: str = "eos") -> dict:
    said = {"question": completion, "answer": completion, "completion": completion, "extracted": completion}
    return {**said, "status": status, "finish": finish, "tokens": 7}


class Read(HTMLParser):
    """The elements of a page with their attributes, and the text inside of each kind that is asked for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[int] = []
        self.texts: dict[int, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "hr", "img", "input"):
            self.inside.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.elements[self.inside.pop()][0] == tag

    def handle_data(self, data):
        for n in self.inside:
            self.texts[n] = self.texts.get(n, "") + data

    def all(self, tag: str, **wanted: str) -> list[str]:
        return [
            self.texts.get(n, "")
            for n, (name, attributes) in enumerate(self.elements)
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]


def page(comparison: Comparison, out: Path) -> Read:
    """As written to disk and read back."""
    write(comparison, out)
    read_back = Read((out / "report.html").read_text(encoding="utf-8"))
    assert read_back.inside == []
    return read_back


def test_hostile_completions_are_text(tmp_path):
    shown = [sample(text) for text in HOSTILE]
    read_back = page(compared(tmp_path / "runs", shown), tmp_path / "out")
    tags = [tag for tag, _ in read_back.elements]
    assert tags.count("script") == 2 and not {"img", "iframe", "object", "form", "base"} & set(tags)
    assert not any(name.startswith("on") for _, attributes in read_back.elements for name in attributes)
    written = read_back.all("p", **{"class": "written"})
    cells = 3 * len(AGENTS)  # three evaluations
    assert written == [seen for seen in HOSTILE.values() for _ in range(cells)]
    assert set(read_back.all("bdi")) == set(HOSTILE.values())
    (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_labels_are_data_and_cannot_end_it(tmp_path):
    label = "</script><script>window.harmed = 1 // <!-- $\\frac$"
    stored = {"task": "<b>", "arms": [{"label": label, "runs": RUNS}, {"label": "reft", "runs": RUNS}]}
    (tmp_path / "theirs.json").write_text(json.dumps(stored))
    comparison = Comparison.of_stored(read([tmp_path / "theirs.json"]), "<i>", None, 0.02, "command")
    read_back = page(comparison, tmp_path / "out")
    assert [tag for tag, _ in read_back.elements].count("script") == 2
    (data,) = read_back.all("script", type="application/json")
    assert [arm["label"] for arm in json.loads(data)[0]["arms"]] == ["reft", label]


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("two\n\n# lines\r| a |", "two  # lines | a |"),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        ("[here](javascript:alert(1))", "[here](javascript:alert(1))"),
        ("\u202edesrever\u2066", "U+202EdesreverU+2066"),
        ("\ud800 alone, \x1b[31m", "U+D800 alone, U+001B[31m"),
    ],
)
def test_labels_and_tasks_stay_in_their_line_and_are_text(tmp_path, label, shown):
    """In both files: no line, heading, element or link comes from them."""
    stored = {"task": label, "baseline": "reft", "arms": [{"label": one, "runs": RUNS} for one in (label, "reft")]}
    (tmp_path / "theirs.json").write_text(json.dumps(stored))
    comparison = Comparison.of_stored(read([tmp_path / "theirs.json"]), label, None, 0.02, "command")
    read_back = page(comparison, tmp_path / "out")
    assert read_back.all("h1") == read_back.all("h2")[:1] == read_back.all("title") == [shown]
    assert shown in read_back.all("td") and "img" not in [tag for tag, _ in read_back.elements]
    lines = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").split("\n")
    written = shown.replace("<", "&lt;").replace("](", "]\\(")
    assert lines[0] == f"# {written}" and f"## {written}" in lines
    assert any(line.startswith(f"- {written} ") for line in lines)
    assert any(line.startswith("| " + written.replace("|", "\\|") + " | 1 |") for line in lines)


def test_the_policy_admits_the_one_script(tmp_path):
    read_back = page(compared(tmp_path / "runs"), tmp_path / "out")
    (policy,) = [
        dict(part.strip().split(" ", 1) for part in str(about["content"]).split(";"))
        for tag, about in read_back.elements
        if tag == "meta" and about.get("http-equiv") == "Content-Security-Policy"
    ]
    script = read_back.all("script")[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["default-src"] == "'none'" and policy["script-src"] == f"'sha256-{digest}'"
    assert policy["base-uri"] == policy["form-action"] == "'none'" and "connect-src" not in policy


def test_completions_stand_by_problem_and_step_with_the_verdicts_reason(tmp_path):
    shown = [sample("4", "right"), sample("5", "wrong"), sample("", "no_answer", "length")]
    shown[1]["answer"] = "6"
    read_back = page(compared(tmp_path / "runs", shown), tmp_path / "out")
    assert read_back.all("h4") == ["iteration 0", "iteration 2", "iteration 4"] * len(shown)
    headers = read_back.all("header")
    cells = 3 * len(AGENTS)
    assert len(headers) == cells * len(shown) and headers[0] == "reft, seed 0 right: 4 7 tokens"
    assert "wrong: 5 is not 6" in headers[cells]
    assert "no answer: the completion marks no answer, cut off" in headers[2 * cells]
    marked = [about for tag, about in read_back.elements if tag == "article"]
    assert [about["data-verdict"] for about in marked] == ["right"] * cells + ["wrong"] * 2 * cells
    assert ["data-cut" in about for about in marked] == [False] * 2 * cells + [True] * cells


def test_long_completions_lose_their_middle():
    text = "".join(chr(ord("a") + n % 26) for n in range(MOST_CHARACTERS + 300))
    short = shortened(text)
    head, _, tail = short.partition("\n[300 characters left out]\n")
    assert text.startswith(head) and text.endswith(tail) and len(head + tail) == MOST_CHARACTERS
    assert shortened(text[:MOST_CHARACTERS]) == text[:MOST_CHARACTERS]


def test_charts_hold_the_runs_numbers(tmp_path):
    (group,) = page_data(compared(tmp_path))
    lines = [line for line in group["charts"]["greedy"]["lines"] if line["arm"] == 0]
    assert list(group["axes"]) == ["iteration", "tokens", "target_tokens", "seconds"]
    for axis, x in (
        ("iteration", [0, 2, 4]),
        ("tokens", [0, 200, 400]),
        ("target_tokens", [0, 200, 400]),
        ("seconds", [0, 3.2, 6.4]),
    ):
        own = [line for line in lines if line["axis"] == axis]
        assert [line.get("seed") for line in own] == [0, 1, None]
        assert all(line["x"] == pytest.approx(x) and line["y"] == pytest.approx([25, 50, 75]) for line in own)
    bands = [line for line in group["charts"]["weight"]["lines"] if line["axis"] == "iteration"]
    assert [(line["low"], line["y"], line["high"]) for line in bands] == [([0.5] * 4, [1.0] * 4, [1.5] * 4)] * 2
    assert "overlap" not in group["charts"]  # these runs measured none


def test_a_mean_line_goes_as_far_as_all_runs():
    """Against the mean of the two functions, which are straight between their points."""
    x, y = mean_line([([0.0, 2.0, 4.0], [0.0, 1.0, 1.0]), ([0.0, 3.0], [0.0, 3.0])])
    assert x.tolist() == [0, 2, 3] and y.tolist() == [0, 1.5, 2]
    x, y = np.arange(10 * MOST_POINTS, dtype=float), np.arange(10.0 * MOST_POINTS) ** 2
    few_x, few_y = thinned(x, y)
    assert len(few_x) == MOST_POINTS and few_x.mean() == pytest.approx(x.mean())
    assert few_y == pytest.approx([(y[10 * n : 10 * n + 10]).mean() for n in range(MOST_POINTS)])
