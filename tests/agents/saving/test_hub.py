"""Models on the hub: what arrives there is the model, it loads again, and no token or path of this machine is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.saving.hub import base_name, model_card
from benchmarks.experiment.resolve import resolve
from benchmarks.model_card import main
from tests.oracles.finished_runs import finish
from tests.oracles.hub import TOKEN, hub

ROOT = Path(__file__).parents[3]
PUSH = """
import json, sys
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoTokenizer
from agents import ReFT
from benchmarks.model_card import main
from policies import Policy
from registry import UsageError
from tests.oracles.finished_runs import finish
from benchmarks.experiment.resolve import resolve

scratch = Path(sys.argv[1])
agent = ReFT("tiny", group_size=2, problems_per_batch=2, sampler="uniform", learning_rate=1e-3, slots=4)
agent.iterate()
said = {"url": agent.push_to_hub("someone/sums", private=True)}
again = Policy.load("someone/sums")
pairs = zip(agent.target.model.state_dict().items(), again.model.state_dict().items(), strict=True)
said["same"] = all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
said["text"] = AutoTokenizer.from_pretrained("someone/sums").decode(agent.envs.unwrapped.task.prompt(0))
said["prompt"] = agent.envs.unwrapped.task.tokenizer.decode(agent.envs.unwrapped.task.prompt(0))
said["card"] = Path(hf_hub_download("someone/sums", "README.md")).read_text()
said["again"] = agent.push_to_hub("someone/sums", card="mine")
try:
    agent.push_to_hub("refused/sums", token="hf_another_secret_token_0123456789")
except UsageError as error:
    said["refused"] = str(error)
try:
    agent.push_to_hub("no//id")
except UsageError as error:
    said["bad"] = str(error)
folder = finish(resolve("reft", settings={"iterations": 4, "evaluation.every": 2, "evaluation.samples": 4}), scratch)
agent.save(folder / "model")
assert main([str(folder), "--push", "someone/run"]) == 0
assert main([str(folder)]) == 0
print("\\n" + json.dumps(said))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process said that pushed to a hub and loaded from it, all its output, the hub, and its folder."""
    scratch = tmp_path_factory.mktemp("pushed")
    with hub() as there:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": there.url, "HF_TOKEN": TOKEN, "HF_HOME": str(scratch / "cache")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", PUSH, str(scratch)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=scratch)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr, there, scratch


def test_what_is_pushed_loads_again(pushed):
    said, _, there, _ = pushed
    assert said["url"] == said["again"] == f"{there.url}/someone/sums"
    assert said["same"] and said["text"] == said["prompt"]
    model = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert set(there.repos["someone/sums"]) == model | {"tokenizer.json", "tokenizer_config.json"}
    assert there.private == {"someone/sums"}
    assert there.repos["someone/sums"]["README.md"] == b"mine"


def test_a_runs_model_has_the_runs_card_and_leaves_the_optimizer_here(pushed):
    _, output, there, scratch = pushed
    files = there.repos["someone/run"]
    assert not {"optimizer.safetensors", "agent.json"} & set(files) and "model.safetensors" in files
    card = files["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    assert (
        yaml.safe_load(head)["library_name"] == "transformers"
        and yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    )
    assert "greedy accuracy on 40 held-out problems: 25.0% [" in text and "] before, 50.0% [" in text
    assert 'from_pretrained("someone/run")' in text and f"{there.url}/someone/run" in output
    (folder,) = (path.parent for path in scratch.glob("*/result.json"))
    assert f'from_pretrained("{folder.name}")' in output  # the card without --push


def test_an_agents_card_says_how_it_was_trained(pushed):
    said, *_ = pushed
    lines = said["card"].splitlines()
    assert {"- agent: ReFT", "- trained from: tiny", "- problems: arithmetic", "- iterations: 1"} <= set(lines)
    assert {"- learning_rate: 0.001", "- group_size: 2", "- sampler: uniform"} <= set(lines)
    assert not [line for line in lines if line.startswith(("- device", "- slots", "- patch", "- seed"))]


def test_a_refusal_is_one_line_with_the_remedy(pushed):
    said, *_ = pushed
    for name in ("refused", "bad"):
        assert "\n" not in said[name] and "hf auth login" in said[name] and "was not pushed to" in said[name]
    assert "401" in said["refused"]


def test_no_token_and_no_path_of_this_machine_leaves_it(pushed):
    _, output, there, scratch = pushed
    assert "secret" not in output
    for files in there.repos.values():
        for content in files.values():
            assert (
                b"secret" not in content and str(scratch).encode() not in content and str(ROOT).encode() not in content
            )


def test_the_base_model_is_named_where_the_hub_knows_it(tmp_path):
    def head(base: str) -> dict[str, Any]:
        return yaml.safe_load(model_card("a/b", base, []).split("---\n")[1])

    assert head("HuggingFaceTB/SmolLM2-135M")["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "base_model" not in head("tiny") and "base_model" not in head(str(tmp_path))
    assert base_name(str(tmp_path / "model")) == "model" and base_name("org/name") == "org/name"


@pytest.mark.parametrize(
    ("file", "content"), [("provenance.json", "{"), ("provenance.json", None), ("metrics.jsonl", "")]
)
def test_the_card_of_a_damaged_run_names_the_file(tmp_path, capsys, file, content):
    folder = finish(resolve("reft", settings={"iterations": 4, "evaluation.every": 2}), tmp_path)
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    assert main([str(folder)]) == 2
    assert file in capsys.readouterr().err
