"""Float32 logits of half-precision operands. The product needs a CUDA device; here one of its results stands for it."""

from __future__ import annotations

import pytest
import torch

from policies import Policy
from policies.model import products
from policies.model.head import chunked_logp
from policies.model.weights import RolloutLinear
from tests.oracles.decoding import roll_out
from tests.oracles.policy_checkpoints import random_model

CPU = torch.device("cpu")
EXACT = {"accumulated": lambda x, weight: (x.double() @ weight.double().T).float()}
ROUNDED = {
    "result in bfloat16": lambda x, weight: (x @ weight.T).float(),
    "no float32": lambda x, weight: x.double() @ weight.double().T,
}


@pytest.fixture
def stand_in(monkeypatch):
    """The half-precision product, exact, and the places that look for it; counts its calls."""
    calls: list[int] = []

    def counted(x, weight):
        calls.append(len(x))
        assert x.dtype == weight.dtype == torch.bfloat16
        return EXACT["accumulated"](x, weight)

    monkeypatch.setattr(products, "half_product", counted)
    monkeypatch.setattr(products, "is_half_operand", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr("policies.native.kernels", lambda: None)
    products.can_multiply_halves.cache_clear()
    yield calls
    products.can_multiply_halves.cache_clear()


def test_rollouts_and_scores_by_half_products_are_those_by_float_products(stand_in, monkeypatch):
    deck = [[4, 5, 6], [9], [1, 2, 3, 4]]
    found = roll_out(Policy(random_model(), "bfloat16"), 3, deck, 6, seed=1)
    assert 3 in stand_in
    monkeypatch.setattr(products, "is_half_operand", lambda weight: False)
    expected = roll_out(Policy(random_model(), "bfloat16"), 3, deck, 6, seed=1)
    for episode, steps in expected.items():
        for (token, logp), (again, logp_again) in zip(steps, found[episode], strict=True):
            assert again == token
            assert logp_again == pytest.approx(logp, abs=1e-4)


def test_a_bias_is_rounded_before_it_is_added():
    """A half of bfloat16's step at 1, and a little: with the little lost, 1 and that are 1, which is even."""
    module = torch.nn.Linear(16, 8)
    x = torch.zeros(3, 16, dtype=torch.bfloat16)
    x[:, 0] = 1
    with torch.no_grad():
        module.weight.fill_(1.0)
        module.bias.fill_(2**-8 + 2**-20)
        rollout = RolloutLinear([module], torch.bfloat16)(x)
        update = products.linear(x, [module.weight], [module.bias])
    assert torch.equal(update, torch.ones(3, 8, dtype=torch.bfloat16)) and torch.equal(update, rollout)


def test_the_chunked_head_by_half_products(stand_in, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (43, 97))
    token, slope = torch.randint(0, 97, (43,), generator=generator), torch.randn(43, generator=generator)
    results = []
    for fits in (True, False):
        monkeypatch.setattr(products, "is_half_operand", lambda weight, fits=fits: fits)
        logp = chunked_logp(hidden, weight, token, 0.7, torch.bfloat16)
        results.append([logp.detach(), *torch.autograd.grad((logp * slope).sum(), (hidden, weight))])
    assert 43 in stand_in
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fault", [*ROUNDED, "raises"])
def test_a_product_that_is_not_float32_is_not_used(stand_in, monkeypatch, fault):
    def raises(x, weight):
        raise NotImplementedError("Could not run 'aten::mm.dtype'\nand more")

    monkeypatch.setattr(products, "half_product", ROUNDED.get(fault, raises))
    weight = torch.randn(5, 8)
    with pytest.warns(UserWarning, match="the head multiplies in float32, slower"):
        operand = products.operand(weight, torch.bfloat16)
    assert operand.dtype == torch.float32
    assert torch.equal(operand, weight.bfloat16().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_s_product_sums_in_float32(dtype):
    assert products.can_multiply_halves(torch.device("cuda"), dtype)
