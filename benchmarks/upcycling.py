"""Ask whether feedback helps a pretrained Transformer, against LoRA with as many parameters.

    python benchmarks/upcycling.py --data CORPUS [--runs FOLDER] [--out FOLDER]
        [--pretrain-seconds 110] [--tune-seconds 180]
    python benchmarks/upcycling.py --tiny

CORPUS is a folder of `upcycling_corpus.py`. A Llama of 32 million parameters is pretrained on it
with rows of 4096 tokens, written as a folder of transformers and read back with feedback of gain 0.
From it are trained, with three seeds, on rows of 4096 tokens of the long documents: LoRA, the
feedback, both, and all weights without and with feedback. The ranks of LoRA are chosen so that the
first three train equally many parameters within 2 %. Every arm is trained with two learning rates
for the first seed, and with the one of lower validation loss for the others. Documents in a row are
joined for all, steps and batches are equal.

Measured on held-out documents, rows inside one document each: nats a token by position, on short
texts, and recall of a random passage at growing distance (accuracy of its last tokens the second
time); how large the gains became; and, with one arm at a time on the device, tokens a second and
the peak memory of training. The arms are processes that compile while the Llama is pretrained and
share the device later. How many steps fit the seconds is measured. What is finished is not computed
again by a second call with the same --runs, and the table in --out grows with every run. `--tiny`
tries everything on a CPU in a few minutes, with texts that Python brings; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, machine, save, table
from upcycling_corpus import write as write_corpus
from upcycling_measures import (
    peak_memory,
    qualities,
    rows_within_documents,
    step_seconds,
    validation_nats,
)

from sessa_common.checkpoint.adapters import lora_shapes
from sessa_common.checkpoint.conversion import convert
from sessa_common.config import SessaConfig
from sessa_common.data.sources import read_documents
from sessa_common.data.tokenization import TokenizeRequest, tokenize
from sessa_common.json_files import read_json
from sessa_common.storage import write_json
from sessa_common.training.backend import MOMENTS, learning_rate
from sessa_common.training.metrics import last_metrics, read_metrics
from sessa_common.training.preparation import TrainRequest, prepare
from sessa_common.training.run_folder import Run, create_run_folder
from sessa_common.training.trained_parameters import trained_shapes
from sessa_common.training.trainer import Silent, Trainer, made_ahead
from sessa_torch.checkpoint import to_tensor
from sessa_torch.training import TrainBackend

SEEDS = (0, 1, 2)
# Learning rates that each arm tries. Few weights learn with higher rates than all of them.
RATES = {
    "lora": (1e-3, 3e-3),
    "feedback": (1e-3, 3e-3),
    "feedback+lora": (1e-3, 3e-3),
    "all, no feedback": (3e-4, 1e-3),
    "all, feedback": (3e-4, 1e-3),
}
# Where all weights are trained, the new feedback learns faster than the pretrained weights.
FEEDBACK_RATE = 3.0
# Part of the given time that steps get; the rest is for measuring the trained models.
STEPS_SHARE = 0.9
# Seconds that an arm waits for the others before it goes on alone.
LONGEST_WAIT = 300
LLAMA = {
    "layer_kinds": "transformer",
    "norm_type": "rms",
    "mlp_type": "swiglu",
    "qkv_bias": False,
    "out_proj_bias": False,
    "mlp_bias": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the model and of the runs; `short` and `long` are rows in tokens.

    `steps` are the most of a fine-tuning run, `pretrain_steps` of the pretraining.
    """

    model: dict[str, Any]
    tokenizer: str
    key_dim: int
    short: int
    long: int
    pretrain: dict[str, Any]
    batch_size: int
    pretrain_steps: int
    steps: int
    rows: int
    seeds: tuple[int, ...] = SEEDS


