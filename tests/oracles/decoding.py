"""Episodes decoded through KV slots, beside fresh forwards on every prefix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policies import Behavior, Policy
from tests.oracles.policy_checkpoints import (
    LAYERS,
)

FULL = tuple(range(LAYERS))


LONGEST = 24


def observe(prefixes: list[list[int]]) -> dict[str, np.ndarray]:
    ids = np.zeros((len(prefixes), LONGEST), np.int64)
    for row, prefix in zip(ids, prefixes, strict=True):
        row[: len(prefix)] = prefix
    return {"input_ids": ids, "length": np.array([[len(prefix)] for prefix in prefixes])}


def fresh_logp(model, prefixes: list[list[int]]) -> list[torch.Tensor]:
    """log softmax [V] after each prefix, by one forward of right-padded rows (causal: padding is never looked at)."""
    rows = torch.tensor([prefix + [0] * (LONGEST - len(prefix)) for prefix in prefixes])
    with torch.no_grad():
        logp = model(rows, use_cache=False).logits.log_softmax(-1)
    return [row[len(prefix) - 1] for row, prefix in zip(logp, prefixes, strict=True)]


def check_greedy(behavior: Behavior, model, prefixes: list[list[int]], start: np.ndarray) -> np.ndarray:
    """Act greedily and compare the log-probability of every slot's token with a fresh forward."""
    tokens, logp = behavior.act(observe(prefixes), start, np.arange(len(prefixes)))
    for slot, (prefix, expected) in enumerate(zip(prefixes, fresh_logp(model, prefixes), strict=True)):
        if not prefix:
            assert (tokens[slot], logp[slot]) == (0, 0)
            continue
        assert logp[slot] == pytest.approx(expected[tokens[slot]].item(), abs=1e-4)
        assert expected[tokens[slot]] == pytest.approx(expected.max().item(), abs=1e-4)
    return tokens


def roll_out(policy: Policy, slots: int, deck: list[list[int]], steps: int, **sampling) -> dict[int, list]:
    """Deal a deck of prompts to slots as they fall free; every episode is ``steps`` tokens long."""
    behavior = policy.behavior(FULL, slots=slots, max_length=LONGEST, **sampling)
    waiting = list(enumerate(deck))
    running: list[tuple[int, list[int], int] | None] = [None] * slots
    record: dict[int, list] = {episode: [] for episode in range(len(deck))}
    while waiting or any(running):
        start = np.zeros(slots, bool)
        for slot in range(slots):
            if running[slot] is None and waiting:
                episode, prompt = waiting.pop(0)
                running[slot], start[slot] = (episode, list(prompt), len(prompt)), True
        prefixes = [entry[1] if entry else [] for entry in running]
        episodes = np.array([entry[0] if entry else -1 for entry in running])
        tokens, logp = behavior.act(observe(prefixes), start, episodes)
        for slot, entry in enumerate(running):
            if entry is not None:
                episode, prefix, size = entry
                record[episode].append((int(tokens[slot]), float(logp[slot])))
                prefix.append(int(tokens[slot]))
                if len(prefix) == size + steps + episode % 3:
                    running[slot] = None
    return record
