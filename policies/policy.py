"""The target policy: a Hugging Face CausalLM, its nested behaviours, and its log-probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policies.dtype import available_device, compute_dtype, settle_dtype
from policies.engine.ahead import Ahead
from policies.engine.behavior import Behavior
from policies.engine.decoder import CachedDecoder, Clock, UncachedDecoder
from policies.engine.drafts import Drafter, LayerDrafts, Proposes, StoredDrafts
from policies.engine.sampling import SamplingSpec
from policies.model.head import TrainableHead
from policies.model.int8 import Int8Head, Int8Linear
from policies.model.layers import GATES, LayerWeights, kept_weights, rms_norm, rotary_table
from policies.model.nested_model import NestedModel
from policies.model.packing import micro_batches, pack
from policies.model.scoring import score_hidden
from policies.model.weights import RolloutHead, RolloutLinear, RolloutWeights, changed_trainable, trainable_layers
from policies.nested import (
    LayerSubset,
    Nested,
    PatchedSubset,
    changes_of,
    check_subset,
    is_int8,
    layers_of,
    layers_skipped,
)
from policies.pretrained.adapters import (
    adapter_state_dict,
    add_adapters,
    factors,
    load_adapter_state_dict,
    merged_copy,
)
from policies.pretrained.architecture import read_architecture
from policies.pretrained.load import check_finite, load_checkpoint, state_dtype
from policies.pretrained.reference import scored_states
from policies.pretrained.selfcheck import agrees
from policies.sharding import leads, most, split_matrices, whole_copy, whole_shape
from registry import UsageError

_AHEAD = 16  # decode steps between two reads of a GPU, at most; on a CPU there is nothing to wait for
_version = attrgetter("_version")
# (prompt, tokens, mask): what a process computes where others have more to do, since gathering a weight takes all.
_ONE_TOKEN = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool()


class Policy:
    """A trainable language model (float32 weights) and everything that rollouts and updates compute with it.

    Attributes:
        model: the transformers CausalLM; its parameters are what an optimizer steps. Its module list is never altered.
        config: the model's config.
        version: counts ``refresh`` calls; a behaviour is valid for one version.
        token_limit: most tokens of one forward inside ``logprobs``.
        temperature: of the policy's distribution. Rollouts are sampled from it and log-probabilities are of it, so both
            sides of a ratio agree; ``behavior`` and ``logprobs`` take another one where a caller asks for it.
        gradient_checkpointing: the backward keeps only each layer's input and computes the layer again
            (arXiv 1604.06174): less memory, more time. Only of a functional policy.
        functional: whether the project's own layers are used (they agreed at load), or else transformers'.

    >>> policy = Policy.load("tiny")
    >>> policy.num_layers, policy.vocab_size
    (12, 512)
    >>> prompt, completion = torch.tensor([17, 4, 200]), torch.tensor([[9, 31]])
    >>> logp = policy.logprobs([prompt], completion, torch.ones(1, 2, dtype=torch.bool))  # of all layers, with gradient
    >>> nested = policy.logprobs([prompt], completion, torch.ones(1, 2, dtype=torch.bool), layers=(0, 1, 2, 4, 10, 11))
    >>> bool((logp != nested).all())
    True
    """

    def __init__(
        self, model: Any, dtype: str | None = None, token_limit: int = 8192, gradient_checkpointing: bool = False
    ) -> None:
        self.model = model
        self.config = model.config
        self.architecture = read_architecture(model.config)
        self.token_limit = token_limit
        self.temperature = 1.0
        self.gradient_checkpointing = gradient_checkpointing
        self.version = 0
        self._rollout_weights: dict[bool, RolloutWeights] = {}  # by whether they are bytes
        self._tables: tuple[Tensor, Tensor] | None = None
        self._parameters = tuple(model.parameters())  # walking the modules at every token would cost as much as a layer
        self._stamp = self._weights_stamp()
        check_finite(model)
        self._use(torch.float32)
        self.functional = True
        difference = self._difference()
        self.functional = not difference
        self._use(torch.float32 if difference else compute_dtype(dtype))  # transformers' layers have the weights' own
        if difference:
            warnings.warn(
                f"the functional layers do not reproduce this checkpoint's transformers forward ({difference}): "
                "falling back to transformers' layers without KV slots, in float32: correct, but many times slower",
                stacklevel=2,
            )

    def _difference(self) -> str:
        """What keeps the project's layers from being this checkpoint's; ``""`` where they are."""
        if not self.architecture.static_rope:
            return "its rotary table depends on the length of a sequence"
        if self.architecture.gate not in GATES:
            return f"its activation {self.architecture.gate!r} is not among {', '.join(GATES)}"
        try:
            return "" if agrees(self.model, self.architecture, self.logprobs) else "other numbers"
        except UsageError:
            raise
        except Exception as error:  # a shape or a part that no supported family has
            return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:120]}"

    def check_functional(self, what: str) -> None:
        """Raise ``UsageError`` if the policy is on transformers' own layers, for ``what`` they do not take."""
        if not self.functional:
            raise UsageError(
                "this checkpoint runs on transformers' own layers (the project's do not reproduce it), which take no "
                f"{what}: use patch='none' and leave rollout_dtype out"
            )

    def check_length(self, longest: int, warn: bool = True) -> None:
        """``Architecture.check_length`` of the policy's."""
        self.architecture.check_length(longest, warn)

    @classmethod
    def load(cls, name_or_path: str, device: str = "cpu", dtype: str | None = "auto") -> Policy:
        """A policy from a local folder, a hub id or the built-in name ``tiny``.

        Args:
            name_or_path: of a Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 or Gemma 3 checkpoint in safetensors.
            device: such as ``cpu`` or ``cuda``.
            dtype: of the matrix products, ``float32``, ``bfloat16`` or, as by default, the one that is fast on
                ``device`` (``auto``: ``settle_dtype``, which says it once; the built-in model stays in float32). The
                weights stay float32.

        Raises:
            UsageError: no such folder, hub unreachable, unsupported architecture, unknown dtype or device.
        """
        chosen, target = settle_dtype(dtype, name_or_path, device), available_device(device)
        return cls(load_checkpoint(name_or_path, compute_dtype(chosen)).to(target), chosen)

    @property
    def num_layers(self) -> int:
        """L, the layers of the full model."""
        return self.architecture.layers

    def layers_skipped(self, layers: LayerSubset) -> float:
        """How many of the L layers ``layers`` leaves out, by weight: halves of layers count as fractions."""
        return layers_skipped(layers, self.num_layers, self.architecture.attention_share)

    @property
    def vocab_size(self) -> int:
        """V, the logits' dimension (a tokenizer may have fewer entries)."""
        return self.architecture.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.lm_head.weight.device

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The trainable weights."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def shard(self, device: str = "cpu") -> None:
        """Of every matrix keep this process's part alone, on ``device``; call in all processes of a run, before making
        an optimizer. Updates then gather each map while it is used (``policies.sharding``), rollouts the whole in the
        compute dtype until the next update begins. The other processes must call what computes, and ``save``, too.

        Raises:
            UsageError: the policy is on transformers' own layers.
        """
        if not self.functional:
            raise UsageError(
                "this checkpoint runs on transformers' own layers (the project's do not reproduce it), which take no "
                "parts of weights: leave shard out"
            )
        split_matrices(self.model, torch.device(device))
        self._parameters = tuple(self.model.parameters())
        self._use(self.dtype)
        self._tables, self._rollout_weights = None, {}
        self.refresh()

    @property
    def sharded(self) -> bool:
        """Whether this process has a part of every matrix only."""
        return whole_shape(self.model.lm_head.weight) is not None

    def save(self, folder: str | Path) -> None:
        """Write config and weights as a Hugging Face folder that ``from_pretrained`` takes: weights in float32, and in
        the config the dtype that they were multiplied in. Of a sharded policy the first process writes, from its host's
        memory."""
        model: Any = whole_copy(self.model) if self.sharded else self.model
        if self.sharded and not leads():
            return
        model = merged_copy(model) if self.adapter_rank else model
        model.save_pretrained(folder)
        state_dtype(Path(folder), self.dtype)

    @property
    def adapter_rank(self) -> int:
        """The rank of the low-rank adapters that are trained; 0 where the weights themselves are."""
        adapters = (factors(block.self_attn.q_proj) for block in self.model.model.layers)
        return max(0 if adapter is None else len(adapter[0]) for adapter in adapters)

    @property
    def trained_layers(self) -> LayerSubset:
        """The layers of which something is trained."""
        blocks = enumerate(self.model.model.layers)
        return tuple(number for number, block in blocks if any(one.requires_grad for one in block.parameters()))

    def train_only(self, layers: Sequence[int]) -> None:
        """Train the weights of ``layers`` alone and freeze all others, head and embedding among them: call before
        making an optimizer. A backward ends at the lowest of them."""
        chosen = numbered_layers(layers, self.num_layers)
        self.model.requires_grad_(False)
        for number in chosen:
            self.model.model.layers[number].requires_grad_(True)

    def add_adapters(self, rank: int = 16, alpha: int = 32, seed: int = 0, layers: Sequence[int] | None = None) -> None:
        """Train low-rank adapters of all projections (LoRA) instead of the weights, or of those of ``layers`` alone:
        call before making an optimizer. ``seed`` is of their first factor; the second starts at zero.

        Rollouts use the merged weights of the last ``refresh``; ``save`` writes merged weights. Needs the package peft.
        """
        chosen = range(self.num_layers) if layers is None else numbered_layers(layers, self.num_layers)
        add_adapters(self.model, rank, alpha, seed, chosen)
        self._parameters = tuple(self.model.parameters())
        self._use(self.dtype)
        self._rollout_weights = {}
        self.refresh()

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What merged weights do not tell: the adapters' factors and the weights under them, by projection."""
        return adapter_state_dict(self.model)

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``adapter_state_dict``'s tensors, in place; adapters of the same rank must be there."""
        load_adapter_state_dict(self.model, state)
        self.refresh()

    def refresh(self) -> None:
        """Call after optimizer steps: rollouts use the new weights, behaviours made before refuse to act."""
        self.version += 1
        self._stamp = self._weights_stamp()

    def behavior(
        self,
        layers: Nested,
        slots: int,
        max_length: int,
        temperature: float | None = None,
        seed: int = 0,
        clock: Clock | None = None,
        *,
        stored: StoredDrafts | None = None,
        drafter: Drafter | None = None,
    ) -> Behavior:
        """The behaviour policy of the same weights through ``layers`` only.

        Args:
            layers: what is kept, in order: indices of layers, or half layers such as ``"7.attention"`` and ``"7.mlp"``;
                or a ``PatchedSubset``.
            slots: S, how many episodes it writes at a time.
            max_length: the longest prefix (prompt and completion) in tokens.
            temperature: the policy's own by default; 0 is greedy.
            seed: of what it draws.
            clock: measures layers and head apart (``engine.decoder``).
            stored: completions that may come again, by episode (``engine.drafts``).
            drafter: drafts tokens where few slots are live; has KV slots of its own.

        Raises:
            UsageError: layers, slots or length that cannot be.
            RuntimeError: the weights changed after the last ``refresh``.
        """
        nested = self._checked(layers)
        sampling = SamplingSpec(self.temperature if temperature is None else temperature, seed)
        if slots < 1 or max_length < 1:
            raise UsageError(f"slots={slots} and max_length={max_length} must both be at least 1")
        self.check_length(max_length, warn=False)
        self._require_fresh()
        decoder = self._decoder(nested, slots, max_length, clock)
        ahead = None
        if isinstance(decoder, CachedDecoder) and self.device.type == "cuda":
            ahead = Ahead(decoder, slots, sampling, _AHEAD)
        proposers: list[Proposes] = [] if stored is None else [stored]
        if drafter is not None:
            few = self._decoder(self._checked(drafter.layers), slots, max_length)
            proposers.append(LayerDrafts(few, slots, sampling, drafter))
        made = self.version

        def current() -> None:
            self._require_fresh()
            if made != self.version:
                raise RuntimeError(
                    f"this behaviour was made for weight version {made}, but the policy is at {self.version}: "
                    "make a new one with policy.behavior"
                )

        return Behavior(decoder, layers_of(nested), slots, sampling, current, ahead, proposers)

    def _decoder(
        self, nested: Nested, slots: int, longest: int, clock: Clock | None = None
    ) -> CachedDecoder | UncachedDecoder:
        if self.functional:
            return CachedDecoder(self.rollout_model(nested, longest), slots, clock)
        return UncachedDecoder(self.model, self.architecture, layers_of(nested), longest)

    def logprobs(
        self,
        prompts: Sequence[Tensor],
        tokens: Tensor,
        mask: Tensor,
        layers: Nested | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """log pi of each completion token, with gradient to the weights.

        Args:
            prompts: B one-dimensional int64 tensors, none empty; the same object for completions that share a prompt,
                which is then computed once.
            tokens: [B, T] int64.
            mask: [B, T] bool, the tokens to score; the others are read only if a scored one follows them.
            layers: score under this (patched) subset instead of all layers.
            temperature: the policy's own by default; positive.

        Returns:
            [B, T] float32, 0 where ``mask`` is false.
        """
        return self._scores(prompts, tokens, mask, layers, temperature)

    def logprobs_and_entropies(self, prompts: Sequence[Tensor], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``logprobs`` of all layers, and the entropy in nats of the distribution that each token was chosen from: both
        [B, T] float32 with gradients to the weights, 0 where ``mask`` is false. Slower than ``logprobs`` alone."""
        logp, entropy = self._scores(prompts, tokens, mask, entropy=True).unbind(-1)
        return logp, entropy

    def _scores(
        self,
        prompts: Sequence[Tensor],
        tokens: Tensor,
        mask: Tensor,
        layers: Nested | None = None,
        temperature: float | None = None,
        entropy: bool = False,
    ) -> Tensor:
        """[B, T] log-probabilities, or [B, T, 2] with entropies."""
        if any(len(prompt) == 0 for prompt in prompts):
            raise UsageError("a prompt is empty: the first token of a completion needs at least one token before it")
        temperature = self.temperature if temperature is None else temperature
        if temperature <= 0:
            raise UsageError(f"temperature={temperature}: log-probabilities need a positive one")
        nested = self._checked(layers if layers is not None else tuple(range(self.num_layers)))
        if is_int8(nested) and torch.is_grad_enabled():
            raise UsageError("int8 log-probabilities have no gradient: ask for them under torch.no_grad()")
        tokens, mask = tokens.to(self.device), mask.to(self.device).bool()
        shape = (*mask.shape, 2) if entropy else mask.shape
        batches = micro_batches(prompts, mask, self.token_limit) if mask.any() else []
        rounds = most(len(batches)) if self.sharded else len(batches)
        if not rounds:
            return torch.zeros(shape, device=self.device)
        score = self._scorer(nested, max(map(len, prompts), default=1) + tokens.shape[1], temperature, entropy)
        first, one, scored = (tensor.to(self.device) for tensor in _ONE_TOKEN)
        idle = [score([first], one, scored) for _ in range(rounds - len(batches))]
        parts, where = [], []
        for batch in batches:
            index = torch.tensor(batch, device=self.device)
            row, column = mask[index].nonzero(as_tuple=True)
            if len(row):
                where.append((index[row], column))
                parts.append(score([prompts[i] for i in batch], tokens[index], mask[index]))
        scores = torch.zeros(shape, device=self.device)
        if parts:
            place = tuple(torch.cat(coordinates) for coordinates in zip(*where, strict=True))
            scores = scores.index_put(place, torch.cat(parts))
        for nothing in idle:
            scores = scores + 0.0 * nothing.sum()
        return scores

    def _scorer(
        self, nested: Nested, longest: int, temperature: float, entropy: bool = False
    ) -> Callable[[list[Tensor], Tensor, Tensor], Tensor]:
        """(prompts, tokens, mask) of a micro-batch -> [M] float32, its scored tokens in row-major order; [M, 2] with
        entropies."""
        if not self.architecture.static_rope:
            self.check_length(longest)
        if not self.functional:
            head = TrainableHead(self.model.lm_head.weight, self.dtype)

            def by_reference(prompts: list[Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
                hidden = scored_states(self.model, prompts, tokens, mask, layers_of(nested), self.architecture.windows)
                apply = head.logp_and_entropy if entropy else head.logp
                return apply(hidden, tokens[mask], temperature)

            return by_reference
        if self.sharded and torch.is_grad_enabled():  # an update begins: what rollouts read is stale after it anyway
            self._rollout_weights = {}
        model = self.rollout_model(nested, longest) if is_int8(nested) else self.trainable_model(nested, longest)

        def score(prompts: list[Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
            hidden = score_hidden(pack(prompts, tokens, mask), model, self.gradient_checkpointing)
            hidden = rms_norm(hidden, model.final_gain, self.architecture.eps, torch.float32)
            apply = model.head.logp_and_entropy if entropy else model.head.logp
            return apply(hidden, tokens[mask], temperature)

        return score

    def rollout_model(self, nested: Nested, longest: int) -> NestedModel:
        """The model as ``nested`` computes it in rollouts, by rollout weights, for prefixes of at most ``longest``
        tokens; only of a functional policy."""
        weights = self.rollout_weights(is_int8(nested)).with_changes(changes_of(nested))
        layers = kept_weights(weights.layers, layers_of(nested))
        return self._nested_model(nested, longest, layers, weights.embedding, weights.head)

    def trainable_model(self, nested: Nested, longest: int) -> NestedModel:
        """The same with gradients to the weights, for updates."""
        layers = changed_trainable(self._trainable, self.model, changes_of(nested), self.dtype)
        embedding, head = self.model.model.embed_tokens.weight, TrainableHead(self.model.lm_head.weight, self.dtype)
        return self._nested_model(nested, longest, kept_weights(layers, layers_of(nested)), embedding, head)

    def _nested_model(
        self, nested: Nested, longest: int, layers: list[LayerWeights], embedding: Tensor, head: Any
    ) -> NestedModel:
        cos, sin = self.rotary(longest)
        rotary, norm = (cos[:longest], sin[:longest]), self.model.model.norm.weight
        return NestedModel(self.architecture, layers, embedding, norm, head, rotary, self.dtype, is_int8(nested))

    def _use(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._trainable = trainable_layers(self.model, self.architecture, dtype)

    def _checked(self, nested: Nested) -> Nested:
        """``nested`` in its one spelling, or a ``UsageError``."""
        subset = check_subset(layers_of(nested), self.num_layers)
        if not isinstance(nested, PatchedSubset):
            return subset
        self.check_functional("patches and int8")
        return replace(nested, layers=subset)

    def rollout_weights(self, int8: bool = False) -> RolloutWeights:
        """The inference form of the present weights, made or rewritten when first asked for; only of a functional
        policy. ``int8``: on bytes (``policies.model.int8``)."""
        self._require_fresh()
        weights = self._rollout_weights.get(int8)
        if weights is None:
            if int8 and self.device.type == "cuda":
                warnings.warn(
                    "rollout_dtype='int8' has no kernel on a GPU, where bfloat16 is four times as fast: leave it out",
                    stacklevel=2,
                )
            maps = (Int8Linear, Int8Head) if int8 else (RolloutLinear, RolloutHead)
            weights = self._rollout_weights[int8] = RolloutWeights(self.model, self.architecture, self.dtype, *maps)
        elif weights.version != self.version:
            weights.refresh()
        weights.version = self.version
        return weights

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [>= length, tables, D] of ``layers.rotary_table``."""
        if self._tables is None or len(self._tables[0]) < length:
            size = max(length, 2 * len(self._tables[0]) if self._tables else 256)
            with torch.inference_mode(False):  # whoever asks first, updates will differentiate through them
                self._tables = rotary_table(self.model.model.rotary_emb, size, self.device, self.architecture.ropes)
        return self._tables

    def _weights_stamp(self) -> int:
        return sum(map(_version, self._parameters))  # at every token: no Python loop

    def _require_fresh(self) -> None:
        if self._weights_stamp() != self._stamp:
            raise RuntimeError(
                "the weights changed after the last refresh: call policy.refresh() after optimizer steps"
            )


def numbered_layers(layers: Sequence[int], count: int) -> list[int]:
    """``layers`` to train, in order. Raises UsageError unless they are different ones of ``count``."""
    try:
        chosen = sorted(map(index, layers))
    except TypeError:
        chosen = []
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] < count:
        raise UsageError(
            f"trained_layers={layers!r} must be different numbers of layers, 0 to {count - 1}, such as [{count // 2}]; "
            "leave it out to train all weights"
        )
    return chosen
