"""Fused attention kernels of PyTorch, called for some rows and some of the keys that they read.

Forward, a kernel gives the softmax means over these keys and the logarithm of their total, in
natural logarithms and float32 (float64 for float64). Backward, it takes the logarithm of the total
over all keys of a row, and the means over all of them. The operations lie behind
`scaled_dot_product_attention`, which keeps these logarithms to itself.

Letters: B batch, H heads, T rows, S keys, d head width. A causal call needs T = S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
# The widest head of the flash kernel.
FLASH_WIDTH = 256
# The efficient kernel reads the logarithms of so many rows at a time.
EFFICIENT_ROWS = 32


def attention_forward(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, H, S, d)
    v: Tensor,  # (B, H, S, d)
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the means (B, H, T, d) and the logarithms of the totals (B, H, T)."""
    if not q.is_cuda:
        flash_cpu = aten._scaled_dot_product_flash_attention_for_cpu
        out, log_total = flash_cpu(q, k, v, 0.0, causal, scale=scale)
    elif _takes_flash(q):
        flash = aten._scaled_dot_product_flash_attention
        out, log_total, *_ = flash(q, k, v, 0.0, causal, scale=scale)
    else:
        efficient = aten._scaled_dot_product_efficient_attention
        out, log_total, *_ = efficient(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, log_total.narrow(2, 0, q.shape[2])


def attention_backward(
    dout: Tensor,  # (B, H, T, d)
    q: Tensor,  # (B, H, T, d)
    out: Tensor,  # (B, H, T, d)
    log_total: Tensor,  # (B, H, T)
    k: Tensor,  # (B, H, S, d)
    v: Tensor,  # (B, H, S, d)
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these rows and keys add to the gradients of q, k and v."""
    T, S = q.shape[2], k.shape[2]
    if not q.is_cuda:
        flash_cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = flash_cpu(dout, q, k, v, out, log_total.contiguous(), 0.0, causal, scale=scale)
    elif _takes_flash(q):
        flash = aten._scaled_dot_product_flash_attention_backward
        found = flash(
            *(dout, q, k, v, out, log_total.contiguous()),
            *(None, None, T, S, 0.0, causal, *_no_dropout(q)),
            scale=scale,
        )
    else:
        # The kernel reads whole groups of rows; weights of rows that do not exist are then 0.
        padded = F.pad(log_total, (0, -T % EFFICIENT_ROWS), value=torch.inf).contiguous()
        efficient = aten._scaled_dot_product_efficient_attention_backward
        found = efficient(
            *(dout, q, k, v, None, out, padded, *_no_dropout(q)),
            *(0.0, [True, True, True, False], causal),
            scale=scale,
        )
    dq, dk, dv = found[:3]
    return dq, dk, dv


def _takes_flash(q: Tensor) -> bool:
    return q.itemsize == 2 and q.shape[-1] <= FLASH_WIDTH


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return a seed and an offset of random numbers, which are not read without dropout."""
    state = q.new_empty(2, dtype=torch.int64)
    return state, state
