"""The README.md of a folder: a model card in the format of the Hugging Face hub.

It says what the files of the folder say, and nothing else. A README.md that a person wrote or
changed stays as it is: the last line of ours has a hash of what stands above it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sessa_common.checkpoint.run_files import ADAPTER_CONFIG, TRAINING
from sessa_common.config import SessaConfig, parameter_count
from sessa_common.errors import SessaError
from sessa_common.input_files import read_limited
from sessa_common.json_files import read_json
from sessa_common.storage import write_text
from sessa_common.train_config import TrainConfig

CARD = "README.md"
LARGEST_CARD = 2**20
SIGNATURE = "<!-- sessa-toolchain {} -->\n"
# The measures that a card shows, in the words of the hub where it has some.
MEASURES = {
    "step": "step",
    "loss": "training loss (nats per token)",
    "validation_loss": "validation loss (nats per token)",
    "validation_perplexity": "validation perplexity",
    "validation_accuracy": "validation accuracy",
}
# A data set of the hub among the names of data, without its weight in a mixture.
HUB_DATA = re.compile(r"hf:([\w.-]+/[\w.-]+)(:[\d.]+)?")
HUB_METRICS = {"validation_perplexity": "perplexity", "validation_accuracy": "accuracy"}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts of a card beside the config: the base of a fine-tuned model, metrics, notes.

    `origin` are sentences on where the folder comes from. `clients` are those that load it, of
    CLIENTS.
    """

    config: SessaConfig
    base: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    origin: Sequence[str] = ()
    clients: Sequence[str] = ("sessa", "transformers", "mlx-lm")


def write_model_card(folder: Path, facts: CardFacts, target: Path | None = None) -> None:
    """Write README.md into a folder of this project, unless a person wrote or changed it.

    `target` is the folder that this one becomes; a README.md of a person there is taken over.
    """
    path, old = folder / CARD, (target or folder) / CARD
    if old.is_file() and not path.exists() and not is_own_card(old):
        shutil.copyfile(old, path)
    if path.exists() and not is_own_card(path):
        return
    text = _card(folder, facts, (target or folder).resolve().name) + "\n"
    write_text(path, text + SIGNATURE.format(_digest(text)))


def is_own_card(path: Path) -> bool:
    """Return True for a README.md as this module wrote it."""
    if not path.is_file():
        return False
    text = read_limited(path, LARGEST_CARD).decode("utf-8", errors="replace")
    above, end, last = text[:-1].rpartition("\n")
    return text == above + end + SIGNATURE.format(_digest(above + end)) and bool(last)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _card(folder: Path, facts: CardFacts, name: str) -> str:
    adapter = _read(folder / ADAPTER_CONFIG)
    settings, config = _settings(folder / TRAINING), _read(folder / "config.json")
    parts = [
        _front_matter(facts, adapter, settings, config),
        f"# {name}\n",
        _model_section(facts, adapter, config),
        _load_section(facts, adapter, settings, name),
        _training_section(facts, adapter, settings),
        _results_section(facts),
    ]
    return "\n".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _settings(path: Path) -> dict[str, Any]:
    """The settings of a run; none where there is no file, or one that says something else."""
    try:
        return dataclasses.asdict(TrainConfig.from_dict(_read(path))) if path.is_file() else {}
    except SessaError:
        return {}


def _front_matter(
    facts: CardFacts,
    adapter: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
) -> str:
    library = "transformers"
    if adapter:
        library = "peft" if "peft_type" in adapter else "sessa-toolchain"
    elif "quantization" in config:
        library = "mlx"
    keys: dict[str, str | list[str]] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["sessa"],
    }
    if facts.base is not None and (base := hub_name(facts.base)):
        keys["base_model"] = base
    names = [found[1] for name in settings.get("data", ()) if (found := HUB_DATA.fullmatch(name))]
    keys["datasets"] = [name for name in names if not Path(name).exists()]
    keys["metrics"] = [HUB_METRICS[key] for key in facts.metrics if key in HUB_METRICS]
    lines = []
    for key, value in keys.items():
        if isinstance(value, str):
            lines.append(f"{key}: {value}")
        elif value:
            lines += [f"{key}:", *(f"- {item}" for item in value)]
    return "\n".join(["---", *lines, "---", ""])


def hub_name(path: str) -> str | None:
    """The name owner/name of a model in the hub's cache, None for any other path."""
    for part in Path(path).parts:
        kind, _, rest = part.partition("--")
        owner, _, name = rest.partition("--")
        if kind == "models" and owner and name:
            return f"{owner}/{name}"
    return None


