"""From a row of any data set to a ``Problem``: which columns hold the question and the gold answer, in what form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from envs.problem import Problem
from registry import UsageError

QUESTIONS = ("question", "problem", "query", "prompt", "instruction", "input")
ANSWERS = (
    "final_answer",  # beside an "answer" that explains it
    "expected_answer",
    "answer",
    "gold",
    "ground_truth",
    "target",
    "result",
    "label",
    "output",
    "solution",
    "reward_model.ground_truth",  # verl's layout
)
IDS = ("id", "unique_id", "uuid", "problem_id")
SOLUTIONS = ("solution", "rationale", "generated_solution")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_ABSENT = object()


@dataclass(frozen=True)
class Columns:
    """The columns of a table that make a problem, the same for all rows: one of question and answer, and those of the
    others that there are. A dot leads into an object: ``reward_model.ground_truth``."""

    question: str
    answer: str
    body: str | None = None
    context: str | None = None
    equation: str | None = None
    solutions: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


def find_columns(rows: Iterable[Any], source: str, question: str | None = None, answer: str | None = None) -> Columns:
    """The columns of ``rows``, those named or else the usual ones. Raises ``UsageError`` naming the columns that there
    are if one needed is missing or there twice."""
    names = _column_names(rows)
    found = _find("question", question, QUESTIONS, names, source)
    is_alpaca = question is None and found.strip().lower() == "instruction"
    return Columns(
        question=found,
        context=next(iter(_like(names, "input")), None) if is_alpaca else None,
        answer=_find("answer", answer, ANSWERS, names, source),
        body=next(iter(_like(names, "body")), None) if question is None else None,
        equation=next(iter(_like(names, "equation")), None),
        solutions=tuple(name for candidate in SOLUTIONS for name in _like(names, candidate)),
        ids=tuple(name for candidate in IDS for name in _like(names, candidate)),
    )


def to_problem(row: Mapping[str, Any], source: str, index: int, columns: Columns) -> Problem:
    """The problem in a row. Raises ``UsageError`` naming the row where there is none."""
    from envs.verifier.extract import is_solution  # with the first row, rather than by import envs
    from envs.verifier.gold import read_gold

    where = f"row {index} of {source}"
    if not isinstance(row, Mapping):
        raise UsageError(f"{where} is {type(row).__name__}, not an object with a question and an answer")
    question = _question(row, columns, where)
    raw = _value(row, columns.answer, where)
    is_worked = columns.answer.rpartition(".")[2].strip().lower() in SOLUTIONS
    answer, *alternatives = read_gold(raw, where, solution=is_worked)
    solution = next((_solution_text(row[name]) for name in columns.solutions if _is_there(row.get(name))), "")
    if isinstance(raw, str) and (is_worked or is_solution(raw)):
        solution = _CALCULATION.sub("", raw.strip())
    if not question:
        raise UsageError(f"{where} has an empty question; correct or leave out that row")
    for role, text in (("question", question), ("solution", solution)):
        _check_unicode(role, text, where)
    if not solution and columns.equation is not None and _is_there(row.get(columns.equation)):
        solution = _worked_solution(str(row[columns.equation]), answer)
    id = next((_id_text(row[name]) for name in columns.ids if _is_there(row.get(name))), str(index))
    return Problem(question, answer, source, id, solution, alternatives=tuple(alternatives))


def _is_there(value: Any) -> bool:
    """Whether a row has a value in a column: not None, nor a blank, nor what is no number (pandas' missing values)."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return False
    return not isinstance(value, Real | Decimal) or value == value


def _id_text(value: Any) -> str:
    """An id as text; whole where pandas made a float of an integer, for another row has none."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_unicode(role: str, text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} has half a character in its {role} ({text[error.start]!r}); correct or leave out that row"
        ) from None


def _solution_text(value: Any) -> str:
    """A worked solution as text; an object is none."""
    if isinstance(value, list):
        return "\n".join(map(_solution_text, value))
    return "" if isinstance(value, Mapping | bytes) else str(value)


def _worked_solution(equation: str, answer: str) -> str:
    """A worked solution from SVAMP's equation: ``( 76.0 - 25.0 )`` and 51 give ``76 - 25 = 51. #### 51``."""
    bare = re.sub(r"(\d)\.0\b", r"\1", equation.strip())
    if bare.startswith("( ") and bare.endswith(" )") and bare.count("(") == 1:
        bare = bare[2:-2]
    return f"{bare} = {answer}. #### {answer}"


def _column_names(rows: Iterable[Any]) -> list[str]:
    """Every column of any row, in order, with those inside of objects."""
    names: dict[str, None] = {}

    def add(row: Mapping[Any, Any], prefix: str) -> None:
        for key, value in row.items():
            if isinstance(key, str):
                names[prefix + key] = None
                if isinstance(value, Mapping):
                    add(value, f"{prefix}{key}.")

    for row in rows:
        if isinstance(row, Mapping):
            add(row, "")
    return list(names)


def _like(names: list[str], candidate: str) -> list[str]:
    """The columns of this name, whatever the case."""
    return [name for name in names if name.strip().lower() == candidate]


def _find(role: str, named: str | None, candidates: tuple[str, ...], names: list[str], source: str) -> str:
    listed = ", ".join(map(repr, names)) or "none"
    if named is not None:
        if named in names:
            return named
        raise UsageError(f"{source} has no column {named!r}; its columns are {listed}")
    for candidate in candidates:
        like = _like(names, candidate)
        if len(like) > 1:
            raise UsageError(f"{source} has the columns {' and '.join(map(repr, like))}: name one with {role}=...")
        if like:
            return like[0]
    raise UsageError(f"{source} has no {role} column; its columns are {listed}: name one with {role}=...")


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a column, which may lie inside of objects."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        value = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    if value is _ABSENT:
        raise UsageError(f"{where} has no column {column!r}; correct or leave out that row")
    return value


def _question(row: Mapping[str, Any], columns: Columns, where: str) -> str:
    question = _question_text(_value(row, columns.question, where), columns.question, where)
    body = "" if columns.body is None else _question_text(row.get(columns.body), columns.body, where)
    context = "" if columns.context is None else _question_text(row.get(columns.context), columns.context, where)
    if context:  # Alpaca's
        question = f"{question}\n{context}"
    if not body:
        return question
    # SVAMP and ASDiv keep the story apart; a story without a full stop is a clause that the question completes.
    return f"{body} {question}" if body[-1] in ".?!," else f"{body}, {question}"


def _question_text(value: Any, column: str, where: str) -> str:
    """A question as text. Of chat messages (TRL's and verl's layout) it is what the user says last: the system prompt
    is the template's."""
    from envs.verifier.gold import unpacked

    if value is None:
        return ""
    messages = _written_messages(value, where) if isinstance(value, str) else unpacked(value)
    if isinstance(messages, str):
        return messages.strip()
    if not _is_messages(messages):
        raise UsageError(
            f"{where} has {_kind(value)} in the column {column!r}, not a question as text or as chat messages; "
            "name the question's column with question=..."
        )
    said = [message["content"] for message in messages if message["role"] == "user"]
    if not said:
        raise UsageError(f"{where} has chat messages in the column {column!r}, and none of the user's")
    content = said[-1]
    if isinstance(content, list | tuple) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "\n".join(str(part.get("text", "")) for part in content)
    if content is not None and not isinstance(content, str):
        raise UsageError(f"{where}: the user's last message is {_kind(content)}, not text")
    return (content or "").strip()


def _written_messages(text: str, where: str) -> Any:
    """Chat messages that a table without lists (CSV) has as text, or the text itself. Raises ``UsageError`` for what
    looks like messages and cannot be read."""
    from envs.verifier.gold import printed_list

    if not text.lstrip().startswith("[{"):
        return text
    for parse in (json.loads, printed_list):
        with suppress(ValueError, RecursionError):
            value = parse(text.strip())
            if _is_messages(value):
                return value
    if re.search(r"['\"]role['\"]\s*:", text):
        raise UsageError(f"{where} has chat messages that cannot be read ({text[:60]!r}...): write them as JSON")
    return text


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(one, Mapping) and "role" in one and "content" in one for one in value)
    )


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object of {', '.join(map(repr, value)) or 'nothing'}"
    return f"a value of type {type(value).__name__} ({str(value)[:40]!r})"
