"""Time speculative decoding on a CPU: tokens a second with and without, and the right guesses.

    OMP_NUM_THREADS=1 python benchmarks/speculation.py [--runs FOLDER] [--rounds 3] [--out FOLDER]

FOLDER holds a trained `model` and a `draft` model of its vocabulary; what is missing is trained
first, on the topics of help() in ten minutes. Texts continue the beginnings of some topics. Every
way of guessing must give the tokens that the model gives without it, or it is not timed. All ways
take turns in every round, and figures are medians over the rounds. Seconds are processor time with
one thread, so that other programs on the machine matter little; x are the tokens a second over
those without guesses. "most" is the share of guesses that rejection sampling would keep (1 minus
the total variation distance of the two models), "kept" the share that a common noise keeps, both
for the first guess at every place of the texts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from measure import RESULTS, machine, save, table

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch
import sessa_torch.decoding
from sessa_common.data.tokenizer import read_tokenizer
from sessa_common.inference.generation import Decoder, generate
from sessa_common.inference.sampling import SamplingConfig, filter_logits
from sessa_common.inference.speculation import SpeculativeDecoder, speculate
from sessa_export.exporter import Options, export_checkpoint

TOPICS, PROMPT, TOKENS = ("strings", "with", "operator-summary", "exceptions"), 96, 64
WAYS = [("look-up", 4), ("look-up", 8), ("draft", 2), ("draft", 4)]
TRAIN = {
    "preset": "demo",
    "steps": 600,
    "max_position_embeddings": 1024,
    "sequence_length": 256,
    "evaluate_every": 0,
    "checkpoint_every": 0,
    "device": "cpu",
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = (1, 2, 3, 5, 9)


def train(runs: Path) -> None:
    """Train what the folder lacks."""
    if not (runs / "model").is_dir():
        sessa_torch.train(runs / "model", **TRAIN)
    if not (runs / "draft").is_dir():
        tokenizer = runs / "model/tokenizer.json"
        sessa_torch.train(runs / "draft", tokenizer=tokenizer, **{**TRAIN, **SMALL})


def load(runs: Path, exported: Path) -> dict[str, tuple[Decoder, Decoder]]:
    """The model and the draft model in every runtime."""
    for name in ("model", "draft"):
        export_checkpoint(runs / name, exported / name, Options(layout="buffer"))
    opened: dict[str, tuple[Callable[..., Decoder], Path]] = {
        "PyTorch": (sessa_torch.decoding.load_decoder, runs),
        "MLX": (sessa_mlx.decoding.load_decoder, runs),
        "ONNX Runtime": (partial(sessa_export.runtime.load_decoder, threads=1), exported),
    }
    return {
        name: (run(folder / "model"), run(folder / "draft"))
        for name, (run, folder) in opened.items()
    }


def write(decoder: Decoder, prompts: list[list[int]], sampling: SamplingConfig) -> list[list[int]]:
    """Continue one prompt after the other."""
    return [
        [step[0] or 0 for step in generate(decoder, [prompt], sampling, max_tokens=TOKENS)]
        for prompt in prompts
    ]


def guessing(model: Decoder, draft: Decoder, way: str, count: int) -> SpeculativeDecoder:
    if way == "draft":
        return speculate(model, draft=draft, draft_tokens=count)
    return speculate(model, prompt_lookup=count)


def measure(
    model: Decoder, draft: Decoder, prompts: list[list[int]], temperature: float, rounds: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """A row for each way of guessing, and the texts without guesses."""
    sampling = SamplingConfig(temperature=temperature, seed=1)
    decoders: dict[str, Decoder] = {"none": model}
    decoders |= {f"{way} {n}": guessing(model, draft, way, n) for way, n in WAYS}
    want = write(model, prompts, sampling)
    same = {name: write(decoder, prompts, sampling) == want for name, decoder in decoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            began = time.process_time()
            write(decoder, prompts, sampling)
            seconds[name].append(time.process_time() - began)
    rows = []
    for name, decoder in decoders.items():
        row: dict[str, Any] = {"temperature": temperature, "guesses": name}
        if isinstance(decoder, SpeculativeDecoder):
            row["right"] = f"{decoder.acceptance.rate:.0%}"
            calls = decoder.acceptance.rounds
            row["tokens a call"] = round(1 + decoder.acceptance.accepted / calls, 2)
        if same[name]:
            took, base = (float(np.median(seconds[key])) for key in (name, "none"))
            row |= {"tokens/s": round(len(prompts) * TOKENS / took, 1), "x": round(base / took, 2)}
        else:
            row["tokens/s"] = "other tokens, not timed"
        rows.append(row)
    return rows, want


def overlap(model: Decoder, draft: Decoder, texts: list[list[int]]) -> list[dict[str, Any]]:
    """Shares of guesses that rejection sampling and a common noise keep, along the texts."""
    rows, rng = [], np.random.default_rng(0)
    for temperature in (0.5, 0.8, 1.0):
        sampling = SamplingConfig(temperature=temperature)
        most, kept = [], []
        for text in texts:
            scores = []
            for decoder in (model, draft):
                decoder.reset()
                scores.append(filter_logits(decoder.logits(np.array([text]))[0], sampling))
            p, q = (np.exp(s - np.log(np.exp(s).sum(-1, keepdims=True))) for s in scores)
            most.append(np.minimum(p, q).sum(-1).mean())
            for _ in range(20):
                noise = rng.gumbel(size=scores[0].shape)
                first, second = ((s + noise).argmax(-1) for s in scores)
                kept.append((first == second).mean())
        rows.append(
            {
                "temperature": temperature,
                "most": f"{np.mean(most):.1%}",
                "kept": f"{np.mean(kept):.1%}",
            }
        )
    return rows


def cost_of_rows(decoder: Decoder, prompt: list[int], repeats: int = 15) -> dict[str, float]:
    """Time of one call of n rows over that of one row."""
    seconds: dict[int, list[float]] = {n: [] for n in ROWS}
    decoder.reset()
    decoder.feed(np.array([prompt]))
    for _ in range(repeats):
        for n in ROWS:
            began = time.process_time()
            decoder.logits(np.array([prompt[:n]]))
            seconds[n].append(time.process_time() - began)
            decoder.trim(n)
    single = float(np.median(seconds[1]))
    return {f"{n} rows": round(float(np.median(seconds[n])) / single, 2) for n in ROWS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows, costs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        runs = given.runs or Path(scratch) / "runs"
        train(runs)
        tokenizer = read_tokenizer(runs / "model")
        prompts = [tokenizer.encode(topics[name]).ids[:PROMPT] for name in TOPICS]
        decoders = load(runs, Path(scratch) / "exported")
        for runtime, (model, draft) in decoders.items():
            costs.append({"runtime": runtime, **cost_of_rows(model, prompts[0])})
            print(costs[-1], flush=True)
            for temperature in (0.0, 0.8):
                found, texts = measure(model, draft, prompts, temperature, given.rounds)
                rows += [{"runtime": runtime, **row} for row in found]
                print(table(rows[-len(found) :]), flush=True)
        shares = overlap(*decoders["PyTorch"], texts)
    name = f"speculation_cpu_{machine()['date']}"
    save(name, rows + costs + shares, given.out)
    head = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = f"{head}\n\n{table(rows)}\n\n{table(costs)}\n\n{table(shares)}\n"
    (given.out / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
