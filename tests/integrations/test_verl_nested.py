"""Nested rollouts in verl: what its engine would be sent is a model whose log-probabilities are the nested policy's."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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


VERL = """
import asyncio, importlib, json, sys
from types import SimpleNamespace
import ray, torch
from transformers import AutoModelForCausalLM
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import get_rollout_class

FOLDER, KEPT, STEPS = sys.argv[1], 4, 6

def compute_on_cpu():
    idle = SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None)
    class OnCPU(PlatformCUDA):
        device_name = "cpu"
        @property
        def device_module(self):
            return idle
        def is_ipc_supported(self):
            return False
    set_platform(OnCPU())

@ray.remote
class Server:
    def __init__(self, handle):
        from policies.pretrained.nested_checkpoint import nested_config
        compute_on_cpu()
        whole = AutoModelForCausalLM.from_pretrained(FOLDER)
        self.model = AutoModelForCausalLM.from_config(nested_config(whole.config, tuple(range(KEPT))))
        self.handle, self.told = handle, []
    def collective_rpc(self, method, timeout, args, kwargs):
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
        self.told.append(method)
        receiver = BucketedWeightReceiver(self.handle, torch.device("cpu"), use_shm=kwargs["use_shm"])
        receiver.receive_weights(lambda weights, is_last: self.model.load_state_dict(dict(weights), strict=False))
    def clear_kv_cache(self):
        self.told.append("clear_kv_cache")
    def set_global_steps(self, step):
        self.told.append(step)
    def state(self):
        return self.model.state_dict(), self.told

compute_on_cpu()
importlib.import_module("integrations.verl_nested")
overrides = {"vllm": {"hf_overrides": {"num_hidden_layers": KEPT}}}
kind = get_rollout_class("vllm", "async")
ray.init(num_cpus=1, include_dashboard=False)
rollout, of = RolloutConfig(name="vllm", engine_kwargs=overrides), HFModelConfig(path=FOLDER, load_tokenizer=False)
adapter = kind(rollout, of, None)
server = Server.options(name="vllm_server_0_0").remote(adapter.zmq_handle)
ray.get(server.state.remote())  # it is there
model = AutoModelForCausalLM.from_pretrained(FOLDER)
done = []
for step in range(STEPS):
    for weight in model.parameters():
        weight.data.add_(0.01)
    asyncio.run(adapter.update_weights(((n, w.data) for n, w in model.named_parameters()), global_steps=step))
    there, told = ray.get(server.state.remote())
    here = model.state_dict()
    kept = {f"model.layers.{n}.": f"model.layers.{layer}." for n, layer in enumerate(adapter.layers)}
    sent = {name: next((name.replace(a, b) for a, b in kept.items() if name.startswith(a)), name) for name in there}
    equal = all(torch.equal(there[name], here[of]) for name, of in sent.items())
    done.append({"layers": adapter.layers, "equal": equal, "told": told})
print(json.dumps(done))
"""


@pytest.mark.vllm
def test_verls_own_adapter_sends_what_its_engine_needs(tmp_path: Path) -> None:
    """verl's registry, configuration, adapter and transfer, on a platform of a CPU; its engine is a transformers model
    in a Ray actor that bears the name of verl's server."""
    pytest.importorskip("verl.workers.rollout.vllm_rollout", reason="verl with vLLM is not in this environment")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 6}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, tie_word_embeddings=True, **shape)).save_pretrained(tmp_path)
    variables = {
        **os.environ,
        "RANK": "0",
        "RAY_LOCAL_WORLD_SIZE": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    command = [sys.executable, "-W", "ignore", "-c", VERL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout.splitlines()[-1])
    assert all(one["equal"] and len(one["layers"]) == 4 for one in steps)
    assert len({tuple(one["layers"]) for one in steps}) > 1
    assert [one["told"][-2:] for one in steps] == [["clear_kv_cache", step] for step in range(len(steps))]


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
