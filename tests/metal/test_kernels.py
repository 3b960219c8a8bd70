"""The Metal kernels, executed: the text that MLX compiles and the text that PyTorch compiles."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import torch
from metal_emulator import address_spaces
from metal_emulator.mlx_side import PREAMBLE, emulated_metal_kernels, to_mlx
from metal_emulator.races import races
from metal_emulator.torch_side import emulated_shaders
from support.clang import needs_clang
from support.metal_cases import (
    DTYPES,
    TWINS,
    Case,
    emulated,
    expected,
    forget_kernels,
    inputs,
    kernel_kind,
    plain,
    relative_error,
    solve_emulated,
)
from support.operands import draw_starts

import sessa_common
from sessa_common.reference.ops import feedback_solve, feedback_solve_backward
from sessa_mlx.feedback import blocked, metal

METAL = Path(sessa_common.__file__).parent / "kernels" / "feedback_solve.metal"
CASES = [
    Case(1, D=3, K=2),
    Case(1, D=3, K=2, P=1),
    Case(2, D=3, K=2, P=1),
    Case(1, B=2, P=70, masked=True),
    Case(2, B=2),
    Case(31),
    Case(32, B=2, masked=True),
    Case(33, P=40),
    Case(63, B=2, D=17, K=9),
    Case(130, B=2, P=7, masked=True),
    Case(257, D=33, K=40),
]
GAINS = [Case(63, gamma=gamma) for gamma in (0.0, -0.5, 0.999, -0.999)]

twins = pytest.mark.parametrize("twin", TWINS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def check_against_plain(
    twin: str, case: Case, dtype: str, *, block: int = 64, draws: int = 1
) -> None:
    """Output and every gradient: at most twice the error of plain arithmetic in that dtype.

    The few numbers of a small case say little; several draws of it are judged together.
    """
    cases = [replace(case, draw=draw) for draw in range(draws)]
    exact = [expected(case, dtype) for case in cases]
    unfused = [plain(case, dtype) for case in cases]
    computed = [emulated(twin, case, dtype, block=block)[0] for case in cases]
    for name in exact[0]:
        kernel, simple, wanted = ([r[name] for r in rs] for rs in (computed, unfused, exact))
        error, limit = relative_error(kernel, wanted), 2 * relative_error(simple, wanted)
        # Where plain arithmetic happens to be exact, as s = f, so must the kernel be.
        assert error <= limit, f"{name}: {error:.1e}, plain {dtype} arithmetic has {limit / 2:.1e}"


@twins
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twice_plain_arithmetic(twin: str, dtype: str, case: Case) -> None:
    check_against_plain(twin, case, dtype, draws=8 if case.B * case.T < 8 else 1)


@twins
@dtypes
@pytest.mark.parametrize("case", GAINS, ids=str)
def test_gains(twin: str, dtype: str, case: Case) -> None:
    check_against_plain(twin, case, dtype)


@twins
def test_whole_block_rows(twin: str) -> None:
    """The 256 rows of the real block, and two rows of the next one."""
    check_against_plain(twin, Case(258, D=18), "float32", block=TWINS[twin].BLOCK)


@twins
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [Case(140, B=2, P=5, masked=True), Case(135)], ids=str)
def test_two_blocks_a_row(twin: str, dtype: str, case: Case) -> None:
    """Sequences of 16 blocks and more take two blocks to a block row; the last row is cut."""
    check_against_plain(twin, case, dtype, block=8)


@twins
@pytest.mark.parametrize("P", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_one_new_token(twin: str, P: int, masked: bool) -> None:
    check_against_plain(twin, Case(1, B=9, D=40, K=33, P=P, masked=masked), "float32", draws=24)


@twins
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [Case(70, P=5, gamma=0.0), Case(1, P=40, gamma=0.0)], ids=str)
def test_without_gain_a_row_is_f_bit_for_bit(twin: str, dtype: str, case: Case) -> None:
    computed, _ = emulated(twin, case, dtype)
    np.testing.assert_array_equal(computed["s"], inputs(case, dtype)["f"].astype(np.float64))


@needs_clang
@pytest.mark.parametrize("case", [Case(9, P=5, masked=True), Case(1, P=100, masked=True)], ids=str)
def test_fast_math_removes_no_guard(case: Case) -> None:
    """Compiled for finite numbers only, rows and chunks that see nothing still give no NaN.

    PyTorch compiles the same functions so with PYTORCH_MPS_FAST_MATH=1.
    """
    safe, fast = (emulated("mlx", case, "float32", mode=mode)[0] for mode in ("", "fast"))
    for name, value in safe.items():
        assert relative_error([fast[name]], [value]) < 1e-6, name


@needs_clang
def test_fast_math_would_remove_a_comparison_with_infinity(monkeypatch) -> None:
    infinite = METAL.read_text().replace("LOWEST = -3.402823466e38f", "LOWEST = -INFINITY")
    assert infinite != METAL.read_text()
    monkeypatch.setattr(Path, "read_text", lambda *_: infinite)
    computed, _ = emulated("mlx", Case(1, P=100, masked=True), "float32", mode="fast")
    assert not np.isfinite(computed["s"]).all()


@twins
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", [Case(70, B=2, P=5, masked=True), Case(1, P=70)], ids=str)
def test_every_schedule_gives_the_same_bits(twin: str, dtype: str, case: Case) -> None:
    first, _ = emulated(twin, case, dtype, seed=0)
    for seed in range(1, 6):
        other, _ = emulated(twin, case, dtype, seed=seed)
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value, err_msg=f"{name}, seed {seed}")


def test_log_sum_exp() -> None:
    """lse equals the blocked path's, with +inf for a row that sees nothing, computed either way."""
    for case in (Case(70, B=2, P=5, masked=True), Case(1, B=2, P=6, masked=True)):
        given = {name: to_mlx(array) for name, array in inputs(case, "float32").items()}
        del given["ds"]
        _, lse = blocked.solve_forward(**given)
        assert np.isinf(np.array(lse)[0, 0])
        with mock.patch.object(metal, "BLOCK", 64), emulated_metal_kernels():
            forget_kernels(metal)
            _, computed = metal.solve_forward(**given)
            forget_kernels(metal)
        np.testing.assert_allclose(np.array(computed), np.array(lse), rtol=1e-6)


