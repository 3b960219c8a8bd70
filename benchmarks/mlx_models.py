"""Time Sessa in MLX against mlx-lm's own Llama of as many parameters, on a GPU.

python benchmarks/mlx_models.py train documents train-llama command decode prefill --out FOLDER
(needs mlx with a GPU, and mlx-lm)

`train` gives tokens a second of the product's own training step with one document in a row,
`documents` with several, `train-llama` those of the Llama, and `command` those of `sessa train`
itself. `decode` gives milliseconds a token after 512 and 8,192 tokens, in bfloat16 and 4 bits, and
the pool; a step is first compared with the call of the model. Its caches are filled with random
numbers, so that no prompt is read. `prefill` reads prompts of these lengths. `check` compares
decoding with the full pass. Both models have a vocabulary of 32,768; Sessa has 24 layers, the Llama
18. `--layers`, `--lengths`, `--depths` and `--bits` choose less.

Every row is printed and stored at once. MLX compiles each fused kernel with NVRTC when it is first
used, for some seconds; it keeps them in FOLDER/ptx, and a later run with that folder takes them
from there. While they are compiled, a line tells how many there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_subjects import (
    GIB,
    Choice,
    Row,
    count,
    llama,
    llama_modules,
    quantize,
    sessa,
    sessa_config,
)
from mlx_training import command, documents, say, train, train_llama

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.inference.generation import prefill
from sessa_common.inference.sampling import SamplingConfig
from sessa_mlx import _step_layers
from sessa_mlx._step import held_arrays
from sessa_mlx.cache import SessaCache
from sessa_mlx.checkpoint import build_model
from sessa_mlx.decoding import Decoder
from sessa_mlx.feedback.products import operands_lose_bits

LLAMA_PIECE = 2048  # tokens of a prompt, mlx-lm's own number
WARM_UP, TIMED = 20, 80  # tokens
GREEDY = SamplingConfig(temperature=0)


class SessaTokens:
    """The product's decoder: prefill in its pieces, and tokens one ahead."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder = Decoder(model)

    def prefill(self, ids: np.ndarray) -> None:
        self.decoder.reset()
        prefill(self.decoder, ids, None)

    def fill(self, depth: int) -> None:
        """A cache of `depth` tokens of random numbers."""
        self.decoder.reset()
        config, tensors = self.decoder.config, {}
        for i in range(config.num_hidden_layers):
            rows = {
                "k": (1, config.num_key_value_heads, depth, config.head_dim),
                "v": (1, config.num_key_value_heads, depth, config.head_dim),
                "k_fb": (1, depth, config.feedback_key_dim),
                "s": (1, depth, config.hidden_size),
            }
            for name, shape in rows.items():
                dtype = mx.float32 if name == "s" else mx.bfloat16
                tensors[f"layers.{i}.{name}"] = mx.random.normal(shape).astype(dtype)
        self.decoder.cache.load(tensors, mx.ones((1, depth), dtype=mx.bool_))
        self.decoder.feed(np.array([[1]]))

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
        for start in range(0, ids.shape[1], LLAMA_PIECE):
            logits = self.model(mx.array(ids[:, start : start + LLAMA_PIECE]), cache=self.cache)
            mx.eval(logits[:, -1], [cache.state for cache in self.cache])
            mx.clear_cache()
        self.last = logits[:, -1].argmax(-1)
        mx.eval(self.last)

    def fill(self, depth: int) -> None:
        """A cache of `depth` tokens of random numbers."""
        self.cache = self.caches.make_prompt_cache(self.model)
        attention = self.model.layers[0].self_attn
        shape = (1, attention.n_kv_heads, depth, attention.head_dim)
        for cache in self.cache:
            keys, values = (mx.random.normal(shape).astype(mx.bfloat16) for _ in "kv")
            cache.update_and_fetch(keys, values)
        mx.eval([cache.state[:2] for cache in self.cache])
        self.last = mx.array([1])

    def tokens(self, number: int) -> Iterator[int]:
        mx.async_eval(self.last)
        for turn in range(number):
            following = self.model(self.last[:, None], cache=self.cache)[:, -1].argmax(-1)
            mx.async_eval(following)
            yield int(self.last.item())
            self.last = following
            if turn % 256 == 255:
                mx.clear_cache()


