"""Time exported models in onnxruntime-gpu: a prompt in one run, and tokens after it.

python benchmarks/exported_model_cuda.py --native --out FOLDER [--tokens 2048] [--rounds 7]
    [--blocks 2048/256,1024/256]

Sessa with every form of its operator, and the attention model of the same depth, take turns in
every round. `--blocks` are rows of a block of the body and rows of the smaller blocks that are
inverted in it. Caches stay on the device. The logits of every form are first compared with those of
the CPU; a form that differs by more than 1e-3 of the largest logit with TF32 off is not timed.
Figures are medians over the rounds.

Then each form runs a prompt and a token under two profilers. ONNX Runtime's own gives the time of
the host for each operator, from its start to the end of its launches. PyTorch's gives the time of
the kernels on the device. `--device cpu` tries every step without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from measure import RESULTS, machine, save, table

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.presets import PRESETS
from sessa_common.reference.parity import TOLERANCE
from sessa_export import large_blocks, native, sessions
from sessa_export.exporter import Options, write_model
from sessa_export.runtime import MODEL_FILE, Decoder, load_decoder

MODELS = {"sessa": "sessa-9m", "attention": "transformer-9m-deep"}
ATTENTION, NATIVE = "attention", "sessa, native operator"
STEPS = 16
# Lines of each profile that are printed and kept.
MOST = 25


@dataclasses.dataclass(frozen=True)
class Form:
    """One line of the table: a model, and how its operator runs."""

    folder: Path
    device: str
    blocks: tuple[int, int] | None = None  # rows of a block, and of the blocks inverted in it
    native: bool = False

    def load(self, *, tf32: bool = False) -> Decoder:
        if self.blocks:
            sessions.LARGE_BLOCK, large_blocks.INVERTED = self.blocks
        if self.device != "cpu":
            return load_decoder(self.folder, native=self.native, device=self.device, tf32=tf32)
        decoder = load_decoder(self.folder, native=self.native)
        if self.blocks is None:
            return decoder
        model = sessions.model_for_gpu(self.folder / MODEL_FILE)
        session = onnxruntime.InferenceSession(model, onnxruntime.SessionOptions())
        return Decoder(session, decoder.config)


def write_models(root: Path, context: int) -> dict[str, Path]:
    """Models with random weights, exported for ONNX Runtime."""
    folders = {}
    for name, preset in MODELS.items():
        config = dataclasses.replace(PRESETS[preset], max_position_embeddings=context)
        folders[name] = root / name
        folders[name].mkdir()
        write_model(folders[name] / MODEL_FILE, config, initial_weights(config, 0), Options())
    return folders


def forms(folders: dict[str, Path], args: argparse.Namespace) -> dict[str, Form]:
    """The form of every line of the table."""
    found = {ATTENTION: Form(folders[ATTENTION], args.device)}
    sessa = folders["sessa"]
    if args.native:
        native.build(cuda=args.device != "cpu")
        found[NATIVE] = Form(sessa, args.device, native=True)
    for text in args.blocks.split(","):
        rows, inverted = map(int, text.split("/"))
        found[f"sessa, body, blocks of {text}"] = Form(sessa, args.device, (rows, inverted))
    return found


def logits_of(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits of a prompt and of the tokens after it."""
    decoder.reset()
    pieces = [decoder.logits(tokens)]
    pieces += [decoder.logits(tokens[:, i : i + 1]) for i in range(STEPS)]
    return np.concatenate(pieces, axis=1)


def difference(decoder: Decoder, want: np.ndarray, tokens: np.ndarray) -> float:
    """Largest difference to the logits of the CPU over the largest of these."""
    return float(np.abs(logits_of(decoder, tokens) - want).max() / np.abs(want).max())


def clock(decoder: Decoder, tokens: np.ndarray) -> tuple[float, float]:
    """Milliseconds of the prompt, and the median of the tokens after it."""
    decoder.reset()
    times = []
    for piece in [tokens, *[tokens[:, :1]] * STEPS]:
        start = time.perf_counter()
        decoder.feed(piece)
        times.append(1e3 * (time.perf_counter() - start))
    return times[0], float(np.median(times[1:]))


def host_profile(form: Form, tokens: np.ndarray) -> dict[str, Any]:
    """Nodes and milliseconds of the host by provider and operator, for a prompt and a token."""
    with _profiled():
        decoder = form.load()
    for _ in range(2):  # the first pair is a warm-up
        decoder.reset()
        decoder.feed(tokens)
        decoder.feed(tokens[:, :1])
    path = decoder.session.end_profiling()
    events = json.loads(Path(path).read_text())
    os.remove(path)
    runs = [event for event in events if event["name"] == "model_run"][-2:]
    return {
        name: _host_times(events, run) for name, run in zip(("prompt", "token"), runs, strict=True)
    }


def _host_times(events: list[dict[str, Any]], run: dict[str, Any]) -> dict[str, Any]:
    nodes, times = Counter(), Counter()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if run["ts"] <= event["ts"] < run["ts"] + run["dur"]:
            details = event["args"]
            provider = details.get("provider", "?").removesuffix("ExecutionProvider")
            name = f"{details.get('op_name', '?')} ({provider})"
            nodes[name] += 1
            times[name] += event["dur"] / 1e3
    return {
        "run (ms)": run["dur"] / 1e3,
        "nodes": sum(nodes.values()),
        "nodes, ms": _longest(nodes, times),
    }