FULL = Size(
    model={
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    tokenizer="8192",
    key_dim=128,
    short=512,
    long=4096,
    pretrain={"batch_size": 8, "learning_rate": 1.2e-3, "warmup_steps": 150},
    batch_size=4,
    pretrain_steps=20_000,
    steps=1000,
    rows=64,
)
TINY = Size(
    model={
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
    tokenizer="bytes",
    key_dim=32,
    short=32,
    long=512,
    pretrain={"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1},
    batch_size=1,
    pretrain_steps=4,
    steps=2,
    rows=2,
    seeds=SEEDS[:2],
)


@dataclasses.dataclass(frozen=True)
class Gates:
    """Signals by which the arms wait for each other, the trained Llama and the free device."""

    trained: Any
    compiled: Any
    measured: Any
    alone: Any


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The sizes, the folder of everything that is made on the way, and the seconds to train."""

    size: Size
    runs: Path
    pretrain_seconds: float
    tune_seconds: float
    compile: bool
    began: float

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.time() - self.began:5.0f} s] {text}", flush=True)

    def tokens(self, name: str) -> str:
        """The folder of tokens of a file of the corpus."""
        return str(self.runs / "tokens" / name)

    def piece(self, arm: str, what: str) -> Path:
        """The file for one finished measurement of an arm."""
        return self.runs / "pieces" / f"{slug(arm)}-{what}.json"


def slug(arm: str) -> str:
    """The name of an arm for files."""
    return arm.replace(", ", "-").replace("+", "-").replace(" ", "-")


def make_tokens(own: Experiment, corpus: Path | None) -> None:
    """Tokenize the four files of the corpus; the tokenizer is trained on the long documents."""
    if corpus is None and not (own.runs / "tokens").is_dir():
        corpus = own.runs / "corpus"
        texts = [("pydoc", text) for text in read_documents(["pydoc"])]
        write_corpus(corpus, texts, long=4000, every=5)
    for name in ("long", "short", "held-out-long", "held-out-short"):
        folder = own.tokens(name)
        if not Path(folder).is_dir():
            own.say(f"tokenizing {name}.jsonl")
            spec = own.size.tokenizer if name == "long" else own.tokens("long")
            source = (f"{corpus}/{name}.jsonl",)
            # One process, because the tokenizer has threads of its own.
            tokenize(TokenizeRequest(sources=source, out=folder, tokenizer=spec))


def restart(backend: TrainBackend, weights: Mapping[str, np.ndarray]) -> None:
    """Give a backend other weights in place, as before its first step.

    A captured step reads tensors at their addresses, so nothing is compiled again.
    """
    with torch.no_grad():
        for name, parameter in backend.model.named_parameters():
            parameter.copy_(to_tensor(weights[name]))
    state = {f"weights.{name}": weights[name] for name in backend.parameters}
    for name in backend.parameters:
        state |= {f"{moment}.{name}": np.zeros_like(weights[name]) for moment in MOMENTS}
    backend.restore(state, 0)


class Progress(Silent):
    """Prints the loss now and then."""

    def __init__(self, own: Experiment, every: int) -> None:
        self.own, self.every = own, every

    def training(self, record: Mapping[str, Any]) -> None:
        """Print every so many steps."""
        if record["step"] % self.every == 0:
            self.own.say(f"pretraining: step {record['step']}, loss {record['loss']:.3f}")


def begin_pretraining(own: Experiment) -> Trainer:
    """Compile the Llama's training, choose its number of steps, and write it untrained."""
    size, folder = own.size, own.runs / "pretrained"
    fields = {
        "data": (own.tokens("long"), own.tokens("short")),
        "validation_fraction": 0.01,
        "sequence_length": size.long,
        "documents": "joined",
        "compile": own.compile,
        "evaluate_every": 0,
        "checkpoint_every": 0,
        **size.pretrain,
    }
    config = SessaConfig(**LLAMA, **size.model)
    run = prepare(TrainRequest(out=folder, config=config, force=True, fields=fields))
    backend = TrainBackend(run.config, run.settings, run.weights)
    seconds = step_seconds(backend, run.source)
    steps = min(size.pretrain_steps, max(1, int(own.pretrain_seconds / seconds)))
    tokens = steps * size.long * run.settings.batch_size
    own.say(
        f"pretraining {count(trained_shapes(run.config, run.settings)):,} parameters: {steps:,} "
        f"steps of {1e3 * seconds:.1f} ms, {tokens:,} tokens of {run.source.summary}"
    )
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, steps=steps))
    restart(backend, run.weights)
    create_run_folder(run, backend.state(), backend.precision, force=True)
    if not (own.runs / "untrained").is_dir():
        convert(folder, own.runs / "untrained", framework="llama")
    return Trainer(backend, run, 0, Progress(own, 200))


def finish_pretraining(own: Experiment, trainer: Trainer) -> None:
    """Train the Llama and write it as a folder of transformers."""
    trainer.train()
    settings, folder = trainer.settings, own.runs / "llama"
    tokens = settings.steps * settings.batch_size * own.size.long
    nats = last_metrics(read_metrics(trainer.folder))["validation_loss"]
    convert(own.runs / "pretrained", folder, framework="llama")
    about = {"steps": settings.steps, "tokens": tokens, "held-out nats": nats}
    write_json(own.runs / "pieces" / "pretraining.json", about)
    own.say(f"pretraining: {about}")


def matched(config: SessaConfig, key_dim: int) -> dict[str, tuple[int, int]]:
    """Width of the feedback's keys and rank of LoRA in each arm, for equal numbers of parameters.

    Where both are trained, the keys are half as wide, and LoRA fills the rest.
    """
    target, half = feedback_count(config, key_dim), feedback_count(config, key_dim // 2)
    per_rank = count(lora_shapes(config, 1))
    return {
        "lora": (0, max(1, round(target / per_rank))),
        "feedback": (key_dim, 0),
        "feedback+lora": (key_dim // 2, max(1, round((target - half) / per_rank))),
        "all, no feedback": (0, 0),
        "all, feedback": (key_dim, 0),
    }


def feedback_count(config: SessaConfig, key_dim: int) -> int:
    """The number of parameters of the feedback in all layers."""
    D = config.hidden_size
    return config.num_hidden_layers * (2 * key_dim * (D + 1) + D + 1)


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of parameters of these shapes."""
    return sum(map(math.prod, shapes.values()))


def prepare_arm(own: Experiment, arm: str, llama: str, seed: int, rate: float, steps: int) -> Run:
    """Read what a run of an arm needs; nothing is written but the model with feedback."""
    size = own.size
    key_dim, rank = matched(SessaConfig(**LLAMA, **size.model), size.key_dim)[arm]
    base = own.runs / "bases" / f"{slug(arm)}-{llama}-{seed}"
    if not base.is_dir():
        feedback = {"feedback": "all", "feedback_key_dim": key_dim} if key_dim else {}
        convert(own.runs / llama, base, seed=seed, **feedback)
    fields = {
        "data": (own.tokens("long"),),
        "validation_fraction": 0.01,
        "sequence_length": size.long,
        "documents": "joined",
        "compile": own.compile,
        "train": "all" if arm.startswith("all") else arm,
        "seed": seed,
        "learning_rate": rate,
        "steps": steps,
        "warmup_steps": steps // 10,
        "batch_size": size.batch_size,
        "evaluate_batches": max(1, size.rows // size.batch_size),
        "feedback_rate": FEEDBACK_RATE if arm == "all, feedback" else 1.0,
        **({"lora_rank": rank, "lora_alpha": 2.0 * rank} if rank else {}),
    }
    out = own.runs / "unused"
    return prepare(TrainRequest(out=out, init=base, finetune=True, fields=fields))


def run_arm(own: Experiment, arm: str, gates: Gates, rows: tuple[np.ndarray, np.ndarray]) -> None:
    """Compile one arm, measure its cost in its turn, and train it with every seed."""
    # The arms compile at the same time.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "3"
    torch.set_num_threads(1)
    first = RATES[arm][0]
    run = prepare_arm(own, arm, "untrained", 0, first, own.size.steps)
    backend = TrainBackend(run.config, run.settings, run.weights)
    backend.step([run.source.batch(0)], 0.0)
    memory = peak_memory()
    own.say(f"{arm}: compiled")
    gates.trained.wait()
    run = prepare_arm(own, arm, "llama", 0, first, own.size.steps)
    together(own, gates.compiled)
    with gates.alone:
        if not own.piece(arm, "cost").exists():
            seconds = step_seconds(backend, run.source)
            tokens = own.size.batch_size * own.size.long
            trained = count(trained_shapes(run.config, run.settings))
            cost = {"trained": trained, "seconds": seconds, "tokens/s": round(tokens / seconds)}
            write_json(own.piece(arm, "cost"), {"arm": arm, **cost, "memory MiB": round(memory)})
            own.say(f"{arm}: {cost}")
    together(own, gates.measured)
    if not own.piece(arm, "before").exists():
        restart(backend, run.weights)
        write_json(own.piece(arm, "before"), qualities(backend, *rows))
    steps = common_steps(own)
    for rate in RATES[arm]:
        train_once(own, arm, backend, 0, rate, steps, rows)
    for seed in own.size.seeds[1:]:
        train_once(own, arm, backend, seed, best_rate(own, arm), steps, rows)


def held_out(own: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Long and short rows of documents that no run was trained on."""
    size = own.size
    long = rows_within_documents(own.tokens("held-out-long"), size.long, size.rows, each=4)
    short = rows_within_documents(own.tokens("held-out-short"), size.short, 4 * size.rows, each=1)
    return long, short


def together(own: Experiment, barrier: Any) -> None:
    """Wait for the other arms, or go on without one that has failed."""
    try:
        barrier.wait(LONGEST_WAIT)
    except threading.BrokenBarrierError:
        own.say("an arm has failed, the others go on; their costs may not be measured alone")


def common_steps(own: Experiment) -> int:
    """The number of steps of every run, so that all of them fit the given seconds."""
    path = own.runs / "pieces" / "steps.json"
    if not path.exists():
        costs = [read_json(found) for found in path.parent.glob("*-cost.json")]
        runs = len(own.size.seeds) + 1
        seconds = runs * sum(cost["seconds"] for cost in costs)
        steps = max(1, int(STEPS_SHARE * own.tune_seconds / seconds))
        write_json(path, {"steps": min(own.size.steps, steps)})
    return int(read_json(path)["steps"])


def best_rate(own: Experiment, arm: str) -> float:
    """The learning rate with the lowest validation loss of the first seed."""
    return min(
        (read_json(own.piece(arm, f"0-{rate}"))["validation nats"], rate) for rate in RATES[arm]
    )[1]


def train_once(
    own: Experiment,
    arm: str,
    backend: TrainBackend,
    seed: int,
    rate: float,
    steps: int,
    rows: tuple[np.ndarray, np.ndarray],
) -> None:
    """Train and measure one run, unless that was done."""
    path = own.piece(arm, f"{seed}-{rate}")
    if path.exists():
        return
    run = prepare_arm(own, arm, "llama", seed, rate, steps)
    restart(backend, run.weights)
    began = time.perf_counter()
    for i, batch in enumerate(made_ahead(run.source.batch, range(steps), 4)):
        loss, norm = backend.step([batch], learning_rate(run.settings, i))
        if not math.isfinite(loss + norm):
            own.say(f"{arm}, seed {seed}, rate {rate}: step {i} is not finite")
    spent = time.perf_counter() - began
    found = {"validation nats": validation_nats(backend, run.source)}
    found |= qualities(backend, *rows)
    write_json(path, {"arm": arm, "seed": seed, "rate": rate, "steps": steps, **found})
    own.say(f"{arm}, seed {seed}, rate {rate}: {spent:.0f} s, last loss {loss:.3f}, {found}")


def report(own: Experiment, out: Path) -> str:
    """Write the table of what is finished, as Markdown and JSON, and return it."""
    pieces = own.runs / "pieces"
    raw = {path.stem: read_json(path) for path in sorted(pieces.glob("*.json"))}
    cases = []
    if before := raw.get("lora-before"):
        cases.append({"arm": "before", **{k: f"{v:.4f}" for k, v in before.items()}})
    for arm in RATES:
        cost = raw.get(f"{slug(arm)}-cost")
        if cost is None:
            continue
        row: dict[str, Any] = {"arm": arm, "trained": f"{cost['trained']:,}"}
        tried = [own.piece(arm, f"0-{rate}").exists() for rate in RATES[arm]]
        if all(tried):
            rate = best_rate(own, arm)
            names = [f"{slug(arm)}-{seed}-{rate}" for seed in own.size.seeds]
            found = [raw[name] for name in names if name in raw]
            row |= {"rate": rate, "seeds": len(found)}
            row |= {
                name: mean_and_range(found, name)
                for name in found[0]
                if name not in ("arm", "seed", "rate", "steps")
            }
        cases.append(row | {"tokens/s": cost["tokens/s"], "memory MiB": cost["memory MiB"]})
    about = [f"- {name}: {raw[name]}" for name in ("pretraining", "steps") if name in raw]
    if found := [raw[name] for name in raw if name.endswith("-before")]:
        values = [[one[name] for name in one if "nats" in name] for one in found]
        about.append(f"- largest difference of the arms before training: {np.ptp(values, 0).max()}")
    text = "\n".join([f"{machine()}", "", *about, "", table(cases), ""])
    save("upcycling", [{"piece": name, **values} for name, values in raw.items()], out)
    (out / "upcycling.md").write_text(text, encoding="utf-8")
    return text


def mean_and_range(found: list[dict[str, Any]], name: str) -> str:
    """The mean of a measure over the seeds, and half the distance of the extremes."""
    values = [float(one[name]) for one in found]
    return f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def is_finished(own: Experiment, arm: str) -> bool:
    """Return True when every run of an arm is measured."""
    if not all(own.piece(arm, f"0-{rate}").exists() for rate in RATES[arm]):
        return False
    rate = best_rate(own, arm)
    return all(own.piece(arm, f"{seed}-{rate}").exists() for seed in own.size.seeds)


def watch(own: Experiment, processes: list[Any], gates: Gates, out: Path) -> None:
    """Write the table whenever something is finished, until all arms have ended."""
    seen = -1
    while True:
        ended = all(process.exitcode is not None for process in processes)
        if any(process.exitcode for process in processes):
            gates.compiled.abort()
            gates.measured.abort()
        done = len(list((own.runs / "pieces").iterdir()))
        if done != seen:
            report(own, out)
            seen = done
        if ended:
            return
        time.sleep(1)


def main() -> None:
    """Pretrain, train every arm with every seed, measure, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of upcycling_corpus.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pretrain-seconds", type=float, default=110)
    parser.add_argument("--tune-seconds", type=float, default=180)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    own = Experiment(
        TINY if given.tiny else FULL,
        given.runs,
        given.pretrain_seconds,
        given.tune_seconds,
        compile=torch.cuda.is_available(),
        began=time.time(),
    )
    (own.runs / "pieces").mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    make_tokens(own, given.data)
    rows = held_out(own)
    trainer = None if (own.runs / "llama").is_dir() else begin_pretraining(own)
    arms = [arm for arm in RATES if not is_finished(own, arm)]
    # A process with CUDA must not be forked.
    context = multiprocessing.get_context("spawn")
    barriers = [context.Barrier(max(1, len(arms))) for _ in range(2)]
    gates = Gates(context.Event(), *barriers, context.Lock())
    processes = [context.Process(target=run_arm, args=(own, arm, gates, rows)) for arm in arms]
    try:
        for process in processes:
            process.start()
        if trainer is not None:
            finish_pretraining(own, trainer)
            del trainer
            torch.cuda.empty_cache()
        gates.trained.set()
        watch(own, processes, gates, given.out)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    print(report(own, given.out))
    own.say("done")


if __name__ == "__main__":
    main()