def _model_section(facts: CardFacts, adapter: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    model = facts.config
    kinds = list(dict.fromkeys(kind.name for kind in model.kinds))
    rows = {
        "layers": f"{model.num_hidden_layers} ({', '.join(kinds)})",
        "parameters": f"{parameter_count(model):,}",
        "width": f"{model.hidden_size:,}",
        "context": f"{model.max_position_embeddings:,} tokens",
        "vocabulary": f"{model.vocab_size:,}",
        "type": model.dtype,
    }
    if given := config.get("quantization"):
        rows["quantised"] = f"{given.get('bits')} bits, groups of {given.get('group_size')}"
    lead = "A language model of sessa-toolchain."
    if adapter:
        lead = f"An adapter for the model `{_base_name(facts.base)}` of sessa-toolchain:"
        kind = "trained feedback"
        if "r" in adapter:
            kind = f"LoRA of rank {adapter['r']}, alpha {adapter['lora_alpha']:g}"
        lead = f"{lead} {kind}."
    return "\n".join([" ".join([lead, *facts.origin]), "", *_table(("", "the model"), rows), ""])


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return lines + [f"| {name} | {value} |" for name, value in rows.items()]


def _load_section(
    facts: CardFacts, adapter: Mapping[str, Any], settings: Mapping[str, Any], name: str
) -> str:
    base = _base_name(facts.base)
    blocks = [ADAPTER_CLIENTS[client] for client in _adapter_clients(adapter, settings)]
    if not adapter:
        blocks = [CLIENTS[client] for client in facts.clients]
    code = "\n".join(block.format(name=name, base=base) for block in blocks)
    needs = "" if facts.clients == ("llama",) else "The code is in the package sessa-toolchain.\n\n"
    return f"## Load\n\n{needs}{code}"


def _adapter_clients(adapter: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The clients that load an adapter: PEFT one with LoRA, mlx-lm LoRA or whole parameters."""
    mixed = "+" in settings.get("train", "")
    return ["sessa"] + ["peft"] * ("peft_type" in adapter) + ["mlx-lm"] * (not mixed)


def _base_name(base: str | None) -> str:
    """The name by which a card calls the model that was fine-tuned."""
    return "BASE" if base is None else hub_name(base) or Path(base).name


# How a program loads a model, by client.
CLIENTS = {
    "sessa": """\
```python
import sessa_torch  # or sessa_mlx

print(sessa_torch.generate("{name}", "The"))
```
""",
    "transformers": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
""",
    "mlx-lm": """\
```python
from mlx_lm import load

model, tokenizer = load("{name}", trust_remote_code=True)
```
""",
    "llama": """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
""",
}
ADAPTER_CLIENTS = {
    "sessa": """\
```python
import sessa_torch  # or sessa_mlx

print(sessa_torch.generate("{base}", "The", adapter="{name}"))
```
""",
    "peft": """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{name}")
```
""",
    "mlx-lm": """\
```python
from mlx_lm import load

model, tokenizer = load("{base}", adapter_path="{name}", trust_remote_code=True)
```
""",
}


def _training_section(
    facts: CardFacts, adapter: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    if not settings:
        return ""
    data = settings.get("task") or ", ".join(f"`{name}`" for name in settings.get("data", ()))
    rows = {
        "data": data,
        "trained": settings.get("train", "all"),
        "steps": settings.get("steps"),
        "rows in a step": settings["batch_size"] * settings["gradient_accumulation_steps"],
        "learning rate": f"{settings['learning_rate']:g}",
        "seed": settings.get("seed"),
    }
    call = 'train("again", config="config.json", train_config="training.json")'
    if settings.get("base") is not None:
        call = f'finetune("{_base_name(settings["base"])}", "again", train_config="training.json")'
    again = f"```python\nimport sessa_torch  # or sessa_mlx\n\nsessa_torch.{call}\n```\n"
    told = "The settings are in `training.json`. The same run again:\n"
    return "\n".join(["## Training", "", *_table(("", ""), rows), "", told, again])


def _results_section(facts: CardFacts) -> str:
    found = facts.metrics
    rows = {
        text: f"{found[key]:.4g}" if isinstance(found[key], float) else found[key]
        for key, text in MEASURES.items()
        if key in found
    }
    return "\n".join(["## Results", "", *_table(("measure", "value"), rows), ""]) if rows else ""
