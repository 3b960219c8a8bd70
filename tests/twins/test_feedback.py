"""feedback_solve of both frameworks against the float64 reference, and its refusals."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.frameworks import FRAMEWORKS, MLX, TORCH
from support.golden_cases import relative_error
from support.operands import draw_operands
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sessa_common.reference import model as reference
from sessa_torch.feedback import blocked

LENGTHS = (1, 2, 15, 16, 17, 63, 130)
BACKENDS = ("naive", "blocked")
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda x: x.name)
backends = pytest.mark.parametrize("backend", BACKENDS)


def draw(seed, B=2, T=63, D=40, K=24, P=0, masked=False):
    """Random arguments in float64, the key mask (some rows see nothing) and a gradient of s."""
    mask = "blind" if masked else None
    arrays = draw_operands(seed, B=B, T=T, D=D, K=K, P=P, mask=mask, dtype=np.float64)
    if not P:
        del arrays["past_s"]
    return (
        arrays,
        arrays.pop("key_mask", None),
        np.random.default_rng([seed, 1]).normal(size=(B, T, D)),
    )


def wanted(arrays, key_mask, ds):
    solved = reference.feedback_solve(**arrays, key_mask=key_mask)
    names = ("f", "q", "k", "gamma", "past_s")
    grads = reference.feedback_solve_backward(ds, **arrays, key_mask=key_mask)
    return solved, {n: g for n, g in zip(names, grads, strict=True) if n in arrays}


def results(framework, backend, dtype, arrays, key_mask, ds):
    mask = None if key_mask is None else framework.array(key_mask)
    weight = framework.array(ds, dtype)

    def solve(**leaves):
        return framework.solve(**leaves, key_mask=mask, backend=backend)

    inputs = {name: framework.array(value, dtype) for name, value in arrays.items()}
    s = framework.numpy(solve(**inputs)).astype(np.float64)
    grads = framework.gradients(lambda **leaves: (solve(**leaves) * weight).sum(), arrays, dtype)
    return s, grads


def check(framework, backend, dtype, limit, arrays, key_mask, ds):
    s, grads = results(framework, backend, dtype, arrays, key_mask, ds)
    s_ref, grads_ref = wanted(arrays, key_mask, ds)
    assert relative_error(s, s_ref) <= limit
    for name, value in grads_ref.items():
        scale = max(np.abs(value).max(), 1e-3 * np.abs(ds).max())
        assert relative_error(grads[name], value, scale) <= limit, name


@frameworks
@backends
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("P", [0, 5])
@pytest.mark.parametrize("T", LENGTHS)
def test_outputs_and_gradients_equal_the_reference(framework, backend, T, P, masked):
    arrays, key_mask, ds = draw(T + P, T=T, P=P, masked=masked)
    check(framework, backend, "float32", 1e-4, arrays, key_mask, ds)
    if framework is TORCH:
        check(framework, backend, "float64", 1e-12, arrays, key_mask, ds)


@frameworks
@pytest.mark.parametrize("T", [255, 256, 257, 513])
def test_block_boundaries(framework, T):
    arrays, key_mask, ds = draw(T, T=T, P=3, D=12, K=8, masked=True)
    check(framework, "blocked", "float32", 2e-4, arrays, key_mask, ds)


@pytest.mark.parametrize("T", [60, 64, 65, 73])
def test_long_sequences_in_larger_blocks(monkeypatch, T):
    """Workspaces begin as NaN, as everything that PyTorch leaves uninitialised does here."""
    monkeypatch.setattr(blocked, "BLOCK", 4)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(5).isnan().all()
        for P in (0, 3):
            case = draw(T, T=T, P=P, D=12, K=8, masked=True)
            check(TORCH, "blocked", "float64", 1e-12, *case)
    finally:
        torch.use_deterministic_algorithms(False)


@frameworks
@backends
@pytest.mark.parametrize("gain", [0.0, -0.999, 0.999], ids=lambda g: f"gamma{g}")
def test_extreme_gains(framework, backend, gain):
    arrays, key_mask, ds = draw(3, T=130)
    arrays["gamma"] = np.full_like(arrays["gamma"], gain)
    check(framework, backend, "float32", 1e-3, arrays, key_mask, ds)


@frameworks
@backends
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_gain_a_row_is_f_bit_for_bit(framework, backend, dtype, precision):
    arrays, _, _ = draw(12, T=70, P=5)
    arrays["gamma"][:, ::2] = 0
    typed = {n: framework.array(x, dtype if n in "qk" else "float32") for n, x in arrays.items()}
    s = framework.numpy(framework.solve(**typed, backend=backend, precision=precision))
    f = framework.numpy(typed["f"])
    np.testing.assert_array_equal(s[:, ::2], f[:, ::2])
    assert (s[:, 1::2] != f[:, 1::2]).any()


@frameworks
@backends
def test_logits_up_to_eighty(framework, backend):
    arrays, key_mask, ds = draw(4, T=63)
    scores = arrays["q"] @ arrays["k"].swapaxes(1, 2) / 24**0.5
    arrays["q"] *= 80 / np.abs(scores).max()
    check(framework, backend, "float32", 1e-3, arrays, key_mask, ds)


def by_matrices(arrays, ds):
    """s and the gradients of f, q, k, gamma in float32 from T x T matrices and autograd."""
    f, q, k, gamma = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in arrays)
    hidden = torch.ones(f.shape[1], f.shape[1], dtype=torch.bool).triu()
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -1e30)
    N = gamma[..., None] * torch.softmax(scores, -1).masked_fill(hidden, 0)
    s = torch.linalg.solve_triangular(torch.eye(f.shape[1]) - N, f, upper=False)
    return s, *torch.autograd.grad(s, (f, q, k, gamma), torch.tensor(ds, dtype=torch.float32))


@frameworks
@pytest.mark.parametrize("logits", [2.0, 20.0, 80.0])
@pytest.mark.parametrize("T", [200, 400])
def test_errors_are_those_of_the_matrix_way(framework, T, logits):
    """Root mean squares: neither the sums nor a stored log-sum-exp may cost digits."""
    arrays, _, ds = draw(T, B=4, T=T, D=32, K=32)
    arrays["q"] *= logits / np.abs(arrays["q"] @ arrays["k"].swapaxes(1, 2) / 32**0.5).max()
    arrays = {name: x.astype(np.float32).astype(float) for name, x in arrays.items()}
    ds = ds.astype(np.float32).astype(float)
    s_ref, grads_ref = wanted(arrays, None, ds)
    s, grads = results(framework, "blocked", "float32", arrays, None, ds)
    theirs = by_matrices(arrays.values(), ds)
    ours, exact = [s, *grads.values()], [s_ref, *grads_ref.values()]
    for name, x, y, z in zip(("s", *grads), ours, theirs, exact, strict=True):
        allowed = 2 * np.linalg.norm(y.detach().numpy() - z)
        assert np.linalg.norm(x - z) <= allowed, name


@frameworks
@backends
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_only_inputs_and_output(framework, backend, dtype):
    arrays, key_mask, ds = draw(5, T=130, masked=True)
    arrays["gamma"] *= 0.9
    low = {n: framework.numpy(framework.array(x, dtype)).astype(float) for n, x in arrays.items()}
    s, grads = results(framework, backend, dtype, low, key_mask, ds)
    s_ref, grads_ref = wanted(low, key_mask, ds)
    eps = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert relative_error(s, s_ref) <= eps
    # The incoming gradient of s is rounded to the dtype as well.
    for name, value in grads_ref.items():
        assert relative_error(grads[name], value) <= 4 * eps, name


@frameworks
@backends
def test_float32_states_with_half_precision_keys(framework, backend):
    arrays, _, _ = draw(6, T=17, P=5)
    typed = {
        n: framework.array(x, "bfloat16" if n in "qk" else "float32") for n, x in arrays.items()
    }
    exact = {n: framework.numpy(x).astype(float) for n, x in typed.items()}
    s = framework.solve(**typed, backend=backend)
    assert relative_error(framework.numpy(s), reference.feedback_solve(**exact)) <= 1e-5


@frameworks
@backends
@pytest.mark.parametrize("T", [31, 32, 33, 255, 257])
def test_uniform_routing_is_the_gamma_ratio(framework, backend, T):
    """Corollary F.2: K[tau + l, tau] = g Gamma(tau+1)/Gamma(tau+1+g) Gamma(t+g)/Gamma(t+1)."""
    from math import lgamma

    g, tau = 0.7, 3
    f = np.zeros((1, T, T))
    f[0] = np.eye(T)
    zeros = np.zeros((1, T, 4))
    gamma = np.full((1, T), g)
    inputs = {"f": f, "q": zeros, "k": np.random.default_rng(0).normal(size=(1, T, 4))}
    arrays = {n: framework.array(x, "float32") for n, x in (inputs | {"gamma": gamma}).items()}
    K = framework.numpy(framework.solve(**arrays, backend=backend))[0]
    want = [
        g * np.exp(lgamma(tau + 1) - lgamma(tau + 1 + g) + lgamma(t + g) - lgamma(t + 1))
        for t in range(tau + 1, T)
    ]
    np.testing.assert_allclose(K[tau + 1 :, tau], want, rtol=2e-5)


@frameworks
def test_solving_in_pieces_equals_solving_at_once(framework):
    arrays, _, _ = draw(7, T=60)
    whole = reference.feedback_solve(**arrays)
    done = framework.array(np.zeros((2, 0, 40)), "float32")
    for start, stop in ((0, 17), (17, 18), (18, 60)):
        piece = {
            n: framework.array(arrays[n][:, start:stop], "float32") for n in ("f", "q", "gamma")
        }
        keys = framework.array(arrays["k"][:, :stop], "float32")
        s = framework.solve(**piece, k=keys, past_s=done if start else None)
        done = framework.array(np.concatenate([framework.numpy(done), framework.numpy(s)], 1))
    assert relative_error(framework.numpy(done), whole) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(0, 9), st.booleans())
def test_random_shapes_agree_between_the_frameworks(seed, T, P, masked):
    arrays, key_mask, ds = draw(seed, T=T, P=P, D=1 + seed % 37, K=1 + seed % 11, masked=masked)
    for framework in FRAMEWORKS:
        check(framework, "auto", "float32", 3e-4, arrays, key_mask, ds)


def test_gradcheck_in_float64():
    arrays, key_mask, _ = draw(8, T=9, P=3, D=5, K=4, masked=True)
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays.values()]
    mask = torch.tensor(key_mask)

    def solve(f, q, k, gamma, past_s):
        return TORCH.solve(f, q, k, gamma, past_s=past_s, key_mask=mask)

    assert torch.autograd.gradcheck(solve, leaves)


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("B", [1, 2])
def test_custom_op_passes_opcheck(T, P, B):
    arrays, key_mask, _ = draw(9, B=B, T=T, P=P, masked=True)
    f, q, k, gamma, *past = (torch.tensor(x, requires_grad=True) for x in arrays.values())
    past, mask = past[0] if past else None, torch.tensor(key_mask)
    solve, backward = torch.ops.sessa.feedback_solve, torch.ops.sessa.feedback_solve_backward
    rest = (past, mask, None, "auto")
    torch.library.opcheck(solve.default, (f, q, k, gamma, *rest))
    with torch.no_grad():
        # As a model that keeps time first gives them.
        q, k, gamma = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, gamma))
        s, lse = solve(f, q, k, gamma, *rest)
        torch.library.opcheck(backward.default, (f, q, k, gamma, s, lse, *rest))


def test_activation_checkpointing_computes_the_same_gradients():
    arrays, _, _ = draw(10, T=20, P=3)
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays.values()]

    def solve(*x):
        return TORCH.solve(*x[:4], past_s=x[4]).sin().sum()

    plain = torch.autograd.grad(solve(*inputs), inputs)
    again = torch.utils.checkpoint.checkpoint(solve, *inputs, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(again, inputs), plain, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_second_derivative_is_refused_not_left_out():
    arrays, _, _ = draw(10, T=20)
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays.values()]
    s = TORCH.solve(*inputs)
    (dq,) = torch.autograd.grad(s.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="feedback_solve_backward"):
        torch.autograd.grad(s.sum() + dq.square().sum(), inputs)


@backends
def test_autocast_changes_nothing(backend):
    arrays, _, _ = draw(10, T=20)
    inputs = [torch.tensor(x, dtype=torch.float32) for x in arrays.values()]
    with torch.autocast("cpu", torch.bfloat16):
        s = TORCH.solve(*inputs, backend=backend)
    torch.testing.assert_close(s, TORCH.solve(*inputs, backend=backend), rtol=0, atol=0)


def test_torch_compile_has_no_graph_break():
    arrays, _, _ = draw(10, T=20)
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays.values()]
    solve = torch.compile(lambda *x: TORCH.solve(*x).sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(solve(*inputs), TORCH.solve(*inputs).sin())
    solve(*inputs).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


class LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that any PyTorch operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_torch_holds_no_square_of_the_length():
    T, D, K = 2048, 4, 3
    arrays, _, ds = draw(15, B=1, T=T, D=D, K=K)
    f, q, k, gamma = (torch.tensor(x) for x in arrays.values())
    with LargestResult() as largest:
        s, lse = blocked.solve_forward(f, q, k, gamma)
        blocked.solve_backward(torch.tensor(ds), q, k, gamma, s, lse)
    assert 0 < largest.elements <= blocked.BLOCK * T


def test_mlx_memory_grows_with_the_length_not_its_square():
    def peak(T):
        arrays, _, _ = draw(16, B=1, T=T, D=4, K=3)
        inputs = [mx.array(x.astype(np.float32)) for x in arrays.values()]
        mx.eval(inputs)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda *x: MLX.solve(*x).sum(), argnums=[0, 1, 2, 3])(*inputs))
        return mx.get_peak_memory() - before

    # Twice when linear, four times when quadratic.
    assert peak(4096) < 2.7 * peak(2048)


def test_strided_inputs_and_contiguous_output():
    arrays, _, _ = draw(11, T=20)
    inputs = {n: torch.tensor(x) for n, x in arrays.items()}
    strided = {n: torch.stack([x, x], -1)[..., 0] for n, x in inputs.items()}
    s = TORCH.solve(**strided)
    assert s.is_contiguous()
    torch.testing.assert_close(s, TORCH.solve(**inputs))


def test_mlx_compile_gives_the_same_gradients():
    arrays, _, _ = draw(12, T=40)
    inputs = [mx.array(x.astype(np.float32)) for x in arrays.values()]
    gradient = mx.grad(lambda *x: mx.sin(MLX.solve(*x)).sum(), argnums=[0, 1, 2, 3])
    for got, want in zip(mx.compile(gradient)(*inputs), gradient(*inputs), strict=True):
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-5)


BAD = {
    "q": {"q": np.zeros((2, 62, 24))},
    "k": {"k": np.zeros((2, 63, 23))},
    "k has 60 rows": {"k": np.zeros((2, 60, 24))},
    "past_s": {"k": np.zeros((2, 70, 24))},
    "gamma": {"gamma": np.zeros((2, 63, 1))},
    "f has shape": {"f": np.zeros((63, 40))},
    "key_mask": {"key_mask": np.zeros((2, 62), bool)},
}


@frameworks
@pytest.mark.parametrize("name", BAD)
def test_wrong_shapes_are_refused_by_name(framework, name):
    arrays, _, _ = draw(13)
    arrays = {n: framework.array(x, "float32") for n, x in arrays.items()}
    bad = {n: framework.array(x) for n, x in BAD[name].items()}
    with pytest.raises(ValueError, match=name):
        framework.solve(**{**arrays, **bad})


@frameworks
def test_wrong_types_are_refused_by_name(framework):
    arrays, _, _ = draw(14)
    good = {n: framework.array(x, "float32") for n, x in arrays.items()}
    with pytest.raises(TypeError, match="gamma"):
        framework.solve(**{**good, "gamma": framework.array(np.zeros((2, 63), np.int32))})
    with pytest.raises(TypeError, match="k is"):
        framework.solve(**{**good, "k": framework.array(arrays["k"], "float16")})
    with pytest.raises(TypeError, match="key_mask"):
        framework.solve(**good, key_mask=framework.array(np.ones((2, 63), np.float32)))
    with pytest.raises(TypeError, match="gamma is a NoneType"):
        framework.solve(**{**good, "gamma": None})
    with pytest.raises(TypeError, match="past_s is a ndarray"):
        framework.solve(**good, past_s=arrays["f"])
    with pytest.raises(ValueError, match="backend is 'fast'"):
        framework.solve(**good, backend="fast")
    with pytest.raises(ValueError, match="precision is 'half'"):
        framework.solve(**good, precision="half")
    with pytest.raises(ValueError, match="'kernel' cannot run here: "):
        framework.solve(**good, backend="kernel")


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130, 256])
def test_the_two_ways_to_solve_a_diagonal_block_agree(n):
    """CPUs take a triangular solve, other devices products with the inverse."""
    generator = torch.Generator().manual_seed(n)
    N = torch.rand(2, n, n, generator=generator, dtype=torch.float64).tril(-1)
    N *= 0.999 / N.sum(-1, keepdim=True).clamp_min(1e-30)
    rhs = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    X = blocked.unit_lower_inverse(N)
    torch.testing.assert_close(blocked._solve_block(N, rhs), X @ rhs)
    torch.testing.assert_close(blocked._solve_block(N, rhs, transposed=True), X.mT @ rhs)
