"""The worker processes: killed and replaced at the deadline, limited in memory, none left behind, from anywhere."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from envs.problem import Problem
from envs.verifier import Verifier, pool, verify
from envs.verifier import verdicts as verifier
from envs.verifier.pool import WorkerPool
from registry import templates

ORDINARY = ("\\boxed{\\sqrt{18}}", "3\\sqrt{2}")
HANGS = ("\\boxed{\\sum_{i=1}^{10^8} \\frac{1}{i}}", "\\sum_{k=1}^{n} k")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settled comparison remembered, no worker running, before and after."""
    monkeypatch.setattr(verifier, "_SETTLED", {})
    pool.close_all()
    yield
    pool.close_all()


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "envs.verifier.child" in " ".join(child.cmdline())]


@pytest.mark.usefixtures("fresh")
def test_a_hang_costs_one_deadline_and_nothing_else() -> None:
    judge = Verifier(deadline=0.3)
    assert judge.verify(*ORDINARY).reward == 1.0
    for _ in range(2):
        start = time.perf_counter()
        verdict = judge.verify(*HANGS)
        assert (verdict.reward, verdict.status) == (0.0, "timeout")
        assert time.perf_counter() - start < 20  # imports of the replacement included
        verifier._SETTLED.clear()
        assert judge.verify(*ORDINARY).reward == 1.0
    assert HANGS[1] not in {gold for gold, _ in verifier._SETTLED}, "a timeout is never remembered"


@pytest.mark.usefixtures("fresh")
def test_a_batch_with_hangs_gets_every_other_verdict() -> None:
    judge = Verifier(deadline=0.5, workers=2)
    pairs = [(ORDINARY[0] + " " * n, Problem("", f"3\\sqrt{{2}}{'+0x' * n}", "", "")) for n in range(6)]
    pairs[2:2] = [(HANGS[0], Problem("", HANGS[1], "", ""))]
    verdicts = judge.verify_batch(pairs)
    assert [v.status for v in verdicts] == ["right"] * 2 + ["timeout"] + ["right"] * 4
    assert len(children()) <= 2


@pytest.mark.usefixtures("fresh")
def test_submit_does_not_wait() -> None:
    judge = Verifier(deadline=2.0)
    hanging = judge.submit(*HANGS)
    settled = judge.submit("\\boxed{5}", "5")
    assert settled.done() and settled.result().reward == 1.0
    assert not hanging.done()
    assert hanging.result().status == "timeout"


@pytest.mark.usefixtures("fresh")
def test_a_worker_that_dies_is_replaced() -> None:
    judge = Verifier(deadline=2.0)
    assert judge.verify(*ORDINARY).reward == 1.0
    for child in children():
        child.kill()
    verifier._SETTLED.clear()
    assert judge.verify(*ORDINARY).reward == 1.0


@pytest.mark.usefixtures("fresh")
def test_memory_is_limited() -> None:
    judge = Verifier(deadline=2.0, megabytes=300)
    assert judge.verify(*ORDINARY).reward == 1.0
    (child,) = children()
    assert child.rlimit(psutil.RLIMIT_AS) == (300 << 20, 300 << 20)  # type: ignore[attr-defined]
    pool = WorkerPool(deadline=2.0, megabytes=300)
    reply = pool.submit(["compare", "\\sum_{k=1}^{n} k", "\\sum_{k=1}^{" + "9" * 400 + "} 2^{10^{12}}"]).result()
    assert reply in ("wrong", "unsupported", "timeout", "malformed")
    assert pool.submit(["compare", "3\\sqrt{2}", "\\sqrt{18}"]).result() == "right"
    pool.close()


@pytest.mark.usefixtures("fresh")
def test_closing_does_not_wait_for_a_hang() -> None:
    pool = WorkerPool(deadline=30.0)
    assert pool.submit(["compare", "3\\sqrt{2}", "\\sqrt{18}"]).result() == "right"
    hanging = [pool.submit(["compare", "\\sum_{k=1}^{n} k", "\\sum_{i=1}^{10^8} \\frac{1}{i}"]) for _ in range(3)]
    time.sleep(0.2)
    start = time.perf_counter()
    pool.close()
    assert time.perf_counter() - start < 10
    assert [future.result(timeout=1) for future in hanging] == ["unsupported"] * 3
    assert not children()


