"""Nested rollouts in verl: what its engine would be sent is a model whose log-probabilities are the nested policy's."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from policies.pretrained.nested_checkpoint import nested_config
from registry import UsageError
from tests.oracles.policy_checkpoints import plain_logp, random_batch, shared_policy

SERVER = "verl.workers.rollout.vllm_rollout"


class Receiver:
    """In place of verl's ``ServerAdapter``: the engine's model, of as many layers as its configuration says."""

    def __init__(self, config: Any, model_config: Any) -> None:
        self.config, self.model_config = config, model_config
        layers = tuple(range(config.engine_kwargs["vllm"]["hf_overrides"]["num_hidden_layers"]))
        self.model = AutoModelForCausalLM.from_config(nested_config(model_config.hf_config, layers))
        self.told: dict[str, Any] = {}

    async def update_weights(self, weights: Any, **others: Any) -> None:
        self.told = others
        for name, weight in weights:
            self.model.get_parameter(name).data.copy_(weight)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter beside a verl that has its registry and a receiver."""
    base: Any = ModuleType("verl.workers.rollout.base")
    base._ROLLOUT_REGISTRY = {("vllm", "async"): f"{SERVER}.ServerAdapter"}
    server: Any = ModuleType(SERVER)
    server.ServerAdapter = Receiver
    for name in ("verl", "verl.workers", "verl.workers.rollout"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["verl.workers.rollout"].base = base  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, SERVER, server)
    yield importlib.import_module("integrations.verl_nested")
    del sys.modules["integrations.verl_nested"]


def adapter(module: Any, kept: int | None = 3, family: str = "llama", **custom: Any) -> Any:
    """As verl makes it: by the name that its registry holds."""
    fqdn = sys.modules["verl.workers.rollout.base"]._ROLLOUT_REGISTRY["vllm", "async"]
    name, kind = fqdn.rsplit(".", 1)
    made = getattr(importlib.import_module(name), kind)
    overrides = {"num_hidden_layers": kept, **custom.pop("overrides", {})}
    rollout = SimpleNamespace(engine_kwargs={"vllm": {"hf_overrides": overrides}}, custom=custom or None, seed=42)
    return made(rollout, SimpleNamespace(hf_config=shared_policy(family).config))


def update(adapter: Any, step: int | None, family: str = "llama", **others: Any) -> None:
    weights = ((name, weight.detach()) for name, weight in shared_policy(family).model.named_parameters())
    asyncio.run(adapter.update_weights(weights, global_steps=step, **others))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_step_has_layers_of_its_own_whose_log_probabilities_are_the_policys(module: Any, family: str) -> None:
    engine, policy, batch = adapter(module, 3, family), shared_policy(family), random_batch()
    drawn = set()
    for step in range(8):
        update(engine, step, family, peft_config=None, base_sync_done=True)
        assert engine.told == {
            "global_steps": step,
            "wire_format": "named_tensors",
            "peft_config": None,
            "base_sync_done": True,
        }
        if engine.layers in drawn:
            continue
        drawn.add(engine.layers)
        with torch.no_grad():
            ours, theirs = policy.logprobs(*batch, layers=engine.layers), plain_logp(engine.model, *batch)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert drawn == {(0, 1, 3), (0, 2, 3)}


def test_a_step_draws_the_same_in_every_process(module: Any) -> None:
    one, other = adapter(module), adapter(module)
    for step in (5, 6, 7):
        update(one, step)
    update(other, 6)
    seen = one._drawn(6)
    assert other.layers == seen and len(seen) == 3
    assert len({one._drawn(step) for step in range(20)}) > 1


class TestRefused:
    def test_layers_that_are_no_model_such_as_the_engines(self, module: Any) -> None:
        engine = adapter(module, 3, skip_sampler={"id": "fixed", "layers": [1, 2]})
        with pytest.raises(UsageError, match=r"keeps layers \(0, 3\), and the engine's model has 3"):
            update(engine, 0)

    def test_windows_in_another_order(self, module: Any) -> None:
        custom = {"skip_sampler": {"id": "fixed", "layers": [0]}}
        with pytest.raises(UsageError, match="windows"):
            update(adapter(module, 3, "gemma3", **custom), 0, "gemma3")
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        engine = adapter(module, 3, "gemma3", overrides={"layer_types": kinds}, **custom)
        assert engine._drawn(0) == (1, 2, 3)

    def test_an_engine_without_a_number_of_layers(self, module: Any) -> None:
        engine = adapter(module)
        engine.config.engine_kwargs = {}
        with pytest.raises(UsageError, match="num_hidden_layers"):
            update(engine, 0)

    def test_adapters_apart_from_the_weights(self, module: Any) -> None:
        with pytest.raises(UsageError, match=r"model\.lora\.merge"):
            update(adapter(module), 0, peft_config=object())

    def test_weights_of_another_process(self, module: Any) -> None:
        async def received() -> Any:
            yield "model.norm.weight", torch.ones(1)

        with pytest.raises(UsageError, match="naive"):
            asyncio.run(adapter(module).update_weights(received(), global_steps=0))

    def test_a_sampler_that_has_to_measure(self, module: Any) -> None:
        with pytest.raises(UsageError, match=r"benchmarks\.divergence"):
            update(adapter(module, skip_sampler="lowest-kl"), 0)

    def test_no_step(self, module: Any) -> None:
        with pytest.raises(UsageError, match="global_steps"):
            update(adapter(module), None)


def test_the_signatures_are_verls(module: Any) -> None:
    """Of the installed verl, read without importing it, which needs vLLM and Ray."""
    ours = inspect.signature(module.NestedUpdates.update_weights).parameters
    for name in ("verl", *[name for name in sys.modules if name.startswith("verl.")]):
        sys.modules.pop(name, None)
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed")
    rooms = Path(spec.origin).parent / "workers" / "rollout"
    tree = ast.parse((rooms / "vllm_rollout" / "vllm_rollout.py").read_text(encoding="utf-8"))
    (server,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerAdapter"]
    (theirs,) = [n for n in server.body if isinstance(n, ast.AsyncFunctionDef) and n.name == "update_weights"]
    assert [one.arg for one in theirs.args.args] == list(ours)[:-1] and theirs.args.kwarg is not None
    text = (rooms / "base.py").read_text(encoding="utf-8")
    assert '("vllm", "async"): "verl.workers.rollout.vllm_rollout.ServerAdapter"' in text
    assert "self.model_config" in text and "self.config" in text
