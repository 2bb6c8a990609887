"""Stand-ins for CUDA graphs on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from policies.engine import graphs, torch_store
from policies.engine.graphs import Replays


def recompute(step, inputs, size, pool):
    """What a captured graph does, without a graph: the same step on the same buffers into the same output."""
    out = step(inputs, size).clone()
    return (lambda: out.copy_(step(inputs, size))), out


def replayed(monkeypatch, capture) -> list[Replays]:
    """Makes every pure store decode through ``Replays`` in small buckets; the stores' replays, as they are made."""
    made: list[Replays] = []
    monkeypatch.setattr("policies.native.kernels", lambda: None)
    monkeypatch.setattr(graphs, "ROWS", 2)
    monkeypatch.setattr(torch_store, "LENGTH", 8)
    begin = torch_store.TorchStore.__init__

    def init(self, *arguments):
        begin(self, *arguments)
        self.replays = Replays(self.rows, self.device, capture)
        made.append(self.replays)

    monkeypatch.setattr(torch_store.TorchStore, "__init__", init)
    return made


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: torch_varlen.AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """FlashAttention's variable-length attention, sequence by sequence and head by head: query i of a sequence of q
    stands at place i + k - q of its k keys, and sees ``window_size`` keys to the left and right (-1: all)."""
    assert cu_seq_k is not None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.shape[1] % key.shape[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert len(query) == cu_seq_q[-1] and len(key) == len(value) == cu_seq_k[-1]
    assert key.stride(-1) == value.stride(-1) == 1
    sizes = cu_seq_k.diff() if seqused_k is None else seqused_k
    assert sizes.dtype == torch.int32 and (sizes <= cu_seq_k.diff()).all()
    assert max_q == cu_seq_q.diff().max()
    assert max_k == sizes.max() if seqused_k is None else max_k >= sizes.max()
    repeat, left, right = query.shape[1] // key.shape[1], *window_size
    out = []
    bounds = (x.tolist() for x in (cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], sizes))
    for q0, q1, k0, size in zip(*bounds, strict=True):
        k1 = k0 + size
        assert q1 > q0 and size > 0, "the kernel may not take a sequence without queries or keys"
        where = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        distance = where - torch.arange(k1 - k0)
        seen = (distance <= left if left >= 0 else True) & (-distance <= right if right >= 0 else distance == distance)
        heads = []
        for head in range(query.shape[1]):
            keys, values = key[k0:k1, head // repeat].float(), value[k0:k1, head // repeat].float()
            scores = query[q0:q1, head].float() @ keys.T * (query.shape[2] ** -0.5 if scale is None else scale)
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ values)
        out.append(torch.stack(heads, dim=1))
    return torch.cat(out).to(query.dtype)
