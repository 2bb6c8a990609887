"""How fast completions are written: the engine at several depths against transformers' generate and other engines.

    python -m benchmarks.throughput                                  the built-in model
    python -m benchmarks.throughput --policy FOLDER --dtype bfloat16 --prompts 64 --new-tokens 128 --json FILE
    python -m benchmarks.throughput --policy FOLDER --vllm .venv-vllm/bin/python --openvino .venv-openvino/bin/python

Every ratio is a median over ABBA pairs of blocks, with a bootstrap interval; the first row is the engine against itself
(A/A), whose interval should hold 1. Rollouts go through the environment, verdicts included. vLLM and OpenVINO write in
processes of their own, which wait while others are measured.
"""

from __future__ import annotations

import argparse
import sys

from registry import UsageError
from registry.command import command
from registry.paths import WriteFile, WritePicture

SKIPS = (1, 2, 4, 8)
QUICK_SKIPS = (2, 4)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.split("\n")[0])
    options.add_argument("--policy", default="tiny", help="a model folder, a hub id or 'tiny'")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the products (default: what is fast here)",
    )
    options.add_argument("--problems", default="arithmetic", help="a known set, a file, a folder, a hub id")
    options.add_argument("--split", default="train", help="of the problems (default train)")
    options.add_argument("--template", default="plain", help="of the prompts, see envs.templates (default plain)")
    options.add_argument("--prompts", type=int, help="problems a block (default 32; quick, a model of yours: 8)")
    options.add_argument("--group-size", type=int, default=8, help="completions a problem")
    options.add_argument("--new-tokens", type=int, help="longest completion (default 64; quick, a model of yours: 16)")
    options.add_argument(
        "--slots", type=int, default=64, help="completions that the engine writes at a time (default 64)"
    )
    options.add_argument("--pairs", type=int, default=8, help="pairs of blocks a ratio")
    options.add_argument("--skips", nargs="*", type=int, help="numbers of skipped layers (default 1 2 4 8; quick: 2 4)")
    options.add_argument("--batch", type=int, help="of transformers' generate (default: the fastest of 32, 64 and 128)")
    options.add_argument("--alone", action="store_true", help="no engine but the project's own: what its depths take")
    options.add_argument("--continuous", action="store_true", help="also transformers' continuous batching (slow)")
    options.add_argument("--vllm", metavar="PYTHON", help="also vLLM, in the environment of this interpreter")
    options.add_argument("--openvino", metavar="PYTHON", help="also OpenVINO GenAI, likewise (a CPU's)")
    options.add_argument("--iteration", action="store_true", help="also a whole GRPO iteration")
    options.add_argument(
        "--trl",
        action="store_true",
        help="also a whole GRPO iteration against TRL's (needs trl); with --vllm, vLLM writes TRL's",
    )
    options.add_argument("--workload", choices=("forced", "natural", "both", "none"), help="lengths")
    options.add_argument("--threads", type=int, help="of torch (default: all cores)")
    options.add_argument("--quick", action="store_true", help="under three minutes: 3 pairs, skips 0, 2, 4, less work")
    options.add_argument("--json", action=WriteFile, help="write the rows here")
    options.add_argument("--picture", action=WritePicture, help="write a picture here (png, svg)")
    return options


def chosen_skips(options: argparse.Namespace, layers: int) -> tuple[int, ...]:
    """Numbers of skipped layers: those given, else those of the default that the model has room for."""
    if options.skips is None:
        return tuple(skips for skips in (QUICK_SKIPS if options.quick else SKIPS) if skips < layers - 1)
    for skips in options.skips:
        if not 0 < skips < layers - 1:
            raise UsageError(f"--skips {skips}: give 1 to {layers - 2}, the first and the last layer are kept")
    return tuple(options.skips)


def settle_work(options: argparse.Namespace) -> None:
    """Set what the command line left open. A quick comparison of a model of the user's has one wave of short
    completions a block, and forced length alone; pairs and their order are those of the others."""
    from policies.pretrained.load import BUILT_IN

    small = options.quick and options.policy not in BUILT_IN
    for name, usual, quick in (("prompts", 32, 8), ("new_tokens", 64, 16), ("workload", "both", "forced")):
        if getattr(options, name) is None:
            setattr(options, name, quick if small else usual)
    if options.quick:
        options.pairs = min(options.pairs, 3)
        options.batch = options.batch or 64


@command(interrupted="--json keeps the rows so far")
def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 for bad input."""
    options = parser().parse_args(arguments)
    for name in ("prompts", "group_size", "new_tokens", "slots", "pairs", "batch", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    for name in ("vllm", "openvino", "continuous", "batch"):
        if options.alone and getattr(options, name):
            raise UsageError(f"--alone measures no other engine: leave out one of it and --{name}")
    settle_work(options)
    import torch

    from benchmarks.speed.rows import all_rows
    from benchmarks.speed.shown import draw, record_rows, show
    from policies import Policy
    from policies.dtype import settle_dtype

    torch.set_num_threads(options.threads or torch.get_num_threads())
    options.dtype = settle_dtype(options.dtype, options.policy, options.device)
    policy = Policy.load(options.policy, options.device, options.dtype)
    options.skips = chosen_skips(options, policy.num_layers)
    rows = record_rows(all_rows(policy, options), options.json)
    show(rows)
    if options.picture:
        draw(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
