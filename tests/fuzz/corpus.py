"""One small, whole input of every kind that a command reads, and the commands that read it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from sessa_common.checkpoint.folder import load_weights
from sessa_common.data.tokenizer import byte_tokenizer

TEXT = "Once upon a time a fox slept. Ein Bär lief, 東京 😀.\n" * 12
TRAIN = (
    "--layers",
    "1",
    "--width",
    "32",
    "--heads",
    "2",
    "--context",
    "16",
    "--batch-size",
    "1",
    "--evaluate-batches",
    "1",
    "--backend",
    "torch",
    "--device",
    "cpu",
)
ONE_STEP = (
    "--steps",
    "1",
    "--gradient-accumulation-steps",
    "1",
    "--batch-size",
    "1",
    "--evaluate-batches",
    "1",
    "--evaluate-every",
    "0",
    "--device",
    "cpu",
    "--backend",
    "torch",
)

Run = Callable[..., int]


@dataclass(frozen=True)
class Item:
    """An input: a file or folder, the files in it to damage, and the commands that read it.

    In a command "{in}" is the damaged input, "{out}" a fresh path, "{model}" a whole checkpoint and
    "{text}" a whole text. `weight` is the share of cases that the item gets.
    """

    path: Path
    commands: tuple[tuple[str, ...], ...]
    weight: int = 10
    files: tuple[str, ...] = ()

    def targets(self, copy: Path) -> list[Path]:
        """The files of a copy of the input that a case may damage."""
        if copy.is_file():
            return [copy]
        if self.files:
            return [copy / name for name in self.files]
        return sorted(path for path in copy.rglob("*") if path.is_file())


def build(folder: Path, sessa: Run) -> dict[str, Item]:
    """Write every input below `folder`; `sessa` runs a command and must succeed."""
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    items = _checkpoints(folder, text, sessa) | _weight_files(folder) | _texts(folder)
    return items | _tokenizers(folder) | _settings(folder) | _tasks(folder, sessa)


READ_MODEL = (
    ("info", "{in}"),
    ("info", "{in}", "--json"),
    ("convert", "{in}", "{out}"),
    ("convert", "{in}", "{out}", "--to", "mlx", "--dtype", "bfloat16"),
    ("generate", "{in}", "--prompt", "A fox", "--max-tokens", "2", "--backend", "torch"),
    ("eval", "{in}", "--data", "{text}", "--max-documents", "1", "--json", "--backend", "torch"),
)


def _checkpoints(folder: Path, text: Path, sessa: Run) -> dict[str, Item]:
    run, kinds = folder / "model", folder / "mamba2"
    made = ("--tokenizer", "bytes", "--data", text, "--steps", "1")
    sessa("train", *TRAIN, *made, "--out", run)
    sessa("train", *TRAIN, *made, "--no-feedback", "--out", folder / "gated")
    sessa("train", *TRAIN, *made, "--mixer", "mamba2", "--out", kinds)
    sessa("convert", run, folder / "sharded", "--shard-size", "20KB")
    sessa(
        "convert", run, folder / "quantized", "--to", "mlx", "--quantize", "4", "--group-size", "32"
    )
    sessa("export", run, folder / "exported")
    go_on = ("train", "--resume", "{in}", "--steps", "2", "--backend", "torch")
    items = {
        "run": Item(
            run,
            (
                *READ_MODEL,
                ("train", "--init", "{in}", "--data", "{text}", *ONE_STEP, "--out", "{out}"),
                go_on,
            ),
            25,
        ),
        "exported": Item(
            folder / "exported",
            (("generate", "{in}", "--prompt", "A fox", "--max-tokens", "2"),),
            3,
        ),
    }
    for name in ("gated", "mamba2", "sharded", "quantized"):
        items[name] = Item(folder / name, READ_MODEL)
    return items


def _weight_files(folder: Path) -> dict[str, Item]:
    import torch

    config = folder / "model" / "config.json"
    _, weights = load_weights(folder / "model")
    items = {}
    commands = (("info", "{in}/{name}"), ("convert", "{in}/{name}", "{out}"))
    for name in ("weights.npz", "weights.pt", "weights.safetensors"):
        place = folder / name.replace(".", "_")
        place.mkdir()
        shutil.copy(config, place / "config.json")
        if name.endswith(".npz"):
            np.savez(place / name, **weights)
        elif name.endswith(".pt"):
            tensors = {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}
            torch.save(tensors, place / name)
        else:
            shutil.copy(folder / "model" / "model.safetensors", place / name)
        named = tuple(tuple(part.replace("{name}", name) for part in c) for c in commands)
        items[name] = Item(place, named, 10)
    return items


def _texts(folder: Path) -> dict[str, Item]:
    import pyarrow
    from pyarrow import parquet

    rows = [{"story": f"story {i}: {TEXT[:60]}", "n": i, "x": None} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    place = folder / "texts"
    place.mkdir()
    (place / "a.txt").write_bytes(TEXT.encode())
    (place / "a.jsonl").write_bytes(lines)
    (place / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (place / "a.txt.zst").write_bytes(pyarrow.compress(TEXT.encode(), "zstd", asbytes=True))
    table = pyarrow.table({"story": [row["story"] for row in rows]})
    for codec in ("snappy", "zstd"):
        parquet.write_table(table, place / f"{codec}.parquet", compression=codec)
    write = (
        "data",
        "simplestories",
        "--data",
        "{in}",
        "--validation-fraction",
        "0.5",
        "--out",
        "{out}",
    )
    measure = (
        "eval",
        "{model}",
        "--data",
        "{in}",
        "--text-field",
        "story",
        "--max-documents",
        "2",
        "--backend",
        "torch",
    )
    prompt = (
        "generate",
        "{model}",
        "--prompt-file",
        "{in}",
        "--max-tokens",
        "1",
        "--backend",
        "torch",
    )
    items = {
        path.name: Item(path, (write,) * 5 + (measure,), 12) for path in sorted(place.iterdir())
    }
    items["folder of texts"] = Item(place, (write,), 10)
    items["prompt"] = Item(place / "a.txt", (prompt,), 3)
    return items


def _tokenizers(folder: Path) -> dict[str, Item]:
    place = folder / "tokenizers"
    place.mkdir()
    byte_tokenizer().save(str(place / "bytes.json"))
    words = {"<|endoftext|>": 0, "a": 1, "fox": 2, "##x": 3, "s": 4, "l": 5, "sl": 6}
    made = {
        "bpe": models.BPE(vocab=words, merges=[("s", "l")]),
        "words": models.WordLevel(words, unk_token="a"),
        "pieces": models.WordPiece(words, unk_token="a"),
        "unigram": models.Unigram([("<|endoftext|>", 0.0), ("a", -1.0), ("fox", -2.0)], unk_id=0),
    }
    for name, model in made.items():
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(place / f"{name}.json"))
    train = (
        "train",
        *TRAIN,
        "--tokenizer",
        "{in}",
        "--data",
        "{text}",
        "--steps",
        "1",
        "--out",
        "{out}",
    )
    return {path.name: Item(path, (train,), 4) for path in sorted(place.iterdir())}


def _settings(folder: Path) -> dict[str, Item]:
    common = ("--data", "{text}", *ONE_STEP, "--out", "{out}")
    config = ("train", "--config", "{in}", "--tokenizer", "bytes", *common)
    training = ("train", *TRAIN, "--train-config", "{in}", "--tokenizer", "bytes", *common)
    return {
        "config.json": Item(folder / "model" / "config.json", (config,), 8),
        "training.json": Item(folder / "model" / "training.json", (training,), 8),
    }


def _tasks(folder: Path, sessa: Run) -> dict[str, Item]:
    options = ("train_examples=4", "validation_examples=2", "test_examples=2")
    task = folder / "task"
    sessa(
        "data",
        "symbolsoup",
        "--out",
        task,
        *(part for option in options for part in ("--task-option", option)),
    )
    train = (
        "train",
        "--layers",
        "1",
        "--width",
        "32",
        "--heads",
        "2",
        "--task",
        "{in}",
        *ONE_STEP,
        "--out",
        "{out}",
    )
    return {"task": Item(task, (train,), 4)}
