"""What the single and the vector environment share: problems, tokenizer, template, budgets and verifier."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.codec import BUILTIN_TOKENIZER, Codec, load_tokenizer
from envs.problem import PENDING, Problem, Problems, Verdict
from envs.problems import load_problems
from envs.shaping import RewardPart, make_parts, shape
from envs.templates import Template
from envs.verifier import Verifier
from registry import UsageError, check_at_least, did_you_mean, templates

__all__ = ["BUILTIN_TOKENIZER", "Task", "TaskSpec", "final_info", "load_tokenizer", "start_info"]

REWARDS = ("verified", "random")
UNLIMITED = 2**31  # an unlimited source is indexed from 0 to here
REMEMBERED = 4096  # generated problems, and prompts of them: a batch and an evaluation come back to theirs
DRAWN, MEASURED = 256, 32  # of an unlimited source, at first: problems, and prompts of the longest questions of these


def _reward_parts(given: Any, max_new_tokens: int) -> tuple[RewardPart, ...]:
    """The parts of a spec, which is JSON-able: an object of a class of its own belongs into a wrapper."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, str | dict) for one in given):
        raise UsageError(
            f"reward_parts={given!r} must be a tuple of ids or of {{'id': ..., field: value}}, such as ('format',); "
            "wrap the environment in envs.shaping.ShapedReward for others"
        )
    return make_parts(given, max_new_tokens)


@dataclass(frozen=True)
class TaskSpec:
    """The keyword arguments of both environments, all JSON-able.

    Attributes:
        problems: a name that ``envs.problems.load_problems`` takes: ``arithmetic`` (generated), ``gsm8k``, a file ...
        split: which split of it.
        problem_options: fields of the problem source (``{"level": 2}``, ``{"limit": 100}``).
        tokenizer: ``builtin``, a folder or a hub id.
        template: how a question becomes a prompt: a name of ``registry.templates``, see ``envs.templates``.
        max_prompt_tokens: budget of a prompt; a longer one is an error, never cut.
        max_new_tokens: budget of a completion; an episode of that length is truncated (and still verified).
        vocab_size: number of actions; default the tokenizer's. Models may pad their logits to more, or have none for
            tokens that their tokenizer adds, as long as no prompt, stop or pad token is among those.
        stop_token_ids: tokens that end a completion; default the tokenizer's EOS and what the generation settings of
            its folder list.
        reward: ``verified``, or ``random``: a coin flip instead, as a control arm. The info keeps the true verdict.
        reward_parts: what is added to that reward on the last token: ids of ``registry.reward_parts`` (``format``,
            ``length-penalty``) or ``{"id": ..., field: value}``. The control arm keeps them, so that it shows what they
            teach by themselves. Shaping is easily hacked: a policy may learn to collect the parts without solving
            anything. So ``is_success`` stays the verifier's.
    """

    problems: str = "arithmetic"
    split: str = "train"
    problem_options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "builtin"
    template: str = "plain"
    max_prompt_tokens: int = 64
    max_new_tokens: int = 40
    vocab_size: int | None = None
    stop_token_ids: tuple[int, ...] | None = None
    reward: str = "verified"
    reward_parts: tuple[str | dict[str, Any], ...] = ()


def named_problems(problems: str, split: str, options: Mapping[str, Any]) -> Problems:
    """``load_problems`` of what an environment takes. Raises UsageError for what JSON could not hold."""
    if not isinstance(problems, str):
        raise UsageError(
            f"problems={str(problems)[:60]!r} is {type(problems).__name__}, and an environment takes only JSON: give a "
            "name or a path as text, or 'module:function', which returns rows in memory"
        )
    if not isinstance(options, Mapping):
        raise UsageError(f"problem_options={options!r} is no mapping: give names and values, such as {{'limit': 100}}")
    if "split" in options:
        raise UsageError(
            f"problem_options={options!r}: the split is an argument of its own, split={options['split']!r}"
        )
    if not isinstance(split, str):
        raise UsageError(f"split={split!r} is {type(split).__name__}: give its name, such as 'train' or 'test'")
    return load_problems(problems, split, **options)


