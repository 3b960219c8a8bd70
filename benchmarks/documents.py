"""Time training steps on rows whose documents are separate, over those on joined documents.

    OMP_NUM_THREADS=1 python benchmarks/documents.py [--rounds 3] [--length 320] [--mean 80]
        [--small] [--out FOLDER]

Rows of random tokens are cut into documents of geometric length. The ratio is that of tokens per
second, separate over joined (above 1 is faster). Results are printed, and saved with `--out`, as
soon as they are there.

Without a GPU: the small models in both frameworks. First the loss of a batch with separate
documents must equal that of the documents one by one; then both settings take a step in turn.
Seconds are processor time with one thread, so that other programs on the machine matter little.

With a GPU: the compiled step of sessa-131m on 8 rows of 4,096 tokens, with documents of two mean
lengths and with whole rows, which are one document each. First attention and solve with documents
must equal those of single documents, outputs and gradients. Both settings compile at the same time
in processes of their own, and are then timed in turn. `--small` runs this case on the CPU, small
and not compiled, as a check of this script.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import machine, save, table

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig
from sessa_torch.attention import causal_attention
from sessa_torch.feedback import feedback_solve
from sessa_torch.training import TrainBackend

END = 0
# Of the models without a GPU, whose steps would otherwise be logits for the most part.
VOCABULARY = 512
MODELS = ("sessa-400k", "transformer-400k", "mamba2-400k")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the case for a GPU; a mean length of 0 stands for whole rows."""

    model: str = "sessa-131m"
    vocabulary: int = 32_768
    rows: int = 8
    length: int = 4096
    means: tuple[int, ...] = (250, 1000, 0)
    device: str = "cuda"
    compile: bool = True
    steps: int = 5


SMALL = Sizes("sessa-1m", 512, 2, 64, (10, 30, 0), device="cpu", compile=False, steps=1)


