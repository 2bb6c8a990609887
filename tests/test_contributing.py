"""The examples of CONTRIBUTING.md run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples as files outside the repository."""
    made = tmp_path_factory.mktemp("third-party")
    for name, code in BLOCKS:
        (made / f"{name}.py").write_text(code)
    # What an installed package's entry point does: importing the modules registers their components.
    info = made / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    registered = ("my_correction", "my_sampler", "my_template", "my_batch", "my_rival")
    lines = "".join(f"mine{n} = {name}\n" for n, name in enumerate(registered))
    (info / "entry_points.txt").write_text(f"[nested_reft]\n{lines}")
    return made


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=500)


def test_there_are_six_examples_and_three_are_short() -> None:
    names = ["my_correction", "my_sampler", "my_batch", "my_problems", "my_template", "my_rival"]
    assert [name for name, _ in BLOCKS] == names
    lines = {name: len([line for line in code.splitlines() if line.strip()]) for name, code in BLOCKS}
    assert max(lines["my_correction"], lines["my_batch"], lines["my_rival"]) < 20


def test_the_correction_passes_the_contract(folder: Path) -> None:
    done = run(folder, "-m", "benchmarks.estimators", "--check", "my_correction:HalfIS")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "HalfIS declares" in done.stdout


def test_correction_and_sampler_are_compared(folder: Path) -> None:
    arguments = ["--seeds", "1", "--iterations", "1", "--quiet", "--jobs", "1"]
    sets = ["--set", "problems_per_batch=4", "--set", "group_size=4", "--set", "evaluation.problems=16"]
    chosen = ["--agents", "reft", "nested-reft/every-other/half-is", "--out", str(folder / "out")]
    done = run(folder, "-m", "benchmarks.compare", *chosen, *arguments, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nested-reft/every-other/half-is" in (folder / "out" / "report.md").read_text()


def test_the_batch_source_recalls(folder: Path) -> None:
    code = (
        "import gymnasium as gym\n"
        "from agents import ReFT\n"
        "envs = gym.make_vec('MathReason-v0', num_envs=8, reward='random', max_new_tokens=8)\n"
        "agent = ReFT('tiny', envs, batch='replay-hardest', correction='token-is', problems_per_batch=8)\n"
        "print([agent.iterate().get('stored_share') for _ in range(3)])\n"
    )
    done = run(folder, "-c", code)
    assert done.stdout.strip() == "[0.0, 0.25, 0.25]", done.stderr


def test_the_rival_is_trained(folder: Path) -> None:
    chosen = ["--agent", "my-rival", "--set", "batch.weight=.3", "--runs", str(folder / "rival"), "--quiet"]
    sets = ["problems_per_batch=2", "group_size=2", "iterations=2", "evaluation.problems=4", "evaluation.samples=1"]
    done = run(folder, "-m", "benchmarks.run", *chosen, *(word for one in sets for word in ("--set", one)))
    assert done.returncode == 0, done.stderr
    (spec,) = (folder / "rival").glob("*/spec.json")
    batch = json.loads(spec.read_text())["agent"]["batch"]
    assert batch == {"id": "replay*expert", "share": 0.5, "weight": 0.3}


def test_the_problem_source_is_served(folder: Path) -> None:
    code = (
        "import gymnasium as gym, envs\n"
        "env = gym.make('MathReason-v0', problems='my_problems:squares', split='test')\n"
        "_, info = env.reset(options={'problem_index': 1})\n"
        "print(env.unwrapped.task.problem(1).answer, info['problem_id'])\n"
    )
    done = run(folder, "-c", code)
    assert done.stdout.split() == ["10609", "103"], done.stderr


def test_the_template_is_found_by_name(folder: Path) -> None:
    code = (
        "import gymnasium as gym, envs\n"
        "env = gym.make('MathReason-v0', template='terse', problems='my_problems:squares')\n"
        "env.reset(options={'problem_index': 1})\n"
        "task = env.unwrapped.task\n"
        "text = task.tokenizer('9\\n', add_special_tokens=False)['input_ids']\n"
        "*_, (_, reward, terminated, _, info) = [env.step(token) for token in text]\n"
        "prompt = task.tokenizer.decode(task.prompt(1))\n"
        "print([prompt, float(reward), terminated, info['finish_reason'], task.spec.template])\n"
    )
    done = run(folder, "-c", code)
    assert done.stdout.strip() == "['What is 3 squared? =', 1.0, True, 'stop', 'terse']", done.stderr
