"""Corrections in prime-rl's loss and slime's function, by their signatures: gradients in closed form."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from integrations.corrections import prime_rl_loss, slime_tis
from registry import UsageError


@dataclass
class LossInputs:
    """As prime-rl documents it."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    """As prime-rl documents it."""

    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture
def prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import prime_rl.trainer.rl.loss  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("prime_rl.trainer.rl.loss")
        stand_in.LossOutputs = LossOutputs  # type: ignore[attr-defined]
        for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "prime_rl.trainer.rl.loss", stand_in)


def sequence(advantage: float, seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    logp, mu = -torch.rand(2, 9, generator=generator)
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    return LossInputs(logp.requires_grad_(), mu, None, torch.full((9,), advantage), mask)


@pytest.mark.usefixtures("prime_rl")
class TestPrimeRL:
    @pytest.mark.parametrize("advantage", [-0.7, 1.3])
    @pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 2.0, 9)])
    def test_the_gradient_of_each_correction(self, advantage: float, weights: Tensor | None) -> None:
        given = sequence(advantage)
        given.loss_weights = weights
        rho = (given.trainer_logprobs - given.inference_logprobs).exp().detach()
        whole = rho[given.loss_mask].prod()
        for correction, fields, weight in (
            ("none", {}, torch.ones(9)),
            ("token-is", {}, rho),
            ("truncated-is", {"level": "token", "cap": 1.1}, rho.clamp(max=1.1)),
            ("sequence-is", {}, whole.expand(9)),
            ("topr", {}, torch.ones(9) if advantage > 0 else whole.clamp(max=1.0).expand(9)),
        ):
            result = prime_rl_loss(given, correction=correction, **fields)
            (gradient,) = torch.autograd.grad(result.loss, given.trainer_logprobs)
            expected = -weight * advantage * given.loss_mask * (1.0 if weights is None else weights)
            torch.testing.assert_close(gradient, expected, msg=correction)
            mean = weight[given.loss_mask].mean()
            torch.testing.assert_close(result.metrics["correction_weight"], mean, msg=correction)

    def test_an_empty_sequence_has_no_loss(self) -> None:
        given = sequence(1.0)
        given.loss_mask = torch.zeros(9, dtype=torch.bool)
        assert prime_rl_loss(given).loss == 0.0

    def test_what_cannot_be_served(self) -> None:
        with pytest.raises(UsageError, match="whole group at once"):
            prime_rl_loss(sequence(1.0), correction="self-normalised")
        with pytest.raises(UsageError, match="old_logp"):
            prime_rl_loss(sequence(1.0), correction="ppo-clip")
        with pytest.raises(UsageError, match="did you mean 'token-is'"):
            prime_rl_loss(sequence(1.0), correction="token-iss")
        mixed = sequence(1.0)
        mixed.advantages = torch.linspace(0, 1, 9)
        with pytest.raises(UsageError, match="differ within a sequence"):
            prime_rl_loss(mixed)


class TestSlime:
    LENGTHS = (5, 3)

    def call(self, **arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
        """(pg_loss, what became of it, masks, metrics); masks leave out the second token of each sequence."""
        torch.manual_seed(0)
        self.old = [-torch.rand(n) for n in self.LENGTHS]
        self.mu = [-torch.rand(n) for n in self.LENGTHS]
        masks = [torch.ones(n) for n in self.LENGTHS]
        for mask in masks:
            mask[1] = 0
        loss = torch.randn(sum(self.LENGTHS), requires_grad=True)
        result, kept, metrics = slime_tis(
            types.SimpleNamespace(**arguments),
            pg_loss=loss,
            train_log_probs=self.old,
            rollout_log_probs=self.mu,
            loss_masks=masks,
            total_lengths=[9, 9],
            response_lengths=list(self.LENGTHS),
        )
        assert kept is masks
        return loss, result, masks, metrics

    def test_by_default_it_is_truncated_importance_sampling(self) -> None:
        loss, result, masks, metrics = self.call()
        rho = torch.cat([(old - mu).exp() for old, mu in zip(self.old, self.mu, strict=True)])
        weight = rho.clamp(max=2.0) * torch.cat(masks)
        torch.testing.assert_close(result, loss * weight)
        torch.testing.assert_close(metrics["correction_weight"], weight)
        (gradient,) = torch.autograd.grad(result.sum(), loss)
        torch.testing.assert_close(gradient, weight)

    def test_a_correction_of_whole_sequences(self) -> None:
        _, result, masks, _ = self.call(correction={"id": "geometric-mask", "low": 0.9, "high": 1.1})
        for part, old, mu, mask in zip(result.split(self.LENGTHS), self.old, self.mu, masks, strict=True):
            mean = ((old - mu) * mask).sum() / mask.sum()
            assert bool((part != 0).any()) == (0.9 <= mean.exp() <= 1.1)

    def test_what_cannot_be_served(self) -> None:
        for given, message in (
            ({"correction": "ppo-clip"}, "pi / pi_old"),
            ({"correction": "topr"}, "depends on advantages"),
            ({"correction": "m2po"}, "whole batch"),
            ({"correction": "sequence-is", "context_parallel_size": 2}, "whole sequence"),
        ):
            with pytest.raises(UsageError, match=message):
                self.call(**given)
        self.call(correction="token-is", context_parallel_size=2)
