"""The decode kernels in Triton's interpreter on the CPU, against float64.

One process of its own computes every case (this file run as a script).
"""

from __future__ import annotations

import json

import pytest
import torch
from support.interpreted import interpret, multiply_bfloat16, poison_workspaces, relative

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Types of keys, states and f.
TYPES = [
    (F32, F32, F32),
    (BF16, F32, F32),
    (F16, F32, F32),
    (BF16, BF16, BF16),
    (F16, F16, F16),
    (F32, BF16, F32),
    (BF16, F32, BF16),
    (F16, BF16, F32),
    (F32, F16, BF16),
]
# D and K.
WIDTHS = [(24, 40), (64, 64), (129, 33), (40, 300), (1100, 24)]
CASES = [
    (T, P, *WIDTHS[(i + j) % len(WIDTHS)], *TYPES[(3 * i + j) % len(TYPES)])
    for i, T in enumerate((1, 2, 7, 16))
    for j, P in enumerate((1, 16, 17, 63, 64, 200))
]
# s has the error of f's type; products of more rows than one with 16-bit states have theirs.
EPS = {F32: 2e-6, F16: 6e-4, BF16: 5e-3}


@pytest.fixture(scope="module")
def results() -> dict:
    return interpret(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_equals_float64(results, case):
    T, *_, states, f = case
    found = results["cases"][str(case)]
    rounded = T > 1 and states != F32
    assert found["s"] <= (max(EPS[states], EPS[f]) if rounded else EPS[f])
    assert found.get("wide", 0) <= EPS[f]
    assert found["lse"] <= (EPS[states] if rounded else 1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gain_a_row_is_f_bit_for_bit(results, case):
    assert results["cases"][str(case)]["without gain"] == 0


def test_a_length_on_the_device_gives_the_same_as_the_rows_themselves(results):
    assert results["live"] and max(results["live"].values()) <= 2e-6


def test_a_row_that_is_wider_than_is_held_takes_the_kernels_of_more_rows(results):
    assert results["wide row"] <= 2e-6


def test_caches_are_read_where_they_lie(results):
    """The kernels are given the very memory of the buffers, whatever the types."""
    assert results["copies"] == 0


def draw(T, P, D, K, keys, states, f, room=0, B=2):
    """Inputs of `decode` whose caches are the first rows of buffers; what is hidden is NaN."""
    generator = torch.Generator().manual_seed(T + P + D + K)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    k, past = normal(B, P + T + room, K).to(keys), normal(B, P + room, D).to(states)
    mask = torch.rand(B, P + T + room, generator=generator) > 0.4
    mask[0, : P + min(T, 3)] = False
    gamma = torch.rand(B, T, generator=generator) * 1.998 - 0.999
    gamma[1, ::3] = 0
    k[~mask], past[~mask[:, : P + room]] = torch.nan, torch.inf
    k[:, P + T :], past[:, P:] = torch.nan, torch.nan
    q, rows = (2 * normal(B, T, K)).to(keys), normal(B, T, D).to(f)
    return rows, q, k, gamma, past, mask


def exact(blocked, f, q, k, gamma, past, mask, P):
    """The solve in float64, with hidden keys and states of zero."""
    k, past, mask = k[:, : P + f.shape[1]], past[:, :P], mask[:, : P + f.shape[1]]
    k = k.double().masked_fill(~mask[..., None], 0)
    past = past.double().masked_fill(~mask[:, :P, None], 0)
    return blocked.solve_forward(f.double(), q.double(), k, gamma.double(), past, mask)


def compare(case, decode, blocked):
    T, P = case[:2]
    f, q, k, gamma, past, mask = draw(*case, room=9)
    want, want_lse = exact(blocked, f, q, k, gamma, past, mask, P)
    args = (f, q, k[:, : P + T], gamma, past[:, :P], mask[:, : P + T])
    s, lse = decode(*args)
    seen = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    idle = gamma == 0
    wide = {}
    if T > 1 and past.dtype != F32:
        wide["wide"] = relative(decode(*args, precision="float32")[0], want)
    return wide | {
        "s": relative(s, want),
        "lse": (lse[seen] - want_lse[seen]).abs().max().item() if seen.any() else 0.0,
        "without gain": int((s[idle] != f[idle]).sum()),
    }


def live(case, decode, blocked):
    """Error where the past's length lies on the device and the caches have room for more."""
    P = case[1]
    given = draw(*case, room=70)
    want, _ = exact(blocked, *given, P)
    return relative(decode(*given, length=torch.tensor(P, dtype=torch.int32))[0], want)


def copies(kernels, decode):
    """Count the launches whose keys or states lie elsewhere than in the buffers."""
    given, wrong = [], 0
    launch = kernels.prepared(kernels.combine_kernel).__class__.launch

    def record(self, grid, tensors, *rest):
        given.extend(x.data_ptr() for x in tensors)
        return launch(self, grid, tensors, *rest)

    kernels.prepared(kernels.combine_kernel).__class__.launch = record
    for case in CASES[::5]:
        given.clear()
        T, P = case[:2]
        f, q, k, gamma, past, _ = draw(*case, room=9)
        decode(f, q, k[:, : P + T], gamma, past[:, :P])
        wrong += k.data_ptr() not in given or past.data_ptr() not in given
    return wrong


def main():
    from sessa_torch.feedback import blocked
    from sessa_torch.feedback import cuda_decode as kernels

    poison_workspaces()
    multiply_bfloat16()
    decode = kernels.solve_few_rows
    results = {"cases": {str(case): compare(case, decode, blocked) for case in CASES}}
    lengths = [(T, P, 72, 40, BF16, F32, F32) for T in (1, 5) for P in (0, 1, 64, 130)]
    results["live"] = {str(case): live(case, decode, blocked) for case in lengths}
    results["copies"] = copies(kernels, decode)
    kernels.ONE_ROW_WIDTH = 64
    results["wide row"] = live((1, 90, 72, 40, BF16, F32, F32), decode, blocked)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
