"""The kinds of layers: one table for everything that differs from kind to kind."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sessa_common.errors import SessaError

if TYPE_CHECKING:
    from sessa_common.config import SessaConfig

Shapes = dict[str, tuple[int, ...]]

# The weights of each block whose products are added to the residual stream.
RESIDUAL_WEIGHTS = {
    "gated": ("W_out.weight",),
    "standard": ("mixer.out_proj.weight", "mlp.down_proj.weight"),
    "mamba2": ("mixer.out_proj.weight",),
}


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One kind of layer: a mixer inside a block.

    `block` is "gated" (Sessa's: x + W_out(mixer(gelu(a)) * g)), "standard" (the pre-norm block with
    an MLP) or "mamba2". `mixer` is "attention", "sessa" (attention with the feedback solve behind
    it) or "mamba2".
    """

    name: str
    block: str
    mixer: str

    @property
    def attends(self) -> bool:
        """Return True when the mixer begins with attention, which has RoPE and key/value heads."""
        return self.mixer != "mamba2"

    @property
    def feeds_back(self) -> bool:
        """Return True when the layer has a feedback solve."""
        return self.mixer == "sessa"

    @property
    def exports(self) -> bool:
        """Return True when the layer has an ONNX graph."""
        return self.attends

    @property
    def residual_weights(self) -> tuple[str, ...]:
        """The weights, by their names inside the layer, that feed the residual stream."""
        return RESIDUAL_WEIGHTS[self.block]

    def shapes(self, config: SessaConfig) -> Shapes:
        """Name inside the layer and shape of every learned tensor of such a layer."""
        return _attention_shapes(config, self) if self.attends else _mamba2_shapes(config)


KINDS = {
    kind.name: kind
    for kind in (
        LayerKind(name="sessa", block="gated", mixer="sessa"),
        LayerKind(name="gated_attention", block="gated", mixer="attention"),
        LayerKind(name="transformer", block="standard", mixer="attention"),
        LayerKind(name="mamba2", block="mamba2", mixer="mamba2"),
        LayerKind(name="sessa_transformer", block="standard", mixer="sessa"),
    )
}


def infer_kind(tensors: Container[str]) -> LayerKind:
    """The kind of a layer that has these tensors, by their names inside the layer."""
    if "mixer.A_log" in tensors:
        return KINDS["mamba2"]
    block = "standard" if "mlp.up_proj.weight" in tensors else "gated"
    mixer = "sessa" if "mixer.proj_fb.weight" in tensors else "attention"
    return next(kind for kind in KINDS.values() if (kind.block, kind.mixer) == (block, mixer))


def _attention_shapes(config: SessaConfig, kind: LayerKind) -> Shapes:
    D, K = config.hidden_size, config.feedback_key_dim
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    gated = kind.block == "gated"
    # Each linear layer has its weight's shape, and whether it has a bias.
    qkv = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    linears = {f"mixer.{name}": ((rows, D), config.qkv_bias) for name, rows in qkv.items()}
    # Initial weights are drawn in this order: another order would change the model of a seed.
    if gated:
        linears = {"W_in": ((2 * D, D), True), **linears}
    else:
        linears["mixer.out_proj"] = ((D, q), config.out_proj_bias)
    linears |= {"mixer.proj_fb": ((2 * K, D), True)} if kind.feeds_back else {}
    linears |= {"W_out": ((D, D), True)} if gated else _mlp_linears(config)
    layer = _norm_shapes(config, "ln", D)
    for name, (shape, has_bias) in linears.items():
        layer[f"{name}.weight"] = shape
        if has_bias:
            layer[f"{name}.bias"] = shape[:1]
    if gated and config.num_attention_heads > 1:
        layer["mixer.out_proj.weight"] = (D, D)
    if kind.feeds_back:
        layer["mixer.gamma_ctx.weight"], layer["mixer.gamma_bias"] = (1, D), ()
    if config.qk_norm:
        layer["mixer.q_norm.weight"] = layer["mixer.k_norm.weight"] = (config.head_dim,)
    return layer if gated else layer | _norm_shapes(config, "ln_mlp", D)


def _mlp_linears(config: SessaConfig) -> dict[str, tuple[tuple[int, int], bool]]:
    up = (config.intermediate_size, config.hidden_size)
    names = ["up_proj"] if config.mlp_type == "gelu" else ["gate_proj", "up_proj"]
    linears = {f"mlp.{name}": (up, config.mlp_bias) for name in names}
    return {**linears, "mlp.down_proj": (up[::-1], config.mlp_bias)}


def _norm_shapes(config: SessaConfig, name: str, width: int) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (width,)}
    return shapes if config.norm_type == "rms" else {**shapes, f"{name}.bias": (width,)}


def _mamba2_shapes(config: SessaConfig) -> Shapes:
    D, N = config.hidden_size, config.mamba_d_state
    inner = config.mamba_expand * D
    heads, channels = inner // config.mamba_d_head, inner + 2 * N
    return {
        "ln.weight": (D,),
        "mixer.in_proj.weight": (inner + channels + heads, D),
        "mixer.conv1d.weight": (channels, 1, config.mamba_d_conv),
        "mixer.conv1d.bias": (channels,),
        "mixer.dt_bias": (heads,),
        "mixer.A_log": (heads,),
        "mixer.D": (heads,),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (D, inner),
    }


# Before `layer_kinds` a model was spelled by three keys of config.json, with these defaults.
OLD_KEYS: dict[str, Any] = {"mixer": "sessa", "attention_block": "mlp", "feedback": True}
OLD_MIXERS = ("sessa", "attention", "mamba2")


def with_layer_kinds(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json with `layer_kinds` in place of the OLD_KEYS.

    Raises SessaError for a value that an old key could not have, and for both spellings together.
    """
    rest = {name: value for name, value in given.items() if name not in OLD_KEYS}
    if len(rest) == len(given):
        return rest
    if "layer_kinds" in rest:
        old = ", ".join(name for name in OLD_KEYS if name in given)
        raise SessaError(f"{old} is the old spelling of layer_kinds; give layer_kinds alone")
    mixer, block, feedback = ({**OLD_KEYS, **given}[name] for name in OLD_KEYS)
    if block not in ("mlp", "gated"):
        raise SessaError(f"attention_block is {block!r}, expected mlp or gated")
    if not isinstance(feedback, bool):
        raise SessaError(f"feedback is {feedback!r}, expected true or false")
    one = isinstance(mixer, str) or not isinstance(mixer, (list, tuple))
    kinds = tuple(_kind_of_old_keys(name, block, feedback) for name in ([mixer] if one else mixer))
    return {**rest, "layer_kinds": kinds[0] if one else kinds}


def _kind_of_old_keys(mixer: object, block: str, feedback: bool) -> str:
    if mixer not in OLD_MIXERS:
        raise SessaError(f"mixer is {mixer!r}, expected one of {', '.join(OLD_MIXERS)}")
    if mixer == "sessa":
        return "sessa" if feedback else "gated_attention"
    if mixer == "attention":
        return "transformer" if block == "mlp" else "gated_attention"
    return "mamba2"
