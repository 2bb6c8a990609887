"""Everything that wants a GPU in one command of about ten minutes: tests, speed, a learning run.

    python -m benchmarks.gpu --policy FOLDER --out runs/gpu

Without ``--policy`` speed is measured on random weights in the shapes of Qwen2.5-1.5B and the built-in model learns, so
that nothing has to be downloaded; with it both are of that model, by the preset ``smollm2-gpu``. Each step has a
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
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from envs.task import load_tokenizer

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**shapes))
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer("builtin").save_pretrained(folder)


def steps(model: Path, given: str | None, out: Path, device: str) -> dict[str, tuple[list[str], int]]:
    """Per step its command and its deadline in seconds; ``given`` is the policy that the user named, if any."""
    python = [sys.executable, "-m"]
    speed = [*python, "benchmarks.throughput", "--policy", given or str(model), "--device", device]
    size = "--prompts 16 --group-size 16 --slots 256 --batch 256 --workload forced --iteration"
    size += " --new-tokens 64 --pairs 3" if device == "cuda" else " --new-tokens 8 --pairs 2"
    files = ["--json", str(out / "throughput.json"), "--picture", str(out / "throughput.png")]
    learn = [*python, "benchmarks.compare", "--set", f"device={device}", "--runs", str(out / "runs")]
    if given is None:
        learn += ["--agents", "reft", "nested-reft/uniform/practical", "--seeds", "2"]
    else:
        learn += ["--preset", "smollm2-gpu", "--policy", given, "--seeds", "2", "--seconds", "128", "--jobs", "4"]
    return {
        "tests": ([*python, "pytest", "-q", "-n", "4", "-m", "gpu", "tests"], 120),
        "throughput": ([*speed, *size.split(), *files], 180),
        "learning": ([*learn, "--out", str(out / "learning")], 290),
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
    parser.add_argument("--policy", help="a model folder or a hub id (default: random weights, and the built-in model)")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on a CPU with a small random model")
    options = parser.parse_args(arguments)
    import torch

    from benchmarks.measuring.durable import json_text
    from benchmarks.measuring.provenance import provenance
    from policies.pretrained.load import locate

    if options.policy is not None:
        locate(options.policy)
    if not options.rehearse and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device: run this where there is one, or give --rehearse")
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {"provenance": provenance()}
    with tempfile.TemporaryDirectory() as folder:
        if options.policy is None:
            random_model(Path(folder), SMALL if options.rehearse else SHAPES)
        device = "cpu" if options.rehearse else "cuda"
        for name, step in steps(Path(folder), options.policy, options.out, device).items():
            results[name] = run(*step)
            (options.out / "gpu.json").write_text(json_text(results, indent=1) + "\n")
    return int(any(isinstance(step, dict) and step.get("status", 0) != 0 for step in results.values()))


if __name__ == "__main__":
    sys.exit(main())