def test_mlx_compiles_the_shared_text() -> None:
    """Every kernel's text, as MLX exports it, holds the file."""
    shared = METAL.read_text()
    kinds = set()
    for case in (CASES[3], CASES[9]):
        _, launches = emulated("mlx", case, "float32")
        assert all(launch.text.count(shared) == 1 for launch in launches)
        kinds |= {kernel_kind(launch.name) for launch in launches}
    assert kinds == {"weights", "block", "score_grads", "step", "merge"}


def test_constants_are_those_of_the_text() -> None:
    text = METAL.read_text()
    declared = dict(re.findall(r"constexpr int (\w+) = (\d+);", text))
    for name, module in itertools.product(("THREADS", "COLUMNS", "CHUNK"), TWINS.values()):
        assert getattr(module, name) == int(declared[name])
    assert {module.BLOCK for module in TWINS.values()} == {int(declared["BLOCK_ROWS"])}


@needs_clang
def test_address_spaces() -> None:
    """Also with inputs of fewer than 8 elements, which MLX binds as constant, not device.

    MLX's texts come behind the header that its package ships.
    """
    header = Path(mx.__file__).parent / "include"
    assert address_spaces.problems(METAL.read_text()) == []
    texts = set()
    for case, dtype in ((CASES[0], "float32"), (CASES[1], "bfloat16"), (CASES[9], "bfloat16")):
        texts |= {launch.text for launch in emulated("mlx", case, dtype)[1]}
    texts = {text.removeprefix(PREAMBLE) for text in texts}
    assert any("const constant float*" in text for text in texts)
    found = {text: address_spaces.problems(text, header) for text in texts}
    assert {text: problems for text, problems in found.items() if problems} == {}


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.slow
@pytest.mark.parametrize("index", range(METAL.read_text().count(BARRIER)))
def test_every_barrier_is_needed(index: int) -> None:
    """ThreadSanitizer finds a race in some kernel when one barrier of the text is taken away."""
    pieces = METAL.read_text().split(BARRIER)
    without = BARRIER.join(pieces[: index + 1]) + ";" + BARRIER.join(pieces[index + 1 :])
    launches = {}
    for case in (Case(34, D=4, K=4), Case(1, D=4, K=4, P=40)):
        for launch in emulated("mlx", case, "float32")[1]:
            text = launch.text.replace(METAL.read_text(), without)
            launches[launch.name] = replace(launch, text=text)
    assert races(list(launches.values())) != {}


