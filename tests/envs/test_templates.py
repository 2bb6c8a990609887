"""Templates: prompt, stop strings and extractor together."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from envs.task import BUILTIN_TOKENIZER
from registry import UsageError, templates
from tests.oracles.byte_checkpoints import byte_tokenizer

QUESTION = "  What is 2 + 3?  "
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def builtin() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(str(BUILTIN_TOKENIZER))


@pytest.fixture(scope="module")
def adds_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that, as Llama's does, puts a BOS token before every text, and has a chat template that writes it."""
    words = ["<s>", "</s>", "<unk>", *["Question:", "What", "is", "2", "+", "3", "?", "Answer:"]]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT
    return fast


def test_plain_is_exact_and_has_no_stop_strings(builtin: Any) -> None:
    plain = templates.make("plain")
    assert plain.prompt(QUESTION, builtin) == "Question: What is 2 + 3?\nAnswer:"
    assert plain.stop == ()
    assert plain.prompt_ids(QUESTION, builtin) == builtin("Question: What is 2 + 3?\nAnswer:")["input_ids"]


@pytest.mark.parametrize("name", ["plain", "chat", "qwen-math", "r1"])
def test_bos_never_stands_twice(name: str, adds_bos: PreTrainedTokenizerFast) -> None:
    ids = templates.make(name).prompt_ids(QUESTION, adds_bos)
    assert ids.count(0) == 1 and ids[0] == 0


@pytest.mark.parametrize("name", ["chat", "qwen-math", "r1"])
def test_the_answer_is_asked_for_in_a_box(name: str, adds_bos: PreTrainedTokenizerFast) -> None:
    prompt = templates.make(name).prompt(QUESTION, adds_bos)
    assert "\\boxed{}" in prompt and "What is 2 + 3?" in prompt
    assert templates.make(name).extract(prompt)[0] == "", "the prompt's own box is no answer"


def test_chat_needs_a_chat_template(builtin: Any) -> None:
    with pytest.raises(UsageError, match=r"chat template.*template='plain'"):
        templates.make("chat").prompt(QUESTION, builtin)


def test_chat_is_the_tokenizers_own(shared_dir: Path) -> None:
    folder = shared_dir.parent / "models" / "smollm2-135m"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("no instruction-tuned tokenizer at hand")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ids = templates.make("chat").prompt_ids(QUESTION, tokenizer)
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>assistant\n")
    assert json.dumps(text).count("<|im_start|>user") == 1


def test_unknown_names_say_what_was_meant() -> None:
    with pytest.raises(UsageError, match="did you mean 'plain'"):
        templates.make("plane")


def test_the_readme_says_of_every_template_what_it_is() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = {
        row[0]: row[2]
        for row in re.findall(r"^\| `([\w-]+)` \| (.*?) \| ([^|]*(?:\\\|[^|]*)*) \| .* \|$", readme, re.M)
    }
    own = {name: templates.get(name) for name in templates if templates.get(name).__module__ == "envs.templates"}
    assert sorted(own) == ["chat", "plain", "qwen-math", "r1"]
    for name, component in own.items():
        stops = ", ".join(f"`{stop}`" for stop in component.stop).replace("|", r"\|") or "none (EOS)"
        assert table[name] == stops


IN_PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (CHAT, QUESTION.strip()),
        (CHAT.replace("message.content", "message.content | trim | lower"), QUESTION.strip().lower()),
        (CHAT.replace("message.content", "message.content[0].text"), QUESTION.strip()),
        (IN_PARTS, QUESTION.strip()),
    ],
)
def test_a_chat_template_shows_the_question_whatever_form_it_reads(adds_bos: Any, written: str, shown: str) -> None:
    adds_bos.chat_template = written
    try:
        assert shown in templates.make("chat").prompt(QUESTION, adds_bos)
        assert templates.make("chat").ending(adds_bos) == ("</s>" if written is IN_PARTS else "")
    finally:
        adds_bos.chat_template = CHAT


@pytest.mark.parametrize(
    "written", ["<|user|>{% if add_generation_prompt %}<|assistant|>{% endif %}", "{{ messages[0].role }}"]
)
def test_a_chat_template_that_leaves_the_question_out_is_refused(adds_bos: Any, written: str) -> None:
    adds_bos.chat_template = written
    try:
        with pytest.raises(UsageError, match="leaves out what is said"):
            templates.make("chat").prompt(QUESTION, adds_bos)
    finally:
        adds_bos.chat_template = CHAT


@pytest.mark.parametrize(
    "form",
    [
        "%d %B %Y",
        "%-d %B %Y %Z",
        "%F %T",
        "%D, %e %^b %h",
        "%-m/%-d/%y %-I:%M %p",
        "%x %X",
        "%j %U %u",
        "100%% %%d %%%d",
        "",
    ],
)
def test_a_template_that_tells_the_date_tells_the_same_on_every_day(form):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = f"{{{{ strftime_now('{form}') }}}}: {{{{ messages[0]['content'] }}}}"
    ids = templates.make("chat").prompt_ids("How much?", tokenizer)
    assert tokenizer.decode(ids).startswith(f"{datetime(2024, 7, 26).strftime(form)}: How much?")
