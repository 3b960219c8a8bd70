"""Check and time the MLX twin on an NVIDIA GPU: errors, O(T D) memory, speed.

python benchmarks/mlx_cuda.py (needs mlx[cuda13] or mlx[cuda12], and torch with CUDA; with
--check-only the checks of the model run on any device)

Every check must pass before anything is timed: the operator and its gradients against float64; one
model in both frameworks on the same GPU with the same logits and gradients; training steps; cached
decoding; greedy generation; a checkpoint written by MLX and read by PyTorch; memory. An operation
that MLX has on the CPU stream only raises on the GPU, and no call in sessa_mlx passes a stream.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# MLX reads the variable once; without it float32 products use 11-bit operands.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import numpy as np
import torch
from measure import MIB, machine, save, table, wall_ms
from mlx import nn
from mlx.utils import tree_flatten

import sessa_mlx
from sessa_common.checkpoint.folder import save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import next_token_batch
from sessa_common.inference.generation import generate
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.reference.ops import feedback_solve, feedback_solve_backward
from sessa_common.train_config import TrainConfig
from sessa_mlx import checkpoint as mlx_checkpoint
from sessa_mlx import decoding as mlx_generate
from sessa_mlx import feedback as mlx_feedback
from sessa_mlx import training as mlx_train
from sessa_torch import checkpoint as torch_checkpoint
from sessa_torch import decoding as torch_generate
from sessa_torch import feedback as torch_feedback
from sessa_torch import training as torch_train

CONFIG = SessaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
MLX_DEVICE = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
TORCH_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, T, D; the keys are as wide as the states.
SHAPES = ((1, 4096, 512), (8, 2048, 512), (4, 4096, 1024), (1, 16384, 1024))
rows: list[dict[str, Any]] = []


def expect(what: str, value: float, limit: float) -> None:
    """Record a check; stop here if it fails."""
    rows.append({"check": what, "value": f"{value:.2e}", "limit": f"{limit:.1e}"})
    print(f"{what}: {value:.2e} (limit {limit:.1e})", flush=True)
    if not value <= limit:
        raise SystemExit(f"{what} is {value:.3e}, above {limit:.1e}: nothing is timed")


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def operator_inputs(B: int, T: int, D: int, P: int = 0, masked: bool = False) -> dict[str, Any]:
    """NumPy float32 arrays, gains of both signs up to 0.99."""
    random = np.random.default_rng(0)
    shapes = {"f": (B, T, D), "q": (B, T, D), "k": (B, P + T, D), "ds": (B, T, D)}
    shapes |= {"past_s": (B, P, D)} if P else {}
    given = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    given["gamma"] = random.uniform(-0.99, 0.99, (B, T)).astype(np.float32)
    return given | ({"key_mask": random.random((B, P + T)) > 0.3} if masked else {})


def mlx_solve(given: dict[str, Any], dtype: mx.Dtype) -> tuple[Callable[..., mx.array], list[Any]]:
    """The solve over its differentiable arrays, and those arrays on the GPU."""
    mask = mx.array(given["key_mask"]) if "key_mask" in given else None

    def run(*arrays: mx.array) -> mx.array:
        past_s = arrays[4] if len(arrays) > 4 else None
        return mlx_feedback.feedback_solve(*arrays[:4], past_s=past_s, key_mask=mask)

    names = [name for name in ("f", "q", "k", "gamma", "past_s") if name in given]
    return run, [mx.array(given[name]).astype(dtype) for name in names]


def to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def check_operator() -> None:
    """Output and gradients against float64, with a past, a mask and several block rows."""
    for dtype, limit in ((mx.float32, 5e-6), (mx.float16, 2e-3), (mx.bfloat16, 1.5e-2)):
        for sizes in ({"B": 2, "T": 130}, {"B": 1, "T": 600, "P": 21, "masked": True}):
            given = operator_inputs(D=40, **sizes)
            ds = mx.array(given.pop("ds")).astype(dtype)
            run, arrays = mlx_solve(given, dtype)
            outputs, gradients = mx.vjp(run, arrays, [ds])
            # The reference computes with the numbers as rounded to the type.
            names = [name for name in ("f", "q", "k", "gamma", "past_s") if name in given]
            exact = {name: to_float64(a) for name, a in zip(names, arrays, strict=True)}
            exact |= {"key_mask": given["key_mask"]} if "key_mask" in given else {}
            want = [feedback_solve(**exact), *feedback_solve_backward(to_float64(ds), **exact)]
            errors = [
                relative_error(to_float64(got), wanted)
                for got, wanted in zip([*outputs, *gradients], want, strict=False)
            ]
            kind = str(dtype).removeprefix("mlx.core.")
            expect(f"operator and gradients, {kind}, T={sizes['T']}", max(errors), limit)


def check_streams() -> None:
    """Check that no call in the package names a stream or a device: all run on the default GPU."""
    folder = Path(sessa_mlx.__file__).parent
    named = [
        f"{path.name}:{call.lineno}"
        for path in folder.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and any(k.arg == "stream" for k in call.keywords)
    ]
    expect(f"calls that name a stream ({', '.join(named) or 'none'})", len(named), 0)


def tokens(B: int, T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (B, T))


def learners(precision: str = "float32") -> tuple[mlx_train.TrainBackend, torch_train.TrainBackend]:
    """Models with the same initial weights in both frameworks, on the same GPU."""
    settings, weights = TrainConfig(precision=precision), initial_weights(CONFIG, 0)
    on_mlx = mlx_train.TrainBackend(CONFIG, settings, weights, MLX_DEVICE)
    return on_mlx, torch_train.TrainBackend(CONFIG, settings, weights, TORCH_DEVICE)


def mlx_gradients(ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradients of the mean loss of predicting each id at its own position."""
    model = mlx_checkpoint.build_model(CONFIG, initial_weights(CONFIG, 0), dtype="float32")
    inputs = mx.array(ids)

    def loss(parameters: dict[str, Any]) -> mx.array:
        model.update(parameters)
        return nn.losses.cross_entropy(model(inputs), inputs).mean()

    gradients = mx.grad(loss)(model.parameters())
    flat = {name: to_float64(g) for name, g in tree_flatten(gradients)}
    return to_float64(model(inputs)), flat


