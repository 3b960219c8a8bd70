"""Time Sessa in MLX against mlx-lm's own Llama of as many parameters, on a GPU.

python benchmarks/mlx_models.py check decode train command (needs mlx with a GPU, and mlx-lm)

`check` compares cached decoding with the full pass before anything is timed. `decode` gives
milliseconds a token after 512 and 8,192 tokens, prefill and the pool, in bfloat16 and 4 bits.
`train` gives tokens a second of the product's own training step, and `command` of `sessa train`
itself. Both models have a vocabulary of 32,768; Sessa has 24 layers, the Llama 18.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# MLX reads the variable once; without it float32 products use 11-bit operands.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_flatten

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import next_token_batch
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig
from sessa_common.training.metrics import read_metrics, tokens_per_second
from sessa_mlx._step import held_arrays
from sessa_mlx.checkpoint import build_model
from sessa_mlx.decoding import Decoder
from sessa_mlx.training import TrainBackend

GIB = 2**30
PREFILL_CHUNK = 512
DEPTHS = (512, 8192)  # tokens in the cache
SHAPES = ((8, 2048), (2, 8192))  # rows and tokens of a training step
GREEDY = SamplingConfig(temperature=0)
Row = dict[str, Any]


def sessa_config(small: bool) -> SessaConfig:
    """sessa-131m with the vocabulary and the context of the comparison."""
    if small:
        return SessaConfig(vocab_size=300, hidden_size=64, max_position_embeddings=10_000)
    return dataclasses.replace(
        PRESETS["sessa-131m"], vocab_size=32_768, max_position_embeddings=10_000
    )


def llama_modules() -> tuple[Any, Any]:
    """mlx_lm.models.llama and mlx_lm.models.cache, without what mlx_lm imports at its top."""
    if "mlx_lm" not in sys.modules:
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None:
            raise SystemExit("this needs mlx-lm")
        package = types.ModuleType("mlx_lm")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mlx_lm"] = package
    return tuple(importlib.import_module(f"mlx_lm.models.{name}") for name in ("llama", "cache"))


def llama(small: bool) -> nn.Module:
    """A Llama in bfloat16 with as many parameters as Sessa."""
    config, module = sessa_config(small), next(iter(llama_modules()))
    arguments = module.ModelArgs(
        model_type="llama",
        hidden_size=config.hidden_size,
        num_hidden_layers=3 if small else 18,
        intermediate_size=-(-8 * config.hidden_size // 3 // 64) * 64,
        num_attention_heads=config.num_attention_heads,
        rms_norm_eps=1e-5,
        vocab_size=config.vocab_size,
    )
    model = module.Model(arguments)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def sessa(small: bool, dtype: str = "bfloat16") -> nn.Module:
    config = sessa_config(small)
    return build_model(config, initial_weights(config, 0), dtype=dtype)


def quantize(model: nn.Module) -> None:
    """Pack what `sessa convert --quantize 4` packs."""
    nn.quantize(
        model,
        64,
        4,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and "gamma_ctx" not in path,
    )
    mx.eval(model.parameters())


def count(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


class SessaTokens:
    """The product's decoder: prefill in chunks, and tokens one ahead."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder = Decoder(model)

    def prefill(self, ids: np.ndarray) -> None:
        self.decoder.reset()
        for start in range(0, ids.shape[1], PREFILL_CHUNK):
            self.decoder.feed(ids[:, start : start + PREFILL_CHUNK])
        mx.eval(self.decoder.last)

    def tokens(self, number: int) -> Iterator[int]:
        with closing(self.decoder.draw(GREEDY, number)) as drawn:
            for ids in drawn:
                yield int(ids[0])


