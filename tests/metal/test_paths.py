"""The Metal path around its kernels: the whole MLX model, transformations, memory, dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import torch
from metal_emulator.build import Launch
from metal_emulator.mlx_side import emulated_metal_kernels, exported_kernels, to_mlx
from metal_emulator.torch_side import emulated_shaders
from mlx.utils import tree_flatten
from support.metal_cases import (
    TWINS,
    Case,
    expected,
    forget_kernels,
    inputs,
    kernel_kind,
    relative_error,
    to_torch,
)

import sessa_mlx.feedback as mlx_feedback
import sessa_torch.feedback as torch_feedback
from sessa_common.config import SessaConfig
from sessa_mlx.cache import SessaCache
from sessa_mlx.checkpoint import new_model
from sessa_mlx.feedback import blocked, metal, products
from sessa_mlx.model import SessaForCausalLM


@contextmanager
def metal_path() -> Iterator[list[Launch]]:
    """The whole MLX package takes the Metal path, run by the emulator, in blocks of 8 rows."""
    forget_kernels(metal)
    with (
        emulated_metal_kernels() as launches,
        mock.patch.object(metal, "unavailable_reason", return_value=None),
        mock.patch.object(metal, "BLOCK", 8),
    ):
        yield launches
    forget_kernels(metal)


def small_model(dtype: str = "float32") -> SessaForCausalLM:
    config = SessaConfig(vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=2)
    return new_model(config, seed=3, dtype=dtype)


def model_loss(model, ids: mx.array) -> mx.array:
    logits = model(ids[:, :-1]).astype(mx.float32)
    chosen = mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    return (mx.logsumexp(logits, -1) - chosen).mean()


def trained(steps: int) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Losses, first gradients and last parameters of plain gradient descent."""
    model = small_model()
    ids = mx.array(np.random.default_rng(0).integers(0, 30, (2, 20)))
    losses, first = [], {}
    for _ in range(steps):

        def loss(parameters):
            model.update(parameters)
            return model_loss(model, ids)

        parameters = model.trainable_parameters()
        value, grads = mx.value_and_grad(loss)(parameters)
        losses.append(value.item())
        flat = dict(tree_flatten(grads))
        first = first or {name: np.array(grad) for name, grad in flat.items()}
        updated = [(n, p - 0.3 * flat[n]) for n, p in tree_flatten(parameters)]
        model.load_weights(updated)
        mx.eval(model.parameters())
    return losses, first, {n: np.array(p) for n, p in tree_flatten(model.parameters())}


def test_whole_model_trains_as_on_the_blocked_path() -> None:
    losses, grads, parameters = trained(steps=4)
    with metal_path() as launches:
        kernel_losses, kernel_grads, kernel_parameters = trained(steps=4)
    assert {kernel_kind(launch.name) for launch in launches} == {"weights", "block", "score_grads"}
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(kernel_losses, losses, rtol=1e-5)
    for name, grad in grads.items():
        assert relative_error([kernel_grads[name]], [grad]) < 2e-5, name
        assert relative_error([kernel_parameters[name]], [parameters[name]]) < 1e-4, name


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.04)])
def test_cached_decoding_equals_the_full_pass(dtype: str, limit: float) -> None:
    """Prefill of several block rows with a past, then the decode kernels, one token at a time.

    In bfloat16 the cache keeps f and s in float32: kernels of two types.
    """
    model, ids = small_model(dtype), mx.array(np.random.default_rng(1).integers(0, 30, (2, 24)))
    full = np.array(model(ids).astype(mx.float32))
    cache = SessaCache(model.config)
    spans = [(0, 9), (9, 20), *((t, t + 1) for t in range(20, 24))]
    with metal_path() as launches:
        pieces = [model(ids[:, start:stop], cache=cache) for start, stop in spans]
    decoded = np.array(mx.concatenate(pieces, 1).astype(mx.float32))
    assert np.abs(decoded - full).max() < limit * np.abs(full).max()
    assert {kernel_kind(launch.name) for launch in launches} == {
        "weights",
        "block",
        "step",
        "merge",
    }
    assert sum(kernel_kind(launch.name) == "step" for launch in launches) == 2 * 4


def solve_inputs(T: int = 20) -> list[mx.array]:
    given = inputs(Case(T, B=2, P=0), "float32")
    return [to_mlx(given[name]) for name in ("f", "q", "k", "gamma")]


def squared(*arrays: mx.array) -> mx.array:
    return (mlx_feedback.feedback_solve(*arrays, backend="kernel") ** 2).sum()


