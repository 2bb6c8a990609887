"""Any file, folder or table: either its problems are the rows that it holds and their gold answers score 1 through the
task, or the error is a ``UsageError`` of one line. Nothing else is raised, and nothing is changed in silence.
``FUZZ=20`` draws twenty times as many."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from envs.problems import load_problems
from envs.problems.columns import QUESTIONS
from envs.task import Task, TaskSpec
from registry import UsageError

TIMES = int(os.environ.get("FUZZ", "1"))
pytestmark = pytest.mark.timeout(600 * TIMES)
BUDGET = settings(
    max_examples=120 * TIMES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12)
odd = st.sampled_from(
    ["", " ", "null", "None", "nan", "[1, 2]", "\x0crac{1}{2}", "['3']", '["4", "5"]',
     "[{'role': 'user', 'content': 'Q?'}]", "=1+1",
     "\ufeff7", "7\x00", "a\tb", "line\nbreak", "\r\n", '"', "\\boxed{7}", "#### 7", "$5$", "\\frac{1}{2}",
     "1,200", "007", "-0", "1e5", "50%", "é", "½", "\ud800", "x" * 300]
)  # fmt: skip
numbers = st.one_of(
    st.integers(-(10**20), 10**20), st.floats(width=32), st.floats(), st.integers(-99, 99).map(str),
    st.fractions(max_denominator=50).map(lambda value: f"\\frac{{{value.numerator}}}{{{value.denominator}}}"),
)  # fmt: skip
cells = st.recursive(
    st.one_of(words, odd, numbers, st.none(), st.booleans()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "ground_truth", "value"]), inner, max_size=3),
        inner.map(lambda value: [{"role": "user", "content": value}]),
    ),
    max_leaves=4,
)
names = st.sampled_from(["question", "Question", "answer", "Answer ", "prompt", "solution", "id", "body", "equation",
                         "reward_model", "problem", "", "a.b", "frage"])  # fmt: skip
right = st.one_of(
    st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6, width=32), st.decimals(-99, 99, places=3).map(str),
    st.sampled_from(["east", "no solution", "x^2+1", "\\frac{3}{8}", "1,200", "$5$", "12.50", "50%", "007"]),
)  # fmt: skip
good_rows = st.lists(st.fixed_dictionaries({"question": words, "answer": right}), min_size=1, max_size=4)
plain_rows = st.lists(
    st.fixed_dictionaries({"question": words, "answer": st.one_of(right, numbers, words)}), min_size=1, max_size=4
)
odd_rows = st.lists(st.dictionaries(names, cells, max_size=4), max_size=4)
mixed_rows = st.lists(st.fixed_dictionaries({"question": cells, "answer": cells, "id": cells}), min_size=1, max_size=3)
tables = st.one_of(good_rows, good_rows, plain_rows, mixed_rows, odd_rows)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-32"])
suffixes = st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".JSONL", ".jsonl.gz", ".csv.gz", ".json.gz", ".txt",
                            "", ".tar.gz", ".xlsx"])  # fmt: skip


def encoded(rows: list[dict[str, Any]], suffix: str, encoding: str) -> bytes:
    """The file's bytes, as other software would write it; what an encoding lacks becomes a question mark."""
    kind = suffix.lower().removesuffix(".gz")
    if kind == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if kind == ".csv":
        text = io.StringIO(newline="")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.writer(text)
        writer.writerows([columns, *([row.get(name) for name in columns] for row in rows)])
        content = text.getvalue()
    elif kind == ".json":
        content = json.dumps(rows)
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = content.encode(encoding, errors="replace")
    return gzip.compress(data, mtime=0) if suffix.endswith(".gz") else data


def attempt(source: Any, **options: Any) -> list[Any] | None:
    """The problems, or None where they are refused in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return list(load_problems(source, **options))  # type: ignore[call-overload]
        except UsageError as error:
            assert str(error) and "\n" not in str(error), repr(str(error))
            return None


def score(path: Path) -> None:
    """Every gold answer of a file that loads scores 1 through the task, boxed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = Task(TaskSpec(problems=str(path), max_prompt_tokens=4096, max_new_tokens=4096))
    for index in range(task.problems.size or 0):
        problem = task.problem(index)
        for gold in (problem.answer, *problem.alternatives):
            completion = np.asarray(task.tokenizer(f"\\boxed{{{gold}}}")["input_ids"])
            verdict = task.verdict(completion, index).result()
            assert verdict.reward == 1.0, (gold, verdict)


def same(gold: str, value: Any) -> bool:
    """Whether a gold answer is the plain value of a cell, as the file has it."""
    if isinstance(value, str):
        return gold == value.strip()
    return Decimal(gold) == Decimal(str(value))


@BUDGET
@given(tables, suffixes, encodings)
def test_any_rows_in_any_file(rows: list[dict[str, Any]], suffix: str, encoding: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        try:
            path.write_bytes(encoded(rows, suffix, encoding))
        except (pa.ArrowException, UnicodeEncodeError, csv.Error, OverflowError):
            return  # the writing software refuses them
        problems = attempt(str(path))
        if problems is None:
            return
        assert len(problems) == len(rows)
        if encoding.startswith("utf") and all(set(row) == {"question", "answer"} for row in rows):
            for problem, row in zip(problems, rows, strict=True):
                if isinstance(row["question"], str) and row["question"].strip()[:2] != "[{":
                    assert problem.question == row["question"].strip()
                marked = isinstance(row["answer"], str) and any(
                    mark in row["answer"] for mark in ("#", "box", "$", "[")
                )
                if isinstance(row["answer"], str | int | float) and not isinstance(row["answer"], bool) and not marked:
                    assert same(problem.answer, row["answer"])
        score(path)


@BUDGET
@given(
    st.binary(max_size=120), suffixes, st.sampled_from([b"", b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1", b"[", b"{", b'"'])
)
def test_any_bytes(content: bytes, suffix: str, start: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(start + content)
        attempt(str(path))
        attempt(folder)


@BUDGET
@given(plain_rows, st.sampled_from([".jsonl", ".csv", ".parquet", ".jsonl.gz"]), st.data())
def test_a_file_cut_off_or_changed_in_a_byte(rows: list[dict[str, Any]], suffix: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        try:
            whole = encoded(rows, suffix, "utf-8")
        except (pa.ArrowException, UnicodeEncodeError, csv.Error, OverflowError):
            return
        place = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:place])
        attempt(str(path))
        path.write_bytes(whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :])
        attempt(str(path))


@BUDGET
@given(tables, st.one_of(st.none(), st.sampled_from([*QUESTIONS, "reward_model.ground_truth", "a.b", "", "."])), cells)
def test_any_table_in_memory(rows: list[dict[str, Any]], column: str | None, omit: Any) -> None:
    attempt(rows, answer=column)
    attempt(rows, question=column, limit=2)
    attempt(rows, omit=omit)
    try:
        dataset = Dataset.from_list(rows)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError, AttributeError):
        return
    attempt(dataset)
