"""Documents that lie behind each other in the rows of a batch and do not read each other.

`document_starts` (B, T) has, for each position of a row, the first position of its document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Query rows that a compiled graph masks at a time.
MASKED_ROWS = 256


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

    Each document is one call of the fused kernel. A compiled graph does not know the documents, so
    there blocks of rows are masked.
    """
    if torch.compiler.is_compiling():
        return _masked(q, k, v, document_starts)
    B, H, T, _ = q.shape
    lengths = document_lengths(document_starts)
    # (n, heads, d) for each document. The gradient of a split is one concatenation.
    parts = [x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)]
    out = [_attend(*(x.transpose(0, 1)[None] for x in part)) for part in zip(*parts, strict=True)]
    return torch.cat([x[0].transpose(0, 1) for x in out]).view(B, T, H, -1).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal, grouped = q.shape[2] > 1, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


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
