"""Nested rollouts (arXiv 2508.10123) in TRL's GRPOTrainer: a fresh subset of the model's own layers writes each batch.

    from integrations.trl_nested import nested
    from trl import GRPOTrainer

    nested(GRPOTrainer, ratio=0.15)("Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=..., train_dataset=...).train()

The log-probabilities that tokens were sampled with stand where TRL has those of vLLM, so its own importance sampling
corrects for the skipped layers. ``vllm_importance_sampling_mode="token_truncate"`` is the one to begin with; TRL's
default multiplies a completion by the ratio of all its tokens, which is near 0 for long ones, and drops those above 3.
``vllm_importance_sampling_correction=False`` corrects nothing. The ratios are logged as
``sampling/importance_sampling_ratio``.

With ``use_vllm=True`` the engine holds a model of as many layers as the sampler keeps, and every batch sends it the
weights of another subset. A server's engine (``vllm_mode="server"``) has to be started with such a model, a folder that
``policies.pretrained.nested_checkpoint.save_nested`` writes. Tried with vLLM in the same process on a CPU, where a
model's heads need 32 channels or more; not with a server, nor on a GPU.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from policies import SkipSampler
from policies.pretrained.architecture import read_architecture
from policies.pretrained.load import load_config
from policies.pretrained.nested_checkpoint import (
    keep_layers,
    nested_config,
    nested_weights,
    save_nested,
    whole_layers,
)
from registry import UsageError, skip_samplers

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def nested(trainer: type, sampler: str | SkipSampler = "uniform", **fields: Any) -> type:
    """``trainer`` with completions that a subset of the layers writes; everything else is as it was.

    Args:
        trainer: TRL's ``GRPOTrainer`` or a subclass of it.
        sampler: which layers are kept: an id of ``registry.skip_samplers``, or one made already.
        fields: of the sampler.

    Returns:
        A subclass, to be called as ``trainer`` is. Its attribute ``layers`` is the subset that wrote last. A subset is
        a function of the seed and the step. Completions of an evaluation are by all layers, unless vLLM writes.

    Raises:
        UsageError: no GRPOTrainer, an unknown sampler or field. The subclass raises it for other architectures than
            this project's, a sampler that has to measure first or keeps halves of layers, rollouts that are not TRL's
            own, and weights that are shared out among processes.
    """
    from trl import GRPOTrainer

    if not issubclass(trainer, GRPOTrainer):
        raise UsageError(f"{trainer.__name__} is no GRPOTrainer, whose importance sampling nested rollouts need")
    chosen = skip_samplers.make(sampler, **fields) if isinstance(sampler, str) else sampler
    if not chosen.ready:
        raise UsageError(
            f"{chosen} has to measure the layers first, which it cannot within TRL: find a set by "
            "python -m benchmarks.divergence, and give it to the sampler 'fixed'"
        )
    return type(f"Nested{trainer.__name__}", (NestedRollouts, trainer), {"sampler": chosen})


class NestedRollouts:
    """What ``nested`` puts before a GRPOTrainer."""

    sampler: SkipSampler

    def __init__(self, *arguments: Any, **named: Any) -> None:
        with _engine(self._make_engine):
            super().__init__(*arguments, **named)
        trainer: Any = self
        self.num_layers = read_architecture(trainer.model.config).layers
        self.layers = self._sampled(self.num_layers, 0)
        self._is_engine = trainer.use_vllm
        if self._is_engine:
            return
        if trainer.rollout_func is not None or trainer.use_transformers_continuous_batching:
            raise UsageError(
                "nested rollouts are by transformers' generate or by vLLM: leave rollout_func and "
                "use_transformers_continuous_batching out"
            )
        if trainer._dist.is_zero3 or trainer._dist.is_fsdp:
            raise UsageError("nested rollouts by generate need whole weights in every process: no FSDP, no ZeRO-3")
        if trainer.loss_type == "vespo" and not trainer.vllm_importance_sampling_mode.startswith("token"):
            raise UsageError(
                "the loss 'vespo' takes ratios of tokens: set vllm_importance_sampling_mode='token_truncate'"
            )
        trainer.use_vllm = True  # in TRL's words: completions have log-probabilities of their own

    def _sampled(self, num_layers: int, *key: int) -> tuple[int, ...]:
        return whole_layers(self.sampler.sample(num_layers, np.random.default_rng(key)), num_layers)

    def _make_engine(self, **settings: Any) -> Any:
        """In place of TRL's ``VLLMGeneration(...)``."""
        from trl.generation.vllm_generation import VLLMGeneration

        layers = self._sampled(read_architecture(settings["model"].config).layers, 0)
        return type("NestedVLLMGeneration", (NestedEngine, VLLMGeneration), {})(layers, **settings)

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's, of one batch, by layers drawn for it."""
        trainer: Any = self
        part = trainer._step % trainer.args.gradient_accumulation_steps
        self.layers = self._sampled(self.num_layers, trainer.args.seed, trainer.state.global_step, part)
        if self._is_engine:
            trainer.vllm_generation.take(self.layers)
            trainer._last_loaded_step = -1  # or TRL would not send the weights twice within a step
            return super()._generate(prompts)  # type: ignore[misc]
        if not trainer.model.training:
            self.layers = tuple(range(self.num_layers))
        trainer.use_vllm = False  # who writes is asked here alone
        try:
            return super()._generate(prompts)  # type: ignore[misc]
        finally:
            trainer.use_vllm = True

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> tuple[list[list[int]], list[list[float]]]:
        """TRL's completions, and the log-probabilities that their tokens were drawn with."""
        trainer: Any = self
        if self._is_engine:
            return super()._generate_single_turn(*arguments, **named)  # type: ignore[misc]
        drawn = DrawnLogps()
        with keep_layers(trainer.model, self.layers), drawn.kept_of(trainer.model):
            completions, _ = super()._generate_single_turn(*arguments, **named)  # type: ignore[misc]
        trainer._metrics["train" if trainer.model.training else "eval"]["nested/layers_kept"].append(len(self.layers))
        return completions, drawn.of(completions)