Runner = SessaTokens | LlamaTokens


def decode_row(name: str, runner: Runner, depth: int) -> Row:
    """Times of a token and memory after `depth` tokens."""
    mx.clear_cache()
    start = time.perf_counter()
    runner.fill(depth)
    times, first = [], 0.0
    mx.reset_peak_memory()
    last = time.perf_counter()
    for _ in runner.tokens(WARM_UP + TIMED):
        now = time.perf_counter()
        times.append(1e3 * (now - last))
        first, last = first or now - start, now
    timed = times[WARM_UP:]
    return {
        "model": name,
        "after": depth,
        "ms a token": round(median(timed), 3),
        "mean ms": round(sum(timed) / len(timed), 3),
        "least ms": round(min(timed), 3),
        "host ms": round(build_time(runner), 3),
        "first token s": round(first, 1),
        "live GiB": round(mx.get_active_memory() / GIB, 3),
        "pool GiB": round(mx.get_cache_memory() / GIB, 3),
        "peak GiB": round(mx.get_peak_memory() / GIB, 3),
    }


def build_time(runner: Runner) -> float:
    """Milliseconds in which Python builds the graph of a token."""
    times, ids = [], mx.array([[1]])
    for _ in range(10):
        start = time.perf_counter()
        if isinstance(runner, SessaTokens):
            logits = runner.decoder.next_token(ids, runner.decoder.cache)
        else:
            logits = runner.model(ids, cache=runner.cache)
        times.append(1e3 * (time.perf_counter() - start))
        held = held_arrays(runner.decoder.cache) if isinstance(runner, SessaTokens) else []
        mx.eval(logits, held)
    return median(times)


def checked(runner: SessaTokens, depth: int) -> Row:
    """The difference of two tokens' logits in a step and in the call of the model.

    The mean of the states is also computed the plain way, which is timed if the other is wrong.
    """
    runner.fill(depth)
    cache = runner.decoder.cache
    tensors, mask = cache.tensors(), mx.ones((1, cache.length), dtype=mx.bool_)

    def logits(call: Callable[..., mx.array]) -> mx.array:
        cache = SessaCache(runner.decoder.config)
        cache.load(tensors, mask)
        found = [call(mx.array([[token]]), cache).astype(mx.float32) for token in (1, 2)]
        mx.eval(found, held_arrays(cache))
        return mx.stack(found).reshape(2, -1)

    wanted = logits(lambda ids, cache: runner.decoder.model(ids, cache=cache))
    row: Row = {"check": "a step and the call of the model", "after": cache.length}
    strided = _step_layers.fits_strided_attention
    for name, fits in (("error", strided), ("plain way's error", _never)):
        _step_layers.fits_strided_attention = fits
        found = logits(runner.decoder.next_token)
        row[name] = (mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted)).item()
    if row["error"] < 2 * row["plain way's error"] + 0.005:
        _step_layers.fits_strided_attention = strided
    return {**row, "timed": _step_layers.fits_strided_attention.__name__}


def _never(states: mx.array) -> bool:
    return False


def decode(choice: Choice) -> Iterator[Row]:
    ours, other = SessaTokens(sessa(choice)), LlamaTokens(llama(choice))
    runners: dict[str, Runner] = {"Sessa": ours, "Llama": other}
    yield {"Sessa": count(ours.decoder.model), "Llama": count(other.model)}
    for bits in choice.bits:
        if bits == 4:
            for model in (ours.decoder.model, other.model):
                quantize(model)
        for depth in choice.depths:
            if bits == 16:
                yield checked(ours, depth)
            for name, runner in runners.items():
                yield decode_row(f"{name}, {bits} bits", runner, depth)


