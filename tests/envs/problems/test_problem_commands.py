"""The two commands: ``python -m envs.inspect`` and ``python -m envs.grade``."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from envs import inspect as inspect_command
from envs.grade import main as grade
from envs.problems.arithmetic import main as write_problems

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(10)]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_inspect_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, [*ROWS, ROWS[0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_command.main([path, "--rows", "1", "limit=11"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "11 problems",
        "integer 11",
        "prompt tokens",
        "Question: What is 0 + 0?\nAnswer:",
        "repeated questions: 1",
    ):
        assert part in shown
    assert inspect_command.main([path, "limit"]) == 2
    assert "write name=value" in capsys.readouterr().err


def test_grade_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": "a", "gold": "5", "completion": "\\boxed{5}", "kind": "int", "expected": 1},
        {"id": "b", "gold": 5, "gen": ["\\boxed{", "9", 5000, "}"], "kind": "int", "expected": 0},
        {"id": "c", "gold": "5", "completion": "five", "kind": "none", "expected": 0},
    ]
    path = write(tmp_path, rows)
    assert grade([str(path)]) == 0
    graded = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(g["id"], g["reward"], g["status"]) for g in graded] == [
        ("a", 1, "right"),
        ("b", 0, "unsupported"),
        ("c", 0, "no_answer"),
    ]
    assert all(set(g) == {"id", "reward", "status", "extracted", "seconds"} for g in graded)
    assert grade([str(path), "--table"]) == 0
    assert "| int | 2 | 1.000 |" in capsys.readouterr().out
    for text, message in (("nope\n", "line 1 is not JSON"), ('{"gold": "5"}\n', "no 'completion'")):
        path.write_text(text, encoding="utf-8")
        assert grade([str(path)]) == 2
        assert message in capsys.readouterr().err
    assert grade([str(tmp_path / "missing.jsonl")]) == 2


def test_commands_exit_without_a_traceback() -> None:
    for module, argument in (("envs.inspect", "gms8k"), ("envs.grade", "missing.jsonl")):
        done = subprocess.run([sys.executable, "-m", module, argument], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (
            inspect_command.main,
            ["arithmetic", "split=test"],
            "split=test is no option of the problems: write --split test",
        ),
        (
            inspect_command.main,
            ["arithmetic", "level=2.0"],
            "arithmetic level 2.0 is unknown: give one or several of 1, 2",
        ),
        (inspect_command.main, ["arithmetic", "level=null"], "arithmetic level None is unknown"),
        (inspect_command.main, ["arithmetic", "--rows", "-1"], "--rows=-1 must be an integer of at least 0"),
        (write_problems, ["--count", "-1"], "--count=-1 must be an integer of at least 1"),
    ],
)
def test_bad_input_of_commands_is_one_line(
    main: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {said}") and shown.err.count("\n") == 1 and not shown.out


def test_inspect_needs_problems_and_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inspect_command.main(["--rows", "2"])
    assert capsys.readouterr().err.rstrip().endswith("the following arguments are required: problems")


def test_inspect_compares_a_set_with_another_split_and_never_with_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path, ROWS))
    assert inspect_command.main([path]) == 0
    assert "questions also in" not in capsys.readouterr().out
    assert inspect_command.main([path, "--against", "test"]) == 2
    assert "has no splits; give another set" in capsys.readouterr().err
    assert inspect_command.main(["arithmetic", "--against", "tset"]) == 2
    assert "--against 'tset': arithmetic has no end" in capsys.readouterr().err
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, ROWS).rename(folder / "train.jsonl")
    assert inspect_command.main([str(folder)]) == 0
    assert "not compared with another split: " in capsys.readouterr().out
    write(folder, ROWS[:3]).rename(folder / "test.jsonl")
    assert inspect_command.main([str(folder)]) == 0
    assert f"questions also in {folder}/test: 3" in capsys.readouterr().out
