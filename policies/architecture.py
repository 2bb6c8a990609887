"""The few numbers that tell one supported decoder architecture from another, read from its Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from registry import UsageError

SUPPORTED = {
    "llama": "Llama, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
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

    @property
    def repeat(self) -> int:
        """Query heads per key head."""
        return self.query_heads // self.key_heads

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
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return Architecture(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=config.intermediate_size,
        query_heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        scale=head_dim**-0.5,
        vocabulary=config.vocab_size,
        windows=_windows(config),
        static_rope=rope.get("rope_type", "default") in _STATIC_ROPE,
        gate=config.hidden_act,
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return (None,) * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral has one window for all layers
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
