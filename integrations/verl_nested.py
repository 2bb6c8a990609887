"""Nested rollouts (arXiv 2508.10123) in verl 0.9 with vLLM: a fresh subset of the model's own layers writes each batch.

For 20 of 24 layers, in the configuration:

    actor_rollout_ref.model.external_lib=integrations.verl_nested
    +actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.num_hidden_layers=20
    algorithm.rollout_correction.rollout_is=token

The engine has a model of 20 layers, and every synchronisation of weights sends it 20 others of the present ones. verl
takes log mu from the engine (``rollout.calculate_log_probs``), and its own rollout correction corrects for what was
skipped; without ``rollout_is`` nothing does. ``+actor_rollout_ref.rollout.custom.skip_sampler`` is a component of
``registry.skip_samplers`` (an id, or ``{id: even, ratio: 0.17}``); by default layers are drawn uniformly.

Validation by the engine is of the nested model, too: the numbers of the full one are those of its saved checkpoints.
Trained adapters have to be merged (``model.lora.merge=True``), and trainer and engine share processes
(``checkpoint_engine.backend=naive``). Tried with verl 0.9.1's own registry, configuration, adapter and transfer on a
CPU, where its engine does not run; not in a whole training on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from policies.pretrained.architecture import read_architecture
from policies.pretrained.nested_checkpoint import nested_config, nested_weights, whole_layers
from registry import UsageError, skip_samplers

try:
    from verl.workers.rollout import base
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("integrations.verl_nested needs verl: pip install verl", name=error.name) from error

base._ROLLOUT_REGISTRY["vllm", "async"] = f"{__name__}.NestedServerAdapter"


def __getattr__(name: str) -> Any:
    """``NestedServerAdapter`` when verl asks for it, since verl's own needs vLLM."""
    if name != "NestedServerAdapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from verl.workers.rollout.vllm_rollout import ServerAdapter

    return type(name, (NestedUpdates, ServerAdapter), {"__module__": __name__})


class NestedUpdates:
    """What is put before verl's ``ServerAdapter``.

    Attributes:
        layers: the subset that writes.
    """

    layers: tuple[int, ...] = ()

    async def update_weights(
        self,
        weights: Iterator[tuple[str, Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **others: Any,
    ) -> None:
        """verl's, of the nested model's weights among those of the full one.

        Raises:
            UsageError: weights that are no generator of all of them, no step, or a sampler whose layers are no model
                such as the engine has.
        """
        if wire_format != "named_tensors" or others.get("peft_config") is not None or not hasattr(weights, "__next__"):
            raise UsageError(
                "nested rollouts in verl need whole weights in the trainer's process: checkpoint_engine.backend=naive, "
                "and model.lora.merge=True where adapters are trained"
            )
        if global_steps is None:
            raise UsageError("nested rollouts draw layers by the step, and verl told none (global_steps)")
        self.layers = self._drawn(global_steps)
        kept = nested_weights(weights, self.layers)
        await super().update_weights(kept, global_steps=global_steps, wire_format=wire_format, **others)  # type: ignore[misc]

    def _drawn(self, step: int) -> tuple[int, ...]:
        """A function of the engine's seed and the step, so that all processes draw the same."""
        adapter: Any = self
        full, rollout = adapter.model_config.hf_config, adapter.config
        engine = (rollout.engine_kwargs.get("vllm") or {}).get("hf_overrides") or {}
        num_layers, kept = read_architecture(full).layers, engine.get("num_hidden_layers")
        if kept is None:
            raise UsageError(
                "the number of layers that write is not there: set "
                "+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.num_hidden_layers"
            )
        default = {"id": "uniform", "ratio": (num_layers - kept) / num_layers}
        sampler = skip_samplers.build((rollout.custom or {}).get("skip_sampler") or default)
        if not sampler.ready:
            raise UsageError(
                f"{sampler} has to measure the layers first, which it cannot within verl: find a set by "
                "python -m benchmarks.divergence, and give it to the sampler 'fixed'"
            )
        rng = np.random.default_rng([rollout.seed, step])
        layers = whole_layers(sampler.sample(num_layers, rng), num_layers)
        kinds = getattr(nested_config(full, layers), "layer_types", None)
        there = engine.get("layer_types") or (kinds and full.layer_types[:kept])
        if len(layers) != kept or kinds != there:
            raise UsageError(
                f"{sampler} keeps layers {layers}, and the engine's model has {kept} layers (windows: {there}): set "
                "hf_overrides.num_hidden_layers, and layer_types where layers differ in their windows, to what it keeps"
            )
        return layers
