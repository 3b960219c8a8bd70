"""The CUDA backend of the feedback solve: the inputs that it takes, and the file that solves them.

cuda_forward.py solves forward in time, cuda_backward.py computes the gradients, and cuda_decode.py
solves a few rows behind a past. They import Triton, so they are imported when they are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sessa_torch.cuda import device
from sessa_torch.feedback import blocked
from sessa_torch.feedback.cuda_sizes import DECODE_ROWS, SINGLE_SHARED


def unavailable_reason(f: Tensor, q: Tensor) -> str | None:
    """The reason why the kernels cannot run for these inputs, or None if they can."""
    reason = device.unavailable_reason(f.device, torch.promote_types(f.dtype, q.dtype))
    if reason is not None:
        return reason
    if f.shape[0] > device.MOST_SEQUENCES:
        return f"the batch has more than {device.MOST_SEQUENCES:,} sequences"
    is_single = torch.float32 in (f.dtype, q.dtype) and not device.is_interpreter()
    if is_single and device.shared_memory(f.device) < SINGLE_SHARED:
        return "float32 needs 128 KiB of shared memory, and a program has less on this GPU"
    return None


def solve_forward(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    precision: str = "auto",
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is float64, and +inf for a row that sees nothing.
    """
    if past_s is not None and _is_few(f, past_s):
        from sessa_torch.feedback import cuda_decode

        return cuda_decode.solve_few_rows(f, q, k, gamma, past_s, key_mask, precision)
    from sessa_torch.feedback import cuda_forward

    return cuda_forward.solve_forward(f, q, k, gamma, past_s, key_mask, precision, document_starts)


def solve_backward(
    ds: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    s: Tensor,  # (B, T, D)
    lse: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    precision: str = "auto",
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s."""
    if past_s is not None and _is_few(s, past_s):
        # In sums of few terms the errors of the kernels' products show.
        return blocked.solve_backward(ds, q, k, gamma, s, lse, past_s, key_mask)
    from sessa_torch.feedback import cuda_backward

    return cuda_backward.solve_backward(
        ds, q, k, gamma, s, lse, past_s, key_mask, precision, document_starts
    )


def _is_few(new: Tensor, past: Tensor) -> bool:
    """True if cuda_decode.py solves these new rows (B, T, D) behind the past (B, P, D)."""
    return new.shape[1] <= DECODE_ROWS and past.shape[1] > 0
