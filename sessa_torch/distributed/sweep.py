"""Sums over earlier rows, and their gradients, where the rows are dealt to several processes.

Forward, block by block: the owner of a block computes its values, the states of the solve, and
sends them with its keys; every process adds them to the sums of its own later rows. Backward, from
the last block on: the owner sends queries and output gradients, every process adds to the gradients
of its own earlier keys and values, and the gradients of the queries are summed at the owner. The
gradient of a value is the right-hand side of the transposed system. The next block is prepared
before the present one is added to all rows, so that sending and adding overlap.

Letters: N sequences and key heads, g query heads of a key head, T own rows, m rows of a block, K
key width, D value width. q (N, g, T, K); k (N, T, K); v (N, T, D). Sums are float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sessa_torch.cuda.device import unavailable_reason
from sessa_torch.distributed.deal import Deal
from sessa_torch.distributed.documents import Documents, Hide

# Scores that exist at a time: 64 MiB in float32, much of which stays in a cache.
MOST_SCORES = 2**24

Prepare = Callable[[int], None]


def work_type(x: Tensor) -> torch.dtype:
    """Return the type of sums over values of the type of x."""
    return torch.promote_types(x.dtype, torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b (N, r, c) in float32 at least; on CUDA a 16-bit b is multiplied in its type."""
    if b.is_cuda and b.itemsize == 2:
        return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(work_type(b)) @ b.to(work_type(b))


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `product` of a (N, r, m) and b (N, m, c) to sums (N, r, c)."""
    if b.is_cuda and b.itemsize == 2:
        a = a.to(b.dtype)
        torch.baddbmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums += product(a, b)


def has_kernels(x: Tensor) -> bool:
    """Return True where `sessa_torch.cuda.block_scores` takes tensors like x."""
    return unavailable_reason(x.device, x.dtype) is None


def masked_scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """Return scores (N, g, r, m) of q (N, g, r, K) and k (N, m, K), -inf where `hidden` is True.

    `hidden` is (r, m) or (N, 1, r, m).
    """
    g, r = q.shape[1:3]
    scores = product(q.flatten(1, 2), k.mT).mul_(q.shape[3] ** -0.5).unflatten(1, (g, r))
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def unread(m: int, device: torch.device) -> Tensor:
    """Return True (m, m) at the keys of a block that its rows do not read: own and later ones."""
    return torch.ones(m, m, dtype=torch.bool, device=device).triu()


class RunningSums:
    """Softmax-weighted sums of values for all own rows, while keys arrive block by block.

    `sum` (N, g, T, D) is divided by `total` (N, g, T, 1) at the end; weights are
    exp(score - `top`).
    """

    def __init__(self, q: Tensor, D: int) -> None:
        self.q = q
        shape, work = q.shape[:3], work_type(q)
        self.top = torch.full((*shape, 1), torch.finfo(work).min, dtype=work, device=q.device)
        self.total = torch.zeros_like(self.top)
        self.sum = torch.zeros(*shape, D, dtype=work, device=q.device)

    def add(self, rows: slice, k: Tensor, v: Tensor, hide: Hide | None) -> None:
        """Add keys (N, m, K) and values (N, m, D) to the sums of `rows`."""
        for part in chunks(rows, self.q.shape[0] * self.q.shape[1] * k.shape[1]):
            if hide is None and has_kernels(self.q):
                weights = self._weigh_by_kernel(part, k)
            else:
                weights = self.weigh(part, k, hide and hide(part, k.device))
            self._add(part, weights, v)

    def _add(self, rows: slice, weights: Tensor, v: Tensor) -> None:
        sums = self.sum[:, :, rows]
        if sums.shape[1] == 1:
            add_product(sums[:, 0], weights[:, 0], v)
        else:
            sums += product(weights.flatten(1, 2), v).unflatten(1, weights.shape[1:3])

    def _weigh_by_kernel(self, rows: slice, k: Tensor) -> Tensor:
        from sessa_torch.cuda.block_scores import block_weights

        q = self.q[:, :, rows]
        scores = product(q.flatten(1, 2), k.mT).unflatten(1, q.shape[1:3])
        top, total, sums = self.top[:, :, rows], self.total[:, :, rows], self.sum[:, :, rows]
        return block_weights(scores, top, total, sums, q.shape[3] ** -0.5, k.dtype)

    def weigh(self, rows: slice, k: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the weights (N, g, r, m) of keys (N, m, K), with `top` and `total` brought up."""
        scores = masked_scores(self.q[:, :, rows], k, hidden)
        old = self.top[:, :, rows]
        top = torch.maximum(old, scores.amax(-1, keepdim=True))
        weights, factor = scores.sub_(top).exp_(), torch.exp(old - top)
        self.total[:, :, rows] = self.total[:, :, rows] * factor + weights.sum(-1, keepdim=True)
        self.sum[:, :, rows] *= factor
        self.top[:, :, rows] = top
        return weights


