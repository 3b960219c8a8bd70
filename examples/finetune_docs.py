"""Teach a model to answer questions about Python's standard library, with LoRA.

    python examples/finetune_docs.py MODEL OUT [--steps 300] [--device cuda]

The questions and answers are made from the documentation of the Python that runs: the first
paragraph of docstrings, signatures, and the topics of `pydoc`. One object in twenty is held out
with all its questions. OUT gets train.jsonl, held-out.jsonl, the adapter in OUT/adapter, and
answers.md: the held-out loss on answers, and answers to held-out questions, before and after. MODEL
is any checkpoint folder, such as an upcycled Llama. The training is that of

    sessa finetune MODEL --data OUT/train.jsonl --validation-data OUT/held-out.jsonl ...

with LoRA, and with the feedback too where the model has it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import io
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from pydoc_data.topics import topics

import sessa_torch
from sessa_common.checkpoint.folder import load_config
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from sessa_common.training.preparation import TrainRequest, prepare
from sessa_torch.training import TrainBackend

# Modules that print, open windows or change the program when they are imported, and tests.
LEFT_OUT = {"antigravity", "idlelib", "this", "tkinter", "turtle", "turtledemo", "lib2to3", "test"}
SHORTEST, LONGEST = 20, 400
HELD_OUT = 20  # of so many objects one is held out
SHOWN = 12
ASK = ("What does {} do?", "Explain {} in Python.", "What is {} for?")


def first_paragraph(text: str | None) -> str | None:
    """The first paragraph of a documentation on one line; None when it is no sentence to learn."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    fits = SHORTEST <= len(paragraph) <= LONGEST and paragraph.isascii()
    return paragraph if fits and not re.match(r"\w+\(.*\)( ->.*)?$", paragraph) else None


def modules() -> Iterator[tuple[str, object]]:
    """Name and module of what the standard library has, without what cannot be imported."""
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        if name.startswith("_"):
            continue
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                with redirect_stderr(io.StringIO()):
                    yield name, importlib.import_module(name)
        except ImportError:
            continue


def members(prefix: str, owner: object, module: str) -> Iterator[tuple[str, object]]:
    """Dotted name and value of the public functions and classes of a module, and their methods."""
    for name, value in sorted(vars(owner).items()):
        is_own = getattr(value, "__module__", None) in (module, None)
        if name.startswith("_") or not is_own or not callable(value):
            continue
        yield f"{prefix}.{name}", value
        if inspect.isclass(value):
            yield from members(f"{prefix}.{name}", value, module)


def pairs(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Questions and answers about one object."""
    number = _number(name)
    if answer := first_paragraph(getattr(value, "__doc__", None)):
        yield ASK[number % len(ASK)].format(name), answer
        yield ASK[(number + 1) % len(ASK)].format(name), answer
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    if len(signature) <= LONGEST and " at 0x" not in signature:
        yield f"How do I call {name}?", f"Call it as {name.rpartition('.')[2]}{signature}."


def questions() -> Iterator[tuple[str, str, str]]:
    """The object that is asked about, the question and its answer."""
    for module, value in modules():
        if answer := first_paragraph(getattr(value, "__doc__", None)):
            yield module, f"What is the module {module} for?", answer
        for name, member in members(module, value, module):
            for question, answer in pairs(name, member):
                yield name, question, answer
    for topic, text in sorted(topics.items()):
        body = text.split("\n\n", 2)[1] if text.count("\n\n") else text
        if answer := first_paragraph(body):
            yield topic, f"What does Python's reference say about {topic.lower()}?", answer


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def write_questions(out: Path) -> list[tuple[str, str]]:
    """Write train.jsonl and held-out.jsonl, and return the held-out questions with answers."""
    out.mkdir(parents=True, exist_ok=True)
    held_out, seen = [], set[str]()
    with (out / "train.jsonl").open("w") as train, (out / "held-out.jsonl").open("w") as held:
        for name, question, answer in questions():
            if question in seen:
                continue
            seen.add(question)
            user, own = ({"role": "user", "content": question}, {"role": "assistant"})
            line = json.dumps({"messages": [user, {**own, "content": answer}]}) + "\n"
            if _number(name) % HELD_OUT:
                train.write(line)
            else:
                held.write(line)
                held_out.append((question, answer))
    print(f"{len(seen) - len(held_out):,} questions to learn, {len(held_out):,} held out")
    return held_out


def answers(model: Path, asked: list[str], adapter: Path | None, device: str | None) -> list[str]:
    """The likeliest answers of the model, with the adapter if there is one."""
    template = ChatTemplate(DEFAULT_TEMPLATE, {"eos_token": ""})
    prompts = [template.render([{"role": "user", "content": question}]) for question in asked]
    found = sessa_torch.generate(
        model, prompts, adapter=adapter, device=device, temperature=0, max_tokens=80
    )
    return [" ".join(text.split("\nUser:")[0].split()) for text in found]


def main() -> None:
    """Make the questions, fine-tune, and show answers before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device")
    given = parser.parse_args()
    held_out = write_questions(given.out)
    config = load_config(given.model)
    settings = {
        "train": "feedback+lora" if config.feeds_back else "lora",
        "data": (str(given.out / "train.jsonl"),),
        "validation_data": (str(given.out / "held-out.jsonl"),),
        "steps": given.steps,
        "batch_size": given.batch_size,
        "sequence_length": min(256, config.max_position_embeddings),
        "learning_rate": given.rate,
        "lora_rank": given.rank,
        "lora_alpha": 2.0 * given.rank,
        "warmup_steps": max(1, given.steps // 10),
        "evaluate_every": 100,
        "evaluate_batches": max(1, len(held_out) // given.batch_size),
        "checkpoint_every": 0,
    }
    adapter = given.out / "adapter"
    request = TrainRequest(
        out=adapter, init=given.model, force=True, finetune=True, fields=settings
    )
    run = prepare(request)
    backend = TrainBackend(run.config, run.settings, run.weights, given.device)
    batches = run.source.validation()
    weight = sum(float(batch.weights.sum()) for batch in batches)
    before = sum(backend.evaluate(batch)[0] for batch in batches) / weight
    print(f"held-out loss on answers before: {before:.4f} nats a token", flush=True)
    result = sessa_torch.finetune(given.model, adapter, force=True, device=given.device, **settings)
    after = result.metrics["validation_loss"]
    print(f"held-out loss on answers after: {after:.4f} nats a token", flush=True)
    asked = [question for question, _ in held_out[:: max(1, len(held_out) // SHOWN)][:SHOWN]]
    first = answers(given.model, asked, None, given.device)
    last = answers(given.model, asked, adapter, given.device)
    lines = [f"Held-out loss on answers: {before:.4f} nats a token before, {after:.4f} after.", ""]
    true = dict(held_out)
    for question, one, other in zip(asked, first, last, strict=True):
        lines += [f"**{question}**", "", f"- documentation: {true[question]}"]
        lines += [f"- before: {one}", f"- after: {other}", ""]
    text = "\n".join(lines)
    (given.out / "answers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except SessaError as error:
        sys.exit(f"error: {error}")
