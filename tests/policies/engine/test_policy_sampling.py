"""Tokens follow the distribution whose log-probabilities are reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from policies.engine.sampling import draw, uniforms


def logits_of(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("size", [5, 700, 3000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_tokens_follow_the_reported_distribution(size, temperature):
    count = 4000
    logits = logits_of(size)
    expected = (logits / temperature).double().softmax(-1)
    uniform = torch.from_numpy(uniforms(7, np.arange(count), np.full(count, 3)))
    token, logp = draw(logits.expand(count, -1).clone(), uniform, temperature)
    torch.testing.assert_close(logp.double(), expected[token].log(), atol=1e-5, rtol=1e-5)
    observed = np.bincount(token.numpy(), minlength=size)
    assert (observed[expected.numpy() == 0] == 0).all()
    frequent = expected.numpy() * count >= 5
    observed = np.append(observed[frequent], observed[~frequent].sum())
    wanted = np.append(expected[frequent].numpy(), 1 - expected[frequent].sum().item()) * count
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    if len(wanted) == 1:
        assert observed[0] == count
        return
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("size", [64, 4096, 49152])
def test_the_inverse_is_exact_at_the_edges(size):
    logits = torch.full((4, size), -torch.inf)
    logits[:, [3, size - 2]] = 5.0
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    token, logp = draw(logits, uniform, 1.0)
    assert token.tolist() == [3, 3, size - 2, size - 2]
    torch.testing.assert_close(logp, torch.full((4,), 0.5).log(), atol=1e-5, rtol=1e-5)


def test_greedy_reports_the_untempered_softmax():
    logits = logits_of(300).repeat(2, 1)
    token, logp = draw(logits.clone(), torch.zeros(2, dtype=torch.float64), 0.0)
    assert token.tolist() == [logits[0].argmax().item()] * 2
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1))


def test_uniforms_are_a_function_of_their_coordinates_and_uniform():
    episode, position = np.meshgrid(np.arange(300), np.arange(100))
    u = uniforms(1, episode.ravel(), position.ravel())
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert len(np.unique(u)) == u.size
    shuffled = np.random.default_rng(0).permutation(u.size)
    assert np.array_equal(uniforms(1, episode.ravel()[shuffled], position.ravel()[shuffled]), u[shuffled])
    assert not np.array_equal(uniforms(2, episode.ravel(), position.ravel()), u)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert (u >= 0).all() and (u < 1).all()
    assert uniforms(-5, np.array([-1]), np.array([0])).shape == (1,)
