"""Answers of a model that our engine runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agents.memory import fitting_slots
from agents.rollout import collect
from benchmarks.answers.kept import GREEDY, Answer, Keep, Place
from benchmarks.answers.settings import Settings
from envs.codec import Codec
from envs.problem import Problems
from envs.task import Task, TaskSpec
from envs.vector import MathReasonVector
from policies import Policy
from policies.pretrained.load import BUILT_IN, load_config
from registry import UsageError, templates

MOST_TOKENS = 1 << 24  # of a rollout, which holds room for the whole budget of each completion


@dataclass
class Engine:
    """A policy and the environment slots that it writes in.

    Attributes:
        settings: what is evaluated.
        policy: the model.
        slots: completions at a time, at most.
    """

    settings: Settings
    policy: Policy
    slots: int

    @staticmethod
    def of(settings: Settings, slots: int, device: str) -> Engine:
        """Load the model. Raises ``UsageError`` where there is none."""
        return Engine(settings, Policy.load(settings.model, device=device, dtype=settings.dtype), slots)

    def write(self, name: str, problems: Problems, kind: str, missing: list[Place], keep: Keep) -> None:
        """Write what is missing of a kind, ``keep`` each answer as it ends. A completion is a function of the seed, its
        problem and its number alone, whatever else is written with it."""
        samples = 1 if kind == GREEDY else self.settings.samples
        envs = self._envs(name, problems, len(missing))
        longest = max(1, MOST_TOKENS // (samples * self.settings.max_new_tokens))
        for run in _runs(sorted({problem for problem, _ in missing}), longest):
            mu = self.policy.behavior(
                tuple(range(self.policy.num_layers)),
                slots=envs.num_envs,
                max_length=envs.task.max_length,
                temperature=0.0 if kind == GREEDY else self.settings.temperature,
                seed=self.settings.seed,
            )
            ended = _Ended(envs, problems, kind, set(missing), keep)
            collect(mu, envs, run, samples, on_step=ended, first_group=run[0], defer=False)

    def _envs(self, name: str, problems: Problems, wanted: int) -> MathReasonVector:
        """Slots on a problem set, as many as are wanted and fit into memory."""
        settings = self.settings
        built_in = settings.model in BUILT_IN
        tokenizer = "builtin" if built_in else settings.model
        vocab_size = None if built_in else int(load_config(settings.model).vocab_size)
        codec = Codec(templates.make(settings.template), tokenizer, vocab_size)
        longest = max(len(codec.prompt(problems[n].question)) for n in range(problems.size or 0))
        spec = TaskSpec(
            problems=name,
            split=settings.split,
            problem_options=settings.options(name),
            tokenizer=tokenizer,
            template=settings.template,
            max_prompt_tokens=longest,
            max_new_tokens=settings.max_new_tokens,
            vocab_size=vocab_size,
        )
        slots = fitting_slots(self.policy, Task(spec), None, min(self.slots, wanted))
        if slots < 1:
            raise UsageError(
                f"not enough memory for one completion of {settings.max_new_tokens} tokens: lower --max-new-tokens, or "
                "take --dtype bfloat16 or a smaller model"
            )
        return MathReasonVector(num_envs=slots, copy=False, **asdict(spec))


class _Ended:
    """Follows a rollout's steps and keeps the answers that end and are wanted."""

    def __init__(self, envs: MathReasonVector, problems: Problems, kind: str, wanted: set[Place], keep: Keep) -> None:
        self.task, self.problems, self.kind, self.wanted, self.keep = envs.task, problems, kind, wanted, keep
        self.tokens: list[list[int]] = [[] for _ in range(envs.num_envs)]

    def __call__(self, _: int, seen: dict[str, Any]) -> bool:
        for slot, (token, info) in enumerate(zip(seen["actions"].tolist(), seen["infos"], strict=True)):
            self.tokens[slot].append(token)
            if not info:
                continue
            completion = np.array(self.tokens[slot][-info["response_len"] :], dtype=np.int64)
            self.tokens[slot].clear()
            place = int(info["problem_index"]), int(info["sample_idx"])
            if place in self.wanted:
                self.keep(self._answer(*place, info, self.task.text(completion)))
        return True

    def _answer(self, problem: int, sample: int, info: dict[str, Any], text: str) -> Answer:
        return Answer(
            kind=self.kind,
            problem=problem,
            id=self.problems[problem].id,
            sample=sample,
            right=bool(info["is_success"]),
            status=str(info["status"]),
            extracted=str(info["extracted"]),
            tokens=int(info["response_len"]),
            finish=str(info["finish_reason"]),
            completion=text,
        )


def _runs(numbers: list[int], longest: int) -> Iterator[list[int]]:
    """Neighbouring numbers together, ``longest`` at most: 0, 1, 2, 7 are [0, 1, 2] and [7]."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == longest):
            yield run
            run = []
        run.append(number)
    if run:
        yield run
