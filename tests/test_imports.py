"""What importing costs: modules that are not needed yet are not loaded. Seconds depend on the machine, these do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "datasets", "sympy", "scipy", "pandas", "matplotlib", "stable_baselines3"}


def loaded(code: str) -> set[str]:
    """The modules that a program has loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(chr(0), *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return set(done.stdout.rpartition("\0")[2].split())


def test_registering_the_environments_needs_neither_torch_nor_the_verifier() -> None:
    own = loaded("import gymnasium, envs") - loaded("import gymnasium")
    assert not own & HEAVY
    assert "envs.verifier.verdicts" not in own and "urllib.request" not in own
    assert len(own) < 60, "mind what import envs loads"


def commands(package: str) -> set[str]:
    """The modules of a package that are run with ``python -m``."""
    files = [*(ROOT / package).glob("*.py"), *(ROOT / package).glob("*/__main__.py")]
    found = {file for file in files if "@command(" in file.read_text(encoding="utf-8")}
    return {f"{package}.{file.parent.name if file.stem == '__main__' else file.stem}" for file in found}


def test_commands_are_found() -> None:
    assert commands("benchmarks") > {"benchmarks.run", "benchmarks.throughput", "benchmarks.estimators"}


@pytest.mark.parametrize("name", sorted(commands("benchmarks") - {"benchmarks.calibration"}))
def test_help_needs_no_library(name: str) -> None:
    ends = "try:\n    runpy.run_module(name, run_name='__main__')\nexcept SystemExit:\n    pass"
    code = f"import runpy, sys\nname = {name!r}\nsys.argv = [name, '--help']\n{ends}"
    assert not loaded(code) & (HEAVY | {"numpy", "gymnasium"})


@pytest.mark.parametrize(
    ("module", "library", "package"),
    [("openenv", "openenv", "openenv-core"), ("verifiers", "verifiers", "verifiers"), ("verl_nested", "verl", "verl")],
)
def test_an_integration_without_its_library_says_what_to_install(module: str, library: str, package: str) -> None:
    absent = f"import runpy, sys\nsys.modules[{library!r}] = None\n"
    for code, status in (
        (f"import integrations.{module}", 1),
        (f"runpy.run_module('integrations.{module}', run_name='__main__')", 2),
    ):
        done = subprocess.run([sys.executable, "-c", absent + code], capture_output=True, text=True, timeout=300)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == (status if module == "openenv" else 1)  # that one is a command
        assert f"integrations.{module} needs" in last and last.endswith(f"pip install {package}")
