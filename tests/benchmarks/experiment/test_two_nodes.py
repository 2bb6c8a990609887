"""One run of two torchrun launchers that meet on a port, as two machines would; one is killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.measuring.durable import read_rows
from tests.oracles.small_world import numbers, small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def node(spec: Path, runs: Path, port: int, out: Path) -> subprocess.Popen[bytes]:
    """A launcher as it is called on each machine of a cluster; both addresses are this machine's."""
    command = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run", "--local-addr=127.0.0.1"]
    command += ["-m", "benchmarks.run", "--spec", str(spec), "--runs", str(runs), "--quiet", "--threads", "1"]
    # With a shared store torch 2.13's launcher that is started anew waits for an address that only the first round has.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [sys.executable, *command], stdout=out.open("ab"), stderr=subprocess.STDOUT, env=environment
    )


def children(parent: int) -> list[int]:
    """The processes that a launcher has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """As a machine goes that loses its power."""
    for pid in [launcher.pid, *children(launcher.pid)]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_node_that_dies_and_comes_back_changes_no_numbers(tmp_path: Path) -> None:
    spec = small()
    spec = replace(spec, iterations=16, agent={**spec.agent, "shard": True})
    spec.write(tmp_path / "spec.json")
    launchers: list[subprocess.Popen[bytes]] = []

    def start(runs: str, port: int, out: str) -> subprocess.Popen[bytes]:
        launchers.append(node(tmp_path / "spec.json", tmp_path / runs, port, tmp_path / out))
        return launchers[-1]

    try:
        port, folder = free_port(), tmp_path / "killed" / spec.hash
        first, second = start("killed", port, "0.log"), start("killed", port, "1.log")
        while not (folder / "checkpoint").is_dir():
            assert first.poll() is None and second.poll() is None, (tmp_path / "0.log").read_text()
            time.sleep(0.1)
        kill(second)
        reached = len(read_rows(folder / "metrics.jsonl")[0])
        assert not (folder / "result.json").exists()
        second = start("killed", port, "1.log")
        assert [first.wait(), second.wait()] == [0, 0], (tmp_path / "0.log").read_text()
        port = free_port()
        whole = [start("whole", port, f"{n}.whole.log") for n in range(2)]
        assert [launcher.wait() for launcher in whole] == [0, 0], (tmp_path / "0.whole.log").read_text()
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                kill(launcher)
    got, wanted = numbers(folder), numbers(tmp_path / "whole" / spec.hash)
    assert 0 < reached < len(wanted)
    assert got == wanted
    assert json.loads((folder / "provenance.json").read_text())["processes"] == 2
    for name, weight in load_file(folder / "model" / "model.safetensors").items():
        assert weight.equal(load_file(tmp_path / "whole" / spec.hash / "model" / "model.safetensors")[name]), name
