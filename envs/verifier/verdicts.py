"""A verdict on a completion: never an exception, never a hang, the same whatever came before.

Most answers are settled here, in process: one candidate is extracted (``extract``), brought into one notation
(``notation``) and compared as literal, text or structure (``compare``). Expressions that agree in double precision are
settled by worker processes (``pool``, ``child``) under a deadline and a memory limit. Settled comparisons are cached,
timeouts never.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import lru_cache
from typing import Any

from envs.problem import Problem, Verdict
from envs.verifier.compare import Comparer, InProcess, NeedsWorker
from envs.verifier.extract import Extraction, completion_text, extract
from envs.verifier.gold import read_gold, unparsed_parts, unreadable
from envs.verifier.nodes import Unreadable
from envs.verifier.notation import normalise
from envs.verifier.pool import WorkerPool
from registry import UsageError

MAX_CANDIDATE = 1024
"""Longer candidates (or four times the gold, if that is more) are no answers."""
MAX_SHOWN = 256
"""``Verdict.extracted`` is cut to this length: it goes into every info and log."""
CACHE_SIZE = 65536

_SETTLED: dict[tuple[str, str], str] = {}
_COMPARER = Comparer(InProcess())
_notation = lru_cache(maxsize=16384)(normalise)


class Verifier:
    """Verdicts on completions.

    Args:
        extract: completion -> its one candidate answer, or why there is none (``extract``). A template has the one that
            fits the completions written for it.
        deadline: seconds of processor time that a symbolic comparison may take once a worker has begun it; on the
            clock it ends after two and a half times that.
        workers: worker processes. With the defaults all verifiers of a process share one pool.
        megabytes: address space of a worker.
    """

    def __init__(
        self,
        extract: Callable[[str], Extraction] = extract,
        deadline: float = 2.0,
        workers: int = 1,
        megabytes: int = 1024,
    ) -> None:
        if deadline <= 0 or workers < 1 or megabytes < 256:
            raise UsageError(
                f"deadline={deadline!r}, workers={workers!r}, megabytes={megabytes!r}: "
                "the deadline must be positive, with at least 1 worker of 256 megabytes"
            )
        self.extract = extract
        self.pool = _shared_pool(workers, deadline, megabytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the settings; their worker pool is the one of the process that they arrive in."""
        return type(self), (self.extract, self.pool.deadline, self.pool.workers, self.pool.megabytes)

    def verify(self, completion: Any, problem: Any) -> Verdict:
        """The verdict on one completion.

        Args:
            completion: text, or a list of chat messages, of which the last of the assistant counts.
            problem: a ``Problem``, or the bare gold answer as a data set has it (``gold.read_gold``).

        Raises:
            UsageError: a gold answer that the verifier cannot read, or a completion that is neither text nor messages;
                no text of a completion raises.
        """
        return self.submit(completion, problem).result()

    def verify_batch(self, pairs: Sequence[tuple[Any, Any]]) -> list[Verdict]:
        """Verdicts of (completion, problem) pairs, in order; the symbolic ones run side by side in the workers."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def submit(self, completion: Any, problem: Any) -> Future[Verdict]:
        """The verdict as a future, which is already finished unless a worker is needed."""
        if isinstance(problem, Problem):
            gold, scorer, others = problem.answer, problem.scorer, problem.alternatives
        else:
            gold, scorer, others = problem, "", ()
        if not scorer:
            golds = _golds(gold) if type(gold) is str else tuple(map(_notation, _checked(gold)))
            for other in others:
                golds += _golds(other)
        candidate, why = self.extract(completion if type(completion) is str else completion_text(completion))
        if why:
            return _ready(Verdict(0.0, "", why))
        shown = candidate[:MAX_SHOWN]
        if len(candidate) > MAX_CANDIDATE and len(candidate) > 4 * max(map(len, (str(gold), *others))):
            return _ready(Verdict(0.0, shown, "unsupported"))
        if scorer:
            return self._score(scorer, gold, candidate, shown)
        answer = _notation(candidate)
        if len(golds) > 1:
            return _best([self._compare((other, answer), shown) for other in golds])
        return self._compare((golds[0], answer), shown)

    def _compare(self, key: tuple[str, str], shown: str) -> Future[Verdict]:
        status = _SETTLED.get(key)
        if status is None:
            status = settle_in_process(*key)
            if status == "open":
                return self._from_worker("compare", key, shown)
            _remember(key, status)
        return _ready(_verdict(status, shown))

    def _score(self, scorer: str, gold: str, candidate: str, shown: str) -> Future[Verdict]:
        key = (scorer, candidate)
        status = "right" if candidate.strip() == gold.strip() else _SETTLED.get(key)
        return _ready(_verdict(status, shown)) if status else self._from_worker("score", key, shown)

    def _from_worker(self, task: str, key: tuple[str, str], shown: str) -> Future[Verdict]:
        future: Future[Verdict] = Future()

        def finish(reply: Future[str]) -> None:
            error = reply.exception()
            if error is not None:
                warnings.warn(f"no verdict on {shown!r}: {error}", RuntimeWarning, stacklevel=2)
                future.set_result(_verdict("unsupported", shown))
                return
            if reply.result() == "unreadable":
                future.set_exception(unreadable(key[0], "the problem"))
                return
            if reply.result() in ("right", "wrong", "malformed"):
                _remember(key, reply.result())
            future.set_result(_verdict(reply.result(), shown))

        self.pool.submit([task, *key]).add_done_callback(finish)
        return future


def check_gold(value: Any, where: str) -> None:
    """Raise ``UsageError`` unless the verifier reads a gold answer, of any kind that ``verify`` takes, as mathematics
    or as words. ``where`` names the row."""
    for gold in read_gold(value, where):
        for part in unparsed_parts(gold, where):
            if _verifier(extract).pool.submit(["read", part, ""]).result() != "right":
                raise unreadable(gold, where)


def settle_in_process(gold: str, answer: str) -> str:
    """The status of a comparison of normalised texts, or ``open`` if a worker must settle it."""
    try:
        return "right" if _COMPARER.compare(gold, answer) else "wrong"
    except NeedsWorker:
        return "open"
    except Unreadable:
        return "malformed"
    except (RecursionError, ValueError, OverflowError):
        return "unsupported"
    except Exception as error:  # a mistake of ours must not end a run of hours, nor pass unseen
        warnings.warn(
            f"the verifier failed on {answer[:80]!r} for {gold[:80]!r}: {error!r}", RuntimeWarning, stacklevel=3
        )
        return "unsupported"


def verify(completion: Any, problem: Any, extract: Callable[[str], Extraction] = extract) -> Verdict:
    """The verdict on one completion, as ``Verifier.verify`` gives it. Never raises on any text of a completion and
    returns within the workers' deadline.

    >>> verify("So the answer is 42.", "42").status
    'right'
    >>> verify("6 times 7 is 42", "42").status  # no last number is guessed at: the answer has to be marked
    'no_answer'
    >>> verify("#### 0.012", ["0.013", "0.012"]).status  # several accepted answers
    'right'
    """
    return _verifier(extract).verify(completion, problem)


def _checked(value: Any) -> tuple[str, ...]:
    golds = read_gold(value, "the problem")
    for gold in golds:
        unparsed_parts(gold, "the problem")
    return golds


@lru_cache(maxsize=16384)
def _golds(text: str) -> tuple[str, ...]:
    """The accepted answers of a gold, normalised. Raises ``UsageError`` for one that cannot be read; what only
    math-verify may read, a worker sees to."""
    return tuple(map(_notation, _checked(text)))


def _remember(key: tuple[str, str], status: str) -> None:
    # A plain dict needs no lock, which a fork at the wrong moment would leave locked for ever.
    if len(_SETTLED) >= CACHE_SIZE:
        _SETTLED.clear()
    _SETTLED[key] = status


def _verdict(status: str, shown: str) -> Verdict:
    return Verdict(1.0 if status == "right" else 0.0, shown, status)


_LIKELIEST = ("malformed", "wrong", "unsupported", "timeout", "right")
"""Statuses in ascending order: of several accepted answers the one with the last of them tells the verdict."""


def _best(verdicts: list[Future[Verdict]]) -> Future[Verdict]:
    """The verdict against several accepted answers, once all are there."""
    best: Future[Verdict] = Future()

    def finish(_: Future[Verdict] | None = None) -> None:
        if not all(verdict.done() for verdict in verdicts):
            return
        with suppress(InvalidStateError):  # two workers may end at once: one of them tells
            error = next((error for verdict in verdicts if (error := verdict.exception())), None)
            if error is not None:
                best.set_exception(error)
            else:
                best.set_result(max((v.result() for v in verdicts), key=lambda v: _LIKELIEST.index(v.status)))

    for verdict in verdicts:
        if not verdict.done():
            verdict.add_done_callback(finish)
    finish()
    return best


def _ready(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


@lru_cache(maxsize=64)
def _shared_pool(workers: int, deadline: float, megabytes: int) -> WorkerPool:
    return WorkerPool(workers, deadline, megabytes)


@lru_cache(maxsize=16)
def _verifier(extract: Callable[[str], Extraction]) -> Verifier:
    return Verifier(extract)
