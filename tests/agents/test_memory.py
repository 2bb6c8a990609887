"""The plan of memory: what fits is what free memory divided by a slot says, and what does not is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agents import ReFT, memory
from envs.task import Task, TaskSpec
from envs.vector import MathReasonVector
from policies import Policy
from registry import UsageError


@pytest.fixture
def small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets how many bytes the system says are free."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)

    def say(free: int, limit: str = "max", used: int = 0, cache: int = 0) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {free // 1024} kB\n")
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")

    return say


def test_a_container_s_limit_counts_less_what_it_holds(small_machine) -> None:
    small_machine(8 << 30)
    assert memory.available_bytes() == 8 << 30
    small_machine(8 << 30, str(3 << 30), 2 << 30, 1 << 20)
    assert memory.available_bytes() == (1 << 30) + (1 << 20)
    small_machine(1 << 20, str(3 << 30))
    assert memory.available_bytes() == 1 << 20


def test_slots_that_do_not_fit_are_refused_with_the_number_that_does(folder: str, small_machine) -> None:
    target, task = Policy.load(folder), Task(TaskSpec())
    optimizer = torch.optim.AdamW(target.parameters())
    one = memory.slot_bytes(target, task)
    shape = target.architecture
    assert one >= shape.layers * shape.kv_width * task.spec.max_new_tokens * 4
    lasting = memory.lasting_bytes(target, optimizer)
    assert lasting == 16 * sum(parameter.numel() for parameter in target.parameters())
    small_machine(lasting + 20 * one + 2048)
    assert memory.fitting_slots(target, task, optimizer, 256) == 20
    assert memory.fitting_slots(target, task, optimizer, 8) == 8
    ReFT(target, MathReasonVector(num_envs=20, copy=False), group_size=4, problems_per_batch=2)
    with pytest.raises(UsageError, match=r"256 slots.*slots=20 or fewer.*max_new_tokens"):
        ReFT(target, MathReasonVector(num_envs=256, copy=False), group_size=4, problems_per_batch=2)
    small_machine(lasting // 2)
    with pytest.raises(UsageError, match="smaller model"):
        ReFT(target, MathReasonVector(num_envs=2, copy=False), group_size=4, problems_per_batch=2)


def test_a_system_that_tells_nothing_stops_nobody(folder: str, small_machine) -> None:
    target = Policy.load(folder)
    optimizer = torch.optim.AdamW(target.parameters())
    assert memory.fitting_slots(target, Task(TaskSpec()), optimizer, 256) == 256
