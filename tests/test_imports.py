"""What importing costs: modules that are not needed yet are not loaded. Seconds depend on the machine, these do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "datasets", "sympy", "scipy", "pandas", "matplotlib", "stable_baselines3"}


def loaded(code: str) -> set[str]:
    """The modules that a program has loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return set(done.stdout.split())


def test_registering_the_environments_needs_neither_torch_nor_the_verifier() -> None:
    own = loaded("import gymnasium, envs") - loaded("import gymnasium")
    assert not own & HEAVY
    assert "envs.verifier.verdicts" not in own and "urllib.request" not in own
    assert len(own) < 60, "mind what import envs loads"


@pytest.mark.parametrize("command", ["run", "compare"])
def test_help_needs_no_library(command: str) -> None:
    ends = "import sys\ntry:\n    runpy.run_module(name, run_name='__main__')\nexcept SystemExit:\n    pass"
    code = f"import runpy, sys\nname = 'benchmarks.{command}'\nsys.argv = [name, '--help']\n{ends}"
    assert not loaded(code) & (HEAVY | {"numpy", "gymnasium"})
