"""A verdict on a completion: never an exception, never a hang, the same whatever came before.

Most answers are settled here, in process: one candidate is extracted (``extract``), brought into one notation
(``notation``) and compared as literal, text or structure (``compare``). Expressions that agree in double precision are
settled by worker processes (``pool``, ``child``) under a deadline and a memory limit. Settled comparisons are cached,
timeouts never.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache

from envs.problem import Problem, Verdict
from envs.verifier.compare import Comparer, InProcess, NeedsWorker
from envs.verifier.extract import Extraction, extract
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

    def verify(self, completion: str, problem: Problem | str) -> Verdict:
        """The verdict on one completion; ``problem`` may be the bare gold answer."""
        return self.submit(completion, problem).result()

    def verify_batch(self, pairs: Sequence[tuple[str, Problem | str]]) -> list[Verdict]:
        """Verdicts of (completion, problem) pairs, in order; the symbolic ones run side by side in the workers."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def submit(self, completion: str, problem: Problem | str) -> Future[Verdict]:
        """The verdict as a future, which is already finished unless a worker is needed."""
        gold = problem.answer if isinstance(problem, Problem) else problem
        candidate, why = self.extract(completion)
        if why:
            return _ready(Verdict(0.0, "", why))
        shown = candidate[:MAX_SHOWN]
        if len(candidate) > max(MAX_CANDIDATE, 4 * len(gold)):
            return _ready(Verdict(0.0, shown, "unsupported"))
        scorer = problem.scorer if isinstance(problem, Problem) else ""
        if scorer:
            return self._score(scorer, gold, candidate, shown)
        key = (_notation(gold), _notation(candidate))
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
            if reply.result() in ("right", "wrong", "malformed"):
                _remember(key, reply.result())
            future.set_result(_verdict(reply.result(), shown))

        self.pool.submit([task, *key]).add_done_callback(finish)
        return future


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


def verify(completion: str, problem: Problem | str, extract: Callable[[str], Extraction] = extract) -> Verdict:
    """The verdict on one completion. Never raises on any text and returns within the workers' deadline.

    >>> verify("So the answer is 42.", "42").status
    'right'
    >>> verify("6 times 7 is 42", "42").status  # no last number is guessed at: the answer has to be marked
    'no_answer'
    """
    return _verifier(extract).verify(completion, problem)


def _remember(key: tuple[str, str], status: str) -> None:
    # A plain dict needs no lock, which a fork at the wrong moment would leave locked for ever.
    if len(_SETTLED) >= CACHE_SIZE:
        _SETTLED.clear()
    _SETTLED[key] = status


def _verdict(status: str, shown: str) -> Verdict:
    return Verdict(1.0 if status == "right" else 0.0, shown, status)


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
