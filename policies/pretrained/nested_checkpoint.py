"""A nested policy as a model of its own, for engines that know whole models alone: K kept layers, numbered from 0.

Such a model has the embedding, the kept layers, the norm and the head of the full one, and a config that says K
layers. Everything else of an engine (positions, caches, kernels) then needs to know nothing of what was skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from policies.nested import LayerSubset, check_subset
from registry import UsageError

PREFIX = "model.layers."  # of the layers' weights, in the checkpoints of all supported architectures
_BY_LAYER = ("layer_types", "mlp_layer_types")  # fields of a config that are lists with an entry for each layer


def whole_layers(layers: LayerSubset, num_layers: int) -> tuple[int, ...]:
    """``layers`` as K indices, increasing; raises ``UsageError`` for half layers, which no engine beside ours has."""
    subset = check_subset(layers, num_layers)
    if any(isinstance(block, str) for block in subset):
        raise UsageError(f"layer subset {subset} keeps halves of layers, and this engine has whole ones alone")
    return tuple(int(block) for block in subset)


def nested_config(config: Any, layers: LayerSubset) -> Any:
    """A copy of the full model's transformers config that says K layers."""
    made = copy.deepcopy(config)
    for name, value in _changes(made, whole_layers(layers, made.num_hidden_layers)).items():
        setattr(made, name, value)
    return made


def nested_weights(weights: Iterable[tuple[str, Tensor]], layers: LayerSubset) -> Iterator[tuple[str, Tensor]]:
    """The weights of the nested model among those of the full one, as (name, tensor) under the names that it has.

    Every weight is asked for, those of skipped layers too, since gathering one may need all processes.

    Args:
        weights: of the full model, under the names of its checkpoint.
        layers: kept ones, whole and increasing.

    Raises:
        UsageError: no subset of whole layers, or (after the last weight) kept layers without a weight.
    """
    numbers = {layer: number for number, layer in enumerate(layers)}
    if not numbers or any(isinstance(layer, str) for layer in layers) or sorted(numbers) != list(layers):
        raise UsageError(f"layer subset {tuple(layers)} has to be whole layers, increasing")
    missing = set(numbers)
    for name, weight in weights:
        if not name.startswith(PREFIX):
            yield name, weight
            continue
        index, _, rest = name.removeprefix(PREFIX).partition(".")
        if int(index) in numbers:
            missing.discard(int(index))
            yield f"{PREFIX}{numbers[int(index)]}.{rest}", weight
    if missing:
        raise UsageError(f"no weight begins with '{PREFIX}N.' for the kept layers N = {sorted(missing)}")


def save_nested(config: Any, weights: Iterable[tuple[str, Tensor]], layers: LayerSubset, folder: str | Path) -> None:
    """Write the nested model as a Hugging Face folder, without a tokenizer. Arguments as above."""
    from safetensors.torch import save_file

    made, path = nested_config(config, layers), Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    kept = {name: weight.detach().cpu().contiguous() for name, weight in nested_weights(weights, layers)}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    made.save_pretrained(path)


@contextmanager
def keep_layers(model: Any, layers: LayerSubset) -> Iterator[None]:
    """Within the context a transformers CausalLM (or peft's around one) is the nested model, by the same weights.

    The kept layers are numbered anew, since a layer's number is its place in the KV cache, whose first place says how
    many tokens there are. Nothing is copied, and all is as it was when the context is left, by an error too.
    """
    decoder = model.get_decoder()
    config, whole = decoder.config, decoder.layers
    places = whole_layers(layers, len(whole))
    kept, changes = [whole[n] for n in places], _changes(config, places)
    numbered = [(part, part.layer_idx) for layer in kept for part in layer.modules() if hasattr(part, "layer_idx")]
    before = {name: getattr(config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        for number, layer in enumerate(kept):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = number
        decoder.layers = nn.ModuleList(kept)
        yield
    finally:
        decoder.layers = whole
        for part, number in numbered:
            part.layer_idx = number
        for name, value in before.items():
            setattr(config, name, value)


def _changes(config: Any, layers: tuple[int, ...]) -> dict[str, Any]:
    """What a config of ``layers`` alone says otherwise."""
    changes: dict[str, Any] = {"num_hidden_layers": len(layers)}
    for name in _BY_LAYER:
        if getattr(config, name, None) is not None:
            changes[name] = [getattr(config, name)[n] for n in layers]
    return changes