@pytest.mark.usefixtures("fresh")
def test_from_many_threads() -> None:
    found: list[float] = []
    golds = [f"{n}\\sqrt{{2}}" for n in range(2, 10)]

    def ask() -> None:
        found.extend(verify(f"\\boxed{{\\sqrt{{{2 * n * n}}}}}", gold).reward for n, gold in enumerate(golds, start=2))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0] * 64
    assert len(children()) == 1, "all verifiers with the defaults share one worker"


def _ask(queue: multiprocessing.Queue[float]) -> None:
    queue.put(verify(*ORDINARY).reward)
    queue.put(verify("\\boxed{5}", "5").reward)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_daemonic_children(method: str) -> None:
    assert verify(*ORDINARY).reward == 1.0
    verifier._SETTLED.clear()
    mine = children()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_ask, args=(queue,), daemon=True)  # as AsyncVectorEnv starts its workers
    process.start()
    assert [queue.get(timeout=60), queue.get(timeout=60)] == [1.0, 1.0]
    process.join(timeout=30)
    assert process.exitcode == 0
    assert children() == mine, "the child's worker ended with it, and the parent's lives"
    verifier._SETTLED.clear()
    assert verify(*ORDINARY).reward == 1.0


SCRIPT = f"""
import os, signal, sys
from envs.verifier import verify
print(verify(*{ORDINARY!r}).reward, flush=True)
import psutil
print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["exits", "killed"])
def test_no_process_is_left_behind(end: str, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"  # no "if __name__" guard: multiprocessing would run it again in its children
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), end], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    reward, pids = done.stdout.split("\n")[:2]
    assert reward == "1.0", done.stderr
    assert pids, "a worker was needed"
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(int(pid)) for pid in pids.split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.split())


@pytest.mark.usefixtures("fresh")
def test_the_callers_alarm_is_left_alone() -> None:
    import signal

    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread has alarms")
    before = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        assert verify(*ORDINARY).reward == 1.0
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 400
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _in_a_changed_interpreter(change: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A symbolic verdict in an interpreter that runs ``change`` when it starts, as its workers do."""
    (folder / "sitecustomize.py").write_text(change, encoding="utf-8")
    code = f"from envs.verifier import verify; print(verify(*{ORDINARY!r}).status)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, timeout=120
    )


@pytest.mark.parametrize("refusal", ["ValueError('refused')", "OSError(22, 'refused')"])
def test_where_the_system_refuses_limits_verdicts_are_the_same(refusal: str, tmp_path: Path) -> None:
    change = f"import resource\ndef refuse(kind, limits): raise {refusal}\nresource.setrlimit = refuse\n"
    done = _in_a_changed_interpreter(change, tmp_path)
    assert (done.stdout, done.stderr) == ("right\n", "")


def test_a_tighter_limit_of_the_system_is_kept(tmp_path: Path) -> None:
    change = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20))\n"
    assert _in_a_changed_interpreter(change, tmp_path).stdout == "right\n"


def test_a_worker_that_does_not_start_says_why_in_its_own_words(tmp_path: Path) -> None:
    change = "import sys\nif '-P' in sys.orig_argv: sys.modules['mpmath'] = None\n"
    done = _in_a_changed_interpreter(change, tmp_path)
    assert done.stdout == "unsupported\n"
    assert "a verifier worker did not start: ModuleNotFoundError: import of mpmath halted" in done.stderr


def test_copies_and_pickles_hold_the_settings_and_share_the_pool() -> None:
    judge = Verifier(templates.make("r1").extract, deadline=1.5, workers=2, megabytes=512)
    for other in (copy.copy(judge), copy.deepcopy(judge), pickle.loads(pickle.dumps(judge))):
        assert other.pool is judge.pool
        assert other.extract("</think><answer>5</answer>") == ("5", "")
        assert other.extract("\\boxed{5}") == ("", "no_answer")