class LlamaTokens:
    """mlx-lm's way: `mx.async_eval` of the next token before the last one is read."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        _, self.caches = llama_modules()

    def prefill(self, ids: np.ndarray) -> None:
        self.cache = self.caches.make_prompt_cache(self.model)
        for start in range(0, ids.shape[1], PREFILL_CHUNK):
            logits = self.model(mx.array(ids[:, start : start + PREFILL_CHUNK]), cache=self.cache)
            mx.eval(logits[:, -1], [cache.state for cache in self.cache])
            mx.clear_cache()
        self.last = logits[:, -1].argmax(-1)

    def tokens(self, number: int) -> Iterator[int]:
        mx.async_eval(self.last)
        for turn in range(number):
            following = self.model(self.last[:, None], cache=self.cache)[:, -1].argmax(-1)
            mx.async_eval(following)
            yield int(self.last.item())
            self.last = following
            if turn % 256 == 255:
                mx.clear_cache()


def decode_rows(name: str, runner: SessaTokens | LlamaTokens, vocabulary: int) -> Iterator[Row]:
    """Times of prefill and of a token, and memory, after each number of tokens."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, max(DEPTHS)))
    for depth in DEPTHS:
        mx.clear_cache()
        mx.reset_peak_memory()
        rates = []
        for _ in range(2):
            start = time.perf_counter()
            runner.prefill(ids[:, :depth])
            rates.append(depth / (time.perf_counter() - start))
        times, last = [], time.perf_counter()
        for _ in runner.tokens(120):
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        live = mx.get_active_memory()
        yield {
            "model": name,
            "after": depth,
            "ms a token": round(median(times[20:]), 3),
            "mean ms": round(sum(times[20:]) / len(times[20:]), 3),
            "prefill tokens/s, first": round(rates[0]),
            "prefill tokens/s": round(rates[1]),
            "live GiB": round(live / GIB, 3),
            "pool GiB": round(mx.get_cache_memory() / GIB, 3),
            "peak GiB": round(mx.get_peak_memory() / GIB, 3),
        }


def decode(small: bool) -> Iterator[Row]:
    makers: dict[str, tuple[Callable[[bool], nn.Module], Any]] = {
        "Sessa": (sessa, SessaTokens),
        "Llama": (llama, LlamaTokens),
    }
    for name, (make, runner) in makers.items():
        model = make(small)
        yield {"model": name, "parameters": count(model)}
        for bits in (16, 4):
            if bits == 4:
                quantize(model)
            yield from decode_rows(f"{name}, {bits} bits", runner(model), 300)
        del model
        gc.collect()
        mx.clear_cache()


def check(small: bool) -> Iterator[Row]:
    """Cached decoding against the full pass, in float32 and on the present device."""
    for kind in ("sessa", "transformer"):
        config = dataclasses.replace(
            sessa_config(True), layer_kinds=kind, num_hidden_layers=2, vocab_size=300
        )
        model = build_model(config, initial_weights(config, 3), dtype="float32")
        ids = np.random.default_rng(1).integers(0, 300, (2, 300))
        full, decoder = np.array(model(mx.array(ids))), Decoder(model)
        pieces = [decoder.logits(ids[:, :240])]
        pieces += [decoder.logits(ids[:, t : t + 1]) for t in range(240, 300)]
        error = np.linalg.norm(np.concatenate(pieces, 1) - full) / np.linalg.norm(full)
        yield {"check": f"{kind}, decoding against the full pass", "error": float(error)}
        if not error < 1e-4:
            raise SystemExit(f"decoding differs from the full pass by {error:.1e}")
    yield from check_copies(small)


def check_copies(small: bool) -> Iterator[Row]:
    """Memory that a step needs beside what it holds, against the smallest cache buffer."""
    runner = SessaTokens(sessa(small))
    runner.prefill(np.random.default_rng(0).integers(0, 300, (1, 3000)))
    held = held_arrays(runner.decoder.cache)
    smallest = min(array.nbytes for array in held if array.ndim > 2 and array.nbytes > 2**16)
    del held
    drawn = runner.tokens(60)
    for _ in range(20):
        next(drawn)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(20):
        next(drawn)
    extra = mx.get_peak_memory() - before
    drawn.close()
    yield {"check": "a step copies no buffer", "extra bytes": extra, "buffer bytes": smallest}