def draw_rows(length: int, mean: int, count: int, vocabulary: int) -> np.ndarray:
    """Token rows (count, length + 1) with an end token after `mean` tokens on average."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, vocabulary, (count, length + 1))
    if mean:
        rows[rng.random(rows.shape) < 1 / mean] = END
    return rows


def spans(starts: np.ndarray) -> list[tuple[slice, slice]]:
    """The row and the columns of every document of starts (B, T)."""
    found = []
    for row, own in enumerate(starts):
        firsts = np.flatnonzero(own == np.arange(len(own)))
        ends = pairwise([*firsts, len(own)])
        found += [(slice(row, row + 1), slice(int(i), int(j))) for i, j in ends]
    return found


def alone(backend: Any, batch: Batch) -> float:
    """The sum of the losses of every document of a batch as a row of its own."""
    assert batch.document_starts is not None
    documents = (
        Batch(batch.inputs[span], batch.targets[span], batch.weights[span])
        for span in spans(batch.document_starts)
    )
    return sum(backend.evaluate(document)[0] for document in documents)


def cpu_cases(options: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """Check and time the small models in both frameworks."""
    # A machine with a GPU may have no MLX.
    import sessa_mlx.training

    rows = draw_rows(options.length, options.mean, 4, VOCABULARY)
    separate, joined = next_token_batch(rows, END), next_token_batch(rows)
    settings = TrainConfig(precision="float32")
    for name in MODELS:
        config = dataclasses.replace(
            PRESETS[name], vocab_size=VOCABULARY, max_position_embeddings=options.length
        )
        for framework, make in {
            "torch": TrainBackend,
            "mlx": sessa_mlx.training.TrainBackend,
        }.items():
            backend: Any = make(config, settings, initial_weights(config, 0), "cpu")
            loss, wanted = backend.evaluate(separate)[0], alone(backend, separate)
            if abs(loss / wanted - 1) > 1e-5:
                raise SystemExit(f"{name}, {framework}: loss {loss}, alone {wanted}")
            # The first step of each is not counted.
            turns = range(options.rounds + 1)
            times = [(seconds(backend, joined), seconds(backend, separate)) for _ in turns][1:]
            report({"model": name, "framework": framework} | compared(*zip(*times, strict=True)))


def seconds(backend: Any, batch: Batch) -> float:
    """Processor seconds of one step."""
    began = time.process_time()
    backend.step([batch], 1e-4)
    return time.process_time() - began


def compared(joined: Sequence[float], separate: Sequence[float]) -> Row:
    ratio = median(a / b for a, b in zip(joined, separate, strict=True))
    return {
        "joined, s": f"{median(joined):.4f}",
        "separate, s": f"{median(separate):.4f}",
        "tokens/s, ratio": f"{ratio:.3f}",
    }


def gpu_case(sizes: Sizes, rounds: int, report: Callable[[Row], None]) -> None:
    """Time compiled steps of both settings, which two processes hold, in turn."""
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for kind in ("joined", "separate"):
        pipes[kind], other = spawn.Pipe()
        spawn.Process(target=hold, args=(other, kind, sizes), daemon=True).start()
        other.close()
    for kind, pipe in pipes.items():
        report({"documents": kind} | answer(pipe))
    times: dict[int, list[tuple[float, float]]] = {mean: [] for mean in sizes.means}
    for _ in range(rounds):
        for mean, found in times.items():
            found.append(tuple(ask(pipes[kind], mean) for kind in ("joined", "separate")))
    per_batch = sizes.rows * sizes.length
    for mean, found in times.items():
        joined, separate = zip(*found, strict=True)
        rows = draw_rows(sizes.length, mean, sizes.rows, sizes.vocabulary)
        count = int((rows[:, :-2] == END).sum()) + len(rows)
        speed = {"tokens/s": round(per_batch / median(separate))}
        report({"documents": f"{count:,} separate"} | compared(joined, separate) | speed)


def ask(pipe: Connection, mean: int) -> float:
    """The seconds of a step on documents of this mean length, in the process behind the pipe."""
    pipe.send(mean)
    found: float = answer(pipe)["seconds"]
    return found


def answer(pipe: Connection) -> Row:
    found: Row = pipe.recv()
    if "error" in found:
        raise SystemExit(found["error"])
    return found


def hold(pipe: Connection, kind: str, sizes: Sizes) -> None:
    """Prepare one setting, and time steps for every mean length that arrives."""
    try:
        began = time.perf_counter()
        row = check_operators(sizes) if kind == "separate" else {}
        backend, batches = prepare(kind, sizes)
        row |= check_step(backend, next(iter(batches.values())), sizes)
        pipe.send(row | {"prepared, s": round(time.perf_counter() - began, 1)})
        while True:
            batch = batches[pipe.recv()]
            began = time.perf_counter()
            for _ in range(sizes.steps):
                # A step ends with a transfer of its loss, so the device has done its work.
                backend.step([batch], 1e-4)
            pipe.send({"seconds": (time.perf_counter() - began) / sizes.steps})
    except EOFError:
        return
    except BaseException:
        pipe.send({"error": f"{kind}:\n{traceback.format_exc()}"})


def prepare(kind: str, sizes: Sizes) -> tuple[TrainBackend, dict[int, Batch]]:
    """The model, and a batch for every mean length."""
    config = dataclasses.replace(
        PRESETS[sizes.model], vocab_size=sizes.vocabulary, max_position_embeddings=sizes.length
    )
    settings = TrainConfig(batch_size=sizes.rows, compile=sizes.compile)
    backend = TrainBackend(config, settings, initial_weights(config, 0), sizes.device)
    end = END if kind == "separate" else None
    drawn = {
        mean: draw_rows(sizes.length, mean, sizes.rows, sizes.vocabulary) for mean in sizes.means
    }
    return backend, {mean: next_token_batch(rows, end) for mean, rows in drawn.items()}


def check_step(backend: TrainBackend, batch: Batch, sizes: Sizes) -> Row:
    """Compare the loss of a training step, which changes no weights, with that of evaluation."""
    wanted = backend.evaluate(batch)[0] / float(batch.weights.sum())
    loss, norm = backend.step([batch], 0.0)
    if not abs(loss / wanted - 1) < 1e-3:
        raise SystemExit(f"the training step has the loss {loss}, evaluation {wanted}")
    row: Row = {"loss": round(loss, 4), "gradient norm": round(norm, 4)}
    if sizes.device == "cuda":
        row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def check_operators(sizes: Sizes) -> Row:
    """Compare attention and solve with documents, outputs and gradients, with single documents."""
    rows = draw_rows(sizes.length, sizes.means[1], 2, sizes.vocabulary)
    starts = next_token_batch(rows, END).document_starts
    assert starts is not None
    width = PRESETS[sizes.model].hidden_size
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(2, sizes.length, *shape, generator=generator)
        return drawn.to(sizes.device, dtype)

    states, heads = [draw(width) for _ in range(3)], [draw(4, 64) for _ in range(3)]
    cases = {
        "solve": (solve, solve, [*states, draw().tanh()]),
        "attention": (attend, attend, heads),
    }
    if sizes.compile:
        compiled = torch.compile(attend, fullgraph=True, dynamic=False)
        cases["compiled attention"] = compiled, attend, heads
    found: Row = {}
    for name, (function, single, inputs) in cases.items():
        found[f"{name}, error"] = error = relative_error(function, single, inputs, starts)
        if not error < (3e-2 if dtype == torch.bfloat16 else 1e-5):
            raise SystemExit(f"{name} differs from that of single documents by {error}")
    return found


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """`causal_attention` of tensors (B, T, H, d)."""
    out = causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), None, starts)
    return out.transpose(1, 2)


def solve(*inputs: torch.Tensor) -> torch.Tensor:
    """`feedback_solve` of f, q, k, gamma and, perhaps, starts."""
    return feedback_solve(*inputs[:4], document_starts=inputs[4] if inputs[4:] else None)


def relative_error(
    function: Callable[..., torch.Tensor],
    single: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    starts: np.ndarray,
) -> float:
    """The largest error of an output or a gradient of `function`, over the size of what is wanted.

    `single` gives that, document by document.
    """

    def results(
        apply: Callable[..., torch.Tensor], inputs: list[torch.Tensor], *rest: torch.Tensor
    ) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = apply(*leaves, *rest)
        # The output as its own cotangent gives gradients that follow the documents.
        return [y.detach(), *torch.autograd.grad(y, leaves, y.detach())]

    found = results(function, inputs, torch.from_numpy(starts).to(inputs[0].device))
    wanted = [torch.empty_like(x) for x in found]
    for span in spans(starts):
        for whole, part in zip(wanted, results(single, [x[span] for x in inputs]), strict=True):
            whole[span] = part
    pairs = [(x.float(), y.float()) for x, y in zip(found, wanted, strict=True)]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def main() -> None:
    """Check, time and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=320, help="of a row, without a GPU")
    parser.add_argument("--mean", type=int, default=80, help="of documents, without a GPU")
    parser.add_argument("--small", action="store_true", help="try the case for a GPU on the CPU")
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    options = parser.parse_args()
    gpu = torch.cuda.is_available() and not options.small
    rows: list[Row] = []

    def report(row: Row) -> None:
        print(row, flush=True)
        rows.append(row)
        if options.out is not None:
            save("documents_cuda" if gpu else "documents_cpu", rows, options.out)

    print(machine(), flush=True)
    if gpu or options.small:
        gpu_case(Sizes() if gpu else SMALL, options.rounds, report)
    else:
        report({"rows": f"4 of {options.length} tokens", "mean length": options.mean})
        cpu_cases(options, report)
    print("\n" + table([row for row in rows if "tokens/s, ratio" in row]))


if __name__ == "__main__":
    main()
