"""From a whole completion to the one candidate answer that is graded.

The rules, in order: only the text after the last ``</think>`` counts, and a thought that is opened and never closed
has no answer; the last ``\\boxed``; otherwise the last ``####``, unless it is a heading over a statement; otherwise the
last statement of the answer ("answer is", "Answer:", "the answer to the question would be", "12 is the answer"), which
may stand alone before the last line. There is no fallback to the last number of the text. Every step is linear in the
length of the text, which is untrusted.
"""

from __future__ import annotations

import re
from typing import Any

from registry import UsageError

Extraction = tuple[str, str]
"""The candidate and ``""``, or ``""`` and why there is none: ``"no_answer"`` or ``"malformed"``."""

NO_ANSWER: Extraction = ("", "no_answer")
MALFORMED: Extraction = ("", "malformed")

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BARE_BOX = re.compile(r"[ \t]*([-+]?[0-9][0-9.,/]*|[A-Za-z])(?![A-Za-z])")
_ADVERBS = r"(?:therefore|thus|then|hence|so|simply|just|also|indeed|actually|now|clearly|finally|consequently|exactly)"
_ASIDE = r"(?: (?:to|for|of|in|here|that|we|you|i)\b[^.:;!?=\n]{0,60}?)?"
_LINK = (
    rf"(?:,? {_ADVERBS},?){{0,2}} (?:(?:would|will|should|must)(?:,? {_ADVERBS},?){{0,2}} be|is|equals|becomes"
    r"|comes (?:out )?to(?: be)?|turns out to be|works out (?:to be|to|as))\b"
)
_NO_SUM = _ASIDE.replace("=", r"=+*/\d")  # before "=" an aside that calculates is no aside
_PHRASE = re.compile(
    rf"(?<![A-Za-z0-9])answer(?P<mark>[*_\"'`]{{0,3}})"
    rf"(?:(?P<plain> {{1,3}}is\b|\s{{0,3}}:)|(?P<full>{_ASIDE}{_LINK}|{_NO_SUM} ?=))[*_]{{0,3}}:?",
    re.IGNORECASE,
)
_ANNOUNCEMENT = re.compile(
    rf"(?:^[#*_\s]*(?:the )?(?:final |correct )?answer[:*_\s]*"
    rf"|(?<![A-Za-z0-9])answer[*_]{{0,3}}(?:{_ASIDE}{_LINK})? ?:[*_\s]*)$",
    re.IGNORECASE,
)
_REVERSED = re.compile(
    rf"(?:^|[\n.:;]|\b{_ADVERBS}\b,?)[ \t]*"
    r"(?P<value>[*$€£]{0,3}[-+−]?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?%?[*$]{0,3}(?: [a-z]{3,20})?)"
    r",? is (?:the|our|my|your) (?:final |correct )?answer"
    r"(?=\s*(?:[.!*]|$)| to (?:the|this|your) (?:question|problem)\b)",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"[*_\s]*(?:(?:step|part|case|method|phase|stage|section|solution|problem|question) ?(?:[0-9]|[IVX]+\b|[:*]|$).*"
    r"|[0-9]{1,2}[.)]\s+[*_]*(?-i:[A-Z]).*|[^0-9\\$=]*[A-Za-z]{3}[^0-9\\$=]*)",
    re.IGNORECASE | re.DOTALL,
)
"""A step with its title, a numbered title, or words without a value."""
_LONGEST_HEADING = 200
_END_TOKEN = re.compile(r"\s*(?:<[|｜][^<>|｜\s]{1,40}[|｜]>|</s>|<(?:eos|pad|end_of_turn)>)\s*$")
_LONGEST_TOKEN = 48
_QUANTITY = (
    r"(?:total|number|amount|value|result|quantity|figure|integer|cost|price|length|distance|height|width|area|volume"
    r"|perimeter|age|weight|speed|time|profit|probability|percentage|average|mean)"
)
_SUBJECT = r"(?:s?he|it|they|we|you|i|there|[A-Z][a-z]+)"
_VERB = (
    r"(?:is|are|was|were|will be|will have|has|have|had|makes?|made|gets?|got|earns?|earned|pays?|paid|needs?|needed"
    r"|spends?|spent|costs?|sells?|sold|saves?|saved|takes?|took)"
)
_OPENING = r"[*_`\"$€£({\[|+\-− \t]{0,8}"
_VALUE = rf"{_OPENING}(?:\.?\d|\\|[√π])"
_LEAD = re.compile(
    rf"[ ,\t]*(?:(?:{_ADVERBS}|the|an?|that|of|be|equal to|given by|{_QUANTITY}|(?-i:{_SUBJECT}) {_VERB})\b[ ,:]*)"
    rf"{{1,8}}(?={_VALUE})",
    re.IGNORECASE,
)
_STATES_VALUE = re.compile(rf"{_VALUE}|{_OPENING}[A-Za-z](?![A-Za-z'’]|\s+[A-Za-z]{{2}})")
_BOLD = re.compile(r"\*\*([^*]+)\*\*(?![^\s.,;:!?])")
_JSON = re.compile(
    r"\s*(?:(?P<quote>[\"'])(?P<text>(?:[^\"'\\\n]|\\.|(?!(?P=quote))[\"'])*)(?P=quote)|(?P<number>-?[0-9][0-9.]*))"
    r"(?=\s*(?:\}|$|,\s*[\"'][^\"'\n]*[\"']\s*:))"
)
"""A value of a JSON object, followed by the next key or the end."""
_REASON = re.compile(r",?\s\(?(?:because|since)\s|,\s(?:so|which|not)\s")
_SENTENCE_END = re.compile(r"(?<!\\)[.!?][*$)\"']{0,4}(?:\s|$)")


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last message of the assistant in a list of chat messages
    (``[{"role": "assistant", "content": ...}]``). Raises ``UsageError`` for anything else."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, dict):
        completion = [completion]
    if isinstance(completion, list | tuple) and all(isinstance(message, dict) for message in completion):
        spoken = [message for message in completion if message.get("role") == "assistant"]
        content = spoken[-1].get("content") if spoken else None
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            content = "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
        if isinstance(content, str):
            return content
    raise UsageError(
        f"the completion {str(completion)[:80]!r} is of type {type(completion).__name__}; give text ('' for an empty "
        "one), or chat messages of which one has the role 'assistant' and its text as content"
    )


