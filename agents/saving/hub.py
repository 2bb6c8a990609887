"""A trained model on the Hugging Face hub: weights, tokenizer and a model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agents.saving.checkpoint import BESIDE_MODEL
from agents.saving.configuration import stored_arguments
from policies.sharding import leads
from registry import UsageError, fields_of

MACHINE = {"tensorboard_log", "verbose", "device", "slots"}  # arguments that say nothing of the model
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push(
    agent: Any, repo_id: str, private: bool | None, token: str | None, commit_message: str, card: str | None
) -> str:
    """Upload an agent's model; returns where it is. See ``SavesFolders.push_to_hub``."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        agent.target.save(folder)
        if agent.target.sharded and not leads():
            return repo_id
        agent.envs.unwrapped.task.codec.save(folder)
        return upload(folder, repo_id, card or agent_card(agent, repo_id), private, token, commit_message)


def upload(folder: Path, repo_id: str, card: str, private: bool | None, token: str | None, commit_message: str) -> str:
    """Make the repository if there is none, and commit the model of a saved folder to it with ``card`` as its README;
    returns where it is.

    Raises:
        UsageError: the hub refuses or cannot be reached; of one line, without the token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (*BESIDE_MODEL, "README.md")
    ]
    adds = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    adds.append(CommitOperationAdd("README.md", card.encode("utf-8", "backslashreplace")))
    api = HfApi(token=token)
    try:
        place = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(place.repo_id, adds, commit_message=commit_message)
    except Exception as error:  # of several libraries: what the hub says, its client, or the network
        said = (str(error).strip() or type(error).__name__).split("\n")[0]
        said = said.replace(token, "***") if token else said
        remedy = "run 'hf auth login', or pass a token that may write there, and look whether the hub can be reached"
        raise UsageError(f"the model was not pushed to {repo_id!r}: {said}; {remedy}") from None
    return str(place)


def agent_card(agent: Any, repo_id: str) -> str:
    """A model card of what the agent was trained from, on and how."""
    given = agent._given_policy
    base = given if isinstance(given, str) else "a policy"
    arguments, left_out = stored_arguments(agent)
    kind: Any = type(agent)
    defaults = {name: str(field.default) for name, field in fields_of(kind).items()}
    settings = {
        name: _setting(value) for name, value in sorted({**arguments, **left_out}.items()) if name not in MACHINE
    }
    spec = agent.envs.unwrapped.task.spec
    facts = [
        ("agent", kind.__name__),
        ("trained from", base_name(base)),
        ("problems", base_name(str(spec.problems))),
        ("template", spec.template),
        ("iterations", str(agent.iteration)),
        ("tokens", str(agent.num_timesteps)),
        *((name, text) for name, text in settings.items() if text != defaults.get(name)),
    ]
    if "rollout_accuracy" in agent.metrics:
        facts.append(("accuracy of the last iteration's rollouts", f"{agent.metrics['rollout_accuracy']:.1%}"))
    return model_card(repo_id, base, facts)


def model_card(repo_id: str, base: str, facts: Iterable[tuple[str, str]]) -> str:
    """README.md of a model: the hub's metadata, what is known of it, and how it is loaded."""
    from huggingface_hub import ModelCardData

    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        tags=["reinforcement-learning", "nested-reft"],
    )
    listed = "\n".join(f"- {name}: {value}" for name, value in facts)
    return f"""---
{about.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

A language model trained by reinforced fine-tuning with verifiable rewards (Nested-ReFT,
[arXiv 2508.10123](https://arxiv.org/abs/2508.10123)).

{listed}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```
"""


def base_name(name: str) -> str:
    """A hub id or a registered name as it is; of a path of this machine its last part."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def _setting(value: Any) -> str:
    """A component as ``id(field=value)``, anything else as text."""
    if not isinstance(value, dict):
        return str(value)
    fields = ", ".join(f"{name}={one}" for name, one in value.items() if name != "id")
    return f"{value.get('id', '')}({fields})" if fields else str(value.get("id", ""))
