"""Configuration files for each client, under the names that it reads.

`docs/onnx.md` lists the clients, the versions that were tried and what each of them needs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import processors

from sessa_common.config import SessaConfig, parameter_count
from sessa_common.errors import SessaError
from sessa_common.inference.model_tokenizer import ModelTokenizer, stop_tokens
from sessa_common.storage import write_json
from sessa_export.cache_layout import kv_layers
from sessa_export.runtime import MODEL_FILE

CLIENTS = ("ort", "cuda", "genai", "web", "transformers-js")
# Clients that read no text and have no files of their own.
PLAIN = {"ort", "cuda"}
# transformers.js finds a precision by the end of the file's name.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized", "int4": "_q4"}
JS_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
# WebAssembly addresses 4 GB, and a page holds the file and the model at once.
WEB_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported folder as the clients' files describe it; `model` is relative to the folder."""

    config: SessaConfig
    model: str
    dtype: str
    layout: str
    stop: list[int]
    library: str | None = None  # the native operator's file beside the model


def choose_clients(given: Sequence[str], layout: str) -> tuple[str, ...]:
    """The clients asked for; SessaError for one that is unknown or cannot take `layout`."""
    unknown = [name for name in given if name not in CLIENTS]
    if unknown:
        raise SessaError(f"client is {unknown[0]!r}, expected some of {', '.join(CLIENTS)}")
    if layout == "buffer" and set(given) - {"ort"}:
        raise SessaError(
            "the buffer layout is for this project's runner; other clients need natural or uniform"
        )
    return tuple(name for name in CLIENTS if name in given or name == "ort")


def require_equal_widths(config: SessaConfig, clients: Collection[str], layout: str) -> None:
    """Raise SessaError where onnxruntime-genai would meet keys and values of different widths."""
    wide = config.feeds_back and config.feedback_key_dim != config.hidden_size
    if "genai" in clients and wide and layout == "natural":
        raise SessaError(
            f"onnxruntime-genai needs keys and values of one width, but feedback_key_dim is "
            f"{config.feedback_key_dim} and hidden_size {config.hidden_size}; choose `layout` "
            "uniform"
        )


def model_path(clients: Collection[str], dtype: str) -> str:
    """Path of the model in the folder; transformers.js looks for onnx/model*.onnx."""
    return f"onnx/model{SUFFIXES[dtype]}.onnx" if "transformers-js" in clients else MODEL_FILE


def require_tokenizer(source: Path, config: SessaConfig, clients: Collection[str]) -> list[int]:
    """Ids that end a text. SessaError when a client needs what the checkpoint does not have."""
    stop = sorted(stop_tokens(source, config))
    text_clients = [name for name in clients if name not in PLAIN]
    if text_clients and not (source / "tokenizer.json").is_file():
        raise SessaError(
            f"{source}: no tokenizer.json, which {text_clients[0]} needs; "
            "put it there, or export with `clients` ort"
        )
    if text_clients and not stop:
        raise SessaError(
            f"{source}: no eos_token_id in generation_config.json or config.json, "
            f"which {text_clients[0]} needs to stop"
        )
    return stop


def write_client_files(folder: Path, clients: Collection[str], exported: Exported) -> None:
    """Write the files of the asked clients into a folder that holds the model."""
    if "genai" in clients:
        write_json(folder / "genai_config.json", _genai(exported))
    if "web" in clients:
        write_json(folder / "web.json", _web(folder, exported))
    if "transformers-js" in clients:
        write_json(folder / "config.json", _transformers_js(folder, exported))
        _begin_texts_by_tokenizer(folder, exported.config)
        if not (folder / "generation_config.json").is_file():
            write_json(folder / "generation_config.json", _token_ids(exported))


def _token_ids(exported: Exported) -> dict[str, Any]:
    config, stop = exported.config, exported.stop
    begin = config.bos_token_id if config.bos_token_id is not None else stop[0]
    pad = config.pad_token_id if config.pad_token_id is not None else stop[0]
    return {"bos_token_id": begin, "eos_token_id": stop, "pad_token_id": pad}


def _genai(exported: Exported) -> dict[str, Any]:
    """genai_config.json; genai refuses keys that it does not know."""
    config = exported.config
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if exported.library:
        options["custom_ops_library"] = exported.library
    names = {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "filename": exported.model,
        "session_options": options,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "num_hidden_layers": len(kv_layers(config, exported.layout)),
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
        "outputs": {"logits": "logits", **outputs},
    }
    model = {
        "type": "decoder",
        **_token_ids(exported),
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "decoder": decoder,
    }
    search = {
        "max_length": config.max_position_embeddings,
        "do_sample": False,
        "num_beams": 1,
        # The graph hands back longer caches instead of filling in a buffer.
        "past_present_share_buffer": False,
    }
    return {"model": model, "search": search}


def _transformers_js(folder: Path, exported: Exported) -> dict[str, Any]:
    """config.json as transformers.js wants it: a model type that it knows, one layer a pair."""
    config = exported.config
    settings: dict[str, Any] = {"dtype": JS_DTYPES[exported.dtype]}
    if (folder / (exported.model + "_data")).is_file():
        settings["use_external_data_format"] = {Path(exported.model).name: 1}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(kv_layers(config, exported.layout)),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        **_token_ids(exported),
        "transformers.js_config": settings,
    }


def _begin_texts_by_tokenizer(folder: Path, config: SessaConfig) -> None:
    """Let tokenizer.json put before a text what only tokenizer_config.json asks for.

    transformers.js does not read `add_bos_token` where it tokenizes.
    """
    texts = ModelTokenizer.open(folder, config)
    tokenizer, prefix = texts.tokenizer, texts.prefix_ids
    if tokenizer.encode("a").ids[: len(prefix)] == prefix:
        return
    names = [str(tokenizer.id_to_token(i)) for i in prefix]
    begin = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", *(f"{name}:1" for name in names), "$B:1"],
        special_tokens=list(zip(names, prefix, strict=True)),
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = begin if before is None else processors.Sequence([before, begin])
    tokenizer.save(str(folder / "tokenizer.json"))


def _web(folder: Path, exported: Exported) -> dict[str, Any]:
    """web.json, which the page of `../web` reads first."""
    path = folder / exported.model
    if path.with_name(path.name + "_data").is_file() or path.stat().st_size > WEB_BYTES:
        raise SessaError("the model is too large for a page (2 GB); use a smaller `dtype`")
    ids = _token_ids(exported)
    return {
        "model": exported.model,
        "bytes": path.stat().st_size,
        "dtype": exported.dtype,
        "parameters": parameter_count(exported.config),
        "context": exported.config.max_position_embeddings,
        "begin": ids["bos_token_id"],
        "prefix": ModelTokenizer.open(folder, exported.config).prefix_ids,
        "stop": exported.stop,
    }
