"""Training in MLX: forward pass, loss, gradients, optimizer."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.data.batches import Batch, batch_arrays
from sessa_common.errors import SessaError, expect, require
from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import MOMENTS, decays
from sessa_common.training.muon import state_shapes
from sessa_common.training.preparation import TrainRequest
from sessa_common.training.processes import own_rows
from sessa_common.training.session import TrainResult, run_session
from sessa_common.training.trained_parameters import (
    lora_scale,
    rate_factors,
    trained_shapes,
)
from sessa_common.training.trainer import Reporter
from sessa_mlx._device import on_cuda
from sessa_mlx.checkpoint import build_model, choose_device, to_numpy, to_tensor
from sessa_mlx.lora import add_lora
from sessa_mlx.loss import likeliest, loss_and_likeliest, weighted_loss
from sessa_mlx.muon import muon_update
from sessa_mlx.processes import open_processes

Arrays = dict[str, mx.array]
# The loss and the gradients of some of the batches of a step.
Sums = tuple[mx.array, Arrays]
# Threads of a step on the CPU; each has gradients of its own.
MOST_THREADS = 4
# Operations that MLX submits at once on CUDA; it has at most ten such groups under way.
OPERATIONS_AT_ONCE = 20
# Parameters of gains and decays: low precision does not round them.
EXACT = ("gamma_bias", "dt_bias", "A_log", "mixer.D")


def choose_precision(precision: str, device: str) -> str:
    """Resolve "auto": bfloat16 on the GPU, float32 on the CPU."""
    if precision != "auto":
        return precision
    return "bfloat16" if device == "gpu" else "float32"


def train(
    out: Path | str | None = None,
    *,
    preset: str | None = None,
    config: SessaConfig | Path | str | None = None,
    init: Path | str | None = None,
    train_config: TrainConfig | Path | str | None = None,
    resume: Path | str | None = None,
    force: bool = False,
    device: str | None = None,
    reporter: Reporter | None = None,
    profile: bool = False,
    **fields: Any,
) -> TrainResult:
    """Train a new run in the folder `out`, or go on with the run in the folder `resume`.

    The model is a named size (`preset`, "demo" if nothing is named), a `config` (or the path of a
    config.json) or the checkpoint folder `init` to fine-tune; the settings are `train_config` (or
    the path of a training.json). Further keyword arguments are fields of SessaConfig and
    TrainConfig that replace theirs, as in train("runs/a", data="notes.txt", steps=200). `force`
    replaces a folder that is not empty; `reporter` receives the progress. With `profile` (PyTorch)
    a few steps are measured and traced into the folder. Raises SessaError before
    anything is written for input that cannot train, DivergedError when a loss is not finite.
    """
    require(
        not profile,
        "`profile` needs PyTorch; MLX records a trace only with Xcode, by mx.metal.start_capture",
    )
    request = TrainRequest(
        out=out,
        preset=preset,
        config=config,
        init=init,
        train_config=train_config,
        resume=resume,
        force=force,
        fields=fields,
    )
    processes = open_processes()
    return run_session(TrainBackend, request, choose_device(device), reporter, processes)


def finetune(
    model: Path | str | None = None,
    out: Path | str | None = None,
    *,
    train_config: TrainConfig | Path | str | None = None,
    resume: Path | str | None = None,
    force: bool = False,
    device: str | None = None,
    reporter: Reporter | None = None,
    **fields: Any,
) -> TrainResult:
    """Fine-tune the model of a checkpoint folder, or go on with the run in the folder `resume`.

    `data` names .jsonl files with conversations or prompts and completions, or texts as in
    `train`. LoRA is trained and the folder `out` becomes an adapter, unless `train` is "all", which
    makes a checkpoint folder. Further keyword arguments are fields of TrainConfig; their defaults
    are those of `TrainConfig.for_finetuning`. Raises SessaError before anything is written for
    input that cannot train, DivergedError when a loss is not finite.
    """
    if resume is None and model is None:
        raise SessaError("there is nothing to fine-tune; give the folder of a model")
    request = TrainRequest(
        out=out,
        init=model,
        train_config=train_config,
        resume=resume,
        force=force,
        finetune=resume is None,
        fields=fields,
    )
    processes = open_processes()
    return run_session(TrainBackend, request, choose_device(device), reporter, processes)


class TrainBackend:
    """A `sessa_common.training.backend.TrainBackend` in MLX.

    Weights that are trained, gradients and moments are float32. With bfloat16 the forward pass runs
    on a bfloat16 copy of the weights (not of the scalars that decide gains and decays), with
    softmax, the feedback solve's sums and the loss in float32; the gradients reach the float32
    weights through the cast. A compiled step is one function: loss, gradients, clipping
    and optimizer. Raises SessaError for a device that is not there.
    """

    def __init__(
        self,
        config: SessaConfig,
        settings: TrainConfig,
        weights: Mapping[str, np.ndarray],
        device: str | None = None,
    ) -> None:
        self.settings = settings
        for name in ("context_parallel", "shard_processes"):
            value = getattr(settings, name)
            expect(value == 1, f"`{name}`", value, "1 with MLX; PyTorch has more")
        self.processes = open_processes()
        self.device = choose_device(device)
        _launch_kernels_directly()
        self.precision = choose_precision(settings.precision, self.device)
        own = {name: weights[name] for name in parameter_shapes(config)}
        self.model = build_model(config, own, dtype="float32", device=self.device)
        add_lora(self.model, weights, lora_scale(settings))
        self.model.model.checkpoint_layers = settings.checkpoint_activations != "none"
        self.model.model._keeps_attention = settings.checkpoint_activations == "selective"
        every: Arrays = dict(tree_flatten(self.model.parameters()))
        trained = trained_shapes(config, settings)
        self.parameters: Arrays = {name: p for name, p in every.items() if name in trained}
        # The model keeps the others, in the type that it computes with.
        self.frozen = self._computed({n: p for n, p in every.items() if n not in trained})
        # Threads of a step cannot evaluate what another thread has begun.
        mx.eval(self.frozen)
        self.model.update(tree_unflatten(list(self.frozen.items())))
        self.head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        kept = state_shapes(trained, settings)
        self.moments: dict[str, Arrays] = {
            kind: {n: mx.zeros_like(p) for n, p in self.parameters.items() if f"{kind}.{n}" in kept}
            for kind in MOMENTS
        }
        self.steps = 0
        # The learning rate of a parameter is a factor of the run's, and few factors differ.
        factors = rate_factors(config, settings)
        self._factors = list(dict.fromkeys(factors.values()))
        self._factor_of = {name: self._factors.index(x) for name, x in factors.items()}
        self._release_model()
        # On the CPU MLX calls a C++ compiler for every kernel, which takes about a second each.
        default = self.device == "gpu"
        self._compiled = compiled = default if settings.compile is None else settings.compile
        self._accumulate = mx.compile(self._sums) if compiled else self._sums_by_threads
        self._finish = mx.compile(self._update) if compiled else self._update
        # MLX uses one core of a CPU for the operations of one thread.
        alone = compiled or self.device == "gpu"
        self._count = 1 if alone else min(MOST_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._count)
        self._building = Lock()

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Take one step on the weighted mean loss of all rows; (nats, gradient norm)."""
        # Arrays, because compiled code takes a Python number for a constant. The sums of all
        # processes are averaged, so each is divided by its share of the weights.
        total = mx.array(sum(float(batch.weights.sum()) for batch in batches) / self.processes.size)
        arrays = [self._arrays(own_rows(batch, self.processes)) for batch in batches]
        # A compiled step computes the gradients of the last batch too.
        last = arrays.pop() if self._compiled else None
        rates = self._rates(learning_rate)
        sums: Sums | None = None
        for batch in arrays:
            sums = self._accumulate(self.parameters, sums, batch, total)
            mx.eval(sums)
        # Nothing else refers to the old arrays, so MLX writes the new ones over them.
        self.parameters, self.moments, result = self._finish(
            self.parameters, self.moments, sums, last, total, rates
        )
        mx.eval(self.parameters, self.moments, result)
        loss, norm = map(float, to_numpy(result))
        self.steps += math.isfinite(loss + norm)
        return loss, norm

    def evaluate(self, batch: Batch) -> tuple[float, np.ndarray]:
        """Return the weighted sum of the losses of a batch, in nats, and its `predict`."""
        inputs, targets, weights, *starts = self._arrays(batch)
        hidden = self._hidden(self.parameters, inputs, *starts)
        loss, ids = loss_and_likeliest(hidden, self._head(self.parameters), targets, weights)
        return float(loss), to_numpy(ids.astype(mx.int32))

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return the likeliest next ids int32 (B, T) after inputs (B, T)."""
        hidden = self._hidden(self.parameters, mx.array(inputs))
        return to_numpy(likeliest(hidden, self._head(self.parameters)).astype(mx.int32))

    def gains(self, inputs: np.ndarray) -> dict[int, np.ndarray]:
        """Return the gains float32 (B, T) of every layer with feedback on inputs (B, T)."""
        if not self.model.config.feeds_back:
            return {}
        self._fill_model(self.parameters)
        backbone, found = self.model.model, {}
        x = backbone.embed_tokens(mx.array(inputs))
        for i, kind in enumerate(self.model.config.kinds):
            layer = backbone.layers[i]
            if kind.feeds_back:
                found[i] = layer.mixer.gain(layer.mixer_input(x))
            x = layer(x)
        self._release_model()
        return {i: to_numpy(gamma.astype(mx.float32)) for i, gamma in found.items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Return the float32 weights that are trained."""
        return {name: to_numpy(value) for name, value in self.parameters.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Return weights and optimizer moments as they are after the last step."""
        kinds = {"weights": self.parameters, **self.moments}
        return {
            f"{kind}.{name}": to_numpy(value)
            for kind, arrays in kinds.items()
            for name, value in arrays.items()
        }

    def restore(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Continue from a state that was taken after `steps` steps."""
        for kind, arrays in {"weights": self.parameters, **self.moments}.items():
            for name in arrays:
                arrays[name] = to_tensor(state[f"{kind}.{name}"])
        self.steps = steps

    def _rates(self, learning_rate: float) -> list[list[mx.array]]:
        """Learning rate, factors of weights that decay or not, Adam's step and its second scale.

        One list for each factor of the learning rate.
        """
        settings, step = self.settings, self.steps + 1
        found = []
        for rate in (learning_rate * factor for factor in self._factors):
            keep, size = 1 - rate * settings.weight_decay, rate / (1 - settings.beta1**step)
            found.append([rate, keep, 1.0, size, (1 - settings.beta2**step) ** -0.5])
        return [[mx.array(x) for x in each] for each in found]

    def _sums(
        self, parameters: Arrays, sums: Sums | None, batch: list[mx.array], total: mx.array
    ) -> Sums:
        """Add the loss / total of a batch and its gradients to sums."""
        differentiated: Any = mx.value_and_grad(self._mean_loss)
        new: Sums = differentiated(parameters, total, *batch)
        return new if sums is None else _added(sums, new)

    def _sums_by_threads(
        self, parameters: Arrays, sums: Sums | None, batch: list[mx.array], total: mx.array
    ) -> Sums:
        """`_sums`, with the rows of the batch dealt out to threads."""

        def run(first: int) -> Sums:
            with mx.stream(mx.cpu):
                # The model that the graph is built with is one for all threads.
                with self._building:
                    rows = [array[first::count] for array in batch]
                    part = self._sums(parameters, None, rows, total)
                mx.eval(part)
            return part

        count = min(self._count, batch[0].shape[0])
        if count == 1:
            return self._sums(parameters, sums, batch, total)
        parts = self._threads.map(run, range(count))
        return functools.reduce(_added, parts if sums is None else (sums, *parts))

    def _update(
        self,
        parameters: Arrays,
        moments: dict[str, Arrays],
        sums: Sums | None,
        batch: list[mx.array] | None,
        total: mx.array,
        rates: list[list[mx.array]],
    ) -> tuple[Arrays, dict[str, Arrays], mx.array]:
        """Return weights, moments and (loss, norm) after a step on sums and a last batch."""
        if batch is not None:
            sums = self._sums(parameters, sums, batch, total)
        assert sums is not None
        loss, grads = sums
        loss, *means = self.processes.mean([loss, *grads.values()])
        grads = dict(zip(grads, means, strict=True))
        grads, norm = _clipped(grads, self.settings.max_grad_norm)
        finite = mx.isfinite(loss + norm)
        weights, (m, v) = dict[str, mx.array](), (dict[str, mx.array](), dict[str, mx.array]())
        for name, g in grads.items():
            p, old, own = parameters[name], moments["m"][name], rates[self._factor_of[name]]
            if name in moments["v"]:
                new = self._adamw(p, old, moments["v"][name], g, finite, own)
                weights[name], m[name], v[name] = new
            else:
                weights[name], m[name] = self._muon(p, old, g, finite, own)
        return weights, {"m": m, "v": v}, mx.stack([loss, norm])

    def _adamw(
        self,
        p: mx.array,
        m: mx.array,
        v: mx.array,
        g: mx.array,
        finite: mx.array,
        rates: list[mx.array],
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return a parameter and its moments after a step, or as they are if it is not finite.

        The rule is that of torch.optim.AdamW; mlx.optimizers.AdamW decays every parameter and
        rounds its bias corrections to float32. MLX makes one kernel of it, because the new
        parameter is computed from the moments that are returned. All parameters have the same
        kernel, because one that does not decay is multiplied too.
        """
        settings, (_, *factors, size, scale) = self.settings, rates
        keep = factors[0 if decays(p.shape) else 1]
        m = mx.where(finite, settings.beta1 * m + (1 - settings.beta1) * g, m)
        v = mx.where(finite, settings.beta2 * v + (1 - settings.beta2) * (g * g), v)
        step = size * m / (mx.sqrt(v) * scale + settings.adam_eps)
        return mx.where(finite, p * keep - step, p), m, v

    def _muon(
        self, p: mx.array, m: mx.array, g: mx.array, finite: mx.array, rates: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Return a matrix and its momentum after a step, or as they are if it is not finite.

        mlx.optimizers.Muon has another scale of its steps, and adds weight decay to the gradient.
        """
        rate, keep, *_ = rates
        new = muon_update(p, m, g, rate, keep, low=self.precision == "bfloat16")
        return mx.where(finite, new[0], p), mx.where(finite, new[1], m)

    def _mean_loss(
        self,
        parameters: Arrays,
        total: mx.array,
        inputs: mx.array,
        targets: mx.array,
        weights: mx.array,
        *starts: mx.array,
    ) -> mx.array:
        hidden = self._hidden(parameters, inputs, *starts)
        return weighted_loss(hidden, self._head(parameters), targets, weights) / total

    def _head(self, parameters: Arrays) -> mx.array:
        return parameters[self.head] if self.head in parameters else self.frozen[self.head]

    def _hidden(
        self, parameters: Arrays, inputs: mx.array, document_starts: mx.array | None = None
    ) -> mx.array:
        self._fill_model(parameters)
        hidden = self.model.model(inputs, document_starts=document_starts)
        self._release_model()
        return hidden

    def _fill_model(self, parameters: Arrays) -> None:
        self.model.update(tree_unflatten(list(self._computed(parameters).items())))

    def _arrays(self, batch: Batch) -> list[mx.array]:
        """Inputs, targets and weights of a batch, and the starts of its documents.

        A compiled step always gets them, others where a row has several documents.
        """
        return [mx.array(array) for array in batch_arrays(batch, always=self._compiled)]

    def _computed(self, parameters: Arrays) -> Arrays:
        """Parameters in the types that the model computes with."""
        if self.precision != "bfloat16":
            return parameters
        return {
            name: p if name.endswith(EXACT) else p.astype(mx.bfloat16)
            for name, p in parameters.items()
        }

    def _release_model(self) -> None:
        """Take the trained weights out of the model, which would keep the old ones after a step."""
        nothing = mx.zeros(())
        self.model.update(tree_unflatten([(name, nothing) for name in self.parameters]))


def _launch_kernels_directly() -> None:
    """Keep MLX from collecting kernels in CUDA graphs, unless its variables say otherwise.

    A step of a large model has more than ten thousand kernels, and MLX prepares its graphs anew in
    every step, which takes the host longer than the kernels take the GPU. The host launches single
    kernels faster than the GPU computes them; few operations at once then bound the memory of what
    is not computed yet. MLX reads the variables at its first kernel.
    """
    if on_cuda():
        os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", str(OPERATIONS_AT_ONCE))


def _clipped(grads: Arrays, max_norm: float) -> tuple[Arrays, mx.array]:
    """Return the gradients, scaled to the norm `max_norm` if theirs is larger, and their norm.

    Like mlx.optimizers.clip_grad_norm, but every square has a sum, also a single number's: the sums
    are then added by two or three kernels instead of one for each place of the numbers.
    """
    squares = [(g if g.ndim else g[None]).square().sum() for g in grads.values()]
    norm = mx.sqrt(functools.reduce(mx.add, squares))
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return {name: g * factor for name, g in grads.items()}, norm


def _added(one: Sums, other: Sums) -> Sums:
    return one[0] + other[0], {name: g + other[1][name] for name, g in one[1].items()}
