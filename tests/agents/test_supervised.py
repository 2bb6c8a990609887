"""Supervised descent: the rate in closed form, the steps against a loop written out."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from agents.supervised import descend, linear_warmup_and_decay
from registry import UsageError


@pytest.mark.parametrize(("steps", "rise", "last"), [(20, 4, 0.0), (100, 5, 0.1), (7, 0, 0.0), (1, 0, 0.1)])
def test_the_rate_rises_to_its_peak_and_falls_in_a_straight_line(steps: int, rise: int, last: float) -> None:
    factor, up = linear_warmup_and_decay(steps, rise, last), max(1, rise)
    for step in range(steps):
        down = 1 - (1 - Fraction(str(last))) * Fraction(step - up, max(1, steps - up))
        expected = Fraction(step + 1, up) if step < up else down
        assert factor(step) == pytest.approx(float(expected), abs=1e-12)
    assert max(map(factor, range(steps))) == 1


def test_descent_is_clipped_steps_at_that_rate() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    inputs = torch.randn(6, 5, 3) * 10

    def losses():
        for x in inputs:
            yield first(x).square().mean()

    optimizers = [torch.optim.SGD([first.weight], lr=0.1), torch.optim.SGD([first.bias], lr=0.3)]
    seen = descend(losses(), list(first.parameters()), optimizers, steps=6, rise=2, last=0.5)
    expected = []
    for x, rate in zip(inputs, (0.5, 1, 1, 0.875, 0.75, 0.625), strict=True):
        loss = second(x).square().mean()
        expected.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, [second.weight, second.bias])
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient, peak in zip(second.parameters(), gradients, (0.1, 0.3), strict=True):
                parameter -= rate * peak * gradient / norm.clamp(min=1)
    assert seen == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.bias, second.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(bad: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    losses = ((weight * factor).sum() for factor in (0.0, bad))
    with pytest.raises(UsageError, match=r"step 2.*weights are those of before"):
        descend(losses, [weight], [torch.optim.SGD([weight], lr=0.1)], steps=2, rise=0, last=0.0)
    assert torch.equal(weight.detach(), torch.ones(2))
