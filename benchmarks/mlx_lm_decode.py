"""Time mlx-lm's generation of a Sessa model against this project's decoder in MLX, by turns.

python benchmarks/mlx_lm_decode.py --preset demo (needs mlx-lm)

Both generate greedily behind the same prompt with the same weights in float32, ten tokens each in
turn, so that other load on the machine meets both. The tokens must be equal. A row gives the
median of the milliseconds a token, the processor time a token, and the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from statistics import median
from typing import Any

# MLX reads the variable once; without it float32 products use 11-bit operands.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import numpy as np
from measure import machine, save, table
from mlx_lm.generate import generate_step

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.presets import PRESETS
from sessa_mlx.checkpoint import build_model, set_weights
from sessa_mlx.decoding import Decoder
from sessa_mlx.lm import Model, ModelArgs

DEPTHS = (64, 1024)  # tokens of the prompt
TURN, TURNS, WARM = 10, 12, 2


def mlx_lm_tokens(config: SessaConfig, prompt: np.ndarray) -> Iterator[int]:
    """Tokens of mlx-lm's loop."""
    model = Model(ModelArgs.from_dict(config.to_dict()))
    set_weights(model, initial_weights(config, 0))
    steps = generate_step(mx.array(prompt), model.eval(), max_tokens=-1)
    return (int(token) for token, _ in steps)


def own_tokens(config: SessaConfig, prompt: np.ndarray) -> Iterator[int]:
    """Tokens of `sessa generate --backend mlx`."""
    decoder = Decoder(build_model(config, initial_weights(config, 0), dtype="float32"))
    decoder.feed(prompt[None])
    drawn = decoder.draw(SamplingConfig(temperature=0), 10**6)
    return (int(ids[0]) for ids in drawn)


def compare(config: SessaConfig, depth: int) -> dict[str, Any]:
    """One row of the table: both ways behind a prompt of `depth` tokens."""
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, depth)
    ways = {"mlx-lm": mlx_lm_tokens(config, prompt), "sessa": own_tokens(config, prompt)}
    wall, processor, tokens = ({name: [] for name in ways} for _ in range(3))
    for _ in range(WARM + TURNS):
        for name, drawn in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            tokens[name] += [next(drawn) for _ in range(TURN)]
            wall[name].append(1e3 * (time.perf_counter() - began) / TURN)
            processor[name].append(1e3 * (time.process_time() - worked) / TURN)
    if tokens["mlx-lm"] != tokens["sessa"]:
        raise SystemExit(f"the tokens behind {depth} differ")
    row: dict[str, Any] = {"prompt": depth}
    for kind, times in (("ms", wall), ("processor ms", processor)):
        found = {name: median(values[WARM:]) for name, values in times.items()}
        row |= {f"{name}, {kind}": round(value, 3) for name, value in found.items()}
        row[f"mlx-lm over sessa, {kind}"] = round(found["mlx-lm"] / found["sessa"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    options = parser.parse_args()
    config = dataclasses.replace(PRESETS[options.preset], max_position_embeddings=2048)
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    print({**machine(), **versions, "preset": options.preset})
    rows = [{**versions, **compare(config, depth)} for depth in DEPTHS]
    print(table(rows))
    save(f"mlx_lm_{options.preset}_cpu_{machine()['date']}", rows)


if __name__ == "__main__":
    main()
