"""What memory a process may take is the least that the machine, its container and its scheduler's job leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import memory

GB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 8 GB free that stands for /proc and /sys."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {8 * GB // 1024} kB\n")
    return tmp_path


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


def test_without_groups_it_is_what_is_free(machine: Path) -> None:
    assert memory.available_bytes() == 8 * GB
    (machine / "meminfo").unlink()
    assert memory.available_bytes() is None


@pytest.mark.parametrize("names", [memory.V2, memory.V1])
def test_a_container_s_limit_counts_less_what_it_holds(machine: Path, names: tuple[str, str, str]) -> None:
    folder = machine if names is memory.V2 else machine / "memory"
    group(folder, names, str(3 * GB), 2 * GB, 5)
    assert memory.available_bytes() == GB + 5
    group(folder, names, "max" if names is memory.V2 else str(2**63 - 4096), 2 * GB, 5)
    assert memory.available_bytes() == 8 * GB
    group(folder, names, str(GB), 2 * GB, 0)
    assert memory.available_bytes() == 0


@pytest.mark.parametrize("level", ["job_7", "job_7/step_0", "job_7/step_0/task_1"])
@pytest.mark.parametrize("names", [memory.V2, memory.V1])
def test_a_job_s_limit_may_stand_at_any_level(machine: Path, names: tuple[str, str, str], level: str) -> None:
    line = "0::" if names is memory.V2 else "4:cpu,memory:"
    (machine / "own").write_text(f"9:name=systemd:/elsewhere\n{line}/slurm/job_7/step_0/task_1\n")
    mount = machine if names is memory.V2 else machine / "memory"
    group(mount / "slurm" / level, names, str(2 * GB), GB, 0)
    assert memory.available_bytes() == GB


def test_names_of_the_host_s_groups_lead_to_the_container_s_own(machine: Path) -> None:
    (machine / "own").write_text("0::/docker/3f2a\n")
    group(machine, memory.V2, str(3 * GB), GB, 0)
    assert memory.available_bytes() == 2 * GB
