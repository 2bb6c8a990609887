"""From a row of any data set to a ``Problem``: which columns hold the question and the gold answer, in what form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from envs.problem import Problem
from envs.verifier.extract import is_solution
from envs.verifier.gold import read_gold
from registry import UsageError

QUESTIONS = ("question", "problem", "query", "prompt", "input", "instruction")
ANSWERS = ("answer", "final_answer", "expected_answer", "gold", "target", "result", "label", "output", "solution")
IDS = ("id", "unique_id", "uuid", "problem_id")
SOLUTIONS = ("solution", "rationale", "generated_solution")
_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Columns:
    """Names of the question's and the answer's column; None to find them."""

    question: str | None = None
    answer: str | None = None


def to_problem(row: dict[str, Any], source: str, index: int, columns: Columns) -> Problem:
    """The problem in a row. Raises ``UsageError`` naming the columns that there are if one needed is missing."""
    where = f"row {index} of {source}"
    if not isinstance(row, dict):
        raise UsageError(f"{where} is {type(row).__name__}, not an object with a question and an answer")
    by_lower = {str(key).lower(): key for key in row}
    answer_key = _find("answer", columns.answer, ANSWERS, by_lower, where)
    question = _question(row, by_lower, columns, where)
    raw = row[answer_key]
    is_worked = str(answer_key).lower() in SOLUTIONS
    answer, *alternatives = read_gold(raw, where, solution=is_worked)
    solution_key = next((by_lower[name] for name in SOLUTIONS if name in by_lower and row[by_lower[name]]), None)
    solution = _solution_text(row[solution_key]) if solution_key else ""
    if isinstance(raw, str) and (is_worked or is_solution(raw)):
        solution = _CALCULATION.sub("", raw.strip())
    if not question:
        raise UsageError(f"{where} has an empty question; correct or leave out that row")
    if not solution and "equation" in by_lower:
        solution = _worked_solution(str(row[by_lower["equation"]]), answer)
    id_key = next((by_lower[name] for name in IDS if name in by_lower and row[by_lower[name]] is not None), None)
    id = str(row[id_key]) if id_key else str(index)
    return Problem(question, answer, source, id, solution, alternatives=tuple(alternatives))


def _solution_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _worked_solution(equation: str, answer: str) -> str:
    """A worked solution from SVAMP's equation: ``( 76.0 - 25.0 )`` and 51 give ``76 - 25 = 51. #### 51``."""
    bare = re.sub(r"(\d)\.0\b", r"\1", equation.strip())
    if bare.startswith("( ") and bare.endswith(" )") and bare.count("(") == 1:
        bare = bare[2:-2]
    return f"{bare} = {answer}. #### {answer}"


def _find(role: str, named: str | None, candidates: tuple[str, ...], by_lower: dict[str, str], where: str) -> str:
    if named is not None:
        if named in by_lower.values():
            return named
        raise UsageError(f"{where} has no column {named!r}; its columns are {_column_names(by_lower)}")
    for candidate in candidates:
        if candidate in by_lower:
            return by_lower[candidate]
    raise UsageError(
        f"{where} has no {role} column; its columns are {_column_names(by_lower)}: name one with {role}=..."
    )


def _column_names(by_lower: dict[str, str]) -> str:
    return ", ".join(repr(key) for key in by_lower.values()) or "none"


def _question(row: dict[str, Any], by_lower: dict[str, str], columns: Columns, where: str) -> str:
    key = _find("question", columns.question, QUESTIONS, by_lower, where)
    question = str(row[key]).strip() if row[key] is not None else ""
    body = str(row[by_lower["body"]]).strip() if columns.question is None and "body" in by_lower else ""
    if not body:
        return question
    # SVAMP and ASDiv keep the story apart; a story without a full stop is a clause that the question completes.
    return f"{body} {question}" if body[-1] in ".?!," else f"{body}, {question}"
