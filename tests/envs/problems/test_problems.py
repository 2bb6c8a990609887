"""Every source of problems: what it loads, that its gold answers verify and perturbed ones do not, and its errors."""

from __future__ import annotations

import csv
import json
import re
import sys
import types
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from envs.problem import Problem
from envs.problems import RowSource, check_source, duplicates, list_sources, load_problems, overlap, source_of
from envs.problems.listed import question_key
from envs.problems.readers import READERS
from envs.problems.sources import PUBLISHED
from envs.verifier import verify
from envs.verifier.literal import parse_literal
from envs.verifier.notation import normalise
from envs.verifier.scorers import entries
from registry import UnknownField, UsageError, problem_sources

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(10)]
KNOWN_SIZES = {
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("svamp", "train"): 700,
    ("svamp", "test"): 300,
    ("math500", "test"): 500,
    ("aime24", "test"): 30,
    ("amc23", "test"): 40,
    ("minerva", "test"): 272,
    ("olympiad", "test"): 675,
}


def perturbed(gold: str) -> str:
    """Another answer of the same form: one more, or for what is no number, one letter or digit changed."""
    found = parse_literal(normalise(gold))
    if found and isinstance(found[0].value, Fraction):
        value = found[0].value + 1
        return str(value)
    digit = re.search(r"[0-9]", gold)
    if digit:
        return gold[: digit.start()] + str((int(digit[0]) + 1) % 9 + 1) + gold[digit.end() :]
    return f"{gold} + 1" if len(gold) <= 3 else f"not {gold}"


@pytest.mark.parametrize(("name", "split"), KNOWN_SIZES)
def test_known_sets(name: str, split: str, shared_dir: Path) -> None:
    problems: Any = load_problems(name, split, data_dir=str(shared_dir / "data"))
    assert len(problems) == KNOWN_SIZES[name, split]
    assert len({problem.id for problem in problems}) == len(problems)
    assert all(problem.question and problem.answer and problem.source == f"{name}/{split}" for problem in problems)
    sample = list(problems)[:: max(1, len(problems) // 300)]
    assert all(verify(f"\\boxed{{{p.answer}}}", p).reward == 1.0 for p in sample)
    passed = [p.answer for p in sample if verify(f"\\boxed{{{perturbed(p.answer)}}}", p).reward == 1.0]
    assert not passed
    if name == "gsm8k":
        assert all("<<" not in problem.solution and problem.solution for problem in problems)
        assert all(verify(problem.solution, problem).reward == 1.0 for problem in sample)


def test_arrow_folders(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "evaluation_suite"
    for split, size in {"aime": 30, "amc": 83, "math": 500, "minerva": 272, "olympiad_bench": 675}.items():
        problems: Any = load_problems(str(folder), split)
        assert len(problems) == size
        one: Any = load_problems(str(folder / split))
        assert [p.answer for p in one] == [p.answer for p in problems]
    assert load_problems(str(folder), "amc")[0].answer == "142", "a whole float is an integer"
    assert load_problems(str(folder), "minerva")[0].answer == "9.6", "the first of a list of answers"
    with pytest.raises(UsageError, match="no split 'amcc': did you mean 'amc'"):
        load_problems(str(folder), "amcc")


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"problems{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(suffix: str, tmp_path: Path) -> None:
    problems: Any = load_problems(str(write(tmp_path, suffix, ROWS)))
    assert [(p.question, p.answer) for p in problems] == [(row["question"], row["answer"]) for row in ROWS]
    assert all(verify(f"\\boxed{{{p.answer}}}", p).reward == 1.0 for p in problems)
    assert all(verify(f"\\boxed{{{perturbed(p.answer)}}}", p).reward == 0.0 for p in problems)


def test_folders_with_one_file_per_split(tmp_path: Path) -> None:
    write(tmp_path, ".jsonl", ROWS).rename(tmp_path / "test.jsonl")
    assert load_problems(str(tmp_path), "test").size == 10
    with pytest.raises(UsageError, match=r"train\.jsonl"):
        load_problems(str(tmp_path), "train")
    DatasetDict({"dev": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "arrow"))
    assert load_problems(str(tmp_path / "arrow"), "dev").size == 10


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"problem": "P?", "solution": "We get $\\boxed{\\frac{1}{2}}$."}, "P?", "\\frac{1}{2}"),
        ({"question": "Q?", "answer": "4 <<2+2=4>>4\n#### 4"}, "Q?", "4"),
        ({"Body": "Ann has 3 pears.", "Question": "How many?", "Answer": 3.0}, "Ann has 3 pears. How many?", "3"),
        (
            {"body": "If Ann has 3", "question": "how many?", "answer": "3 (pears)"},
            "If Ann has 3, how many?",
            "3 (pears)",
        ),
        ({"question": "Q?", "final_answer": ["$2n$"]}, "Q?", "2n"),
        ({"question": "Q?", "answer": "['9.6\\n']"}, "Q?", "9.6"),
        ({"question": "Q?", "answer": "$69$,$84$"}, "Q?", "$69$,$84$"),
        ({"question": "Q?", "answer": 0.1}, "Q?", "0.1"),
        ({"question": "Q?", "answer": 12}, "Q?", "12"),
        ({"question": "Q?", "result": "1,200", "chain": "x"}, "Q?", "1,200"),
    ],
)
def test_columns_of_published_sets(row: dict[str, Any], question: str, answer: str, tmp_path: Path) -> None:
    problem = load_problems(str(write(tmp_path, ".json", [row])))[0]
    assert (problem.question, problem.answer) == (question, answer)
    assert verify(f"\\boxed{{{answer}}}", problem).reward == 1.0


