"""Architecture of a model: the only place where its defaults are written down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sessa_common.errors import SessaError, expect, is_count, require
from sessa_common.fields import read_fields
from sessa_common.layer_kinds import KINDS, LayerKind, with_layer_kinds
from sessa_common.rope import RopeScaling, rope_scaling, with_rope_scaling

DTYPES = ("float32", "bfloat16", "float16", "float64")
NORM_TYPES = ("layer", "rms")
MLP_TYPES = ("gelu", "swiglu")
# Options of the standard block, with the values by which it is the block of the presets. A
# config.json has those that differ.
BLOCK_OPTIONS: dict[str, Any] = {
    "norm_type": "layer",
    "mlp_type": "gelu",
    "qkv_bias": True,
    "out_proj_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
}
# Far beyond the deepest models; a number above it is a mistake, and lists of its layers would fill
# the memory.
MOST_LAYERS = 4096

# Keys that other tools write into a config.json and that do not change what the model computes.
FOREIGN_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "initializer_range",
        "is_decoder",
        "model_file",
        "quantization",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True, kw_only=True)
class SessaConfig:
    """Architecture of a Sessa language model, under the keys that the ecosystem's config.json uses.

    `layer_kinds` is one name for all layers or a sequence with one name for each layer:
    "sessa"; "gated_attention" (Sessa without the feedback); "transformer" (the standard pre-norm
    block); "mamba2"; "sessa_transformer" (the standard block with feedback behind the attention's
    output projection). `intermediate_size` is the width of the MLP in a standard block. The
    `mamba_*` keys are state size N, width of the convolution, inner width / hidden_size and head
    width P, named as hybrid models in transformers name them.

    The standard block has options, with which it is the block of Llama, Qwen2 or Qwen3: `norm_type`
    "layer" or "rms", also of the final norm; `mlp_type` "gelu" or "swiglu"; `qkv_bias`,
    `out_proj_bias` and `mlp_bias`; `qk_norm`, an RMSNorm of every query and key head before RoPE;
    and a `head_dim` apart from hidden_size / num_attention_heads. `rope_scaling` stretches the
    context. `feedback_key_dim` is the width K of the feedback's queries and keys.

    `num_key_value_heads`, `head_dim`, `intermediate_size` and `feedback_key_dim` of 0 stand for
    `num_attention_heads`, `hidden_size // num_attention_heads`, 4 * `hidden_size` and
    `hidden_size`. Raises SessaError when the numbers cannot make a model.
    """

    model_type: str = "sessa"
    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    layer_kinds: str | tuple[str, ...] = "sessa"
    gamma_max: float = 0.999
    use_forward_rope: bool = True
    intermediate_size: int = 0
    norm_type: str = "layer"
    mlp_type: str = "gelu"
    qkv_bias: bool = True
    out_proj_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    feedback_key_dim: int = 0
    mamba_d_state: int = 64
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_d_head: int = 64

    def __post_init__(self) -> None:
        expect(self.model_type == "sessa", "model_type", self.model_type, "'sessa'")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "mamba_d_state",
            "mamba_d_conv",
            "mamba_expand",
            "mamba_d_head",
        ):
            value = getattr(self, name)
            expect(is_count(value), name, value, "a positive integer")
        expect(
            self.num_hidden_layers <= MOST_LAYERS,
            "num_hidden_layers",
            self.num_hidden_layers,
            f"at most {MOST_LAYERS}",
        )
        switches = ("qkv_bias", "out_proj_bias", "mlp_bias", "qk_norm")
        for name in ("use_forward_rope", "tie_word_embeddings", *switches):
            value = getattr(self, name)
            expect(isinstance(value, bool), name, value, "true or false")
        for name in ("gamma_max", "rope_theta", "layer_norm_eps"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            expect(number, name, value, "a number")
        D, H = self.hidden_size, self.num_attention_heads
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", H)
        if self.head_dim == 0:
            require(D % H == 0, f"num_attention_heads {H} does not divide hidden_size {D}")
            object.__setattr__(self, "head_dim", D // H)
        kv, d = self.num_key_value_heads, self.head_dim
        divides = is_count(kv) and H % kv == 0
        require(divides, f"num_key_value_heads {kv} does not divide num_attention_heads {H}")
        expect(is_count(d), "head_dim", d, "0 or more")
        self._check_layers()
        self._check_options()
        require(
            not (self.rotates and d % 2),
            f"head_dim {d} is odd: RoPE rotates pairs; use an even head_dim "
            "or use_forward_rope=false",
        )
        expect(0 < self.gamma_max < 1, "gamma_max", self.gamma_max, "between 0 and 1")
        for name in ("rope_theta", "layer_norm_eps"):
            value = getattr(self, name)
            expect(0 < value < math.inf, name, value, "above 0 and finite")
        expect(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            fits = value is None or (isinstance(value, int) and 0 <= value < self.vocab_size)
            expect(fits, name, value, f"below vocab_size {self.vocab_size}")

    def _check_layers(self) -> None:
        given, L = self.layer_kinds, self.num_hidden_layers
        names = (given,) if isinstance(given, str) else tuple(given)
        fits = isinstance(given, str) or len(names) == L
        require(fits, f"layer_kinds has {len(names)} names for {L} layers")
        for name in names:
            known = isinstance(name, str) and name in KINDS
            require(known, f"layer_kinds has {name!r}, expected of {', '.join(KINDS)}")
        object.__setattr__(self, "layer_kinds", names[0] if len(set(names)) == 1 else names)
        if self.intermediate_size == 0:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        F = self.intermediate_size
        require(is_count(F), f"intermediate_size is {F!r}, expected 0 or more")
        inner, P = self.mamba_expand * self.hidden_size, self.mamba_d_head
        require(
            KINDS["mamba2"] not in self.kinds or inner % P == 0,
            f"mamba_d_head {P} does not divide the inner width {inner}",
        )

    def _check_options(self) -> None:
        D, H, d = self.hidden_size, self.num_attention_heads, self.head_dim
        for name, known in (("norm_type", NORM_TYPES), ("mlp_type", MLP_TYPES)):
            value = getattr(self, name)
            expect(value in known, name, value, " or ".join(known))
        gated = any(kind.block == "gated" for kind in self.kinds)
        require(
            not gated or d * H == D,
            f"head_dim {d} times {H} heads is not hidden_size {D}; only the kinds transformer and "
            "sessa_transformer take another head_dim",
        )
        for name, usual in BLOCK_OPTIONS.items():
            value = getattr(self, name)
            require(
                not gated or value == usual,
                f"{name} is {value!r}, expected {usual!r} where a layer has Sessa's gated block; "
                "the kinds transformer and sessa_transformer take it",
            )
        if self.feedback_key_dim == 0:
            object.__setattr__(self, "feedback_key_dim", D)
        K = self.feedback_key_dim
        expect(is_count(K), "feedback_key_dim", K, "0 or more")
        scaling = rope_scaling(self.rope_scaling)
        if scaling is not None:
            scaling = scaling.with_context(self.max_position_embeddings)
        object.__setattr__(self, "rope_scaling", scaling)

    @property
    def block_options(self) -> dict[str, Any]:
        """The options that make the blocks differ from those of the presets, by their names.

        A runtime that has its own code for a block reads here whether it has to know more.
        """
        found = {
            name: value
            for name, usual in BLOCK_OPTIONS.items()
            if (value := getattr(self, name)) != usual
        }
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            found["head_dim"] = self.head_dim
        if self.feeds_back and self.feedback_key_dim != self.hidden_size:
            found["feedback_key_dim"] = self.feedback_key_dim
        return found

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        if isinstance(self.layer_kinds, str):
            return (KINDS[self.layer_kinds],) * self.num_hidden_layers
        return tuple(KINDS[name] for name in self.layer_kinds)

    @property
    def rotates(self) -> bool:
        """Return True when any layer applies rotary positions."""
        return self.use_forward_rope and any(kind.attends for kind in self.kinds)

    @property
    def final_norm(self) -> str:
        """ "rms" for a stack of Mamba-2 layers only, as its release has it, else `norm_type`."""
        return self.norm_type if any(kind.attends for kind in self.kinds) else "rms"

    @property
    def feeds_back(self) -> bool:
        """Return True when any layer has a feedback solve."""
        return any(kind.feeds_back for kind in self.kinds)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str = "config") -> SessaConfig:
        """Read the keys of a config.json; an unknown key is an error that names it.

        The keys `mixer`, `attention_block` and `feedback`, by which a model was spelled before
        `layer_kinds`, are translated, and so is `rope_parameters`.
        """
        try:
            given = with_rope_scaling(with_layer_kinds(given))
        except SessaError as error:
            raise SessaError(f"{where}: {error}") from None
        # transformers before version 5 and mlx-lm write the dtype under its older name.
        if "dtype" not in given and isinstance(given.get("torch_dtype"), str):
            given["dtype"] = given["torch_dtype"]
        return read_fields(cls, given, where, FOREIGN_KEYS)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json that this stack reads, and those that only other tools read."""
        keys, blocks = dataclasses.asdict(self), {kind.block for kind in self.kinds}
        if "mamba2" not in blocks:
            keys = {name: value for name, value in keys.items() if not name.startswith("mamba_")}
        if "standard" not in blocks:
            del keys["intermediate_size"]
        for name, usual in BLOCK_OPTIONS.items():
            if keys[name] == usual:
                del keys[name]
        if "feedback_key_dim" not in self.block_options:
            del keys["feedback_key_dim"]
        if (scaling := self.rope_scaling) is None:
            del keys["rope_scaling"]
        else:
            keys["rope_scaling"] = scaling.to_dict()
        return {"architectures": ["SessaForCausalLM"], **keys, "torch_dtype": self.dtype}


def parameter_shapes(config: SessaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every learned tensor, in the order a reader meets them.

    The names inside a Sessa layer are those of the author's release, inside a Mamba-2 layer those
    of state-spaces/mamba; a Linear's weight is (out, in), a convolution's (channels, 1, width).
    """
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i, kind in enumerate(config.kinds):
        layer = kind.shapes(config)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if config.final_norm == "layer":
        shapes["model.norm.bias"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def parameter_count(config: SessaConfig) -> int:
    """The number of learned parameters, a tied embedding counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def check_matched(configs: Mapping[str, SessaConfig], tolerance: float = 0.01) -> None:
    """Raise SessaError unless all models have the parameters of the first, give or take a share.

    configs are models by the names that the message uses.
    """
    counts = {name: parameter_count(config) for name, config in configs.items()}
    first = next(iter(counts.values()), 0)
    if any(abs(count - first) > tolerance * first for count in counts.values()):
        listed = ", ".join(
            f"{name} {count:,} ({count / first - 1:+.2%})" for name, count in counts.items()
        )
        raise SessaError(
            f"these models are not matched: {listed} parameters, expected within "
            f"{100 * tolerance:g}% of the first; take presets of one size, with the same vocabulary"
        )
