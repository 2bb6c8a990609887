"""How a question becomes a prompt, what ends a completion and where its answer stands: one choice, never three.

| name | prompt | stop strings | answer |
|---|---|---|---|
| ``plain`` | ``Question: ...\\nAnswer:`` | EOS alone | last box, else ``####``, else "answer is" |
| ``chat`` | the tokenizer's own chat template; the answer is asked for in a box | EOS alone | as ``plain`` |
| ``qwen-math`` | ChatML with Qwen2.5-Math's system prompt | ``<|im_end|>``, ``<|endoftext|>`` | as ``plain`` |
| ``r1`` | a dialogue that opens ``<think>`` | ``</answer>`` | in the last ``<answer>``, after ``</think>`` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from envs.verifier.extract import Extraction, extract, extract_tagged
from registry import UnknownName, UsageError

BOX_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction that Qwen2.5-Math was trained with (model card of Qwen/Qwen2.5-Math-7B-Instruct)."""

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process and then gives the answer. The reasoning process and the answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, and the final answer is put in \\boxed{}."
)


def _plain(question: str, tokenizer: Any) -> str:
    """``Question: ...``, then ``Answer:`` on a line of its own."""
    return f"Question: {question}\nAnswer:"


def _chat(question: str, tokenizer: Any) -> str:
    """The tokenizer's own chat template; the answer is asked for in a box."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"template='chat' needs a tokenizer with a chat template, and {getattr(tokenizer, 'name_or_path', '?')!r} "
            "has none; use template='plain', or the tokenizer of an instruction-tuned model"
        )
    messages = [{"role": "user", "content": f"{question}\n{BOX_INSTRUCTION}"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _qwen_math(question: str, tokenizer: Any) -> str:
    """ChatML with Qwen2.5-Math's instruction as system prompt."""
    return (
        f"<|im_start|>system\n{BOX_INSTRUCTION}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def _r1(question: str, tokenizer: Any) -> str:
    """A dialogue that opens ``<think>``; the answer stands in the last ``<answer>`` (arXiv 2501.12948)."""
    return f"{R1_PREAMBLE}\nUser: {question}\nAssistant: <think>"


@dataclass(frozen=True)
class Template:
    """Prompt, stop strings and answer extractor, together.

    Attributes:
        name: its key in ``TEMPLATES``.
        stop: strings that end a completion besides the EOS token.
        extract: completion -> (candidate, "") or ("", why there is none).
        render: (question, tokenizer) -> the prompt's text.
    """

    name: str
    stop: tuple[str, ...]
    extract: Callable[[str], Extraction]
    render: Callable[[str, Any], str]

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
        written = self.name == "chat" or bool(bos and text.startswith(bos))
        return list(tokenizer(text, add_special_tokens=not written)["input_ids"])


TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Template("plain", (), extract, _plain),
        Template("chat", (), extract, _chat),
        Template("qwen-math", ("<|im_end|>", "<|endoftext|>"), extract, _qwen_math),
        Template("r1", ("</answer>",), extract_tagged, _r1),
    )
}


def template(name: str) -> Template:
    """The template of that name; raises ``UnknownName`` with the nearest names."""
    if name not in TEMPLATES:
        raise UnknownName("template", name, TEMPLATES)
    return TEMPLATES[name]
