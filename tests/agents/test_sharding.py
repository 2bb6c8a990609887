"""Split weights: gloo processes that hold a part of every matrix give the numbers of one process that holds all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents import ReFT
from agents.distributed import join
from policies import Policy
from policies.sharding import gather, shape_of, whole, whole_shape
from registry import UsageError
from tests.agents.test_distributed import Found, in_processes
from tests.oracles.reft_agents import CoinFlips, make, numbers


def whole_weights(agent: ReFT) -> np.ndarray:
    return torch.cat([whole(parameter).flatten() for parameter in agent.target.parameters()]).numpy()


def iterated(agent: ReFT, iterations: int) -> Found:
    """Metrics of some iterations and the whole weights after them."""
    said: dict[str, Any] = {}
    for n in range(iterations):
        said |= {f"{n} {name}": value for name, value in numbers(agent.iterate()).items()}
    return {**said, "timesteps": agent.num_timesteps}, whole_weights(agent)


def trained(folder: str, **arguments: Any) -> Found:
    # Adam's first steps turn rounding of a near-zero gradient into a whole step; a large epsilon does not.
    torch.set_num_threads(1)
    agent = make(folder, slots=8, adam_eps=1e-2, **arguments)
    assert agent.target.sharded == (agent.ranks.size > 1)
    return iterated(agent, 2)


def assert_same(got: Found | str, wanted: Found) -> None:
    assert not isinstance(got, str), got
    assert got[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert got[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4, atol=1e-5)


RUNS: dict[str, dict[str, Any]] = {
    "reft": {},
    "wide": {"sampler": "uniform", "correction": "self-normalised", "consistency": 0.1},
    "steps": {"sampler": "fixed", "correction": "token-is*ppo-clip", "minibatches": 2, "epochs": 2, "ema_decay": 0.9},
    "defensive": {"sampler": "fixed", "correction": "defensive", "minibatches": 2, "target_written": 2},
    "one-group": {"problems_per_batch": 1, "group_size": 8, "entropy_bonus": 0.01},  # one process has no group
    "micro": {"microbatch_tokens": 24, "correction": "ess-adaptive", "sampler": "uniform"},  # of unequal numbers
    "patched": {"sampler": "fixed", "patch": "heal"},
    "bytes": {"sampler": "fixed", "rollout_dtype": "int8"},
    "measured": {"sampler": "lowest-kl", "correction": "retrace", "batch": "stale"},
    "adapters": {"lora_rank": 4, "gradient_checkpointing": True, "minibatches": 2},
    "layers": {"trained_layers": [1, 2], "minibatches": 2},
    "anchored": {"anchor": "kl", "gradient_checkpointing": True, "batch": "replay"},
}


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)
def test_two_processes_with_half_of_the_weights_each_give_the_numbers_of_one(
    folder: str, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    alone = trained(folder, **arguments)
    assert any(alone[0][f"{n} grad_norm"] > 1e-3 for n in range(2))
    both = in_processes(2, lambda: trained(folder, shard=True, **arguments), tmp_path)
    for got in both:
        assert_same(got, alone)
    assert np.array_equal(both[0][1], both[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reft", "steps", "micro", "adapters"])
def test_four_processes_give_them_as_well(folder: str, tmp_path: Path, name: str) -> None:
    alone = trained(folder, **RUNS[name])
    for got in in_processes(4, lambda: trained(folder, shard=True, **RUNS[name]), tmp_path):
        assert_same(got, alone)


def held_bytes(agent: ReFT) -> dict[str, int]:
    """What a process holds throughout, in bytes, as its tensors say."""
    parameters = list(agent.target.model.parameters())
    moments = [value for state in agent.optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "moments": sum(value.nbytes for value in moments),
    }


def test_a_process_holds_its_part_of_weights_gradients_and_moments(folder: str, tmp_path: Path) -> None:
    def act(shard: bool) -> Found:
        agent = make(folder, shard=shard)
        agent.iterate()
        held = held_bytes(agent)
        wholes = [p for p in agent.target.model.parameters() if p.dim() != 1 or whole_shape(p)]
        matrices = sum(shape_of(p).numel() for p in wholes)
        return {**held, "matrices": matrices, "rollouts": len(agent.target._rollout_weights)}, np.zeros(0)

    alone, _ = act(False)
    for got in in_processes(3, lambda: act(True), tmp_path):
        assert not isinstance(got, str), got
        held = got[0]
        assert held["matrices"] == alone["matrices"] and held["rollouts"] == 0  # the update has dropped that copy
        vectors = alone["weights"] - 4 * alone["matrices"]
        for name, copies in {"weights": 1, "gradients": 1, "moments": 2}.items():
            parts = held[name] / copies - vectors
            assert alone["matrices"] * 4 / 3 <= parts < alone["matrices"] * 4 / 3 + 4 * 3 * 40, name  # filled up


def continued(saved: Path, **arguments: Any) -> Found:
    torch.set_num_threads(1)
    return iterated(ReFT.load(saved, CoinFlips(8), **arguments), 2)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"minibatches": 2, "ema_decay": 0.9, "anchor": "kl"}, (1, 2)),
        ({"lora_rank": 4}, (1,)),
        pytest.param({"minibatches": 2, "batch": "stale"}, (1, 3, 4), marks=pytest.mark.slow),
    ],
    ids=["anchored", "adapters", "stale"],
)
def test_what_two_processes_save_goes_on_with_any_number(
    folder: str, tmp_path: Path, arguments: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    def begun(path: Path, shard: bool) -> Found:
        torch.set_num_threads(1)
        agent = make(folder, slots=8, adam_eps=1e-2, shard=shard, **arguments)
        said = iterated(agent, 2)
        agent.save(path)
        return said

    wanted = begun(tmp_path / "alone", False)
    for n, size in enumerate((2, *sizes)):
        out = tmp_path / f"{n}"
        out.mkdir()
        if not n:
            for got in in_processes(size, lambda: begun(tmp_path / "two", True), out):
                assert_same(got, wanted)
            for file in sorted((tmp_path / "alone").glob("*.safetensors")):
                ours, theirs = load_file(file), load_file(tmp_path / "two" / file.name)
                assert ours.keys() == theirs.keys()
                for name, value in ours.items():
                    torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5, msg=f"{file.name} {name}")
            wanted = continued(tmp_path / "alone")
        elif size == 1:
            assert_same(continued(tmp_path / "two", shard=False), wanted)
        else:
            for got in in_processes(size, lambda: continued(tmp_path / "two"), out):
                assert_same(got, wanted)


def test_in_one_process_nothing_is_split(folder: str) -> None:
    plain, asked = make(folder), make(folder, shard=True)
    assert not asked.target.sharded
    assert numbers(plain.iterate()) == numbers(asked.iterate())
    assert np.array_equal(whole_weights(plain), whole_weights(asked))


def test_parts_make_the_whole_whatever_its_size(tmp_path: Path) -> None:
    """Matrices of which processes have unequal parts, or none; the gradient's parts are those of the sum."""

    def act() -> Found:
        from policies.sharding import split, sum_parts

        join()
        rank, said = int(os.environ["RANK"]), {}
        for shape in ((1, 1), (2, 5), (7, 3), (4, 6)):
            matrix = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
            part = split(torch.nn.Parameter(matrix), torch.device("cpu"))
            total = gather(sum_parts(matrix * (rank + 1), matrix.shape), matrix.shape)
            said[str(shape)] = [torch.equal(whole(part), matrix), torch.equal(total, 6 * matrix), part.numel()]
        return said, np.zeros(0)

    for got in in_processes(3, act, tmp_path):
        assert not isinstance(got, str), got
        assert got[0] == {"(1, 1)": [True, True, 1], "(2, 5)": [True, True, 4], "(7, 3)": [True, True, 7]} | {
            "(4, 6)": [True, True, 8]
        }


def test_transformers_own_layers_take_no_parts(folder: str) -> None:
    policy = Policy.load(folder, dtype="float32")
    policy.functional = False
    with pytest.raises(UsageError, match="leave shard out"):
        policy.shard()
