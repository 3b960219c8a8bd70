"""The two models that the MLX benchmarks compare: sessa-131m and mlx-lm's own Llama of its size."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import types
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.presets import PRESETS
from sessa_mlx.checkpoint import build_model

GIB = 2**30
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Choices of the command line; `layers` 0 is the depth of the preset."""

    small: bool = False
    layers: int = 0
    lengths: tuple[int, ...] = (2048, 8192)
    depths: tuple[int, ...] = (512, 8192)
    bits: tuple[int, ...] = (16, 4)


def sessa_config(choice: Choice) -> SessaConfig:
    """sessa-131m with the vocabulary and the context of the comparison."""
    layers = {"num_hidden_layers": choice.layers} if choice.layers else {}
    if choice.small:
        return SessaConfig(vocab_size=300, hidden_size=64, max_position_embeddings=10_000, **layers)
    return dataclasses.replace(
        PRESETS["sessa-131m"], vocab_size=32_768, max_position_embeddings=10_000, **layers
    )


def llama_modules() -> tuple[Any, Any]:
    """mlx_lm.models.llama and mlx_lm.models.cache, without what mlx_lm imports at its top."""
    if "mlx_lm" not in sys.modules:
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None:
            raise SystemExit("this needs mlx-lm")
        package = types.ModuleType("mlx_lm")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mlx_lm"] = package
    return tuple(importlib.import_module(f"mlx_lm.models.{name}") for name in ("llama", "cache"))


def llama(choice: Choice) -> nn.Module:
    """A Llama in bfloat16 with as many parameters as Sessa."""
    config, module = sessa_config(choice), next(iter(llama_modules()))
    arguments = module.ModelArgs(
        model_type="llama",
        hidden_size=config.hidden_size,
        # Three quarters of Sessa's layers have as many parameters.
        num_hidden_layers=-(-3 * config.num_hidden_layers // 4),
        intermediate_size=-(-8 * config.hidden_size // 3 // 64) * 64,
        num_attention_heads=config.num_attention_heads,
        rms_norm_eps=1e-5,
        vocab_size=config.vocab_size,
    )
    model = module.Model(arguments)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def sessa(choice: Choice) -> nn.Module:
    config = sessa_config(choice)
    return build_model(config, initial_weights(config, 0), dtype="bfloat16")


def quantize(model: nn.Module) -> None:
    """Pack what `sessa convert --quantize 4` packs."""
    nn.quantize(
        model,
        64,
        4,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and "gamma_ctx" not in path,
    )
    mx.eval(model.parameters())


def count(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))
