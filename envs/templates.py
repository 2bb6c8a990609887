"""How a question becomes a prompt, what ends a completion and where its answer stands: one choice, never three.

``registry.templates`` holds them by name. A subclass of ``Template`` that is registered there can be chosen as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from string import ascii_letters
from typing import Any, ClassVar

from envs.verifier.extract import Extraction, extract, extract_tagged, last_box
from registry import UsageError, templates

BOX_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction that Qwen2.5-Math was trained with (model card of Qwen/Qwen2.5-Math-7B-Instruct)."""

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process and then gives the answer. The reasoning process and the answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, and the final answer is put in \\boxed{}."
)

_DATE = datetime(2024, 7, 26)  # Llama 3.1's own, where its template knows no clock
_CODES = [f"%{flag}{letter}" for flag in ("", *"-_0^#EO") for letter in ascii_letters]
_TOLD = {code: _DATE.strftime(code) for code in _CODES if _DATE.strftime(code) != code}
_UNDATED = (
    "{%- macro strftime_now(form) -%}{%- for part in form.split('%%') -%}{%- set said = namespace(text=part) -%}"
    f"{{%- for code, value in {_TOLD}.items() -%}}"
    "{%- set said.text = said.text.replace(code, value) -%}{%- endfor -%}"
    "{{ '' if loop.first else '%' }}{{ said.text }}{%- endfor -%}{%- endmacro -%}"
)
"""What makes a template that tells the date tell the same one on every day, so that a run that goes on, or is repeated,
has the prompts that it had. It is text, as transformers lets no function into a template."""
_MARK = "\ue000question\ue000"  # stands for the question where a template is asked what it puts around one


