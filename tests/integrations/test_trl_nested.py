"""Nested rollouts in TRL's own trainer, held against the policy's log-probabilities of the same weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from envs.codec import load_tokenizer
from integrations.trl import problem_rows
from policies import Policy
from policies.pretrained.load import BUILT_IN
from registry import UsageError

trl = pytest.importorskip("trl")
from integrations.trl_nested import NestedEngine, nested  # noqa: E402 (needs trl)

TINY = str(BUILT_IN["tiny"])
STEPS = 2


class Batches(TrainerCallback):
    """What TRL trained on, step by step, and the weights before each step."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.layers: list[tuple[int, ...]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append({name: weight.detach().clone() for name, weight in model.state_dict().items()})


def train(kind: type, folder: Any, model: str = TINY, **settings: Any) -> tuple[Any, Batches]:
    """A trainer of ``kind`` after ``STEPS`` steps, rewarded by whether a completion is of even length."""
    batches = Batches()
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 10,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1e9,
        **settings,
    }
    trainer = kind(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl.GRPOConfig(output_dir=str(folder), **arguments),
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 2) for ids in completion_ids],
        train_dataset=problem_rows("arithmetic", limit=16),
        processing_class=copy.deepcopy(load_tokenizer("builtin")),
        callbacks=[batches],
    )
    compute = trainer._compute_loss

    def recorded(model: Any, inputs: dict[str, Any]) -> Any:
        batches.inputs.append(inputs)
        batches.layers.append(getattr(trainer, "layers", ()))
        return compute(model, inputs)

    trainer._compute_loss = recorded
    trainer.train()
    return trainer, batches


def expected_ratios(batches: Batches, step: int, temperature: float = 1.0, model: str = TINY) -> tuple[Tensor, Tensor]:
    """exp(log pi - log mu) [B, T] by the policy, and the mask of the completions' tokens."""
    inputs = batches.inputs[step]
    policy = Policy.load(model, dtype="float32")
    policy.model.load_state_dict(batches.weights[step])
    policy.refresh()
    prompts = [ids[mask.bool()] for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
    batch = (prompts, inputs["completion_ids"], inputs["completion_mask"].bool())
    with torch.no_grad():
        pi = policy.logprobs(*batch, temperature=temperature)
        mu = policy.logprobs(*batch, layers=batches.layers[step], temperature=temperature)
    return (pi - mu).exp(), batch[2]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_ratios_are_the_policys_and_every_batch_has_layers_of_its_own(temperature: float, tmp_path: Any) -> None:
    trainer, batches = train(nested(trl.GRPOTrainer, ratio=0.25), tmp_path, temperature=temperature)
    assert len(set(batches.layers)) == STEPS and all(len(layers) == 9 for layers in batches.layers)
    for step in range(STEPS):
        ratios, mask = expected_ratios(batches, step, temperature)
        recorded = batches.inputs[step]["importance_sampling_ratio"]
        torch.testing.assert_close(recorded[mask], ratios[mask], atol=0, rtol=1e-3)
        assert (ratios[mask] - 1).abs().max() > 0.1
    logged = trainer.state.log_history
    assert [one["nested/layers_kept"] for one in logged[:STEPS]] == [9.0] * STEPS
    assert logged[0]["sampling/importance_sampling_ratio/max"] > 1.1
    assert len(trainer.model.model.layers) == trainer.model.config.num_hidden_layers == 12


def test_the_log_probabilities_are_those_after_top_k(tmp_path: Any) -> None:
    """With three tokens to draw from, log mu is normalised over these."""
    _, batches = train(nested(trl.GRPOTrainer, "fixed", layers=(5, 6)), tmp_path, top_k=1, max_steps=1)
    inputs = batches.inputs[0]
    mask = inputs["completion_mask"].bool()
    assert inputs["sampling_per_token_logps"][mask].abs().max() < 1e-6


def test_without_a_skip_ratios_are_one_and_the_numbers_are_trls(tmp_path: Any) -> None:
    plain, _ = train(trl.GRPOTrainer, tmp_path / "plain")
    whole, batches = train(nested(trl.GRPOTrainer, "full"), tmp_path / "nested")
    for inputs in batches.inputs:
        ratio = inputs["importance_sampling_ratio"]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
    for theirs, ours in zip(plain.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)  # of the 2e-3 that two steps move
    told = [[one[name] for one in t.state.log_history[:STEPS]] for t in (plain, whole) for name in ("loss", "reward")]
    assert told[0] == pytest.approx(told[2], abs=1e-5) and told[1] == told[3]


def test_equal_seeds_draw_equal_layers(tmp_path: Any) -> None:
    kind = nested(trl.GRPOTrainer, ratio=0.25)
    drawn = [train(kind, tmp_path / str(n), seed=seed)[1].layers for n, seed in enumerate((3, 3, 4))]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_evaluation_is_by_all_layers_and_an_error_leaves_the_model_whole(tmp_path: Any) -> None:
    trainer, _ = train(nested(trl.GRPOTrainer, ratio=0.25), tmp_path, max_steps=1)
    before = trainer.layers
    trainer.evaluate(problem_rows("arithmetic", limit=8))
    assert trainer.layers == tuple(range(12)) != before
    layers = list(trainer.model.model.layers)

    def broken(*_: Any, **__: Any) -> Any:
        assert len(trainer.model.model.layers) == 9
        raise ZeroDivisionError

    trainer.model.train()
    trainer.model.generate = broken
    with pytest.raises(ZeroDivisionError):
        trainer._generate(["1 + 1"] * 4)
    assert list(trainer.model.model.layers) == layers and trainer.model.config.num_hidden_layers == 12
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(12))
    assert "_get_logits_processor" not in vars(trainer.model)


