"""Coordinate check of muP: by how much the parts of a model change in a few steps, by width.

    OMP_NUM_THREADS=1 python benchmarks/coordinate_check.py [--widths 32,64,128,256,512]
        [--kinds sessa] [--optimizer adamw] [--steps 10] [--rate 1e-2] [--seeds 3] [--out FOLDER]

Models of every width train on the same batch, with the learning rate as it is and with
`mup_base_width` of the narrowest. A number is the mean absolute change of a part since the start:
what a layer leaves in the residual stream, the feedback's scores, <a, w> of the gain tanh(<a, w> +
b), and the logits. Without the rule the changes grow with the width; with it they keep their size.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, save, table
from torch import Tensor

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import next_token_batch
from sessa_common.train_config import TrainConfig
from sessa_common.training.width_scaling import scale_initial
from sessa_torch.mixer import SessaMixer
from sessa_torch.training import TrainBackend

V, HEAD_DIM, ROWS, LENGTH = 64, 16, 4, 32
Parts = dict[str, Tensor]


def model_config(width: int, kinds: str = "sessa", layers: int = 2) -> SessaConfig:
    """A small model whose heads are as wide at every width."""
    return SessaConfig(
        vocab_size=V,
        hidden_size=width,
        num_attention_heads=width // HEAD_DIM,
        num_hidden_layers=layers,
        layer_kinds=kinds,
        mamba_d_head=HEAD_DIM,
        mamba_d_state=HEAD_DIM,
    )


def record(backend: TrainBackend, ids: Tensor) -> Parts:
    """The parts of a forward pass on ids (B, T), by name."""
    model, parts, hooks = backend.model, Parts(), []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: parts.update({name: output.detach().clone()})

    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(keep(f"layer {i}")))
        mixer = getattr(layer, "mixer", None)
        if isinstance(mixer, SessaMixer):
            hooks.append(mixer.gamma_ctx.register_forward_hook(keep(f"gain {i}")))
            hooks.append(mixer.proj_fb.register_forward_hook(keep(f"scores {i}")))
    with torch.no_grad():
        parts["logits"] = model(ids)
    for hook in hooks:
        hook.remove()
    for name in (name for name in parts if name.startswith("scores")):
        q, k = parts[name].chunk(2, -1)
        parts[name] = (q @ k.mT / q.shape[-1] ** 0.5).tril(-1)
    return parts


def changes(config: SessaConfig, settings: TrainConfig, steps: int) -> dict[str, float]:
    """Mean absolute change of every part by training on one batch."""
    weights = scale_initial(initial_weights(config, settings.seed), config, settings)
    backend = TrainBackend(config, settings, weights, "cpu")
    rows = np.random.default_rng(settings.seed).integers(0, V, (ROWS, LENGTH + 1), np.int32)
    ids = torch.from_numpy(rows[:, :-1]).long()
    before = record(backend, ids)
    for _ in range(steps):
        backend.step([next_token_batch(rows)], settings.learning_rate)
    after = record(backend, ids)
    return {name: (after[name] - before[name]).abs().mean().item() for name in before}


def by_width(
    widths: list[int], settings: TrainConfig, kinds: str, steps: int, seeds: int = 1
) -> dict[str, list[float]]:
    """`changes` at every width, means over seeds."""
    found: dict[str, list[float]] = {}
    for width in widths:
        runs = []
        for seed in range(seeds):
            fields = settings.to_dict() | {"seed": seed}
            runs.append(changes(model_config(width, kinds), TrainConfig.from_dict(fields), steps))
        for name in runs[0]:
            found.setdefault(name, []).append(float(np.mean([run[name] for run in runs])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", default="32,64,128,256,512")
    parser.add_argument("--kinds", default="sessa")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    options = parser.parse_args()
    widths = [int(width) for width in options.widths.split(",")]
    print(machine(), flush=True)
    rows: list[dict[str, Any]] = []
    for base in (0, widths[0]):
        settings = TrainConfig(
            learning_rate=options.rate,
            optimizer=options.optimizer,
            precision="float32",
            compile=False,
            mup_base_width=base,
        )
        found = by_width(widths, settings, options.kinds, options.steps, options.seeds)
        rule = "muP" if base else "none"
        for name, values in found.items():
            sizes = {str(width): f"{x:.3g}" for width, x in zip(widths, values, strict=True)}
            growth = f"{values[-1] / values[0]:.2f}"
            rows.append({"rule": rule, "part": name, **sizes, "last / first": growth})
        print(table(rows[-len(found) :]), flush=True)
    if options.out is not None:
        date = datetime.date.today()
        save(f"coordinate_check_{options.optimizer}_cpu_{date}", rows, options.out)


if __name__ == "__main__":
    main()
