"""The emulator notices what a GPU would get wrong, and computes what Metal defines."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import torch
from metal_emulator import address_spaces
from metal_emulator.build import Launch, Library, compile_metal
from metal_emulator.mlx_side import emulated_metal_kernels
from metal_emulator.races import races
from metal_emulator.rewrite import MetalError, to_cpp
from metal_emulator.torch_side import emulated_shaders
from support.clang import needs_clang

HEADER = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
#define AT uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]
"""
MATRIX_PRODUCT = """
// c (m, n) = a (m, k) b (k, n); a threadgroup of two simdgroups owns 8 rows and 16 columns.
template <typename T>
kernel void product(const device T* a, const device T* b, device T* c, constant long* size,
                    uint3 group [[threadgroup_position_in_grid]],
                    uint tid [[thread_index_in_threadgroup]],
                    uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float as[8][8];
  threadgroup float bs[8 * 16];
  const int m = int(size[0]), n = int(size[1]), k = int(size[2]);
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), left, right;
  for (int k0 = 0; k0 < k; k0 += 8) {
    for (int e = tid; e < 64; e += 64) {
      const int r = group.y * 8 + e / 8, c = k0 + e % 8;
      as[e / 8][e % 8] = r < m && c < k ? float(a[r * k + c]) : 0.0;
    }
    for (int e = tid; e < 128; e += 64) {
      const int r = k0 + e / 16, c = group.x * 16 + e % 16;
      bs[e] = r < k && c < n ? float(b[r * n + c]) : 0.0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(left, &as[0][0], 8);
    simdgroup_load(right, bs + 8 * sg, 16);
    simdgroup_multiply_accumulate(sum, left, right, sum);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_store(sum, bs + 8 * sg, 16);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = tid; e < 128; e += 64) {
    const int r = group.y * 8 + e / 16, c2 = group.x * 16 + e % 16;
    if (r < m && c2 < n) c[r * n + c2] = T(bs[e]);
  }
}
#define NAMED(name, T) template [[host_name(name)]] [[kernel]] decltype(product<T>) product<T>;
NAMED("product_" "float", float)
NAMED("product_half", half)
NAMED("product_bfloat", bfloat)
"""
FAULTS = """
kernel void divergent_barrier(device float* x, AT) {
  if (i < 7) threadgroup_barrier(mem_flags::mem_threadgroup);
  x[i] = simd_sum(x[i]);
}
kernel void barrier_after_return(device float* x, AT) {
  if (i >= 40) return;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  x[i] = 1;
}
kernel void different_barriers(device float* x, AT) {
  if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup);
  else threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
}
kernel void divergent_sum(device float* x, AT) {
  if (lane < 5) x[i] = simd_sum(x[i]);
}
kernel void divergent_product(device float* x, AT) {
  simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  if (lane != 3) simdgroup_multiply(m, m, m);
  simdgroup_store(m, x);
}
kernel void read_past_the_end(device float* x, AT) { x[i] = x[i + 1]; }
kernel void write_past_the_end(device float* x, AT) { x[i + 1] = 0; }
kernel void write_before_the_start(device float* x, AT) { x[int(i) - 1] = 0; }
kernel void past_the_threadgroup_array(device float* x, AT) {
  threadgroup float shared[63];
  shared[i] = x[i];
}
kernel void before_the_threadgroup_array(device float* x, AT) {
  threadgroup float shared[64];
  shared[int(i) - 1] = x[i];
}
kernel void too_much_threadgroup_memory(device float* x, AT) {
  threadgroup float a[8192];
  threadgroup float b[1];
  a[i] = b[0] = x[i];
}
kernel void unwritten_threadgroup_memory(device float* x, AT) {
  threadgroup float shared[64];
  if (i != 9) shared[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  x[i] = shared[i];
}
"""
NOTICED = {
    "divergent_barrier": "divergent simdgroup operation",
    "barrier_after_return": "threadgroup_barrier after some threads returned",
    "different_barriers": "divergent threadgroup_barrier",
    "divergent_sum": "threads 0..4 wait at simd_sum",
    "divergent_product": "divergent simdgroup operation",
    "read_past_the_end": r"buffer\(0\) of 256 bytes at byte 256",
    "write_past_the_end": r"buffer\(0\) of 256 bytes at byte 256",
    "write_before_the_start": r"write before the start of buffer \[0\]",
    "past_the_threadgroup_array": "threadgroup variable shared, line .* at byte 252",
    "before_the_threadgroup_array": "write before the start of shared",
    "too_much_threadgroup_memory": "32784 bytes of threadgroup memory, the limit is 32768",
}
# Neighbours swap through threadgroup memory; the barrier is what makes it right.
SWAP = """
kernel void swap(device float* x, AT) {
  threadgroup float shared[64];
  shared[i] = x[i];
  BARRIER
  x[i] = shared[63 - i];
}
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TYPES = {"float": np.float32, "half": np.float16, "bfloat": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def library() -> Library:
    return compile_metal(HEADER + MATRIX_PRODUCT + FAULTS)


def values() -> np.ndarray:
    return np.arange(64, dtype=np.float32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_matrix_product(library: Library, kind: str, seed: int) -> None:
    dtype, size = TYPES[kind], (19, 37, 21)
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal(s).astype(dtype) for s in ((19, 21), (21, 37)))
    c = np.full((19, 37), np.nan, dtype)
    library.run(f"product_{kind}", [a, b, c, np.array(size)], (3 * 64, 3), (64, 1), seed=seed)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    error = np.linalg.norm(c.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error < float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize("name", NOTICED)
def test_fault_is_noticed(library: Library, name: str) -> None:
    with pytest.raises(MetalError, match=NOTICED[name]):
        library.run(name, [values()], (64,), (64,))


def test_unwritten_threadgroup_memory_is_nan(library: Library) -> None:
    x = values()
    library.run("unwritten_threadgroup_memory", [x], (64,), (64,))
    assert np.flatnonzero(np.isnan(x)).tolist() == [9]


def test_missing_barrier_gives_wrong_values_for_some_seed() -> None:
    def wrong(barrier: str) -> bool:
        library = compile_metal(HEADER + SWAP.replace("BARRIER", barrier))
        results = []
        for seed in range(4):
            x = values()
            library.run("swap", [x], (64,), (64,), seed=seed)
            results.append(np.array_equal(x, values()[::-1]))
        return not all(results)

    assert wrong("") and not wrong(BARRIER)


@pytest.mark.slow
def test_races_are_found_by_thread_sanitizer() -> None:
    """Without the barrier, and with one that orders the wrong memory; not with the right one."""

    def reports(barrier: str) -> set[str]:
        text = HEADER + SWAP.replace("BARRIER", barrier)
        return set(races([Launch(text, "swap", [values()], (64,), (64,))]))

    wrong_flag = BARRIER.replace("mem_threadgroup", "mem_device")
    assert reports(BARRIER) == set()
    assert reports("") == {"all memory", "threadgroup memory"}
    assert reports(wrong_flag) == {"threadgroup memory"}


def test_more_threads_than_a_threadgroup_holds(library: Library) -> None:
    with pytest.raises(MetalError, match="exceeds 1024 threads"):
        library.run("divergent_sum", [values()], (2048,), (2048,))


def test_unwritten_output_is_nan_through_both_frameworks() -> None:
    """The kernels leave element 2 of their output alone."""
    body = "if (thread_position_in_grid.x != 2) y[thread_position_in_grid.x] = x[0];"
    with emulated_metal_kernels():
        kernel = mx.fast.metal_kernel(
            name="gap", input_names=["x"], output_names=["y"], source=body
        )
        one = {"grid": (8, 1, 1), "threadgroup": (8, 1, 1), "output_shapes": [(8,)]}
        (y,) = kernel(inputs=[mx.ones((8,))], output_dtypes=[mx.float32], **one)
    assert np.flatnonzero(np.isnan(np.array(y))).tolist() == [2]

    text = HEADER + "kernel void gap(device float* y, AT) { if (i != 2) y[i] = lane; }"
    with emulated_shaders():
        out = torch.empty(8)
        torch.mps.compile_shader(text).gap(out, threads=[8], group_size=[8])
    assert torch.isnan(out).nonzero().flatten().tolist() == [2]


def test_torch_stand_in_ignores_strides() -> None:
    """A transposed tensor is its storage and a slice starts at its own offset, as with MPS."""
    text = HEADER + "kernel void add(device float* y, AT) { y[i] += i; }"
    with emulated_shaders():
        shader = torch.mps.compile_shader(text)
        square = torch.zeros(4, 4)
        shader.add(square.T, threads=[4], group_size=[4])
        shader.add(square[2:], threads=[4], group_size=[4])
    assert square[0].tolist() == square[2].tolist() == [0, 1, 2, 3] and square[1].sum() == 0


@pytest.mark.parametrize(
    "statement",
    [
        "bfloat b = x[i];",
        "x[i] = simd_sum(bfloat(x[i]));",
        "x[i] = exp(bfloat(x[i]));",
        "x[i] = min(int(i), i);",
        "simdgroup_matrix<float, 4, 4> m;",
    ],
)
def test_what_apples_compiler_refuses_is_refused(statement: str) -> None:
    with pytest.raises(MetalError, match="error:"):
        compile_metal(HEADER + f"kernel void k(device float* x, AT) {{ {statement} }}")


def test_half_and_bfloat_round_after_every_operation() -> None:
    text = HEADER + "kernel void k(device T* x, AT) { x[2] = x[0] + x[1]; x[3] = x[2] - x[0]; }"
    for kind, large in (("half", 2048), ("bfloat", 256)):
        x = np.array([large, 1, 0, 9], TYPES[kind])
        compile_metal(text.replace("T*", f"{kind}*")).run("k", [x], (1,), (1,))
        assert x.astype(float).tolist() == [large, 1, large, 0]


def test_threadgroup_variables_in_one_statement_are_refused() -> None:
    with pytest.raises(MetalError, match="one threadgroup variable a statement"):
        to_cpp("kernel void k(device float* x) { threadgroup float a[2], b[2]; }")


WRONG_SPACES = {
    "device pointer for a threadgroup parameter": "first(x);",
    "threadgroup array for a device parameter": "threadgroup float a[4]; second(a);",
    "write through constant": "c[0] = 1;",
    "constant pointer for a device parameter": "x[0] = third(c);",
    "double": "double d = x[0];",
    "unknown function": "x[0] = simd_total(x[0]);",
}
FUNCTIONS = """
inline float first(threadgroup float* p) { return p[0]; }
inline float second(device float* p) { return p[0]; }
inline float third(const device float* p) { return p[0]; }
"""


@needs_clang
@pytest.mark.parametrize("name", WRONG_SPACES)
def test_wrong_address_space_is_noticed(name: str) -> None:
    def text(statement: str) -> str:
        body = f"{{ threadgroup float own[4]; first(own); second(x); {statement} }}"
        return f"{HEADER}{FUNCTIONS}kernel void k(device float* x, constant float* c, AT) {body}"

    assert address_spaces.problems(text("")) == []
    assert address_spaces.problems(text(WRONG_SPACES[name])) != []


@needs_clang
def test_mlx_header_before_a_text_counts() -> None:
    """Its functions of bfloat can be called behind it, and its names are taken."""
    mlx = Path(mx.__file__).parent / "include"

    def text(declaration: str) -> str:
        kernel = "kernel void k(device bfloat* x, AT) { x[i] = abs(x[i]); }"
        return f"{HEADER}{declaration}{kernel}"

    assert address_spaces.problems(text(""), mlx) == []
    assert address_spaces.problems(text("")) != []
    assert address_spaces.problems(text("constant int Limits = 1;"), mlx) != []
    assert address_spaces.problems(text("inline double f() { return 1; }"), mlx) != []


def test_pointer_without_an_address_space_is_noticed() -> None:
    """Legal in the emulator's C++, an error in Metal; found without clang."""
    good = "inline float f(const device float* p, thread float& r) { return p[0] * r; }"
    assert address_spaces.bare_pointers(good) == []
    for bad in ("const float* p", "float &r"):
        assert address_spaces.bare_pointers(f"inline void f({bad}) {{}}") != []