class FakeLLM:
    """vLLM as TRL uses it: a folder at first, then weights by name; drawn by transformers, a prompt at a time."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.at_first = {name: weight.clone() for name, weight in self.model.named_parameters()}
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(
                driver_worker=SimpleNamespace(
                    model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
                )
            )
        )

    def load(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.model.get_parameter(name).data.copy_(weight)

    def reset_prefix_cache(self) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, Any]], sampling_params: dict[str, Any], use_tqdm: bool) -> list[Any]:
        outputs = []
        for prompt in prompts:
            ids, drawn, logps = list(prompt["prompt_token_ids"]), [], []
            while len(drawn) < sampling_params["max_tokens"] and (not drawn or drawn[-1] != 1):
                logp = self.model(torch.tensor([ids + drawn])).logits[0, -1].log_softmax(-1)
                token = int(logp.exp().multinomial(1))
                drawn.append(token)
                logps.append({token: SimpleNamespace(logprob=float(logp[token]), rank=1)})
            output = SimpleNamespace(token_ids=drawn, logprobs=logps)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return outputs


class TestVLLM:
    """TRL's own code of the vLLM path as it is on a GPU, around an engine of another kind."""

    @pytest.fixture
    def engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import trl.generation.vllm_generation as module

        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")  # TRL sets them, and they go when the test is over
            monkeypatch.delenv(name)
        monkeypatch.setattr(NestedEngine, "_is_packed", False)
        monkeypatch.setattr(module, "is_vllm_available", lambda *_: True)
        monkeypatch.setattr(module, "LLM", FakeLLM, raising=False)
        monkeypatch.setattr(module, "SamplingParams", dict, raising=False)

    def test_every_batch_is_by_other_layers_of_the_present_weights(self, engine: None, tmp_path: Any) -> None:
        kind = nested(trl.GRPOTrainer, ratio=0.25)
        trainer, batches = train(kind, tmp_path, use_vllm=True, vllm_mode="colocate")
        assert len(set(batches.layers)) == STEPS
        for step in range(STEPS):
            ratios, mask = expected_ratios(batches, step)
            recorded = batches.inputs[step]["importance_sampling_ratio"]
            torch.testing.assert_close(recorded[mask], ratios[mask], atol=0, rtol=1e-3)
            assert (ratios[mask] - 1).abs().max() > 0.1
        assert trainer.vllm_generation.llm.model.config.num_hidden_layers == 9
        assert trainer.model.name_or_path == TINY

    def test_the_engine_begins_with_real_weights(self, engine: None, tmp_path: Any) -> None:
        kind = nested(trl.GRPOTrainer, "fixed", layers=(4, 5))
        trainer, batches = train(kind, tmp_path, use_vllm=True, vllm_mode="colocate", max_steps=1)
        begun, before = trainer.vllm_generation.llm.at_first, batches.weights[0]
        assert begun["model.layers.4.mlp.up_proj.weight"].equal(before["model.layers.6.mlp.up_proj.weight"])
        assert begun["model.norm.weight"].equal(before["model.norm.weight"])

    def test_a_subset_of_another_size_is_refused(self, engine: None, tmp_path: Any) -> None:
        kind = nested(trl.GRPOTrainer, "fixed", layers=(4, 5))
        trainer, _ = train(kind, tmp_path, use_vllm=True, vllm_mode="colocate", max_steps=1)
        with pytest.raises(UsageError, match="another number or kind"):
            trainer.vllm_generation.take(tuple(range(11)))


