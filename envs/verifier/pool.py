"""A pool of persistent child processes with a deadline and a memory limit per request.

Children are started with ``subprocess`` and spoken to by lines of JSON. Unlike ``multiprocessing`` this never imports
the caller's main module, works in daemonic processes (asynchronous vector envs), from any thread and after a fork, and
leaves neither a fork server nor a resource tracker behind.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

_BOOTSTRAP = """
import sys, types
for name, path in (("envs", sys.argv[1]), ("envs.verifier", sys.argv[1] + "/verifier")):
    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [path]
sys.path.append(sys.argv[2])
from envs.verifier.child import serve
serve(float(sys.argv[3]), int(sys.argv[4]))
"""
# A child needs the comparer alone: bare package objects spare it gymnasium and the registration of environments.

START_SECONDS = 60.0
WALL_FACTOR = 2.5
"""A child has ``deadline`` seconds of processor time, which it enforces itself, so that a busy machine does not change
verdicts; this many times that on the clock, its parent kills it."""
OVERRAN, DIED = "timeout", "unsupported"
ATTEMPTS = 2
"""How often a request is tried whose child died."""


class Child:
    """One child process. Not thread-safe: a pool gives each child to one thread.

    Args:
        deadline: seconds of processor time that a request may take.
        megabytes: limit of the address space.
    """

    def __init__(self, deadline: float, megabytes: int) -> None:
        here = Path(__file__).resolve().parents[1]
        arguments = [str(here), str(here.parent), str(deadline), str(megabytes)]
        self.deadline = deadline
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOTSTRAP, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._buffer = b""
        first_line = self._line(START_SECONDS)
        assert self.process.stderr is not None
        with self.process.stderr as errors:
            if first_line != "ready":
                self.kill()
                raise RuntimeError(_why_not_started(first_line, errors.read().decode(errors="replace")))

    def ask(self, request: list[str]) -> str:
        """The reply to a request, ``timeout`` if it overran, ``unsupported`` if the child died of it; after either the
        child is dead."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.kill()
            return DIED
        patience = WALL_FACTOR * self.deadline
        reply = self._line(patience)
        if reply == "loading":
            reply = self._line(START_SECONDS) and self._line(patience)
        if reply:
            return reply
        self.kill()
        return OVERRAN if reply is None or self.process.returncode == -signal.SIGPROF else DIED

    def _line(self, seconds: float) -> str | None:
        """The next line of the child, ``""`` at its end, None if none came in time."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        descriptor = self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    return ""
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End the child at once and reap it."""
        self.forget()
        with suppress(subprocess.TimeoutExpired):  # a child that has just ended keeps its own exit status
            self.process.wait(timeout=0.05)
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Close this process's ends of the pipes: all that a forked child may do about its parent's workers."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # an unflushed request to a dead child
                    pipe.close()


def _why_not_started(first_line: str | None, errors: str) -> str:
    if first_line is None:
        return f"a verifier worker did not start within {START_SECONDS:.0f} s; is the machine overloaded?"
    last_line = errors.strip().rpartition("\n")[2] or "it wrote no error"
    return f"a verifier worker did not start: {last_line} ({sys.executable})"


Request = tuple[list[str], "Future[str]"]


class WorkerPool:
    """``workers`` children, each driven by a thread of its own, started when requests first wait for them.

    Args:
        workers: most children at a time.
        deadline: seconds of processor time that a request may take before its child is killed and replaced.
        megabytes: limit of a child's address space.
    """

    def __init__(self, workers: int = 1, deadline: float = 2.0, megabytes: int = 1024) -> None:
        self.workers, self.deadline, self.megabytes = workers, deadline, megabytes
        self._start_afresh()
        _POOLS.add(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._pending = 0
        self._threads: list[threading.Thread] = []
        self._children: set[Child] = set()

    def submit(self, request: list[str]) -> Future[str]:
        """Queue a request; the future's result is the child's reply, ``timeout`` or ``unsupported``."""
        future: Future[str] = Future()
        with self._lock:
            self._pending += 1
            if len(self._threads) < min(self.workers, self._pending):
                thread = threading.Thread(target=self._serve, name="verifier-worker", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._requests.put((request, future))
        return future

    def _serve(self) -> None:
        """One thread: owns one child and replaces it when it dies."""
        child: Child | None = None
        requests, stopping = self._requests, self._stopping
        while (item := requests.get()) is not None:
            request, future = item
            try:
                # A child may die of something else than its request (an impatient user, the system short of memory).
                for _ in range(ATTEMPTS):
                    child = self._living(child)
                    reply = child.ask(request)
                    if reply != DIED or child.is_alive() or stopping.is_set():
                        break
            except BaseException as error:  # the one who waits for the future must learn of it, whatever it is
                self._count_down()
                future.set_exception(error)
                continue
            self._count_down()
            future.set_result(reply)
        if child is not None:
            child.kill()

    def _living(self, child: Child | None) -> Child:
        if child is not None and child.is_alive():
            return child
        with self._lock:
            self._children = {other for other in self._children if other is not child}
        child = Child(self.deadline, self.megabytes)
        with self._lock:
            self._children.add(child)
        return child

    def _count_down(self) -> None:
        with self._lock:
            self._pending -= 1

    def close(self) -> None:
        """End all children, answering what still waits with ``unsupported``. The pool starts afresh if used again."""
        with self._lock:
            requests, threads, children = self._requests, self._threads, list(self._children)
            self._stopping.set()
            waiting = []
            while not requests.empty():
                waiting.append(requests.get())
            for _ in threads:
                requests.put(None)
        for item in waiting:
            if item is not None:
                item[1].set_result(DIED)
        for child in children:
            child.process.kill()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=WALL_FACTOR * self.deadline)
        self._start_afresh()

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's workers; new ones start when needed."""
        for child in self._children:
            child.forget()
        self._start_afresh()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def close_all() -> None:
    """End the workers of every pool of this process (also done at exit)."""
    for pool in list(_POOLS):
        pool.close()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
