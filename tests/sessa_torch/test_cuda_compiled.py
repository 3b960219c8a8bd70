"""The kernels of the solve, compiled for an H100 by Triton, which needs no GPU for that.

The interpreter allows more than the compiler, such as one name for tensors of two shapes.
"""

from __future__ import annotations

import pytest
import torch
from support.operands import draw_starts

pytest.importorskip("triton.tools.tensor_descriptor")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sessa_torch.cuda.launch import Prepared
from sessa_torch.feedback import cuda_backward, cuda_forward
from sessa_torch.feedback.cuda_sizes import HALF, SINGLE, SINGLE_GRADIENT

pytestmark = pytest.mark.slow
H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
B, T, WIDTH = 2, 700, 192


def compile_kernel(prepared, tensors, descriptors, numbers):
    """Compile the kernel of a launch with these arguments."""
    types = [f"*{TYPES[x.dtype]}" for x in tensors]
    for x in descriptors:
        shape = ", ".join(map(str, x.block_shape))
        types.append(f"tensordesc<{TYPES[x.base.dtype]}[{shape}]>")
    types += ["fp32" if isinstance(x, float) else "i32" for x in numbers]
    places = [p.name for p in prepared.kernel.params if not p.is_constexpr]
    constants = {p.name for p in prepared.kernel.params if p.is_constexpr}
    signature = dict(zip(places, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    given = {name: x for name, x in prepared.constants.items() if name in constants}
    rest = {name: x for name, x in prepared.constants.items() if name not in constants}
    source = ASTSource(
        fn=prepared.kernel,
        signature={p.name: signature[p.name] for p in prepared.kernel.params},
        constexprs=given,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(tensors))},
    )
    return triton.compile(source, target=H100, options=rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_of_the_solve_compile_with_documents(dtype, monkeypatch):
    launches = []
    monkeypatch.setattr(Prepared, "launch", lambda self, _, *rest: launches.append((self, *rest)))
    half = dtype == torch.bfloat16
    monkeypatch.setattr(cuda_forward, "solve_tiles", lambda *_: HALF if half else SINGLE)
    gradient = HALF if half else SINGLE_GRADIENT
    monkeypatch.setattr(cuda_backward, "gradient_tiles", lambda *_: gradient)
    cuda_forward.solve_plan.cache_clear()
    f, q, k = (torch.zeros(B, T, WIDTH, dtype=dtype) for _ in range(3))
    gamma, ds = torch.zeros(B, T), torch.zeros_like(f)
    starts = torch.tensor(draw_starts(0, B, T, 90))
    s, lse = cuda_forward.solve_forward(f, q, k, gamma, None, None, "auto", starts)
    cuda_backward.solve_backward(ds, q, k, gamma, s, lse, None, None, "auto", starts)
    names = [prepared.kernel.fn.__name__ for prepared, *_ in launches]
    assert names[:2] == ["solve_kernel"] * 2 and "products_kernel" in names
    for launch in launches:
        assert "cubin" in compile_kernel(*launch).asm
    cuda_forward.solve_plan.cache_clear()
