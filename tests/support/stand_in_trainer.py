"""Stands for `sessa train` in the tests of `sessa compare`: the same options, files and exit codes.

Accuracies are by model and seed, the best rate by model. A file "slow", "broken" or "data" beside
the comparison's folder changes it. The variable PRESETS names a file with the keys of the presets,
because importing the library takes longer than everything else here.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import time

p = argparse.ArgumentParser()
p.add_argument("--task-option", action="append", default=[])
for name in (
    "task",
    "data",
    "preset",
    "layer-kinds",
    "steps",
    "batch-size",
    "learning-rate",
    "seed",
    "warmup-steps",
    "out",
    "evaluate-every",
    "backend",
    "device",
    "resume",
    "precision",
    "text-field",
):
    p.add_argument("--" + name)
p.add_argument("--validation-data", action="append")
for name in ("json", "compile"):
    p.add_argument("--" + name, action="store_true")
a = p.parse_args()
folder = pathlib.Path(a.resume or a.out)
log = folder.parent.parent / "calls"
with log.open("a") as file:
    file.write(
        json.dumps(
            {
                "name": folder.name,
                "resumed": bool(a.resume),
                "device": a.device,
                "steps": a.steps,
                "compile": a.compile,
            }
        )
        + "\n"
    )
if a.resume:
    given = json.loads((folder / "training.json").read_text())
else:
    given = vars(a)
    # A folder and a result appear whole, like those of the real one: the command looks at any time.
    start = folder.with_name(folder.name + ".start")
    start.mkdir(parents=True)
    (start / "training.json").write_text(json.dumps(given))
    config = json.loads(pathlib.Path(os.environ["PRESETS"]).read_text())[a.preset]
    config |= {"vocab_size": 613, "max_position_embeddings": 300}
    if a.layer_kinds:
        config["layer_kinds"] = a.layer_kinds
    (start / "config.json").write_text(json.dumps(config))
    data = folder.parent.parent.parent / "data"
    about = {"step": 1, "fingerprint": data.read_text() if data.exists() else "first"}
    head = json.dumps({"__metadata__": {"training": json.dumps(about)}}).encode()
    state = len(head).to_bytes(8, "little") + head
    (start / "training_state.safetensors").write_bytes(state)
    start.rename(folder)
slow = folder.parent.parent.parent / "slow"
if slow.exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    (folder / "new").write_text(str(os.getpid()))
    (folder / "new").rename(folder / "waiting")
    time.sleep(60)
broken = folder.parent.parent.parent / "broken"
if broken.exists() and broken.read_text() in folder.name:
    print("error: the loss is nan")
    sys.exit(3)
best = 3e-3 if given["preset"].startswith("sessa") else 1e-3
loss = 0.5 + 100 * abs(float(given["learning_rate"]) - best)
base = {"sessa-1m": 0.8, "transformer-1m": 0.6, "mamba2-1m": 0.3}[given["preset"]]
accuracy = base + 0.02 * int(given["seed"]) - 0.1 * bool(given.get("layer_kinds"))
if "density=0" in given["task_option"]:
    accuracy = min(1.0, accuracy + 0.32)
steps = int(given["steps"])
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, steps + 1):
        file.write(json.dumps({"step": step, "loss": 1.0, "tokens": 10, "seconds": 0.5}) + "\n")
        file.write(
            json.dumps(
                {
                    "step": step,
                    "validation_loss": loss + 1 - step / steps,
                    "validation_accuracy": accuracy * step / steps,
                }
            )
            + "\n"
        )
if given["task"]:
    test = {
        "accuracy": accuracy,
        "examples": 8,
        "by_lag": {"128": accuracy, "512": accuracy / 2},
        "errors_by_lag": {"128": {"same_prefix": 0.75, "other": 0.25}},
        "heuristics_by_lag": {"128": {"prefix_only": 0.4}, "512": {"prefix_only": 0.19}},
    }
    if given["task"] == "symbolsoup":
        test["ceiling"] = 0.85
    options = {"min_lag": 96, "max_lag": 384, "test_lags": [128, 512]}
    (folder / "new").write_text(
        json.dumps(
            {
                "task": given["task"],
                "parameters": 5,
                "task_options": options,
                "tokens_per_second": 60.0,
                "steps": steps,
                "validation_loss": loss,
                "test": test,
            }
        )
    )
    (folder / "new").rename(folder / "result.json")