@pytest.fixture
def six_layers(tmp_path: Any) -> str:
    """With heads of 32 channels, the least that vLLM's kernels for a CPU take."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 6}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, initializer_range=0.1, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.vllm
def test_vllm_writes_every_batch_by_other_layers_of_the_present_weights(
    six_layers: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM itself, which takes this model in bfloat16 and whose process holds one engine."""
    pytest.importorskip("vllm", reason="vLLM is not in this environment")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets them, and they go when the test is over
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = {"vllm_mode": "colocate", "vllm_max_model_length": 128, "vllm_gpu_memory_utilization": 0.1}
    kind = nested(trl.GRPOTrainer, ratio=1 / 3)
    trainer, batches = train(kind, tmp_path, six_layers, use_vllm=True, max_steps=3, learning_rate=0.02, **engine)
    assert len(set(batches.layers)) > 1 and all(len(layers) == 4 for layers in batches.layers)
    for step in range(3):
        ratios, mask = expected_ratios(batches, step, model=six_layers)
        recorded = batches.inputs[step]["importance_sampling_ratio"]
        told, wanted = recorded[mask].log(), ratios[mask].log()
        assert (told - wanted).square().mean() < 0.02**2 < 0.2**2 < wanted.square().mean()
    assert trainer.vllm_generation.llm.model_config.hf_config.num_hidden_layers == 4
    assert trainer.model.name_or_path == six_layers
    with pytest.raises(UsageError, match="another number or kind"):
        trainer.vllm_generation.take(tuple(range(5)))


class TestRefused:
    def test_what_is_no_grpo_trainer(self) -> None:
        with pytest.raises(UsageError, match="no GRPOTrainer"):
            nested(trl.SFTTrainer)

    def test_a_sampler_that_has_to_measure(self) -> None:
        with pytest.raises(UsageError, match=r"benchmarks\.divergence"):
            nested(trl.GRPOTrainer, "lowest-kl")

    def test_an_unknown_field(self) -> None:
        with pytest.raises(UsageError, match="ratio"):
            nested(trl.GRPOTrainer, "uniform", rato=0.2)

    def test_a_rollout_function(self, tmp_path: Any) -> None:
        with pytest.raises(UsageError, match="rollout_func"):
            nested(trl.GRPOTrainer)(
                TINY,
                args=trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                train_dataset=problem_rows("arithmetic", limit=2),
                rollout_func=lambda prompts, trainer: {},
            )
