"""What the kernels are built with where this machine is not."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from policies.native import build
from policies.native.build import compiler_flags, openmp_runtimes


def test_apples_compiler_gets_openmp_from_torch(tmp_path):
    flags = compiler_flags("Darwin", "arm64")
    assert flags[flags.index("-fopenmp") - 1] == "-Xpreprocessor"
    assert "-mcpu=apple-m1" in flags and "-march=native" not in flags
    assert openmp_runtimes("Darwin", tmp_path) == []
    (tmp_path / "libomp.dylib").touch()
    assert openmp_runtimes("Darwin", tmp_path) == [tmp_path / "libomp.dylib"]


def test_a_mac_with_an_intel_processor_and_linux_build_for_their_own():
    for machine in (("Darwin", "x86_64"), ("Linux", "x86_64"), ("Linux", "aarch64")):
        assert "-march=native" in compiler_flags(*machine)
        assert ("-Xpreprocessor" in compiler_flags(*machine)) == (machine[0] == "Darwin")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="of Linux")
def test_on_a_mac_the_runtime_is_known_before_the_library_is_built_and_opened(monkeypatch, tmp_path):
    (tmp_path / "libomp.dylib").touch()
    steps = []
    monkeypatch.setattr(build, "_LIBRARIES", tmp_path)
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(build, "build_library", lambda: steps.append("built") or tmp_path / "kernels.so")
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path, mode=None: steps.append((Path(path).name, mode)))
    build.open_library()
    assert steps == [("libomp.dylib", ctypes.RTLD_GLOBAL), "built", ("kernels.so", None)]


def test_there_is_one_openmp_runtime():
    code = "from policies.native import kernels; assert kernels(); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {Path(line.split()[-1]).name for line in done.stdout.splitlines() if "libgomp" in line}
    assert len(loaded) == 1
    assert {path.name for path in openmp_runtimes("Linux", build._LIBRARIES)} in (loaded, set())
