"""Ask whether feedback helps a pretrained Transformer, against LoRA with as many parameters.

    python benchmarks/upcycling.py [--data TEXTS ...] [--runs FOLDER] [--out FOLDER] [--tiny]

A Llama of 41 million parameters is pretrained on the texts (those of the standard library without
`--data`) with a short context, written as a folder of transformers and read back with feedback of
gain 0. From it, and on the same longer rows, are trained with every seed: LoRA, the feedback, both,
and all weights without and with feedback. The ranks of LoRA are chosen so that the first three
train equally many parameters within 2 %. Measured on held-out rows: nats a token by position, short
rows, and recall of a random passage at growing distance (accuracy of its last tokens the second
time). Beside them stand tokens a second and, on CUDA, the peak memory of training. Runs that are
whole are not trained again. `--tiny` tries every step on a CPU in a few minutes; its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import MIB, RESULTS, machine, save, table

import sessa_torch
import sessa_torch.decoding
from sessa_common.checkpoint.adapters import lora_shapes
from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.folder import load_config
from sessa_common.config import SessaConfig
from sessa_common.data.corpus import read_text_batches
from sessa_common.data.tokenizer import end_token_id, read_tokenizer
from sessa_common.inference.generation import Decoder
from sessa_common.train_config import TrainConfig
from sessa_common.training.metrics import read_metrics, tokens_per_second
from sessa_common.training.trained_parameters import trained_shapes

SEEDS = (0, 1, 2)
ARMS = ("lora", "feedback", "feedback+lora", "all, no feedback", "all, feedback")
PASSAGE, CUE = 16, 4  # tokens of a passage, and of its second time that are given
LLAMA = {
    "layer_kinds": "transformer",
    "norm_type": "rms",
    "mlp_type": "swiglu",
    "qkv_bias": False,
    "out_proj_bias": False,
    "mlp_bias": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the model and of the runs; `short` and `long` are rows in tokens."""

    model: dict[str, Any]
    tokenizer: str
    key_dim: int
    short: int
    long: int
    pretrain: dict[str, Any]
    tune: dict[str, Any]
    rows: int


