"""Rows and reward for TRL: the verdicts are the environment's, and TRL's own trainer takes a step by them."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.codec import load_tokenizer
from envs.problem import Problem
from envs.problems import load_problems
from envs.task import Task, TaskSpec
from integrations.trl import MathTool, problem_rows, verified
from registry import UsageError, templates

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def right(text: Any, answer: Any, **columns: Any) -> float:
    (reward,) = verified([text], answer=[answer], **{name: [value] for name, value in columns.items()})
    return reward


class TestRows:
    def test_prompts_and_answers_are_those_of_the_environment(self) -> None:
        task = Task(TaskSpec(problem_options={"limit": 20}))
        rows = problem_rows("arithmetic", limit=20)
        assert rows["prompt"] == [task.tokenizer.decode(task.prompt(n)) for n in range(20)]
        assert rows["answer"] == [[task.problem(n).answer] for n in range(20)]
        assert rows["id"] == [task.problem(n).id for n in range(20)]

    def test_the_prompt_of_chat_is_what_the_chat_template_makes_the_environments_prompt_of(self) -> None:
        class Tokenizer:
            chat_template = CHAT

            def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
                return "".join(f"<|{one['role']}|>{one['content']}\n" for one in messages) + "<|assistant|>"

        (row,) = problem_rows([{"question": " 1 + 1? ", "answer": "2"}], "chat")
        assert [message["role"] for message in row["prompt"]] == ["user"]
        made = Tokenizer().apply_chat_template(row["prompt"])
        assert made == templates.make("chat").prompt(" 1 + 1? ", Tokenizer())

    def test_every_accepted_answer_travels(self) -> None:
        table = [Problem("How far?", "1/3", "mine", "a", alternatives=("0.33", "0.333"))]
        rows = problem_rows(table)
        assert rows[0]["answer"] == ["1/3", "0.33", "0.333"]
        judged = [right(f"#### {text}", rows[0]["answer"]) for text in ("1/3", "0.33", "0.333", "0.3")]
        assert judged == [1.0, 1.0, 1.0, 0.0]

    def test_a_source_without_end_asks_for_a_limit(self) -> None:
        with pytest.raises(UsageError, match="limit="):
            problem_rows("arithmetic")

    def test_a_bad_gold_is_told_before_the_training(self) -> None:
        with pytest.raises(UsageError, match="row 1 "):
            problem_rows([{"question": "a?", "answer": "1"}, {"question": "b?", "answer": "the sum x + 3 of them"}])


class TestVerified:
    @settings(max_examples=40, deadline=None)
    @given(st.data())
    @pytest.mark.parametrize("template", ["plain", "r1"])
    def test_it_is_the_environments_verdict(self, template: str, data: st.DataObject) -> None:
        budgets = {"max_prompt_tokens": 512, "max_new_tokens": 512}
        task = Task(TaskSpec(template=template, problem_options={"limit": 5}, **budgets))
        rows = problem_rows("arithmetic", template, limit=5)
        index = data.draw(st.integers(0, 4))
        answer = task.problem(index).answer
        parts = st.sampled_from(
            [
                "#### ",
                "\\boxed{",
                "}",
                answer,
                "7",
                " The answer is ",
                "<think>",
                "</think>",
                "<answer>",
                "</answer>",
                "\n",
            ]
        )
        text = "".join(data.draw(st.lists(parts, max_size=8)))
        ids = np.array(task.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        ids = np.append(ids, task.tokenizer.eos_token_id)
        columns = {name: rows[index][name] for name in ("template", "scorer", "opens_thought", "id")}
        assert right(task.text(ids), rows[index]["answer"], **columns) == task.verdict(ids, index).result().reward

    def test_a_thought_that_a_text_prompt_opens_has_no_answer_until_it_is_closed(self) -> None:
        texts = ["\\boxed{4} but wait", "hm</think> \\boxed{4}"]
        assert verified(texts, prompts=["2 + 2? <think>"] * 2, answer=["4", "4"]) == [0.0, 1.0]
        assert verified(texts, prompts=["2 + 2?"] * 2, answer=["4", "4"]) == [1.0, 1.0]

    @pytest.mark.parametrize(
        ("completion", "reward"),
        [
            ([{"role": "assistant", "content": "\\boxed{4}"}], 1.0),
            ([{"role": "assistant", "content": "\\boxed{5}"}], 0.0),
            ([{"role": "assistant", "content": [{"type": "text", "text": "\\boxed{4}"}]}], 1.0),
            ([{"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "\\boxed{4}"}], 0.0),
            ([], 0.0),
            ("", 0.0),
        ],
    )
    def test_conversations(self, completion: Any, reward: float) -> None:
        assert right(completion, "4") == reward

    @pytest.mark.parametrize("gold", ["1+1=2 #### 1,200", "\\boxed{1200}", 1200, 1200.0, ["x", "1200"], "$1200$"])
    def test_golds_as_data_sets_have_them(self, gold: Any) -> None:
        assert right("#### 1200", gold) == 1.0
        assert right("#### 1201", gold) == 0.0

    def test_the_column_may_be_solution_and_others_are_ignored(self) -> None:
        assert verified(["#### 3"], solution=["#### 3"], difficulty=[1], trainer_state=object()) == [1.0]

    def test_without_gold_answers_the_columns_are_named(self) -> None:
        with pytest.raises(UsageError, match=r"'answer' or 'solution'.*there are: label"):
            verified(["#### 3"], label=["3"])

    def test_an_unknown_template_is_named(self) -> None:
        with pytest.raises(UsageError, match="did you mean 'plain'"):
            right("#### 3", "3", template="plane")

    def test_what_trl_logs_of_each_completion(self) -> None:
        logged: dict[str, list[Any]] = {}
        verified(["#### 3", "three"], answer=["3", "3"], log_extra=logged.__setitem__)
        assert logged == {"status": ["right", "no_answer"], "extracted": ["3", ""]}

    def test_a_hang_costs_its_deadline_and_no_other_verdict_in_any_thread(self) -> None:
        hang = "\\boxed{\\sum_{i=1}^{10^8} i^i}"
        rewards: list[float] = []
        golds = ["\\sum_{k=1}^{n} k", "3\\sqrt{2}"]

        def judge() -> None:
            rewards.extend(verified([hang, "\\boxed{\\sqrt{18}}"], answer=golds))

        start = time.perf_counter()
        thread = threading.Thread(target=judge)
        thread.start()
        thread.join(60)
        assert rewards == [0.0, 1.0]
        assert time.perf_counter() - start < 60

    def test_a_task_of_reasoning_gym_keeps_its_scorer(self) -> None:
        pytest.importorskip("reasoning_gym")
        rows = problem_rows("reasoning_gym:countdown", limit=3)
        for row in rows:
            data = json.loads(row["scorer"])
            assert data["task"] == "countdown"
            own = {name: row[name] for name in ("template", "scorer", "opens_thought")}
            assert right(f"\\boxed{{{row['answer'][0]}}}", row["answer"], **own) == 1.0
            assert right("\\boxed{1 - 1}", row["answer"], **own) == 0.0


class TestMathTool:
    def test_the_last_answer_counts(self) -> None:
        tool = MathTool()
        assert tool.reset(prompt="?", answer=["1/2"]) is None
        assert tool.get_reward() == 0.0
        tool.give_answer("\\frac{2}{4}")
        assert tool.get_reward() == 1.0
        tool.give_answer("3")
        assert tool.get_reward() == 0.0
        tool.give_answer("0.5")
        tool.reset(prompt="?", answer=["1/2"])
        assert tool.get_reward() == 0.0

    def test_rows_without_answers_are_refused(self) -> None:
        with pytest.raises(UsageError, match="problem_rows"):
            MathTool().reset(prompt="?")


class TestWithTRL:
    """One real step of TRL's trainer."""

    @pytest.fixture(autouse=True)
    def trl(self) -> None:
        pytest.importorskip("trl")

    @pytest.fixture
    def trainer(self, folder: str, tmp_path: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM
        from trl import GRPOConfig, GRPOTrainer

        def make(rows: Any, chat: str | None = None, longest: int = 12, **arguments: Any) -> Any:
            tokenizer = copy.deepcopy(load_tokenizer("builtin"))
            tokenizer.chat_template = chat
            torch.manual_seed(0)
            settings = GRPOConfig(
                output_dir=str(tmp_path),
                max_steps=1,
                num_generations=4,
                per_device_train_batch_size=8,
                max_completion_length=longest,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
            )
            model = AutoModelForCausalLM.from_pretrained(folder)
            arguments = {"reward_funcs": verified} | arguments
            return GRPOTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer, **arguments)

        return make

    @pytest.mark.parametrize("template", ["plain", "chat"])
    def test_a_step(self, template: str, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every other completion is the right one: half of the rewards are 1, and the weights move."""
        table = [
            Problem("How much is 3 * 4?", "12", "mine", "a"),
            Problem("How much is 12 * 1?", "13", "mine", "b", alternatives=("12",)),
        ]
        made = trainer(problem_rows(table, template), CHAT if template == "chat" else None)
        generate = made._generate_single_turn
        written = load_tokenizer("builtin")(" #### 12", add_special_tokens=False)["input_ids"]

        def scripted(*args: Any, **kwargs: Any) -> Any:
            completions, *others = generate(*args, **kwargs)
            return [written if n % 2 else own for n, own in enumerate(completions)], *others

        monkeypatch.setattr(made, "_generate_single_turn", scripted)
        before = [parameter.detach().clone() for parameter in made.model.parameters()]
        made.train()
        logged = made.state.log_history[0]
        assert logged["rewards/verified/mean"] == logged["reward"] == 0.5
        assert logged["frac_reward_zero_std"] == 0.0
        assert any(not old.equal(new) for old, new in zip(before, made.model.parameters(), strict=True))
        assert sorted(made._logs["extra"]["status"]) == ["no_answer"] * 4 + ["right"] * 4

    def test_a_step_of_a_model_that_answers_by_a_tool(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every other first turn calls the tool with the right answer; TRL runs it and asks for the reward."""
        import trl

        chat = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
        rows = problem_rows([{"question": "How much is 3 * 4?", "answer": "12"}] * 2, "chat")
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        made = trainer(rows, chat, 160, reward_funcs=None, environment_factory=MathTool)
        generate = made._generate_single_turn
        call = '<tool_call>\n{"name": "give_answer", "arguments": {"answer": "12.0"}}\n</tool_call>'
        written = load_tokenizer("builtin")(call, add_special_tokens=False)["input_ids"]
        turns = itertools.count()

        def scripted(*args: Any, **kwargs: Any) -> Any:
            completions, *others = generate(*args, **kwargs)
            first = next(turns) == 0
            return [written if first and n % 2 else own[:2] for n, own in enumerate(completions)], *others

        monkeypatch.setattr(made, "_generate_single_turn", scripted)
        made.train()
        logged = made.state.log_history[0]
        assert logged["tools/call_frequency"] == 0.5 and logged["tools/failure_frequency"] == 0.0
        assert logged["rewards/MathTool/mean"] == 0.5


def test_a_tool_takes_an_answer_as_the_prompt_asks_for_it() -> None:
    tool = MathTool()
    with pytest.raises(UsageError, match="call reset"):
        tool.give_answer("5")
    tool.reset(answer=["5"])
    for answer, reward in (("\\boxed{5}", 1.0), ("#### 5", 1.0), ("5", 1.0), ("\\boxed{6}", 0.0), ("", 0.0)):
        tool.give_answer(answer)
        assert tool.get_reward() == reward, answer


def test_columns_that_joined_data_sets_lack_in_some_rows_are_absent_there() -> None:
    texts, none = ["\\boxed{3}", "#### 4"], [None, None]
    columns: dict[str, Any] = {"template": ["plain", None], "scorer": none, "opens_thought": none}
    assert verified(texts, answer=[["3"], None], solution=[None, "2 + 2 = 4. #### 4"], **columns) == [1.0, 1.0]
    for name, column in (("answer", "42"), ("answer", ["4"]), ("scorer", [""]), ("opens_thought", [True])):
        with pytest.raises(UsageError, match=f"2 completions and .* of '{name}': one each"):
            verified(texts, **({"answer": ["3", "4"]} | {name: column}))  # type: ignore[arg-type]


def test_rows_of_a_path_and_of_loaded_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "2 + 2?", "answer": "4"}\n{"question": "2 + 3?", "answer": "5"}\n')
    assert problem_rows(path, limit=1)["question"][:] == ["2 + 2?"]
    loaded = load_problems(path)
    assert len(problem_rows(loaded)) == 2
    with pytest.raises(UsageError, match="loaded already, so limit=1 would do nothing"):
        problem_rows(loaded, limit=1)


def test_a_tokenizer_in_memory_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"give 'builtin', a folder or a hub id"):
        problem_rows("arithmetic", template="chat", limit=1, tokenizer=load_tokenizer("builtin"))
