"""Time the feedback solve, the T x T way, fused causal attention and a large matrix product.

    python benchmarks/feedback_solve.py [--quick | --shapes 8x2048x512 ...] [--out FOLDER]

A shape is BxTxD. Results are saved after every case. Every case is first compared with float64,
outputs and gradients; a case that fails is not timed.
On CUDA the times are medians of several calls in a row between two events, in bfloat16; "graph"
is the same call replayed from a CUDA graph, without the host's share. Attention has the same T,
width and dtype: cuDNN with heads of 128, flash with heads of 64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, machine, median_ms, peak_mib, save, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sessa_torch.feedback import blocked, feedback_solve

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
MUST = [(1, 16384, 1024), (4, 4096, 1024), (8, 2048, 512)]
SWEEP = [(1, 2**n, 1024) for n in (9, 10, 11, 12, 13, 15, 16, 17)]
CPU_CASES = [(1, T, 512) for T in (512, 1024, 2048, 4096)]
# The T x T way holds several float32 matrices of T x T.
NAIVE_UP_TO = 16384 if CUDA else 4096
# First rows that are compared where T is longer; without upstream gradients of later rows they do
# not depend on those.
PREFIX = 16384 if CUDA else 4096
LIMIT = 1e-2 if CUDA else 1e-5


def naive(
    f: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    past_s: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Solve as the author's release does: T x T matrices in float32, a triangular solver."""
    T, P = q.shape[1], k.shape[1] - q.shape[1]
    seen = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P - 1)
    if key_mask is not None:
        seen = seen & key_mask[:, None]
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    alpha = torch.softmax(scores.masked_fill(~seen, -1e30), -1) * seen
    rhs = f.float()
    if past_s is not None:
        rhs = rhs + gamma[..., None] * (alpha[..., :P] @ past_s.float())
    lower = torch.eye(T, device=q.device) - gamma[..., None] * alpha[..., P:]
    return torch.linalg.solve_triangular(lower, rhs, upper=False).to(f.dtype)