def prefill_times(choice: Choice) -> Iterator[Row]:
    """Tokens a second of prompts, the first and the second time."""
    depths = (64, 256) if choice.small else choice.depths
    ids = np.random.default_rng(0).integers(0, 300, (1, max(depths)))
    runners: dict[str, Callable[[], Runner]] = {
        "Sessa": lambda: SessaTokens(sessa(choice)),
        "Llama": lambda: LlamaTokens(llama(choice)),
    }
    for name, make in runners.items():
        runner = make()
        for depth in depths:
            mx.clear_cache()
            mx.reset_peak_memory()
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                runner.prefill(ids[:, :depth])
                seconds.append(time.perf_counter() - start)
            yield {
                "prefill": name,
                "tokens": depth,
                "tokens/s, first": round(depth / seconds[0]),
                "tokens/s": round(depth / min(seconds[1:])),
                "pool GiB": round(mx.get_cache_memory() / GIB, 3),
                "peak GiB": round(mx.get_peak_memory() / GIB, 3),
            }
        del runner
        gc.collect()


def check(choice: Choice) -> Iterator[Row]:
    """Cached decoding against the full pass, in float32 and on the present device.

    Where MLX rounds the operands of products to TF32, the limit is that of such products.
    """
    limit = 2e-3 if operands_lose_bits() else 1e-4
    for kind in ("sessa", "transformer"):
        config = dataclasses.replace(
            sessa_config(Choice(small=True)), layer_kinds=kind, num_hidden_layers=2, vocab_size=300
        )
        model = build_model(config, initial_weights(config, 3), dtype="float32")
        ids = np.random.default_rng(1).integers(0, 300, (2, 300))
        full, decoder = np.array(model(mx.array(ids))), Decoder(model)
        pieces = [decoder.logits(ids[:, :240])]
        pieces += [decoder.logits(ids[:, t : t + 1]) for t in range(240, 300)]
        error = np.linalg.norm(np.concatenate(pieces, 1) - full) / np.linalg.norm(full)
        yield {"check": f"{kind}, decoding against the full pass", "error": float(error)}
        if not error < limit:
            raise SystemExit(f"decoding differs from the full pass by {error:.1e}")
    yield from check_copies(choice)


def check_copies(choice: Choice) -> Iterator[Row]:
    """Memory that a step needs beside what it holds, against the smallest cache buffer."""
    runner = SessaTokens(sessa(choice))
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


PARTS = {
    "train": train,
    "documents": documents,
    "train-llama": train_llama,
    "command": command,
    "decode": decode,
    "prefill": prefill_times,
    "check": check,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--layers", type=int, default=0, help="of Sessa; the Llama has 3/4")
    for name in ("lengths", "depths", "bits"):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=getattr(Choice, name))
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl and ptx")
    options = parser.parse_args()
    chosen = {f.name: getattr(options, f.name) for f in dataclasses.fields(Choice)}
    kernels = options.out / "ptx"
    kernels.mkdir(parents=True, exist_ok=True)
    # MLX reads the variable with the first kernel that it compiles.
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(kernels))
    about = {"mlx": mx.__version__, **mx.device_info(), "time": time.strftime("%Y-%m-%d %H:%M")}
    with kernels_told(Path(os.environ["MLX_PTX_CACHE_DIR"])):
        for part in options.parts:
            start = time.perf_counter()
            for row in PARTS[part](Choice(**chosen)):
                write({**row, "at s": round(time.perf_counter() - start, 1)}, options.out)
            seconds = round(time.perf_counter() - start, 1)
            write({"part": part, "seconds": seconds, **about}, options.out)


@contextmanager
def kernels_told(folder: Path) -> Iterator[None]:
    """Say every few seconds how many kernels MLX has compiled, if there are more than before."""
    ended, start = Event(), time.perf_counter()

    def watch() -> None:
        told = found = _kernels(folder)
        say(f"{told} kernels are kept in {folder}")
        while not ended.wait(5):
            if (found := _kernels(folder)) > told:
                say(f"{found} kernels, {found - told} of them new")
                told = found

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        say(f"{_kernels(folder)} kernels after {time.perf_counter() - start:.0f} s")


def _kernels(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.ptx"))


def write(row: Row, out: Path) -> None:
    """Print a row at once, so that a part that is ended keeps what it measured."""
    text = json.dumps(row, default=str)
    print(text, flush=True)
    with (out / "rows.jsonl").open("a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