def test_named_columns(tmp_path: Path) -> None:
    path = str(write(tmp_path, ".csv", [{"text": "Q?", "question": "other", "key": "7"}]))
    problem = load_problems(path, question="text", answer="key")[0]
    assert (problem.question, problem.answer) == ("Q?", "7")
    with pytest.raises(UsageError, match="no answer column; its columns are 'text', 'question', 'key'"):
        load_problems(path)
    with pytest.raises(UsageError, match="no column 'keys'; its columns are"):
        load_problems(path, answer="keys")


def test_subset_shuffle_and_limit(tmp_path: Path) -> None:
    path = str(write(tmp_path, ".jsonl", ROWS))

    def ids(**options: Any) -> list[str]:
        return [p.id for p in load_problems(path, **options)]  # type: ignore[attr-defined]

    assert ids(limit=3) == ["0", "1", "2"]
    assert ids(subset="2:4") == ["2", "3"]
    assert ids(subset="8:") == ["8", "9"]
    assert ids(shuffle=0) == ids(shuffle=0) != ids(shuffle=1)
    assert sorted(ids(shuffle=0)) == sorted(ids())
    assert ids(shuffle=0, subset="1:", limit=2) == ids(shuffle=0)[1:3]
    assert ids(shuffle=np.int64(1), limit=np.int64(3)) == ids(shuffle=1, limit=3)