def inputs(B: int, T: int, D: int) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = [torch.randn(B, T, D, generator=generator, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    gamma = torch.rand(B, T, generator=generator, device=DEVICE) * 1.998 - 0.999
    return [x.requires_grad_() for x in (*draw, gamma)]


def errors(solve: Callable[..., Tensor], args: list[Tensor], backward: bool) -> list[float]:
    """Relative errors of s and of the gradients against float64, over the first PREFIX rows."""
    rows = min(PREFIX, args[0].shape[1])
    exact = [x.detach()[:, :rows].double() for x in args]
    s, lse = blocked.solve_forward(*exact)
    with torch.set_grad_enabled(backward):
        got = solve(*args)
    pairs = [(got.detach()[:, :rows], s)]
    if backward:
        ds = torch.zeros_like(got)
        ds[:, :rows].normal_()
        grads = torch.autograd.grad(got, args, ds)
        wanted = blocked.solve_backward(ds[:, :rows].double(), *exact[1:], s, lse)
        pairs += [(g[:, :rows], w) for g, w in zip(grads, wanted, strict=False) if w is not None]
    return [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]


def steps(run: Callable[..., Tensor], args: list[Tensor], backward: bool) -> Callable[[], Any]:
    """One forward call, or one forward and backward call."""
    if not backward:
        return torch.no_grad()(lambda: run(*args))
    ds = torch.randn_like(args[0])
    return lambda: torch.autograd.grad(run(*args), args, ds)


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """The call captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def attention(
    B: int, T: int, D: int, width: int, kind: SDPBackend, backward: bool
) -> Callable[[], Any]:
    """PyTorch's fused causal attention of the same T, width and dtype."""
    heads = [
        torch.randn(B, D // width, T, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
        for _ in range(3)
    ]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return steps(run, heads, backward)


def ceiling() -> float:
    """Operations a second of a large matrix product on random data."""
    n = 8192 if CUDA else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    return 2 * n**3 / median_ms(lambda: a @ a, warm=1, calls=5) * 1e3


def compared(prefix: str, took: float, cudnn: float) -> dict[str, Any]:
    return {f"{prefix}cuDNN ms": round(cudnn, 3), f"{prefix}of cuDNN": f"{took / cudnn:.2f} x"}


def case(B: int, T: int, D: int, backward: bool, rate: float) -> dict[str, Any]:
    args = inputs(B, T, D)
    ours, worst = errors(feedback_solve, args, backward), LIMIT
    row: dict[str, Any] = {"B": B, "T": T, "D": D, "pass": "fwd+bwd" if backward else "fwd"}
    row["error"] = f"{max(ours):.1e}"
    if T <= NAIVE_UP_TO:
        other = errors(naive, args, backward)
        row["naive error"] = f"{max(other):.1e}"
        worst = max(2 * max(other), 1e-6)
    if not max(ours) <= worst:
        return row | {"ms": "error too large, not timed"}
    # Long enough that the start of the host after a pause hardly counts.
    calls = max(1, min(200 if CUDA else 10, 2**32 // (B * T * T)))
    run = steps(feedback_solve, args, backward)
    # One call is enough, and already long, where T is very large.
    repeats, warm = (5, 1) if T <= 2**17 else (1, 0)
    took = median_ms(run, repeats, warm, calls)
    row |= {"ms": round(took, 3), "peak MiB": round(peak_mib(run))}
    row["of ceiling"] = f"{(7 if backward else 2) * B * T * T * D / took * 1e3 / rate:.0%}"
    if CUDA and T <= 2**17:
        cudnn = attention(B, T, D, 128, SDPBackend.CUDNN_ATTENTION, backward)
        flash = attention(B, T, D, 64, SDPBackend.FLASH_ATTENTION, backward)
        row |= compared("", took, median_ms(cudnn, warm=1, calls=calls))
        row["flash ms"] = round(median_ms(flash, warm=1, calls=calls), 3)
        if T <= 2**14:
            row["graph ms"] = round(median_ms(graphed(run), warm=1, calls=calls), 3)
            row |= compared(
                "graph ", row["graph ms"], median_ms(graphed(cudnn), warm=1, calls=calls)
            )
    if T <= NAIVE_UP_TO:
        run = steps(naive, args, backward)
        row |= {
            "naive ms": round(median_ms(run, repeats=3, warm=1), 2),
            "naive MiB": round(peak_mib(run)),
        }
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against T for batch 1, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    curves = (("ms", "cuDNN ms", "naive ms"), ("peak MiB", "naive MiB"))
    for side, names in zip(axes, curves, strict=True):
        for name in names:
            for kind in ("fwd", "fwd+bwd"):
                points = [
                    (r["T"], r[name])
                    for r in rows
                    if r["B"] == 1 and r["pass"] == kind and isinstance(r.get(name), (int, float))
                ]
                if points:
                    side.loglog(*zip(*sorted(points), strict=True), "o-", label=f"{name} {kind}")
        side.set_xlabel("T")
        side.legend(fontsize=7)
    axes[0].set_ylabel("ms")
    axes[1].set_ylabel("MiB above inputs and outputs")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(name: str, rows: list[dict[str, Any]], rate: float, folder: Path) -> None:
    """Write the rows as JSON and as a table."""
    save(name, rows, folder)
    head = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = f"{head}, {rate / 1e12:.2f} TFLOP/s in a product, {DTYPE}\n\n{table(rows)}\n"
    (folder / f"{name}.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="time only the three main cases")
    parser.add_argument("--shapes", nargs="+", help="shapes to time instead, as BxTxD")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rate = ceiling()
    print(machine() | {"product TFLOP/s": round(rate / 1e12, 2), "dtype": str(DTYPE)}, flush=True)
    shapes = MUST if CUDA else CPU_CASES
    if options.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    cases = [(shape, way) for shape in shapes for way in (False, True)]
    if CUDA and not (options.quick or options.shapes):
        cases += [(shape, way) for shape in SWEEP for way in (False, True)]
        cases += [((1, 2**18, 1024), True), ((1, 1_000_000, 1024), False)]
    rows, name = [], f"feedback_solve_{DEVICE}_{machine()['date']}"
    for shape, backward in cases:
        rows.append(case(*shape, backward, rate))
        print(rows[-1], flush=True)
        write(name, rows, rate, options.out)
    plot(rows, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
