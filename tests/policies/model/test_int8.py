"""Rollouts by products on bytes: their arithmetic, both paths, and that log mu is what tokens were drawn with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as published_hadamard
from torch import nn

from policies import PatchedSubset, Policy, with_int8
from policies.engine.sampling import draw, uniforms
from policies.model.int8 import Int8Head, Int8Linear, hadamard, rotation_block, to_bytes
from policies.native import kernels
from policies.nested import Change
from registry import UsageError
from tests.oracles.decoding import LONGEST, observe, roll_out
from tests.oracles.policy_checkpoints import FAMILIES, LAYERS, random_model, shared_policy
from tests.oracles.reft_agents import SKIP, gradient_of, make, numbers, write_batch

FULL = tuple(range(LAYERS))
BYTES = with_int8(FULL)


@pytest.fixture
def compiled():
    native = kernels()
    if native is None or native.int8 is None:
        pytest.skip("no compiled products on bytes on this processor")


@pytest.fixture(params=["compiled", "pure"])
def path(request, monkeypatch):
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setattr("policies.native.kernels", lambda: None)
    return request.param


def random_linear(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inner + outer)
    return nn.Linear(inner, outer, bias=bias)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_blocks_are_turned_by_the_hadamard_matrix(block):
    x = torch.randn(3, 4 * block, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(published_hadamard(block)).float()
    torch.testing.assert_close(hadamard(x, block), (x.view(3, 4, block) @ matrix).flatten(1))
    torch.testing.assert_close(hadamard(hadamard(x, block), block), block * x)


def test_rounding_is_off_by_half_a_step_at_most():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    rows, scale = to_bytes(x, 32)
    assert rows.dtype == torch.int8 and rows[2].eq(0).all() and scale[2] == 0
    assert (rows.abs().amax(1)[[0, 1, 3, 4]] == 127).all()
    assert ((hadamard(x, 32) - rows * scale[:, None]).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("inner, block", [(64, 64), (96, 32), (576, 64), (80, 16)])
def test_the_largest_block_that_fits_is_taken(inner, block):
    assert rotation_block(inner) == block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner, outer", [(64, 32), (96, 70), (48, 33), (576, 192)])
@pytest.mark.parametrize("rows", [1, 5, 12, 41])
def test_products_equal_those_of_the_rounded_operands(path, dtype, inner, outer, rows):
    module = random_linear(inner, outer)
    linear = Int8Linear([module], dtype)
    x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows)).to(dtype)
    block = rotation_block(inner)
    (a, a_scale), (b, b_scale) = to_bytes(x, block), to_bytes(module.weight.detach().to(dtype), block)
    exact = (a.double() @ b.double().t()) * (a_scale.double() / block)[:, None] * b_scale.double() + module.bias.to(
        dtype
    ).double()
    found = linear(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-7)


def extreme_bytes(count: int, k: int) -> torch.Tensor:
    """[count, k] float32 integers to 127, one of those in each row: all alike, alternating, of two values or random."""
    generator = torch.Generator().manual_seed(count + k)
    signs = torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0)
    two_valued = torch.randint(0, 2, (count, k), generator=generator) * 2.0 - 1
    uniform = torch.randint(-127, 128, (count, k), generator=generator).float()
    normal = (torch.randn(count, k, generator=generator) * 36).round().clamp(-127, 127)
    kinds = [torch.ones(count, k) * 127, torch.ones(count, k) * -127, 127 * signs.expand(count, k), 127 * two_valued]
    rows = torch.stack([*kinds, uniform, normal])[torch.arange(count) % 6, torch.arange(count)]
    rows[:, k // 2] = 127
    return rows


@pytest.mark.parametrize("inner, outer", [(16, 1), (48, 33), (576, 70), (1536, 47)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 13, 24])
def test_integers_are_exact_at_the_ends_of_their_range(path, inner, outer, rows):
    block = rotation_block(inner)
    a, b = extreme_bytes(rows, inner), extreme_bytes(outer, inner)
    module = nn.Linear(inner, outer, bias=False)
    module.weight = nn.Parameter(hadamard(b, block) / block)  # which is rotated back to b
    x = hadamard(a, block) / block
    assert torch.equal(to_bytes(x, block)[0].float(), a)
    exact = a.double() @ b.double().t()
    assert torch.equal(Int8Linear([module], torch.float32)(x) * block, exact.float())


@torch.no_grad()
def test_products_are_near_the_true_ones_even_with_outliers(path):
    module = random_linear(576, 128)
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    x[:, 7] *= 100  # as one channel of a language model's residual stream does
    wanted = x @ module.weight.t() + module.bias
    error = (Int8Linear([module], torch.float32)(x) - wanted).norm() / wanted.norm()
    scale = x.abs().amax(1, keepdim=True) / 127
    plain = ((x / scale).round() * scale @ module.weight.t() + module.bias - wanted).norm() / wanted.norm()
    assert error < 0.012
    assert plain > 1.5 * error  # without the rotation, and with exact weights


def test_a_row_does_not_depend_on_the_others(path):
    linear = Int8Linear([random_linear(96, 50), random_linear(96, 20)], torch.float32)
    x = torch.randn(30, 96, generator=torch.Generator().manual_seed(2))
    together = linear(x)
    for n in (0, 13, 29):
        assert torch.equal(linear(x[n : n + 1])[0], together[n])


def test_refresh_copies_the_weights(path):
    module = random_linear(64, 40)
    linear, x = Int8Linear([module], torch.float32), torch.randn(3, 64)
    before = linear(x)
    with torch.no_grad():
        module.weight.mul_(2)
        module.bias.mul_(2)
    assert torch.equal(linear(x), before)
    linear.refresh()
    torch.testing.assert_close(linear(x), 2 * before)


@pytest.mark.parametrize("kind", ["map", "head", "head's draw"])
def test_bytes_are_of_the_weights_that_the_target_multiplies(path, kind):
    """What training changed by less than bfloat16 can hold, the target's products do not have, and bytes of another
    weight would be of another policy."""

    def products(module: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
        if kind == "map":
            return Int8Linear([module], dtype)(x)
        head = Int8Head(module, dtype)
        if kind == "head":
            return head.logits(x)
        if not head.draws:
            pytest.skip("draws in one call by compiled products alone")
        return head.draw(x, torch.full((3,), 0.5, dtype=torch.float64), 1.0)[1]

    module, x = random_linear(64, 40, bias=False), torch.randn(3, 64).bfloat16().float()
    with torch.no_grad():
        module.weight.copy_(module.weight.bfloat16())
        half, single = products(module, torch.bfloat16), products(module, torch.float32)
        module.weight += module.weight * 2**-10  # an eighth to a quarter of a step of bfloat16's
        assert torch.equal(products(module, torch.bfloat16), half)
        assert not torch.equal(products(module, torch.float32), single)


@pytest.mark.parametrize("vocabulary", [32, 70, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_the_head_draws_from_its_own_logits(compiled, vocabulary, temperature):
    head = Int8Head(random_linear(64, vocabulary, bias=False), torch.bfloat16)
    hidden = 8 * torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
    uniform = torch.from_numpy(uniforms(0, np.arange(17), np.arange(17)))
    token, logp = head.draw(hidden, uniform, temperature)
    expected, expected_logp = draw(head.logits(hidden), uniform, temperature)
    assert torch.equal(token, expected)
    torch.testing.assert_close(logp, expected_logp, atol=1e-5, rtol=1e-5)
    assert head.draws


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [FULL, (0, 2, "3.mlp")])
def test_log_mu_is_the_byte_models_own(path, family, layers):
    policy = Policy(random_model(family))
    nested = with_int8(layers)
    behavior = policy.behavior(nested, slots=3, max_length=LONGEST, seed=1)
    prefixes, start, logp = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 9, 2, 4]], np.ones(3, bool), []
    prompts = [torch.tensor(prefix) for prefix in prefixes]
    for _ in range(8):
        tokens, found = behavior.act(observe(prefixes), start, np.arange(3))
        logp.append(found)
        prefixes = [[*prefix, int(token)] for prefix, token in zip(prefixes, tokens, strict=True)]
        start = np.zeros(3, bool)
    written = torch.stack([torch.tensor(prefix[-8:]) for prefix in prefixes])
    with torch.no_grad():
        scored, plain = (policy.logprobs(prompts, written, written >= 0, layers=each) for each in (nested, layers))
    acted = torch.from_numpy(np.stack(logp, axis=1))
    # A number on the edge between two bytes may fall on either side where sums are taken in another order.
    assert (scored - acted).abs().median() < 1e-4
    assert (plain - acted).abs().median() > 1e-3
    assert (plain - acted).abs().mean() < 0.2


def test_the_slot_count_changes_no_episode(path):
    policy = Policy(random_model("llama"))
    deck = [[4, 5, 6], [4, 5, 6], [9], *[list(range(n)) for n in (17, 17, 2)]]

    def episodes(slots):
        made = policy.behavior
        policy.behavior = lambda layers, *a, **k: made(BYTES, *a, **k)
        try:
            return roll_out(policy, slots, deck, 6, seed=3)
        finally:
            policy.behavior = made

    many = episodes(6)
    for slots in (1, 4):
        few = episodes(slots)
        assert {n: [token for token, _ in steps] for n, steps in few.items()} == {
            n: [token for token, _ in steps] for n, steps in many.items()
        }


def test_patches_come_along(path):
    policy = Policy(random_model("llama"))
    half = 2 * 3 + 1  # the last MLP
    change = Change(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.3, torch.zeros(64))
    prompts, tokens = [torch.tensor([3, 4, 5])], torch.tensor([[7, 8, 9, 1]])

    def scored(nested):
        with torch.no_grad():
            return policy.logprobs(prompts, tokens, tokens >= 0, layers=nested)

    patched = PatchedSubset(FULL, {half: change})
    near, far = scored(with_int8(patched)) - scored(patched), scored(BYTES) - scored(patched)
    assert near.abs().max() < 0.3 < far.abs().max()
    assert with_int8(with_int8(patched), False) == patched


def test_new_weights_reach_rollouts(path):
    policy = Policy(random_model("llama"))
    prefix, start = observe([[3, 4, 5]]), np.ones(1, bool)
    before = policy.behavior(BYTES, 1, LONGEST, temperature=0.0).act(prefix, start, np.zeros(1, int))
    with torch.no_grad():
        policy.model.lm_head.weight.neg_()
    policy.refresh()
    after = policy.behavior(BYTES, 1, LONGEST, temperature=0.0).act(prefix, start, np.zeros(1, int))
    assert before[0] != after[0]


def test_bad_input_is_named():
    with pytest.raises(UsageError, match=r"multiples of 16.*one of 40.*leave\s+rollout_dtype out"):
        Policy(random_model("llama", intermediate_size=40)).behavior(BYTES, 1, 4)
    with pytest.raises(UsageError, match=r"no gradient: ask for them under torch\.no_grad"):
        prompts, tokens = [torch.tensor([1, 2])], torch.tensor([[3]])
        shared_policy().logprobs(prompts, tokens, tokens > 0, layers=BYTES)
    with pytest.raises(UsageError, match="rollout_dtype='int4' is unknown: use 'int8'"):
        make("tiny", rollout_dtype="int4")


def test_an_agent_rolls_out_by_bytes_and_updates_in_full(folder):
    plain, agent = make(folder), make(folder, rollout_dtype="int8")
    metrics = agent.iterate()
    assert 1e-6 < abs(metrics["kl_k1"]) < 0.05
    assert metrics["skip_ratio"] == 0
    assert metrics["noise_mean"] == plain.iterate()["noise_mean"] < 1e-4  # of the full-precision engine
    rollout, _ = write_batch(agent, np.random.default_rng(1))
    advantage = agent.advantage(rollout.reward, rollout.group)
    # log pi and its gradient are the full-precision target's, whatever wrote the tokens.
    update = gradient_of(agent, lambda: agent.update(rollout, advantage, np.random.default_rng(0)))
    agent.optimizer.zero_grad()
    logp = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask)
    coef = agent.aggregation(rollout.mask) * advantage[:, None]
    (-(coef * logp).sum()).backward()
    wanted = torch.cat([p.grad.flatten() for p in agent.target.parameters() if p.grad is not None])
    torch.testing.assert_close(update, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("given", [{"correction": "token-is", "consistency": 1.0}, {"correction": "defensive"}])
def test_nested_rollouts_by_bytes(folder, given):
    agent = make(folder, sampler=SKIP, patch="heal", rollout_dtype="int8", **given)
    for _ in range(2):
        metrics = agent.iterate()
    assert metrics["skip_ratio"] == 0.5 and np.isfinite(list(numbers(metrics).values())).all()
    rollout, _ = write_batch(agent, np.random.default_rng(1))
    nested = agent.nesting.patcher.fitted
    assert nested is not None and not nested.int8  # patches are fitted in full precision
    with torch.no_grad():
        scored = agent.target.logprobs(rollout.prompts, rollout.tokens, rollout.mask, layers=with_int8(nested))
    assert (scored - rollout.behavior_logp)[rollout.mask].abs().median() < 1e-4
