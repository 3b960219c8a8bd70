"""The Triton kernels in Triton's interpreter on the CPU, against float64.

One process of its own computes every case (this file run as a script) and the tests read its
results. Nothing here needs a GPU.
"""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from support.interpreted import interpret, multiply_bfloat16, poison_workspaces, relative
from support.operands import draw_starts

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

CASES = {
    "one row": {"T": 1},
    "one row sees one": {"T": 1, "P": 1},
    "below a tile": {"T": 31, "D": 24},
    "a tile": {"B": 2, "T": 32},
    "past a tile": {"T": 33, "K": 40, "D": 8},
    "ring used again": {"T": 290, "K": 16, "D": 16},
    "rows of odd lengths": {"T": 70, "P": 5, "K": 13, "D": 7},
    "several chunks of gradients": {"T": 100, "chunk_tiles": 1},
    "past and mask": {"T": 70, "P": 37, "masked": True},
    "past of whole tiles": {"T": 40, "P": 64},
    "no descriptors": {"T": 70, "P": 5, "K": 13, "D": 7, "masked": True, "has_tma": False},
    "no descriptors, whole tiles": {"T": 128, "K": 32, "has_tma": False},
    "decode": {"T": 1, "P": 150, "D": 72, "masked": True},
    "decode a few": {"B": 2, "T": 16, "P": 33, "K": 40},
    "strided": {"T": 40, "P": 3, "strided": True},
    "logits to 80": {"T": 130, "K": 16, "D": 16, "logits": 80.0},
    "gamma 0": {"T": 40, "gamma": 0.0},
    "gamma 0.999": {"T": 65, "gamma": 0.999},
    "gamma -0.999": {"T": 65, "gamma": -0.999},
    "float16": {"T": 100, "half": True},
    "float16 past and mask": {"T": 70, "P": 37, "masked": True, "half": True, "logits": 8.0},
    "16-bit keys": {"T": 70, "P": 37, "masked": True, "types": ("float16", "float32")},
    "bfloat16 keys": {"B": 2, "T": 17, "P": 64, "K": 40, "types": ("bfloat16", "float32")},
    "16-bit keys without a past": {"T": 100, "types": ("bfloat16", "float32")},
    "two 16-bit types": {"T": 40, "P": 5, "D": 24, "types": ("float16", "bfloat16")},
    "rounded to bfloat16": {"T": 40, "P": 33, "K": 13, "D": 7, "precision": "bfloat16"},
    "widened to float32": {"T": 40, "P": 33, "half": True, "precision": "float32"},
    "documents": {"T": 290, "K": 16, "D": 16, "documents": 25},
    "long documents in several chunks": {"T": 130, "K": 16, "documents": 70, "chunk_tiles": 1},
    "documents without descriptors": {"T": 70, "K": 13, "documents": 5, "has_tma": False},
    "documents in float16": {"T": 100, "documents": 20, "half": True},
}
# Types whose errors are those of products with bfloat16 states.
COARSE = ("16-bit keys", "bfloat16 keys", "16-bit keys without a past")
LIMITS = {"logits to 80": 4e-6, "gamma 0.999": 1e-5}
LIMITS |= dict.fromkeys(("float16", "float16 past and mask", "widened to float32"), 1e-3)
LIMITS["documents in float16"] = 1e-3
LIMITS |= dict.fromkeys((*COARSE, "rounded to bfloat16"), 4.5e-3) | {"two 16-bit types": 6e-3}

HIDDEN = [
    {"T": 40, "P": 37},
    {"T": 5, "P": 40},
    {"T": 40, "P": 64, "half": True},
]


@pytest.fixture(scope="module")
def results() -> dict:
    return interpret(__file__)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_float64(results, name):
    errors = results[name]
    assert {"s", "df", "dq", "dk", "dgamma"} <= errors.keys()
    for what, error in errors.items():
        assert error <= LIMITS.get(name, 3e-6), what


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["T"] <= 70])
def test_without_gain_a_row_is_f_bit_for_bit(results, name):
    assert results["without gain"][name] == 0


def test_same_inputs_give_the_same_bits(results):
    assert results["same bits"] == 0


def test_rotation_and_its_gradient_equal_float64(results):
    for name, error in results["rope"].items():
        assert error <= 3e-7, name


def test_losses_and_gradients_equal_those_of_operations(results):
    for name, error in results["loss"].items():
        # The interpreter cuts bfloat16 off where a GPU rounds.
        assert error <= (8e-3 if "bfloat16" in name else 3e-6), name


def test_sums_over_blocks_of_shared_rows_equal_float64(results):
    for name, error in results["shared rows"].items():
        assert error <= 1e-6, name


