"""The packages: one version, everything that the code reads beside it, and types for those who import it."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
VERSION = PROJECT["project"]["version"]
APART = ("results",)  # of benchmarks: what the repository keeps and no code reads


def package_files() -> set[str]:
    """What lies in the packages and is no by-product."""
    roots = {name.partition(".")[0] for name in PACKAGES}
    paths = (path.relative_to(ROOT) for root in roots for path in (ROOT / root).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not {"__pycache__", *APART} & set(path.parts)}


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.rpartition("/")[0].replace("/", ".") for path in package_files() if path.endswith(".py")}
    assert folders == set(PACKAGES)


def test_every_package_is_typed() -> None:
    assert all((ROOT / name / "py.typed").is_file() for name in PACKAGES if "." not in name)


def test_there_is_one_version() -> None:
    """pyproject.toml's; the changelog begins with it, and the citation is of it."""
    changelog, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", changelog, re.MULTILINE)
    assert newest and newest[1] == VERSION
    cited = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    assert cited and cited[1] == VERSION
    assert newest[2] == "unreleased" or f"date-released: {newest[2]}" in citation


def test_the_classifiers_say_which_pythons_the_workflow_tries() -> None:
    prefix = "Programming Language :: Python :: "
    known = [one.removeprefix(prefix) for one in PROJECT["project"]["classifiers"] if one.startswith(prefix)]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert sorted(set(re.findall(r'"(3\.\d+)"', workflow))) == known
    assert PROJECT["project"]["requires-python"] == f">={known[0]}"


@pytest.mark.skipif(not (ROOT / "dist").is_dir(), reason="no wheel: .ci/packages")
def test_the_wheel_holds_all_of_the_packages() -> None:
    [wheel] = (ROOT / "dist").glob("*.whl")
    assert wheel.name.startswith(f"nested_reft-{VERSION}-py3-none-any")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} >= package_files() - {
        "policies/tiny/README.md"
    }
