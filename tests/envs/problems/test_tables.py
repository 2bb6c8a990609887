"""Files, folders and tables as other people's software leaves them: what is read is what they hold, or the error says
in one line what is wrong and what to do."""

from __future__ import annotations

import csv
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict

from envs.grade import main as grade
from envs.problems import load_problems
from envs.problems.readers import READERS
from envs.problems.sources import PUBLISHED
from integrations.trl import verified
from registry import UsageError

ROWS = [{"question": f"What is {n} + 2?", "answer": str(n + 2)} for n in range(12)]
SUFFIXES = sorted(READERS)


def write(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    """A file of rows, of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[{','.join(lines)}]"
        path.write_text(text, encoding=encoding)
    return path


def texts(source: Any, split: str = "train", **options: Any) -> list[tuple[str, str]]:
    problems: Any = load_problems(source, split, **options)
    return [(problem.question, problem.answer) for problem in problems]


def refusal(source: Any, split: str = "train", **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_problems(source, split, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


EXPECTED = [(row["question"], row["answer"]) for row in ROWS]

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 12 - 5?"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "12 - 5?"}]}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("messages", "question"),
    [
        ([USER], "What is 12 - 5?"),
        ([SYSTEM, USER], "What is 12 - 5?"),
        ([USER, {"role": "assistant", "content": "7"}, {"role": "user", "content": "And 9 - 2?"}], "And 9 - 2?"),
        ([PARTS], "What is\n12 - 5?"),
    ],
)
def test_of_chat_messages_the_users_last_is_the_question(
    messages: list[Any], question: str, suffix: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"chat{suffix}", [{"prompt": messages, "answer": "7"}])
    assert texts(str(path)) == [(question, "7")]
    as_text = [{"prompt": json.dumps(messages), "answer": "7"}, {"prompt": repr(messages), "answer": "7"}]
    with pytest.warns(UserWarning, match="repeat an earlier question"):
        assert texts(str(write(tmp_path / "chat.csv", as_text))) == [(question, "7")] * 2


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "system", "content": "Be brief."}],
        [{"role": "user", "content": {"text": "What is 12 - 5?"}}],
        [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}],
        [{"role": "user"}],
        [{"from": "human", "value": "What is 12 - 5?"}],
        ["What is 12 - 5?"],
        {"text": "What is 12 - 5?"},
        [],
        {},
        12,
        1.5,
        True,
    ],
)
def test_a_question_that_is_neither_text_nor_chat_messages_is_an_error(value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": value, "answer": "7"}])
    assert "row 0" in refusal(str(path))


def test_verls_layout_and_columns_inside_of_objects(tmp_path: Path) -> None:
    row = {
        "data_source": "own",
        "prompt": [SYSTEM, USER],
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"split": "train", "index": 3, "question": "Q?", "answer": "12-5=7\n#### 7", "key": {"deep": 8}},
    }
    for suffix in (".jsonl", ".parquet"):
        path = str(write(tmp_path / f"verl{suffix}", [row]))
        assert texts(path) == [("What is 12 - 5?", "7")]
        assert texts(path, question="extra_info.question", answer="extra_info.answer") == [("Q?", "7")]
        assert texts(path, answer="extra_info.key.deep") == [("What is 12 - 5?", "8")]
        assert "'reward_model.ground_truth'" in refusal(path, answer="reward_model.truth")
        assert "with a dot" in refusal(path, answer="reward_model")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_that_are_not_chosen_are_not_looked_at(suffix: str, tmp_path: Path) -> None:
    bad = {"question": "What is it?", "answer": None}
    path = str(write(tmp_path / f"rows{suffix}", [*ROWS[:5], bad, *ROWS[6:9], bad, bad, bad]))
    kept = EXPECTED[:5] + EXPECTED[6:9]
    assert texts(path, limit=5) == texts(path, subset=":5") == EXPECTED[:5]
    assert texts(path, subset="6:", limit=3) == EXPECTED[6:9]
    message = refusal(path)
    assert "4 of 12 rows" in message and "row 5 of" in message and message.endswith("omit='5,9:12'")
    for omit in ("5,9:12", [5, 9, 10, 11], "5, 9 : 12"):
        assert texts(path, omit=omit) == kept
    assert [problem.id for problem in load_problems(path, omit="5,9:12")] == [*"01234678"]  # type: ignore[attr-defined]
    shuffled = load_problems(path, omit="5,9:12", shuffle=1)
    whole = load_problems(str(write(tmp_path / f"whole{suffix}", ROWS)), shuffle=1)
    ids = [problem.id for problem in whole]  # type: ignore[attr-defined]
    assert [problem.id for problem in shuffled] == [id for id in ids if id not in ("5", "9", "10", "11")]  # type: ignore[attr-defined]
    for wrong in ("x", "1:2:3", "-1", -1, 1.5, "12", "3:13", ""):
        assert "omit=" in refusal(path, omit=wrong)


def test_an_error_of_all_rows_offers_no_omission(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", [{**row, "answer": {"value": row["answer"]}} for row in ROWS]))
    message = refusal(path)
    assert message.startswith("none of the 12 rows") and "omit=" not in message
    assert texts(path, answer="answer.value") == EXPECTED


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_without_a_column_of_the_others_is_named(suffix: str, tmp_path: Path) -> None:
    """Not even where it has another column that might be the answer."""
    rows: list[dict[str, Any]] = [{**row, "output": "99"} for row in ROWS]
    if suffix in (".json", ".jsonl"):
        del rows[3]["answer"]
    else:
        rows[3]["answer"] = None
    message = refusal(str(write(tmp_path / f"rows{suffix}", rows)))
    assert "row 3" in message and message.endswith("omit='3'")


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_a_byte_order_mark_is_no_text(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS, "utf-8-sig")
    assert texts(str(path)) == EXPECTED
    for packed in (tmp_path / f"rows{suffix}.gz", tmp_path / f"ROWS{suffix.upper()}.GZ"):
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert texts(str(packed)) == EXPECTED
    if suffix == ".jsonl":
        twice = tmp_path / "twice.jsonl"
        twice.write_bytes(
            path.read_bytes()
            + write(tmp_path / "more.jsonl", [{"question": "Q?", "answer": "7"}], "utf-8-sig").read_bytes()
        )
        assert texts(str(twice)) == [*EXPECTED, ("Q?", "7")]


def test_grade_reads_what_windows_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "graded.jsonl"
    line = json.dumps({"gold": "11", "completion": "\\boxed{11}"}) + "\r\n"
    path.write_bytes(line.encode("utf-8-sig"))
    assert grade([str(path)]) == 0
    assert '"reward": 1' in capsys.readouterr().out
    for content in (line.encode("utf-16"), b'{"gold": "\xe9", "completion": ""}'):
        path.write_bytes(content)
        assert grade([str(path)]) == 2
        error = capsys.readouterr().err
        assert "save the file as UTF-8" in error and error.count("\n") == 1


GZ = gzip.compress(b'{"question": "Q?", "answer": "7"}\n' * 99, mtime=0)
QA = b'"question": "Q?", "answer": '


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"question": "caf\xe9?", "answer": "7"}\n', "save the file as UTF-8"),
        ("a.csv", "question,answer\nQ?,7\n".encode("utf-16"), "save the file as UTF-8"),
        ("a.jsonl", GZ, "cannot be read as jsonl"),
        ("a.jsonl.gz", GZ[:40], "cannot be read as jsonl"),
        ("a.jsonl.gz", b'{"question": "Q?"}', "cannot be read as jsonl"),
        ("a.json.gz", GZ[:-9] + b"123456789", "cannot be read as json"),
        ("a.json", b"7", "expected a list of objects, not int"),
        ("a.json", b'"text"', "expected a list of objects, not str"),
        ("a.json", b"null", "expected a list of objects, not NoneType"),
        ("a.json", b"{}", "an object with one such list"),
        ("a.json", b'{"question": ["Q?"], "answer": ["7"]}', "an object with one such list"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "not one with 2"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b"{}\n", "no question column; its columns are none"),
        ("a.jsonl", b"null\n", "NoneType, not an object"),
        ("a.jsonl", b"{" + QA + b'"7"}\n{' + QA, "line 2"),
        ("a.jsonl", b"{" + QA + b'"7", "answer": "8"}\n', "'answer' twice"),
        ("a.jsonl", b"{" + QA + b"1" * 5000 + b"}\n", "line 1"),
        ("a.jsonl", b"{" + QA + b'"7", "Answer": "8"}\n', "name one with answer="),
        ("a.jsonl", b'{"question": "\\ud83d?", "answer": "7"}\n', "half a character in its question"),
        ("a.jsonl", b"{" + QA + b"NaN}\n", "no answer"),
        ("a.jsonl", b"{" + QA + b"1e999999999}\n", "no answer"),
        ("a.jsonl", b"{" + QA + b"1e-999999999}\n", "no answer"),
        ("a.csv", b"question,answer,answer\nQ?,7,8\n", "'answer' is there twice"),
        ("a.csv", b"question,answer\nWhat is 1,200 + 3?,1203\n", "in double quotes"),
        ("a.csv", b'question,answer\n"What is 5 + 2?,7\nQ?,8\n', "cannot be read as csv"),
        ("a.csv", b"question,answer,,\nQ?,7,,8\n", "'8' in a column without a name"),
        ("a.csv", b"question,answer\nQ?\n", "no answer (None)"),
        ("a.csv", b"question;answer\nQ?;7\n", "its columns are 'question;answer'"),
        ("a.csv", b"\n", "has no rows"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        *((f"a{suffix}", b"", "") for suffix in (*SUFFIXES, ".jsonl.gz")),
    ],
)
def test_damaged_and_foreign_files_are_one_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refusal(str(tmp_path / name))


def test_json_lines_under_the_name_of_json_and_lists_inside_of_an_object(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(write(tmp_path / "rows.jsonl", ROWS).read_bytes())
    assert texts(str(path)) == EXPECTED
    path.write_text(json.dumps({"version": 1, "tags": ["a"], "data": ROWS}), encoding="utf-8")
    assert texts(str(path)) == EXPECTED


def test_cells_with_line_breaks_quotes_and_commas(tmp_path: Path) -> None:
    rows = [{"question": 'He said "1,200".\n\nHow many?\r\nSay it; now', "answer": "1,200"}]
    path = write(tmp_path / "rows.csv", rows)
    assert texts(str(path)) == [(rows[0]["question"], "1,200")]


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("7", "7"),
        ("7.0", "7"),
        ("-0.5", "-0.5"),
        ("0.1", "0.1"),
        ("0.12345678901234567891", "0.12345678901234567891"),
        ("1e-07", "0.0000001"),
        ("1.5E3", "1500"),
        ("1e22", "1" + "0" * 22),
        ("12345678901234567890", "12345678901234567890"),
        ('"007"', "007"),
        ('"1.50"', "1.50"),
    ],
)
def test_numbers_keep_their_digits(value: str, gold: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "Q?", "answer": {value}}}')
    assert texts(str(path)) == [("Q?", gold)]


def test_decimals_of_a_table_and_other_types(tmp_path: Path) -> None:
    import datetime

    import numpy as np
    import pandas
    import pyarrow as pa
    from pyarrow import parquet

    def saved(value: Any, kind: Any = None) -> str:
        table = pa.table({"question": ["Q?"], "answer": pa.array([value], kind)})
        parquet.write_table(table, tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    assert texts(saved(Decimal("12.50"))) == [("Q?", "12.50")]
    for kind in (pa.float32(), pa.float64()):
        for value, gold in ((0.1, "0.1"), (7.0, "7"), (-2.5, "-2.5"), (1e-5, "0.00001")):
            path = saved(value, kind)
            assert texts(path) == texts(Dataset(parquet.read_table(path))) == [("Q?", gold)]
    half = pa.array([np.float16(0.1)], pa.float16())
    assert texts(pa.table({"question": ["Q?"], "answer": half})) == [("Q?", "0.1")]
    for dtype in ("float16", "float32", "Float32", "float64"):
        frame = pandas.DataFrame({"question": ["Q?"], "answer": pandas.Series([0.1], dtype=dtype)})
        assert texts(frame) == [("Q?", "0.1")]
        frame.loc[0, "answer"] = None
        assert "no answer" in refusal(frame)
    assert texts([{"question": "Q?", "answer": np.float32(0.1)}]) == [("Q?", "0.1")]
    assert texts([{"question": "Q?", "answer": np.int64(7)}]) == [("Q?", "7")]
    for other in (b"12", datetime.date(2020, 1, 1), {"value": 3}):
        assert "give text or a number" in refusal(saved(other))
    table = pa.Table.from_arrays([pa.array(["Q?"]), pa.array(["7"]), pa.array(["8"])], ["question", "answer", "answer"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    assert "'answer' is there twice" in refusal(str(tmp_path / "twice.parquet"))


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["main/train-00000-of-00002-3f2a9c.parquet", "main/train-00001-of-00002-3f2a9c.parquet"],
        ["main/train/0000.parquet", "main/train/0001.parquet"],
        ["train/part-0.jsonl", "train/part-1.jsonl"],
        ["main/train-0.csv", "main/train-1.csv"],
    ],
)
def test_a_folder_as_the_hub_has_it(names: list[str], tmp_path: Path) -> None:
    home = tmp_path / "gsm8k"
    for name, rows in zip(names, (ROWS[:5], ROWS[5:]), strict=True):
        write(home / name, rows)
        write(home / name.replace("train", "test"), ROWS[:2])
    (home / "README.md").write_text("---\nconfigs:\n- config_name: main\n---\n")
    (home / ".cache" / "huggingface").mkdir(parents=True)
    assert texts(str(home)) == EXPECTED
    with pytest.warns(UserWarning, match="repeat"):
        assert texts(str(home), "test") == EXPECTED[:2] * 2
    assert texts("gsm8k", data_dir=str(tmp_path)) == EXPECTED
    home.rename(tmp_path / "elsewhere")
    (tmp_path / "openai").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "openai" / "gsm8k")
    assert texts("gsm8k", data_dir=str(tmp_path)) == EXPECTED


def test_folders_that_are_incomplete_or_ambiguous(tmp_path: Path) -> None:
    write(tmp_path / "cut" / "train-00000-of-00003.parquet", ROWS)
    write(tmp_path / "cut" / "train-00002-of-00003.parquet", ROWS)
    assert "2 parts" in refusal(str(tmp_path / "cut"))
    write(tmp_path / "set" / "main" / "train-00000-of-00001.parquet", ROWS)
    write(tmp_path / "set" / "other" / "train-00000-of-00001.parquet", ROWS)
    message = refusal(str(tmp_path / "set"))
    assert "several folders" in message and str(tmp_path / "set" / "main") in message
    assert texts(str(tmp_path / "set" / "main")) == EXPECTED
    assert "it holds train-00000-of-00001.parquet" in refusal(str(tmp_path / "set" / "main"), "test")
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in refusal(str(tmp_path / "empty"))
    broken = tmp_path / "arrow"
    Dataset.from_list(ROWS).save_to_disk(str(broken))
    next(broken.glob("*.arrow")).write_bytes(b"")
    assert "cannot be read as an Arrow folder" in refusal(str(broken))


def test_the_hubs_split_of_a_downloaded_set(tmp_path: Path) -> None:
    """The hub calls the test split of this set ``train``."""
    write(tmp_path / "aime_2024" / "data" / "train-00000-of-00001.parquet", ROWS)
    assert texts("aime24", "test", data_dir=str(tmp_path)) == EXPECTED


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_data_dir_without_the_set_names_the_files_that_were_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = refusal(name, "test", data_dir=str(tmp_path))
    assert PUBLISHED[name].files["test"][0] in message and PUBLISHED[name].hub[0] in message
    assert "no route" not in message
    monkeypatch.setenv("NESTED_REFT_DATA", str(tmp_path))
    message = refusal(name, "test")
    assert PUBLISHED[name].files["test"][0] in message and "no route" in message
    monkeypatch.setenv("NESTED_REFT_DATA", "/nowhere")
    assert "NESTED_REFT_DATA='/nowhere' is not a folder" in refusal(name, "test")


def test_tables_in_memory() -> None:
    pandas = pytest.importorskip("pandas")
    dataset = Dataset.from_list(ROWS)
    arrow = dataset.with_format("arrow")[:]
    for table in (ROWS, tuple(ROWS), iter(ROWS), dataset, dataset.to_iterable_dataset(), arrow, pandas.DataFrame(ROWS)):
        assert texts(table, limit=5) == EXPECTED[:5]
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])})
    assert texts(splits, "test") == EXPECTED[:2]
    assert "no split 'tset': did you mean 'test'" in refusal(splits, "tset")
    assert [problem.source for problem in load_problems(ROWS, limit=1)] == ["table/train"]  # type: ignore[attr-defined]
    assert "did you mean 'limit'" in refusal(ROWS, limt=3)
    for table in (5, None, b"bytes", 1.5):
        assert "give a name, a path, a datasets.Dataset or a list of rows" in refusal(table)
    assert "has no rows" in refusal([])


@pytest.mark.parametrize("problems", [ROWS, Dataset.from_list(ROWS), None, Path("rows.jsonl")])
def test_an_environment_takes_a_table_by_a_function(problems: Any) -> None:
    """Its arguments are JSON, since a spec travels to other processes and into files."""
    with pytest.raises(UsageError, match="module:function"):
        gym.make("MathReason-v0", problems=problems)


@pytest.mark.parametrize("split", ["../rows", "", ".", "..", "a/b", "*", None, 5])
def test_a_split_is_a_name_in_the_folder(split: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows" / "a.jsonl", ROWS)
    (tmp_path / "rows" / "folder").mkdir()
    refusal(str(tmp_path / "rows" / "folder"), split)


@pytest.mark.parametrize(
    "options", [{"shuffle": "x"}, {"shuffle": 1.5}, {"shuffle": [1]}, {"question": 5}, {"subset": 3}]
)
def test_options_of_another_type(options: dict[str, Any]) -> None:
    refusal(ROWS, **options)
    refusal("gsm8k", **{"data_dir": 5, **options})


@pytest.mark.parametrize(
    "name", [":", "a:", ":b", "~no.such.user/x.jsonl", "a\0b.jsonl", "x" * 5000 + ".jsonl", "x" * 5000]
)
def test_names_that_nothing_can_have(name: str) -> None:
    refusal(name)


def test_a_class_label_is_its_name(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, Value

    kinds = Features({"question": Value("string"), "answer": ClassLabel(names=["no", "yes"])})
    labels = Dataset.from_dict({"question": ["a", "b", "c"], "answer": [1, 0, 1]}, features=kinds)
    labels.save_to_disk(str(tmp_path / "labels"))
    for source in (labels, str(tmp_path / "labels")):
        assert [gold for _, gold in texts(source)] == ["yes", "no", "yes"]


@pytest.mark.parametrize("answers", [["3", "5"], ["1/2", "0.5"], ["it's", "no"]])
def test_lists_that_numpy_has_printed_are_lists(answers: list[str], tmp_path: Path) -> None:
    printed = str(np.array(answers, dtype=object))
    assert "," not in printed
    path = write(tmp_path / "a.csv", [{"question": "Q?", "answer": printed}])
    (problem,) = load_problems(str(path))
    assert [problem.answer, *problem.alternatives] == answers
    assert verified([f"\\boxed{{{answers[0]}}}"], answer=[printed]) == [1.0]


def test_messages_that_numpy_has_printed_are_messages(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Is {1} {2} a set, or '1 2' a text?"}
    printed = str(np.array([SYSTEM, user], dtype=object))
    path = write(tmp_path / "a.csv", [{"prompt": printed, "answer": "no"}])
    assert texts(str(path)) == [(user["content"], "no")]
    damaged = write(tmp_path / "b.csv", [{"prompt": printed[:-9], "answer": "no"}])
    assert "row 0" in (said := refusal(str(damaged))) and "cannot be read" in said


def test_a_frame_of_verls_parquet_is_read_as_its_file_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"prompt": [SYSTEM, USER], "reward_model": {"ground_truth": "7"}}])
    assert texts(pd.read_parquet(path)) == texts(str(path)) == [("What is 12 - 5?", "7")]


@pytest.mark.parametrize("missing", [None, "", " ", float("nan"), np.float64("nan"), Decimal("nan")])
@pytest.mark.parametrize("column", ["solution", "rationale", "equation"])
def test_a_missing_solution_is_none(column: str, missing: Any) -> None:
    rows = [{"question": "Q?", "answer": 5, column: missing, "id": missing}, {"question": "R?", "answer": 6, "id": 7.0}]
    problems: Any = load_problems(rows)
    assert [problem.solution for problem in problems] == ["", ""]
    assert [problem.id for problem in problems] == ["0", "7"]


def test_alpacas_input_stands_below_its_instruction() -> None:
    rows = [
        {"instruction": "Add the numbers.", "input": "3, 4", "output": "7"},
        {"instruction": "What is 3 + 4?", "input": "", "output": "7"},
        {"instruction": "What is 3 + 5?", "input": None, "output": "8"},
    ]
    assert texts(rows) == [("Add the numbers.\n3, 4", "7"), ("What is 3 + 4?", "7"), ("What is 3 + 5?", "8")]
    assert texts(rows[:1], question="input") == [("3, 4", "7")]


@pytest.mark.parametrize("column", ["final_answer", "expected_answer"])
def test_a_final_answer_goes_before_an_answer_that_explains_it(column: str) -> None:
    assert texts([{"question": "Q?", "answer": "Five and two is seven.", column: "7"}]) == [("Q?", "7")]


SHORT = pa.struct({"ground_truth": pa.float32()})


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (pa.table({"question": ["Q?"], "m": pa.array([{"ground_truth": 0.1}], SHORT)}), {"answer": "m.ground_truth"}),
        (pa.table({"question": ["Q?"], "answer": pa.array([[0.1]], pa.list_(pa.float32()))}), {}),
        (pa.table({"question": ["Q?"], "answer": pa.array([[np.float16(0.1)]], pa.list_(pa.float16()))}), {}),
        (pd.DataFrame({"question": ["Q?"], "answer": pd.array([0.1], dtype="float[pyarrow]")}), {}),
        (pd.DataFrame({"question": ["Q?"], "answer": pd.array([0.1], dtype="Float32")}), {}),
        ([{"question": "Q?", "answer": np.array([0.1], np.float32)}], {}),
        ([{"question": "Q?", "answer": np.array(0.1, np.float16)}], {}),
        ([{"question": "Q?", "answer": torch.tensor([0.1])}], {}),
        ([{"question": "Q?", "answer": torch.tensor(0.1)}], {}),
        ([{"question": "Q?", "answer": np.str_("0.1")}], {}),
        ([{"question": "Q?", "answer": np.array(Decimal("0.1"), dtype=object)}], {}),
    ],
)
def test_short_numbers_are_what_was_written_wherever_they_stand(table: Any, options: dict[str, Any]) -> None:
    assert texts(table, **options) == [("Q?", "0.1")]


@pytest.mark.parametrize(
    "table",
    [
        pa.table([["Q?"], ["1"], ["2"]], names=["question", "answer", "answer"]),
        pd.DataFrame([["Q?", "1", "2"]], columns=["question", "answer", "answer"]),
    ],
)
def test_columns_of_one_name_in_memory_are_refused(table: Any) -> None:
    assert "'answer' is there twice" in refusal(table)


@pytest.mark.parametrize("role", ["question", "solution"])
def test_what_has_lost_its_backslashes_is_warned_of(role: str) -> None:
    rows = [
        {**ROWS[0]},
        {**ROWS[1], role: "It is \frac{3}{8} \times 2."},
        {**ROWS[2], role: "First,\nto \\times it\tx"},
    ]
    with pytest.warns(UserWarning, match=r"1 of 3 rows of table/train.*omit='1'"):
        load_problems(rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\nquestion,answer\nQ?,7\n", [("Q?", "7")]),
        ("question,answer,,\nQ?,7,,\n\nR?,8\n", [("Q?", "7"), ("R?", "8")]),
        (",question,answer\n0,Q?,7\n", [("Q?", "7")]),
        (f"question,answer,solution\nQ?,7,{'x' * 200_000}\n", [("Q?", "7")]),
    ],
)
def test_csv_as_spreadsheets_write_it(text: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(text)
    assert texts(str(tmp_path / "a.csv")) == expected
    assert csv.field_size_limit() == limit


def splits(split: str) -> Any:
    return DatasetDict({split: Dataset.from_list(ROWS)})


def whole() -> Any:
    return ROWS


SEVEN = 7


def test_functions_that_are_none_or_take_no_split_are_refused() -> None:
    assert texts(f"{__name__}:splits") == EXPECTED
    assert "takes no 'split'" in refusal(f"{__name__}:whole")
    assert "'7', not a function" in refusal(f"{__name__}:SEVEN")


@pytest.mark.parametrize("gold", ["0.12345678901234567890123", "12345678901234567890.5"])
def test_graded_golds_keep_their_digits(gold: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": 1.5, "gold": {gold}, "completion": "\\\\boxed{{{gold}}}"}}\n')
    assert grade([str(path)]) == 0
    assert json.loads(capsys.readouterr().out) | {"seconds": 0} == {
        **{"id": 1.5, "reward": 1, "status": "right", "extracted": gold, "seconds": 0}
    }


@pytest.mark.parametrize(
    ("text", "said"), [("", "the file has none"), ('{"gold": "5", "gold": "6", "completion": "6"}\n', "'gold' twice")]
)
def test_files_that_cannot_be_graded_are_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    assert grade([str(tmp_path / "a.jsonl"), "--table"]) == 2
    assert said in capsys.readouterr().err
