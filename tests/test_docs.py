"""The site's own pages: their programs run as they stand there, and their commands parse."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PROGRAMS = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}
COMMANDS = sorted(
    {
        " ".join(line.split("#")[0].split())
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text().replace("\\\n", " "), re.DOTALL)
        for line in block.splitlines()
        if "python -m" in line
    }
)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{cwd}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment.pop("NESTED_REFT_POLICY", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=500)


@pytest.mark.parametrize("page", ["tutorial.md", "environment.md"])
def test_the_blocks_of_a_page_are_one_program(page: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("\n".join(PROGRAMS[page]))
    done = python(str(program), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[right: reward 1" in done.stdout if page == "tutorial.md" else "(8, 104)" in done.stdout


def test_the_correction_of_the_lab_page_passes_the_contract(tmp_path: Path) -> None:
    [program] = PROGRAMS["lab.md"]
    (tmp_path / "soft_cap.py").write_text(program)
    done = python("-m", "benchmarks.estimators", "--check", "soft_cap:SoftCap", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    body = program.partition("def __call__")[2]
    assert body and body in PROGRAMS["tutorial.md"][5], "the tutorial's is the same"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_take_these_arguments(command: str, tmp_path: Path) -> None:
    """With a misspelt last argument each stops before any work, and names it; so the others were known."""
    given = ["-m", *shlex.split(command)[2:], "--no-such-argument"]
    done = python(*given, cwd=tmp_path)
    while lacking := re.search(r"error: \S+ '(.+)' cannot be read .*: name another (file|folder)", done.stderr):
        place = tmp_path / lacking[1]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch() if lacking[2] == "file" else place.mkdir()
        done = python(*given, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("unrecognized arguments: --no-such-argument"), done.stderr


def test_the_environment_page_has_gymnasiums_sections() -> None:
    """In the order of the pages of Gymnasium's own documentation."""
    page = (DOCS / "environment.md").read_text()
    wanted = ["Action Space", "Observation Space", "Rewards", "Starting State", "Episode End", "Arguments"]
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [one for one in headings if one in wanted] == wanted and headings[-1] == "Version History"
