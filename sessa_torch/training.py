"""Training in PyTorch: forward pass, loss, gradients, optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sessa_common.checkpoint.lazy_tensors import rows_of
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.data.batches import Batch
from sessa_common.errors import SessaError, require
from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import MOMENTS
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
from sessa_torch._compiled_step import CompiledStep, batch_tensors, compile_training
from sessa_torch._optimizer import make_optimizer
from sessa_torch._profile import TorchRecorder
from sessa_torch.checkpoint import build_model, choose_device, to_numpy, to_tensor
from sessa_torch.distributed.context import ContextParallel
from sessa_torch.distributed.sharded_state import ShardedState, require_pytorch
from sessa_torch.distributed.sharding import (
    as_part_of,
    clip_gradients,
    held_rows,
    is_sharded,
    own_values,
    shard,
    whole_array,
)
from sessa_torch.lora import add_lora
from sessa_torch.loss import likeliest, loss_and_likeliest, weighted_loss
from sessa_torch.model import SessaForCausalLM
from sessa_torch.processes import open_processes

MOMENT_KEYS = dict(zip(MOMENTS, ("exp_avg", "exp_avg_sq"), strict=True))


def choose_precision(precision: str, device: str) -> str:
    """Resolve "auto": bfloat16 on a CUDA device that computes in it, float32 elsewhere."""
    if precision != "auto":
        return precision
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return "bfloat16" if fast else "float32"


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
    recorder = TorchRecorder() if profile else None
    return run_session(TrainBackend, request, choose_device(device), reporter, processes, recorder)


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
    """A `sessa_common.training.backend.TrainBackend` in PyTorch.

    Weights, gradients and moments are float32; weights that are not trained have no gradient. With
    bfloat16 the forward pass runs under autocast: matrix products in bfloat16; norms, softmax, the
    feedback solve's sums and the loss in float32. With settings.compile a step is a
    `CompiledStep`, or each layer is compiled alone where weights are sharded. Raises SessaError
    for a device that is not there.
    """

    def __init__(
        self,
        config: SessaConfig,
        settings: TrainConfig,
        weights: Mapping[str, np.ndarray],
        device: str | None = None,
    ) -> None:
        self.settings = settings
        self.device = choose_device(device)
        self.precision = choose_precision(settings.precision, self.device)
        own = {name: weights[name] for name in parameter_shapes(config)}
        self.model = build_model(config, own, dtype="float32", device=self.device)
        add_lora(self.model, weights, lora_scale(settings))
        self.model.model.checkpoint_layers = settings.checkpoint_activations != "none"
        self.model.model._keeps_attention = settings.checkpoint_activations == "selective"
        trained = trained_shapes(config, settings)
        self.state_names = state_shapes(trained, settings).keys()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.objective = _Objective(self.model, self.device, self.precision)
        self.processes = open_processes()
        self.context: ContextParallel | None = None
        if settings.context_parallel > 1:
            require(not settings.compile, "`compile` does not go with `context_parallel` above 1")
            if self.device.startswith("cuda"):
                require_pytorch((2, 8), "`context_parallel` on CUDA")
            self.context = ContextParallel(settings.context_parallel)
            self.context.install(self.model)
        sharers = settings.shard_processes or self.processes.size
        self.shards = sharers > 1
        if self.shards:
            require_pytorch((2, 7), "sharing weights (`shard_processes`)")
            layers, low = self.model.model.layers, self.precision == "bfloat16"
            for layer in layers if settings.compile else ():
                layer.forward = compile_training(layer.forward)
            shard(self.objective, layers, sharers, bfloat16=low)
        every = self.model.named_parameters()
        self.parameters = {name: parameter for name, parameter in every if name in trained}
        factors, low = rate_factors(config, settings), self.precision == "bfloat16"
        self.optimizer = make_optimizer(self.parameters, factors, settings, low=low)
        # With shards the host is the slower one, so it does not wait before the update.
        self.skip = torch.zeros((), device=self.device) if self.shards else None
        if self.skip is not None:
            self.optimizer.skip_steps_where(self.skip)
        self.compiled: CompiledStep | None = None
        if settings.compile and not self.shards:
            parameters = list(self.parameters.values())
            self.compiled = CompiledStep(
                compile_training(self._loss_sum),
                parameters,
                self.optimizer,
                settings.max_grad_norm,
                self.processes,
            )

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Take one step on the weighted mean loss of all rows; (nats, gradient norm)."""
        # The sums of all processes are averaged, so each is divided by its share of the weights.
        total = sum(float(batch.weights.sum()) for batch in batches) / self.processes.size
        shared = self.settings.context_parallel
        batches = [own_rows(batch, self.processes, shared) for batch in batches]
        if self.compiled is not None:
            return self.compiled(batches, total, learning_rate)
        self.optimizer.zero_grad()
        losses = []
        for batch in batches:
            loss = self._loss_sum(*self._on_device(batch)) / total
            loss.backward()
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).sum()
        parameters = list(self.parameters.values())
        # FSDP has averaged the gradients of sharded parameters.
        whole = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
        self.processes.mean([mean_loss, *whole])
        clip = clip_gradients if self.shards else torch.nn.utils.clip_grad_norm_
        norm = clip(parameters, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        # A gradient that is not finite would spoil the weights for good, so the step is skipped.
        if self.skip is not None:
            self.skip.copy_(~torch.isfinite(mean_loss + norm))
            self.optimizer.step()
        # One transfer, so that the host waits for the device once in a step.
        loss, size = torch.stack([mean_loss, norm]).tolist()
        if self.skip is None and math.isfinite(loss + size):
            self.optimizer.step()
        return loss, size

    # Inference mode would leave gathered weights that no gradient can be taken of.
    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, np.ndarray]:
        """Return the weighted sum of the losses of a batch, in nats, and its `predict`."""
        inputs, targets, weights, *rest = self._on_device(batch)
        starts = rest[0] if rest else None
        loss, ids = self.objective(
            loss_and_likeliest, inputs, targets, weights, document_starts=starts
        )
        if self.context is not None:
            loss, ids = self.context.total(loss), self.context.whole(ids)
        return loss.item(), to_numpy(ids.int())

    @torch.no_grad()
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return the likeliest next ids int32 (B, T) after inputs (B, T)."""
        given = self._own(torch.from_numpy(np.ascontiguousarray(inputs)))
        ids = self.objective(likeliest, given.to(self.device))
        return to_numpy((ids if self.context is None else self.context.whole(ids)).int())

    @torch.no_grad()
    def gains(self, inputs: np.ndarray) -> dict[int, np.ndarray]:
        """Return the gains float32 (B, T) of every layer with feedback on inputs (B, T)."""
        found: dict[int, Tensor] = {}

        def keep(i: int, layer: Any, inputs: tuple[Tensor]) -> None:
            found[i] = layer.mixer.gain(layer.mixer_input(inputs[0])).float()

        # While a pass calls a layer, the layer's weights are whole in every process.
        layers = zip(self.model.model.layers, self.model.config.kinds, strict=True)
        hooks = [
            layer.register_forward_pre_hook(functools.partial(keep, i))
            for i, (layer, kind) in enumerate(layers)
            if kind.feeds_back
        ]
        try:
            if hooks:
                self.predict(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        whole = self.context.whole if self.context is not None else lambda gamma: gamma
        return {i: to_numpy(whole(gamma)) for i, gamma in found.items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Return the float32 weights that are trained."""
        return {name: whole_array(parameter) for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, np.ndarray] | ShardedState:
        """Return weights and optimizer moments as they are after the last step.

        Only the main one of several processes keeps them; the others get nothing. With
        `sharded_checkpoints` each process has its own part of shared weights.
        """
        if self.shards and self.settings.sharded_checkpoints:
            return ShardedState(dict(self._tensors()))
        arrays: dict[str, np.ndarray] = {}
        for name, value in self._tensors():
            array = whole_array(value)
            if self.processes.rank == 0:
                arrays[name] = array
        return arrays

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of the training state."""
        for name, parameter in self.parameters.items():
            yield f"weights.{name}", parameter.detach()
            moments = self.optimizer.state[parameter]
            for kind, key in MOMENT_KEYS.items():
                if f"{kind}.{name}" in self.state_names:
                    own = moments.get(key, torch.zeros_like(own_values(parameter)))
                    yield f"{kind}.{name}", as_part_of(own, parameter)

    @torch.no_grad()
    def restore(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Continue from a state that was taken after `steps` steps."""
        for name, parameter in self.parameters.items():
            rows = held_rows(parameter)
            own_values(parameter).copy_(_read(state, f"weights.{name}", rows))
            given = {
                key: _read(state, f"{kind}.{name}", rows)
                for kind, key in MOMENT_KEYS.items()
                if f"{kind}.{name}" in self.state_names
            }
            given["step"] = torch.tensor(float(steps))
            moments = self.optimizer.state[parameter]
            for key, value in given.items():
                if key in moments:
                    # A captured graph reads the tensor at its address, so it is kept.
                    moments[key].copy_(value)
                else:
                    moments[key] = value.to(parameter.device)

    def _loss_sum(
        self, inputs: Tensor, targets: Tensor, weights: Tensor, starts: Tensor | None = None
    ) -> Tensor:
        loss: Tensor = self.objective(
            weighted_loss, inputs, targets, weights, document_starts=starts
        )
        return loss

    def _on_device(self, batch: Batch) -> list[Tensor]:
        # A compiled layer or graph gets the starts of documents always, others where they matter.
        tensors = batch_tensors(batch, always=bool(self.settings.compile))
        starts = tensors[3] if tensors[3:] else None
        return [self._own(tensor, starts).to(self.device) for tensor in tensors]

    def _own(self, tokens: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Return the tokens (B, T) that this process has in the model, of rows with documents."""
        return tokens if self.context is None else self.context.own(tokens, document_starts)


def _read(state: Mapping[str, np.ndarray], name: str, rows: slice | None) -> Tensor:
    """Return some rows of a saved tensor, or all."""
    return to_tensor(state[name] if rows is None else rows_of(state, name, rows))


class _Objective(nn.Module):
    """A function of the hidden states and the head, in the one module that reads all parameters."""

    def __init__(self, model: SessaForCausalLM, device: str, precision: str) -> None:
        super().__init__()
        self.model, self.device_type = model, device.split(":")[0]
        self.low = precision == "bfloat16"

    def forward(
        self,
        function: Callable[..., Any],
        inputs: Tensor,
        *rest: Tensor,
        document_starts: Tensor | None = None,
    ) -> Any:
        """Return function(hidden, head, *rest) for ids (B, T), document_starts (B, T).

        Hidden states (B, T, D) are in bfloat16 where the model computes in it.
        """
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.low):
            hidden: Tensor = self.model.model(inputs.long(), document_starts=document_starts)
        tied = self.model.config.tie_word_embeddings
        head = self.model.model.embed_tokens if tied else self.model.lm_head
        return function(hidden.bfloat16() if self.low else hidden, head.weight, *rest)