def test_what_the_mask_hides_does_not_matter(results):
    assert len(results["hidden"]) == len(HIDDEN)
    assert not any(results["hidden"].values()), results["hidden"]


def test_no_row_of_a_few_changes_the_rows_before_it(results):
    assert results["causality"] == "kept"


def test_unavailable_says_why():
    from sessa_torch.feedback.cuda import unavailable_reason

    f = torch.zeros(1, 2, 4)
    assert "CUDA" in unavailable_reason(f, f)
    assert "float64" in unavailable_reason(f.double(), f.double())


def fake_kernel():
    """Stand-in for a Triton kernel on a GPU, as `launch` sees it; counts launches by their way."""
    launches = []

    def runs(way):
        return lambda *args, **options: launches.append((way, args)) or compiled

    compiled = MagicMock()
    compiled.__getitem__.side_effect = lambda grid: runs(("compiled", grid))
    names = ("x", "y", "y_blocks", "stride", "T", "K", "BLOCK")
    kernel = MagicMock(
        arg_names=names,
        params=[
            SimpleNamespace(
                name=name, is_constexpr=name in ("K", "BLOCK"), do_not_specialize=name == "T"
            )
            for name in names
        ],
    )
    kernel.__getitem__.side_effect = lambda grid: runs(("triton", grid))
    return kernel, launches


def fake_tensor(pointer=256, dtype=torch.bfloat16):
    device = SimpleNamespace(type="cuda", index=0)
    return SimpleNamespace(data_ptr=lambda: pointer, dtype=dtype, device=device)


def test_a_launch_finds_what_triton_would_compile_the_same(monkeypatch):
    from sessa_torch.cuda.launch import Prepared, blocks

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, launches = fake_kernel()
    x, y = fake_tensor(), fake_tensor(512, torch.float32)
    z, kernels = blocks(torch.zeros(2, 16), 1, 8), {}

    def ways(tensors=(x, y), stride=64, T=5, K=24):
        launches.clear()
        kernels.setdefault(K, Prepared(kernel, {"BLOCK": 16, "K": K, "num_warps": 4}))
        kernels[K].launch((7,), tensors, (z,), (stride, T))
        return launches[0]

    way, args = ways()
    assert way == ("triton", (7,))
    assert args[:2] == (x, y) and args[3:] == (64, 5)
    assert args[2] == TensorDescriptor(z.base, [2, 16], [16, 1], [1, 8])
    # All kernel arguments in the kernel's order, the grid filled up; a length is no reason.
    assert ways(T=6) == (("compiled", (7, 1, 1)), (x, y, z, 64, 6, 24, 16))
    for other in ({"stride": 65}, {"K": 25}, {"tensors": (x, fake_tensor())}):
        assert ways(**other)[0] == ("triton", (7,)), other
        assert ways(**other)[0] == ("compiled", (7, 1, 1)), other
    # An unaligned pointer is left to Triton every time.
    for _ in range(2):
        assert ways((x, fake_tensor(516)))[0] == ("triton", (7,))
    # On another device, aligned or not, only after that has become the current one.
    current, entered = [1], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])

    @contextlib.contextmanager
    def enter(device):
        entered.append(device.index)
        current[0] = device.index
        yield

    monkeypatch.setattr(torch.cuda, "device", enter)
    for other in (y, fake_tensor(516)):
        current[0] = 1
        ways((x, other))
    assert entered == [0, 0]


def test_aligned_copies_only_what_a_descriptor_cannot_read():
    from sessa_torch.cuda.launch import aligned

    x = torch.randn(3, 5, 48).bfloat16()
    for fits in (x, x[..., 8:40], x[:, 1:], x.transpose(0, 1)):
        assert aligned(fits) is fits
    for other in (x[..., 1:9], x[..., :20].contiguous(), x.mT, x[:, :1].expand(3, 5, 48)):
        y = aligned(other)
        assert torch.equal(y, other)
        assert y.stride(2) == 1 and all(x > 0 and x % 8 == 0 for x in y.stride()[:2])


