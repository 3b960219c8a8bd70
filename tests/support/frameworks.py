"""The two frameworks behind one interface, so that a test is written once for both.

The interface is that of `sessa selftest`; the classes here add layers and models to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx import nn as mlx_nn
from mlx.utils import tree_flatten

import sessa_mlx.checkpoint
import sessa_mlx.model
import sessa_mlx.selftest
import sessa_torch.checkpoint
import sessa_torch.model
import sessa_torch.selftest

Arrays = dict[str, np.ndarray]


class TorchFramework(sessa_torch.selftest.Twin):
    """PyTorch on the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.model, self.checkpoint = sessa_torch.model, sessa_torch.checkpoint

    def gradients(self, loss: Callable[..., Any], inputs: Arrays, dtype: str) -> Arrays:
        """Gradients of a scalar function of keyword arrays."""
        leaves = {name: self.array(x, dtype).requires_grad_() for name, x in inputs.items()}
        grads = torch.autograd.grad(loss(**leaves), list(leaves.values()), allow_unused=True)
        return {
            name: np.zeros_like(inputs[name]) if g is None else self.numpy(g.double())
            for name, g in zip(leaves, grads, strict=True)
        }

    def layer(self, config: Any, params: Arrays, dtype: str) -> Any:
        layer = self.model.new_layer(config, config.kinds[0]).to(getattr(torch, dtype))
        layer.load_state_dict({name: self.array(value) for name, value in params.items()})
        return layer

    def layer_gradients(self, layer: Any, x: np.ndarray, dy: np.ndarray) -> Arrays:
        """The layer's output "y" and the gradients of x ("dx") and of every parameter."""
        dtype = next(layer.parameters()).dtype
        leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
        y = layer(leaf)
        y.backward(torch.tensor(dy, dtype=dtype))
        grads = {name: self.numpy(p.grad) for name, p in layer.named_parameters()}
        return {**grads, "y": self.numpy(y), "dx": self.numpy(leaf.grad)}

    def model_gradients(
        self, model: Any, ids: np.ndarray, mask: np.ndarray, dlogits: np.ndarray
    ) -> Arrays:
        """The gradient of every parameter, given one at the logits."""
        dtype = next(model.parameters()).dtype
        logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask))
        logits.backward(torch.tensor(dlogits, dtype=dtype))
        return {name: self.numpy(p.grad) for name, p in model.named_parameters()}


class MlxFramework(sessa_mlx.selftest.Twin):
    """MLX on its default device."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.checkpoint = sessa_mlx.model, sessa_mlx.checkpoint

    def gradients(self, loss: Callable[..., Any], inputs: Arrays, dtype: str) -> Arrays:
        """Gradients of a scalar function of keyword arrays."""
        leaves = {name: self.array(x, dtype) for name, x in inputs.items()}
        grads = mx.grad(lambda leaves: loss(**leaves))(leaves)
        return {name: self.numpy(g).astype(np.float64) for name, g in grads.items()}

    def layer(self, config: Any, params: Arrays, dtype: str) -> Any:
        layer = self.model.new_layer(config, config.kinds[0])
        layer.set_dtype(getattr(mx, dtype))
        layer.load_weights([(name, self.array(value, dtype)) for name, value in params.items()])
        return layer

    def layer_gradients(self, layer: Any, x: np.ndarray, dy: np.ndarray) -> Arrays:
        """The layer's output "y" and the gradients of x ("dx") and of every parameter."""
        dtype = layer.ln.weight.dtype
        x, dy = (self.checkpoint.to_tensor(value).astype(dtype) for value in (x, dy))

        def loss(layer: Any, x: mx.array) -> mx.array:
            return (layer(x) * dy).sum()

        _, grads = mlx_nn.value_and_grad(layer, lambda x: loss(layer, x))(x)
        dx = mx.grad(lambda x: loss(layer, x))(x)
        named = {name: self.numpy(value) for name, value in tree_flatten(grads)}
        return {**named, "y": self.numpy(layer(x)), "dx": self.numpy(dx)}

    def model_gradients(
        self, model: Any, ids: np.ndarray, mask: np.ndarray, dlogits: np.ndarray
    ) -> Arrays:
        """The gradient of every parameter, given one at the logits."""
        ids, mask, dlogits = mx.array(ids), mx.array(mask), mx.array(dlogits, dtype=mx.float32)

        def loss() -> mx.array:
            return (model(ids, attention_mask=mask) * dlogits).sum()

        _, grads = mlx_nn.value_and_grad(model, loss)()
        return {name: self.numpy(value) for name, value in tree_flatten(grads)}


TORCH, MLX = TorchFramework(), MlxFramework()
FRAMEWORKS = [TORCH, MLX]
