"""Verdicts against labels: the shared reward cases, an own table of variations, and the extraction rules one by one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envs.problem import STATUSES
from envs.problems.load import load_problems
from envs.verifier import verify
from envs.verifier.extract import extract, extract_tagged

TABLE = Path(__file__).with_name("verifier_cases.txt")


def own_cases() -> list[tuple[str, str, str, int]]:
    kind, found = "", []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            kind = line[2:]
        elif line.strip():
            gold, *answer, expected = line.split(" | ")
            found.append((kind, gold, " | ".join(answer), int(expected)))
    return found


def test_own_table_agrees_case_by_case() -> None:
    wrong = [
        (kind, gold, answer, verdict.status)
        for kind, gold, answer, expected in own_cases()
        if (verdict := verify(f"So it is \\boxed{{{answer}}}.", gold)).reward != expected
    ]
    assert not wrong


def test_public_cases_meet_every_bar(shared_dir: Path) -> None:
    lines = (shared_dir / "reward_cases" / "public.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    verdicts = [verify(row["completion"], row["gold"]) for row in rows]
    agree = [verdict.reward == row["expected"] for verdict, row in zip(verdicts, rows, strict=True)]
    negatives = [verdict.reward for verdict, row in zip(verdicts, rows, strict=True) if not row["expected"]]
    cases = Counter(row["kind"] for row in rows)
    right = Counter(row["kind"] for row, good in zip(rows, agree, strict=True) if good)
    assert sum(agree) >= 0.98 * len(rows)
    assert sum(negatives) <= 0.02 * len(negatives)
    assert all(right[kind] >= 0.9 * cases[kind] for kind in cases), {k: (right[k], cases[k]) for k in cases}
    assert all(verdict.status in STATUSES for verdict in verdicts)
    assert all((verdict.status == "right") == (verdict.reward == 1.0) for verdict in verdicts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{41} and \boxed{42}", ("42", "")),
        (r"\boxed{\frac{1}{\sqrt{2}}}", (r"\frac{1}{\sqrt{2}}", "")),
        (r"\boxed{\{1,2\}}", (r"\{1,2\}", "")),
        (r"\boxed{\boxed{3}}", ("3", "")),
        (r"\boxed 7", ("7", "")),
        (r"\boxed {7}", ("7", "")),
        (r"\fbox{7}", ("7", "")),
        (r"\boxed{1 \\ 2}", (r"1 \\ 2", "")),
        (r"\boxed{5} or \boxed{", ("", "malformed")),
        (r"\boxed{5} then \boxed{}", ("", "malformed")),
        (r"\boxed", ("", "malformed")),
        (r"\boxedx{5}", ("", "no_answer")),
        ("#### 5\nThe answer is 6.", ("5", "")),
        ("#### 5\n#### 6 apples\nmore", ("6 apples", "")),
        ("####\n5", ("", "malformed")),
        ("### 5", ("", "no_answer")),
        ("#### Step 1: Compute\n9 and 9 are 18.\nThe answer is 18.", ("18", "")),
        ("#### Step 2: 9 x 2 = 18\nThe answer is 17.", ("17", "")),
        ("##### 2. Add them up\nAnswer: 18", ("18", "")),
        ("#### **Conclusion**\nSo the answer is 18.", ("18", "")),
        ("#### Final Answer\n18", ("18", "")),
        ("#### **Final Answer:**\n\n$18", ("$18", "")),
        ("#### Final Answer: 18\nThe answer is 17.", ("Final Answer: 18", "")),
        ("#### 18 apples\nThe answer is 17.", ("18 apples", "")),
        ("#### $x$\nThe answer is 17.", ("$x$", "")),
        ("#### 18. that is all.\nThe answer is 17.", ("18. that is all.", "")),
        ("The answer is 17.\n#### 18", ("18", "")),
        ("The answer is 17.\n#### Step 2\nno more", ("Step 2", "")),
        ("#### Step 2\n18", ("Step 2", "")),
        ("####\nThe answer is 18.", ("", "malformed")),
        ("The answer is 3.5. I am sure.", ("3.5", "")),
        ("The answer is 42!", ("42", "")),
        ("the final answer is: $x = 5$.", ("$x = 5$", "")),
        ("**Answer:** 72", ("72", "")),
        ("**Answer**: 72", ("72", "")),
        ("Answer: 5\nAnswer: 6", ("6", "")),
        ("The answers: 5", ("", "no_answer")),
        ("It is 5", ("", "no_answer")),
        (r"<think>\boxed{5}</think> so \boxed{6}", ("6", "")),
        (r"\boxed{5}</think> then nothing", ("", "no_answer")),
        (r"<think>a</think> \boxed{5} <think> hm", ("", "no_answer")),
        ("", ("", "no_answer")),
    ],
)
def test_extraction(text: str, found: tuple[str, str]) -> None:
    assert extract(text) == found


VERBS = [
    "is", "is therefore", "is, thus,", "would be", "would therefore be", "should then be", "must be", "equals", "=",
    "comes out to be", "turns out to be", "works out to", ", then, is", "is simply", "is a total of", "is the number",
    "is that she has", "is that there are", "is that Ann makes a total of", "is equal to",
]  # fmt: skip
ASIDES = ["", " to the question", " to how many are left", " for part (b)", " here", " we seek", " in miles"]
NOT_STATED = [
    "is not", "is more than", "is less than", "is at least", "is at most", "is half of", "is twice", "is under",
    "is minus",
    "is a multiple of", "is the square root of", "is the sum of 1 and", "is Step", "is option", "is either 1 or",
    "is between 1 and", "is one of 1 and", "is nowhere near", "would not be", "could be", "might be", "cannot be",
    "would have been", "isn't", "exceeds", "is that it exceeds", "is up to", "is anything but", "is a factor of",
]  # fmt: skip


@pytest.mark.parametrize("aside", ASIDES)
@pytest.mark.parametrize("verb", VERBS)
def test_the_answer_may_be_stated_in_plain_words(verb: str, aside: str) -> None:
    for value, gold in (("42", "42"), ("$1,200", "1200"), ("$-\\frac{1}{2}$", "-\\frac{1}{2}"), ("**42**", "42")):
        for end in (".", " apples.", "", ", since 7 times 6 is that.", " because it is.\nThe next one is 5."):
            text = f"First 5. So the final answer{aside} {verb} {value}{end}".replace(" ,", ",")
            assert verify(text, gold).reward == 1.0, text
            assert verify(text, "5").reward == 0.0, text


@pytest.mark.parametrize("aside", ASIDES)
@pytest.mark.parametrize("verb", NOT_STATED)
def test_a_number_that_is_only_compared_with_is_not_the_answer(verb: str, aside: str) -> None:
    for tail in (".", " apples.", ""):
        text = f"So the answer{aside} {verb} 42{tail}"
        assert verify(text, "42").reward == 0.0, text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 12. Is the answer to this right?", ("12", "")),
        ("The answer is 12. The answer would be clear to a child.", ("12", "")),
        ("The answer would be a surprise. 12", ("", "no_answer")),
        ("The answer to the first is 3. The answer to the second is 4.", ("4", "")),
        ("The answer is 5 since 2+3 = 5.", ("5", "")),
        ("The answer is $3\\! 000$.", ("$3\\! 000$", "")),
        ("The answer to it is\n12", ("", "no_answer")),
        ("*Answer*: 15", ("15", "")),
        ("__Answer__: 15", ("15", "")),
        ("***Final answer:*** 15", ("15", "")),
        ("__Answer__\n\n15", ("15", "")),
        ('{"reason": "3*5", "answer": 15}', ("15", "")),
        ('{"answer": "15", "unit": "m"}', ("15", "")),
        ('{\n  "answer": 15\n}', ("15", "")),
        ('{"answer": "\\\\frac{1}{2}"}', ("\\frac{1}{2}", "")),
        ('{"answer": "5, 7"}', ("5, 7", "")),
        ('{"answer": 5, 7}', ("5, 7}", "")),
        ('{"answer": ""}', ("", "malformed")),
        ('"answer": 15', ("15", "")),
        ("{'answer': 15}", ("15", "")),
        ("The answer is 15 (since 3*5=15).", ("15", "")),
        ("The answer is 15 (or 16).", ("15 (or 16)", "")),
        ("The answer is '15'.", ("'15'", "")),
    ],
)
def test_statements(text: str, found: tuple[str, str]) -> None:
    assert extract(text) == found


@pytest.mark.parametrize("frame", ["\\boxed{{{}}}", "#### {}", "The answer is {}.", "Thus the answer would be ${}$."])
@pytest.mark.parametrize(
    ("chain", "gold", "right"),
    [
        ("5 + 7 = 12", "12", True),
        ("x = 5 + 7 = 12", "12", True),
        ("24/2 = 12", "12", True),
        ("2 \\cdot 6 = 3 \\cdot 4 = 12 apples", "12", True),
        ("\\frac{6}{4} = \\frac{3}{2} = 1.5", "1.5", True),
        ("\\sqrt{8} = 2\\sqrt{2}", "2\\sqrt{2}", True),
        ("0.28 = 28\\%", "28\\%", True),
        ("5 eggs + 7 eggs = 12 eggs", "12", True),
        ("3\\text{ dollars} \\cdot 4 weeks = 12\\text{ dollars}", "12", True),
        ("5 eggs + 8 eggs = 12 eggs", "12", False),
        ("5 hundred + 7 = 12", "12", False),
        ("5x + 7 = 12", "12", False),
        ("144 square root = 12", "12", False),
        ("5 + 8 = 12", "12", False),
        ("5 = 12", "12", False),
        ("12 = 12", "12", False),
        ("5 + 7 = 12 = 12", "12", False),
        ("12 = 5 + 7", "12", False),
        ("5 + 7 = 12 = 13", "12", False),
        ("5 + 7 = 12 = 13", "13", False),
        ("2x = 12", "12", False),
        ("x + y = 12", "12", False),
        ("x = y = 12", "12", False),
        ("5 + 7 \\approx 12", "13", False),
        ("35/3 \\approx 12", "12", False),
        ("5 + 6 < 12", "12", False),
        ("5 + 7 = 12, 13", "12", False),
        ("5 + 7", "12", False),
        ("1/0 = 12", "12", False),
        ("x^2 = x \\cdot x", "x^2", False),
    ],
)
def test_a_finished_calculation_counts_by_its_last_side(chain: str, gold: str, right: bool, frame: str) -> None:
    assert verify(frame.format(chain), gold).reward == right


def test_r1_grades_only_inside_its_tags() -> None:
    closed = "so 5.</think> <answer>\\boxed{5}"
    assert verify(closed, "5", extract_tagged).reward == 1.0
    assert verify(closed + "</answer>", "5", extract_tagged).reward == 1.0
    assert verify("x</think><answer> 5 </answer>", "5", extract_tagged).reward == 1.0
    assert verify("x</think> \\boxed{5}", "5", extract_tagged).status == "no_answer"
    assert verify("<answer>5</answer>", "5", extract_tagged).status == "no_answer", "the thought was never closed"
    assert verify("a</think><answer></answer>", "5", extract_tagged).status == "malformed"


RESPELLINGS: dict[str, Callable[[str], str]] = {
    "dfrac": lambda a: a.replace("\\frac", "\\dfrac"),
    "dollars": lambda a: f"${a}$",
    "braces": lambda a: f"{{{a}}}",
    "brackets": lambda a: f"\\[{a}\\]",
    "full stop": lambda a: f"{a}.",
    "lines": lambda a: f"\n{a}\n",
    "style": lambda a: f"\\displaystyle {a}",
    "parentheses": lambda a: a if "," in a else f"({a})",
    "braced powers": lambda a: re.sub(r"\^([0-9])(?![0-9])", r"^{\1}", a),
    "bare subscripts": lambda a: re.sub(r"_\{([0-9a-z])\}", r"_\1", a),
}


@pytest.mark.parametrize("spelling", RESPELLINGS)
def test_published_golds_in_another_spelling(spelling: str, shared_dir: Path) -> None:
    sets = [
        load_problems(name, "test", data_dir=str(shared_dir / "data")) for name in ("math500", "olympiad", "minerva")
    ]
    golds = sorted({problems[n].answer for problems in sets for n in range(problems.size or 0)})
    respell = RESPELLINGS[spelling]
    assert not [gold for gold in golds if verify(f"\\boxed{{{respell(gold)}}}", gold).reward != 1.0]


@pytest.mark.parametrize(
    "text",
    [
        "Answer: {} ✅",
        "Answer: ✅ {}",
        "The answer is '{}'.",
        "The answer is {} dollars every day at the farmers' market.",
        "The answer is {} dollars every day at Janet's market.",
    ],
)
def test_what_stands_about_a_stated_number(text: str) -> None:
    assert verify(text.format(18), "18").reward == 1.0
    assert verify(text.format(17), "18").reward == 0.0
    assert verify(text.format("18 or 20"), "18").reward == 0.0
    assert verify(text.format(18).replace("✅", "❌"), "18").reward == float("✅" not in text)


def test_integrals_and_sums_are_settled_by_math_verify() -> None:
    assert verify(r"\boxed{\frac{n(n+1)}{2}}", r"\sum_{k=1}^{n} k").reward == 1.0
    assert verify(r"\boxed{\frac{n(n-1)}{2}}", r"\sum_{k=1}^{n} k").reward == 0.0
    assert verify(r"\boxed{\sum_{k=1}^{n} k}", r"\sum_{k=1}^{n} k").reward == 1.0


ENDS = ["</s>", "<|endoftext|>", "<|im_end|>\n", "<eos>", " <|eot_id|>", "<｜end▁of▁sentence｜>", "</s><pad><pad>"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "frame", ["#### {}", "The answer is {}", "The answer is {}.", "Answer: {}", "so \\boxed{{{}}}"]
)
def test_tokens_that_ended_a_completion_are_none_of_its_answer(frame: str, end: str) -> None:
    assert verify(frame.format(5) + end, "5").reward == 1.0
    assert verify(frame.format(6) + end, "5").reward == 0.0
    assert extract(frame.format("x") + 20_000 * end) == ("x", "")
    tagged = f"a thought</think> <answer>{frame.format(5)}</answer>"
    assert verify(tagged + end, "5", extract_tagged).reward == 1.0


@pytest.mark.parametrize(
    "line", ["5", "**5**", "$5$", "\\(5\\)", "\\[5\\]", "\\[\n5\n\\]", "$$\n5\n$$", "3 + 2 = 5", "5 apples."]
)
@pytest.mark.parametrize(
    "announcement",
    [
        "The answer is:",
        "So the final answer is:",
        "**Final Answer**",
        "**Answer:**",
        "## Answer",
        "Answer:",
    ],
)
@pytest.mark.parametrize("blank", ["\n", "\n\n"])
def test_the_last_line_may_hold_what_the_one_before_announces(announcement: str, blank: str, line: str) -> None:
    text = f"2 and 3 are 5. 7 is not.\n{announcement}{blank}{line}"
    assert verify(text, "5").reward == 1.0
    assert verify(text, "7").reward == 0.0
    assert verify(f"{text}\n\n6", "5").reward == 0.0  # another line follows, so none is the last word
    assert verify(f"{text}\n\n6", "6").reward == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So 12 is the answer.", ("12", "")),
        ("First 7.\n$12 is our final answer", ("$12", "")),
        ("Thus, 12 apples is the answer to the question.", ("12 apples", "")),
        ("The answer is 5. No: 12 is the answer.", ("12", "")),
        ("12 is the answer. No, the answer is 5.", ("5", "")),
        ("I doubt that 12 is the answer.", ("", "no_answer")),
        ("not 12 is the answer.", ("", "no_answer")),
        ("12 is the answer to the first part.", ("", "no_answer")),
        ("5 + 12 is the answer.", ("", "no_answer")),
        ("It is (which is the answer in Ash), + half of 4 = 4", ("", "no_answer")),
        ("the answer for 2 + 3 = 5", ("", "no_answer")),
    ],
)
def test_statements_the_other_way_round_and_asides_that_calculate(text: str, found: tuple[str, str]) -> None:
    assert extract(text) == found