def chunks(rows: slice, width: int) -> Iterator[slice]:
    """Yield parts of `rows` with at most MOST_SCORES scores of `width` each."""
    count = max(1, MOST_SCORES // width)
    for start in range(rows.start, rows.stop, count):
        yield slice(start, min(start + count, rows.stop))


class Exchange:
    """Messages between the processes of a `group` that share the rows of a `deal`.

    The rows have `documents` that do not read each other.
    """

    def __init__(
        self, deal: Deal, group: dist.ProcessGroup, documents: Documents | None = None
    ) -> None:
        self.deal, self.group = deal, group
        self.documents = Documents(deal) if documents is None else documents

    def hidden_inside(self, i: int, device: torch.device) -> Tensor:
        """Return True (m, m) or (N, 1, m, m) at keys of block i that a row of it does not read."""
        hidden = unread(self.deal.height(i), device)
        if self.documents.are_several:
            hidden = hidden | self.documents.hidden_inside(i, device)
        return hidden

    def send(
        self, i: int, parts: Callable[[slice], Sequence[Tensor]]
    ) -> Callable[[], list[Tensor]]:
        """Begin to send the parts of block i from its owner; return the call that waits for them.

        `parts` gives tensors (..., rows, width) of some own rows, of which the others learn types
        and widths from their own first row.
        """
        m, owner = self.deal.height(i), self.deal.owner(i)
        own = self.deal.owns(i)
        tensors = parts(self.deal.rows(i) if own else slice(0, 1))
        widths = [x.shape[-1] for x in tensors]
        # One message for each type, because sending many small tensors takes long.
        packed: dict[torch.dtype, Tensor] = {}
        for dtype in {x.dtype: None for x in tensors}:
            alike = torch.cat([x for x in tensors if x.dtype == dtype], -1)
            packed[dtype] = alike if own else alike.new_empty(*alike.shape[:-2], m, alike.shape[-1])
        waiting = [
            dist.broadcast(x, group=self.group, group_src=owner, async_op=True)
            for x in packed.values()
        ]

        def receive() -> list[Tensor]:
            for work in waiting:
                work.wait()
            unread = dict.fromkeys(packed, 0)
            found = []
            for x, width in zip(tensors, widths, strict=True):
                first = unread[x.dtype]
                unread[x.dtype] += width
                found.append(packed[x.dtype][..., first : unread[x.dtype]])
            return found

        return receive

    def collect(self, i: int, part: Tensor) -> Callable[[], Tensor | None]:
        """Begin to sum `part` at the owner of block i; return the call that waits for the sum.

        Only the owner gets it.
        """
        owner = self.deal.owner(i)
        work = dist.reduce(part, group=self.group, group_dst=owner, async_op=True)

        def receive() -> Tensor | None:
            work.wait()
            return part if self.deal.owns(i) else None

        return receive


def sweep_forward(
    exchange: Exchange, sums: RunningSums, k: Tensor, v: Tensor, prepare: Prepare
) -> None:
    """Add every block of keys and values to the sums of the own rows behind it.

    prepare(i) completes an own block when all earlier ones are in its sums: its values and the sums
    over its own keys.
    """
    deal, documents, T = exchange.deal, exchange.documents, k.shape[1]

    def send(i: int) -> Callable[[], list[Tensor]]:
        if deal.owns(i):
            prepare(i)
        if not documents.is_read(i):
            return list
        return exchange.send(i, lambda rows: (k[:, rows], v[:, rows]))

    def add(i: int, rows: slice, message: list[Tensor]) -> None:
        for part, hide in documents.readers(i, rows):
            sums.add(part, message[0], message[1], hide)

    waiting = send(0)
    for i in range(deal.count):
        message = waiting()
        following = i + 1 < deal.count
        if following:
            if deal.owns(i + 1):
                add(i, deal.rows(i + 1), message)
            waiting = send(i + 1)
        add(i, slice(deal.rows_through(i + 1 if following else i), T), message)


class Gradients:
    """Gradients of q, k and v, while the blocks of queries arrive from the last one on.

    `top`, `total` are those of `RunningSums`; `dout` (N, g, T, D) is the gradient of the weighted
    means and `delta` (N, g, T, 1) its product with them. A row does not read its own key.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        top: Tensor,
        total: Tensor,
        delta: Tensor,
        dv: Tensor,
    ) -> None:
        self.q, self.k, self.v, self.dout = q, k, v, dout
        self.top, self.total, self.delta = top, total, delta
        # A block of dq is rounded when it is whole.
        self.dq, self.dv = torch.zeros_like(q), dv
        self.dk = k.new_zeros(k.shape, dtype=work_type(k))

    def block(self, rows: slice) -> tuple[Tensor, ...]:
        """Return queries, output gradients, tops, totals and deltas of some own rows."""
        everything = (self.q, self.dout, self.top, self.total, self.delta)
        return tuple(x[:, :, rows] for x in everything)

    def add(self, message: list[Tensor], columns: slice, dq: Tensor, hide: Hide | None) -> None:
        """Add what the block of a message contributes to own keys and values, and to its dq."""
        q, *_ = message
        for part in chunks(columns, q.shape[0] * q.shape[1] * q.shape[2]):
            weights, dscores = self._scores(message, part, hide and hide(part, q.device))
            add_product(self.dv[:, part], weights.mT, message[1].flatten(1, 2))
            self._add_scores(dscores, q, part, dq)

    def add_own(self, message: list[Tensor], rows: slice, dq: Tensor, hidden: Tensor) -> None:
        """Add what an own block contributes to its own keys; its values have their gradients."""
        _, dscores = self._scores(message, rows, hidden)
        self._add_scores(dscores, message[0], rows, dq)

    def weights(self, q: Tensor, part: slice, top: Tensor, hidden: Tensor | None) -> Tensor:
        """Return exp(score - top) (N, g, m, columns) of some own keys."""
        return masked_scores(q, self.k[:, part], hidden).sub_(top).exp_()

    def _scores(
        self, message: list[Tensor], part: slice, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the weights and the gradients of the scores, (N, g m, columns)."""
        q, dout, top, total, delta = message
        dweights = product(dout.flatten(1, 2), self.v[:, part].mT)
        if hidden is None and has_kernels(q):
            return self._gradients_by_kernel(message, part, dweights)
        weights = self.weights(q, part, top, hidden).div_(total).flatten(1, 2)
        dscores = dweights.sub_(delta.flatten(1, 2)).mul_(weights).mul_(q.shape[3] ** -0.5)
        return weights, dscores

    def _gradients_by_kernel(
        self, message: list[Tensor], part: slice, dweights: Tensor
    ) -> tuple[Tensor, Tensor]:
        from sessa_torch.cuda.block_scores import block_gradients

        q, _, top, total, delta = message
        heads, scale = q.shape[1:3], q.shape[3] ** -0.5
        scores = product(q.flatten(1, 2), self.k[:, part].mT).unflatten(1, heads)
        dweights = dweights.unflatten(1, heads)
        weights, dscores = block_gradients(scores, dweights, top, total, delta, scale, q.dtype)
        return weights.flatten(1, 2), dscores.flatten(1, 2)

    def _add_scores(self, dscores: Tensor, q: Tensor, part: slice, dq: Tensor) -> None:
        add_product(self.dk[:, part], dscores.mT, q.flatten(1, 2))
        add_product(dq.flatten(1, 2), dscores, self.k[:, part])


def sweep_backward(exchange: Exchange, gradients: Gradients, prepare: Prepare) -> None:
    """Complete the gradients, from the last block of queries to the first.

    prepare(i) completes `dout` and `delta` of an own block when all later ones are in its dv.
    """
    deal, documents = exchange.deal, exchange.documents

    def send(i: int) -> Callable[[], list[Tensor]]:
        if deal.owns(i):
            prepare(i)
        if documents.reads(i):
            return exchange.send(i, gradients.block)
        return lambda: list(gradients.block(deal.rows(i))) if deal.owns(i) else []

    def add(i: int, keys: slice, message: list[Tensor], dq: Tensor) -> None:
        for part, hide in documents.keys_read(i, keys):
            gradients.add(message, part, dq, hide)

    def collect(i: int, dq: Tensor) -> Callable[[], Tensor | None]:
        if documents.reads(i):
            return exchange.collect(i, dq)
        return lambda: dq if deal.owns(i) else None

    def finish(i: int, receive: Callable[[], Tensor | None]) -> None:
        if (dq := receive()) is not None:
            gradients.dq[:, :, deal.rows(i)] = dq

    waiting = send(deal.count - 1)
    collecting: tuple[int, Any] | None = None
    for i in reversed(range(deal.count)):
        message = waiting()
        # A block that reads nothing before it is known to its owner alone.
        q = message[0] if message else gradients.q[:, :, :0]
        dq = torch.zeros_like(q, dtype=work_type(q))
        if i:
            if deal.owns(i - 1):
                add(i, deal.rows(i - 1), message, dq)
            waiting = send(i - 1)
        if deal.owns(i):
            hidden = exchange.hidden_inside(i, q.device)
            gradients.add_own(message, deal.rows(i), dq, hidden)
        add(i, slice(0, deal.rows_through(i - 2)), message, dq)
        if collecting is not None:
            finish(*collecting)
        collecting = i, collect(i, dq)
    assert collecting is not None
    finish(*collecting)
