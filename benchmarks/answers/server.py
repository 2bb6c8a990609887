"""Answers of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, hosted ones), several requests at a time."""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from typing import Any

from benchmarks.answers.kept import GREEDY, Answer, Keep, Place
from benchmarks.answers.settings import Settings
from envs.problem import Problem, Problems
from envs.templates import Template
from envs.text import opens_thought, prompt_of, submit
from envs.verifier.extract import completion_text
from registry import UsageError, did_you_mean, templates

KEY_VARIABLE = "OPENAI_API_KEY"
PATIENCE = 600.0  # seconds that an answer may take
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds before a request is tried again; each further wait is twice as long
TRANSIENT = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Server:
    """A model behind a server. With the template ``chat`` its own chat template applies (``/chat/completions``), with
    others a prompt is text (``/completions``).

    Attributes:
        settings: what is evaluated.
        jobs: requests at a time.
        opened: whether prompts open a thought, which then has to be closed before an answer counts.
    """

    settings: Settings
    jobs: int
    opened: bool = False

    @staticmethod
    def of(settings: Settings, jobs: int, tokenizer: str | None) -> Server:
        """Raises ``UsageError`` for an unknown template or tokenizer."""
        return Server(settings, jobs, opens_thought(templates.make(settings.template), tokenizer))

    def write(self, name: str, problems: Problems, kind: str, missing: list[Place], keep: Keep) -> None:
        """Ask for what is missing of a kind and ``keep`` each answer as it comes.

        Raises:
            UsageError: the server cannot be reached, or refuses a request.
        """
        waiting: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        failed = threading.Event()
        for place in [*missing, *[None] * self.jobs]:
            waiting.put(place)

        def work() -> None:
            while not failed.is_set() and (place := waiting.get()) is not None:
                try:
                    done.put(self._answer(problems[place[0]], kind, *place))
                except Exception as error:  # the one who waits must learn of it, whatever it is
                    failed.set()
                    done.put(error)

        for _ in range(self.jobs):
            # Daemons, so that an interrupted evaluation waits for no answer.
            threading.Thread(target=work, name="server-request", daemon=True).start()
        for _ in missing:
            answer = done.get()
            if isinstance(answer, Exception):
                raise answer
            keep(answer)

    def _answer(self, problem: Problem, kind: str, index: int, sample: int) -> Answer:
        template: Template = templates.make(self.settings.template)
        prompt = prompt_of(template, problem.question)
        is_chat = not isinstance(prompt, str)
        reply = post(
            f"{self.settings.server}/{'chat/completions' if is_chat else 'completions'}",
            self._body(prompt, template, kind, index, sample),
        )
        try:
            choice = reply["choices"][0]
            said = (choice["message"]["content"] if is_chat else choice["text"]) or ""
            text = completion_text([{"role": "assistant", "content": said}])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self.settings.server} answers with no completion ({str(reply)[:200]}): is it OpenAI-compatible?"
            ) from error
        verdict = submit(text, problem, self.settings.template, opened=self.opened).result()
        return Answer(
            kind=kind,
            problem=index,
            id=problem.id,
            sample=sample,
            right=verdict.reward >= 1.0,
            status=verdict.status,
            extracted=verdict.extracted,
            tokens=(reply.get("usage") or {}).get("completion_tokens"),
            finish=str(choice.get("finish_reason")),
            completion=text,
        )

    def _body(self, prompt: Any, template: Template, kind: str, index: int, sample: int) -> dict[str, Any]:
        """A request. Fields of ``settings.body`` come last; those that it gives as None are left out."""
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": 0.0 if kind == GREEDY else settings.temperature,
            "seed": zlib.crc32(f"{settings.seed} {kind} {index} {sample}".encode()) >> 1,  # servers take 31 bits
            ("prompt" if isinstance(prompt, str) else "messages"): prompt,
        }
        if template.stop:
            body["stop"] = list(template.stop)
        return {name: value for name, value in {**body, **settings.body}.items() if value is not None}


def model_name(server: str, given: str | None) -> str:
    """The model to ask for: the one given, or the only one that the server has.

    Raises:
        UsageError: the server cannot be reached, has several models and none is given, or lacks the one given.
    """
    try:
        known = [str(one["id"]) for one in _call(f"{server}/models", None)["data"]]
    except (_Refused, KeyError, TypeError):
        known = []  # not all servers list their models
    if given is not None:
        if known and given not in known:
            raise UsageError(f"{server} has no model {given!r}: {did_you_mean(given, known)}")
        return given
    if len(known) != 1:
        said = f"has several models ({', '.join(known)})" if known else "does not say which models it has"
        raise UsageError(f"{server} {said}: name one with --policy")
    return known[0]


class _Refused(UsageError):
    """The server answers, but not to this."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request, which is tried again where the server is busy or gone for a while.

    Raises:
        UsageError: it stays so, or the server refuses the request.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _call(url, body)
        except _Refused as error:
            if error.status not in TRANSIENT or attempt + 1 == ATTEMPTS:
                raise
        except UsageError:
            if attempt + 1 == ATTEMPTS:
                raise
        time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("not reached")


def _call(url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=PATIENCE) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace").strip()
        remedy = (
            f"set {KEY_VARIABLE}" if error.code in (401, 403) else "--set body.NAME=VALUE changes a request's fields"
        )
        raise _Refused(f"{url} refuses ({error.code} {error.reason}: {said[:300]}); {remedy}", error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(f"{url} cannot be asked ({reason}): start the server, or correct --server") from None
