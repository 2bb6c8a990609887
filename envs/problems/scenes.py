"""Word-problem stories: what happens (the steps of a calculation) and the many ways to tell it.

A story is drawn in three forms. A *chain* follows one quantity through events; a *comparison* relates the belongings of
two people; a *purchase* adds up costs, its facts told in any order. Numbers are always written in digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

OPERATIONS = "+-*/"


@dataclass(frozen=True)
class Step:
    """One operation on whole numbers; ``op`` is one of ``OPERATIONS``."""

    left: int
    op: str
    right: int

    @property
    def result(self) -> int:
        return {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "*": self.left * self.right,
            "/": self.left // self.right,
        }[self.op]

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


@dataclass(frozen=True)
class Story:
    """A told calculation: the theme's name, its sentences in order (the last one asks), the numbers that the
    calculation needs, and the steps."""

    theme: str
    sentences: tuple[str, ...]
    operands: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result


@dataclass(frozen=True)
class Size:
    """How large a story is: number of steps, operations allowed, largest added number, largest factor, and largest
    value of any step."""

    steps: int
    operations: str
    operand: int
    factor: int
    value: int


LEVELS = {
    1: Size(steps=2, operations="+-", operand=10, factor=5, value=30),
    2: Size(steps=2, operations="+-*/", operand=20, factor=6, value=60),
    3: Size(steps=3, operations="+-*/", operand=20, factor=9, value=99),
    4: Size(steps=3, operations="+-*/", operand=60, factor=12, value=250),
}
"""Degrees of difficulty."""
DEFAULT_LEVELS = (1, 2, 3)
DISTRACTED_LEVEL = 4
"""The level whose stories hold a number that is not needed."""


@dataclass(frozen=True)
class Theme:
    """The phrases of a chain. ``{N}`` the person, ``{M}`` another, ``{he}`` the pronoun, ``{o}`` the things, ``{n}``
    the number, ``{k}`` the number of groups."""

    name: str
    things: tuple[str, ...]
    start: tuple[str, ...]
    groups: tuple[str, ...]
    add: tuple[str, ...]
    subtract: tuple[str, ...]
    multiply: tuple[str, str]
    divide: tuple[str, str]
    ask: tuple[str, ...]


THEMES = (
    Theme(
        "collection",
        ("apples", "cards", "coins", "books", "shells"),
        ("{N} has {n} {o}.", "{N} starts with {n} {o}."),
        ("{N} has {k} bags with {n} {o} each.", "{N} has {n} {o} in each of {k} bags."),
        ("{he} finds {n} more.", "{he} gets {n} {o} from {M}.", "{M} gives {N} {n} more."),
        ("{he} loses {n}.", "{he} gives {n} to {M}.", "{M} takes {n} of the {o}."),
        ("{he} sells the {o} for {n} dollars each.", "How many dollars does {N} get?"),
        ("{he} shares the {o} with {n} friends equally.", "How many {o} does each get?"),
        ("How many {o} does {N} have now?", "How many {o} are left?"),
    ),
    Theme(
        "bus",
        ("people", "children"),
        ("A bus has {n} {o}.", "There are {n} {o} on a bus."),
        ("A bus has {k} rows with {n} {o} each.", "{n} {o} sit in each of {k} rows of a bus."),
        ("{n} more get on.", "At a stop {n} {o} get on."),
        ("{n} get off.", "At a stop {n} {o} get off."),
        ("Each pays {n} dollars.", "How many dollars do they pay?"),
        ("They form {n} equal teams.", "How many {o} are in each team?"),
        ("How many {o} are on the bus now?", "How many {o} are left?"),
    ),
    Theme(
        "bakery",
        ("cakes", "rolls", "pies"),
        ("A baker makes {n} {o}.", "There are {n} {o} in a shop."),
        ("A baker fills {k} trays with {n} {o} each.", "There are {n} {o} on each of {k} trays."),
        ("Then {n} more are made.", "{M} bakes {n} more {o}."),
        ("{n} are sold.", "{M} eats {n} of the {o}."),
        ("Each is sold for {n} dollars.", "How many dollars is that?"),
        ("They are put into {n} equal boxes.", "How many {o} are in each box?"),
        ("How many {o} are there now?", "How many {o} are left?"),
    ),
    Theme(
        "garden",
        ("trees", "roses", "plants"),
        ("{N} plants {n} {o}.", "A garden has {n} {o}."),
        ("{N} plants {k} rows of {n} {o}.", "A garden has {k} rows of {n} {o}."),
        ("{M} plants {n} more.", "Then {n} more {o} grow."),
        ("{n} of the {o} die.", "{M} cuts down {n}."),
        ("Each needs {n} cups of water.", "How many cups are needed?"),
        ("They stand in {n} equal rows.", "How many {o} are in each row?"),
        ("How many {o} are there now?", "How many {o} are left?"),
    ),
)
PEOPLE = (("Mia", "she"), ("Ana", "she"), ("Eva", "she"), ("Tom", "he"), ("Ben", "he"), ("Leo", "he"))
GOODS = (("pens", "a bag"), ("toys", "a game"), ("cups", "a lamp"), ("hats", "a coat"))
DISTRACTIONS = ("{M} is {n} years old.", "It is {n} degrees outside.", "This takes {n} minutes.")


def chain(rng: Random, size: Size) -> Story | None:
    """One quantity through ``size.steps`` events: a start (plain, or equal groups), gains and losses, and perhaps a
    closing sale or sharing-out. None if the numbers drawn do not work out."""
    theme = rng.choice(THEMES)
    words = _cast(rng, o=rng.choice(theme.things))
    first, last = "*" in size.operations and rng.random() < 0.4, rng.choice("*//+-+-")
    middle = size.steps - first - (last in "*/")
    if middle < 0 or not set(last) <= set(size.operations):
        return None
    value = rng.randint(2, size.factor if first else size.operand)
    operands, steps = [value], []
    if first:
        groups = rng.randint(2, size.factor)
        operands.append(groups)
        steps.append(Step(groups, "*", value))
        told = [_tell(rng, theme.groups, words, n=value, k=groups)]
    else:
        told = [_tell(rng, theme.start, words, n=value)]
    ops = [rng.choice("+-") for _ in range(middle)] + ([last] if last in "*/" else [])
    for op in ops:
        current = steps[-1].result if steps else value
        right = _operand(rng, op, current, size)
        if right is None:
            return None
        operands.append(right)
        steps.append(Step(current, op, right))
        phrases = {"+": theme.add, "-": theme.subtract, "*": theme.multiply[:1], "/": theme.divide[:1]}[op]
        told.append(_tell(rng, phrases, words, n=right))
    ask = {"*": theme.multiply[1:], "/": theme.divide[1:]}.get(last, theme.ask)
    return Story(theme.name, (*told, _tell(rng, ask, words)), tuple(operands), tuple(steps))


def comparison(rng: Random, size: Size) -> Story | None:
    """Two people of whom one has more, fewer or some times as many things; asks for the sum, after a gain or loss if
    there are three steps."""
    words = _cast(rng, o=rng.choice(THEMES[0].things))
    op = rng.choice([op for op in "+-*" if op in size.operations])
    own = rng.randint(2, size.operand)
    other = _operand(rng, op, own, size)
    if other is None:
        return None
    relation = {"+": "{M} has {n} more than {N}.", "-": "{M} has {n} fewer than {N}."}
    facts = [
        _tell(rng, ("{N} has {n} {o}.",), words, n=own),
        _tell(rng, (relation.get(op, "{M} has {n} times as many as {N}."),), words, n=other),
    ]
    if rng.random() < 0.5:
        facts.reverse()
    steps = [Step(own, op, other)]
    steps.append(Step(own, "+", steps[0].result))
    operands = [own, other]
    if size.steps == 3:
        op = rng.choice("+-")
        change = rng.randint(2, size.operand)
        steps.append(Step(steps[1].result, op, change))
        operands.append(change)
        facts.append(_tell(rng, ("They find {n} more." if op == "+" else "They lose {n}.",), words, n=change))
    facts.append(_tell(rng, ("How many {o} do they have together?", "How many {o} do both have in all?"), words))
    return Story("comparison", tuple(facts), tuple(operands), tuple(steps))


def purchase(rng: Random, size: Size) -> Story | None:
    """Several goods at one price and another thing; asks for the sum, or for the change if there are three steps."""
    if "*" not in size.operations:
        return None
    goods, thing = rng.choice(GOODS)
    words = _cast(rng, o=goods)
    count, price, extra = rng.randint(2, size.factor), rng.randint(2, size.factor), rng.randint(2, size.operand)
    steps = [Step(count, "*", price)]
    steps.append(Step(steps[0].result, "+", extra))
    operands = [count, price, extra]
    many = ("{N} buys {k} {o} for {n} dollars each.", "{N} pays {n} dollars for each of {k} {o}.")
    one = (f"{{N}} buys {thing} for {{n}} dollars.", f"{thing.capitalize()} costs {{N}} {{n}} dollars.")
    facts = [_tell(rng, many, words, n=price, k=count), _tell(rng, one, words, n=extra)]
    if size.steps == 2:
        rng.shuffle(facts)
        ask = ("How many dollars does {N} pay in all?", "How many dollars does {N} spend?")
    else:
        paid = steps[1].result + rng.randint(1, size.operand)
        operands.append(paid)
        steps.append(Step(paid, "-", steps[1].result))
        facts.append(_tell(rng, ("{N} has {n} dollars.", "{N} brings {n} dollars."), words, n=paid))
        rng.shuffle(facts)
        ask = ("How many dollars are left?", "How many dollars does {N} have now?")
    return Story("purchase", (*facts, _tell(rng, ask, words)), tuple(operands), tuple(steps))


FORMS = (chain, chain, chain, comparison, purchase)


def distraction(rng: Random) -> str:
    """A sentence with a number that no calculation needs."""
    return _tell(rng, DISTRACTIONS, _cast(rng), n=rng.randint(2, 99))


def _cast(rng: Random, **more: str) -> dict[str, str]:
    person, pronoun = rng.choice(PEOPLE)
    other = rng.choice([name for name, its in PEOPLE if its != pronoun])  # so that every pronoun has one reading
    return {"N": person, "he": pronoun, "M": other, **more}


def _tell(rng: Random, phrases: tuple[str, ...], words: dict[str, str], **numbers: int) -> str:
    sentence = rng.choice(phrases).format(**words, **numbers)
    return sentence[0].upper() + sentence[1:]


def _operand(rng: Random, op: str, current: int, size: Size) -> int | None:
    """A right operand with which ``current op right`` stays a positive whole number; None if there is none."""
    if op == "*":
        return rng.randint(2, size.factor)
    if op == "+":
        return rng.randint(2, size.operand)
    if op == "-":
        return rng.randint(2, min(size.operand, current - 1)) if current > 2 else None
    divisors = [n for n in range(2, size.factor + 1) if current % n == 0 and current > n]
    return rng.choice(divisors) if divisors else None