def _longest(counts: Counter[str], times: Counter[str]) -> dict[str, list[float]]:
    """Count and milliseconds of the names that took the most time."""
    return {name: [counts[name], round(ms, 3)] for name, ms in times.most_common(MOST)}


@contextmanager
def _profiled() -> Iterator[None]:
    """Sessions that are opened here keep ONNX Runtime's profile."""
    plain = onnxruntime.SessionOptions

    def make() -> Any:
        made = plain()
        made.enable_profiling = True
        made.profile_file_prefix = os.path.join(tempfile.gettempdir(), "sessa-profile")
        return made

    onnxruntime.SessionOptions = make
    try:
        yield
    finally:
        onnxruntime.SessionOptions = plain


def device_profile(decoder: Decoder, tokens: np.ndarray) -> dict[str, Any]:
    """Launches and milliseconds of the device by kernel, for a prompt and a token."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    decoder.reset()
    found = {}
    for name, piece in (("prompt", tokens), ("token", tokens[:, :1])):
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            decoder.feed(piece)
            torch.cuda.synchronize()
        launches, times = Counter(), Counter()
        for event in recorded.key_averages():
            if event.device_type == DeviceType.CUDA:  # the host's calls of CUDA are events too
                launches[event.key[:100]] += event.count
                times[event.key[:100]] += event.self_device_time_total / 1e3
        found[name] = {
            "kernels": sum(launches.values()),
            "kernels (ms)": round(sum(times.values()), 3),
            "launches, ms": _longest(launches, times),
        }
    return found


class Report:
    """Rows and profiles, written to a folder whenever one is added."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, time.perf_counter()
        self.rows: dict[str, dict[str, Any]] = {}
        self.profiles: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, **found: Any) -> None:
        self.rows.setdefault(name, {"model": name}).update(found)
        self._say(name, found)
        save("exported_model_cuda", list(self.rows.values()), self.folder)

    def profile(self, name: str, kind: str, found: Any) -> None:
        self.profiles.setdefault(name, {})[kind] = found
        self._say(f"{name}, {kind}", found)
        path = self.folder / "exported_model_cuda_profiles.json"
        path.write_text(json.dumps(self.profiles, indent=1) + "\n")

    def _say(self, name: str, found: Any) -> None:
        said = json.dumps(found, ensure_ascii=False)
        print(f"[{time.perf_counter() - self.start:.0f} s] {name}: {said}", flush=True)


def open_forms(
    report: Report, lines: dict[str, Form], folders: dict[str, Path], tokens: np.ndarray
) -> dict[str, Decoder]:
    """The decoders of the forms that run and agree with the CPU."""
    want = {name: logits_of(load_decoder(folder), tokens) for name, folder in folders.items()}
    decoders = {}
    for name, form in lines.items():
        wanted = want[ATTENTION if name == ATTENTION else "sessa"]
        try:
            decoder = form.load()
            error = difference(decoder, wanted, tokens)
        except Exception as problem:  # one form that fails must not cost the other figures
            report.add(name, failed=f"{type(problem).__name__}: {problem}"[:300])
            continue
        report.add(name, **{"TF32 off": f"{error:.1e}"})
        if error <= TOLERANCE:
            decoders[name] = decoder
    return decoders


def time_forms(report: Report, decoders: dict[str, Decoder], args: argparse.Namespace) -> None:
    tokens = draw_tokens(args)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    # The first two rounds are a warm-up.
    for turn in range(args.rounds + 2):
        for name, decoder in decoders.items():
            found = clock(decoder, tokens)
            times[name] += [found] if turn > 1 else []
    medians = {name: np.median(np.array(found), axis=0) for name, found in times.items()}
    base = medians[ATTENTION]
    for name, (prompt, token) in medians.items():
        report.add(
            name,
            **{
                f"prefill of {args.tokens} (ms)": round(float(prompt), 2),
                "÷ attention": round(float(prompt / base[0]), 2),
                "token (ms)": round(float(token), 3),
                "÷ attention ": round(float(token / base[1]), 2),
            },
        )


def draw_tokens(args: argparse.Namespace) -> np.ndarray:
    vocabulary = PRESETS[MODELS["sessa"]].vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, (1, args.tokens))


def measure(report: Report, folders: dict[str, Path], args: argparse.Namespace) -> None:
    tokens, lines = draw_tokens(args), forms(folders, args)
    decoders = open_forms(report, lines, folders, tokens)
    time_forms(report, decoders, args)
    print(table(list(report.rows.values())), flush=True)
    for name, decoder in decoders.items():
        if args.device != "cpu":
            report.profile(name, "device", device_profile(decoder, tokens))
        report.profile(name, "host", host_profile(lines[name], tokens))
    # Attention, the native operator and the first body: a session takes seconds to open.
    for name in list(decoders)[:3] if args.device != "cpu" else ():
        want = logits_of(decoders[name], tokens)
        error = difference(lines[name].load(tf32=True), want, tokens)
        report.add(name, **{"TF32 on": f"{error:.1e}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", default="2048/256,2048/512,1024/256")
    parser.add_argument("--native", action="store_true", help="also the native operator")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(machine() | {"onnxruntime": onnxruntime.__version__}, flush=True)
    report = Report(args.out)
    with tempfile.TemporaryDirectory(prefix="sessa-bench-") as root:
        measure(report, write_models(Path(root), args.tokens + 2 * STEPS), args)
    print(table(list(report.rows.values())))


if __name__ == "__main__":
    main()