def torch_gradients(ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same as `mlx_gradients`, in PyTorch."""
    weights = initial_weights(CONFIG, 0)
    model = torch_checkpoint.build_model(CONFIG, weights, dtype="float32", device=TORCH_DEVICE)
    inputs = torch.from_numpy(ids).to(TORCH_DEVICE)
    logits = model(inputs)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs.flatten()).backward()
    gradients = {name: p.grad.double().cpu().numpy() for name, p in model.named_parameters()}
    return logits.detach().double().cpu().numpy(), gradients


def check_model() -> None:
    """Compare logits, every gradient and ten training steps of one model in both frameworks."""
    ids = tokens(2, 320)
    got, on_mlx_gradients = mlx_gradients(ids)
    want, on_torch_gradients = torch_gradients(ids)
    expect("logits, MLX against PyTorch", relative_error(got, want), 1e-4)
    errors = [relative_error(on_mlx_gradients[n], g) for n, g in on_torch_gradients.items()]
    expect("gradients of all parameters, MLX against PyTorch", max(errors), 1e-3)
    batch = next_token_batch(tokens(4, 257, seed=1))
    on_mlx, on_torch = learners()
    pairs = []
    for _ in range(10):
        pairs.append([learner.step([batch], 1e-3)[0] for learner in (on_mlx, on_torch)])
    differences = [abs(a - b) / b for a, b in pairs]
    expect("loss in ten training steps, MLX against PyTorch", max(differences), 1e-3)
    expect("last loss over first loss, MLX", pairs[-1][0] / pairs[0][0], 0.95)


def check_decoding(folder: Path) -> None:
    """Compare cached steps with the full pass, and the greedy tokens of both frameworks."""
    weights = initial_weights(CONFIG, 3)
    model = mlx_checkpoint.build_model(CONFIG, weights, device=MLX_DEVICE)
    save_weights(folder, CONFIG, mlx_checkpoint.model_weights(model))
    on_torch = torch_checkpoint.load_model(folder, device=TORCH_DEVICE)
    ids = tokens(2, 300, seed=2)
    full = to_float64(model(mx.array(ids)))
    with torch.no_grad():
        read = on_torch(torch.from_numpy(ids).to(TORCH_DEVICE)).double().cpu().numpy()
    expect("checkpoint written by MLX, read by PyTorch: logits", relative_error(full, read), 1e-4)
    decoder = mlx_generate.Decoder(model)
    pieces = [decoder.logits(ids[:, :270])]
    pieces += [decoder.logits(ids[:, t : t + 1]) for t in range(270, 300)]
    cached = np.concatenate(pieces, 1)
    expect("cached decoding against the full pass", relative_error(cached, full), 1e-4)
    prompts = [list(map(int, row)) for row in (ids[0, :40], ids[1, :25])]
    greedy = SamplingConfig(temperature=0)
    texts = [
        list(generate(each, prompts, greedy, max_tokens=40))
        for each in (decoder, torch_generate.Decoder(on_torch))
    ]
    different = sum(a != b for a, b in zip(*texts, strict=True))
    expect("generated tokens that differ from PyTorch's, of 40", different, 0)


def mlx_peak_mib(run: Callable[[], Any]) -> float:
    """Peak memory above the memory held before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(run())
    return (mx.get_peak_memory() - before) / MIB


def with_gradients(run: Callable[..., mx.array], arrays: list[mx.array], ds: mx.array) -> Any:
    return mx.vjp(run, arrays, [ds])


def check_memory() -> None:
    """Check that twice the T needs little more than twice the memory, forward and backward."""
    peaks = []
    for T in (4096, 8192, 16384):
        given = operator_inputs(1, T, 512)
        ds = mx.array(given.pop("ds"))
        run, arrays = mlx_solve(given, mx.float32)
        mx.eval(ds, *arrays)
        peaks.append(mlx_peak_mib(partial(with_gradients, run, arrays, ds)))
    shown = ", ".join(f"{peak:.0f}" for peak in peaks)
    growth = max(b / a for a, b in itertools.pairwise(peaks))
    expect(f"growth of peak memory ({shown} MiB) for twice T", growth, 2.6)


def tf32_error() -> float:
    """Error of a float32 solve at MLX's own default, in a process of its own."""
    environment = os.environ | {"MLX_ENABLE_TF32": "1"}
    command = [sys.executable, __file__, "--tf32-error"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_error() -> None:
    given = operator_inputs(1, 600, 256)
    del given["ds"]
    run, arrays = mlx_solve(given, mx.float32)
    exact = feedback_solve(**{name: array.astype(np.float64) for name, array in given.items()})
    print(relative_error(to_float64(run(*arrays)), exact))


def mlx_ms(run: Callable[[], Any]) -> float:
    """Median wall time of an evaluated run() in milliseconds."""
    return wall_ms(run, warm=3, seconds=0.3, wait=mx.eval)


def torch_ms(run: Callable[[], Any]) -> float:
    """Median wall time like `mlx_ms`, so that both frameworks pay for their launches."""
    return wall_ms(run, warm=3, seconds=0.3, wait=lambda _: torch.cuda.synchronize())


def torch_times(given: dict[str, Any], kind: str, backend: str) -> tuple[float, float]:
    """Forward, and forward with gradients, of PyTorch's solve on the same GPU."""
    dtype = getattr(torch, kind)
    names = ("f", "q", "k", "gamma")
    arrays = [torch.from_numpy(given[name]).to("cuda", dtype).requires_grad_() for name in names]
    ds = torch.from_numpy(given["ds"]).to("cuda", dtype)

    def forward() -> torch.Tensor:
        return torch_feedback.feedback_solve(*arrays, backend=backend)

    with torch.no_grad():
        alone = torch_ms(forward)
    return alone, torch_ms(lambda: torch.autograd.grad(forward(), arrays, ds))


def timings() -> Iterator[dict[str, Any]]:
    for B, T, D in SHAPES:
        given = operator_inputs(B, T, D)
        for kind in ("float32", "bfloat16"):
            run, arrays = mlx_solve(given, getattr(mx, kind))
            ds = mx.array(given["ds"]).astype(getattr(mx, kind))
            mx.eval(ds, *arrays)
            back = partial(with_gradients, run, arrays, ds)
            row = {"B": B, "T": T, "D": D, "dtype": kind}
            row["MLX forward ms"] = round(mlx_ms(partial(run, *arrays)), 2)
            row["MLX with gradients ms"] = round(mlx_ms(back), 2)
            row["MLX peak MiB"] = round(mlx_peak_mib(back))
            for backend in ("blocked", "auto"):
                forward, gradients = torch_times(given, kind, backend)
                row[f"PyTorch {backend} forward ms"] = round(forward, 2)
                row[f"PyTorch {backend} with gradients ms"] = round(gradients, 2)
            print(row, flush=True)
            yield row
            mx.clear_cache()
            torch.cuda.empty_cache()


def training_rate() -> Iterator[dict[str, Any]]:
    """Tokens a second of whole training steps of CONFIG, B 8, T 1024."""
    batch = next_token_batch(tokens(8, 1025))
    for precision in ("float32", "bfloat16"):
        row: dict[str, Any] = {"training": precision}
        for name, learner in zip(("MLX", "PyTorch"), learners(precision), strict=True):
            for _ in range(3):
                learner.step([batch], 1e-3)
            start = time.perf_counter()
            for _ in range(5):
                learner.step([batch], 1e-3)
            row[f"{name} tokens/s"] = round(5 * 8 * 1024 / (time.perf_counter() - start))
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tf32-error", action="store_true", help="print one error and stop")
    parser.add_argument("--check-only", action="store_true", help="check the model, on any device")
    parser.add_argument("--results", type=Path, help="folder of the results file")
    options = parser.parse_args()
    if not options.check_only and (MLX_DEVICE, TORCH_DEVICE) != ("gpu", "cuda"):
        raise SystemExit("this needs an NVIDIA GPU, mlx[cuda13] and a PyTorch with CUDA")
    if options.tf32_error:
        print_error()
        return
    start = time.perf_counter()
    print(machine(), "mlx", mx.__version__, mx.device_info(), flush=True)
    check_streams()
    check_operator()
    check_model()
    with tempfile.TemporaryDirectory() as folder:
        check_decoding(Path(folder))
    if options.check_only:
        return
    check_memory()
    rows.append({"float32 error with MLX_ENABLE_TF32=1": f"{tf32_error():.1e}"})
    print(f"checked in {time.perf_counter() - start:.0f} s", flush=True)
    timed = [*timings(), *training_rate()]
    details = {"mlx": mx.__version__, "MLX_ENABLE_TF32": os.environ["MLX_ENABLE_TF32"]}
    where = {"folder": options.results} if options.results else {}
    save("mlx_cuda", [details, *rows, *timed], **where)
    print(table(timed))


if __name__ == "__main__":
    main()
