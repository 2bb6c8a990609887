"""The head's gradient where the model is sure: 1 - p is then less than the step of bfloat16 at p."""

from __future__ import annotations

import pytest
import torch

import policies.model.head as head
from policies.native import kernels
from policies.native.sizes import PANEL

VOCABULARY, WIDTH, ROWS = 200, 48, 64


class HeadInTorch:
    """What the compiled head hands out, rounded where it rounds: the exponentials kept, and the slopes."""

    def pack_head(self, weight: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(-(-len(weight) // PANEL) * PANEL, weight.shape[1], dtype=weight.dtype)
        padded[: len(weight)] = weight
        return padded.view(-1, PANEL, weight.shape[1])

    def logits(self, hidden, packed, vocabulary, temperature):  # [n, panels, PANEL]
        z = torch.einsum("nk,pck->npc", hidden.float(), packed.float()) / temperature
        beyond = torch.arange(packed.shape[0] * PANEL).view(-1, PANEL) >= vocabulary
        return z.masked_fill(beyond, -torch.inf)

    def head_logp(self, hidden, packed, vocabulary, temperature, token, kept):
        z = self.logits(hidden, packed, vocabulary, temperature)
        peak = z.amax(2)
        kept.copy_((z - peak[:, :, None]).exp()[:, : len(kept)].transpose(0, 1))
        normaliser = z.flatten(1).double().logsumexp(1)
        logp = z.flatten(1).double().gather(1, token[:, None])[:, 0] - normaliser
        return logp.float(), normaliser.float(), peak

    def head_slope(self, hidden, packed, vocabulary, temperature, rows, kept):
        normaliser, factor = rows
        exponentials, peak = kept
        p = (self.logits(hidden, packed, vocabulary, temperature) - normaliser[:, None, None]).exp()
        count = len(exponentials)
        shift = (peak[:, :count] - normaliser[:, None]).exp()
        p[:, :count] = exponentials.transpose(0, 1).float() * shift[:, :, None]
        return (-factor[:, None] * p.flatten(1)[:, :vocabulary]).bfloat16()


def sure_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and head weights that bfloat16 holds, tokens of probability .98 to .9999, and slopes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).bfloat16().float()
    token = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    direction = weight[token] / weight[token].square().sum(1, keepdim=True)
    noise = torch.randn(ROWS, WIDTH, generator=generator) * 0.2
    height = torch.linspace(13, 17, ROWS)[:, None]
    hidden = (noise - (noise * weight[token]).sum(1, keepdim=True) * direction + height * direction).bfloat16().float()
    return hidden, weight, token, torch.randn(ROWS, generator=generator)


def exact(hidden, weight, token, slope, temperature):
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = (hidden @ weight.T / temperature).log_softmax(1).gather(1, token[:, None])[:, 0]
    return logp.detach(), torch.autograd.grad((logp * slope).sum(), (hidden, weight))


@pytest.mark.parametrize("columns", [64, 10_000])  # the whole vocabulary, and in parts
@pytest.mark.parametrize("path", ["torch", "compiled", "compiled, none kept"])
def test_the_slope_of_a_sure_token_is_rounded_once(monkeypatch, path, columns):
    monkeypatch.setattr(head, "CHUNK_LOGITS", {"cpu": columns * ROWS})
    if path == "torch":
        monkeypatch.setattr(head, "scoring_head_kernels", lambda *_: None)
    else:
        real = kernels()
        chosen = real if real is not None and real.bf16_head else HeadInTorch()
        monkeypatch.setattr(head, "scoring_head_kernels", lambda *_: chosen)
        monkeypatch.setattr(head, "KEPT", 0 if "none" in path else 2**27)
    hidden, weight, token, slope = sure_rows()
    logp, wanted = exact(hidden, weight, token, slope, 0.9)
    sure = logp.exp()
    assert sure.min() > 0.98 and sure.max() > 0.9999
    hidden.requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(
        (head.chunked_logp(hidden, weight, token, 0.9, torch.bfloat16) * slope).sum(), (hidden, weight)
    )
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() < 0.005 * want.norm()
    by_row = (found[0] - wanted[0]).norm(dim=1) / wanted[0].norm(dim=1)
    assert by_row[sure < 0.999].max() < 0.01  # beyond, logits of 20 in float32 do not hold 1 - p to a hundredth