def test_a_strided_cache_is_read_in_place_by_pytorch() -> None:
    """Keys, states and mask as slices of larger buffers, as the cache holds them."""
    random = np.random.default_rng(2)
    f, q, gamma = (
        torch.from_numpy(random.standard_normal(n)) for n in ((3, 1, 6), (3, 1, 4), (3, 1))
    )
    keys, states = (torch.from_numpy(random.standard_normal((3, 50, n))) for n in (4, 6))
    mask = torch.from_numpy(random.random((3, 50)) > 0.3)
    exact = feedback_solve(
        *(x.numpy() for x in (f, q, keys[:, :41], gamma)),
        past_s=states[:, :40].numpy(),
        key_mask=mask[:, :41].numpy(),
    )
    f, q, gamma, keys, states = (x.float() for x in (f, q, gamma, keys, states))
    module = TWINS["torch"]
    forget_kernels(module)
    with emulated_shaders():
        s, _ = module.solve_forward(f, q, keys[:, :41], gamma, states[:, :40], mask[:, :41])
    forget_kernels(module)
    assert relative_error([s.double().numpy()], [exact]) < 1e-6


WIDE = ("f", "gamma", "ds", "past_s")


@twins
def test_two_types_in_float32(twin: str) -> None:
    """f and s in float32 with q and k in bfloat16, as in decoding: everything else in float32."""
    for case in (Case(70, B=2, P=5, masked=True), Case(1, B=2, P=40)):
        exact = expected(case, "bfloat16")
        computed, _ = emulated(twin, case, "bfloat16", wide=WIDE, precision="float32")
        for name in exact:
            # q, k and with them their gradients are rounded to bfloat16 at the end.
            limit = 3e-3 if name in ("dq", "dk") else 1e-6
            assert relative_error([computed[name]], [exact[name]]) < limit, name


@twins
def test_two_types_in_sixteen_bits(twin: str) -> None:
    """By default states and weights are multiplied in the type of q and k; s keeps float32."""
    case = Case(70, B=2, P=5)
    exact = expected(case, "bfloat16")
    computed, _ = emulated(twin, case, "bfloat16", wide=WIDE)
    for name in exact:
        assert relative_error([computed[name]], [exact[name]]) < 4e-3, name
    assert relative_error([computed["s"]], [exact["s"]]) > 1e-5
    without_gain, _ = emulated(twin, replace(case, gamma=0.0), "bfloat16", wide=WIDE)
    f = inputs(replace(case, gamma=0.0), "bfloat16")["f"]
    np.testing.assert_array_equal(without_gain["s"], f.astype(np.float64))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_documents_read_each_other_nowhere(dtype: str) -> None:
    """MLX's kernels take the first rows of the documents; PyTorch solves them one by one."""
    case = Case(150, B=2)
    starts = draw_starts(2, 2, 150, 30)
    exact = {n: a.astype(np.float64) for n, a in inputs(case, dtype).items()}
    ds = exact.pop("ds")
    given = {**inputs(case, dtype), "document_starts": starts}
    found, _ = solve_emulated("mlx", given, given.pop("ds"))
    results = [feedback_solve(**exact, document_starts=starts)]
    results += feedback_solve_backward(ds, **exact, document_starts=starts)[:4]
    limit = 1e-6 if dtype == "float32" else 4e-3
    for (name, got), want in zip(found.items(), results, strict=True):
        assert relative_error([got], [want]) < limit, name