@pytest.mark.parametrize(
    ("given", "options", "ids"),
    [
        ("aac", {}, ["a#0", "a#1", "c"]),
        ("aac", {"subset": "1:"}, ["a", "c"]),
        ("caa", {"subset": "1:"}, ["a#1", "a#2"]),
        ("bcaa", {"omit": "0"}, ["c", "a#2", "a#3"]),
        (["a", "a", "a#0"], {}, ["a#0#0", "a#1", "a#0#2"]),
    ],
)
def test_shared_ids_alone_get_the_numbers_of_their_rows(given: Any, options: dict[str, Any], ids: list[str]) -> None:
    rows = [{"id": id, "question": f"How much is 1 + {n}?", "answer": n + 1} for n, id in enumerate(given)]
    assert [problem.id for problem in load_problems(rows, **options)] == ids  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"subset": "5"}, "'start:stop'"),
        ({"subset": "20:"}, "no rows in the chosen subset"),
        ({"limits": 3}, "did you mean 'limit'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_problems(str(write(tmp_path, ".jsonl", ROWS)), **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/problems.jsonl", "no problem file or folder"),
        ("./nowhere", "no problem file or folder"),
        ("gms8k", "did you mean 'gsm8k'"),
        ("no.such.module:f", "importable from here"),
        ("reasoning_gym:leg_countin", "leg_counting|optional extra"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_problems(name)


def test_wrong_files(tmp_path: Path) -> None:
    def fails(text: str, message: str, suffix: str = ".jsonl") -> None:
        path = tmp_path / f"wrong{suffix}"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            load_problems(str(path))

    fails("", "has no rows")
    fails("{not json}\n", "cannot be read as jsonl")
    fails("[1, 2]", "not an object", ".json")
    fails("x", "unknown kind of file '.txt'", ".txt")
    fails("x", "cannot be read as parquet", ".parquet")
    fails(json.dumps({"question": "Q?", "answer": ""}) + "\n", "empty answer")
    fails(json.dumps({"question": "Q?", "answer": None}) + "\n", "no answer")
    fails(json.dumps({"question": "Q?", "answer": "\\frac{1"}) + "\n", "cannot read the gold answer")
    fails(json.dumps({"question": "Q?", "solution": "no box"}) + "\n", "neither a .*boxed")


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.delenv("NESTED_REFT_DATA", raising=False)
    for name in ("gsm8k", "some/set"):
        with pytest.raises(UsageError, match=r"no route to the hub.*; offline, give a file"):
            load_problems(name)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def loaded(path: str, name: str | None, split: str) -> Dataset:
        asked.append((path, name, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", loaded)
    monkeypatch.delenv("NESTED_REFT_DATA", raising=False)
    assert load_problems("owner/set", "dev", config="small").size == 10
    assert load_problems("asdiv", "test").size == 10
    assert asked == [("owner/set", "small", "dev"), ("EleutherAI/asdiv", None, "validation")]


class Endless:
    """An unlimited source that a function may return."""

    size = None

    def __init__(self, split: str, start: int = 0) -> None:
        self.name, self.start = f"endless/{split}", start

    def __getitem__(self, index: int) -> Problem:
        return Problem(f"{index}?", str(self.start + index), self.name, str(index))


def test_python_callables(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_problems")
    module.rows = lambda split, n: [{"question": f"{split} {k}?", "answer": k} for k in range(n)]  # type: ignore[attr-defined]
    module.listed = lambda split: [Problem("Q?", "5", "mine", "a")]  # type: ignore[attr-defined]
    module.endless = Endless  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_problems", module)
    problems: Any = load_problems("my_problems:rows", "dev", n=4, limit=3)
    assert [p.question for p in problems] == ["dev 0?", "dev 1?", "dev 2?"]
    assert load_problems("my_problems:listed")[0].id == "a"
    assert load_problems("my_problems:endless", start=3)[2].answer == "5"
    for name, options, message in (
        ("my_problems:rows", {"m": 4}, "problem source 'my_problems:rows' has no field 'm': known: answer, limit, n"),
        ("my_problems:rows", {"n": 4, "limits": 3}, "did you mean 'limit'"),
        ("my_problems:endless", {"limit": 3}, "returns problems, not rows, so 'limit' does not apply"),
        ("my_problems:row", {}, "importable from here"),
    ):
        with pytest.raises(UsageError, match=message):
            load_problems(name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted({*PUBLISHED, "arithmetic"}))
def test_every_registered_source_is_made_from_its_name_and_has_a_line(name: str) -> None:
    source = source_of(name)
    assert source == problem_sources.make(name) == problem_sources.build({"id": name})
    assert type(source) is problem_sources.get(name) and callable(source.load)
    assert list_sources()[name].endswith("."), "the list of sources has one whole sentence on each"
    with pytest.raises(UnknownField, match=f"problem source '{name}' has no field 'limt': did you mean 'limit'"):
        load_problems(name, limt=3)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sets_have_the_split_that_their_environment_serves(name: str) -> None:
    assert gym.spec(f"MathReason/{name}-v0").kwargs["split"] in PUBLISHED[name].files
    with pytest.raises(UsageError, match=f"{name} has no split 'tset': did you mean 'test'"):
        load_problems(name, "tset")
    with pytest.raises(UsageError, match="data_dir='/nowhere' is not a folder; give the one that holds"):
        load_problems(name, "test", data_dir="/nowhere")


def test_the_readme_names_every_source() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    for name in ("arithmetic", *PUBLISHED, "reasoning_gym:<task>", "module:function", *READERS):
        assert f"`{name}`" in readme


@dataclass(frozen=True, kw_only=True)
class Sums(RowSource):
    """Sums of a number with itself."""

    step: int = 1

    @property
    def name(self) -> str:
        return "sums"

    def rows(self, split: str) -> list[dict[str, Any]]:
        return [{"question": f"{split}: {n} + {n}?", "answer": 2 * n} for n in range(0, 10, self.step)]


def test_a_source_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(problem_sources, "_known", dict(problem_sources._known))
    problem_sources.register("sums")(Sums)
    problems: Any = load_problems("sums", "dev", step=3, subset="1:", shuffle=None)
    assert [(p.question, p.answer, p.source) for p in problems] == [
        (f"dev: {n} + {n}?", str(2 * n), "sums/dev") for n in (3, 6, 9)
    ]
    env = gym.make("MathReason-v0", problems="sums", problem_options={"limit": 2})
    assert env.unwrapped.task.problems.size == 2  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="did you mean 'step'"):
        load_problems("sums", stp=3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums").mkdir()
    assert load_problems("sums").size == 10, "a registered name goes before a folder of that name"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("openai/gsm8k", "HubSource"),
        ("/data/mine", "PathSource"),
        ("~/mine", "PathSource"),
        ("a/b/c", "PathSource"),
        ("mine.CSV", "PathSource"),
        ("my_module:rows", "FunctionSource"),
        ("reasoning_gym:countdown", "ReasoningGymSource"),
    ],
)
def test_the_form_of_a_name_tells_what_it_is(name: str, kind: str) -> None:
    assert type(source_of(name)).__name__ == kind


def test_names_and_options_are_checked_without_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_source("svamp", {"limit": 3, "data_dir": "/elsewhere"})
    check_source("owner/set", {"config": "small"})
    check_source("./not/here.jsonl", here=False)
    check_source(str(write(tmp_path, ".jsonl", ROWS)), {"answer": "answer"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_folder").mkdir()
    check_source("a_folder")
    for name, options, message in (
        ("./not/here.jsonl", {}, "no problem file or folder"),
        ("here.jsonl", {}, "no problem file or folder"),
        ("gms8k", {}, "no hub id of the form 'owner/name' either: did you mean 'gsm8k'"),
        ("arithmetic", {"levl": 2}, "did you mean 'level'"),
        ("svamp", {"config": "x"}, "'svamp' has no field 'config'"),
        ("arithmetic", {"limit": 0}, "limit=0 must be an integer of at least 1"),
        ("svamp", {"limit": "ten"}, "limit='ten' must be"),
        ("svamp", {"subset": 5}, "'start:stop'"),
    ):
        with pytest.raises(UsageError, match=message):
            check_source(name, options)


def test_generated_problems() -> None:
    assert load_problems("arithmetic", "test", level=2, seed=3).size is None
    limited: Any = load_problems("arithmetic", limit=5)
    assert len(limited) == 5
    with pytest.raises(UsageError, match="did you mean 'level'"):
        load_problems("arithmetic", levle=2)


def test_repetitions_are_reported(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "what is  3 + 3?", "answer": "6"}]
    with pytest.warns(UserWarning, match="1 of 11 problems .* repeat an earlier question"):
        train = load_problems(str(write(tmp_path, ".jsonl", rows)))
    assert duplicates(train) == [(3, 10)]
    (tmp_path / "other").mkdir()
    test = load_problems(str(write(tmp_path / "other", ".jsonl", ROWS[:2])))
    assert overlap(train, test) == [(0, 0), (1, 1)]
    assert question_key(train[3]) == question_key(train[10])


@pytest.mark.parametrize(
    ("options", "size", "own"),
    [
        ({}, 1000, {}),
        ({"limit": 7}, 7, {}),
        ({"size": 50}, 50, {}),
        ({"size": 50, "limit": 7}, 7, {}),
        ({"size": 5, "limit": 7, "depth": 2}, 5, {"depth": 2}),
    ],
)
def test_options_of_a_reasoning_gym_task(
    options: dict[str, int], size: int, own: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the library records what it is asked for: ``size``, ``seed`` and ``limit`` are ours."""
    asked: list[dict[str, Any]] = []
    library, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    library.create_dataset = lambda task, **given: asked.append({"task": task, **given}) or [None] * given["size"]  # type: ignore[attr-defined]
    factory.DATASETS = {"chess": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    entries.cache_clear()
    assert load_problems("reasoning_gym:chess", seed=3, **options).size == size
    assert asked == [{"task": "chess", "size": size, "seed": 3, **own}]
    entries.cache_clear()
    with pytest.raises(UsageError, match="unknown reasoning_gym task 'ches': did you mean 'chess'"):
        load_problems("reasoning_gym:ches")


@pytest.mark.parametrize("task", ["leg_counting", "countdown"])
def test_reasoning_gym(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    problems = load_problems(f"reasoning_gym:{task}", size=5, seed=2)
    assert problems.size == 5
    problem = problems[4]
    assert verify(f"\\boxed{{{problem.answer}}}", problem).reward == 1.0
    assert verify("\\boxed{1}", problem).reward == 0.0
    assert verify("\\boxed{().__class__}", problem).reward == 0.0
    if task == "countdown":
        left, right = re.split(r" \+ ", problem.answer, maxsplit=1) if " + " in problem.answer else (problem.answer, "")
        assert not right or "-" in right or verify(f"\\boxed{{{right} + {left}}}", problem).reward == 1.0
    assert {p.question for p in map(problems.__getitem__, range(5))}.isdisjoint(
        {p.question for p in map(load_problems(f"reasoning_gym:{task}", "test", size=5, seed=2).__getitem__, range(5))}
    )
