"""The auxiliary loss: its gradient against that of the exact KL, its place in the loop, its effect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents import ReFT
from agents.objective.consistency import CAP, Consistency
from agents.rollout import Rollout
from policies import Policy
from registry import UsageError, aggregations
from tests.oracles.policy_checkpoints import VOCABULARY, random_model
from tests.oracles.reft_agents import gradient_of

KEPT = (0, 1, 3)
PROMPT = torch.tensor([3, 9, 27, 81])


def every_next_token(policy: Policy, layers: tuple[int, ...] | None = None) -> torch.Tensor:
    """[V] log-probabilities of all tokens after the prompt."""
    tokens = torch.arange(VOCABULARY)[:, None]
    return policy.logprobs([PROMPT] * VOCABULARY, tokens, torch.ones_like(tokens, dtype=torch.bool), layers=layers)[
        :, 0
    ]


def gradient(policy: Policy) -> torch.Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    found = torch.cat([part.flatten() for part in parts])
    policy.model.zero_grad(set_to_none=True)
    return found


def near_model() -> Any:
    """A model whose layer 2 matters little, so that pi / mu stays below the cap."""
    model = random_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.1)
        model.model.layers[2].self_attn.o_proj.weight.mul_(0.1)
    return model


def pull(policy: Policy, coefficient: float) -> tuple[Consistency, torch.Tensor]:
    """Adds the loss's gradient on every token once, weighted by mu's probability of it: the expectation over what mu
    writes. Also returns the exact KL."""
    target, nested = every_next_token(policy).detach(), every_next_token(policy, KEPT)
    assert (target - nested).exp().max() < CAP
    tokens = torch.arange(VOCABULARY)[:, None]
    batch = Rollout(
        prompts=(PROMPT,) * VOCABULARY,
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        behavior_logp=nested.detach()[:, None],
        reward=torch.zeros(VOCABULARY),
        group=torch.arange(VOCABULARY),
        episodes=({},) * VOCABULARY,
    )
    loss = Consistency(coefficient)
    loss.backward(policy, KEPT, batch, target[:, None], nested.detach().exp()[:, None])
    return loss, (target.exp() * (target - nested)).sum()


def test_its_expected_gradient_is_that_of_the_kl_to_the_fixed_target() -> None:
    policy = Policy(near_model())
    loss, kl = pull(policy, 2.0)
    found = gradient(policy)
    kl.backward()
    exact = gradient(policy)
    assert exact.abs().max() > 1e-4
    torch.testing.assert_close(found, 2.0 * exact, rtol=1e-4, atol=1e-6)
    assert loss.spent()["time/consistency"] > 0


def mixed_batch() -> tuple[ReFT, Rollout]:
    """Groups of two, of which the target wrote one and one is stored."""
    learner = agent(consistency=1.5, correction="none", group_size=2, max_grad_norm=1e9)
    nested = learner.nesting.draw(learner.target, np.random.default_rng(0), 0)
    batch = learner.rollout(list(range(8)), nested, 1)
    return learner, replace(batch, by_target=batch.group == 1, age=(batch.group == 3).long())


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", {"id": "constant", "max_tokens": 9}])
@pytest.mark.parametrize("with_signal", [2, 5, 8])
def test_its_strength_is_the_same_whatever_has_a_signal(aggregation: Any, with_signal: int) -> None:
    """The mean over the completions that take part: those that mu wrote and the update scores."""
    learner, batch = mixed_batch()
    aggregate = learner.aggregation = aggregations.build(aggregation)
    advantage = torch.where(batch.group < with_signal, 1e-12, 0.0)  # no policy gradient to speak of
    nested, policy = learner.nesting.trainable(learner.target), learner.target
    learner.microbatch_tokens = 200
    gradient_of(learner, lambda: learner.update(batch, advantage, np.random.default_rng(0), nested))
    found = gradient(policy)
    part = batch.select(((batch.group < with_signal) & ~batch.by_target & (batch.age == 0)).nonzero()[:, 0])
    own = policy.logprobs(part.prompts, part.tokens, part.mask, layers=nested)
    with torch.no_grad():
        rho = (policy.logprobs(part.prompts, part.tokens, part.mask) - own).exp().clamp(max=CAP)
    (-1.5 * (aggregate(part.mask) * (rho - 1) * own).sum()).backward()
    expected = gradient(policy)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_steps_along_it_bring_the_nested_policy_to_the_target() -> None:
    policy = Policy(near_model())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.2)
    measured = []
    for _ in range(20):
        optimizer.zero_grad()
        measured.append(float(pull(policy, 1.0)[1].detach()))
        optimizer.step()
        policy.refresh()
    assert measured[0] > 1e-3 and measured[-1] < 0.3 * measured[0]


def agent(**arguments: Any) -> ReFT:
    return ReFT(
        "tiny",
        sampler={"id": "fixed", "layers": (3, 5, 7, 9)},
        **{"correction": "token-is", "problems_per_batch": 4, "learning_rate": 1e-3, **arguments},
    )


def test_its_cost_is_told_and_it_moves_the_weights() -> None:
    plain, pulled = agent(), agent(consistency=2.0)
    assert "time/consistency" not in plain.iterate()
    assert pulled.iterate()["time/consistency"] > 0
    assert any((a != b).any() for a, b in zip(plain.target.parameters(), pulled.target.parameters(), strict=True))


def test_it_does_nothing_where_nothing_is_skipped() -> None:
    plain, pulled = (ReFT("tiny", problems_per_batch=4, consistency=value) for value in (0.0, 1.0))
    for learner in (plain, pulled):
        learner.iterate()
    for a, b in zip(plain.target.parameters(), pulled.target.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_negative_weight_is_an_error() -> None:
    with pytest.raises(UsageError, match="consistency=-1"):
        agent(consistency=-1.0)