def extract(text: str) -> Extraction:
    """The candidate answer of a completion."""
    region = after_thought(without_end_tokens(text))
    if region is None:
        return NO_ANSWER
    return last_box(region) or last_hash(region) or last_line(region) or last_phrase(region) or NO_ANSWER


def without_end_tokens(text: str) -> str:
    """A completion without the tokens that ended it, which other loops' decoding may have left as text."""
    end = len(text)
    while match := _END_TOKEN.search(text, max(0, end - _LONGEST_TOKEN), end):
        end = match.start()
    return text[:end]


def extract_tagged(text: str) -> Extraction:
    """The candidate inside the last ``<answer> ... </answer>`` (the closing tag may have been consumed as the stop
    string): its box if it has one, otherwise all of it. The thought must be closed; its opening tag may stand in the
    prompt."""
    text = without_end_tokens(text)
    if "</think>" not in text:
        return NO_ANSWER
    region = after_thought(text)
    if region is None or "<answer>" not in region:
        return NO_ANSWER
    inner = region[region.rfind("<answer>") + len("<answer>") :].partition("</answer>")[0]
    return last_box(inner) or last_hash(inner) or ((inner.strip(), "") if inner.strip() else MALFORMED)


def after_thought(text: str) -> str | None:
    """The text after the last ``</think>``, or None if a thought is open at the end."""
    close = text.rfind("</think>")
    if text.rfind("<think>") > close:
        return None
    return text[close + len("</think>") :] if close >= 0 else text


