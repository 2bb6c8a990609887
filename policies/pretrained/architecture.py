"""The few numbers that tell one supported decoder architecture from another, read from its Hugging Face config."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from registry import UsageError

SUPPORTED = {
    "llama": "Llama, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3 without images",
}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """Shapes of a pre-norm decoder with rotary attention and a gated MLP.

    Attributes:
        layers: number of layers L.
        width: of the residual stream.
        inner: width of the MLP's inner layer.
        query_heads, key_heads: attention heads; query heads share key heads in equal groups.
        head_dim: channels per head.
        eps: of the RMS norms.
        scale: multiplies attention scores before the softmax.
        vocabulary: V, the logits' dimension.
        windows: per layer, how many positions a token attends to (itself included), or None for all before it.
        static_rope: whether the rotary table of a position never depends on the sequence length.
        gate: activation of the MLP's gate.
        gemma: Gemma's norms and embeddings: a norm's weights are distances from 1, what half a layer adds is normed
            once more, and embeddings are multiplied by the root of the width.
        positions: how many the model was trained for; None where its config does not say.
        reach: the longest sequence that its rotary tables serve, ``positions`` unless they are scaled beyond.
        ropes: names of the two rotary tables of a model that has another one for layers with a window, that of the
            layers without first; none where one table serves all.
    """

    layers: int
    width: int
    inner: int
    query_heads: int
    key_heads: int
    head_dim: int
    eps: float
    scale: float
    vocabulary: int
    windows: tuple[int | None, ...]
    static_rope: bool
    gate: str
    gemma: bool = False
    positions: int | None = None
    reach: int | None = None
    ropes: tuple[str, ...] = ()

    def check_length(self, longest: int, warn: bool = True) -> None:
        """Raise ``UsageError`` for sequences of more tokens than there are positions for; where scaled rotary tables
        reach that far, warn."""
        if self.positions is None or self.reach is None or longest <= min(self.positions, self.reach):
            return
        if longest > self.reach:
            by_one_table = "" if self.static_rope else " with one rotary table"
            raise UsageError(
                f"sequences of {longest} tokens (max_prompt_tokens + max_new_tokens) go beyond the {self.reach} "
                f"positions that this model serves{by_one_table}: lower one of the two"
            )
        if warn:
            warnings.warn(
                f"sequences of {longest} tokens go beyond the {self.positions} positions of the model's config; its "
                f"scaled rotary table reaches to {self.reach}",
                stacklevel=4,
            )

    @property
    def kv_width(self) -> int:
        """Numbers per token and layer that the KV slots hold: keys and values of all key heads."""
        return 2 * self.key_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices."""
        return 2 * self.width * self.head_dim * (self.query_heads + self.key_heads) + 3 * self.width * self.inner

    @property
    def attention_share(self) -> float:
        """Share of a layer's matrix weights, and so of a decode step's products, that its attention has."""
        return 1 - 3 * self.width * self.inner / self.layer_weights

    @property
    def layers_share(self) -> float:
        """f, the share of a decode step's matrix weights that the layers have; the head has the rest."""
        layers = self.layers * self.layer_weights
        return layers / (layers + self.vocabulary * self.width)


def read_architecture(config: Any) -> Architecture:
    """The architecture of a transformers config; raises ``UsageError`` naming the supported ones for any other."""
    kind = getattr(config, "model_type", "?")
    if kind not in SUPPORTED:
        known = ", ".join(f"{name} ({what})" for name, what in SUPPORTED.items())
        raise UsageError(f"unsupported architecture {kind!r}: supported are {known}")
    gemma = kind == "gemma3_text"
    if gemma:
        _check_gemma(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes = _two_ropes(config.layer_types) if gemma else ()
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope[name] for name in ropes] or [rope]
    types = {table.get("rope_type", "default") for table in tables}
    positions = getattr(config, "max_position_embeddings", None)
    return Architecture(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=config.intermediate_size,
        query_heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        vocabulary=config.vocab_size,
        windows=_windows(config),
        static_rope=types <= set(_STATIC_ROPE),
        gate=config.hidden_activation if gemma else config.hidden_act,
        gemma=gemma,
        positions=positions,
        reach=_reach(tables[0], positions) if positions else None,
        ropes=ropes,
    )


def _reach(table: dict[str, Any], positions: int) -> int:
    """The longest sequence that a rotary table of a model of ``positions`` positions serves. Dynamic and longrope
    tables are others for longer sequences, so a token would depend on the rows beside it."""
    kind, original = table.get("rope_type", "default"), table.get("original_max_position_embeddings") or positions
    if kind == "default":
        return positions
    if kind not in _STATIC_ROPE:
        return min(positions, original) if kind == "longrope" else positions
    return max(positions, int(original * (table.get("factor") or 1)))


def _check_gemma(config: Any) -> None:
    """Raise ``UsageError`` for what a Gemma config can ask for and no checkpoint of Gemma 3's language model does."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise UsageError(f"unsupported architecture: this gemma3_text config sets {name}={getattr(config, name)}")


def _two_ropes(kinds: Sequence[str]) -> tuple[str, str]:
    """The rotary tables for layers without and with a window; a model without one kind of layers has no table of it."""
    whole, local = "full_attention", "sliding_attention"
    return (whole if whole in kinds else local), (local if local in kinds else whole)


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return (None,) * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral has one window for all layers
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
