"""Our problems as an OpenEnv server (openenv-core 0.3): an episode is a prompt, a completion and its verdict.

    python -m integrations.openenv --problems gsm8k --template chat --port 8000

serves them; ``app(problems="gsm8k")`` is the ASGI application for a server of yours. Clients send
``{"completion": ...}``; ``openenv.core.GenericEnvClient`` needs nothing of ours.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import gymnasium as gym

import envs  # noqa: F401 (registers the ids)
from registry.command import command

try:
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
except ModuleNotFoundError as error:
    needed = "integrations.openenv needs OpenEnv: pip install openenv-core"
    if __name__ == "__main__":
        print(f"error: {needed}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(needed, name=error.name) from error

SESSIONS = 256


class Completion(Action):
    """A whole completion."""

    completion: str


class MathObservation(Observation):
    """The prompt and, at the end, the verdict."""

    prompt: str
    status: str = ""
    """One word of ``envs.problem.STATUSES``; empty before the completion."""
    extracted: str = ""
    """The answer that was judged."""


class MathState(State):
    """Which problem the episode is about."""

    problem_index: int = 0
    problem_id: str = ""


class MathEnvironment(Environment[Completion, MathObservation, MathState]):
    """``TextMathReason`` behind a server: one step an episode.

    Args:
        env: the environment. Sessions have shallow copies of one that was never reset, which share its problems.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, env: gym.Env[str, str]) -> None:
        super().__init__()
        self._env = env
        self._state = MathState()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> MathObservation:
        """Begin on a drawn problem, or on ``problem_index``."""
        prompt, info = self._env.reset(seed=seed, options=options or None)
        self._state = MathState(
            episode_id=episode_id or str(info["episode_id"]),
            problem_index=info["problem_index"],
            problem_id=info["problem_id"],
        )
        return MathObservation(prompt=prompt)

    def step(self, action: Completion, timeout_s: float | None = None, **more: Any) -> MathObservation:
        """Judge a completion; verdicts have a deadline of their own."""
        prompt, reward, _, _, info = self._env.step(action.completion)
        self._state.step_count += 1
        return MathObservation(
            prompt=prompt, reward=reward, done=True, status=info["status"], extracted=info["extracted"]
        )

    @property
    def state(self) -> MathState:
        """Of the present episode."""
        return self._state


def app(sessions: int = SESSIONS, **arguments: Any) -> Any:
    """The server as an ASGI application; ``arguments`` are those of ``TextMathReason``. Raises ``UsageError`` at once
    for problems that cannot be had."""
    first = gym.make("TextMathReason-v0", disable_env_checker=True, **arguments).unwrapped

    def session() -> MathEnvironment:
        return MathEnvironment(copy.copy(first))

    return create_fastapi_app(session, Completion, MathObservation, max_concurrent_envs=sessions)


@command()
def main(arguments: list[str] | None = None) -> int:
    """Serve problems until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m integrations.openenv", description=main.__doc__)
    parser.add_argument("--problems", default="arithmetic", help="a known set, a file, a folder or a hub id")
    parser.add_argument("--split", default="train", help="of the problems (default train)")
    parser.add_argument("--template", default="chat", help="how a question becomes a prompt (default chat)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    given = parser.parse_args(arguments)
    made = app(problems=given.problems, split=given.split, template=given.template)
    import uvicorn

    uvicorn.run(made, host=given.host, port=given.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