FULL = Size(
    model={
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "max_position_embeddings": 4096,
    },
    tokenizer="8192",
    key_dim=64,
    short=512,
    long=4096,
    pretrain={"steps": 12000, "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 400},
    tune={"steps": 1000, "batch_size": 8},
    rows=64,
)
TINY = Size(
    model={
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    tokenizer="bytes",
    key_dim=8,
    short=32,
    long=128,
    pretrain={"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1},
    tune={"steps": 2, "batch_size": 1},
    rows=2,
)


def pretrain(runs: Path, size: Size, data: list[str]) -> None:
    """Train the Llama, write it as a folder of transformers, and add feedback to that."""
    if not (runs / "llama").is_dir():
        config = SessaConfig(**LLAMA, **size.model)
        sessa_torch.train(
            runs / "pretrained",
            config=config,
            force=True,
            data=data,
            tokenizer=size.tokenizer,
            sequence_length=size.short,
            **size.pretrain,
        )
        convert(runs / "pretrained", runs / "llama", framework="llama")
    if not (runs / "plain").is_dir():
        convert(runs / "llama", runs / "plain")


def matched(config: SessaConfig, key_dim: int) -> dict[str, tuple[int, int]]:
    """Width of the feedback's keys and rank of LoRA in each arm, for equal numbers of parameters.

    Where both are trained, LoRA has half the rank that it has alone, and the keys fill the rest.
    """
    layers, D = config.num_hidden_layers, config.hidden_size
    target, per_rank = layers * (2 * key_dim * (D + 1) + D + 1), count(lora_shapes(config, 1))
    alone = max(1, round(target / per_rank))
    half = max(1, alone // 2)
    narrow = ((target - half * per_rank) / layers - D - 1) / (2 * (D + 1))
    return {
        "lora": (0, alone),
        "feedback": (key_dim, 1),
        "feedback+lora": (max(1, round(narrow)), half),
        "all, no feedback": (0, 1),
        "all, feedback": (key_dim, 1),
    }


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of parameters of these shapes."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def tune(runs: Path, size: Size, data: list[str], arm: str, seed: int) -> tuple[Path, dict]:
    """Train one arm with one seed unless its run is whole; the model's folder and its cost."""
    key_dim, rank = matched(load_config(runs / "plain"), size.key_dim)[arm]
    base = runs / "plain"
    if key_dim:
        base = runs / f"feedback-{key_dim}"
        if not base.is_dir():
            convert(runs / "llama", base, feedback="all", feedback_key_dim=key_dim)
    name = arm.replace(", ", "-").replace("+", "-").replace(" ", "-")
    run, merged = runs / f"{name}-{seed}", runs / f"{name}-{seed}-merged"
    train = "all" if arm.startswith("all") else arm
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not merged.is_dir():
        lora = {"lora_rank": rank, "lora_alpha": 2.0 * rank} if "lora" in arm else {}
        sessa_torch.finetune(
            base,
            run,
            force=True,
            data=data,
            train=train,
            seed=seed,
            sequence_length=size.long,
            warmup_steps=size.tune["steps"] // 10,
            **lora,
            **size.tune,
        )
        convert(run if train == "all" else base, merged, merge=None if train == "all" else run)
    memory = torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0
    settings = TrainConfig(train=train, **({"lora_rank": rank} if "lora" in arm else {}))
    trained = trained_shapes(load_config(base), settings)
    speed = tokens_per_second([r for r in read_metrics(run) if "tokens" in r])
    return merged, {"trained": count(trained), "tokens/s": speed, "memory MiB": memory}


def held_out(runs: Path, size: Size, data: list[str]) -> np.ndarray:
    """Rows (n, long + 1) that no run was trained on."""
    config = load_config(runs / "plain")
    tokenizer, end = read_tokenizer(runs / "plain"), end_token_id(runs / "plain")
    settings = TrainConfig(data=tuple(data), sequence_length=size.long, batch_size=1)
    settings = dataclasses.replace(settings, evaluate_batches=size.rows)
    source = read_text_batches(tokenizer, end, config, settings)
    rows = [np.append(b.inputs[0], b.targets[0, -1]) for b in source.validation()]
    return np.stack([row for row in rows if len(row) == size.long + 1])


def log_probabilities(decoder: Decoder, row: np.ndarray) -> np.ndarray:
    """Nats (T,) of the tokens 1 to T of a row (T + 1,)."""
    decoder.reset()
    logits = decoder.logits(row[None, :-1])[0].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    return total - np.take_along_axis(logits, row[1:, None], -1)[:, 0]


def qualities(folder: Path, rows: np.ndarray, size: Size) -> dict[str, float]:
    """Nats by position, of short rows, and recall by distance."""
    decoder = sessa_torch.decoding.load_decoder(folder)
    nats = np.stack([log_probabilities(decoder, row) for row in rows])
    found = {"nats, short rows": float(nats[:, : size.short].mean())}
    edges = (0, size.long // 8, size.long // 4, size.long // 2, size.long)
    for start, stop in pairwise(edges):
        found[f"nats {start}-{stop}"] = float(nats[:, start:stop].mean())
    for distance in (size.long // 4, size.long // 2, size.long - 2 * PASSAGE):
        found[f"recall {distance}"] = recall(decoder, rows, distance)
    return found


def recall(decoder: Decoder, rows: np.ndarray, distance: int) -> float:
    """Share of a random passage's last tokens that are likeliest the second time."""
    rng, right = np.random.default_rng(distance), []
    for row in rows:
        passage = rng.choice(row, PASSAGE)
        text = np.concatenate([passage, row[: distance - PASSAGE], passage])
        decoder.reset()
        guesses = decoder.logits(text[None])[0].argmax(-1)
        right.append((guesses[-1 - (PASSAGE - CUE) : -1] == passage[CUE:]).mean())
    return float(np.mean(right))


def main() -> None:
    """Pretrain, train every arm with every seed, measure, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=["pydoc"])
    parser.add_argument("--runs", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    size, seeds = (TINY, SEEDS[:1]) if given.tiny else (FULL, SEEDS)
    pretrain(given.runs, size, given.data)
    rows = held_out(given.runs, size, given.data)
    cases: list[dict[str, Any]] = [{"arm": "before", **qualities(given.runs / "plain", rows, size)}]
    for arm in ARMS:
        found = []
        for seed in seeds:
            folder, cost = tune(given.runs, size, given.data, arm, seed)
            found.append({**cost, **qualities(folder, rows, size)})
        means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
        ends = [one[f"nats {size.long // 2}-{size.long}"] for one in found]
        cases.append({"arm": arm, **means, "range of the last nats": max(ends) - min(ends)})
        print(cases[-1], flush=True)
    print(machine())
    print(table(cases))
    if not given.tiny:
        save("upcycling", cases, given.out)


if __name__ == "__main__":
    main()
