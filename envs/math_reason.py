"""``MathReason-v0``: one math problem an episode, one token a step, one verdict at the end."""

from __future__ import annotations

import operator
from dataclasses import fields
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.problem import Verdict
from envs.task import Task, TaskSpec, start_info
from registry import UnknownField, UsageError, WrongType, did_you_mean

Observation = dict[str, NDArray[np.int64]]
RENDER_MODES = ("human", "ansi")


def check_render_mode(mode: Any) -> None:
    """Raise WrongType for a render mode that no environment here has: stable-baselines3, which asks for pictures, then
    goes on without."""
    if mode is not None and mode not in RENDER_MODES:
        raise WrongType(f"render_mode={mode!r} is unknown: {did_you_mean(str(mode), RENDER_MODES)}")


def task_spec(arguments: dict[str, Any]) -> TaskSpec:
    """Keyword arguments as a ``TaskSpec``; raises UnknownField with did-you-mean."""
    known = {field.name for field in fields(TaskSpec)}
    for name in arguments:
        if name not in known:
            raise UnknownField("MathReason", name, known)
    return TaskSpec(**arguments)


class MathReason(gym.Env[Observation, np.int64]):
    """A math problem as a token-level MDP.

    Observation: ``{"input_ids": [L] int64, "length": [1] int64}``, the prefix (prompt and completion so far) padded to
    L = max_prompt_tokens + max_new_tokens. Action: the next token, ``Discrete(V)``. Reward: 1 or 0 on the last token
    (``reward_parts`` are added there), 0 before. EOS or a stop string terminates, even on the last allowed token;
    length truncates, with the verdict's reward in full: it is the end of the task rather than a time limit, so an
    algorithm that bootstraps a value at truncations (SB3's do) counts too much there unless it is told.

    The environment can be copied (``copy.deepcopy``) and pickled in mid-episode; copies go on by themselves.

    Reset options: ``problem_index``. Reset info: problem_id, problem_index, group_id, sample_idx, episode_id,
    prompt_len; terminal info adds is_success, finish_reason, response_len, extracted, status, and with reward parts
    verdict_reward and each part by its name.

    Args:
        render_mode: ``human`` writes the episode to the terminal as it goes, ``ansi`` returns it as text.
        **task: the fields of ``envs.task.TaskSpec``.

    >>> import envs
    >>> env = gym.make("MathReason-v0", problem_options={"level": 1}, reward_parts=("format",))
    >>> observation, info = env.reset(options={"problem_index": 4})
    >>> task = env.unwrapped.task
    >>> tokens = task.tokenizer(f" #### {task.problem(4).answer}")["input_ids"] + list(task.stop_token_ids)
    >>> steps = [env.step(token) for token in tokens]
    >>> [reward for _, reward, _, _, _ in steps[-2:]]
    [0.0, 1.1]
    >>> {key: steps[-1][4][key] for key in ("status", "finish_reason", "verdict_reward", "format_reward")}
    {'status': 'right', 'finish_reason': 'eos', 'verdict_reward': 1.0, 'format_reward': 0.1}
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 30}  # noqa: RUF012 (gymnasium's convention)

    def __init__(self, render_mode: str | None = None, **task: Any) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.task = Task(task_spec(task))
        self.observation_space = self.task.observation_space()  # type: ignore[assignment]
        self.action_space = self.task.action_space()
        self._ids = np.full(self.task.max_length, self.task.pad_token_id, dtype=np.int64)
        self._episodes = 0
        self._length = 0
        self._shown = 0
        self._info: dict[str, Any] = {}
        self._verdict: Verdict | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode on ``options["problem_index"]`` or on a uniformly drawn problem. A seed restarts the count
        of episodes as well."""
        super().reset(seed=plain_seed(seed))
        if seed is not None:
            self._episodes = 0
        index = reset_index(options)
        index = self.task.draw(self.np_random) if index is None else index
        self._info = start_info(self.task, index, self._episodes, self._episodes, 0)
        self._episodes += 1
        prompt = self.task.prompt(index)
        self._ids[:] = self.task.pad_token_id
        self._ids[: len(prompt)] = prompt
        self._length = len(prompt)
        self._verdict = None
        self._shown = 0
        self._show()
        return self._observation(), dict(self._info)

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append one token."""
        if self._length == 0 or self._verdict is not None:
            raise gym.error.ResetNeeded("the episode is over (or none has begun): call reset() before step()")
        try:
            is_token = 0 <= operator.index(action) < self.task.vocab_size
        except TypeError:
            is_token = False
        if not is_token:
            raise UsageError(f"action={action!r} is not a token: the action space is {self.action_space}")
        self._ids[self._length] = action
        self._length += 1
        completion = self._ids[self._info["prompt_len"] : self._length]
        reason = self.task.finish_reason(completion)
        info: dict[str, Any] = {}
        reward = 0.0
        if reason is not None:
            self._verdict = self.task.verdict(completion, self._info["problem_index"]).result()
            reward, info = self.task.outcome(self._info, reason, completion, self._verdict, self.np_random_seed)
        self._show()
        return self._observation(), reward, reason in ("eos", "stop"), reason == "length", info

    def render(self) -> str | None:  # type: ignore[override]
        """``ansi``: the problem, the text so far and, at the end, the verdict. ``human``: writes as it goes."""
        if self.render_mode != "ansi":
            return None
        return self._transcript()

    def _transcript(self) -> str:
        if self._length == 0:
            return "(no episode: call reset)"
        prompt = self.task.tokenizer.decode(self._ids[: self._info["prompt_len"]].tolist())
        text = prompt + "\n> " + self.task.text(self._ids[self._info["prompt_len"] : self._length]).lstrip()
        if self._verdict is not None:
            gold = self.task.problem(self._info["problem_index"]).answer
            answer = self._verdict.extracted or "nothing"
            text += f"\n[{self._verdict.status}: reward {self._verdict.reward:g}, answered {answer}, gold {gold}]\n"
        return text

    def _show(self) -> None:
        if self.render_mode == "human":
            # A character of several tokens decodes to U+FFFD until its last one is there.
            text = self._transcript().rstrip("\ufffd")
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)

    def _observation(self) -> Observation:
        return {"input_ids": self._ids.copy(), "length": np.array([self._length], dtype=np.int64)}


def plain_seed(seed: Any) -> int | None:
    """A seed as gymnasium takes it; any integer type, such as numpy's, is one. Raises UsageError for others."""
    try:
        return None if seed is None else operator.index(seed)
    except TypeError:
        raise UsageError(f"seed={seed!r} is no integer: give one of at least 0") from None


def reset_index(options: dict[str, Any] | None) -> int | None:
    """The ``problem_index`` of reset options; raises UnknownField for any other option."""
    for name in options or {}:
        if name != "problem_index":
            raise UnknownField("reset options of MathReason", name, ["problem_index"])
    return None if not options else plain_index(options["problem_index"])


def plain_index(index: Any, name: str = "problem_index") -> int:
    """A number of reset options as it is; any integer type is one. Raises UsageError for others, such as 3.9 and
    True."""
    try:
        if not isinstance(index, bool | np.bool_):
            return operator.index(index)
    except TypeError:  # arrays have an ``__index__``, which fails but for one integer
        pass
    raise UsageError(f"{name}={' '.join(repr(index).split())[:60]} is no integer")
