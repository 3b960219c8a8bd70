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
    D, F = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    gated = kind.block == "gated"
    linears = {"mixer.q_proj": (D, D), "mixer.k_proj": (kv, D), "mixer.v_proj": (kv, D)}
    # Initial weights are drawn in this order: another order would change the model of a seed.
    linears = {"W_in": (2 * D, D), **linears} if gated else {**linears, "mixer.out_proj": (D, D)}
    linears |= {"mixer.proj_fb": (2 * D, D)} if kind.feeds_back else {}
    linears |= {"W_out": (D, D)} if gated else {"mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    layer: Shapes = {"ln.weight": (D,), "ln.bias": (D,)}
    for name, shape in linears.items():
        layer[f"{name}.weight"], layer[f"{name}.bias"] = shape, shape[:1]
    if gated and config.num_attention_heads > 1:
        layer["mixer.out_proj.weight"] = (D, D)
    if kind.feeds_back:
        layer["mixer.gamma_ctx.weight"], layer["mixer.gamma_bias"] = (1, D), ()
    if not gated:
        layer["ln_mlp.weight"], layer["ln_mlp.bias"] = (D,), (D,)
    return layer


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
