"""The README's examples run, its commands parse, and CI calls its test command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agents.saving.configuration import COMPONENTS
from benchmarks.comparison.catalogue import components
from envs.codec import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    " ".join(line.split("#")[0].split())
    for block in re.findall(r"```bash\n(.*?)```", README.replace("\\\n", " "), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def example(words: str) -> str:
    """The one example with these words in it."""
    (block,) = [block for block in PYTHON if words in block]
    return block


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=500)


def test_the_environment_example_runs(tmp_path: Path) -> None:
    done = python("-W", "error", "-c", example("env.render()"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reward 0" in done.stdout


def test_the_agent_example_runs(tmp_path: Path) -> None:
    whole = example("agent.learn")
    short = whole.replace("total_timesteps=100_000", "total_timesteps=1_000")
    assert short != whole
    done = python("-c", short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_the_example_for_trl_runs(tmp_path: Path, folder: str) -> None:
    """On generated problems, a model of random weights and a step."""
    pytest.importorskip("trl")
    load_tokenizer("builtin").save_pretrained(folder)
    settings = f"GRPOConfig({str(tmp_path)!r}, max_steps=1, max_completion_length=4, use_cpu=True, bf16=False)"
    code = example("problem_rows")
    for theirs, ours in (
        ('"gsm8k", template="chat"', '"arithmetic", limit=8'),
        ('"Qwen/Qwen2.5-0.5B-Instruct"', f"{folder!r}, args={settings}"),
        ("import GRPOTrainer", "import GRPOConfig, GRPOTrainer"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rewards/verified/mean" in done.stdout


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