def test_checkpointed_gradients() -> None:
    arrays, every = solve_inputs(), (0, 1, 2, 3)
    with metal_path():
        direct = mx.grad(squared, argnums=every)(*arrays)
        again = mx.grad(mx.checkpoint(squared), argnums=every)(*arrays)
    for one, other in zip(direct, again, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


def both_passes(f: mx.array, q: mx.array, k: mx.array, gamma: mx.array) -> list[mx.array]:
    """Operations of the custom function's forward and vjp; export refuses the function itself."""
    s, lse = metal.solve_forward(f, q, k, gamma)
    return [g for g in metal.solve_backward(2 * s, q, k, gamma, s, lse) if g is not None]


@pytest.mark.parametrize("compiled", [False, True])
def test_traces_without_looking_at_values(compiled: bool) -> None:
    """Under mx.compile too, the graph has every kernel of both passes."""
    forget_kernels(metal)
    with mock.patch.object(metal, "BLOCK", 8):
        calls = exported_kernels(
            mx.compile(both_passes) if compiled else both_passes, *solve_inputs()
        )
    forget_kernels(metal)
    forward, backward = ["weights", "block"], ["weights", "block", "score_grads"]
    assert [kernel_kind(call["name"]) for call in calls] == 3 * forward + 3 * backward


@pytest.mark.parametrize("case", [Case(20, P=5, masked=True), Case(1, P=9), Case(20, B=2)], ids=str)
def test_pytorchs_custom_op_with_autograd(case: Case) -> None:
    """The op that PyTorch dispatches to these kernels on MPS, with its rules about outputs."""
    given = {name: to_torch(array) for name, array in inputs(case, "float32").items()}
    ds, mask = given.pop("ds"), given.pop("key_mask", None)
    for tensor in given.values():
        tensor.requires_grad_()
    past_s = given.pop("past_s", None)
    module = TWINS["torch"]
    forget_kernels(module)
    with (
        emulated_shaders() as launches,
        mock.patch.object(torch_feedback, "_implementation", return_value=module),
        mock.patch.object(module, "BLOCK", 8),
    ):
        s = torch_feedback.feedback_solve(**given, past_s=past_s, key_mask=mask)
        wanted = [*given.values()] + ([] if past_s is None else [past_s])
        gradients = torch.autograd.grad(s, wanted, ds)
    forget_kernels(module)
    exact = list(expected(case, "float32").values())
    computed = [tensor.detach().double().numpy() for tensor in (s, *gradients)]
    order = ["s", *(f"d{name}" for name in given)] + ([] if past_s is None else ["dpast_s"])
    assert list(expected(case, "float32")) == order and len(launches) > 4
    for name, got, want in zip(order, computed, exact, strict=True):
        assert relative_error([got], [want]) < 1e-6, name


def lazy_weights(scores, gamma, key_mask, document_starts, P, start, storage):
    """`metal._weights` in MLX operations, which MLX may evaluate in any order that is allowed."""
    n, L = scores.shape[1:]
    own = P + start
    hidden = mx.arange(own, own + n)[:, None] <= mx.arange(L)
    scores = mx.where(hidden, -1e30, scores)
    top = scores.max(-1, keepdims=True)
    total = mx.exp(scores - top).sum(-1, keepdims=True)
    alpha = mx.exp(scores - top) / total
    coupling = gamma[:, start : start + n, None] * alpha[:, :, own : own + n]
    return alpha, coupling, (top + mx.log(total))[..., 0]


def lazy_block(rhs, gamma, coupling, carried, key_mask, rows, *, scaled=None):
    def own(operand):
        return operand[0][:, operand[1] : operand[1] + rows]

    X = blocked.unit_lower_inverse(own(coupling)[:, :, :rows])
    gains = own(gamma)[..., None]
    total = own(rhs) + gains * sum(own(x) for x in carried)
    if scaled is None:
        return [X @ total]
    x = X.swapaxes(1, 2) @ total
    return [x, (gains * x).astype(scaled)]


def lazy_score_grads(weights, products, gamma, P, start, K):
    gains = gamma[:, start : start + weights.shape[1], None]
    r = (weights * products).sum(-1, keepdims=True)
    return gains * weights * (products - r), r[..., 0]


def peak_bytes(T: int, *, backward: bool) -> int:
    """Memory of one pass at its peak, in the order in which MLX evaluates it."""
    f, q, k, gamma = (mx.zeros(shape) for shape in [(1, T, 16)] * 3 + [(1, T)])
    mx.eval(f, q, k, gamma)
    before = mx.get_active_memory()
    mx.clear_cache()
    mx.reset_peak_memory()
    if backward:
        mx.eval(metal.solve_backward(f, q, k, gamma, f, gamma)[:4])
    else:
        mx.eval(metal.solve_forward(f, q, k, gamma))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_with_the_length_not_its_square(backward: bool) -> None:
    lazy = {"_weights": lazy_weights, "_block": lazy_block, "_score_grads": lazy_score_grads}
    with mock.patch.multiple(metal, **lazy, BLOCK=64):
        short, long = (peak_bytes(T, backward=backward) for T in (1024, 4096))
    assert long < 5 * short


class RoundedProduct:
    """A matrix whose products take their operands with 11 bits, as M5's matrix units do."""

    def __init__(self, x: mx.array):
        self.x = x

    def __matmul__(self, other: RoundedProduct) -> mx.array:
        return products.high_bits(self.x) @ products.high_bits(other.x)

    def __sub__(self, other: RoundedProduct) -> RoundedProduct:
        return RoundedProduct(self.x - other.x)

    def view(self, dtype: mx.Dtype) -> mx.array:
        return self.x.view(dtype)


def test_float32_products_survive_operands_of_11_bits() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((50, 70), (70, 40)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    rounded = [RoundedProduct(mx.array(x)) for x in (a, b)]
    cut = products.high_bits

    def high(x: mx.array | RoundedProduct) -> mx.array | RoundedProduct:
        return RoundedProduct(cut(x.x)) if isinstance(x, RoundedProduct) else cut(x)

    with mock.patch.object(products, "high_bits", high):
        plain_error = relative_error([np.array(rounded[0] @ rounded[1])], [exact])
        with mock.patch.object(products, "operands_lose_bits", return_value=True):
            error = relative_error([np.array(products.product(*rounded, mx.float32))], [exact])
    assert plain_error > 1e-4 and error < 1e-6


@pytest.mark.parametrize(
    ("architecture", "setting", "loses"),
    [
        ("applegpu_g13s", None, False),
        ("applegpu_g16s", None, False),
        ("applegpu_g17s", None, True),
        ("applegpu_g17s", "1", True),
        ("applegpu_g17s", "0", False),
        ("sm_75", None, False),
        ("sm_90", None, True),
        ("sm_90", "0", False),
        ("x86_64", None, False),
    ],
)
def test_where_operands_lose_bits(
    monkeypatch: pytest.MonkeyPatch, architecture: str, setting: str | None, loses: bool
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if setting is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", setting)
    products.operands_lose_bits.cache_clear()
    assert products.operands_lose_bits() is loses
    products.operands_lose_bits.cache_clear()


@pytest.mark.skipif(mx.metal.is_available(), reason="there is Metal here")
def test_asking_for_the_kernel_without_metal_says_why() -> None:
    arrays = solve_inputs()
    with pytest.raises(ValueError, match=r"kernel.* MLX has no Metal device here"):
        mlx_feedback.feedback_solve(*arrays, backend="kernel")
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    with pytest.raises(ValueError, match=r"kernel.* cannot run here"):
        torch_feedback.feedback_solve(*tensors, backend="kernel")
    automatic = mlx_feedback.feedback_solve(*arrays)
    wanted = mlx_feedback.feedback_solve(*arrays, backend="blocked")
    np.testing.assert_array_equal(np.array(automatic), np.array(wanted))


def test_reasons_why_the_kernel_cannot_run() -> None:
    wide, narrow = torch.zeros(1, 2, 3, dtype=torch.float64), torch.zeros(1, 2, 3)
    assert "no Metal device" in TWINS["torch"].unavailable_reason(narrow, narrow)
    with mock.patch("torch.backends.mps.is_available", return_value=True):
        assert "f is on cpu" in TWINS["torch"].unavailable_reason(narrow, narrow)
        on_mps = mock.Mock(device=torch.device("mps"), dtype=torch.float64)
        assert "float64" in TWINS["torch"].unavailable_reason(on_mps, wide)
    with mock.patch.object(mx.metal, "is_available", return_value=True):
        arrays = mx.zeros((1, 2, 3)), mx.zeros((1, 2, 3))
        assert "default device is the CPU" in metal.unavailable_reason(*arrays)
        device = mock.Mock(type=mx.DeviceType.gpu)
        with mock.patch.object(mx, "default_device", return_value=device):
            assert metal.unavailable_reason(*arrays) is None
            assert "q is mlx.core.int32" in metal.unavailable_reason(
                arrays[0], arrays[1].astype(mx.int32)
            )
