"""A stand-in for the Hugging Face hub over HTTP: repositories that are made, committed to and read, with LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_0123456789abcdefABCDEFsecret"


class Hub:
    """Attributes: ``repos``, name -> file -> content; ``private``, names; ``url``; ``refused``, whose commits fail."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.refused = "refused"
        self.objects: dict[str, bytes] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, allowed: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        path = path.partition("?")[0]
        if method in ("POST", "PUT") and not path.startswith("/lfs/") and not allowed:
            return 401, {}, b'{"error": "Invalid credentials"}'
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            name, act = "/".join(parts[2:4]), parts[4]
            if act == "preupload":
                return self._preupload(json.loads(body))
            if act == "commit":
                return self._commit(name, [json.loads(line) for line in body.splitlines() if line])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), "/".join(parts[4:]))
        return 404, {"X-Error-Code": "EntryNotFound"}, b'{"error": "Entry not found"}'

    def _create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        name = f"{wanted['organization']}/{wanted['name']}"
        place = f"{self.url}/{name}"
        if wanted["organization"] == self.refused:
            return 403, {}, b'{"error": "You have no right to create this model"}'
        if name in self.repos:
            return 409, {}, json.dumps({"error": "You already created this model repo", "url": place}).encode()
        self.repos[name] = {}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.private.add(name)
        return 200, {}, json.dumps({"url": place}).encode()

    def _preupload(self, wanted: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        modes = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
            for one in wanted["files"]
        ]
        return 200, {}, json.dumps({"files": [{**mode, "shouldIgnore": False} for mode in modes]}).encode()

    def _batch(self, wanted: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}} for one in wanted["objects"]
        ]
        return 200, {}, json.dumps({"transfer": "basic", "objects": objects}).encode()

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                self.repos[name][value["path"]] = content
        place = f"{self.url}/{name}/commit/{'a' * 40}"
        return 200, {}, json.dumps({"success": True, "commitUrl": place, "commitOid": "a" * 40}).encode()

    def _file(self, name: str, path: str) -> tuple[int, dict[str, str], bytes]:
        content = self.repos.get(name, {}).get(path)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40}, b""
        tag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": "a" * 40}, content


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that runs; writing there needs ``TOKEN``."""
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, headers, content = made.answer(self.command, self.path, body, allowed)
            self.send_response(status)
            for key, value in {
                "Content-Length": str(len(content)),
                "Content-Type": "application/json",
                **headers,
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *said: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()
