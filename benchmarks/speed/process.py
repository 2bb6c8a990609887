"""Peers that are timed in a process of their own, which waits while others are measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.pairing import Block
from benchmarks.speed.work import Work
from policies import Policy
from policies.vllm import checkpoint
from policies.vllm.engine import VARIABLES
from registry import UsageError


class BlockProcess:
    """A child that works off a block for each line of its standard input and tells it by a line of JSON.

    Args:
        name: of the peer, for messages.
        command: what starts it.
        environment: variables that it has otherwise than this process.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(environment)
        )

    def __call__(self) -> Block:
        """The child's next block.

        Raises:
            UsageError: the child has ended, or says that it cannot.
        """
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            self.child.stdin.write("\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # it ended early, and its last line says why
        line = self.child.stdout.readline()
        if not line:
            code = self.child.wait()
            memory = " (killed: most likely it ran out of memory, so take shorter prompts or a smaller --group-size)"
            raise UsageError(
                f"{self.name}'s process ended with exit code {code}{memory if code == -9 else ''}; "
                "its messages are above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UsageError(answer["error"])
        return Block(**answer)

    def close(self) -> None:
        """End the child."""
        self.child.kill()
        self.child.communicate()


class EngineProcess(BlockProcess):
    """Another engine that writes the work's completions: all layers, the policy's dtype, temperature 1.

    Args:
        engine: ``vllm`` or ``openvino``.
        python: the interpreter whose environment has it.
        int8: whether its weights are rounded to bytes, as OpenVINO's may be; it then rounds keys and values as well,
            its default.
    """

    def __init__(self, engine: str, python: str, policy: Policy, work: Work, int8: bool = False) -> None:
        if shutil.which(python) is None:
            raise UsageError(f"--{engine} {python}: no such program; give the Python of an environment that has it")
        self.int8 = int8
        self.folder = Path(tempfile.mkdtemp(prefix="nested-reft-speed-"))
        model = self.folder / "model"
        model.mkdir()
        a, full = policy.architecture, tuple(range(policy.num_layers))
        if engine == "vllm":
            checkpoint.check_heads(policy)
            checkpoint.save(policy, full, checkpoint.shape_of(policy, full), model)
        else:
            policy.save(model)
            work.env.unwrapped.task.tokenizer.save_pretrained(model)
        given: dict[str, Any] = {
            "model": str(model),
            "dtype": "int8" if int8 else str(policy.dtype).removeprefix("torch."),
            "prompts": [work.prompt(problem).tolist() for problem in work.problems],
            "group_size": work.group_size,
            "new_tokens": work.new_tokens,
            "stop": list(work.stop),
            "slots": work.env.num_envs,
            "vocabulary": policy.vocab_size,
            "token_bytes": 2 * a.layers * a.key_heads * checkpoint.head_channels(policy) * policy.dtype.itemsize,
            "threads": torch.get_num_threads(),
        }
        (self.folder / "work.json").write_text(json.dumps(given))
        script = str(Path(__file__).with_name("engines.py"))
        super().__init__(engine, [python, script, engine, str(self.folder)], _environment())

    def close(self) -> None:
        """End the child and drop the model."""
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **VARIABLES}
