"""``TextMathReason-v0``: one math problem an episode, a whole completion its one action, for policies behind an API."""

from __future__ import annotations

import string
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from envs.math_reason import RENDER_MODES, check_render_mode, plain_seed, reset_index
from envs.problem import Problem, Problems
from envs.task import UNLIMITED, named_problems
from envs.text import opens_thought, prompt_of, submit
from registry import UnknownField, UsageError, check_at_least, fields_of, templates

LONGEST_GENERATED = 4096  # characters of a prompt of a source without an end
_RANGES = ((0xA0, 0x180), (0x370, 0x400), (0x2000, 0x2070), (0x2070, 0x20D0), (0x2100, 0x2300), (0x25A0, 0x2600))
MATHEMATICAL = "".join(map(chr, (n for start, stop in _RANGES for n in range(start, stop))))
"""Accented letters, Greek, punctuation, sub- and superscripts, currencies, arrows, operators and shapes."""


class TextMathReason(gym.Env[str, str]):
    """A math problem as a bandit over texts.

    Observation: the prompt; with the template ``chat`` what a user's message says. Action: a whole completion; any text
    may be given, whatever characters the action space samples. Each episode is one step, which terminates with the
    verdict's reward, 1 or 0, as ``MathReason`` gives it for the same text; what follows a stop string of the template
    is dropped. The last observation is the prompt again.

    Reset options: ``problem_index``. Reset info: problem_id, problem_index, episode_id; terminal info adds is_success,
    finish_reason (``eos`` or ``stop``), extracted and status.

    Args:
        problems, split, problem_options, template: as of ``MathReason`` (``envs.task.TaskSpec``).
        max_characters: longest completion of the action space. A longer one is truncated: its first part is judged, the
            episode ends with ``truncated`` and the finish_reason ``length``.
        render_mode: ``ansi`` returns the episode as text, ``human`` writes it to the terminal.

    >>> import envs
    >>> env = gym.make("TextMathReason-v0", problem_options={"level": 1}, split="test")
    >>> observation, info = env.reset(options={"problem_index": 0})
    >>> observation
    'Question: Ana has 6 fewer than Leo. Leo has 9 books. How many books do both have in all?\\nAnswer:'
    >>> _, reward, terminated, truncated, info = env.step("9 - 6 = 3. 9 + 3 = 12. #### 12")
    >>> (reward, terminated, truncated, info["status"])
    (1.0, True, False, 'right')
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 1}  # noqa: RUF012 (gymnasium's convention)

    def __init__(
        self,
        problems: str = "arithmetic",
        split: str = "train",
        problem_options: dict[str, Any] | None = None,
        template: str = "plain",
        max_characters: int = 65536,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise UnknownField("TextMathReason", name, fields_of(TextMathReason))
        check_at_least(max_characters, 1, "max_characters")
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.max_characters = int(max_characters)
        self.problems: Problems = named_problems(problems, split, {} if problem_options is None else problem_options)
        self.template_name = template
        self.template = templates.make(template)
        self._opened = opens_thought(self.template)
        prompts = [self.prompt(index) for index in range(self.problems.size or 0)]
        characters = {*string.printable, *MATHEMATICAL, *(character for prompt in prompts for character in prompt)}
        longest = max(map(len, prompts), default=LONGEST_GENERATED)
        charset = "".join(sorted(characters))
        self.observation_space = spaces.Text(longest, min_length=0, charset=charset)
        self.action_space = spaces.Text(self.max_characters, min_length=0, charset=charset)
        self._episodes = 0
        self._info: dict[str, Any] = {}
        self._prompt = ""
        self._text: str | None = None

    def problem(self, index: int) -> Problem:
        """Problem ``index``; raises UsageError outside of the source."""
        size = self.problems.size if self.problems.size is not None else UNLIMITED
        if not 0 <= index < size:
            raise UsageError(f"problem_index={index} is outside of {self.problems.name}, which has 0..{size - 1}")
        return self.problems[index]

    def prompt(self, index: int) -> str:
        """The prompt of a problem."""
        prompt = prompt_of(self.template, self.problem(index).question)
        return prompt if isinstance(prompt, str) else prompt[-1]["content"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode on ``options["problem_index"]`` or on a uniformly drawn problem."""
        super().reset(seed=plain_seed(seed))
        if seed is not None:
            self._episodes = 0
        index = reset_index(options)
        if index is None:
            index = int(self.np_random.integers(self.problems.size or UNLIMITED))
        self._info = {"problem_id": self.problem(index).id, "problem_index": index, "episode_id": self._episodes}
        self._episodes += 1
        self._prompt, self._text = self.prompt(index), None
        self._show(f"{self._prompt}\n> ")
        return self._prompt, dict(self._info)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Judge a completion."""
        if not self._info or self._text is not None:
            raise gym.error.ResetNeeded("the episode is over (or none has begun): call reset() before step()")
        if not isinstance(action, str):
            raise UsageError(f"action={str(action)[:60]!r} is {type(action).__name__}: give the completion as text")
        self._text, reason = self._cut(action)
        problem = self.problem(self._info["problem_index"])
        verdict = submit(self._text, problem, self.template_name, opened=self._opened).result()
        self._info |= {
            "is_success": verdict.reward >= 1.0,
            "finish_reason": reason,
            "extracted": verdict.extracted,
            "status": verdict.status,
        }
        self._show(f"{self._text.lstrip()}\n{self._verdict_line()}")
        return self._prompt, float(verdict.reward), reason != "length", reason == "length", dict(self._info)

    def render(self) -> str | None:  # type: ignore[override]
        """``ansi``: the prompt, the completion and the verdict."""
        if self.render_mode != "ansi":
            return None
        text = "" if self._text is None else f"{self._text.lstrip()}\n{self._verdict_line()}"
        return f"{self._prompt}\n> {text}"

    def _cut(self, completion: str) -> tuple[str, str]:
        """The completion up to the first stop string or the budget, and what ended it."""
        ends = [completion.find(stop) + len(stop) for stop in self.template.stop if stop in completion]
        end = min(ends, default=len(completion))
        if end > self.max_characters:
            return completion[: self.max_characters], "length"
        return completion[:end], "stop" if ends else "eos"

    def _verdict_line(self) -> str:
        gold = self.problem(self._info["problem_index"]).answer
        reward = float(self._info["is_success"])
        return (
            f"[{self._info['status']}: reward {reward:g}, answered {self._info['extracted'] or 'nothing'}, gold {gold}]"
        )

    def _show(self, text: str) -> None:
        if self.render_mode == "human":
            print(text, end="" if self._text is None else "\n", flush=True)
