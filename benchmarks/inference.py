"""Decoding and prefill of whole models by the decoder that `sessa generate` uses.

    python benchmarks/inference.py [--models NAME ...] [--check] [--out FOLDER]

On CUDA: models of one size in bfloat16, with random weights. Each is first checked:
the tokens of a captured graph are those without one, and a step's logits are close to those of a
prefill. A token's time is the median of the time between two ids that `draw` yields, greedily. A
prefill is timed up to the logits, in the pieces that the decoder chooses; the time to the first
token is that of `generate`, warm. Medians.

On a CPU: tokens a second of the 9m model in float32, for comparison with another checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, machine, save, table

from sessa_common.config import SessaConfig
from sessa_common.inference.generation import generate, prefill
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.presets import PRESETS
from sessa_torch.decoding import Decoder
from sessa_torch.model import SessaForCausalLM

GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=0.8)
VOCABULARY, LONGEST = 32768, 32768
ON_CUDA = ("sessa-131m", "transformer-131m-deep", "transformer-131m", "mamba2-131m")
ON_CPU = ("sessa-9m", "transformer-9m-deep")
# Models of a preset's width and depth with the blocks of the Llama family, without and with
# feedback: `--models llama-131m upcycled-131m`.
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"layer_kinds": "transformer"},
    "upcycled": {"layer_kinds": "sessa_transformer", "feedback_key_dim": 128},
}
LLAMA = {
    "norm_type": "rms",
    "mlp_type": "swiglu",
    "qkv_bias": False,
    "out_proj_bias": False,
    "mlp_bias": False,
}
# Sequences and tokens before the first that is timed.
DECODE = ((1, 512), (1, 16384), (16, 2048))
PREFILL, PROMPT = 16384, 512
# Largest difference of logits, relative to the largest logit, of two ways through a model.
LIMIT = {"bfloat16": 0.05, "float32": 1e-4}


def model_config(name: str) -> SessaConfig:
    """A preset, or a model of the Llama family of its size."""
    kind, _, size = name.partition("-")
    if kind not in FAMILY:
        return PRESETS[name]
    plain = PRESETS[f"transformer-{size}"]
    inner = plain.hidden_size * 8 // 3
    return dataclasses.replace(plain, intermediate_size=inner, **LLAMA, **FAMILY[kind])


def new_decoder(name: str, dtype: str) -> Decoder:
    """A decoder of a model whose weights are drawn on its device."""
    config = dataclasses.replace(
        model_config(name), vocab_size=VOCABULARY, max_position_embeddings=LONGEST
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = SessaForCausalLM(config).to(getattr(torch, dtype))
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn_like(weight)
    return Decoder(model)


def draw_ids(B: int, T: int) -> np.ndarray:
    return np.random.default_rng(B + T).integers(0, VOCABULARY, (B, T))


def seconds(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check(decoder: Decoder, dtype: str) -> str:
    """The largest difference between a step and a prefill; raises when it is too large."""
    ids, worst = draw_ids(3, 300), 0.0
    for T in (1, 7):
        decoder.reset()
        prefill(decoder, ids[:, :-T], None)
        got = decoder.step(ids[:, -T:])
        decoder.reset()
        want = prefill(decoder, ids, None)
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    if not worst <= LIMIT[dtype]:
        raise SystemExit(f"logits of a step differ from those of a prefill by {worst:.1e}")
    texts = []
    for graphs in (False, True):
        if decoder._runner is not None:
            decoder._runner.graphs = graphs
        decoder.reset()
        prefill(decoder, ids, None)
        texts.append(np.array(list(decoder.draw(SAMPLED, 24))))
    if not (texts[0] == texts[1]).all():
        raise SystemExit("a captured graph gives other tokens")
    return f"{worst:.1e}"


def decode_ms(decoder: Decoder, B: int, past: int, tokens: int, sampling: SamplingConfig) -> float:
    """Median milliseconds between two ids, behind `past` tokens."""
    decoder.reset()
    prefill(decoder, draw_ids(B, past), None)
    times = []
    with closing(decoder.draw(sampling, tokens + 8)) as drawn:
        for _ in range(8):
            next(drawn)
        for _ in range(tokens):
            start = time.perf_counter()
            next(drawn)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def prefill_ms(decoder: Decoder, T: int, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        decoder.reset()
        times.append(seconds(lambda: prefill(decoder, draw_ids(1, T), None)))
    return statistics.median(times[1:]) * 1e3


def first_token_ms(decoder: Decoder, T: int, repeats: int) -> float:
    """Median milliseconds from the call of `generate` to its first id."""
    prompt, times = draw_ids(1, T)[0].tolist(), []
    for _ in range(repeats + 1):
        with closing(generate(decoder, [prompt], GREEDY, max_tokens=4)) as steps:
            times.append(seconds(lambda: next(steps)))
    return statistics.median(times[1:]) * 1e3


def on_cuda(name: str) -> dict[str, Any]:
    decoder = new_decoder(name, "bfloat16")
    row: dict[str, Any] = {"model": name, "error": check(decoder, "bfloat16")}
    for B, past in DECODE:
        took = decode_ms(decoder, B, past, 96, GREEDY)
        row[f"B {B} after {past}: ms a token"] = round(took, 3)
        if B > 1:
            row[f"B {B} after {past}: tokens/s"] = round(1e3 * B / took)
    row["sampled, B 1 after 512: ms"] = round(decode_ms(decoder, 1, 512, 64, SAMPLED), 3)
    took = prefill_ms(decoder, PREFILL, 3)
    row[f"prefill {PREFILL}: ms"] = round(took, 1)
    row["tokens/s"] = round(1e3 * PREFILL / took)
    row[f"first token of {PROMPT}: ms"] = round(first_token_ms(decoder, PROMPT, 7), 1)
    row["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    torch.cuda.reset_peak_memory_stats()
    return row


def on_cpu(name: str) -> dict[str, Any]:
    decoder = new_decoder(name, "float32")
    row: dict[str, Any] = {"model": name, "error": check(decoder, "float32")}
    for B, past in ((1, 64), (1, 1024)):
        took = decode_ms(decoder, B, past, 64, GREEDY)
        row[f"B {B} after {past}: tokens/s"] = round(1e3 * B / took, 1)
    return row


def check_only(name: str, dtype: str) -> dict[str, Any]:
    """Check a model and compile its kernels."""
    decoder = new_decoder(name, dtype)
    error = check(decoder, dtype)
    for B, past in DECODE:
        decode_ms(decoder, B, past, 1, GREEDY)
    first_token_ms(decoder, PROMPT, 1)
    return {"model": name, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    print(machine(), flush=True)
    rows = []
    names = options.models or (ON_CUDA if cuda else ON_CPU)
    if options.check:
        for name in names:
            print(check_only(name, "bfloat16" if cuda else "float32"), flush=True)
        return
    for name in names:
        rows.append((on_cuda if cuda else on_cpu)(name))
        print(rows[-1], flush=True)
    stem = f"inference_{'cuda' if cuda else 'cpu'}_{machine()['date']}"
    save(stem, rows, options.out)
    head = ", ".join(f"{key} {value}" for key, value in machine().items())
    columns = [{"": key} | {row["model"]: row.get(key, "") for row in rows} for key in rows[0]][1:]
    (options.out / f"{stem}.md").write_text(f"{head}\n\n{table(columns)}\n")


if __name__ == "__main__":
    main()
