"""Generated problems: right by re-calculation, disjoint by content, deterministic; the tokenizer is lossless."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from operator import add, floordiv, mul, sub

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from envs.problems.arithmetic import DEFAULT_LEVELS, DISTRACTED_LEVEL, LEVELS, SPLITS, Arithmetic, main, split_of
from envs.train_tokenizer import TOKENIZER, VOCAB_SIZE, train
from registry import UsageError

OPERATORS = {"+": add, "-": sub, "*": mul, "/": floordiv}
GOLDEN = ("A garden has 8 rows of 7 plants. 7 of the plants die. 6 of the plants die. How many plants are left?", "43")
STEP = re.compile(r" (\d+) ([-+*/]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TOKENIZER)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_solution_recalculates_to_the_answer(split: str, level: int) -> None:
    problems = Arithmetic(split, level, seed=5)
    for index in range(500):
        problem = problems[index]
        steps = STEP.findall(problem.solution)
        assert "".join(" {} {} {} = {}.".format(*s) for s in steps) + f" #### {problem.answer}" == problem.solution
        assert len(steps) == LEVELS[level].steps
        for left, op, right, result in steps:
            assert OPERATORS[op](int(left), int(right)) == int(result)
            assert op != "/" or int(left) % int(right) == 0
            assert 0 < int(result) <= LEVELS[level].value
        assert problem.answer == steps[-1][3]


@pytest.mark.parametrize("level", LEVELS)
def test_every_operand_is_told_or_was_calculated(level: int) -> None:
    problems = Arithmetic("train", level, seed=1)
    for index in range(500):
        problem = problems[index]
        steps = [tuple(map(int, (s[0], s[2], s[3]))) for s in STEP.findall(problem.solution)]
        known = set(numbers(problem.question))
        unused = set(known)
        for left, right, result in steps:
            assert {left, right} <= known
            unused -= {left, right}
            known.add(result)
        assert len(unused) <= (level == DISTRACTED_LEVEL), problem


@pytest.mark.parametrize("split", SPLITS)
def test_the_numbers_in_the_text_decide_the_split(split: str) -> None:
    plain_levels = tuple(level for level in LEVELS if level != DISTRACTED_LEVEL)
    for seed in range(3):
        problems = Arithmetic(split, plain_levels, seed)
        for index in range(300):
            assert split_of(numbers(problems[index].question)) == split


def test_splits_share_no_question_and_no_calculation() -> None:
    seen = {
        split: [p for seed in range(2) for p in map(Arithmetic(split, 1, seed).__getitem__, range(2000))]
        for split in SPLITS
    }
    for content in ("question", "solution"):
        train_side, test_side = ({getattr(p, content) for p in seen[split]} for split in SPLITS)
        assert len(train_side) > 300 and len(test_side) > 50
        assert not train_side & test_side


@given(st.lists(st.integers(0, 300), min_size=2, max_size=5), st.randoms())
def test_split_does_not_depend_on_the_order(operands: list[int], random) -> None:
    shuffled = list(operands)
    random.shuffle(shuffled)
    assert split_of(tuple(operands)) == split_of(tuple(shuffled))


def test_problems_are_a_function_of_seed_split_and_index() -> None:
    problems = Arithmetic("train", seed=3)
    backward = [problems[i] for i in reversed(range(50))][::-1]
    assert backward == [Arithmetic("train", seed=3)[i] for i in range(50)]
    assert problems.size is None and problems.name == "arithmetic/train"
    assert len({p.id for p in backward}) == 50
    others = [[Arithmetic(s, seed=n)[i].question for i in range(50)] for s, n in (("train", 4), ("test", 3))]
    assert all(sum(a.question == b for a, b in zip(backward, other, strict=True)) < 3 for other in others)


def test_golden_problem() -> None:
    """Published figures name problems by index: a change of this text is a new version of the problems."""
    problem = Arithmetic("test")[0]
    assert (problem.question, problem.answer) == GOLDEN


def test_levels_are_mixed_evenly_and_vary_in_form() -> None:
    problems = [Arithmetic("train")[i] for i in range(1500)]
    levels = [int(p.id.split("-")[1]) for p in problems]
    assert set(levels) == set(DEFAULT_LEVELS)
    assert all(abs(levels.count(level) / 1500 - 1 / len(DEFAULT_LEVELS)) < 0.05 for level in DEFAULT_LEVELS)
    shapes = {re.sub(r"\d+", "0", p.question) for p in problems}
    assert len(shapes) > 1000


@pytest.mark.parametrize("level", [0, 5, (), (1, 9)])
def test_unknown_level_is_a_usage_error(level) -> None:
    with pytest.raises(UsageError, match="level"):
        Arithmetic(level=level)


def test_unknown_split_and_negative_index_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"'dev'.*test, train|did you mean"):
        Arithmetic("dev")
    with pytest.raises(UsageError, match="-1"):
        Arithmetic()[-1]


def test_command_writes_jsonl(tmp_path, capsys) -> None:
    assert main(["--split", "test", "--level", "2", "--seed", "1", "--count", "3", "--out", str(tmp_path / "a")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert [row["question"] for row in rows] == [Arithmetic("test", 2, 1)[i].question for i in range(3)]
    assert main(["--split", "tset"]) == 2
    assert "did you mean 'test'" in capsys.readouterr().err


def test_tokenizer_has_no_bos_and_single_digits(tokenizer) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.bos_token_id is None
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {0, 1}
    for token in tokenizer.get_vocab():
        assert sum(c.isdigit() for c in token) <= 1


@settings(max_examples=300)
@given(text=st.text())
def test_tokenizer_is_lossless(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", ["a , b . don 't", " \t\r\n  x", "\x00", "naïve 数学 𝔘 ½ ٣", "é", "<|endoftext|> #### 4"]
)
def test_tokenizer_is_lossless_on_traps(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompts_and_completions_are_short(tokenizer) -> None:
    problems = [Arithmetic("test")[i] for i in range(1000)]
    prompts = tokenizer([f"Question: {p.question}\nAnswer:" for p in problems])["input_ids"]
    completions = tokenizer([p.solution for p in problems])["input_ids"]
    assert max(map(len, prompts)) <= 60
    assert max(map(len, completions)) + 1 <= 32
    joint = tokenizer([f"Question: {p.question}\nAnswer:{p.solution}" for p in problems])["input_ids"]
    assert joint == [a + b for a, b in zip(prompts, completions, strict=True)]


def test_tokenizer_is_what_its_command_makes(tokenizer) -> None:
    assert json.loads(train().backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())


def test_import_stays_free_of_torch() -> None:
    code = "import sys, envs.problems.arithmetic, envs.train_tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