class DrawnLogps(LogitsProcessor):
    """Keeps the log-probability of each token that transformers' ``generate`` draws, as it was drawn: after the
    temperature, top-k and whatever else changes scores."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []  # [B, 1] each, of all tokens but the last
        self._last: Tensor | None = None  # [B, V], of the token drawn last

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self._before.append(self._last.gather(1, input_ids[:, -1:]))
        self._last = scores.log_softmax(-1)
        return scores

    @contextmanager
    def kept_of(self, model: Any) -> Iterator[None]:
        """Be the last of the processors that ``generate`` makes; those that it is given come before its own."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        make = base._get_logits_processor

        def with_this(*arguments: Any, **named: Any) -> Any:
            processors = make(*arguments, **named)
            processors.append(self)
            return processors

        base._get_logits_processor = with_this
        try:
            yield
        finally:
            del base._get_logits_processor

    def of(self, completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of B completions, which may end before the longest."""
        assert self._last is not None
        longest = max(map(len, completions))
        final = torch.tensor([[ids[-1] if len(ids) == longest else 0] for ids in completions])
        logps = [*self._before, self._last.gather(1, final.to(self._last.device))]
        rows = torch.cat(logps[:longest], 1).tolist()
        return [row[: len(ids)] for row, ids in zip(rows, completions, strict=True)]


class NestedEngine:
    """What is put before TRL's ``VLLMGeneration``: an engine whose model has the K layers that are kept.

    Args:
        layers: those at first.
        settings: of ``VLLMGeneration``.
    """

    def __init__(self, layers: tuple[int, ...], **settings: Any) -> None:
        self.layers = layers
        super().__init__(**settings)

    def take(self, layers: tuple[int, ...]) -> None:
        """Send these layers at the next synchronisation. Raises ``UsageError`` where the engine's model is of other
        shapes than theirs."""
        engine: Any = self
        there, wanted = (nested_config(engine.model.config, one).to_dict() for one in (self.layers, layers))
        if there != wanted:
            raise UsageError(
                f"vLLM's model was made for layers {self.layers}, and {layers} are of another number or kind: take "
                "a sampler that always keeps as many, with the same windows in the same order, or 'fixed'"
            )
        self.layers = layers

    def _init_vllm(self) -> None:
        """TRL's, of a folder that holds the nested model; a server has its own."""
        engine: Any = self
        if engine.mode == "server":
            return super()._init_vllm()  # type: ignore[misc]
        model, name = engine.model, engine.model.name_or_path
        config = load_config(name)  # the folder's own has the dtype that vLLM takes, which the trainer's may not
        if self._head_is_apart:
            config.tie_word_embeddings = False
        with tempfile.TemporaryDirectory(prefix="nested-") as folder:
            save_nested(config, self._all_params(), self.layers, folder)
            engine.processing_class.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            model.name_or_path = folder
            try:
                super()._init_vllm()  # type: ignore[misc]
            finally:
                model.name_or_path = name

    def sync_weights(self) -> None:
        """TRL's. What a CPU's kernels read is packed, and vLLM's reload alone packs it again."""
        engine: Any = self
        if not self._is_packed:
            return super().sync_weights()  # type: ignore[misc]
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._iter_named_params()})
        if not engine.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the old weights cannot be emptied")

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        return nested_weights(self._all_params(), self.layers)

    def _all_params(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in super()._iter_named_params():  # type: ignore[misc]
            yield name, weight
            if name == EMBEDDING and self._head_is_apart:
                yield HEAD, weight.clone()

    @property
    def _is_packed(self) -> bool:
        """Whether the engine is in this process, on a CPU."""
        from vllm.platforms import current_platform

        engine: Any = self
        return engine.mode == "colocate" and current_platform.is_cpu()

    @property
    def _head_is_apart(self) -> bool:
        """Whether a head that is the embedding is another tensor in the engine: a reload packs no tied one again."""
        engine: Any = self
        return engine.model.config.tie_word_embeddings and self._is_packed


@contextmanager
def _engine(make: Any) -> Iterator[None]:
    """Within the context GRPOTrainer makes its vLLM engine by ``make``."""
    module: Any = importlib.import_module("trl.trainer.grpo_trainer")
    theirs = module.VLLMGeneration
    module.VLLMGeneration = make
    try:
        yield
    finally:
        module.VLLMGeneration = theirs