def draw(
    B=None,
    T=40,
    K=24,
    D=40,
    P=0,
    masked=False,
    gamma=None,
    logits=None,
    strided=False,
    half=False,
    types=None,
    **_,
):
    generator = torch.Generator().manual_seed(T + P)
    B = B or (2 if masked else 1)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator)
        return torch.stack([x, x], -1)[..., 0] if strided else x

    f, q, k = normal(B, T, D), normal(B, T, K), normal(B, P + T, K)
    gain = torch.rand(B, T, generator=generator) * 1.998 - 0.999
    if gamma is not None:
        gain.fill_(gamma)
    if logits:
        q *= logits / (q @ k.mT * K**-0.5).abs().max()
    mask = None
    if masked:
        mask = torch.rand(B, P + T, generator=generator) > 0.4
        mask[0, : P + min(T, 4)] = False
    past = normal(B, P, D) if P else None
    if half:
        f, q, k, past = (x if x is None else x.half() for x in (f, q, k, past))
    if types:
        keys, states = (getattr(torch, name) for name in types)
        f, q, k, past = (
            f.to(states),
            q.to(keys),
            k.to(keys),
            past if past is None else past.to(states),
        )
    return f, q, k, gain, past, mask


def cuda_modules():
    """The modules of the forward and the backward pass, which import Triton."""
    from sessa_torch.feedback import cuda_backward, cuda_forward

    return cuda_forward, cuda_backward


def compare(case, kernels, blocked):
    args = draw(**case)
    ds = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(args[0].dtype)
    forward, backward = cuda_modules()
    backward.CHUNK_TILES = case.get("chunk_tiles", 16)
    forward.has_tma = backward.has_tma = lambda device: case.get("has_tma", True)
    forward.solve_plan.cache_clear()
    backward.gradient_kernels.cache_clear()
    rest = {"precision": case.get("precision", "auto")}
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in args]
    if "documents" in case:
        starts = torch.from_numpy(draw_starts(1, *args[0].shape[:2], case["documents"]))
        rest["document_starts"] = starts
        s64, lse64 = blocked.solve_forward(*exact[:4], document_starts=starts)
        given = (ds.double(), *exact[1:4], s64, lse64)
        wanted = blocked.solve_backward(*given, document_starts=starts)
    else:
        s64, lse64 = blocked.solve_forward(*exact)
        wanted = blocked.solve_backward(ds.double(), *exact[1:4], s64, lse64, *exact[4:])
    s, lse = kernels.solve_forward(*args, **rest)
    grads = kernels.solve_backward(ds, *args[1:4], s, lse, *args[4:], **rest)
    seen = torch.isfinite(lse64)
    assert torch.equal(torch.isfinite(lse), seen)
    names = ("df", "dq", "dk", "dgamma", "dpast_s")
    errors = {"s": relative(s, s64), "lse": relative(lse[seen], lse64[seen])}
    pairs = zip(names, grads, wanted, strict=True)
    return errors | {name: relative(x, y) for name, x, y in pairs if y is not None}


def without_gain(case, kernels):
    """Count the numbers of rows with gain 0 that are not those of f."""
    f, q, k, gain, past, mask = draw(**case)
    gain[:, ::3] = 0
    s, _ = kernels.solve_forward(f, q, k, gain, past, mask, case.get("precision", "auto"))
    return int((s != f)[gain == 0].sum())


def hidden_rows(kernels, **case):
    """Count the results that change when all that the mask hides is NaN, infinite or large."""
    f, q, k, gamma, past, mask = draw(masked=True, **case)
    P, found = past.shape[1], []
    ds = torch.randn(f.shape, generator=torch.Generator().manual_seed(1)).to(f.dtype)
    fillers = torch.tensor([float("nan"), float("inf"), 6e4])

    def fill(x, seen, hide):
        at = torch.randint(3, x.shape, generator=torch.Generator().manual_seed(2))
        return torch.where(seen[..., None], x, fillers[at].to(x.dtype) if hide else 0)

    for hide in (False, True):
        rows, keys, states = (
            fill(f, mask[:, P:], hide),
            fill(k, mask, hide),
            fill(past, mask[:, :P], hide),
        )
        s, lse = kernels.solve_forward(rows, q, keys, gamma, states, mask)
        grads = kernels.solve_backward(ds, q, keys, gamma, s, lse, states, mask)
        found.append((s.masked_fill(~mask[:, P:, None], 0), *grads))
    return sum(not torch.equal(x, y) for x, y in zip(*found, strict=True))


