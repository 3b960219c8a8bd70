"""The rows of activations that a Sessa layer keeps for the backward pass, and what it repeats."""

from unittest import mock

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import next_token_batch
from sessa_common.train_config import TrainConfig
from sessa_torch.feedback import blocked
from sessa_torch.training import TrainBackend

B, T, D, V, LAYERS = 2, 256, 64, 40, 2


def two_steps(**settings):
    config = SessaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=T,
    )
    trained = TrainBackend(config, TrainConfig(**settings), initial_weights(config, 0), "cpu")
    ids = np.random.default_rng(0).integers(0, V, (2, B, T + 1))
    return [trained.step([next_token_batch(rows)], 1e-2) for rows in ids]


def kept_rows(inputs, outputs):
    """Rows of D numbers in 16 bits for each token that a forward graph keeps, without weights."""
    given = {x.untyped_storage()._cdata for x in inputs}
    kept = {x.untyped_storage()._cdata: x for x in outputs if isinstance(x, torch.Tensor)}
    row = B * T * D * 2
    sizes = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in given]
    return sum(size for size in sizes if size >= row) / row


@pytest.mark.parametrize(("checkpoint", "rows"), [("none", 11), ("selective", 4)])
def test_a_compiled_layer_keeps_few_rows(checkpoint, rows, monkeypatch):
    counted = []

    def forward_compiler(graph, _):
        def run(*inputs):
            outputs = graph(*inputs)
            counted.append(kept_rows(inputs, outputs))
            return outputs

        return make_boxed_func(run)

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **rest: compile(f, backend=backend, **rest))
    torch._dynamo.reset()
    two_steps(compile=True, precision="bfloat16", checkpoint_activations=checkpoint)
    # Behind the layers lie the final norm and the gradient of its result.
    assert LAYERS * rows < counted[0] < LAYERS * rows + 4.5


def test_selective_checkpoints_repeat_no_solve():
    solve = mock.patch.object(blocked, "solve_forward", side_effect=blocked.solve_forward)
    found = {}
    for checkpoint in ("none", "selective", "layers"):
        with solve as calls:
            losses = two_steps(compile=False, checkpoint_activations=checkpoint)
        found[checkpoint] = losses, calls.call_count
    (plain, once), (selective, same), (_, twice) = found.values()
    assert selective == plain
    assert (once, same, twice) == (2 * LAYERS, 2 * LAYERS, 4 * LAYERS)
