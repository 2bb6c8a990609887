"""A gold answer is read as mathematics exactly as its file has it, or refused by name: by loaders, grade and verify."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.grade import main as grade
from envs.problem import Problem
from envs.problems import load_problems
from envs.verifier import Verifier, check_gold, verify
from envs.verifier.gold import read_gold
from registry import UsageError
from tests.envs.verifier.test_verifier_policy import own_cases

ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def damaged(gold: str) -> str:
    """What a JSON reader makes of LaTeX that was written with one backslash."""
    return re.sub(r"(?<!\\)\\([bfnrt])(?=[A-Za-z])", lambda m: ESCAPES[m[1]], gold)


def published_golds(shared_dir: Path) -> list[str]:
    names = ("math500", "olympiad", "minerva")
    sets: list[Any] = [load_problems(name, "test", data_dir=str(shared_dir / "data")) for name in names]
    lines = (shared_dir / "reward_cases" / "public.jsonl").read_text(encoding="utf-8").splitlines()
    golds = {p.answer for problems in sets for p in problems} | {json.loads(line)["gold"] for line in lines}
    return sorted(golds | {gold for _, gold, _, _ in own_cases()})


def test_latex_damaged_by_json_is_refused_wherever_it_stands(shared_dir: Path) -> None:
    golds = [gold for gold in published_golds(shared_dir) if damaged(gold) != gold]
    assert len(golds) > 300
    for gold in golds:
        for value in (damaged(gold), f"so \\boxed{{{damaged(gold)}}}", [gold, damaged(gold)]):
            with pytest.raises(UsageError, match=r"damaged characters|lacks its backslash"):
                check_gold(value, "row 1")


@pytest.mark.parametrize(
    "gold",
    [
        "\frac{3}{8}", "7\times 10^5", "\binom{9}{4}", "2\theta", "\theta", "x \neq 5", "\rho", "\nabla f",
        "5\text{ cm}",
        "3\tan x", "2\rightarrow 3", "\x00", "5\x07", "1\ufffd2", "frac{3}{8}", "rac{3}{8}", "2 dfrac{1}{2}",
        "\\\\frac{3}{8}", "2\\\\pi", "\\\\begin{pmatrix} 1 \\\\ 2 \\\\end{pmatrix}", "\\frac{3}", "\\frac{3}{8", "(1,2",
        "\\farc{3}{8}", "3 \\cdt 4", "She has 21 eggs left in all",
        "7 imes 10^{5}", "3 +", "", "  ", "$$", "####", "a\n####\n",
        "\\boxed{}", "\\boxed{5", "nothing \\boxed", "[]", None, float("nan"), float("inf"), [], [[1, 2]],
        {"a": 1}, b"5",
        [3, -2], [1.5, "2"], (1, 2), np.array([1, 2]), 3 + 4j, ["5", None], ["5", ""], ["5", "\frac{1}{2}"],
    ],
)  # fmt: skip
def test_no_gold_is_taken_that_no_answer_can_match(
    gold: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="row 7"):
        check_gold(gold, "row 7")
    if str(gold) not in ("\\farc{3}{8}", "3 \\cdt 4", "\\frac{3}"):  # only an answer that needs a worker tells: below
        with pytest.raises(UsageError):
            verify("\\boxed{5}", gold)
    if isinstance(gold, str | list | type(None)):
        path = tmp_path / "rows.jsonl"
        rows = [{"question": "Q1?", "answer": "5"}, {"question": "Q2?", "answer": gold}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with pytest.raises(UsageError, match=r"1 of .*rows\.jsonl"):
            load_problems(str(path))
        path.write_text(json.dumps({"gold": gold, "completion": "\\boxed{5}"}) + "\n", encoding="utf-8")
        assert grade([str(path)]) == 2
        assert "rows.jsonl, line 1" in capsys.readouterr().err


@pytest.mark.parametrize("gold", ["2π", "30°", "√2", "x ≤ 5", "½", "x²", "3 × 4 + π", "∅", "café", "São Paulo", "−5"])
def test_unicode_is_read_as_written_and_refused_if_decoded_wrongly(gold: str) -> None:
    check_gold(gold, "row")
    assert verify(f"\\boxed{{{gold}}}", gold).status == "right"
    wrongly = gold.encode("utf-8").decode("cp1252")
    with pytest.raises(UsageError, match="damaged characters"):
        check_gold(wrongly, "row")
    with pytest.raises(UsageError, match="damaged characters"):
        check_gold(gold.encode("latin-1", "replace").decode("utf-8", "replace") + "\ufffd", "row")


@pytest.mark.parametrize("gold", ["\\farc{3}{8}", "3 \\cdt 4"])
def test_a_gold_beyond_all_grammars_does_not_blame_the_answer(gold: str) -> None:
    with pytest.raises(UsageError, match="cannot read the gold answer"):
        verify("\\boxed{\\frac{3}{8}}", gold)


@pytest.mark.parametrize(
    ("value", "golds"),
    [
        ("no solution", ("no solution",)),
        ("\\text{east}", ("\\text{east}",)),
        ("June 20", ("June 20",)),
        ("A", ("A",)),
        ("3 (pears)", ("3 (pears)",)),
        ("9.6\n", ("9.6",)),
        ("x = 1\ny = 2", ("x = 1\ny = 2",)),
        ("\\begin{pmatrix} a \\\\b \\end{pmatrix}", ("\\begin{pmatrix} a \\\\b \\end{pmatrix}",)),
        ("sqrt{2}", ("sqrt{2}",)),
        ("\\{1, 2, \\ldots, 10\\}", ("\\{1, 2, \\ldots, 10\\}",)),
        ("\\sum_{k=1}^{n} k", ("\\sum_{k=1}^{n} k",)),
        ("t(0,4]", ("t(0,4]",)),
        ("$\\frac{2}{9}$.", ("\\frac{2}{9}",)),
        ("She has 3*7=<<3*7=21>>21 eggs.\n#### 21", ("21",)),
        ("\\boxed{21}", ("21",)),
        ("['9.6\\n', '9.60']", ("9.6", "9.60")),
        ("[3, -2]", ("[3, -2]",)),
        ("True", ("True",)),
        (21, ("21",)),
        (142.0, ("142",)),
        (0.1, ("0.1",)),
        (np.float32(0.5), ("0.5",)),
        (np.int64(7), ("7",)),
        (np.array([7]), ("7",)),
        (Fraction(3, 8), ("3/8",)),
        (Decimal("0.30"), ("0.30",)),
        ([3], ("3",)),
        (["0.013", "0.012", "0.013\n"], ("0.013", "0.012")),
    ],
)
def test_what_a_gold_may_be(value: Any, golds: tuple[str, ...]) -> None:
    check_gold(value, "row")
    assert read_gold(value, "row") == golds
    for gold in golds:
        for spelling in (f"\\boxed{{{gold}}}", f"so\n#### {gold}" if "\n" not in gold else f"\\boxed{{ {gold} }}"):
            assert verify(spelling, value).status == "right"


def test_any_accepted_answer_is_right_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "How much?", "answer": ["0.01", "0.02", "\\sqrt{2}"]}), encoding="utf-8")
    problem = load_problems(str(path))[0]
    assert (problem.answer, problem.alternatives) == ("0.01", ("0.02", "\\sqrt{2}"))
    judge = Verifier(workers=2)
    answers = {"0.01": 1, "0.02": 1, "\\frac{2}{\\sqrt{2}}": 1, "0.015": 0, "0.01, 0.02": 0, "\\sqrt{3}": 0, "(": 0}
    verdicts = judge.verify_batch([(f"\\boxed{{{answer}}}", problem) for answer in answers])
    assert [verdict.reward for verdict in verdicts] == list(answers.values())
    assert [verdict.extracted for verdict in verdicts] == list(answers)
    assert verdicts[-1].status == "malformed"


def test_several_golds_are_right_whenever_one_of_them_alone_is(shared_dir: Path) -> None:
    minerva: Any = load_problems("minerva", "test", data_dir=str(shared_dir / "data"))
    several = [problem for problem in minerva if problem.alternatives]
    assert several
    for problem in several:
        for gold in (problem.answer, *problem.alternatives):
            assert verify(f"\\boxed{{{gold}}}", problem).reward == 1.0
        assert verify("\\boxed{123457}", problem).reward == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "so \\boxed{5}",
        [{"role": "assistant", "content": "so \\boxed{5}"}],
        {"role": "assistant", "content": "so \\boxed{5}"},
        [{"role": "assistant", "content": "\\boxed{4}"}, {"role": "tool", "content": "no"},
         {"role": "assistant", "content": [{"type": "text", "text": "so "}, {"type": "text", "text": "\\boxed{5}"}]}],
    ],
)  # fmt: skip
def test_completions_may_be_chat_messages(completion: Any) -> None:
    assert verify(completion, "5").status == "right"


@pytest.mark.parametrize(
    "completion", [None, 5, [], ["so \\boxed{5}"], [{"role": "user", "content": "5"}], [{"role": "assistant"}], b"5"]
)
def test_other_completions_are_refused_by_name(completion: Any) -> None:
    with pytest.raises(UsageError, match="give text"):
        verify(completion, "5")


def test_a_gold_with_a_scorer_is_not_read() -> None:
    """Multi-line golds of reasoning-gym are compared by the task's own scorer."""
    gold = "1 2\t3\nMove disk 1 from Peg 1 to Peg 2"
    assert verify(f"\\boxed{{{gold}}}", Problem("Q", gold, "s", "0", scorer="{}")).reward == 1.0