@dataclass(frozen=True)
class Template:
    """Prompt, stop strings, demonstrations and answer extractor, together. A subclass has ``render`` at least.

    Attributes:
        stop: strings that end a completion besides the EOS token.
        holds_special_tokens: whether the prompt's text has every special token in it already.
        asks_for_box: whether the prompt asks for the answer in a box.
        gap: what a completion begins with after the prompt.

    >>> from registry import templates
    >>> plain = templates.make("plain")
    >>> plain.prompt("How much is 3 * 4?")
    'Question: How much is 3 * 4?\\nAnswer:'
    >>> plain.extract("3 * 4 = 12, so the answer is 12.")
    ('12', '')
    """

    stop: ClassVar[tuple[str, ...]] = ()
    holds_special_tokens: ClassVar[bool] = False
    asks_for_box: ClassVar[bool] = False
    gap: ClassVar[str] = ""

    def render(self, question: str, tokenizer: Any) -> str:
        """The prompt's text for a stripped question."""
        raise NotImplementedError

    def extract(self, completion: str) -> Extraction:
        """The candidate answer and ``""``, or ``""`` and why there is none. Here: the last box, else the last ``####``,
        else the last "answer is"."""
        return extract(completion)

    def prompt(self, question: str, tokenizer: Any = None) -> str:
        """The prompt's text, special tokens written out. Raises UsageError if ``chat`` has no chat template."""
        return self.render(question.strip(), tokenizer)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The prompt as chat messages, for those who apply a chat template themselves; none where it is text."""
        return []

    def prompt_ids(self, question: str, tokenizer: Any) -> list[int]:
        """The prompt's token ids.

        Whether a BOS token leads is the tokenizer's own custom, except where the text already begins with it (chat
        templates write it out), so that it never stands there twice. No token that the text does not have follows it:
        a tokenizer that appends EOS would end the completion before it begins. Special tokens are the template's:
        where a question spells one, that is text. Raises UsageError if the template alters such a question.
        """
        text = self.prompt(question, tokenizer)
        bos = getattr(tokenizer, "bos_token", None)
        is_whole = self.holds_special_tokens or bool(bos and text.startswith(bos))
        special = _special_tokens(tokenizer)
        if not special.search(question):
            return _ids(text, tokenizer, add_special_tokens=not is_whole)
        before, after = self._around(question.strip(), tokenizer)
        start = max((match.end() for match in special.finditer(before)), default=0)
        end = next((match.start() for match in special.finditer(after)), len(after))
        written = before[start:] + question.strip() + after[:end]
        ids = _ids(before[:start], tokenizer, add_special_tokens=not is_whole) if start else []
        ids += _ids(written, tokenizer, add_special_tokens=not is_whole and not start, split_special_tokens=True)
        return ids + _ids(after[end:], tokenizer, add_special_tokens=False)

    def _around(self, question: str, tokenizer: Any) -> tuple[str, str]:
        """The prompt's text before and after a stripped question."""
        before, _, after = self.render(_MARK, tokenizer).partition(_MARK)
        if before + question + after != self.render(question, tokenizer):
            raise UsageError(
                f"the question {question[:80]!r} spells a special token, and the template alters it, so that it cannot "
                "be kept as text: leave that problem out"
            )
        return before, after

    def opens_thought(self, tokenizer: Any) -> bool:
        """Whether the prompt ends within a ``<think>`` of its own, which a completion then closes."""
        after = self.render(_MARK, tokenizer).rpartition(_MARK)[2]
        return after.rfind("<think>") > after.rfind("</think>")

    def ending(self, tokenizer: Any) -> str:
        """The text of what ends a good completion; ``""`` where that is the EOS token."""
        return ""

    def demonstration(self, solution: str, answer: str, opened: bool = False) -> str:
        """A worked solution as a completion, without its ending: its answer stands where ``extract`` looks for it.

        Args:
            solution: not empty. Its own statement of the answer goes before ``answer``.
            answer: the gold answer.
            opened: whether the prompt has opened a thought (``opens_thought``).
        """
        stated = extract(solution)[0]
        if opened:
            return f"{solution}\n</think>\n\n\\boxed{{{stated or answer}}}"
        if self.asks_for_box and not last_box(solution):
            head, mark, rest = solution.rpartition("####")
            shown = head.rstrip() if mark and rest.strip() == stated else solution
            return f"{shown}\n\\boxed{{{stated or answer}}}"
        lead = "" if solution[0].isspace() else self.gap
        return lead + solution + ("" if stated else f"\n#### {answer}")


def _ids(text: str, tokenizer: Any, add_special_tokens: bool, split_special_tokens: bool = False) -> list[int]:
    """Token ids of a text, without any that the tokenizer appends."""
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        split_special_tokens=split_special_tokens,
        return_special_tokens_mask=True,
    )
    ids, appended = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    while ids and add_special_tokens and text and appended[len(ids) - 1]:
        ids.pop()
    return ids


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches every special token as text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spelled = {str(token) for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", ()))
    return re.compile("|".join(map(re.escape, sorted(filter(None, spelled), key=len, reverse=True))) or r"(?!)")


@templates.register("plain")
@dataclass(frozen=True)
class Plain(Template):
    """``Question: ...``, then ``Answer:`` on a line of its own."""

    gap = " "

    def render(self, question: str, tokenizer: Any) -> str:
        """The question and the start of its answer."""
        return f"Question: {question}\nAnswer:"


@templates.register("chat")
@dataclass(frozen=True)
class Chat(Template):
    """The tokenizer's own chat template; the answer is asked for in a box."""

    holds_special_tokens = True
    asks_for_box = True

    def render(self, question: str, tokenizer: Any) -> str:
        """One message of the user's. Raises UsageError if the tokenizer has no chat template, or one that fails or
        leaves the message out."""
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "template='chat' needs a tokenizer with a chat template, and "
                f"{getattr(tokenizer, 'name_or_path', '?')!r} has none; use template='plain', or the tokenizer of an "
                "instruction-tuned model"
            )
        try:
            (message,) = self.messages(question)
            return _dialogue(tokenizer, message["content"])
        except UsageError:
            raise
        except Exception as error:  # jinja2 has many kinds, and templates raise their own
            raise UsageError(
                f"the chat template of {getattr(tokenizer, 'name_or_path', '?')!r} cannot render a user's message "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): mend it, or use "
                "template='plain'"
            ) from error

    def messages(self, question: str) -> list[dict[str, str]]:
        """One message of the user's."""
        return [{"role": "user", "content": f"{question.strip()}\n{BOX_INSTRUCTION}"}]

    def ending(self, tokenizer: Any) -> str:
        """The special token that ends the assistant's turn; ``""`` if the chat template writes none."""
        try:
            after = _dialogue(tokenizer, "?", _MARK).rpartition(_MARK)[2]
        except Exception:  # a template of single questions: what ends an answer it does not say
            return ""
        added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        places = [(after.find(token), -len(token), token) for token in added if token and token in after]
        return min(places, default=(0, 0, ""))[2]


