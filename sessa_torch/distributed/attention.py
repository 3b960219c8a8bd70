"""Attention over rows that are dealt to several processes, by PyTorch's fused kernels.

Keys and values travel in chunks of several blocks. For the own rows that read a chunk, a fused
kernel gives the softmax means over its keys and the logarithm of their total, which says how the
means over several chunks are merged. In the backward pass the kernel takes the logarithm of the
total over all keys of a row, and gives exactly what a chunk adds to the gradients. The next chunk
is sent while the present one is computed.

Letters: B batch, H query heads, G key heads, T own rows, S keys of a chunk, d head width; R
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sessa_torch.distributed.deal import Deal
from sessa_torch.distributed.documents import Documents
from sessa_torch.distributed.fused_attention import attention_backward, attention_forward
from sessa_torch.distributed.sweep import Exchange, work_type
from sessa_torch.model import QUADRATIC

# Keys that a process holds at a time: more make fewer passes over the sums of all rows.
MOST_KEYS = 16_384
# Fused kernels on CUDA or of 16 bits take head widths that are multiples of this.
WIDTH_MULTIPLE = 8
# PyTorch 2.13 has renamed them.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shared_attention(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, G, T, d)
    v: Tensor,  # (B, G, T, d)
    exchange: Exchange,
) -> Tensor:
    """Return causal attention of the own T rows over the rows of all processes, (B, H, T, d)."""
    d = v.shape[-1]
    _exchanges[id(exchange)] = exchange
    # Under autocast the norms of queries and keys may give another type than the projection of v.
    q, k = q.to(v.dtype), k.to(v.dtype)
    if (v.is_cuda or v.itemsize == 2) and (missing := -d % WIDTH_MULTIPLE):
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    out: Tensor = _SharedAttention.apply(q, k, v, d**-0.5, exchange)
    return out[..., :d]


@dataclass(frozen=True)
class Chunk:
    """Blocks of a deal whose keys travel together: as many for every process, from `first` on."""

    deal: Deal
    first: int
    blocks: int  # of one process

    @property
    def keys(self) -> int:
        """The number of keys S; only the last chunk may lack some of its rows."""
        block = self.deal.block
        return min(self.padded, self.deal.length - self.first * block)

    @property
    def padded(self) -> int:
        """The number of rows of whole blocks."""
        return self.blocks * self.deal.size * self.deal.block

    @property
    def own(self) -> slice:
        """The place of the chunk's rows among the own ones."""
        start = self.first // self.deal.size * self.deal.block
        return slice(start, self.deal.rows_through(self.first + self.blocks * self.deal.size - 1))

    def products(self, starts: Tensor) -> Iterator[tuple[slice, slice, bool]]:
        """Yield own rows, keys of the chunk that they read, and True for a causal square.

        Rows of a square read the keys up to their own one, and other rows read all these keys. They
        are rows of one document each, which begins at `starts` (length,).
        """
        deal, begin = self.deal, self.first * self.deal.block
        last = min(self.first + self.blocks * deal.size, deal.count)
        for i in range(self.first + deal.rank, last, deal.size):
            first, rows = i * deal.block, deal.rows(i)
            of_block = starts[first : first + deal.height(i)]
            if begin < first and of_block[0] < first:
                stop = rows.start + int((of_block == of_block[0]).sum())
                yield slice(rows.start, stop), self._keys(of_block[0], first), False
            for start, stop in pairwise(_bounds(of_block)):
                place = slice(first - begin + start, first - begin + stop)
                yield slice(rows.start + start, rows.start + stop), place, True
        end = begin + self.keys
        if end < deal.length and starts[end] < end:
            # Rows behind the chunk, of the document that reaches over its end.
            behind = end + int((starts[end:] == starts[end]).sum())
            rows = slice(self.own.stop, deal.rows_before(behind))
            if rows.start < rows.stop:
                yield rows, self._keys(starts[end], end), False

    def _keys(self, start: Tensor, stop: int) -> slice:
        """The keys of the chunk at the places from start to stop."""
        begin = self.first * self.deal.block
        return slice(max(int(start) - begin, 0), stop - begin)


def _bounds(starts: Tensor) -> list[int]:
    """The places where the documents of some rows begin, from 0 on, and the number of rows."""
    changes = torch.nonzero(starts.diff()).flatten() + 1
    return [0, *changes.tolist(), len(starts)]