class Task:
    """A loaded ``TaskSpec``. ``V`` is the number of actions, ``max_length`` the longest prefix, in tokens."""

    def __init__(self, spec: TaskSpec) -> None:
        check_at_least(spec.max_prompt_tokens, 1, "max_prompt_tokens")
        check_at_least(spec.max_new_tokens, 2, "max_new_tokens")
        if spec.reward not in REWARDS:
            raise UsageError(f"reward={spec.reward!r}: {did_you_mean(str(spec.reward), REWARDS)}")
        self.spec = spec
        self.reward_parts = _reward_parts(spec.reward_parts, spec.max_new_tokens)
        self.template: Template = templates.make(spec.template)
        self.codec = Codec(self.template, spec.tokenizer, spec.vocab_size, spec.stop_token_ids)
        self.tokenizer = self.codec.tokenizer
        self.vocab_size = self.codec.vocab_size
        self.stop_token_ids = self.codec.stop_token_ids
        self.pad_token_id = self.codec.pad_token_id
        self.problems: Problems = named_problems(spec.problems, spec.split, spec.problem_options)
        self.max_length = spec.max_prompt_tokens + spec.max_new_tokens
        self._prompts: dict[int, NDArray[np.int64]] = {}
        self._connect()
        self._check_prompts()

    def _connect(self) -> None:
        """What belongs to this process: the verifier's workers, and a memo of generated problems."""
        self.verifier = Verifier(self.template.extract)
        self._problem = lru_cache(maxsize=REMEMBERED)(self.problems.__getitem__)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("verifier", "_problem")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def __deepcopy__(self, memo: dict[int, Any]) -> Task:
        """The task itself, which no episode changes: copies of an environment share it."""
        return self

    def _check_prompts(self) -> None:
        """All prompts of a finite source are measured at once, so that hours later none turns out too long; of an
        unlimited one the prompts of the longest questions among some that are drawn as episodes draw them."""
        if self.problems.size is None:
            rng = np.random.default_rng(0)
            drawn = {self.draw(rng) for _ in range(DRAWN)}
            indices = sorted(drawn, key=lambda index: len(self._problem(index).question))[-MEASURED:]
        else:
            indices = list(range(self.problems.size))
        lengths = [len(self._tokenize(index)) for index in indices]
        over = sum(length > self.spec.max_prompt_tokens for length in lengths)
        if over:
            raise UsageError(
                f"{'some' if self.problems.size is None else over} of {self.problems.size or DRAWN} prompts of "
                f"{self.problems.name} are longer than "
                f"max_prompt_tokens={self.spec.max_prompt_tokens} (the longest has {max(lengths)}); "
                f"raise max_prompt_tokens, or leave those problems out"
            )

    def _tokenize(self, index: int) -> NDArray[np.int64]:
        ids = self._prompts.get(index)
        if ids is None:
            if self.problems.size is None and len(self._prompts) >= REMEMBERED:
                self._prompts.clear()
            ids = self._prompts[index] = self.codec.prompt(self._problem(index).question)
        return ids

    def problem(self, index: int) -> Problem:
        """Problem ``index``; raises UsageError outside of the source."""
        size = self.problems.size if self.problems.size is not None else UNLIMITED
        if not 0 <= index < size:
            raise UsageError(f"problem_index={index} is outside of {self.problems.name}, which has 0..{size - 1}")
        return self._problem(index)

    def prompt(self, index: int) -> NDArray[np.int64]:
        """Prompt token ids of a problem, int64."""
        ids = self._tokenize(index)
        if len(ids) > self.spec.max_prompt_tokens:
            raise UsageError(
                f"the prompt of problem {index} of {self.problems.name} has {len(ids)} tokens, over "
                f"max_prompt_tokens={self.spec.max_prompt_tokens}; raise it"
            )
        return ids

    def draw(self, rng: np.random.Generator) -> int:
        """A uniformly drawn problem index."""
        return int(rng.integers(self.problems.size if self.problems.size is not None else UNLIMITED))

    def text(self, completion: NDArray[np.int64]) -> str:
        """The completion's text, as ``Codec.text``."""
        return self.codec.text(completion)

    def finish_reason(self, completion: NDArray[np.int64]) -> str | None:
        """``eos``, ``stop`` (a stop string), ``length``, or None while the completion goes on."""
        return self.codec.ending(completion) or ("length" if len(completion) >= self.spec.max_new_tokens else None)

    def verdict(self, completion: NDArray[np.int64], index: int) -> Future[Verdict]:
        """The verdict on a completion of problem ``index``, already finished unless a worker is needed."""
        return self.verifier.submit(self.codec.graded_text(completion), self.problem(index))

    def outcome(
        self,
        start: dict[str, Any],
        reason: str,
        completion: NDArray[np.int64],
        verdict: Verdict,
        seed: int | None = None,
    ) -> tuple[float, dict[str, Any]]:
        """Reward and terminal info of the episode that began with the info ``start``; ``seed`` is that of its
        environment, where it numbers episodes by itself. While a verdict is ``PENDING`` the reward is 0, without
        parts."""
        info = {**start, **final_info(verdict, reason, len(completion))}
        if verdict is PENDING:
            return 0.0, info
        numbers = [start["problem_index"], start["episode_id"], *([] if seed is None else [seed % 2**64])]
        reward = self._unshaped_reward(verdict, completion, numbers)
        return shape(self.reward_parts, reward, info) if self.reward_parts else (reward, info)

    def _unshaped_reward(self, verdict: Verdict, completion: NDArray[np.int64], numbers: list[int]) -> float:
        """The verdict's reward, or the control arm's fair coin, keyed by the episode's ``numbers`` and its
        completion."""
        if self.spec.reward == "random":
            return float(np.random.default_rng([*numbers, *completion.tolist()]).random() < 0.5)
        return float(verdict.reward)

    def observation_space(self) -> spaces.Dict:
        """The prefix, padded: ``input_ids`` [L] int64 and ``length`` [1] int64. Length 0 is an idle slot."""
        ids = spaces.Box(0, self.vocab_size - 1, (self.max_length,), np.int64)
        return spaces.Dict({"input_ids": ids, "length": spaces.Box(0, self.max_length, (1,), np.int64)})

    def action_space(self) -> spaces.Discrete:
        """The next token."""
        return spaces.Discrete(self.vocab_size)


def start_info(task: Task, index: int, episode: int, group: int, sample: int) -> dict[str, Any]:
    """The info of a reset."""
    return {
        "problem_id": task.problem(index).id,
        "problem_index": int(index),
        "group_id": int(group),
        "sample_idx": int(sample),
        "episode_id": int(episode),
        "prompt_len": len(task.prompt(index)),
    }


INFO = frozenset(
    (
        "problem_id",
        "problem_index",
        "group_id",
        "sample_idx",
        "episode_id",
        "prompt_len",
        "is_success",
        "finish_reason",
        "response_len",
        "extracted",
        "status",
    )
)
"""What every terminal info has; what else is a number there is a part of the reward."""


def final_info(verdict: Verdict, reason: str, response_len: int) -> dict[str, Any]:
    """What a terminal info adds to the episode's start info."""
    return {
        "is_success": bool(verdict.reward >= 1.0),
        "finish_reason": reason,
        "response_len": int(response_len),
        "extracted": verdict.extracted,
        "status": verdict.status,
    }
