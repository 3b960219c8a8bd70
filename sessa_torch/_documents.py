"""Documents that lie behind each other in the rows of a batch and do not read each other.

`document_starts` (B, T) has, for each position of a row, the first position of its document.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_torch.cuda.device import OLDEST_CAPABILITY

# Query rows that a compiled graph masks at a time.
MASKED_ROWS = 256
# Rows and columns of the blocks of scores that flex attention computes or leaves out.
BLOCK = 128
# Widths of a head that the fused kernels take; those of flash attention are multiples of 8.
LEAST_WIDTH, MOST_WIDTH = 16, 256


def document_lengths(document_starts: Tensor) -> list[int]:
    """The lengths of all documents, row after row. The host waits for the device."""
    T = document_starts.shape[1]
    index = torch.arange(T, device=document_starts.device)
    starts = (document_starts == index).flatten().nonzero().flatten()
    end = starts.new_tensor([document_starts.numel()])
    lengths: list[int] = torch.diff(starts, append=end).tolist()
    return lengths


def document_attention(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, G, T, d)
    v: Tensor,  # (B, G, T, d)
    document_starts: Tensor,  # (B, T)
) -> Tensor:
    """Causal attention within each document, scale d^-1/2; (B, H, T, d).

    On CUDA one call of flash attention takes all documents, elsewhere each is a call of its own. A
    compiled graph does not know how many there are, so there blocks of scores that lie in no
    document are left out on CUDA, and elsewhere all are masked.
    """
    fused = _has_kernels(q)
    if torch.compiler.is_compiling():
        attend = block_sparse_attention if fused else _masked
        return attend(q, k, v, document_starts)
    B, H, T, _ = q.shape
    lengths = document_lengths(document_starts)
    joined = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B T, heads, d)
    attend_rows = _flash if fused else _one_by_one
    out = attend_rows(joined[0], joined[1], joined[2], lengths)
    return out.view(B, T, H, -1).transpose(1, 2)


def _has_kernels(q: Tensor) -> bool:
    """True where flash attention and flex attention have kernels for queries like q."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) < OLDEST_CAPABILITY:
        return False
    d = q.shape[-1]
    return q.itemsize == 2 and LEAST_WIDTH <= d <= MOST_WIDTH and d % 8 == 0


def _flash(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention of rows (n, heads, d) within documents of these lengths."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(q.device)
    longest = max(lengths)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, True, False
    )[0]
    return out


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """`_flash` for every type and device."""
    # The gradient of a split is one concatenation.
    parts = [x.split(lengths) for x in (q, k, v)]
    out = [_attend(*(x.transpose(0, 1)[None] for x in part)) for part in zip(*parts, strict=True)]
    return torch.cat([x[0].transpose(0, 1) for x in out])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal, grouped = q.shape[2] > 1, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor) -> Tensor:
    """`document_attention` by flex attention, which a compiled graph turns into a kernel."""
    # Importing it takes long, and only compiled graphs need it.
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def is_visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (key >= document_starts[b, row])

    T = q.shape[2]
    partly, partial, wholly, full = visible_blocks(document_starts)
    mask = BlockMask.from_kv_blocks(
        partly,
        partial,
        wholly,
        full,
        BLOCK_SIZE=BLOCK,
        mask_mod=is_visible,
        seq_lengths=(T, T),
    )
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out


# An operator of its own: what flex attention reads of a batch of several sequences is wrong in
# PyTorch 2.11 where its graph computes the indices too.
@torch.library.custom_op("sessa::visible_blocks", mutates_args=())
def visible_blocks(document_starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number (B, 1, n) and indices (B, 1, n, n) of the key blocks that n blocks of rows read.

    First those that are read in part, then those that every row reads whole. Indices behind the
    number mean nothing.
    """
    T = document_starts.shape[1]
    own = torch.arange(-(-T // BLOCK), dtype=torch.int32, device=document_starts.device)
    last_rows = (own * BLOCK + BLOCK - 1).clamp_max(T - 1)
    # Starts rise along a row, so the first row of a block reads farthest back.
    begin = document_starts[:, own * BLOCK] // BLOCK
    whole = torch.minimum((document_starts[:, last_rows] + BLOCK - 1) // BLOCK, own)
    # In part: those before the first whole one, and the row block's own.
    before = (whole - begin)[..., None]
    partly_read = torch.where(own < before, begin[..., None] + own, own[:, None])
    wholly_read = (whole[..., None] + own).clamp_max(len(own) - 1)
    partly, partial, wholly, full = (
        x.int()[:, None].contiguous()
        for x in (whole - begin + 1, partly_read, own - whole, wholly_read)
    )
    return partly, partial, wholly, full


@visible_blocks.register_fake
def _(document_starts):
    B, T = document_starts.shape
    n = -(-T // BLOCK)
    count = document_starts.new_empty(B, 1, n, dtype=torch.int32)
    indices = document_starts.new_empty(B, 1, n, n, dtype=torch.int32)
    return count, indices, torch.empty_like(count), torch.empty_like(indices)


def _masked(q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor) -> Tensor:
    """`document_attention` in blocks of MASKED_ROWS rows over the keys up to their last."""
    T, grouped = q.shape[2], q.shape[1] != k.shape[1]
    index = torch.arange(T, device=q.device)
    out = []
    for first in range(0, T, MASKED_ROWS):
        stop = min(first + MASKED_ROWS, T)
        rows, keys = index[first:stop, None], index[:stop]
        visible = (keys <= rows) & (keys >= document_starts[:, first:stop, None])
        own, seen, values = q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop]
        out.append(
            F.scaled_dot_product_attention(
                own, seen, values, attn_mask=visible[:, None], enable_gqa=grouped
            )
        )
    return torch.cat(out, 2)