def sessa_step(small: bool) -> Callable[[np.ndarray], float]:
    config = sessa_config(small)
    settings = TrainConfig(precision="bfloat16")
    backend = TrainBackend(config, settings, initial_weights(config, 0), None)
    return lambda ids: backend.step([next_token_batch(ids)], 1e-4)[0]


def llama_step(small: bool) -> Callable[[np.ndarray], float]:
    """One compiled step in bfloat16 with mlx's AdamW."""
    model, optimizer = llama(small), optimizers.AdamW(1e-4)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def loss(model: nn.Module, ids: mx.array) -> mx.array:
        logits = model(ids[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, ids[:, 1:], reduction="mean")

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array) -> mx.array:
        value, grads = nn.value_and_grad(model, loss)(model, ids)
        optimizer.update(model, grads)
        return value

    def run(ids: np.ndarray) -> float:
        value = step(mx.array(ids))
        mx.eval(value, state)
        return value.item()

    return run


def train(small: bool) -> Iterator[Row]:
    for name, make in (("Sessa", sessa_step), ("Llama", llama_step)):
        step = make(small)
        for B, T in SHAPES:
            mx.clear_cache()
            mx.reset_peak_memory()
            ids = np.random.default_rng(0).integers(0, 300, (B, T + 1))
            start = time.perf_counter()
            losses = [step(ids)]
            first, times = time.perf_counter() - start, []
            while len(times) < 3 or (sum(times) < 6 and len(times) < 8):
                start = time.perf_counter()
                losses.append(step(ids))
                times.append(time.perf_counter() - start)
            yield {
                "training": name,
                "rows": B,
                "T": T,
                "tokens/s": round(B * T / median(times[1:])),
                "first step s": round(first, 1),
                "peak GiB": round(mx.get_peak_memory() / GIB, 2),
                "pool GiB": round(mx.get_cache_memory() / GIB, 2),
                "losses": [round(losses[0], 3), round(losses[-1], 3)],
            }
        del step
        gc.collect()


def command(small: bool) -> Iterator[Row]:
    """`sessa train --backend mlx` of the preset on the texts that every Python brings."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ("demo", 64, 2, 4) if small else ("sessa-131m", 2048, 8, 12)
        preset, length, rows, steps = map(str, sizes)
        given = ["--backend", "mlx", "--preset", preset, "--tokenizer", "bytes", "--data", "pydoc"]
        given += ["--max-position-embeddings", length, "--batch-size", rows, "--steps", steps]
        given += ["--evaluate-every", "0", "--checkpoint-every", "0", "--max-documents", "200"]
        out = Path(folder) / "run"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "sessa_cli.main", "train", "--out", str(out), *given],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            yield {"command": "failed", "output": (done.stdout + done.stderr)[-1500:]}
            return
        yield {
            "command": "sessa train",
            "seconds": round(time.perf_counter() - start, 1),
            "tokens/s": tokens_per_second(read_metrics(out)),
            "dtype": json.loads((out / "config.json").read_text())["dtype"],
        }


PARTS = {"check": check, "decode": decode, "train": train, "command": command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--out", type=Path, help="file to which the rows are appended as JSON")
    options = parser.parse_args()
    about = {"mlx": mx.__version__, **mx.device_info(), "time": time.strftime("%Y-%m-%d %H:%M")}
    for part in options.parts:
        start = time.perf_counter()
        for row in PARTS[part](options.small):
            write(row, options.out)
        seconds = round(time.perf_counter() - start, 1)
        write({"part": part, "seconds": seconds, **about}, options.out)


def write(row: Row, out: Path | None) -> None:
    """Print a row at once, so that a part that is ended keeps what it measured."""
    text = json.dumps(row, default=str)
    print(text, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
