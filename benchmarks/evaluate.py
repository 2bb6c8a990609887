"""Evaluate a model on problem sets: ``python -m benchmarks.evaluate --policy DIR --sets gsm8k math500 --samples 8``.

The model is a folder or a hub id, which our engine runs, or one of an OpenAI-compatible server (``--server
http://localhost:8000/v1``; a key, if it needs one, is in OPENAI_API_KEY). Greedy accuracy, avg@k and pass@k with
intervals are printed and written to ``runs/evaluate-<hash>/results.json``. Every completion is a line of
``<set>/completions.jsonl`` as soon as it ends, so that the same command goes on after a kill. ``<set>/outcomes.json``
is what ``python -m benchmarks.compare --from ONE/gsm8k/outcomes.json OTHER/gsm8k/outcomes.json`` compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import UsageError
from registry.command import assignment, command
from registry.paths import WriteFolder

if TYPE_CHECKING:
    from benchmarks.answers.engine import Engine
    from benchmarks.answers.kept import Answers
    from benchmarks.answers.server import Server
    from benchmarks.answers.settings import Settings
    from benchmarks.answers.summary import SetResult
    from envs.problem import Problems

NEW_TOKENS = 512
SECONDS_BETWEEN_LINES = 10


@command(interrupted="the same command goes on with what is missing")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 2 on bad input, 130 when interrupted."""
    given = _parser().parse_args(arguments)
    if given.list:
        from benchmarks.comparison.catalogue import evaluated

        print("\n\n".join("\n".join(kind.lines()) for kind in evaluated()))
        return 0
    _check(given)
    return evaluate(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="show all names: of problem sets and templates")
    parser.add_argument("--policy", help="tiny (built in, the default), a folder or a hub id; its name on a server")
    parser.add_argument("--server", help="address of an OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--sets", nargs="+", default=["arithmetic"], metavar="SET", help="names, files or hub ids")
    parser.add_argument("--split", default="test", help="of the sets (default test)")
    parser.add_argument(
        "--limit", type=int, default=0, help="first problems of each set (default all; of generated ones 256)"
    )
    parser.add_argument("--template", help="how a question becomes a prompt (default plain; chat with --server)")
    parser.add_argument("--samples", type=int, default=4, help="k of avg@k and pass@k; 0 for greedy alone (default 4)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled completions (default 1)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="budget of a completion (default 512, or half of a shorter context)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="problem_options.SET.FIELD, or body.FIELD of a server's requests (body.top_p=0.95; null leaves one out)",
    )
    parser.add_argument("--label", help="what a comparison calls the model (default: the name of its folder)")
    parser.add_argument("--out", action=WriteFolder, help="folder of all files (default: runs/evaluate-<hash>)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of our engine (default: what is fast here)",
    )
    parser.add_argument("--device", default="cpu", help="of our engine: cpu or cuda")
    parser.add_argument("--slots", type=int, default=256, help="completions of our engine at a time, at most")
    parser.add_argument("--threads", type=int, help="CPU threads of our engine (default: torch's)")
    parser.add_argument("--jobs", type=int, default=16, help="requests to a server at a time (default 16)")
    parser.add_argument("--tokenizer", help="of a server's model, which says whether its prompts open a thought")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Raise ``UsageError`` for numbers that make no sense."""
    for name, least in (("limit", 0), ("samples", 0), ("max_new_tokens", 2), ("slots", 1), ("jobs", 1), ("threads", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if not 0 < given.temperature < math.inf:
        raise UsageError(
            f"--temperature {given.temperature:g} must be a number above 0: greedy completions are written anyway"
        )
    if given.seed < 0:
        raise UsageError(f"--seed {given.seed} must be at least 0")
    if given.server is not None and not re.match(r"https?://", given.server):
        raise UsageError(f"--server {given.server!r} is no address: give one such as http://localhost:8000/v1")
    if given.tokenizer is not None and not given.server:
        raise UsageError("--tokenizer is of a server's model: a model of our engine has its own")


def evaluate(given: argparse.Namespace) -> int:
    """Write what is missing, and the results."""
    from benchmarks.answers.kept import Answers
    from benchmarks.answers.summary import outcomes, summarise, table
    from benchmarks.measuring.durable import json_text, locked, storage_errors, write_whole
    from benchmarks.measuring.provenance import provenance
    from benchmarks.measuring.table import console

    settings = settings_of(given)
    loaded = {name: load(name, settings) for name in settings.sets}
    writer = _writer(settings, given)
    out = given.out or Path("runs") / f"evaluate-{settings.hash}"
    folders = folder_names(settings.sets)
    label = given.label or Path(settings.model).name
    results: list[SetResult] = []
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        settings.claim(out)
        write_whole(out / "provenance.json", json_text(provenance(), indent=2) + "\n")
        for name, problems in loaded.items():
            folder = out / folders[name]
            folder.mkdir(exist_ok=True)
            answers = Answers(folder / "completions.jsonl")
            with answers.open():
                write(writer, name, problems, answers, settings, given.quiet)
            results.append(summarise(problems.name, answers, settings.samples))
            told = outcomes(label, problems.name, answers, settings)
            write_whole(folder / "outcomes.json", json_text(told) + "\n")
        figures = {"label": label, "sets": [result.as_json() for result in results]}
        write_whole(out / "results.json", json_text(figures, indent=2) + "\n")
    if not given.quiet:
        console().print(table(results))
        print(out)
    return 0


def settings_of(given: argparse.Namespace) -> Settings:
    """The command line as settings. Raises ``UsageError`` for names that are not known."""
    from benchmarks.answers.server import model_name
    from benchmarks.answers.settings import Settings
    from benchmarks.experiment.data import fingerprint_data
    from policies.dtype import settle_dtype
    from policies.pretrained.fingerprint import fingerprint
    from registry import templates

    server = (given.server or "").rstrip("/")
    template = ("chat" if server else "plain") if given.template is None else given.template
    templates.check(template)
    named = "tiny" if given.policy is None else given.policy
    model = model_name(server, given.policy) if server else named
    options, body = _assigned(given)
    return Settings(
        model=model,
        server=server,
        weights=None if server else fingerprint(model),
        data=fingerprint_data(given.sets),
        sets=tuple(dict.fromkeys(given.sets)),
        split=given.split,
        limit=given.limit,
        problem_options=options,
        template=template,
        max_new_tokens=given.max_new_tokens or _budget(None if server else model),
        samples=given.samples,
        temperature=given.temperature,
        seed=given.seed,
        dtype=None if server else settle_dtype(given.dtype, model, given.device),
        body=body,
    )


def _budget(policy: str | None) -> int:
    """Of a completion, in tokens: half of the context of a policy that has less than ``2 * NEW_TOKENS``."""
    from policies.pretrained.load import load_config

    positions = getattr(load_config(policy), "max_position_embeddings", None) if policy else None
    return min(NEW_TOKENS, positions // 2) if positions else NEW_TOKENS


def _assigned(given: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Options of problem sets, and fields of requests, of ``--set``."""
    options: dict[str, dict[str, Any]] = {}
    body: dict[str, Any] = {}
    for text in given.set:
        name, value = assignment(text)
        kind, _, rest = name.partition(".")
        source, _, field = rest.rpartition(".")  # a file's name has dots
        if kind == "body" and rest and given.server:
            body[rest] = _guess(value)
        elif kind == "problem_options" and source in given.sets and field:
            options.setdefault(source, {})[field] = _guess(value)
        else:
            raise UsageError(
                f"--set {text}: give problem_options.SET.FIELD of one of the --sets ({', '.join(given.sets)}), or "
                "body.FIELD with a --server"
            )
    return options, body


