"""An OpenAI-compatible server of a model that knows some answers, in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """Answers requests by ``reply(prompt, body)``, which may be a text, a status to refuse with, or a whole reply.

    Attributes:
        url: its address, with ``/v1``.
        requests: the bodies that it got, in order.
    """

    def __init__(self, reply: Callable[[str, dict[str, Any]], Any], models: tuple[str, ...] = ("oracle",)) -> None:
        self.reply, self.models = reply, models
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": name} for name in owner.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                owner.keys.append(self.headers["Authorization"])
                is_chat = self.path.endswith("/chat/completions")
                said = owner.reply(body["messages"][-1]["content"] if is_chat else body["prompt"], body)
                if isinstance(said, int):
                    self.send({"error": {"message": "busy or bad"}}, said)
                elif isinstance(said, str):
                    told = {"message": {"role": "assistant", "content": said}} if is_chat else {"text": said}
                    choice = {"index": 0, "finish_reason": "stop", **told}
                    self.send({"choices": [choice], "usage": {"completion_tokens": len(said.split())}})
                else:
                    self.send(said)

            def send(self, value: Any, status: int = 200) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        return Handler

    @contextmanager
    def running(self) -> Iterator[ChatServer]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        yield self
        self._server.shutdown()
        self._server.server_close()