def chunks_of(deal: Deal) -> list[Chunk]:
    """Return the chunks of a deal: MOST_KEYS keys at most, but a block of each process at least."""
    most = max(1, MOST_KEYS // (deal.size * deal.block))
    blocks = min(most, -(-deal.count // deal.size))
    return [Chunk(deal, first, blocks) for first in range(0, deal.count, blocks * deal.size)]


def _send(chunk: Chunk, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to send the own k and v (B, G, T, d) of a chunk; return the call that waits for all.

    It gives the keys and values (2, B, S, G, d) of all processes, in the order of the sequence.
    """
    size, (B, G, _, d), own = chunk.deal.size, k.shape, chunk.own
    part = k.new_zeros(1, 2, B, chunk.padded // size, G, d)
    for i, x in enumerate((k, v)):
        part[0, i, :, : own.stop - own.start] = x[:, :, own].transpose(1, 2)
    parts = part.new_empty(size, *part.shape[1:])
    work = _gather(parts, part, group=group, async_op=True)

    def receive() -> Tensor:
        work.wait()
        by_block = parts.unflatten(3, (chunk.blocks, -1))  # (R, 2, B, blocks, block, G, d)
        return by_block.movedim(0, 3).flatten(2, 4)[:, :, : chunk.keys]

    return receive


def _collect(chunk: Chunk, dkv: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to sum gradients of a chunk's keys and values at their owners.

    dkv (2, B, rows of whole blocks, G, d). Return the call that waits for the sums of the own rows.
    """
    size, own = chunk.deal.size, chunk.own
    by_block = dkv.unflatten(2, (chunk.blocks, size, -1))
    parts = by_block.movedim(3, 0).flatten(3, 4).contiguous()
    part = parts.new_empty(1, *parts.shape[1:])
    work = _reduce_scatter(part, parts, group=group, async_op=True)

    def receive() -> Tensor:
        work.wait()
        return part[0, :, :, : own.stop - own.start]

    return receive


def _heads(kv: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """Return keys and values (B, H, S, d) of kv (2, B, S, G, d), repeated for each query head."""
    k, v = kv.repeat_interleave(H // kv.shape[3], 3).transpose(2, 3)
    return k, v


def _products(chunk: Chunk, documents: Documents) -> Iterator[tuple[slice, slice, slice, bool]]:
    """Yield sequences of the batch and `Chunk.products` of them."""
    for b, starts in documents.by_sequence():
        for product in chunk.products(starts):
            yield b, *product


def _merge(out: Tensor, log_total: Tensor, part: Tensor, log_part: Tensor) -> None:
    """Add the means over further keys, (B, H, rows, d), to those over earlier ones, in place."""
    share = torch.sigmoid(log_part - log_total)[..., None]
    out.mul_(1 - share).addcmul_(part, share)
    log_total.copy_(torch.logaddexp(log_total, log_part))


# An operator takes numbers and tensors, so it finds the exchange by its id.
_exchanges: WeakValueDictionary[int, Exchange] = WeakValueDictionary()


# Selective checkpoints see one operator, and keep its result instead of that of each kernel.
@torch.library.custom_op("sessa::shared_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, exchange: int) -> tuple[Tensor, Tensor]:
    """Return the means (B, H, T, d) and the logarithms of the totals (B, H, T) of the own rows."""
    work = work_type(q)
    means = torch.zeros_like(q, dtype=work)
    # A finite number, because the difference of two infinite ones is not defined.
    log_total = q.new_full(q.shape[:3], torch.finfo(work).min, dtype=work)
    with torch.autocast(q.device.type, enabled=False):
        documents = _exchanges[exchange].documents
        for chunk, kv in _arriving(_exchanges[exchange], k, v):
            keys, values = _heads(kv, q.shape[1])
            for b, rows, seen, causal in _products(chunk, documents):
                part, log_part = attention_forward(
                    q[b, :, rows], keys[b, :, seen], values[b, :, seen], causal, scale
                )
                _merge(means[b, :, rows], log_total[b, :, rows], part, log_part)
    return _rows_first(means.to(v.dtype)), log_total


QUADRATIC.add(torch.ops.sessa.shared_attention.default)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, exchange: Exchange
    ) -> Tensor:
        out, log_total = torch.ops.sessa.shared_attention(q, k, v, scale, id(exchange))
        ctx.save_for_backward(q, k, v, out, log_total)
        ctx.scale, ctx.exchange = scale, exchange
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_total = ctx.saved_tensors
        dout = _rows_first(cotangents[0])
        dq = torch.zeros_like(q, dtype=work_type(q))
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        collecting: tuple[Chunk, Callable[[], Tensor]] | None = None

        def finish(chunk: Chunk, receive: Callable[[], Tensor]) -> None:
            dk[:, :, chunk.own], dv[:, :, chunk.own] = receive().transpose(2, 3)

        with torch.autocast(q.device.type, enabled=False):
            for chunk, kv in _arriving(ctx.exchange, k, v):
                products = _products(chunk, ctx.exchange.documents)
                dkv = _chunk_backward(chunk, products, kv, dout, q, out, log_total, dq, ctx.scale)
                if collecting is not None:
                    finish(*collecting)
                collecting = chunk, _collect(chunk, dkv, ctx.exchange.group)
        assert collecting is not None
        finish(*collecting)
        return dq.to(q.dtype), dk, dv, None, None


def _chunk_backward(
    chunk: Chunk,
    products: Iterable[tuple[slice, slice, slice, bool]],
    kv: Tensor,
    dout: Tensor,
    q: Tensor,
    out: Tensor,
    log_total: Tensor,
    dq: Tensor,
    scale: float,
) -> Tensor:
    """Add to dq what a chunk contributes; return the own rows' gradients of its keys and values.

    These are (2, B, rows of whole blocks, G, d).
    """
    (B, H, _, d), G = q.shape, kv.shape[3]
    keys, values = _heads(kv, H)
    dkv = dq.new_zeros(2, B, chunk.padded, H, d)
    dkeys, dvalues = dkv.transpose(2, 3)
    for b, rows, seen, causal in products:
        parts = attention_backward(
            dout[b, :, rows],
            q[b, :, rows],
            out[b, :, rows],
            log_total[b, :, rows],
            keys[b, :, seen],
            values[b, :, seen],
            causal,
            scale,
        )
        dq[b, :, rows] += parts[0]
        dkeys[b, :, seen] += parts[1]
        dvalues[b, :, seen] += parts[2]
    return dkv.unflatten(3, (G, -1)).sum(4)


def _arriving(exchange: Exchange, k: Tensor, v: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield chunks with their keys and values (2, B, S, G, d), and send the next one meanwhile."""
    todo = chunks_of(exchange.deal)
    waiting = _send(todo[0], k, v, exchange.group)
    for i, chunk in enumerate(todo):
        kv = waiting()
        if i + 1 < len(todo):
            waiting = _send(todo[i + 1], k, v, exchange.group)
        yield chunk, kv


def _rows_first(x: Tensor) -> Tensor:
    """Return x (B, H, T, d) whose rows lie one behind the other, as the fused kernels read them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
