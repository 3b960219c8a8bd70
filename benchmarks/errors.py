"""Measure the solve's errors and divide them by those of the T x T way in the same dtype.

    python benchmarks/errors.py [--device cuda] [--dtype bfloat16] [--save NAME]
                                [--shapes 2x777x0x96x80 ...] [--seeds 1] [--gains] [--sharp]

A shape is BxTxPxDxK.
Both are compared, outputs and gradients, with the blocked solve in float64 on the same inputs. A
sixth of the gains is 0, the others are between -0.999 and 0.999. Gains are float32, with --gains of
the type of the other inputs. "Logits" is the largest score; with --sharp it is the largest score of
every row, so that a row sees hardly more than one key. A mask hides 30 % of the keys. With several
seeds the errors are root mean squares over them, because one draw of a few rows varies a lot.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from feedback_solve import naive
from measure import machine, save, table
from torch import Tensor

from sessa_torch.feedback import feedback_solve

# B, T, P, D, K
SHAPES = [
    (2, 777, 0, 96, 80),
    (1, 1500, 0, 256, 256),
    (2, 300, 21, 72, 40),
    (1, 130, 1000, 64, 64),
    (2, 5, 700, 128, 96),
    (1, 2048, 0, 1024, 1024),
    (1, 300, 0, 2048, 2048),
    (300, 129, 0, 32, 32),
    (2, 333, 21, 50, 37),
]
LOGITS = (2, 20, 80)
NAMES = ("s", "df", "dq", "dk", "dgamma", "dpast_s")


def solved(backend: str) -> Callable[..., Tensor]:
    return lambda *x: feedback_solve(*x[:4], past_s=x[4], key_mask=x[5], backend=backend)


def results(way: Callable[..., Tensor], inputs: list[Any], mask: Any, ds: Tensor) -> list[Tensor]:
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    s = way(*leaves, mask)
    given = [x for x in leaves if x is not None]
    return [s.detach(), *torch.autograd.grad(s, given, ds.to(s.dtype))]


def draw_errors(
    options: argparse.Namespace, shape: tuple[int, ...], logits: float, masked: bool, seed: int
) -> Tensor:
    """Relative errors (2, outputs) of ours and of the T x T way for the inputs of one seed."""
    (B, T, P, D, K), device = shape, options.device
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    f, q, k, ds = normal(B, T, D), normal(B, T, K), normal(B, P + T, K), normal(B, T, D)
    gamma = torch.rand(B, T, generator=generator, device=device) * 1.998 - 0.999
    gamma[:, ::6] = 0
    scores = (q @ k.mT * K**-0.5).tril(P - 1).abs()
    top = scores.amax(-1, keepdim=True) if options.sharp else scores.max()
    q *= logits / top.clamp_min(1e-6)
    past = normal(B, P, D) if P else None
    mask = None
    if masked:
        mask = torch.rand(B, P + T, generator=generator, device=device) > 0.3
    inputs = [x if x is None else x.to(dtype) for x in (f, q, k, gamma, past)]
    inputs[3], ds = gamma.to(dtype) if options.gains else gamma, ds.to(dtype)
    exact = [x if x is None else x.double() for x in inputs]
    wanted = results(solved("blocked"), exact, mask, ds)
    return torch.tensor(
        [
            [((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item() for x, y in pairs]
            for pairs in (
                list(zip(results(way, inputs, mask, ds), wanted, strict=True))
                for way in (solved("auto"), naive)
            )
        ]
    )


def case(options: argparse.Namespace, shape: tuple[int, ...], logits: float, masked: bool) -> Any:
    drawn = [draw_errors(options, shape, logits, masked, seed) for seed in range(options.seeds)]
    errors = torch.stack(drawn).square().mean(0).sqrt().tolist()
    row: dict[str, Any] = dict(zip("BTPDK", shape, strict=True))
    row |= {"dtype": options.dtype, "logits": logits, "masked": masked}
    for name, ours, theirs in zip(NAMES, *errors, strict=False):
        row[name] = f"{ours:.1e} ({ours / max(theirs, 1e-12):.2f} x)"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", help="shapes to measure instead of all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--gains", action="store_true", help="draw the gains in --dtype instead of float32"
    )
    parser.add_argument(
        "--sharp", action="store_true", help="draw rows that see hardly more than one key"
    )
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    print(machine(), flush=True)
    shapes = SHAPES
    if options.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    rows = []
    for shape in shapes:
        for logits in LOGITS:
            for masked in (False, True):
                rows.append(case(options, shape, logits, masked))
                print(rows[-1], flush=True)
    print(table(rows))
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
