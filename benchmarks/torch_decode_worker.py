"""The process in which `torch_decode.py` times one version of the code, the first on its path.

It answers each line of its standard input by a JSON list: the seconds of a prompt and of every
token after it, and the last logits.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time

import numpy as np

from sessa_torch.checkpoint import new_model

STEPS = 16


def main(preset: str, length: int) -> None:
    try:
        presets = importlib.import_module("sessa_common.presets").PRESETS
        make = importlib.import_module("sessa_torch.decoding").Decoder
    except ImportError:  # the names before 2026-11-30
        presets = importlib.import_module("sessa_common.config").PRESETS
        make = importlib.import_module("sessa_torch.generate").Stepper
    config = dataclasses.replace(presets[preset], max_position_embeddings=2 * length)
    decoder = make(new_model(config, device="cpu"))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    for _ in sys.stdin:
        decoder.reset()
        seconds, logits = [], np.empty(0)
        for piece in (tokens, *np.hsplit(tokens[:, :STEPS], STEPS)):
            started = time.perf_counter()
            logits = decoder.step(piece)
            seconds.append(time.perf_counter() - started)
        print(json.dumps([seconds, logits[0].tolist()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
