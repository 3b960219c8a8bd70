"""Time the whole Sessa mixer and the T x T way of the release, forward and forward+backward.

python benchmarks/mixer.py [--device cpu|cuda] [--dtype float32|bfloat16] [--shapes 1x4096x512x8]
                           [--compile]

A shape is BxTxDxH. A case is timed only after its output and every gradient were compared with the
T x T way in float64, at T <= 1024 with the same weights: the error may be at most twice that of the
T x T way in the same dtype.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import machine, median_ms, peak_mib, save, table
from torch import Tensor

from sessa_common.config import SessaConfig
from sessa_torch.attention import apply_rope, rope_tables
from sessa_torch.mixer import SessaMixer

CHECK_LENGTH = 1024
Mix = Callable[[SessaMixer, Tensor], Tensor]


def ours(mixer: SessaMixer, a: Tensor) -> Tensor:
    return mixer(a)


def dense(mixer: SessaMixer, a: Tensor) -> Tensor:
    """The T x T way: both score matrices in float32 and a general triangular solver."""
    config, (B, T, D) = mixer.config, a.shape
    work = torch.promote_types(a.dtype, torch.float32)
    q, k, v = (
        project(a).view(B, T, -1, config.head_dim).transpose(1, 2)
        for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    positions = torch.arange(T, device=a.device)[None]
    rope = rope_tables(positions, config.head_dim, config.rope_theta, a.dtype)
    future = torch.ones(T, T, dtype=torch.bool, device=a.device).triu(1)
    scores = (apply_rope(q, rope) @ apply_rope(k, rope).mT).to(work) * config.head_dim**-0.5
    f = torch.softmax(scores.masked_fill(future, -torch.inf), -1).to(a.dtype) @ v
    f = mixer.out_proj(f.transpose(1, 2).reshape(B, T, D))
    q, k = mixer.proj_fb(a).chunk(2, -1)
    past = torch.ones(T, T, dtype=torch.bool, device=a.device).tril(-1)
    scores = (q @ k.mT).to(work) * D**-0.5
    alpha = torch.softmax(scores.masked_fill(~past, -1e30), -1) * past
    N = mixer.gain(a)[..., None] * alpha
    s = torch.linalg.solve_triangular(-N, f.to(work), upper=False, unitriangular=True)
    return s.to(a.dtype)


def gradients(mix: Mix, mixer: SessaMixer, a: Tensor, ds: Tensor) -> dict[str, Tensor]:
    """The output "s" and the gradients of a and of every parameter."""
    leaf = a.detach().requires_grad_()
    s = mix(mixer, leaf)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    grads = torch.autograd.grad(s, [leaf, *parameters], ds)
    return {"s": s.detach(), "da": grads[0], **dict(zip(names, grads[1:], strict=True))}


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[str, float]:
    errors = {
        name: ((got[name].double() - want[name]).norm() / want[name].norm()).item() for name in want
    }
    return max(errors.items(), key=lambda item: item[1])


def check(mix: Mix, mixer: SessaMixer, a: Tensor, ds: Tensor) -> dict[str, Any]:
    """Compare with float64; raise when the errors of mix are above twice those of the T x T way."""
    a, ds = a[:, :CHECK_LENGTH], ds[:, :CHECK_LENGTH]
    exact = SessaMixer(mixer.config).to(a.device, torch.float64)
    exact.load_state_dict(mixer.state_dict())
    want = gradients(dense, exact, a.double(), ds.double())
    got, other = (gradients(way, mixer, a, ds) for way in (mix, dense))
    # A key bias shifts a whole row of scores, so its exact gradient is 0 and only rounding is left.
    rounding = ("k_proj.bias", "proj_fb.bias")
    name, error = worst_error(got, {k: v for k, v in want.items() if k not in rounding})
    limit = max(2 * worst_error(other, {name: want[name]})[1], 1e-6)
    if not error <= limit:
        raise SystemExit(f"not timed: {name} is off by {error:.1e}, allowed {limit:.1e}")
    return {"worst error": f"{error:.1e} ({name})", "allowed": f"{limit:.1e}"}


def case(shape: str, device: str, dtype: torch.dtype, ways: list[str]) -> list[dict[str, Any]]:
    B, T, D, H = map(int, shape.split("x"))
    torch.manual_seed(0)
    config = SessaConfig(hidden_size=D, num_attention_heads=H, max_position_embeddings=T)
    mixer = SessaMixer(config).to(device, dtype)
    a, ds = (torch.randn(B, T, D, device=device).to(dtype) for _ in range(2))
    rows = []
    for name in ways:
        mix = {"ours": ours, "compiled": torch.compile(ours), "T x T": dense}[name]
        checked = {} if mix is dense else check(mix, mixer, a, ds)

        def forward(mix: Mix = mix) -> Tensor:
            with torch.no_grad():
                return mix(mixer, a)

        def both(mix: Mix = mix) -> dict[str, Tensor]:
            return gradients(mix, mixer, a, ds)

        row = {"shape": shape, "way": name, "forward ms": round(median_ms(forward), 2)}
        row |= {"forward+backward ms": round(median_ms(both), 2)}
        row |= {"forward MiB": round(peak_mib(forward)), "both MiB": round(peak_mib(both))}
        rows.append(row | checked)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", default=["1x2048x512x8", "1x4096x512x8"])
    parser.add_argument("--no-dense", action="store_true", help="leave out the T x T way")
    parser.add_argument("--compile", action="store_true", help="also time the compiled mixer")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    print(machine())
    rows, dtype = [], getattr(torch, options.dtype)
    ways = ["ours"] + ["compiled"] * options.compile + ["T x T"] * (not options.no_dense)
    for shape in options.shapes:
        rows += case(shape, options.device, dtype, ways)
        print(table(rows[-len(ways) :]), flush=True)
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
