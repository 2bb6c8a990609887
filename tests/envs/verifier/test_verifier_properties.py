"""Properties: no text raises, every number equals itself in every spelling, and order does not matter."""

from __future__ import annotations

import random
import string
import sys
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.problem import STATUSES, Problem
from envs.verifier import Verifier, settle_in_process, verify
from envs.verifier import verdicts as verifier
from envs.verifier.notation import normalise

PIECES = [
    "\\boxed{", "}", "{", "\\frac", "\\sqrt", "^", "_", "(", ")", "[", "]", ",", "####", "answer is ", "</think>",
    "\\pm", "\\text{", " or ", "=", "<", "\\begin{pmatrix}", "&", "\\\\", "\\end{pmatrix}", "|", "!", "%", "$", "1",
    "23", "x", "e", "\\cup", "\\infty", "\\left(", "\\pi", ".", "-", "\n", "°", "½", "²", "−", "\u200b", "\ud800", "٣",
    "\x00",
]  # fmt: skip
GOLDS = [
    "5",
    "-1/3",
    "2.50",
    "\\frac{1}{2}",
    "x+1",
    "\\text{east}",
    "(1,2)",
    "[0,1)",
    "1,2",
    "x=5",
    "x>2",
    "3\\sqrt{2}",
]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)), st.sampled_from(GOLDS))
def test_no_text_raises(text: str, gold: str) -> None:
    for completion in (text, f"\\boxed{{{text}}}"):
        verdict = verify(completion, gold)
        assert verdict.status in STATUSES
        assert verdict.reward in (0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES)).map("".join), st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_gold_raises(gold: str, answer: str) -> None:
    assert settle_in_process(normalise(gold), normalise(answer)) in (
        "right",
        "wrong",
        "malformed",
        "unsupported",
        "open",
    )


@given(st.integers())
def test_integers_in_every_spelling(n: int) -> None:
    for spelling in (str(n), f"{n:,}", f"{n}.0", f"${n}$", f"\\text{{{n}}}", f"{n:,} apples", f"x = {n}", f"({n})"):
        assert verify(f"\\boxed{{{spelling}}}", str(n)).reward == 1.0, spelling
    assert verify(f"#### {n}", str(n)).reward == 1.0
    assert verify(f"The answer is {n}.", str(n)).reward == 1.0
    for wrong in (f"{n + 1}", f"{n}.5", f"{n}, {n}", f"{n} or {n + 1}", f"{n} + 0", f"{n}x", f"\\frac{{{2 * n}}}{{2}}"):
        assert verify(f"\\boxed{{{wrong}}}", str(n)).reward == 0.0, wrong


ZEROS = [chr(n) for n in range(sys.maxunicode) if unicodedata.decimal(chr(n), None) == 0]


@given(st.integers(0), st.sampled_from(ZEROS))
def test_decimal_digits_of_every_script(n: int, zero: str) -> None:
    def spell(number: int | str) -> str:
        return "".join(chr(ord(zero) + int(c)) if c.isdecimal() else c for c in str(number))

    for frame in ("\\boxed{{{}}}", "#### {} apples", "The answer would be {}."):
        assert verify(frame.format(spell(n)), str(n)).reward == 1.0
        assert verify(frame.format(n), spell(n)).reward == 1.0
        assert verify(frame.format(spell(n + 1)), str(n)).reward == 0.0
    assert verify(f"\\boxed{{{spell(f'{n}.25')}}}", f"{n}.25").reward == 1.0
    assert verify(f"\\boxed{{\\frac{{{spell(n + 1)}}}{{{spell(7)}}}}}", f"{n + 1}/7").reward == 1.0


@pytest.mark.parametrize("answer", ["4²", "4₂", "④②", "Ⅳ2", "4½"])
def test_other_numerals_are_no_digits(answer: str) -> None:
    assert verify(f"\\boxed{{{answer}}}", "42").reward == 0.0


def test_arabic_separators() -> None:
    assert verify("\\boxed{١٬٢٣٤٫٥}", "1234.5").reward == 1.0
    assert verify("\\boxed{٢٨٪}", "28\\%").reward == 1.0


@given(st.integers(-(10**6), 10**6), st.integers(2, 10**4))
def test_fractions_in_every_spelling(p: int, q: int) -> None:
    value = Fraction(p, q)
    gold = f"\\frac{{{p}}}{{{q}}}"
    for spelling in (f"{p}/{q}", f"\\dfrac{{{p}}}{{{q}}}", f"\\frac{{{-p}}}{{{-q}}}", f"\\frac{{{3 * p}}}{{{3 * q}}}"):
        assert verify(f"\\boxed{{{spelling}}}", gold).reward == 1.0, spelling
    assert verify(f"\\boxed{{{p + 1}/{q}}}", gold).reward == 0.0
    assert verify(f"\\boxed{{{value + 1}}}", gold).reward == 0.0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_decimals_in_every_spelling(x: object) -> None:
    gold = str(x)
    for spelling in (gold, gold + "00", f"${gold}$", f"{gold}e0", f"{gold} kg"):
        assert verify(f"\\boxed{{{spelling}}}", gold).reward == 1.0, spelling
    assert verify(f"\\boxed{{{gold}1}}", gold).reward == 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 9))
def test_equivalent_expressions_agree(a: int, b: int, c: int) -> None:
    gold = f"{a}x^2 + {b}\\sqrt{{{c}}}"
    for spelling in (
        f"{b}\\sqrt{{{c}}} + {a}x^2",
        f"{a}x \\cdot x + \\sqrt{{{b * b * c}}}",
        f"{a}x^2+\\frac{{{b * c}}}{{\\sqrt{c}}}",
    ):
        assert verify(f"\\boxed{{{spelling}}}", gold).reward == 1.0, spelling
    for spelling in (f"{a}x^2 - {b}\\sqrt{{{c}}}", f"{a}x^3 + {b}\\sqrt{{{c}}}", f"{a}y^2 + {b}\\sqrt{{{c}}}"):
        assert verify(f"\\boxed{{{spelling}}}", gold).reward == 0.0, spelling


def test_verdicts_do_not_depend_on_order(monkeypatch: pytest.MonkeyPatch) -> None:
    golds = [*GOLDS, "\\frac{\\sqrt{3}}{3}", "\\{1\\pm\\sqrt{5},-2\\}"]
    answers = [
        *golds,
        "x = 5",
        "0.5",
        "1+x",
        "\\frac{1}{\\sqrt{3}}",
        "\\sqrt{18}",
        "2,1",
        "East",
        "junk {",
        "9^{9^{9^9}}",
    ]
    pairs = [(f"\\boxed{{{a}}}", Problem("", g, "", "")) for g in golds for a in answers]
    expected = Verifier().verify_batch(pairs)
    order = list(range(len(pairs)))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        monkeypatch.setattr(verifier, "_SETTLED", {})
        shuffled = Verifier().verify_batch([pairs[n] for n in order])
        assert [shuffled[order.index(n)] for n in range(len(pairs))] == expected


@pytest.mark.parametrize("text", ["**42**.", "_42_:", '"42", ', "$**42**$.", "`42`;", "*42.*", "42\\,", "\\_42_"])
def test_emphasis_and_punctuation_come_off_in_any_order(text: str) -> None:
    assert normalise(text) == "42"


@given(st.text(string.printable, max_size=60))
def test_normalising_twice_changes_nothing_that_matters(text: str) -> None:
    once = normalise(text)
    assert settle_in_process(once, normalise(once)) == settle_in_process(once, once)
