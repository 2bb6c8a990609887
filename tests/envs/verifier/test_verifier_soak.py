"""Throughput of the fast path, and a soak: many mixed requests, some hostile, with flat memory and no zombie.

SOAK=100000 python -m pytest -m slow -s tests/envs/verifier/test_verifier_soak.py
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import psutil
import pytest

from envs.problem import Problem
from envs.problems.load import load_problems
from envs.verifier import Verifier, pool
from envs.verifier import verdicts as verifier

REQUESTS = int(os.environ.get("SOAK", "5000"))
HOSTILE = (
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{" + "{" * 3000,
    "\\boxed{" + "9" * 100_000 + "}",
    "\\boxed{((9!)!)!}",
    "<think>" * 10_000,
    "\\boxed{__import__('os').system('true')}",
)


def throughput(pairs: list[tuple[str, Problem]]) -> float:
    """Verdicts per second of CPU time, nothing remembered."""
    verifier._SETTLED.clear()
    judge = Verifier()
    start = time.process_time()
    judge.verify_batch(pairs)
    return len(pairs) / (time.process_time() - start)


@pytest.mark.slow
def test_throughput(shared_dir: Path) -> None:
    rng = random.Random(0)
    data = str(shared_dir / "data")
    gsm8k = list(load_problems("gsm8k", "test", data_dir=data))  # type: ignore[call-overload]
    wrong = [(p.solution.rpartition("####")[0] + f"#### {rng.randint(0, 500)}", p) for p in gsm8k]
    rate = throughput([*((p.solution, p) for p in gsm8k), *wrong])
    print(f"\nGSM8K-like {rate:.0f} verdicts/s of one core")
    assert rate >= 10_000
    math = list(load_problems("math500", "test", data_dir=data))  # type: ignore[call-overload]
    reasoning = "We have $x^2 + y^2 = \\frac{1}{2}$, and so on. " * 15
    answers = [p.answer for p in math] + [rng.choice(math).answer for _ in math]
    spaced = [a.replace("\\frac", "\\dfrac").replace("+", " + ") for a in answers]
    rate = throughput([(f"{reasoning} \\boxed{{{a}}}", math[n % len(math)]) for n, a in enumerate(spaced)])
    print(f"MATH-like {rate:.0f} verdicts/s of one core")
    assert rate >= 500


@pytest.mark.slow
def test_soak() -> None:
    pool.close_all()  # the pools of other tests
    rng = random.Random(1)
    judge = Verifier(deadline=0.3)
    sums = "\\sum_{k=1}^{n} k"
    own, kids, wrong = psutil.Process(), [], 0
    start, early = time.perf_counter(), 0
    for done in range(0, REQUESTS, 500):
        batch: list[tuple[str, str, float]] = []
        for _ in range(min(500, REQUESTS - done)):
            n, draw = rng.randint(2, 10**6), rng.random()
            if draw < 0.0098:
                batch.append((rng.choice(HOSTILE), "3\\sqrt{2}", 0.0))
            elif draw < 0.01:
                batch.append(("\\boxed{\\sum_{i=1}^{10^8} \\frac{1}{i}}", sums, 0.0))  # hangs until it is killed
            elif draw < 0.1:
                batch.append((f"\\boxed{{\\sqrt{{{2 * n * n}}}}}", f"{n}\\sqrt{{2}}", 1.0))  # a worker settles it
            elif draw < 0.5:
                batch.append((f"So it is \\boxed{{{n + 1}}}.", str(n), 0.0))
            else:
                batch.append((f"Text. #### {n:,}", str(n), 1.0))
        futures = [(judge.submit(completion, gold), expected) for completion, gold, expected in batch]
        wrong += sum(future.result().reward != expected for future, expected in futures)
        if done == REQUESTS // 5 // 500 * 500:
            early = own.memory_info().rss
        kids.append(len(own.children()))
    seconds = time.perf_counter() - start
    late = own.memory_info().rss
    zombies = [child for child in own.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]
    print(f"\n{REQUESTS} requests in {seconds:.0f} s, {REQUESTS / seconds:.0f}/s, {wrong} wrong")
    print(f"memory {early >> 20} -> {late >> 20} MiB, at most {max(kids)} children, {len(zombies)} zombies")
    assert wrong == 0
    assert not zombies
    assert late - early < 64 << 20
    assert max(kids) <= 2
