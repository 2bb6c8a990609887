"""The kernels' vectors of sixteen numbers, as this processor has them, as two halves, and as four quarters."""

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
from policies.native.sizes import BLOCK, LANES, PANEL

FLAGS = [(), ("-mno-avx512f",), ("-mno-avx512f", "-mno-avx2")] if platform.machine() in ("x86_64", "AMD64") else [()]


def samples(generator):
    """Numbers of ordinary sizes, numbers beyond the exponential's range, and ties between two bfloat16 numbers."""
    exponent = generator.uniform(-3, 3, size=32)
    yield generator.standard_normal(32) * 10**exponent
    yield generator.uniform(-100, 100, size=32)
    halves = generator.integers(110, 140, size=32) << 23 | generator.integers(0, 128, size=32) << 16
    sign = generator.integers(0, 2, size=32) << 31
    yield (sign | halves | 0x8000).astype(np.uint32).view(np.float32)


@pytest.fixture(scope="module", params=FLAGS)
def library(request, tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    target, source = tmp_path_factory.mktemp("lanes") / "lanes.so", Path(__file__).with_name("lanes_check.cpp")
    include = f"-I{Path(build.__file__).parent}"
    command = [compiler, *build._FLAGS, *request.param, include, "-fPIC", "-shared", "-o", target, source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def test_each_operation_equals_that_on_one_number(library):
    library.check.argtypes = [ctypes.c_void_p] * 2
    generator = np.random.default_rng(0)
    for _ in range(200):
        for sample in samples(generator):
            a = sample.astype(np.float32)
            b = generator.standard_normal(16).astype(np.float32)
            assert library.check(a.ctypes.data, b.ctypes.data) == 0


def test_python_has_the_same_sizes(library):
    found = (ctypes.c_int64 * 3)()
    library.sizes(found)
    assert tuple(found) == (LANES, PANEL, BLOCK)
