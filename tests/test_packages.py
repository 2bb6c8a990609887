"""The packages: one version, everything that the code reads beside it, and types for those who import it."""

from __future__ import annotations

import re
import subprocess
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


def test_every_folder_is_a_package() -> None:
    """Those of data alone as well, which setuptools would leave out some day."""
    assert {path.rpartition("/")[0].replace("/", ".") for path in package_files()} == set(PACKAGES)


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


@pytest.mark.parametrize("tests_pass", [True, False])
def test_a_release_is_a_commit_and_a_tag_or_nothing(tests_pass: bool, tmp_path: Path) -> None:
    """Of a repository with the script and the three files that have the version; its tests pass or fail."""
    (tmp_path / ".ci").mkdir()
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", ".ci/release"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (unreleased)\n\n- New.\n", encoding="utf-8")
    (tmp_path / ".ci" / "run").write_text(
        f"grep -q '9.8.7' pyproject.toml && mkdir dist && {str(tests_pass).lower()}\n"
    )
    (tmp_path / ".gitignore").write_text("dist\n")

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    def release(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", ".ci/release", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    git("init", "-q")
    for name, value in (("user.name", "A"), ("user.email", "a@example.org"), ("commit.gpgsign", "false")):
        git("config", name, value)
    git("add", ".")
    git("commit", "-qm", "All")
    for arguments in ((), ("v9.8.7",), ("9.8.7", "1.0.0")):
        assert release(*arguments).returncode == 2
    assert (release("9.8.7").returncode == 0) == tests_pass
    assert not git("status", "--porcelain")
    assert git("tag").split() == (["v9.8.7"] if tests_pass else [])
    assert git("log", "--format=%s").splitlines() == (["Release 9.8.7", "All"] if tests_pass else ["All"])
    assert ('version = "9.8.7"' in (tmp_path / "pyproject.toml").read_text(encoding="utf-8")) == tests_pass
    released = re.search(r"^## 9.8.7 \((\S+)\)$", (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert bool(released) == tests_pass
    if released:
        cited = (tmp_path / "CITATION.cff").read_text(encoding="utf-8")
        assert f"version: 9.8.7\ndate-released: {released[1]}\n" in cited
        assert "unreleased" in release("9.9.0").stderr


@pytest.mark.skipif(not (ROOT / "dist").is_dir(), reason="no wheel: .ci/packages")
def test_the_wheel_holds_all_of_the_packages() -> None:
    [wheel] = (ROOT / "dist").glob("*.whl")
    assert wheel.name.startswith(f"nested_reft-{VERSION}-py3-none-any")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} >= package_files() - {
        "policies/tiny/README.md"
    }
