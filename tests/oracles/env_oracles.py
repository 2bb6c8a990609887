"""What the environment's tests compare with, and how."""

from __future__ import annotations

from typing import Any

import numpy as np

R1 = {"template": "r1", "max_prompt_tokens": 512, "max_new_tokens": 12}
SHORT = {"max_new_tokens": 8}
EOS_SHARE = 0.2


def eos_of(env: Any) -> int:
    (token,) = env.unwrapped.task.stop_token_ids
    return int(token)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the last key, type and element."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), where
        for n, value in enumerate(expected):
            assert_same(found[n], value, f"{where}({n})")
    elif isinstance(expected, np.ndarray) and expected.dtype == object:
        assert isinstance(found, np.ndarray) and found.dtype == object and found.shape == expected.shape, where
        for n, value in enumerate(expected):
            assert_same(found[n], value, f"{where}[{n}]")
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray) and found.dtype == expected.dtype, where
        np.testing.assert_array_equal(found, expected, err_msg=where)
    else:
        assert type(found) is type(expected) and found == expected, where


class Typist:
    """Random tokens per slot, now and then EOS or a whole text such as a stop string."""

    def __init__(self, env: Any, seed: int, texts: tuple[str, ...] = ()) -> None:
        task = env.unwrapped.task
        self.rng = np.random.default_rng(seed)
        self.vocabulary, self.eos = task.vocab_size, eos_of(env)
        self.texts = [task.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.pending: list[list[int]] = [[] for _ in range(env.num_envs)]

    def __call__(self) -> np.ndarray:
        return np.array([self._token(pending) for pending in self.pending])

    def _token(self, pending: list[int]) -> int:
        if not pending:
            if self.rng.random() < EOS_SHARE:
                return self.eos
            if self.texts and self.rng.random() < 0.5:
                pending.extend(self.texts[self.rng.integers(len(self.texts))])
            else:
                pending.append(int(self.rng.integers(self.vocabulary)))
        return pending.pop(0)
