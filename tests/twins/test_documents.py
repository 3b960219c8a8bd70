"""Documents in a row read each other nowhere: every result is that of separate documents."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn as mlx_nn
from mlx.utils import tree_flatten
from support.frameworks import FRAMEWORKS, TORCH
from support.golden_cases import relative_error
from support.operands import draw_operands, draw_starts

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.layer_kinds import KINDS
from sessa_common.reference import model as reference
from sessa_common.reference.ops import feedback_solve, feedback_solve_backward
from sessa_torch._documents import (
    BLOCK,
    block_sparse_attention,
    document_lengths,
    visible_blocks,
)
from sessa_torch.attention import causal_attention

NAMES = ("f", "q", "k", "gamma")
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda x: x.name)


def spans(starts):
    """(row, first, stop) of every document."""
    T = starts.shape[1]
    begins = [(b, int(t)) for b, t in np.argwhere(starts == np.arange(T))]
    ends = [t for _, t in begins[1:]] + [0]
    return [(b, t, end or T) for (b, t), end in zip(begins, ends, strict=True)]


def separate(arrays, ds, starts):
    """Output and gradients of the reference on every document alone."""
    found = [np.zeros_like(ds), *(np.zeros_like(arrays[name]) for name in NAMES)]
    for b, first, stop in spans(starts):
        own = {name: x[b : b + 1, first:stop] for name, x in arrays.items()}
        grads = feedback_solve_backward(ds[b : b + 1, first:stop], **own)
        for whole, part in zip(found, (feedback_solve(**own), *grads[:4]), strict=True):
            whole[b, first:stop] = part[0]
    return found


def draw(T, length, D=12, K=10):
    arrays = draw_operands(T, B=3, T=T, D=D, K=K, dtype=np.float64)
    del arrays["past_s"]
    return arrays, np.random.default_rng(T).normal(size=(3, T, D)), draw_starts(T, 3, T, length)


def test_the_reference_solves_separate_documents():
    arrays, ds, starts = draw(40, 6)
    given = {**arrays, "document_starts": starts}
    grads = feedback_solve_backward(ds, **given)[:4]
    for got, want in zip(
        (feedback_solve(**given), *grads), separate(arrays, ds, starts), strict=True
    ):
        assert relative_error(got, want) < 1e-12


@frameworks
@pytest.mark.parametrize(
    ("backend", "T", "length"),
    [("naive", 40, 5), ("blocked", 1, 3), ("blocked", 40, 5), ("blocked", 300, 70)],
)
def test_the_solve_is_that_of_separate_documents(framework, backend, T, length):
    arrays, ds, starts = draw(T, length)
    dtype, limit = ("float64", 1e-12) if framework is TORCH else ("float32", 2e-5)

    def solve(**leaves):
        starts_ = framework.array(starts)
        return framework.solve(**leaves, document_starts=starts_, backend=backend)

    weight = framework.array(ds, dtype)
    grads = framework.gradients(lambda **x: (solve(**x) * weight).sum(), arrays, dtype)
    s = framework.numpy(solve(**{n: framework.array(x, dtype) for n, x in arrays.items()}))
    wanted = separate(arrays, ds, starts)
    for what, got, want in zip(("s", *NAMES), (s, *(grads[n] for n in NAMES)), wanted, strict=True):
        scale = max(np.abs(want).max(), 1e-3)
        assert relative_error(got.astype(np.float64), want, scale) <= limit, what


def config_of(kind):
    return SessaConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        layer_kinds=kind,
        mamba_d_state=4,
        mamba_d_head=8,
    )


def gradients(framework, model, ids, weights, starts=None):
    """The hidden states, weighted and summed, and the gradients of all parameters by name."""
    given: dict[str, Any] = {} if starts is None else {"document_starts": framework.array(starts)}
    ids, weights = framework.array(ids), framework.array(weights, "float32")
    if framework is TORCH:
        model.zero_grad()
        total = (model.model(ids, **given) * weights).sum()
        total.backward()
        found = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        return total.item(), found

    def loss() -> mx.array:
        return (model.model(ids, **given) * weights).sum()

    total, grads = mlx_nn.value_and_grad(model, loss)()
    return total.item(), {name: framework.numpy(x) for name, x in tree_flatten(grads)}


@frameworks
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_s_gradients_are_those_of_separate_documents(framework, kind, checkpointed):
    if checkpointed and kind not in ("sessa", "mamba2"):
        pytest.skip("two kinds are enough")
    config, T = config_of(kind), 150
    rng = np.random.default_rng(5)
    weights = {
        name: value + 0.05 * rng.normal(size=value.shape).astype(np.float32)
        for name, value in initial_weights(config, 0).items()
    }
    model = framework.checkpoint.build_model(config, weights, dtype="float32")
    model.model.checkpoint_layers = checkpointed
    starts = draw_starts(3, 2, T, 40)
    ids = rng.integers(0, 19, (2, T))
    weighted = rng.normal(size=(2, T, 16)).astype(np.float32)
    total, grads = gradients(framework, model, ids, weighted, starts)
    alone = [
        gradients(framework, model, ids[b : b + 1, i:j], weighted[b : b + 1, i:j])
        for b, i, j in spans(starts)
    ]
    assert total == pytest.approx(sum(t for t, _ in alone), rel=1e-4, abs=1e-3)
    for name, grad in grads.items():
        wanted = sum(part[name].astype(np.float64) for _, part in alone)
        assert relative_error(grad, wanted, max(np.abs(wanted).max(), 1e-2)) < 1e-4, name


@pytest.mark.parametrize("kind", ["sessa", "mamba2"])
def test_a_layer_of_the_reference_equals_separate_documents(kind):
    config, rng = config_of(kind), np.random.default_rng(2)
    prefix = "model.layers.0."
    weights = {
        name.removeprefix(prefix): value
        for name, value in initial_weights(config, 0).items()
        if name.startswith(prefix)
    }
    x, starts = rng.normal(size=(2, 30, 16)), draw_starts(1, 2, 30, 7)
    y = reference.layer_forward(config, weights, x, document_starts=starts)
    for b, i, j in spans(starts):
        alone = reference.layer_forward(config, weights, x[b : b + 1, i:j])
        assert relative_error(y[b : b + 1, i:j], alone) < 1e-12


@pytest.mark.parametrize("name", ["causal_attention", "block_sparse_attention"])
def test_a_compiled_graph_masks_or_leaves_out_what_eager_mode_splits(name):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 300, 8), torch.randn(2, 2, 300, 8), torch.randn(2, 2, 300, 8)
    starts = torch.tensor(draw_starts(4, 2, 300, 50))
    eager = causal_attention(q, k, v, document_starts=starts)
    # Without a compiler behind it, the graph is traced and run as it is.
    attend = {f.__name__: f for f in (causal_attention, block_sparse_attention)}[name]
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v, document_starts=starts), eager, atol=2e-6)
    assert sum(document_lengths(starts)) == 600


@pytest.mark.parametrize(("T", "length"), [(1, 1), (128, 30), (700, 60), (1000, 400)])
def test_blocks_are_left_out_only_where_no_row_reads_a_key(T, length):
    starts = draw_starts(T, 2, T, length)
    row, key = np.arange(T)[:, None], np.arange(T)
    visible = (key <= row) & (key >= starts[..., None])
    padding = -T % BLOCK
    visible = np.pad(visible, ((0, 0), (0, padding), (0, padding)))
    shown = visible.reshape(2, -(-T // BLOCK), BLOCK, -1, BLOCK).swapaxes(2, 3)
    partly, partial, wholly, full = (x[:, 0] for x in visible_blocks(torch.tensor(starts)))
    for b, i in np.ndindex(*partly.shape):
        some, whole = partial[b, i, : partly[b, i]].tolist(), full[b, i, : wholly[b, i]].tolist()
        assert sorted(some + whole) == np.flatnonzero(shown[b, i].any((1, 2))).tolist()
        assert shown[b, i, whole, : T - i * BLOCK].all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")
@pytest.mark.parametrize("compiled", [False, True], ids=["flash", "flex"])
def test_the_fused_kernels_read_single_documents(compiled):
    shapes = (2, 4, 700, 32), (2, 2, 700, 32), (2, 2, 700, 32)
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    starts = torch.tensor(draw_starts(4, 2, 700, 90), device="cuda")

    def results(attend, inputs):
        y = attend(*inputs, document_starts=starts)
        return [y, *torch.autograd.grad(y, inputs, y.detach())]

    wanted = results(causal_attention, [x.detach().float().requires_grad_() for x in leaves])
    fused = torch.compile(causal_attention, fullgraph=True) if compiled else causal_attention
    for got, want in zip(results(fused, leaves), wanted, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-2


@frameworks
def test_what_does_not_go_together_is_refused(framework):
    arrays, _, starts = draw(8, 3)
    given = {name: framework.array(x, "float32") for name, x in arrays.items()}
    starts_ = framework.array(starts)
    mask = framework.array(np.ones((3, 8), bool))
    with pytest.raises(ValueError, match="neither past_s nor key_mask"):
        framework.solve(**given, document_starts=starts_, key_mask=mask)
    with pytest.raises(ValueError, match=r"document_starts has shape .*, expected \(3, 8\)"):
        framework.solve(**given, document_starts=starts_[:, :4])
    with pytest.raises(TypeError, match=r"document_starts is .*, expected an integer type"):
        framework.solve(**given, document_starts=given["gamma"])
    config = config_of("sessa")
    model = framework.checkpoint.build_model(config, initial_weights(config, 0), dtype="float32")
    ids = framework.array(np.zeros((3, 8), np.int64))
    with pytest.raises(ValueError, match="neither cache nor attention_mask"):
        model.model(ids, document_starts=starts_, attention_mask=mask)
