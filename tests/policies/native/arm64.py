"""A pytest plugin: the kernels as built for arm64, run by an emulator in place of this processor's.

``NESTED_REFT_ARM64=LIBRARY python -m pytest -p tests.policies.native.arm64 tests/policies/engine``, where LIBRARY was
compiled without OpenMP and stands alone (``.ci/arm64``). The emulated processor shares this one's memory: an address
means the same to both, and arguments need no copies. It says what is right, and nothing of the time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import unicorn
from unicorn import arm64_const as arm

import policies.native
from policies.native.calls import FLAG, FLOAT, INT, Array, Memory

CHUNK, STACK, STUB, RETURN = 1 << 20, 1 << 24, 16, 0xD65F03C0
LOADED, DYNAMIC = 1, 2  # kinds of segments
STRINGS, SYMBOLS, TABLE, TABLE_BYTES, JUMPS, JUMPS_BYTES = 5, 6, 7, 8, 23, 2  # tags of the dynamic segment
RELATIVE = 1027  # the one kind of relocation without a symbol

_c = ctypes.CDLL(None)
for _name, _count in (("malloc", 1), ("free", 1), ("memmove", 3), ("memset", 3)):
    getattr(_c, _name).argtypes = [ctypes.c_size_t] * _count
    getattr(_c, _name).restype = ctypes.c_size_t
# What the kernels call, after how many whole numbers it is given, or the type of its one real number.
CALLED: dict[str, tuple[int | type, Callable[..., Any]]] = {
    "_Znwm": (1, _c.malloc),
    "_ZdlPv": (1, _c.free),
    "_ZdlPvm": (1, _c.free),
    "memcpy": (3, _c.memmove),
    "memmove": (3, _c.memmove),
    "memset": (3, _c.memset),
    "madvise": (0, lambda: 0),
    "mallopt": (0, lambda: 1),
    "log": (np.float64, np.log),
    "logf": (np.float32, np.log),
    "expf": (np.float32, np.exp),
}
_WHOLE = [getattr(arm, f"UC_ARM64_REG_X{i}") for i in range(8)]
_REAL = [getattr(arm, f"UC_ARM64_REG_D{i}") for i in range(8)]


class Function:
    """A function of the library, called as ctypes calls one."""

    def __init__(self, loaded: Library, address: int) -> None:
        self._loaded, self._address = loaded, address
        self.argtypes: list[Any] = []
        self.restype: Any = ctypes.c_int

    def __call__(self, *arguments: Any) -> int | None:
        whole, real = [], []
        for kind, value in zip(self.argtypes, arguments, strict=True):
            if kind is FLOAT:
                real.append(int(np.float32(value).view(np.uint32)))
            else:
                whole.append(_whole(kind, value))
        result = self._loaded.call(self._address, whole, real)
        return None if self.restype is None else result


def _whole(kind: Any, value: Any) -> int:
    if kind in (INT, FLAG):
        return int(value)
    if kind is Memory:
        return 0 if value is None else value.data_ptr()
    return value.ctypes.data if kind is Array else ctypes.addressof(value)


def _room(size: int) -> tuple[mmap.mmap, int]:
    """Memory of this process, and its address."""
    memory = mmap.mmap(-1, size)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Library:
    """A shared library for arm64, loaded into this process."""

    def __init__(self, path: Path) -> None:
        self._machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        self._machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vector instructions
        self._machine.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, self._share)
        self._image, self._base = _room(4 * CHUNK)
        self._stack, below = _room(STACK)
        self._top = below + STACK
        self._stubs, self._first = _room(CHUNK)
        self._missing: list[str] = []
        self._exported: dict[str, int] = {}
        self._error: Exception | None = None
        self._load(path.read_bytes())
        self._machine.hook_add(unicorn.UC_HOOK_CODE, self._called, begin=self._first, end=self._first + CHUNK)

    def __getattr__(self, name: str) -> Function:
        if name not in self._exported:
            raise AttributeError(name)
        function = self.__dict__[name] = Function(self, self._exported[name])
        return function

    def call(self, address: int, whole: list[int], real: list[int]) -> int:
        """What a function returns; its first eight whole numbers are in registers, the others on the stack."""
        more = whole[8:]
        stack = self._top - CHUNK - -(-len(more) // 2) * 16
        ctypes.memmove(stack, b"".join(struct.pack("<Q", one % 2**64) for one in more), 8 * len(more))
        for register, value in (*zip(_WHOLE, whole, strict=False), *zip(_REAL, real, strict=False)):
            self._machine.reg_write(register, value)
        end = self._first + CHUNK - STUB
        self._machine.reg_write(arm.UC_ARM64_REG_SP, stack)
        self._machine.reg_write(arm.UC_ARM64_REG_LR, end)
        try:
            self._machine.emu_start(address, end)
        finally:
            if self._error is not None:
                raise self._error
        return ctypes.c_int(self._machine.reg_read(_WHOLE[0]) & 0xFFFFFFFF).value

    def _share(self, machine: Any, access: int, address: int, *_: Any) -> bool:
        start = address // CHUNK * CHUNK
        machine.mem_map_ptr(start, CHUNK, unicorn.UC_PROT_ALL, start)
        return True

    def _called(self, machine: Any, address: int, *_: Any) -> None:
        name = self._missing[(address - self._first) // STUB]
        try:
            kind, function = CALLED[name]
            if isinstance(kind, int):
                result = function(*(machine.reg_read(register) for register in _WHOLE[:kind]))
                machine.reg_write(_WHOLE[0], result)
            else:
                size = np.dtype(kind).itemsize
                given = np.frombuffer(struct.pack("<Q", machine.reg_read(_REAL[0]))[:size], kind)
                machine.reg_write(_REAL[0], int.from_bytes(kind(function(given[0])).tobytes(), "little"))
        except Exception as error:  # an exception would be lost in the emulator
            self._error = error if not isinstance(error, KeyError) else RuntimeError(f"the library called {name}")
            machine.emu_stop()

    def _load(self, file: bytes) -> None:
        at = struct.unpack_from("<Q", file, 32)[0]
        size, count = struct.unpack_from("<HH", file, 54)
        tags: dict[int, int] = {}
        for number in range(count):
            kind, _, offset, place, _, length, room, _ = struct.unpack_from("<IIQQQQQQ", file, at + number * size)
            assert place + room <= len(self._image)
            if kind == LOADED:
                self._image[place : place + length] = file[offset : offset + length]
            elif kind == DYNAMIC:
                tags = dict(struct.iter_unpack("<qQ", file[offset : offset + length]))
        relocations = b""
        for begin, length in ((TABLE, TABLE_BYTES), (JUMPS, JUMPS_BYTES)):
            if begin in tags:
                relocations += self._image[tags[begin] : tags[begin] + tags[length]]
        for place, which, more in struct.iter_unpack("<QQq", relocations):
            target = self._base + more if which & 0xFFFFFFFF == RELATIVE else self._symbol(tags, which >> 32) + more
            struct.pack_into("<Q", self._image, place, target)
        number = 1
        while SYMBOLS in tags and tags[SYMBOLS] + 24 * number < tags[STRINGS]:  # the strings lie behind the symbols
            name, value = self._name(tags, number)
            if name.startswith("nr_") and value:
                self._exported[name] = self._base + value
            number += 1

    def _name(self, tags: dict[int, int], number: int) -> tuple[str, int]:
        name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", self._image, tags[SYMBOLS] + 24 * number)
        begin = tags[STRINGS] + name
        return self._image[begin : self._image.find(b"\0", begin)].decode(), value

    def _symbol(self, tags: dict[int, int], number: int) -> int:
        name, value = self._name(tags, number)
        if value:
            return self._base + value
        if name not in self._missing:
            struct.pack_into("<I", self._stubs, len(self._missing) * STUB, RETURN)
            self._missing.append(name)
        return self._first + self._missing.index(name) * STUB


def pytest_configure() -> None:
    """Every test's kernels are the emulated ones."""
    library = Library(Path(os.environ["NESTED_REFT_ARM64"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies.native, "open_library", lambda: library)
        found = policies.native.kernels()  # from here on, since they are looked up once
    assert found is not None and found.int8 is not None
