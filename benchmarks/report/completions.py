"""Completions to read side by side, by problem and step. All of their text is untrusted: it is escaped, and what would
not be seen, or would change how its surroundings read, is spelled out."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from benchmarks.comparison.outcomes import ArmOutcome
from benchmarks.experiment.summary import evaluation_rows
from benchmarks.measuring.table import UNSEEN
from benchmarks.report.comparison import Group
from envs.problem import STATUSES

MOST_STEPS = 6
MOST_CHARACTERS = 6000  # of a completion; of a longer one the middle is left out


@dataclass(frozen=True)
class Step:
    """Where an arm stands at one of the steps that are shown.

    Attributes:
        iteration: of the evaluation.
        shown: its completions, one a problem.
    """

    iteration: int
    shown: list[dict[str, Any]]


def reader(group: Group, number: int) -> str:
    """The completions of each arm's first run, problem by problem; empty where none were kept. ``number`` is the
    group's in the page's data."""
    arms = {n: steps for n, arm in enumerate(group.arms) if (steps := _steps(arm))}
    if not arms:
        return ""
    count = min(MOST_STEPS, *map(len, arms.values()))
    chosen = {n: [steps[at] for at in _spread(len(steps), count)] for n, steps in arms.items()}
    problems = min(len(step.shown) for steps in chosen.values() for step in steps)
    parts = [_problem(group, chosen, problem) for problem in range(problems)]
    return f'<div class="reader" data-group="{number}"><div class="choices"></div>\n{"".join(parts)}</div>'


def _steps(arm: ArmOutcome) -> list[Step]:
    rows = evaluation_rows(arm.runs[0].rows)
    return [Step(row["iteration"], row["evaluation"]["shown"]) for row in rows if row["evaluation"].get("shown")]


def _spread(length: int, count: int) -> list[int]:
    """``count`` places among ``length``, the first and the last among them."""
    return [round(at) for at in np.linspace(0, length - 1, count)] if count > 1 else [length - 1]


def _problem(group: Group, arms: dict[int, list[Step]], problem: int) -> str:
    first = next(iter(arms.values()))[0].shown[problem]
    steps = "".join(_step(group, arms, problem, at) for at in range(len(next(iter(arms.values())))))
    return (
        f'<details class="problem"{"" if problem else " open"}><summary>{problem + 1}. '
        f'<bdi>{visible(first["question"])}</bdi> <span class="soft">answer <bdi>{visible(first["answer"])}</bdi>'
        f"</span></summary>\n{steps}</details>\n"
    )


def _step(group: Group, arms: dict[int, list[Step]], problem: int, at: int) -> str:
    iterations = sorted({steps[at].iteration for steps in arms.values()})
    name = f"iteration {iterations[0]}" if len(iterations) == 1 else f"iterations {iterations[0]} to {iterations[-1]}"
    cells = "".join(_cell(group.arms[n], n, steps[at].shown[problem]) for n, steps in arms.items())
    return f'<section class="step" data-step="{at}"><h4>{name}</h4><div class="cells">{cells}</div></section>\n'


def _cell(arm: ArmOutcome, n: int, sample: dict[str, Any]) -> str:
    verdict = "right" if sample["status"] == "right" else "wrong"
    cut = sample.get("finish") == "length"
    seed = f", seed {arm.seeds[0]}" if len(arm.seeds) > 1 else ""
    tokens = f' <span class="soft">{sample["tokens"]} tokens</span>' if "tokens" in sample else ""
    return (
        f'<article data-arm="{n}" data-verdict="{verdict}"{" data-cut" if cut else ""}>'
        f'<header><b>{visible(arm.label)}</b><span class="soft">{seed}</span> '
        f'<span class="{verdict}">{visible(reason(sample))}</span>{tokens}</header>'
        f'<p class="written" dir="auto">{visible(shortened(sample["completion"]))}</p></article>\n'
    )


def reason(sample: dict[str, Any]) -> str:
    """What the verifier says of a completion, and why."""
    status, extracted = sample["status"], sample["extracted"]
    said = {"right": f"right: {extracted}", "wrong": f"wrong: {extracted} is not {sample['answer']}"}
    text = said.get(status) or f"{status.replace('_', ' ')}: {STATUSES.get(status, 'a verdict of another version')}"
    return text + (", cut off" if sample.get("finish") == "length" else "")


def shortened(text: str) -> str:
    """A long text without its middle: an answer stands at the end."""
    left_out = len(text) - MOST_CHARACTERS
    if left_out <= 0:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[{left_out} characters left out]\n{text[-half:]}"


def visible(text: str) -> str:
    """HTML of ``text``: escaped, and every character that is not seen by itself as its code point."""
    return "".join(
        f'<span class="unseen">U+{ord(one):04X}</span>'
        if unicodedata.category(one) in UNSEEN and one not in "\n\t"
        else escape(one)
        for one in text
    )
