"""The README's examples run, its commands parse, and CI calls its test command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agents.configuration import COMPONENTS
from benchmarks.comparison.catalogue import components

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    " ".join(line.split("#")[0].split())
    for block in re.findall(r"```bash\n(.*?)```", README.replace("\\\n", " "), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=500)


def test_the_environment_example_runs(tmp_path: Path) -> None:
    done = python("-W", "error", "-c", PYTHON[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reward 0" in done.stdout


def test_the_agent_example_runs(tmp_path: Path) -> None:
    short = PYTHON[1].replace("total_timesteps=100_000", "total_timesteps=1_000")
    assert short != PYTHON[1]
    done = python("-c", short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trained" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m")])
def test_the_commands_take_these_arguments(command: str, tmp_path: Path) -> None:
    """With a misspelt last argument each stops before any work, and names it; so the others were known."""
    module, *arguments = shlex.split(command)[2:]
    done = python("-m", module, *arguments, "--no-such-argument", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("unrecognized arguments: --no-such-argument"), done.stderr


@pytest.mark.parametrize("part", ["sampler", "correction"])
def test_the_tables_are_those_of_the_registries(part: str) -> None:
    """Their text is made by the same function as ``benchmarks.run --list``: put there what this test prints."""
    table = components(part, COMPONENTS[part])
    begin, end = f"<!-- {table.name} -->\n", f"<!-- end of {table.name} -->"
    assert README.partition(begin)[2].partition(end)[0] == f"\n{table.markdown()}\n\n"


def test_ci_calls_the_test_command() -> None:
    [test_command] = [c for c in COMMANDS if "pytest" in c]
    assert test_command.startswith("python3 -m venv .venv")
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m1 '([^']*)' README.md", script)
    assert pattern, ".ci/run takes the command from README.md"
    assert next(line for line in README.splitlines() if re.search(pattern[1], line)) == test_command
