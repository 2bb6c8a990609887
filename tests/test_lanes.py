"""The kernels' vectors of sixteen numbers, as this processor has them and as two halves."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from policies.native import build

FLAGS = [(), ("-mno-avx512f",)] if platform.machine() in ("x86_64", "AMD64") else [()]


def samples(generator):
    """Numbers of ordinary sizes, numbers beyond the exponential's range, and ties between two bfloat16 numbers."""
    exponent = generator.uniform(-3, 3, size=32)
    yield generator.standard_normal(32) * 10**exponent
    yield generator.uniform(-100, 100, size=32)
    halves = generator.integers(110, 140, size=32) << 23 | generator.integers(0, 128, size=32) << 16
    sign = generator.integers(0, 2, size=32) << 31
    yield (sign | halves | 0x8000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("flags", FLAGS)
def test_each_operation_equals_that_on_one_number(flags, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    library, here = tmp_path / "lanes.so", Path(__file__).parent
    include = f"-I{Path(build.__file__).parent}"
    command = [compiler, *build._FLAGS, *flags, include, "-fPIC", "-shared", "-o", library, here / "lanes_check.cpp"]
    subprocess.run(command, check=True)
    check = ctypes.CDLL(str(library)).check
    check.argtypes = [ctypes.c_void_p] * 2
    generator = np.random.default_rng(0)
    for _ in range(200):
        for sample in samples(generator):
            a = sample.astype(np.float32)
            b = generator.standard_normal(16).astype(np.float32)
            assert check(a.ctypes.data, b.ctypes.data) == 0
