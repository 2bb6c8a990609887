"""The report of a comparison while it runs, on a page of this machine alone.

One thread of the comparison's process serves two addresses: ``/``, the report of what is done so far, made when it is
asked for, and ``/progress.json``, where each run stands. Nothing can be changed through it. A page of elsewhere that
has its name resolve to this machine gets nothing, since requests must name this machine.
"""

from __future__ import annotations

import errno
import hashlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.comparison.board import HEADS, cells, headline
from benchmarks.comparison.launch import Watched
from benchmarks.measuring.durable import json_text
from benchmarks.report.comparison import Comparison
from registry import UsageError

ADDRESS = "127.0.0.1"
NAMES = {ADDRESS, "localhost", "[::1]"}  # any port: it may be a forwarded one


class LivePage:
    """Context; ``follow`` says what it shows.

    Raises:
        UsageError: on entering, the port is in use or not allowed.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.read: Callable[[], Comparison] = lambda: Comparison("Comparison", "", (), (), "")
        self.out = Path()
        self.made = threading.Lock()
        self.page = (b"", "")
        self.runs: Sequence[Watched] = ()
        self.labels: Mapping[str, str] = {}
        self.jobs = 1

    def __enter__(self) -> LivePage:
        try:
            self.server = _Server((ADDRESS, self.port), _handler(self))
        except (OSError, OverflowError) as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            why = "the port is in use" if taken else str(error)
            raise UsageError(f"--serve {self.port}: {why}; give another, or --serve 0 for any that is free") from None
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True, name="live page").start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{ADDRESS}:{self.port}/"

    def follow(
        self,
        runs: Sequence[Watched],
        labels: Mapping[str, str],
        jobs: int,
        read: Callable[[], Comparison],
        out: Path,
    ) -> None:
        """Show these runs from now on: ``read`` makes the comparison of what they have done so far, ``out`` will have
        the report when all are over."""
        self.labels, self.jobs, self.read, self.out = labels, jobs, read, out
        self.runs = runs  # last: a request may come in between

    @property
    def version(self) -> str:
        """Another one whenever the report would be."""
        seen = [(run.spec.hash, run.evaluations, run.over) for run in self.runs]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:12]

    def progress(self) -> bytes:
        """Where each run stands."""
        rows = [cells(run, self.labels[run.spec.hash]) for run in self.runs]
        line = f"{headline(self.runs, self.jobs)}; at the end the report is in {self.out}" if rows else "starting"
        said = {"version": self.version, "headline": line, "heads": HEADS, "rows": rows}
        return json_text(said).encode()

    def html(self) -> bytes:
        """The report; made anew if there is something new to say."""
        from benchmarks.report.sections import report

        with self.made:
            version = self.version
            if self.page[1] != version:
                self.page = (report(self.read()).html(live=version).encode(), version)
            return self.page[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True  # after a kill the same address again, at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that left while it was answered is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(live: LivePage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "live", ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            content = {"/": live.html, "/progress.json": live.progress}.get(path)
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in NAMES:
                self.send_error(403, "This page is for this machine alone")
            elif content is None:
                self.send_error(404)
            else:
                self._answer(content(), "text/html" if path == "/" else "application/json")

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *said: Any) -> None:
            """Nothing: the terminal is the comparison's."""

    return Handler
