"""The OpenEnv server, asked by OpenEnv's own client over the network."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from envs.problems import load_problems
from registry import UsageError

openenv = pytest.importorskip("openenv.core")
uvicorn = pytest.importorskip("uvicorn")
adapter = pytest.importorskip("integrations.openenv")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    made = adapter.app(problem_options={"limit": 3}, template="chat")
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(made, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


def test_an_episode(url: str) -> None:
    problems = load_problems("arithmetic", limit=3)
    with openenv.GenericEnvClient(base_url=url).sync() as client:
        for index, text, reward in ((0, problems[0].answer, 1.0), (2, "-1", 0.0), (2, problems[2].answer, 1.0)):
            begun = client.reset(problem_index=index)
            assert begun.observation["prompt"].startswith(problems[index].question) and not begun.done
            ended = client.step({"completion": f"It is \\boxed{{{text}}}."})
            assert (ended.reward, ended.done) == (reward, True)
            assert ended.observation["status"] == ("right" if reward else "wrong")
            assert ended.observation["extracted"] == text
            assert client.state()["problem_id"] == problems[index].id


def test_sessions_are_apart(url: str) -> None:
    problems = load_problems("arithmetic", limit=3)
    with openenv.GenericEnvClient(base_url=url).sync() as one, openenv.GenericEnvClient(base_url=url).sync() as two:
        first, second = one.reset(problem_index=0), two.reset(problem_index=1)
        assert first.observation["prompt"] != second.observation["prompt"]
        assert one.step({"completion": f"\\boxed{{{problems[0].answer}}}"}).reward == 1.0
        assert two.step({"completion": f"\\boxed{{{problems[1].answer}}}"}).reward == 1.0


def test_equal_seeds_draw_equal_problems(url: str) -> None:
    with openenv.GenericEnvClient(base_url=url).sync() as client:
        drawn = [[client.reset(seed=seed).observation["prompt"] for seed in range(6)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def test_problems_that_cannot_be_had_are_told_at_once() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        adapter.app(problems="gsm9k")
