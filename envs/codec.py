"""Between text and tokens, under one template and one tokenizer: prompts, what ends a completion, what it says."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.templates import Template
from registry import UsageError, check_at_least
from registry.hub import hub_unreachable, is_lfs_pointer

BUILTIN_TOKENIZER = Path(__file__).parent / "tokenizer"


def load_tokenizer(name: str) -> Any:
    """A transformers fast tokenizer: ``builtin``, a folder or a hub id. Raises UsageError when there is none."""
    if not isinstance(name, str | os.PathLike):
        raise UsageError(
            f"tokenizer={str(name)[:60]!r} is {type(name).__name__}: give 'builtin', a folder or a hub id as text; one "
            "in memory is written into a folder by its save_pretrained"
        )
    name = os.fspath(name)
    source = _source(name)
    files = sorted(file for file in Path(source).glob("*") if file.suffix in (".json", ".jinja", ".model"))
    key = name, str(Path(source).resolve()), tuple((f.name, f.stat().st_mtime_ns) for f in files)
    tokenizer, state = _load_tokenizer(*key)
    if _state(tokenizer) != state:  # whoever had it before has changed it, and keeps it
        _load_tokenizer.cache_clear()
        tokenizer, _ = _load_tokenizer(*key)
    return tokenizer


def _state(tokenizer: Any) -> str:
    """What trainers change of a tokenizer that they are given: special and added tokens, sides, template."""
    return f"{tokenizer!r}{tokenizer.chat_template!r}"


@lru_cache(maxsize=8)
def _load_tokenizer(name: str, place: str, files: tuple[tuple[str, int], ...]) -> tuple[Any, str]:
    """The tokenizer and its state; ``place`` and ``files`` tell it from one that the same name stood for before."""
    from transformers import PreTrainedTokenizerFast

    source = _source(name)
    if name != "builtin" and (Path(source).is_absolute() or name.startswith(".")) and not Path(source).is_dir():
        raise UsageError(f"tokenizer={name!r}: no such folder; give a Hugging Face folder, a hub id or 'builtin'")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=_only_cached(source))
        return tokenizer, _state(tokenizer)
    except Exception as error:  # the hub client raises many kinds; each means the same to the caller
        said = str(error).strip().splitlines() or [""]
        for file in Path(source).glob("tokenizer*"):
            if file.is_file() and is_lfs_pointer(file):
                raise UsageError(f"{file} is a git-lfs pointer, not the file: run git lfs pull in {source}") from error
        missing = "it has no tokenizer.json" if Path(source).is_dir() else "the hub cannot be reached, or has none such"
        why = missing if "Couldn't instantiate" in said[0] else f"{type(error).__name__}: {said[0]}"
        raise UsageError(
            f"tokenizer={name!r} could not be loaded ({why}); give a Hugging Face folder with tokenizer.json, a "
            "reachable hub id or 'builtin'"
        ) from error


class Codec:
    """All that lies between text and tokens: prompts, stop tokens, the text of completions, demonstrations.

    Args:
        template: how a question becomes a prompt.
        tokenizer: ``builtin``, a folder or a hub id.
        vocab_size: number of actions; default the tokenizer's.
        stop_token_ids: tokens that end a completion; default the tokenizer's EOS and those that the tokenizer's folder
            lists for generation.

    Attributes:
        tokenizer: the loaded one.
        vocab_size: V.
        stop_token_ids: with the template's stop strings that are one token.
        pad_token_id: what an observation is padded with.

    Raises:
        UsageError: no tokenizer or no stop token, or a stop or pad token that is no action.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: str,
        vocab_size: int | None = None,
        stop_token_ids: tuple[int, ...] | None = None,
    ) -> None:
        self.template = template
        self.tokenizer = load_tokenizer(tokenizer)
        self.name = os.fspath(tokenizer)
        settings = _settings(self.name, "tokenizer_config.json")
        self._kept = {key: settings[key] for key in ("tokenizer_class", "auto_map") if key in settings}
        if vocab_size is not None:
            check_at_least(vocab_size, 1, "vocab_size")
        self.vocab_size = len(self.tokenizer) if vocab_size is None else int(vocab_size)
        self.pad_token_id = int(self.tokenizer.pad_token_id or 0)
        self._ending = template.ending(self.tokenizer)
        self._ending_token = _token_of(self.tokenizer, self._ending)
        if stop_token_ids is not None:
            stop_token_ids = tuple(_token_ids(stop_token_ids, f"stop_token_ids={stop_token_ids!r}"))
        self.stop_token_ids = self._stop_tokens(stop_token_ids)
        for kind, ids in (("stop", sorted(self.stop_token_ids)), ("pad", [self.pad_token_id])):
            self._check_actions(ids, f"the {kind} token")
        self._opened = "<think>" if template.opens_thought(self.tokenizer) else ""
        self._check_turn_end(stop_token_ids)

    def _stop_tokens(self, given: tuple[int, ...] | None) -> frozenset[int]:
        """The template's stop strings that are one token, and ``given`` or what the checkpoint generates up to."""
        stops = {token for stop in self.template.stop if (token := _token_of(self.tokenizer, stop)) is not None}
        if given is not None:
            return frozenset({*stops, *given})
        eos = self.tokenizer.eos_token_id
        ends = {token for token in _generation_ends(self.name) if 0 <= token < self.vocab_size}  # others are no actions
        ends |= set() if eos is None else {int(eos)}
        if not ends:
            raise UsageError(f"tokenizer={self.name!r} has no EOS token; pass stop_token_ids=(...)")
        return frozenset(stops | ends)

    def _check_actions(self, ids: Any, what: str) -> None:
        over = [int(token) for token in ids if not 0 <= token < self.vocab_size]
        if over:
            name = self.tokenizer.convert_ids_to_tokens(over[0]) if 0 <= over[0] < len(self.tokenizer) else None
            raise UsageError(
                f"{what} {name!r} has the id {over[0]}, which is none of the "
                f"{self.vocab_size} actions: give the tokenizer of the model that acts, and its number of logits as "
                "vocab_size"
            )

    def _check_turn_end(self, given: tuple[int, ...] | None) -> None:
        """Warn of a chat template whose turns end with a token that does not end a completion."""
        ending, token = self._ending, self._ending_token
        if given != () and token is not None and token not in self.stop_token_ids and ending not in self.template.stop:
            wanted = tuple(sorted({*self.stop_token_ids, token}))
            warnings.warn(
                f"the assistant's turn ends with {ending!r} (token {token}), which is none of the stop tokens "
                f"{sorted(self.stop_token_ids)}, so completions go on over it: pass stop_token_ids={wanted}",
                stacklevel=5,
            )

    def prompt(self, question: str) -> NDArray[np.int64]:
        """Prompt token ids [P], int64."""
        ids = np.asarray(self.template.prompt_ids(question, self.tokenizer), dtype=np.int64)
        if len(ids) and ids.max() >= self.vocab_size:
            self._check_actions(ids, f"in the prompt of {question[:60]!r} the token")
        return ids

    def text(self, completion: NDArray[np.int64]) -> str:
        """The completion's text, special tokens written out, without the stop and pad tokens at its end. What an
        observation is padded with where the tokenizer has no pad token is a token like any other."""
        tokenizer = self.tokenizer
        ids, dropped = completion.tolist(), {*self.stop_token_ids, tokenizer.pad_token_id, tokenizer.eos_token_id}
        while ids and ids[-1] in dropped:
            ids.pop()
        return self._decode(ids)

    def graded_text(self, completion: NDArray[np.int64]) -> str:
        """What the verifier reads: ``text``, with the thought that the prompt has opened."""
        return self._opened + self.text(completion)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def ending(self, completion: NDArray[np.int64]) -> str | None:
        """``eos`` (a stop token), ``stop`` (a stop string), or None while the completion goes on."""
        if int(completion[-1]) in self.stop_token_ids:
            return "eos"
        if self.template.stop:
            # A stop string may share its first token with earlier text, so a tail a little longer than it is decoded.
            longest = max(len(stop) for stop in self.template.stop)
            tail = self._decode(completion[-(longest + 4) :].tolist())
            if any(stop in tail for stop in self.template.stop):
                return "stop"
        return None

    def ends_once(self, completion: NDArray[np.int64]) -> bool:
        """Whether a completion ends with its last token and not before."""
        if self.ending(completion) is None or any(int(token) in self.stop_token_ids for token in completion[:-1]):
            return False
        text = self._decode(completion[:-1].tolist())
        return not any(stop in text for stop in self.template.stop)

    def demonstration(self, solution: str, answer: str) -> NDArray[np.int64]:
        """A worked solution as a completion [T], with what ends it.

        Raises:
            UsageError: nothing ends a completion, or a token is no action.
        """
        body = self.template.demonstration(solution, answer, bool(self._opened))
        if self._ending in self.template.stop and self._ending_token not in self.stop_token_ids:
            ids = self._encode(body + self._ending)
        else:
            ids = [*self._encode(body), self.end_token()]
        self._check_actions(ids, f"in the demonstration {solution[:60]!r} the token")
        return np.asarray(ids, dtype=np.int64)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

    def end_token(self) -> int:
        """The token that ends a completion: the template's own, else EOS, else any stop token. Raises UsageError
        without any."""
        for token in (self._ending_token, self.tokenizer.eos_token_id, *sorted(self.stop_token_ids)):
            if token in self.stop_token_ids:
                return int(token)
        raise UsageError("no token ends a completion: leave stop_token_ids out, or give one at least")

    def save(self, folder: Path) -> None:
        """Write the tokenizer for others to load, its settings as the folder that it is from has them: what reads them
        elsewhere may know that folder's class of tokenizers alone."""
        self.tokenizer.save_pretrained(folder)
        if self._kept:
            path = folder / "tokenizer_config.json"
            written = {**json.loads(path.read_text(encoding="utf-8")), **self._kept}
            path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_of(tokenizer: Any, text: str) -> int | None:
    """The token that is written so, special ones among them; None without one. It asks for the one alone: all of a
    vocabulary of 150,000 take a tenth of a second."""
    token = tokenizer.convert_tokens_to_ids(text) if text else None
    return token if token is not None and tokenizer.convert_ids_to_tokens(token) == text else None


