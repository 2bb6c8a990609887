"""Grade a file of completions.

    python -m envs.grade completions.jsonl > verdicts.jsonl
    python -m envs.grade labelled.jsonl --table

A row has ``id``, ``gold`` and ``completion``; ``gen: [prefix, unit, n, suffix]`` may stand for a long completion, and
other fields are ignored. ``gold`` is what the answer column of a data set may be: text, a number, a worked solution, or
a list of accepted answers; ``completion`` is text or a list of chat messages. For each row one JSON row is written:
``id``, ``reward`` (0 or 1), ``status``, ``extracted`` and ``seconds``. ``--table`` writes instead, for rows with
``kind`` and ``expected``, a Markdown table of the agreement per kind, next to math-verify with its own defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import envs.templates  # noqa: F401 (registers the templates)
from envs.problems.readers import numbered_lines, parse_json, unreadable
from envs.verifier import Verifier, check_gold
from envs.verifier.extract import completion_text
from envs.verifier.gold import read_gold
from registry import UsageError, templates
from registry.command import command
from registry.paths import ReadFile

Row = dict[str, Any]


def rows_of(path: Path) -> Iterator[Row]:
    """Rows with ``id``, ``gold`` and ``completion``; raises ``UsageError`` naming the line that is none."""
    if not path.is_file():
        raise UsageError(f"no file {str(path)!r}; give JSON lines with id, gold and completion")
    with unreadable(f"{path} cannot be read as JSON lines"):
        for number, line in numbered_lines(path):
            yield _row(line, f"{path}, line {number}", number)


def _row(line: str, where: str, number: int) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or "gold" not in row:
        raise UsageError(f"{where} needs an object with 'gold' and 'completion'")
    if "completion" not in row:
        try:
            prefix, unit, count, suffix = row["gen"]
            row["completion"] = prefix + unit * count + suffix
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{where} has no 'completion', nor a 'gen' of [prefix, unit, n, suffix]") from None
    try:
        completion = completion_text(row["completion"])
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    check_gold(row["gold"], where)
    return {**row, "id": row.get("id", number), "completion": completion}


def grade(row: Row, verifier: Verifier) -> Row:
    """The verdict on one row."""
    start = time.perf_counter()
    verdict = verifier.verify(row["completion"], row["gold"])
    return {
        "id": row["id"],
        "reward": int(verdict.reward),
        "status": verdict.status,
        "extracted": verdict.extracted,
        "seconds": round(time.perf_counter() - start, 6),
    }


def math_verify_defaults(gold: Any, completion: str) -> int:
    """math-verify as its documentation shows it: the gold answer in a box, the completion as it is. Main thread only
    (it times out by SIGALRM)."""
    from math_verify import parse, verify

    return int(any(verify(parse(f"\\boxed{{{one}}}"), parse(completion)) for one in read_gold(gold, "the row")))


def table(rows: list[Row], verifier: Verifier) -> str:
    """Agreement with the labels per kind, as Markdown."""
    if not rows:
        raise UsageError("--table needs rows, and the file has none")
    missing = [row["id"] for row in rows if "kind" not in row or "expected" not in row]
    if missing:
        raise UsageError(f"--table needs 'kind' and 'expected' in every row; row {missing[0]!r} lacks one")
    graders: tuple[tuple[str, Callable[[Row], int]], ...] = (
        ("this verifier", lambda row: grade(row, verifier)["reward"]),
        ("math-verify defaults", lambda row: math_verify_defaults(row["gold"], row["completion"])),
    )
    given = {name: [judge(row) for row in rows] for name, judge in graders}
    lines = [f"| kind | cases | {' | '.join(given)} |", "|---|---|" + "---|" * len(given)]
    for kind in [*sorted({row["kind"] for row in rows}), None]:
        chosen = [n for n, row in enumerate(rows) if kind in (None, row["kind"])]
        cells = [_share(rows, chosen, rewards) for rewards in given.values()]
        lines.append(f"| {kind or '**all**'} | {len(chosen)} | {' | '.join(cells)} |")
    negatives = [n for n, row in enumerate(rows) if not row["expected"]]
    passed = [str(sum(rewards[n] for n in negatives)) for rewards in given.values()]
    lines.append(f"| negatives that pass | {len(negatives)} | {' | '.join(passed)} |")
    return "\n".join(lines)


def _share(rows: list[Row], chosen: list[int], rewards: list[int]) -> str:
    return f"{sum(rewards[n] == rows[n]['expected'] for n in chosen) / len(chosen):.3f}"


@command(errors=(OSError,))
def main(argv: list[str] | None = None) -> int:
    """Grade the completions of a JSON lines file."""
    parser = argparse.ArgumentParser(prog="python -m envs.grade", description=main.__doc__)
    parser.add_argument("file", action=ReadFile, help="JSON lines with id, gold and completion")
    parser.add_argument(
        "--template",
        default="plain",
        help="where the answer stands: a registered name (default %(default)s)",
    )
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds a symbolic comparison may take")
    parser.add_argument("--table", action="store_true", help="write the agreement per kind instead")
    args = parser.parse_args(argv)
    verifier = Verifier(templates.make(args.template).extract, deadline=args.deadline)
    if args.table:
        print(table(list(rows_of(args.file)), verifier))
        return 0
    for row in rows_of(args.file):
        print(json.dumps(grade(row, verifier), default=float), flush=True)  # an id may be a number with all its digits
    return 0


if __name__ == "__main__":
    sys.exit(main())