def last_box(text: str) -> Extraction | None:
    """Content of the last box (of nested boxes the innermost), None without a box, malformed if empty or unclosed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    match = _BOX.match(text, start)
    if match is None:
        # Only a longer command such as \boxedfoo ends the text: look for the real one.
        boxes = list(_BOX.finditer(text))
        if not boxes:
            return None
        match = boxes[-1]
    content = _box_content(text, match.end())
    return (content.strip(), "") if content.strip() else MALFORMED


def _box_content(text: str, start: int) -> str:
    """What the box holds whose command ends at ``start``, with its blanks; ``""`` if it is unclosed."""
    body = start
    while body < len(text) and text[body] in " \t\n":
        body += 1
    if body < len(text) and text[body] == "{":
        end = closing_brace(text, body)
        return text[body + 1 : end] if end >= 0 else ""
    bare = _BARE_BOX.match(text, start)
    return bare[1] if bare else ""


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one at ``start``, or -1. Escaped braces do not count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1


def last_hash(text: str) -> Extraction | None:
    """The rest of the line after the last ``####`` (the mark of GSM8K). Where that is a heading of Markdown, and the
    answer is stated below it, the statement."""
    start = text.rfind("####")
    if start < 0:
        return None
    rest, _, below = text[start + 4 :].partition("\n")
    rest = rest.strip()
    if rest and "nswer" in text[start:] and _HEADING.fullmatch(rest[:_LONGEST_HEADING]):
        return last_line(text[start:]) or last_phrase(below) or (rest, "")
    return (rest, "") if rest else MALFORMED


def last_line(text: str) -> Extraction | None:
    """The last line, or displayed formula, if the line before it does nothing but announce the answer: a heading
    "Answer", or a statement that ends with its colon."""
    text = text.rstrip()
    opener = {"\\]": "\\[", "$$": "$$"}.get(text[-2:])
    start = text.rfind(opener, 0, len(text) - 2) if opener else text.rfind("\n") + 1
    before, last = text[: max(start, 0)].rstrip(), text[max(start, 0) :].removeprefix("\\[").removesuffix("\\]")
    if not _ANNOUNCEMENT.search(before[before.rfind("\n") + 1 :][-200:]) or "nswer" in last:
        return None
    return _statement(" ".join(last.split()))


def last_phrase(text: str) -> Extraction | None:
    """The value of the last statement of the answer, to the end of the sentence, the line or the reason given for it.

    "answer is" and "Answer:" are statements whatever follows. With an aside, adverbs or another verb ("the answer to
    the question would therefore be 12") one counts only if a value follows. Words between verb and number are dropped
    if all are of closed classes: adverbs, articles, nouns of quantity, a subject with its verb ("she has a total of
    12"). Comparisons, negations and operations ("more than", "not", "half of") are none of them, and stay. A sentence
    "12 is the answer" is a statement, too.
    """
    if "nswer" not in text and "NSWER" not in text:
        return None
    reversed_at, value = max(((m.start(), m["value"]) for m in _REVERSED.finditer(text)), default=(-1, ""))
    for match in reversed(list(_PHRASE.finditer(text, max(0, reversed_at)))):
        lead = _LEAD.match(text, match.end())
        start = (lead or match).end()
        quoted = _JSON.match(text, match.end()) if match["plain"] and match["mark"][:1] in ("'", '"') else None
        if quoted:
            content = quoted["number"] or quoted["text"].replace("\\\\", "\\").strip()
            return (content, "") if content else MALFORMED
        if match["plain"] or lead or _STATES_VALUE.match(text, start):
            return _statement(text[start:].lstrip(" \t").partition("\n")[0])
    return (value.strip("*"), "") if value else None


def _statement(rest: str) -> Extraction:
    bold = _BOLD.match(rest)
    if bold:
        rest = bold[1] + rest[bold.end() :]
    end = _SENTENCE_END.search(rest)
    rest = rest[: end.start()] + rest[end.start() + 1 : end.end()] if end else rest
    rest = _REASON.split(rest, maxsplit=1)[0].strip().strip("*` ")
    return (rest, "") if rest else NO_ANSWER


def is_solution(text: str) -> bool:
    """Whether a text marks its final answer, as worked solutions do."""
    return "####" in text or _BOX.search(text) is not None


def gold_of(text: str, row: str) -> str:
    """The gold answer in a worked solution: the last box or ``####``, with the blanks about it. ``row`` names it in the
    error."""
    boxes = list(_BOX.finditer(text))
    content = _box_content(text, boxes[-1].end()) if boxes else text.rpartition("####")[2].partition("\n")[0]
    if (not boxes and "####" not in text) or not content.strip():
        raise UsageError(f"{row}: the solution has neither a \\boxed answer nor a '####' line; name the answer column")
    return content
