"""Look at a problem set before spending hours on it.

    python -m envs.inspect gsm8k --split train data_dir=data limit=1000
    python -m envs.inspect questions.csv --template chat --tokenizer path/to/model question=text

Shows rows with their rendered prompts, the kinds of gold answers, prompt lengths in tokens, the most frequent answer
(what a constant guess scores), repeated questions, and questions that the other split also has.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from itertools import islice
from typing import Any

from envs.problem import Problem, Problems
from envs.problems import duplicates, has_one_split, load_problems, overlap, source_of
from envs.templates import Template
from envs.verifier.literal import Literal
from envs.verifier.notation import normalise
from envs.verifier.structure import read
from registry import UsageError, check_at_least, fields_of, templates
from registry.command import assignment, command

UNLIMITED_SAMPLE = 1000


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; a value is JSON where it can be, otherwise text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, value = assignment(pair, "option")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def answer_kind(problem: Problem) -> str:
    """What the gold answer is: integer, fraction, words, list, expression ..."""
    if problem.scorer:
        return "own scorer"
    node = read(normalise(problem.answer))
    return node.form if isinstance(node, Literal) else getattr(node, "kind", type(node).__name__.lower())


def describe(problems: Problems, chosen: Template, tokenizer: Any, shown: int) -> str:
    """The report on one source, as text."""
    if problems.size is None:
        rows = [problems[index] for index in range(UNLIMITED_SAMPLE)]
        head = f"{problems.name}: unlimited; the first {len(rows)} problems"
    else:
        rows = [problems[index] for index in range(problems.size)]
        head = f"{problems.name}: {len(rows)} problems"
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(map(answer_kind, rows)).most_common())
    answer, count = Counter(problem.answer for problem in rows).most_common(1)[0]
    lengths = sorted(len(chosen.prompt_ids(problem.question, tokenizer)) for problem in rows)
    quantiles = [lengths[min(len(lengths) - 1, int(share * len(lengths)))] for share in (0.0, 0.5, 0.95, 1.0)]
    lines = [
        head,
        f"answers: {kinds}",
        f"most frequent answer: {answer!r}, {count / len(rows):.1%} of the problems (what a constant guess scores)",
        "prompt tokens: min {}, median {}, 95 % {}, max {}".format(*quantiles),
        f"worked solutions: {sum(bool(problem.solution) for problem in rows)}",
    ]
    for problem in islice(rows, shown):
        prompt = chosen.prompt(problem.question, tokenizer)
        lines += ["", f"--- {problem.id}: gold {problem.answer!r}; prompt:", prompt]
    return "\n".join(lines)


def repetition_line(problems: Problems, pairs: list[tuple[int, int]], other: Problems, what: str) -> str:
    """A line on repeated questions, with the first few."""
    examples = "; ".join(f"{problems[a].id} = {other[b].id}" for a, b in pairs[:3])
    return f"{what}: {len(pairs)}" + (f" ({examples}{' ...' if len(pairs) > 3 else ''})" if pairs else "")


def repetition_lines(
    problems: Problems, name: str, split: str, against: str | None, options: dict[str, Any]
) -> list[str]:
    """Lines on duplicates and on the overlap with another split (or, as ``name:split``, with another set)."""
    if problems.size is None:
        if against:
            raise UsageError(f"--against {against!r}: {name} has no end, so that its questions cannot all be compared")
        return []
    lines = [repetition_line(problems, duplicates(problems), problems, "repeated questions")]
    other_name, _, other_split = against.rpartition("@") if against and "@" in against else (name, "", against)
    whole = {key: value for key, value in options.items() if key not in ("limit", "subset", "shuffle", "omit")}
    guess = None if has_one_split(name) else {"train": "test", "test": "train"}.get(split)
    if against and other_name == name and has_one_split(name):
        raise UsageError(f"--against {against!r}: {name} has no splits; give another set, as in --against SET@{split}")
    if not (other_split or guess):
        return lines
    try:
        if other_name != name:
            known = fields_of(type(source_of(other_name)))
            whole = {key: value for key, value in whole.items() if key in known}
        other = load_problems(other_name, other_split or guess or "", **whole)
    except UsageError as error:
        if against:
            raise
        return [*lines, f"not compared with another split: {error}"]
    if other.size is not None and other.name != problems.name:
        lines.append(repetition_line(problems, overlap(problems, other), other, f"questions also in {other.name}"))
    return lines


@command(errors=(OSError,))
def main(argv: list[str] | None = None) -> int:
    """Show a problem set: rows, prompts, token lengths, repeated questions."""
    parser = argparse.ArgumentParser(prog="python -m envs.inspect", description=main.__doc__)
    parser.add_argument("problems", help="a name, file, folder or hub id, as for envs.problems.load_problems")
    parser.add_argument(
        "options", nargs="*", default=[], metavar="name=value", help="options of load_problems, such as limit=100"
    )
    parser.add_argument("--split", default="train", help="of the problems (default %(default)s)")
    parser.add_argument(
        "--against", help="split (or set@split) to search for the same questions; default the other one"
    )
    parser.add_argument("--template", default="plain", help="of the prompts: a registered name (default %(default)s)")
    parser.add_argument("--tokenizer", default="builtin", help="builtin, a folder or a hub id")
    parser.add_argument("--rows", type=int, default=3, help="rows to show (default %(default)s)")
    args = parser.parse_intermixed_args(argv)
    from envs.task import load_tokenizer

    check_at_least(args.rows, 0, "--rows")
    options = parse_options(args.options)
    if "split" in options:
        raise UsageError(f"split={options['split']} is no option of the problems: write --split {options['split']}")
    chosen: Template = templates.make(args.template)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repetitions are reported below
        problems = load_problems(args.problems, args.split, **options)
        print(describe(problems, chosen, load_tokenizer(args.tokenizer), args.rows))
        print("\n" + "\n".join(repetition_lines(problems, args.problems, args.split, args.against, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
