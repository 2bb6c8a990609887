"""Generated arithmetic word problems: unlimited, seeded, with worked solutions, train and test disjoint by content.

    problems = Arithmetic(split="test", level=(1, 2))
    problems[0].question, problems[0].answer, problems[0].solution

The numbers that a calculation needs, sorted, decide by a hash which split a problem belongs to: no problem of one split
has the same numbers as any problem of the other, whatever the seed, the story, the operations or their order.

    python -m envs.problems.arithmetic --split train --count 1000 --out problems.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import blake2b
from numbers import Integral
from random import Random

from envs.problem import Problem
from envs.problems.scenes import DEFAULT_LEVELS, DISTRACTED_LEVEL, FORMS, LEVELS, Size, Story, distraction
from registry import UsageError, check_at_least
from registry.command import command
from registry.errors import did_you_mean
from registry.paths import WriteFile

SPLITS = ("train", "test")
TEST_SHARE = 0.2


def split_of(operands: tuple[int, ...]) -> str:
    """The split that a problem with these numbers belongs to, whatever their order."""
    digest = blake2b(",".join(map(str, sorted(operands))).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


class Arithmetic:
    """An unlimited source of word problems; problem ``index`` is a function of (seed, split, level, index) alone.

    Args:
        split: ``"train"`` or ``"test"``.
        level: a difficulty from 1 (two additions or subtractions, numbers up to 10) to 4 (three steps, numbers up to
            60, a number that is not needed), or several, mixed evenly. Repeat a level to weigh it more.
        seed: of the stream of problems.

    Raises:
        UsageError: unknown split or level, negative index.
    """

    size: int | None = None

    def __init__(
        self, split: str = "train", level: int | tuple[int, ...] | list[int] = DEFAULT_LEVELS, seed: int = 0
    ) -> None:
        levels = tuple(level) if isinstance(level, Iterable) else (level,)
        if split not in SPLITS:
            raise UsageError(f"arithmetic has no split {split!r}: {did_you_mean(str(split), SPLITS)}")
        if not levels or not all(isinstance(one, Integral) and one is not True and one in LEVELS for one in levels):
            raise UsageError(
                f"arithmetic level {level!r} is unknown: give one or several of {', '.join(map(str, LEVELS))}"
            )
        self.split, self.levels, self.seed = split, levels, seed
        self.name = f"arithmetic/{split}"

    def __len__(self) -> int:
        """Never: a list of all problems would never end."""
        raise UsageError(f"{self.name} is unlimited and has no length; pass limit=, such as limit=1000")

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int) -> Problem:
        if index < 0:
            raise UsageError(f"problem index {index} is negative: an unlimited source counts from 0")
        rng = Random(f"{self.seed}/{self.split}/{index}")
        level = rng.choice(self.levels)
        story = self._story(rng, LEVELS[level])
        told = list(story.sentences)
        if level == DISTRACTED_LEVEL:
            told.insert(rng.randrange(1, len(told)), distraction(rng))
        steps = "".join(f" {step}." for step in story.steps)
        return Problem(
            question=" ".join(told),
            answer=str(story.answer),
            source=self.name,
            id=f"{story.theme}-{level}-{index}",
            solution=f"{steps} #### {story.answer}",
            theme=story.theme,
        )

    def _story(self, rng: Random, size: Size) -> Story:
        while True:
            story = rng.choice(FORMS)(rng, size)
            if (
                story is not None
                and all(0 < step.result <= size.value for step in story.steps)
                and split_of(story.operands) == self.split
            ):
                return story


@command(errors=(OSError,))
def main(argv: list[str] | None = None) -> int:
    """Write generated problems as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m envs.problems.arithmetic", description=main.__doc__)
    parser.add_argument("--split", default="train", help="train or test (default %(default)s)")
    parser.add_argument("--level", type=int, nargs="+", default=list(DEFAULT_LEVELS), help="1 to 4, one or several")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default %(default)s)")
    parser.add_argument("--count", type=int, default=10, help="problems to write (default %(default)s)")
    parser.add_argument("--out", action=WriteFile, help="file to write (default: standard output)")
    args = parser.parse_args(argv)
    check_at_least(args.count, 1, "--count")
    problems = Arithmetic(args.split, tuple(args.level), args.seed)
    text = "".join(json.dumps(asdict(problems[n])) + "\n" for n in range(args.count))
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