def _chosen(tokenizer: Any) -> str:
    """The chat template that is used; ``""`` where the tokenizer cannot say."""
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError):
        return ""


def _dialogue(tokenizer: Any, question: str, answer: str | None = None) -> str:
    """What the chat template makes of a user's message, and of the assistant's, or else of the head of its turn.

    A message's content is text, or, for the templates of multimodal models that read no text, a list of parts. Raises
    UsageError if the template leaves out what is said; whatever the template raises.
    """

    def written(question: str, as_parts: bool) -> str:
        said = {"user": question} if answer is None else {"user": question, "assistant": answer}
        contents = {role: [{"type": "text", "text": text}] if as_parts else text for role, text in said.items()}
        turns = [{"role": role, "content": content} for role, content in contents.items()]
        head = answer is None
        dated = {"chat_template": _UNDATED + chosen} if "strftime_now" in (chosen := _chosen(tokenizer)) else {}
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=head, **dated)

    failure: Exception = UsageError(
        f"the chat template of {getattr(tokenizer, 'name_or_path', '?')!r} leaves out what is said to it: mend it, or "
        "use template='plain'"
    )
    for as_parts in (False, True):
        try:
            text = written(question, as_parts)
            if (question in text or _MARK in written(_MARK, as_parts).casefold()) and (answer or "") in text:
                return text
        except Exception as error:  # as of a template that asks text for the type of its parts
            failure = error if not as_parts else failure
    raise failure


@templates.register("qwen-math")
@dataclass(frozen=True)
class QwenMath(Template):
    """ChatML with Qwen2.5-Math's instruction as system prompt."""

    stop = ("<|im_end|>", "<|endoftext|>")
    asks_for_box = True

    def render(self, question: str, tokenizer: Any) -> str:
        """System prompt, question and the head of the assistant's turn."""
        return (
            f"<|im_start|>system\n{BOX_INSTRUCTION}<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )

    def ending(self, tokenizer: Any) -> str:
        """The end of the assistant's turn."""
        return self.stop[0]


@templates.register("r1")
@dataclass(frozen=True)
class R1(Template):
    """A dialogue that opens ``<think>``; the answer stands in the last ``<answer>`` (arXiv 2501.12948)."""

    stop = ("</answer>",)

    def render(self, question: str, tokenizer: Any) -> str:
        """The preamble, the question and the opened thought."""
        return f"{R1_PREAMBLE}\nUser: {question}\nAssistant: <think>"

    def extract(self, completion: str) -> Extraction:
        """What stands in the last ``<answer>``, after a closed thought."""
        return extract_tagged(completion)

    def ending(self, tokenizer: Any) -> str:
        """The end of the answer."""
        return self.stop[0]

    def demonstration(self, solution: str, answer: str, opened: bool = False) -> str:
        """The solution as the thought, closed, then its answer in a box and in tags."""
        return f"{solution}</think> <answer>\\boxed{{{extract(solution)[0] or answer}}}"
