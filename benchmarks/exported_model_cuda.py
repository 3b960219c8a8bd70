"""Time exported models in onnxruntime-gpu: a prompt in one run, and tokens after it.

python benchmarks/exported_model_cuda.py [--tokens 2048] [--rounds 7] [--native] [--blocks 512,1024]

Sessa with every form of its operator, and the attention model of the same depth, take turns in
every round. Caches stay on the device. The logits of every model are first compared with those of
the CPU, with TF32 off and on; a model that differs by more than 1e-3 of the largest logit with TF32
off is not timed. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from measure import machine, save, table

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.presets import PRESETS
from sessa_common.reference.parity import TOLERANCE
from sessa_export import sessions
from sessa_export.exporter import Options, write_model
from sessa_export.runtime import MODEL_FILE, Decoder, load_decoder

MODELS = {"sessa": "sessa-9m", "attention": "transformer-9m-deep"}
ATTENTION = "attention"
STEPS = 16


def write_models(root: Path, context: int) -> dict[str, Path]:
    """Models with random weights, exported for ONNX Runtime."""
    folders = {}
    for name, preset in MODELS.items():
        config = dataclasses.replace(PRESETS[preset], max_position_embeddings=context)
        folders[name] = root / name
        folders[name].mkdir()
        write_model(folders[name] / MODEL_FILE, config, initial_weights(config, 0), Options())
    return folders


def load(folder: Path, block: int | None, *, native: bool = False, tf32: bool = False) -> Decoder:
    """A decoder whose body solves in blocks of `block` rows, or of 64 as on the CPU."""
    sessions.LARGE_BLOCK = block
    return load_decoder(folder, native=native, device="cuda", tf32=tf32)


def forms(folders: dict[str, Path], blocks: list[int], native: bool) -> dict[str, dict[str, Any]]:
    """The arguments of `load` for every line of the table."""
    found: dict[str, dict[str, Any]] = {ATTENTION: {"folder": folders[ATTENTION], "block": None}}
    sessa = folders["sessa"]
    found["sessa, body, blocks of 64"] = {"folder": sessa, "block": None}
    for block in blocks:
        found[f"sessa, body, blocks of {block}"] = {"folder": sessa, "block": block}
    if native:
        found["sessa, native operator"] = {"folder": sessa, "block": None, "native": True}
    return found


def logits_of(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits of a prompt and of the tokens after it."""
    decoder.reset()
    pieces = [decoder.logits(tokens)]
    pieces += [decoder.logits(tokens[:, i : i + 1]) for i in range(STEPS)]
    return np.concatenate(pieces, axis=1)


def differences(given: dict[str, Any], want: np.ndarray, tokens: np.ndarray) -> dict[str, str]:
    """Largest difference to the CPU over its largest logit, with TF32 off and on."""
    found = {}
    for tf32 in (False, True):
        error = np.abs(logits_of(load(**given, tf32=tf32), tokens) - want).max()
        found[f"TF32 {'on' if tf32 else 'off'}"] = float(error / np.abs(want).max())
    if not found["TF32 off"] <= TOLERANCE:
        raise SystemExit(f"{given}: differs from the CPU by {found['TF32 off']:.1e}, not timed")
    return {name: f"{error:.1e}" for name, error in found.items()}


def clock(decoder: Decoder, tokens: np.ndarray) -> tuple[float, float]:
    """Milliseconds of the prompt, and the median of the tokens after it."""
    decoder.reset()
    times = []
    for piece in [tokens, *[tokens[:, :1]] * STEPS]:
        start = time.perf_counter()
        decoder.feed(piece)
        times.append(1e3 * (time.perf_counter() - start))
    return times[0], float(np.median(times[1:]))


def placement(given: dict[str, Any], tokens: np.ndarray) -> dict[str, dict[str, int]]:
    """Nodes that one prompt runs on each provider, by ONNX Runtime's own profile."""
    options = onnxruntime.SessionOptions
    decoder = None
    try:
        onnxruntime.SessionOptions = _profiled(options)
        decoder = load(**given)
    finally:
        onnxruntime.SessionOptions = options
    decoder.feed(tokens)
    path = decoder.session.end_profiling()
    events = json.loads(Path(path).read_text())
    os.remove(path)
    counts: dict[str, Counter] = {}
    for event in events:
        details = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            provider = details.get("provider", "?").removesuffix("ExecutionProvider")
            counts.setdefault(provider, Counter())[details.get("op_name", "?")] += 1
    return {provider: dict(found.most_common()) for provider, found in counts.items()}


def _profiled(options: Any) -> Any:
    def make() -> Any:
        made = options()
        made.enable_profiling = True
        made.profile_file_prefix = os.path.join(tempfile.gettempdir(), "sessa-profile")
        return made

    return make


def measure(folders: dict[str, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    vocabulary = PRESETS[MODELS["sessa"]].vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, args.tokens))
    blocks = [int(block) for block in args.blocks.split(",")]
    lines = forms(folders, blocks, args.native)
    want = {name: logits_of(load_decoder(folder), tokens) for name, folder in folders.items()}
    rows = {}
    for name, given in lines.items():
        wanted = want[ATTENTION if name == ATTENTION else "sessa"]
        rows[name] = {"model": name, **differences(given, wanted, tokens)}
        counts = placement(given, tokens)
        rows[name] |= {f"nodes on {key}": sum(found.values()) for key, found in counts.items()}
        print(name, rows[name], json.dumps(counts), flush=True)
    decoders = {name: load(**given) for name, given in lines.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in lines}
    # The first two rounds are a warm-up.
    for turn in range(args.rounds + 2):
        for name, decoder in decoders.items():
            found = clock(decoder, tokens)
            times[name] += [found] if turn > 1 else []
    medians = {name: np.median(np.array(found), axis=0) for name, found in times.items()}
    for name, (prompt, token) in medians.items():
        base = medians[ATTENTION]
        rows[name] |= {
            f"prefill of {args.tokens} (ms)": round(float(prompt), 2),
            "÷ attention": round(float(prompt / base[0]), 2),
            "token (ms)": round(float(token), 3),
            "÷ attention ": round(float(token / base[1]), 2),
        }
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", default="1024")
    parser.add_argument("--native", action="store_true", help="also the native operator")
    parser.add_argument("--save", default="exported_model_cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sessa-bench-") as root:
        rows = measure(write_models(Path(root), args.tokens + 2 * STEPS), args)
    print(machine() | {"onnxruntime": onnxruntime.__version__})
    print(table(rows))
    print(save(args.save, rows))


if __name__ == "__main__":
    main()