def _guess(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def load(name: str, settings: Settings) -> Problems:
    """The problems of a set, all of which the verifier can judge."""
    from envs.problems import load_problems

    problems = load_problems(name, settings.split, **settings.options(name))
    if problems.size is None:
        raise UsageError(f"{problems.name} has no end: say how many of its problems to take (--limit 256)")
    return problems


def folder_names(sets: Sequence[str]) -> dict[str, str]:
    """Each set's name as that of a folder; of names that would have one, the later ones with a digest of theirs."""
    folders: dict[str, str] = {}
    for name in sets:
        folder = re.sub(r"[^\w.-]+", "_", name).strip("._") or "set"
        taken = folder.casefold() in (other.casefold() for other in folders.values())
        folders[name] = f"{folder}-{hashlib.sha256(name.encode()).hexdigest()[:6]}" if taken else folder
    return folders


def _writer(settings: Settings, given: argparse.Namespace) -> Engine | Server:
    if settings.server:
        from benchmarks.answers.server import Server

        return Server.of(settings, given.jobs, given.tokenizer)
    import torch

    from benchmarks.answers.engine import Engine

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    return Engine.of(settings, given.slots, given.device)


def write(
    writer: Engine | Server, name: str, problems: Problems, answers: Answers, settings: Settings, quiet: bool
) -> None:
    """Write what is missing of a set, told of as it comes."""
    from benchmarks.answers.kept import GREEDY, SAMPLED, Answer

    kinds = {GREEDY: 1, SAMPLED: settings.samples}
    size = problems.size or 0
    with _Progress(problems.name, size * sum(kinds.values()), len(answers), quiet) as progress:

        def keep(answer: Answer) -> None:
            answers.add(answer)
            progress.show(len(answers))

        for kind, samples in kinds.items():
            if missing := answers.missing(kind, size, samples):
                writer.write(name, problems, kind, missing, keep)


class _Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, name: str, total: int, done: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.quiet, self.live = quiet, console.is_terminal and not quiet
        self.name, self.total = name, total
        self.bar = Progress(console=console, disable=not self.live)
        self.job = self.bar.add_task(name, total=total, completed=done)
        self.told = time.monotonic()

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int) -> None:
        """Tell how many completions are there."""
        self.bar.update(self.job, completed=done)
        if not self.quiet and not self.live and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            print(f"{self.name}: {done} of {self.total} completions", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