def shared_rows():
    """Errors of sums over blocks of keys and of their gradients, beside those in float64."""
    from sessa_torch.distributed.sweep import Gradients, RunningSums

    N, g, T, m, K, D = 2, 2, 21, 7, 5, 9
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (N, g, T, K), "k": (N, T, K), "v": (N, T, D), "dout": (N, g, T, D)}
    shapes |= {"delta": (N, g, T, 1), "top": (N, g, T, 1), "total": (N, g, T, 1)}
    drawn = {name: 2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["total"].abs_().add_(1)

    def results(dtype):
        x = {name: value.to(dtype) for name, value in drawn.items()}
        sums = RunningSums(x["q"], D)
        for i in range(3):
            block = slice(m * i, m * i + m)
            sums.add(slice(4 * i, T), x["k"][:, block], x["v"][:, block], None)
        stats = x["top"], x["total"], x["delta"]
        gradients = Gradients(x["q"], x["k"], x["v"], x["dout"], *stats, x["v"].clone())
        dq = torch.zeros(N, g, m, K, dtype=dtype)
        gradients.add(list(gradients.block(slice(5, 5 + m))), slice(2, 17), dq, None)
        return {
            **{"top": sums.top, "total": sums.total, "sum": sums.sum, "dq": dq},
            **{"dk": gradients.dk, "dv": gradients.dv},
        }

    found, wanted = results(torch.float32), results(torch.float64)
    return {name: relative(found[name], wanted[name]) for name in wanted}


def causality(kernels):
    """ "kept" if a row that is not finite changes no row before it, among few behind a past."""
    import numpy as np
    from support.edge_cases import Edges, check_causality

    def solve(arrays, ds):
        f, q, k, gamma, past = (
            torch.from_numpy(arrays[name]) for name in ("f", "q", "k", "gamma", "past_s")
        )
        return {"s": kernels.solve_forward(f, q, k, gamma, past)[0].numpy()}

    for what in ("f", "q", "k", "gamma"):
        for row in (0, 2, 5):
            check_causality(solve, Edges(6, 3), what, row, np.nan)
    return "kept"


def rope():
    """Errors of the rotary kernel and its gradient for widths and strides of several kinds."""
    from sessa_torch.attention import apply_rope, rope_tables
    from sessa_torch.cuda.rope import Rotation

    errors = {}
    for B, H, T, d, tables in ((2, 3, 37, 24, 2), (1, 2, 5, 2, 1), (2, 1, 65, 64, 1)):
        x = torch.randn(B, T, H, d).transpose(1, 2).requires_grad_()
        exact = x.detach().double().requires_grad_()
        cos, sin = rope_tables(torch.randint(0, 1000, (tables, T)), d, 1e4, torch.float32)
        y, wanted = Rotation.apply(x, cos, sin), apply_rope(exact, (cos.double(), sin.double()))
        dy = torch.randn(B, H, T, d)
        dx, wanted_dx = torch.autograd.grad(y, x, dy) + torch.autograd.grad(wanted, exact, dy)
        errors[f"{B, H, T, d}"] = relative(y.detach(), wanted.detach())
        errors[f"gradient of {B, H, T, d}"] = relative(dx, wanted_dx)
    return errors


def loss():
    """Errors of the loss's kernel for vocabularies of several blocks, against float64."""
    from sessa_torch.cuda.cross_entropy import losses_and_gradients

    errors = {}
    for n, V, dtype in ((5, 37, torch.float32), (2, 9000, torch.float32), (3, 40, torch.bfloat16)):
        logits, targets = (3 * torch.randn(n, V)).to(dtype), torch.randint(0, V, (n,))
        weights = torch.rand(n)
        exact = logits.double().requires_grad_()
        wanted = weights * torch.nn.functional.cross_entropy(exact, targets, reduction="none")
        (gradients,) = torch.autograd.grad(wanted.sum(), exact)
        got = losses_and_gradients(logits, targets, weights)
        errors[f"losses of {V} in {dtype}"] = relative(got, wanted.detach())
        errors[f"gradients of {V} in {dtype}"] = relative(logits, gradients)
    return errors


def main():
    import triton.language as tl

    from sessa_torch.feedback import blocked
    from sessa_torch.feedback import cuda as kernels

    poison_workspaces()
    multiply_bfloat16()
    # A short lead leaves fewer slots in the ring than the longest case has tiles, and that case has
    # more steps than are tried at once; chunks are small.
    forward, backward = cuda_modules()
    forward.LAG = forward.SHORT_LAG = 3
    forward.SEARCH = tl.constexpr(4)
    backward.CHUNK_ELEMENTS = 1
    results = {name: compare(case, kernels, blocked) for name, case in CASES.items()}
    short = {name: case for name, case in CASES.items() if case["T"] <= 70}
    results["without gain"] = {name: without_gain(case, kernels) for name, case in short.items()}
    args = draw(T=40, P=3)
    first, second = (kernels.solve_forward(*args)[0] for _ in range(2))
    results["same bits"] = int(not torch.equal(first, second))
    results["rope"] = rope()
    results["loss"] = loss()
    results["shared rows"] = shared_rows()
    results["causality"] = causality(kernels)
    results["hidden"] = {str(case): hidden_rows(kernels, **case) for case in HIDDEN}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
