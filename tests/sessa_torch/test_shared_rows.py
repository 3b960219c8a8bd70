"""Attention over chunks of keys that processes send each other: what is read, and by which call."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.operands import draw_starts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sessa_torch.distributed import attention
from sessa_torch.distributed.context import ContextParallel
from sessa_torch.distributed.deal import Deal
from sessa_torch.distributed.fused_attention import attention_backward, attention_forward
from sessa_torch.model import _kept


@pytest.mark.parametrize("length", [3, 5, 16, 37, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [1, 20, 1000])
@pytest.mark.parametrize("document", [1000, 9, 2])
def test_products_cover_every_earlier_key_once(length, size, most, document, monkeypatch):
    monkeypatch.setattr(attention, "MOST_KEYS", most)
    read = torch.zeros(length, length, dtype=torch.int64)
    starts = torch.tensor(draw_starts(length, 1, length, document)[0] * (document < 1000))
    for rank in range(min(size, length)):
        deal = Deal.of(length, rank, min(size, length))
        for chunk in attention.chunks_of(deal):
            keys = torch.arange(chunk.first * deal.block, length)[: chunk.keys]
            for rows, seen, causal in chunk.products(starts):
                pairs = torch.ones(len(deal.places[rows]), len(keys[seen]), dtype=torch.int64)
                places = deal.places[rows][:, None], keys[seen][None]
                read[places] += pairs.tril() if causal else pairs
    visible = torch.arange(length) >= starts[:, None]
    assert torch.equal(read, visible.long().tril())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 264])
def test_kernels_of_cuda_take_these_arguments(dtype, width):
    with FakeTensorMode():
        q, k = (torch.empty(2, 4, n, width, dtype=dtype, device="cuda") for n in (100, 300))
        out, log_total = attention_forward(q, k, k, False, 0.1)
        assert (out.shape, log_total.shape) == (q.shape, q.shape[:3])
        found = attention_backward(q, q, out, log_total, k, k, False, 0.1)
        assert [x.shape for x in found] == [q.shape, k.shape, k.shape]


@pytest.fixture
def context():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ContextParallel(1)
    dist.destroy_process_group()


def test_selective_checkpoints_repeat_no_shared_attention(context):
    q, k, v = (torch.randn(1, n, 12, 4, requires_grad=True) for n in (4, 2, 2))
    context.own(torch.zeros(1, 12))
    selective = partial(create_selective_checkpoint_contexts, _kept)
    kernel = mock.patch.object(attention, "attention_forward", side_effect=attention_forward)
    found, calls = [], []
    for options in ({"context_fn": selective}, {}):
        with kernel as counted:
            run = partial(checkpoint, context.attention, use_reentrant=False, **options)
            found.append(torch.autograd.grad(run(q * 2, k, v).sum(), (q, k, v)))
        calls.append(counted.call_count)
    assert 2 * calls[0] == calls[1]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
