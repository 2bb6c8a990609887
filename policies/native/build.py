"""Building the optional kernels with torch's extension tooling, once per machine, source and torch version."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("kernels", "attention", "packed_attention", "head", "update", "step", "int8")
)
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
# contract: clang, unlike gcc, fuses a product with a sum only where they stand in one expression
_SPEED = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


def compiler_flags(system: str, machine: str) -> tuple[str, ...]:
    """Of the C++ compiler that a ``platform.system()`` of a ``platform.machine()`` has."""
    apple = system == "Darwin"  # whose compiler takes OpenMP's pragmas for a library that it comes without
    target = "-mcpu=apple-m1" if apple and machine == "arm64" else "-march=native"  # every Mac with arm64 has these
    return (*_SPEED, target, *(("-Xpreprocessor",) if apple else ()), "-fopenmp", "-std=c++17")


def openmp_runtimes(system: str, torch_libraries: Path) -> list[Path]:
    """torch's own OpenMP runtime, or there would be two thread pools spinning against each other."""
    return sorted(torch_libraries.glob("libomp*" if system == "Darwin" else "libgomp*"))


_LIBRARIES = Path(torch.__file__).parent / "lib"
_FLAGS = compiler_flags(platform.system(), platform.machine())


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared by machines with different processors."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return platform.processor()
    lines = listing.read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def built_at() -> Path:
    """Where the built library of these sources, this torch and this processor lies."""
    key = hashlib.sha256()
    for part in (*(source.read_text() for source in SOURCES + _HEADERS), *_FLAGS, torch.__version__, _processor()):
        key.update(part.encode())
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(cache) / "nested_reft" / f"kernels_{key.hexdigest()[:16]}.so"


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """torch looks for ninja on the PATH, where an environment that was not activated does not have its own."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def build_library() -> Path:
    """The library, built if it is not there (some seconds).

    Built in a folder of its own and moved into place, so that concurrent or killed builds leave no lock and no half
    file. Raises ``RuntimeError`` or ``OSError`` where there is no compiler or no ninja."""
    target = built_at()
    if target.exists():
        return target
    from torch.utils import cpp_extension

    target.parent.mkdir(parents=True, exist_ok=True)
    system = platform.system()
    runtimes = [] if system == "Darwin" else list(map(str, openmp_runtimes(system, _LIBRARIES))) or ["-fopenmp"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, _scripts_on_path():
        cpp_extension.load(
            name=target.stem,
            sources=[str(source) for source in SOURCES],
            extra_cflags=list(_FLAGS),
            extra_ldflags=runtimes,
            build_directory=folder,
            is_python_module=False,
            verbose=False,
        )
        os.replace(Path(folder) / target.name, target)
    return target


def open_library() -> ctypes.CDLL:
    """The library, built if need be.

    The runtime that torch has for macOS calls itself by a path of the machine it was made on, where whatever is linked
    with it would look for it: it is made known before instead, and torch's tooling lets symbols be found only then."""
    if platform.system() == "Darwin":
        for runtime in openmp_runtimes("Darwin", _LIBRARIES):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(build_library()))  # torch's tooling opens what it has built, too
