"""Which layers to skip on a model and data of your own, and how many: the tool to run first.

    python -m benchmarks.divergence                                        the built-in model
    python -m benchmarks.divergence --policy FOLDER --problems svamp --json FILE --picture FILE

Every skip sampler at every number of skipped layers: exact KL(mu || pi) and total variation per token over the whole
vocabulary, on tokens that the *nested* policy mu itself wrote for held-out prompts; D, which decides what corrections
can do; the speed-up by weights, and as measured against the full model in pairs of blocks. Samplers that choose layers
by measured scores choose on other prompts, on tokens that the *full* model wrote. Patches (``--patches``) are fitted on
yet other prompts, to the two nearest samplers at each number of layers and to ``uniform``, or to those of
``--patched``. Where ``uniform`` was measured, each sampler's KL over that of plain ``uniform`` has its interval.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from registry import UsageError
from registry.command import command
from registry.paths import WriteFile, WritePicture


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.divergence", description=__doc__.split("\n")[0])
    options.add_argument("--policy", default="tiny", help="a model folder, a hub id or 'tiny'")
    options.add_argument("--problems", default="arithmetic", help="a known set, a file, a folder, a hub id")
    options.add_argument("--split", default="test", help="of the problems (default test)")
    options.add_argument("--template", default="plain", help="how a question becomes a prompt")
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the products (default: what is fast here)",
    )
    options.add_argument("--samplers", nargs="+", metavar="ID[:FIELD=VALUE,...]", help="default: all that take a ratio")
    options.add_argument(
        "--patches",
        nargs="*",
        default=["heal"],
        metavar="ID[:FIELD=VALUE,...]",
        help="besides 'none' (default heal)",
    )
    options.add_argument("--patched", nargs="+", metavar="SAMPLER", help="samplers to patch; 'all' is long")
    options.add_argument("--fits", type=int, default=1, help="of each patch to each set, on texts of their own")
    options.add_argument("--both-texts", action="store_true", help="fit to what the patched policy writes, too")
    options.add_argument("--skips", nargs="+", type=int, default=[2, 4, 6], help="numbers of skipped layers")
    options.add_argument("--border", type=int, default=1, help="first and last layers that are never skipped")
    options.add_argument("--prompts", type=int, default=16, help="held-out prompts that figures are measured on")
    options.add_argument("--choose-prompts", type=int, default=16, help="other prompts that layers are chosen on")
    options.add_argument("--fit-prompts", type=int, default=32, help="yet other prompts that patches are fitted on")
    options.add_argument("--fit-split", help="that these are of (default --split, other problems)")
    options.add_argument("--new-tokens", type=int, default=48, help="longest completion")
    options.add_argument("--draws", type=int, default=2, help="sets of each sampler that draws at random")
    options.add_argument("--pairs", type=int, default=4, help="pairs of timed blocks per speed-up; 0 times nothing")
    options.add_argument("--budget", type=float, default=0.3, help="largest D, in nats per completion, to recommend")
    options.add_argument("--no-layers", action="store_true", help="leave out the table of single layers")
    options.add_argument("--seed", type=int, default=0, help="of what is drawn and written (default 0)")
    options.add_argument("--threads", type=int, help="of torch (default: all cores)")
    options.add_argument("--json", action=WriteFile, help="write the rows here, as they are measured")
    options.add_argument("--picture", action=WritePicture, help="write the picture here (png, svg)")
    return options


@command(interrupted="--json keeps the rows so far")
def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 for bad input."""
    options = parser().parse_args(arguments)
    check(options)
    import torch

    from benchmarks.layers.bench import make_bench
    from benchmarks.layers.report import against_uniform, arms, draw, layer_table, recommend, table
    from benchmarks.layers.sets import check_names, collect_rows, default_samplers, leave_out_patches, sampler_of

    check_names(options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    bench = make_bench(options)
    most, layers = max(options.skips), bench.policy.num_layers
    if most >= layers:
        raise UsageError(f"--skips {most}: the model has {layers} layers, and one has to stay")
    for spec in options.samplers or default_samplers():
        sampler_of(spec, most / layers, options.border).check(layers)
    leave_out_patches(bench)
    rows = collect_rows(bench)
    singles = [row for row in rows if row["written_by"] == "full model"]
    measured = arms([row for row in rows if row["written_by"] == "nested policy"])
    if singles:
        layer_table(singles)
    table(measured)
    for line in against_uniform([row for row in rows if row["written_by"] == "nested policy"]):
        print(line)
    print(recommend(measured, options.budget))
    if options.picture:
        draw(measured, options.budget, options.picture, f"{Path(options.policy).name} on {options.problems}")
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` for numbers that make no sense."""
    for name, least in (
        ("prompts", 1),
        ("choose_prompts", 1),
        ("fit_prompts", 1),
        ("new_tokens", 1),
        ("fits", 1),
        ("draws", 1),
        ("pairs", 0),
        ("threads", 1),
    ):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {least}")
    if min(options.skips) < 1:
        raise UsageError(f"--skips {min(options.skips)}: give at least 1")
    if not options.budget >= 0:
        raise UsageError(f"--budget {options.budget:g}: give a number of nats, from 0 on")


if __name__ == "__main__":
    sys.exit(main())
