"""How a question becomes a prompt, what ends a completion and where its answer stands: one choice, never three.

``registry.templates`` holds them by name. A subclass of ``Template`` that is registered there can be chosen as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from envs.verifier.extract import Extraction, extract, extract_tagged
from registry import UsageError, templates

BOX_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction that Qwen2.5-Math was trained with (model card of Qwen/Qwen2.5-Math-7B-Instruct)."""

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process and then gives the answer. The reasoning process and the answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, and the final answer is put in \\boxed{}."
)


@dataclass(frozen=True)
class Template:
    """Prompt, stop strings and answer extractor, together. A subclass has ``render`` at least.

    Attributes:
        stop: strings that end a completion besides the EOS token.
        holds_special_tokens: whether the prompt's text has every special token in it already.

    >>> from registry import templates
    >>> plain = templates.make("plain")
    >>> plain.prompt("How much is 3 * 4?")
    'Question: How much is 3 * 4?\\nAnswer:'
    >>> plain.extract("3 * 4 = 12, so the answer is 12.")
    ('12', '')
    """

    stop: ClassVar[tuple[str, ...]] = ()
    holds_special_tokens: ClassVar[bool] = False

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

    def prompt_ids(self, question: str, tokenizer: Any) -> list[int]:
        """The prompt's token ids.

        Whether a BOS token leads is the tokenizer's own custom, except where the text already begins with it (chat
        templates write it out), so that it never stands there twice.
        """
        text = self.prompt(question, tokenizer)
        bos = getattr(tokenizer, "bos_token", None)
        is_whole = self.holds_special_tokens or bool(bos and text.startswith(bos))
        return list(tokenizer(text, add_special_tokens=not is_whole)["input_ids"])


@templates.register("plain")
@dataclass(frozen=True)
class Plain(Template):
    """``Question: ...``, then ``Answer:`` on a line of its own."""

    def render(self, question: str, tokenizer: Any) -> str:
        """The question and the start of its answer."""
        return f"Question: {question}\nAnswer:"


@templates.register("chat")
@dataclass(frozen=True)
class Chat(Template):
    """The tokenizer's own chat template; the answer is asked for in a box."""

    holds_special_tokens = True

    def render(self, question: str, tokenizer: Any) -> str:
        """One message of the user's. Raises UsageError if the tokenizer has no chat template."""
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "template='chat' needs a tokenizer with a chat template, and "
                f"{getattr(tokenizer, 'name_or_path', '?')!r} has none; use template='plain', or the tokenizer of an "
                "instruction-tuned model"
            )
        messages = [{"role": "user", "content": f"{question}\n{BOX_INSTRUCTION}"}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@templates.register("qwen-math")
@dataclass(frozen=True)
class QwenMath(Template):
    """ChatML with Qwen2.5-Math's instruction as system prompt."""

    stop = ("<|im_end|>", "<|endoftext|>")

    def render(self, question: str, tokenizer: Any) -> str:
        """System prompt, question and the head of the assistant's turn."""
        return (
            f"<|im_start|>system\n{BOX_INSTRUCTION}<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )


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
