"""The child process that settles symbolic comparisons: one JSON request a line in, one JSON reply a line out.

A request is ``["compare", gold, answer]`` (normalised texts), ``["read", gold, ""]`` (whether math-verify reads it) or
``["score", scorer, candidate]``. The process limits
its own memory and, per request, its own processor time, and ends when its standard input closes: none outlives the run
that started it. The kernel enforces both limits, whatever the interpreter is busy with.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mpmath  # noqa: F401  (imported before the clock of the first request starts)

from envs.verifier.compare import Comparer, NeedsWorker
from envs.verifier.evaluate import equal, has_value, proportional
from envs.verifier.expression import Tree, parse
from envs.verifier.lexer import NotAnExpression
from envs.verifier.nodes import Unreadable

_COMMANDS = "π pi,· cdot,× times,÷ div,≤ le,≥ ge,≠ ne,≈ approx,∞ infty,∪ cup,∩ cap,∖ setminus,± pm,∓ mp,∈ in,∅ emptyset"
_LATEX = str.maketrans({pair[0]: f"\\{pair[2:]} " for pair in _COMMANDS.split(",")} | {"°": "^{\\circ}", "%": "\\%"})


class UnreadableGold(Exception):
    """math-verify reads nothing in the gold answer."""


class Symbolic:
    """Settles every question about expressions.

    Args:
        announce: tells the parent about an import that takes its time.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce = announce

    def equal(self, gold: Tree, answer: Tree) -> bool:
        return equal(gold, answer)

    def proportional(self, gold: Tree, answer: Tree, positive: bool) -> bool:
        return proportional(gold, answer, positive)

    def equal_unparsed(self, gold: str, answer: str) -> bool:
        """Golds outside of the grammar (integrals, sums, limits) are math-verify's, unless the answer is a number
        beyond all bounds."""
        with suppress(NotAnExpression):
            if not has_value(parse(answer)):
                return False
        self._load()
        return math_verify_equal(gold, answer)

    def can_read(self, gold: str) -> bool:
        """Whether math-verify finds mathematics in a gold outside of the grammar."""
        self._load()
        return bool(math_verify_parse(gold))

    def _load(self) -> None:
        load("math_verify", self.announce, warm_up=lambda: math_verify_equal("\\frac{x}{2}", "0.5 x"))


def math_verify_parse(text: str) -> list[Any]:
    """What math-verify reads in normalised text, by its LaTeX parser alone (its plain-text parser evaluates Python)."""
    import math_verify

    parser = [math_verify.LatexExtractionConfig()]
    return math_verify.parse(f"${to_latex(text)}$", parser, fallback_mode="no_fallback", parsing_timeout=None)


def math_verify_equal(gold: str, answer: str) -> bool:
    """Whether math-verify says that two normalised texts agree. Raises ``UnreadableGold``."""
    import math_verify

    gold_parsed, answer_parsed = math_verify_parse(gold), math_verify_parse(answer)
    if not gold_parsed:
        raise UnreadableGold(gold)
    return bool(answer_parsed) and math_verify.verify(gold_parsed, answer_parsed, timeout_seconds=None)


def to_latex(text: str) -> str:
    """Normalised text with its operators spelt as LaTeX commands again."""
    return text.translate(_LATEX)


def settle(comparer: Comparer, gold: str, answer: str) -> str:
    """``right`` or ``wrong``, ``malformed`` for an unreadable answer, ``unreadable`` for such a gold, or
    ``unsupported`` if it cannot be computed here."""
    try:
        return "right" if comparer.compare(gold, answer) else "wrong"
    except Unreadable:
        return "malformed"
    except UnreadableGold:
        return "unreadable"
    except (NeedsWorker, MemoryError, RecursionError, ArithmeticError, ValueError, TypeError, AttributeError):
        return "unsupported"


def judge(comparer: Comparer, announce: Callable[[str], None], request: list[str]) -> str:
    """The status of a request."""
    task, first, second = request
    if task == "compare":
        return settle(comparer, first, second)
    if task == "read":
        return "right" if Symbolic(announce).can_read(first) else "wrong"
    load("reasoning_gym", announce)
    from envs.verifier.scorers import score

    try:
        return "right" if score(first, second) else "wrong"
    except Exception:  # third-party scorers raise anything on text they did not expect: no full score
        return "malformed"


def load(module: str, announce: Callable[[str], None], warm_up: Callable[[], object] | None = None) -> None:
    """Import a slow module and let it do its first work. That time is not the answer's fault: the parent waits for it
    apart, so that no verdict depends on whether its worker is new."""
    if module not in sys.modules:
        left = signal.setitimer(signal.ITIMER_PROF, 0)[0]
        announce("loading")
        importlib.import_module(module)
        if warm_up:
            warm_up()
        announce("loaded")
        signal.setitimer(signal.ITIMER_PROF, left)


def limit_memory(megabytes: int) -> None:
    """Bound the address space, by less if the system's own bound is tighter. Where the system has no such limit (macOS
    refuses it) the deadline alone protects the parent."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = megabytes << 20 if hard == resource.RLIM_INFINITY else min(megabytes << 20, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(deadline: float, megabytes: int) -> None:
    """Answer requests until standard input closes."""
    limit_memory(megabytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w", buffering=1)

    def reply(line: str) -> None:
        replies.write(line + "\n")

    comparer = Comparer(Symbolic(announce=reply))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # nothing that a library prints may mix with the replies
    os.dup2(nowhere, 2)  # the parent reads what went wrong at the start, and no more
    reply("ready")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, deadline)
        reply(judge(comparer, reply, json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
