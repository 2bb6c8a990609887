"""Prompts and verdicts as text, for those who tokenize elsewhere: other trainers, servers, a text-level environment."""

from __future__ import annotations

from concurrent.futures import Future
from functools import lru_cache
from typing import Any

import envs.templates  # noqa: F401 (registers the templates)
from envs.codec import load_tokenizer
from envs.problem import Problem, Problems, Verdict
from envs.problems import load_problems
from envs.templates import Template
from envs.verifier import Verifier
from envs.verifier.extract import NO_ANSWER, Extraction, completion_text, last_box, last_hash
from registry import UsageError, templates

Prompt = str | list[dict[str, str]]


@lru_cache(maxsize=16)
def verifier_of(template: str) -> Verifier:
    """The verifier that looks for an answer where the template has it. Raises ``UsageError`` for an unknown name."""
    return Verifier(templates.make(template).extract)


def finite_problems(problems: Any, split: str, **options: Any) -> Problems:
    """Problems that can be listed: of what ``load_problems`` takes, or loaded ones. Raises ``UsageError`` for a source
    without an end, and for options of problems that are loaded already."""
    is_loaded = all(hasattr(problems, name) for name in ("name", "size", "__getitem__"))
    if is_loaded and options:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise UsageError(f"{problems.name} is loaded already, so {given} would do nothing: give it to load_problems")
    loaded = problems if is_loaded else load_problems(problems, split, **options)
    if loaded.size is None:
        raise UsageError(f"{loaded.name} has no end: say how many problems to take, load_problems(..., limit=1000)")
    return loaded


def prompt_of(template: Template, question: str) -> Prompt:
    """The prompt for those who tokenize it: chat messages where a chat template of theirs is meant, else text."""
    return template.messages(question) or template.prompt(question)


def opens_thought(template: Template, tokenizer: str | None = None) -> bool:
    """Whether prompts end within a thought that a completion closes. A chat template tells with its tokenizer alone (a
    folder or a hub id); without it the answer is no."""
    if template.messages("") and tokenizer is None:
        return False
    return template.opens_thought(load_tokenizer(tokenizer) if tokenizer else None)


def golds_of(problem: Problem) -> list[str]:
    """All accepted answers, the first one foremost."""
    return [problem.answer, *problem.alternatives]


def submit(
    completion: Any, gold: Any, template: str = "plain", scorer: str = "", opened: bool = False
) -> Future[Verdict]:
    """The verdict on a completion, as an environment gives it for the same text.

    Args:
        completion: text or chat messages. Messages without any text of the assistant's, as after a call of a tool, are
            an empty completion.
        gold: a ``Problem``, or the accepted answer as a data set has it, or several.
        template: where the answer stands.
        scorer: who judges instead of a comparison (``Problem.scorer``, which a ``Problem`` has itself).
        opened: whether the prompt has opened a thought.

    Raises:
        UsageError: a gold answer that the verifier cannot read, or an unknown template.
    """
    text = ("<think>" if opened else "") + _text(completion)
    return verifier_of(template).submit(text, _judged(gold, scorer))


def verify_answer(answer: str, gold: Any, scorer: str = "") -> Verdict:
    """The verdict on a bare answer, which no extraction has to find; the arguments are those of ``submit``."""
    return _BARE.verify(answer, _judged(gold, scorer))


def _judged(gold: Any, scorer: str) -> Any:
    if isinstance(gold, list | tuple) and gold and all(isinstance(one, str) for one in gold):
        return Problem("", gold[0], "", "", scorer=scorer, alternatives=tuple(gold[1:]))
    return Problem("", str(gold), "", "", scorer=scorer) if scorer else gold


def _whole(text: str) -> Extraction:
    marked = last_box(text) or last_hash(text)  # as the prompt asks for an answer
    return marked or ((text.strip(), "") if text.strip() else NO_ANSWER)


_BARE = Verifier(_whole)


def _text(completion: Any) -> str:
    try:
        return completion_text(completion)
    except UsageError:
        if isinstance(completion, list | tuple) and all(isinstance(message, dict) for message in completion):
            return ""
        raise
