"""Everything that wants a GPU in one command of under ten minutes: tests, speed, a learning run.

    python -m benchmarks.gpu --out benchmarks/results/gpu

Speed is measured on random weights in the shapes of Qwen2.5-1.5B, so that nothing has to be downloaded. Each step has a
deadline; one that fails is reported and does not stop the others. Writes gpu.json beside the steps' own files.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.durable import json_text
from benchmarks.measuring.provenance import provenance
from registry import UsageError
from registry.command import command
from registry.paths import WriteFolder

SHAPES: dict[str, Any] = {  # Qwen/Qwen2.5-1.5B, config.json
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SMALL = SHAPES | {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512}


def random_model(folder: Path, shapes: dict[str, Any]) -> None:
    """A Qwen2 checkpoint of random weights, with the built-in tokenizer beside it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from envs.task import load_tokenizer

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**shapes))
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer("builtin").save_pretrained(folder)


def steps(model: Path, out: Path, device: str) -> dict[str, tuple[list[str], int]]:
    """Per step its command and its deadline in seconds."""
    python = [sys.executable, "-m"]
    speed = [*python, "benchmarks.throughput", "--policy", str(model), "--device", device, "--dtype", "bfloat16"]
    size = "--prompts 16 --new-tokens 128 --slots 64 --batch 64 --pairs 4 --workload forced"
    files = ["--json", str(out / "throughput.json"), "--picture", str(out / "throughput.png")]
    learn = [*python, "benchmarks.compare", "--agents", "reft", "nested-reft/uniform/practical", "--seeds", "2"]
    learn += ["--set", f"device={device}", "--runs", str(out / "runs")]
    return {
        "tests": ([*python, "pytest", "-q", "-m", "gpu", "tests"], 120),
        "throughput": ([*speed, *size.split(), *files], 240),
        "learning": ([*learn, "--out", str(out / "learning")], 230),
    }


def run(command: list[str], deadline: int) -> dict[str, object]:
    """One step: its command, status, seconds and the end of what it printed."""
    print("$", shlex.join(command), flush=True)
    began = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=deadline)
        status: int | str = done.returncode
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        status = f"stopped after {deadline} s"
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    seconds = round(time.perf_counter() - began, 1)
    print(said[-4000:], f"-> {status}, {seconds} s", sep="\n", flush=True)
    return {"command": shlex.join(command), "status": status, "seconds": seconds, "output": said[-8000:]}


@command(interrupted="what the steps wrote so far stays")
def main(arguments: list[str] | None = None) -> int:
    """Run all steps; 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", action=WriteFolder, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on a CPU with a small random model")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device: run this where there is one, or give --rehearse")
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {"provenance": provenance()}
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), SMALL if options.rehearse else SHAPES)
        for name, step in steps(Path(folder), options.out, "cpu" if options.rehearse else "cuda").items():
            results[name] = run(*step)
            (options.out / "gpu.json").write_text(json_text(results, indent=1) + "\n")
    return int(any(isinstance(step, dict) and step.get("status", 0) != 0 for step in results.values()))


if __name__ == "__main__":
    sys.exit(main())
