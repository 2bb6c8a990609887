"""``benchmarks.evaluate``: by our engine and by a server, killed and gone on, with figures counted anew here."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare, evaluate
from benchmarks.answers import engine, server
from benchmarks.answers.kept import Answer, Answers
from benchmarks.comparison import stored
from benchmarks.experiment.held_out import HeldOut
from envs.task import Task, TaskSpec
from envs.verifier import verify
from policies import Policy
from tests.oracles.chat_server import ChatServer

ROOT = Path(__file__).resolve().parents[3]
QUESTIONS = 6


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Six questions."""
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def oracle(prompt: str, body: dict[str, Any]) -> str:
    """Right about small sums; about others in half of the sampled cases."""
    n = int(prompt.split()[2])
    right = n < 2 or (n < 4 and body["temperature"] > 0 and body["seed"] % 2)
    return f"It is \\boxed{{{2 * n if right else -1}}}."


def ask(*arguments: str, folder: Path, **served: Any) -> int:
    return evaluate.main([*arguments, "--out", str(folder), "--quiet"])


class TestEngine:
    def test_without_arguments_the_built_in_model_has_half_of_its_context_for_answers(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert ask("--limit", "2", "--samples", "0", folder=out) == 0
        assert json.loads((out / "settings.json").read_text())["max_new_tokens"] == 256  # of 512
        assert len(rows_of(out / "arithmetic" / "completions.jsonl")) == 2

    def test_figures_are_those_of_a_run_and_every_completion_is_there(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert ask("--limit", "12", "--samples", "4", "--max-new-tokens", "40", folder=out) == 0
        task = Task(TaskSpec(split="test", problem_options={"limit": 12}))
        held_out = HeldOut(task, 12)
        policy = Policy.load("tiny")
        greedy, sampled = held_out(policy), held_out(policy, 4, 1.0, seed=0)
        rows = rows_of(out / "arithmetic" / "completions.jsonl")
        assert len(rows) == 12 * 5
        by_place = {(row["kind"], row["problem"], row["sample"]): row for row in rows}
        assert len(by_place) == len(rows)
        for problem, sample in itertools.product(range(12), range(4)):
            row = by_place["sampled", problem, sample]
            assert row["right"] == sampled.right[problem, sample]
            assert row["tokens"] == sampled.lengths[problem, sample]
            gold = task.problem(problem).answer
            assert verify(row["completion"], gold).reward == float(row["right"])
            assert verify(row["completion"], gold).extracted == row["extracted"]
        (figures,) = json.loads((out / "results.json").read_text())["sets"]
        assert figures["greedy"]["value"] == pytest.approx(greedy.mean)
        assert figures["avg"]["value"] == pytest.approx(sampled.mean)
        subsets = list(itertools.combinations(range(4), 2))
        pass_at_2 = np.mean([[sampled.right[q, list(two)].any() for two in subsets] for q in range(12)])
        assert figures["pass_at"]["2"]["value"] == pytest.approx(pass_at_2)
        assert figures["pass_at"]["4"]["value"] == pytest.approx(sampled.right.any(1).mean())
        half = 2.2009851601 * sampled.right.mean(1).std(ddof=1) / 12**0.5  # t of 11 degrees of freedom
        assert figures["avg"]["low"] == pytest.approx(max(0.0, sampled.mean - half), abs=1e-6)
        assert sum(figures["statuses"].values()) == len(rows)

    @pytest.mark.parametrize("kept", [0, 1, 7, 20, 29])
    def test_what_was_lost_is_written_again_to_the_same_tokens(
        self, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = ("--limit", "6", "--samples", "4", "--max-new-tokens", "24", "--slots", "5")
        assert ask(*arguments, folder=tmp_path / "whole") == 0
        whole = tmp_path / "whole" / "arithmetic" / "completions.jsonl"
        lines = whole.read_text().splitlines(keepends=True)
        assert len(lines) == 30
        again = tmp_path / "again"
        assert ask(*arguments, folder=again) == 0
        part = again / "arithmetic" / "completions.jsonl"
        part.write_text("".join(lines[:kept]) + lines[kept][:17])
        monkeypatch.setattr(engine, "MOST_TOKENS", 24 * 8)  # two problems at a time
        assert ask(*arguments, folder=again) == 0
        assert part.read_text().startswith("".join(lines[:kept]))
        assert sorted(part.read_text().splitlines()) == sorted(whole.read_text().splitlines())
        assert (again / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()

    def test_killed_it_goes_on(self, tmp_path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.evaluate", "--limit", "400", "--slots", "4", "--samples", "2"]
        command += ["--out", str(tmp_path / "out"), "--max-new-tokens", "24"]
        path = tmp_path / "out" / "arithmetic" / "completions.jsonl"
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (path.is_file() and len(path.read_bytes().splitlines()) > 20):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = path.read_bytes().splitlines()[:-1]
        assert 20 <= len(before) < 1200
        done = subprocess.run(
            [*command, "--slots", "64"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        after = path.read_bytes().splitlines()
        assert after[: len(before)] == before and len(after) == 1200
        assert "arithmetic/test" in done.stdout and "avg@2" in done.stdout and "pass@2" in done.stdout

    def test_another_model_beside_the_first(self, folder: str, file: str, tmp_path: Path) -> None:
        from envs.codec import load_tokenizer

        load_tokenizer("builtin").save_pretrained(folder)
        arguments = ("--sets", file, "--samples", "0", "--max-new-tokens", "12")
        assert ask("--policy", folder, *arguments, folder=tmp_path / "theirs") == 0
        assert ask(*arguments, folder=tmp_path / "ours") == 0
        files = [str(next((tmp_path / name).glob("*/outcomes.json"))) for name in ("ours", "theirs")]
        report = tmp_path / "report"
        assert compare.main(["--from", *files, "--out", str(report), "--quiet"]) == 0
        assert "tiny" in (report / "report.md").read_text()


class TestServer:
    def test_a_server_is_evaluated(self, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(server.KEY_VARIABLE, "secret")
        out = tmp_path / "out"
        with ChatServer(oracle).running() as served:
            arguments = ("--server", served.url, "--sets", file, "--samples", "8", "--jobs", "3")
            assert ask(*arguments, "--set", "body.top_p=0.9", "--set", "body.max_tokens=null", folder=out) == 0
            assert len(served.requests) == QUESTIONS * 9
            assert set(served.keys) == {"Bearer secret"}
            assert all(body["top_p"] == 0.9 and "max_tokens" not in body for body in served.requests)
            assert len({body["seed"] for body in served.requests}) == QUESTIONS * 9
            assert served.requests[0]["messages"][-1]["content"].endswith("within \\boxed{}.")
            assert ask(*arguments, "--set", "body.top_p=0.9", "--set", "body.max_tokens=null", folder=out) == 0
            assert len(served.requests) == QUESTIONS * 9, "nothing is asked for twice"
        (figures,) = json.loads((out / "results.json").read_text())["sets"]
        assert figures["greedy"]["value"] == pytest.approx(2 / QUESTIONS)
        rows = rows_of(next(out.glob("*/completions.jsonl")))
        sampled = [row for row in rows if row["kind"] == "sampled"]
        assert figures["avg"]["value"] == pytest.approx(np.mean([row["right"] for row in sampled]))
        assert 2 / QUESTIONS < figures["avg"]["value"] < 4 / QUESTIONS
        assert figures["pass_at"]["8"]["value"] == pytest.approx(
            np.mean([any(row["right"] for row in sampled if row["problem"] == n) for n in range(QUESTIONS)])
        )

    def test_a_template_of_text_asks_for_a_completion(self, file: str, tmp_path: Path) -> None:
        def reply(prompt: str, body: dict[str, Any]) -> str:
            assert prompt.endswith("Assistant: <think>") and body["stop"] == ["</answer>"]
            return "2 + 2</think> <answer>4" if "2 + 2" in prompt else "\\boxed{0}"

        with ChatServer(reply).running() as served:
            arguments = ("--server", served.url, "--sets", file, "--samples", "0", "--template", "r1")
            assert ask(*arguments, folder=tmp_path / "out") == 0
        (figures,) = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
        assert figures["greedy"]["value"] == pytest.approx(1 / QUESTIONS)
        assert figures["statuses"] == {"no_answer": QUESTIONS - 1, "right": 1}

    def test_a_busy_server_is_asked_again(self, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
        calls = itertools.count()

        def reply(prompt: str, body: dict[str, Any]) -> Any:
            return 503 if next(calls) % 2 else oracle(prompt, body)

        with ChatServer(reply).running() as served:
            arguments = ("--server", served.url, "--sets", file, "--samples", "1", "--jobs", "1")
            assert ask(*arguments, folder=tmp_path / "out") == 0
        assert len(rows_of(next((tmp_path / "out").glob("*/completions.jsonl")))) == 2 * QUESTIONS

    def test_a_server_that_refuses_loses_nothing_and_it_goes_on(
        self, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls = itertools.count()

        def reply(prompt: str, body: dict[str, Any]) -> Any:
            return 400 if next(calls) == 4 else oracle(prompt, body)

        out = tmp_path / "out"
        with ChatServer(reply).running() as served:
            arguments = ("--server", served.url, "--sets", file, "--samples", "0", "--jobs", "1")
            assert ask(*arguments, folder=out) == 2
            assert "refuses (400" in (said := capsys.readouterr().err) and "body.NAME=VALUE" in said
            assert len(rows_of(next(out.glob("*/completions.jsonl")))) == 4
            assert ask(*arguments, folder=out) == 0
            assert len(served.requests) == QUESTIONS + 1

    def test_an_empty_content_is_no_answer(self, file: str, tmp_path: Path) -> None:
        empty = {"choices": [{"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}]}
        with ChatServer(lambda *_: empty).running() as served:
            assert ask("--server", served.url, "--sets", file, "--samples", "0", folder=tmp_path / "out") == 0
        (figures,) = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
        assert (figures["statuses"], figures["cut"], figures["tokens"]) == ({"no_answer": QUESTIONS}, 1.0, None)
        nothing = figures["greedy"]
        assert (nothing["value"], nothing["low"]) == (0, 0)
        assert 0.02 < (1 - nothing["high"]) ** QUESTIONS <= 0.025  # the exact bound of none, or wider

    def test_its_outcomes_are_compared(self, file: str, tmp_path: Path) -> None:
        for name, reply in (("good", oracle), ("bad", lambda *_: "\\boxed{-1}")):
            with ChatServer(reply, models=(name,)).running() as served:
                assert ask("--server", served.url, "--sets", file, folder=tmp_path / name) == 0
        files = [next((tmp_path / name).glob("*/outcomes.json")) for name in ("bad", "good")]
        both = stored.read(files)
        assert [arm.label for arm in both.arms] == ["bad", "good"] and both.baseline == "bad"
        assert "avg@4" in both.task
        assert both.arms[1].pass_at("after", 4) > both.arms[0].pass_at("after", 4) == 0.0
        report = tmp_path / "report"
        assert compare.main(["--from", *map(str, files), "--out", str(report), "--quiet"]) == 0
        assert "good" in (report / "report.md").read_text()


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--sets", "gsm9k"], "did you mean 'gsm8k'"),
            (["--template", "plane"], "did you mean 'plain'"),
            (["--samples", "-1"], "--samples -1 must be at least 0"),
            (["--temperature", "0"], "--temperature 0 must be a number above 0"),
            (["--server", "localhost:8000"], "is no address"),
            (["--server", "http://127.0.0.1:9/v1"], "start the server"),
            (["--set", "body.top_p=1"], "body.FIELD with a --server"),
            (["--set", "problem_options.svamp.limit=1"], "one of the --sets (arithmetic)"),
            (["--set", "problem_options.arithmetic.levl=1"], "did you mean 'level'"),
            (["--tokenizer", "x"], "--tokenizer is of a server's model"),
            (["--policy", "./nowhere"], "nowhere"),
        ],
    )
    def test_they_name_the_value_and_the_remedy(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert ask(*arguments, folder=tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*/completions.jsonl"))

    def test_a_folder_of_other_settings_is_not_mixed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--limit", "2", "--samples", "0", "--max-new-tokens", "4")
        assert ask(*arguments, folder=tmp_path / "out") == 0
        assert ask(*arguments, "--seed", "1", folder=tmp_path / "out") == 2
        assert "another seed (0, not 1): give another --out" in capsys.readouterr().err

    def test_several_models_of_a_server(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        with ChatServer(oracle, models=("small", "large")).running() as served:
            assert ask("--server", served.url, folder=tmp_path / "out") == 2
            assert "several models (small, large): name one with --policy" in capsys.readouterr().err
            assert ask("--server", served.url, "--policy", "smal", folder=tmp_path / "out") == 2
            assert "did you mean 'small'" in capsys.readouterr().err

    def test_the_list_names_sets_and_templates(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert evaluate.main(["--list"]) == 0
        said = capsys.readouterr().out
        assert "--sets gsm8k" in said and "--template qwen-math" in said


def test_a_damaged_line_drops_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    made = Answer("greedy", 0, "a", 0, True, "right", "4", 3, "eos", "½ \u2028 4")
    with Answers(path).open() as answers:
        answers.add(made)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "greedy"}\n' + whole)
    again = Answers(path)
    assert len(again) == 1 and again.missing("greedy", 2, 1) == [(1, 0)]
    with again.open():
        pass
    assert path.read_bytes() == whole


def test_a_corrected_file_is_evaluated_anew_and_no_two_sets_share_a_folder(file: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    other = tmp_path / "deep" / "sums.jsonl"
    other.write_text(json.dumps({"question": "What is 90 + 1?", "answer": "91"}) + "\n")
    names = [f"{tmp_path}/deep/../sums.jsonl", f"{tmp_path}/deep/.._sums.jsonl"]
    folders = evaluate.folder_names([*names, "Sums", "sums"])
    assert len({folder.casefold() for folder in folders.values()}) == 4

    arguments = ["--sets", file, "--limit", "2", "--samples", "0"]
    first = evaluate.settings_of(evaluate._parser().parse_args(arguments))
    assert ask(*arguments, folder=tmp_path / "out") == 0
    Path(file).write_text(Path(file).read_text().replace('"0"', '"1"'))
    assert evaluate.settings_of(evaluate._parser().parse_args(arguments)).hash != first.hash
    assert ask(*arguments, folder=tmp_path / "out") == 2


@pytest.mark.parametrize(("name", "value"), [("--temperature", "nan"), ("--temperature", "inf"), ("--seed", "-1")])
def test_numbers_that_make_no_sense_are_refused(name: str, value: str, tmp_path: Path) -> None:
    assert ask(name, value, folder=tmp_path / "out") == 2 and not (tmp_path / "out").exists()


def test_a_message_of_parts_is_its_text(file: str, tmp_path: Path) -> None:
    def reply(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        said = [("thinking", "12"), ("text", "It is "), ("text", f"\\boxed{{{2 * int(prompt.split()[2])}}}")]
        parts = [{"type": kind, "text": text} for kind, text in said]
        return {"choices": [{"message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}]}

    with ChatServer(reply).running() as served:
        assert ask("--server", served.url, "--sets", file, "--samples", "0", folder=tmp_path / "out") == 0
    rows = rows_of(next((tmp_path / "out").glob("*/completions.jsonl")))
    assert [row["right"] for row in rows] == [True] * QUESTIONS
    assert all(row["completion"].startswith("It is \\boxed") for row in rows)
