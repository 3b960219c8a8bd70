"""New rows behind a past, on CUDA: a few against the memory's speed, pieces against products'.

    python benchmarks/decode.py [--out FOLDER]

Every case is first compared with float64; a case that fails is not timed. Times are medians of
replayed CUDA graphs. A graph runs the operator on several caches in turn, as the layers of a model
do, so that none of them is found in the L2 cache. "of copy" is the share of the bandwidth that a
copy of a large tensor reached in the same run, bytes read and written counted. "of product" is the
share of a large bfloat16 product's operations a second, for pieces of a prompt; beside it the time
with f and states in bfloat16 too, as in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from feedback_solve import ceiling, graphed
from measure import RESULTS, machine, median_ms, save, table
from torch import Tensor

from sessa_torch.feedback import blocked, feedback_solve

GIB = 2**30
LIMIT = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MIXED = (torch.bfloat16, torch.float32)
# B, T, P, D, K, types of keys and states.
CASES = [
    *((B, 1, P, 1024, 1024, *MIXED) for P in (16384, 131072) for B in (1, 8)),
    *((1, T, P, 1024, 1024, *MIXED) for P in (16384, 131072) for T in (2, 4, 8, 16)),
    *((1, 1, P, 1024, 1024, *MIXED) for P in (512, 2048)),
    (16, 1, 2048, 768, 768, *MIXED),
    (1, 1, 16384, 1100, 1000, *MIXED),
    (1, 1, 65536, 512, 64, *MIXED),
    (1, 1, 65536, 2048, 2048, *MIXED),
    (1, 1, 65536, 1024, 1024, torch.bfloat16, torch.bfloat16),
    (1, 16, 65536, 1024, 1024, torch.bfloat16, torch.bfloat16),
    (1, 1, 65536, 1024, 1024, torch.float32, torch.float32),
    (1, 16, 65536, 1024, 1024, torch.float32, torch.float32),
]
# T, P of pieces of a prompt, with keys in bfloat16 and f and states in float32.
PIECES = [(64, 16384), (512, 2048), (512, 16384), (2048, 14336), (4096, 12288), (16384, 0)]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.randn(GIB // 2, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), 20) * 1e3


def draw(B: int, T: int, P: int, D: int, K: int, keys: Any, states: Any, seed: int) -> list[Tensor]:
    """f, q, k, gamma and past_s; the caches are narrowed from buffers with room for more."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    gamma = torch.rand(B, T, generator=generator, device="cuda") * 1.998 - 0.999
    k = normal(B, P + T + 48, K, dtype=keys)[:, : P + T]
    past_s = normal(B, P + 64, D, dtype=states)[:, :P]
    return [normal(B, T, D), normal(B, T, K, dtype=keys), k, gamma, past_s]


def solve(
    f: Tensor, q: Tensor, k: Tensor, gamma: Tensor, past_s: Tensor, precision: str = "auto"
) -> Tensor:
    past = past_s if past_s.shape[1] else None
    return feedback_solve(f, q, k, gamma, past_s=past, backend="kernel", precision=precision)


def error(args: list[Tensor], precision: str = "auto") -> float:
    """Relative error of s against float64, sequence by sequence: the largest."""
    got, errors = solve(*args, precision).double(), []
    for b in range(len(got)):
        want, _ = blocked.solve_forward(*(x[b : b + 1].double() for x in args))
        errors.append(((got[b] - want[0]).norm() / want.norm()).item())
    return max(errors)


def case(shape: tuple, bandwidth: float) -> dict[str, Any]:
    B, T, P, D, K, keys, states = shape
    row: dict[str, Any] = {"B": B, "T": T, "P": P, "D": D, "K": K}
    row |= {"keys": str(keys)[6:], "states": str(states)[6:]}
    read = B * P * (K * keys.itemsize + D * states.itemsize)
    caches = [draw(*shape, seed) for seed in range(max(1, min(24, GIB // read)))]
    row["error"] = f"{(worst := error(caches[0])):.1e}"
    # One row multiplies in float32, more with operands of the states' type.
    if not worst <= LIMIT[states if T > 1 else torch.float32]:
        return row | {"us": "error too large, not timed"}

    @torch.no_grad()
    def layers() -> None:
        for cache in caches:
            solve(*cache)

    took = median_ms(graphed(layers), 20) / len(caches)
    row |= {"us": round(1e3 * took, 1), "TB/s": round(read / took / 1e9, 2)}
    return row | {"of copy": round(read / took * 1e3 / bandwidth, 2)}


def piece(T: int, P: int, rate: float) -> dict[str, Any]:
    args = draw(1, T, P, 1024, 1024, *MIXED, T + P)
    row: dict[str, Any] = {"T": T, "P": P}
    for precision, limit in (("auto", LIMIT[torch.bfloat16]), ("float32", LIMIT[torch.float32])):
        row[f"{precision} error"] = f"{(worst := error(args, precision)):.1e}"
        if not worst <= limit:
            row[f"{precision} ms"] = "error too large, not timed"
            continue
        run = torch.no_grad()(lambda: solve(*args, precision))  # noqa: B023
        row[f"{precision} ms"] = round(took := median_ms(graphed(run), 20), 3)
        if precision == "auto":
            row["of product"] = f"{4 * 1024 * T * (P + T / 2) / took * 1e3 / rate:.0%}"
    low = [x.bfloat16() for x in args]
    run = torch.no_grad()(lambda: solve(*low))
    return row | {"all bfloat16 ms": round(median_ms(graphed(run), 20), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    bandwidth, rate = copy_bandwidth(), ceiling()
    speeds = {"copy TB/s": round(bandwidth / 1e12, 2), "product TFLOP/s": round(rate / 1e12)}
    print(machine() | speeds, flush=True)
    rows, name = [], f"decode_cuda_{machine()['date']}"
    for shape in CASES:
        rows.append(case(shape, bandwidth))
        print(rows[-1], flush=True)
    pieces = []
    for T, P in PIECES:
        pieces.append(piece(T, P, rate))
        print(pieces[-1], flush=True)
    save(name, rows + pieces, options.out)
    head = ", ".join(f"{key} {value}" for key, value in (machine() | speeds).items())
    text = f"{head}\n\n{table(rows)}\n\n{table(pieces)}\n"
    (options.out / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