def _source(name: str) -> str:
    return str(BUILTIN_TOKENIZER) if name == "builtin" else os.path.expanduser(name)


def _only_cached(source: str) -> bool:
    return Path(source).is_dir() or hub_unreachable()


def _settings(name: str, file: str) -> dict[str, Any]:
    """A JSON file beside the tokenizer; nothing where there is none."""
    source = _source(name)
    path: str | Path | None = Path(source) / file
    if not Path(source).is_dir():
        from transformers.utils import cached_file

        path = cached_file(
            source,
            file,
            local_files_only=_only_cached(source),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if path is None or not Path(path).is_file():
        return {}
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}): fetch the file anew") from error
    return settings if isinstance(settings, dict) else {}


def _generation_ends(name: str) -> list[int]:
    """The tokens up to which the tokenizer's checkpoint generates: of its generation settings, else of its config."""
    for file in ("generation_config.json", "config.json"):
        given = _settings(name, file).get("eos_token_id")
        if given is not None:
            ids = [one for one in (given if isinstance(given, list) else [given]) if one != -1]  # -1 stands for none
            return _token_ids(ids, f"{file} of {name!r}: eos_token_id={given!r}")
    return []


def _token_ids(given: Any, where: str) -> list[int]:
    """Token ids as integers. Raises UsageError, which ``where`` begins, for anything else."""
    ids = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else None
    if ids is None or not all(
        isinstance(one, int | np.integer) and not isinstance(one, bool) and one >= 0 for one in ids
    ):
        raise UsageError(f"{where} must be token ids, such as (2,): integers of at least 0")
    return [int(one) for one in ids]
