"""Models with a name, among them matched sets of one size with layers of every kind."""

from __future__ import annotations

from typing import Any

from sessa_common.config import SessaConfig


def _sizes(
    name: str,
    D: int,
    H: int,
    sessa: int,
    transformer: int,
    deep: tuple[int, int],
    mamba2: tuple[int, int, int],
) -> dict[str, SessaConfig]:
    """The models of one size, from the layers of each kind.

    `deep` has the layers and the MLP width of a Transformer as deep as Sessa, `mamba2` the layers,
    head width P and state size N of Mamba-2.
    """

    def config(kind: str, layers: int, **rest: Any) -> SessaConfig:
        return SessaConfig(
            hidden_size=D, num_attention_heads=H, num_hidden_layers=layers, layer_kinds=kind, **rest
        )

    L, P, N = mamba2
    return {
        f"sessa-{name}": config("sessa", sessa),
        f"transformer-{name}": config("transformer", transformer),
        f"transformer-{name}-deep": config("transformer", deep[0], intermediate_size=deep[1]),
        f"mamba2-{name}": config("mamba2", L, mamba_d_head=P, mamba_d_state=N),
        # The feedback projection has as many weights as a quarter of the MLP.
        f"sessa_transformer-{name}": config(
            "sessa_transformer", transformer, intermediate_size=3 * D
        ),
    }


# "demo" is what `sessa train` trains when no model is named. The models of one size differ by less
# than 1 % in parameters; "-deep" has Sessa's number of layers and a narrower MLP.
PRESETS: dict[str, SessaConfig] = {
    "demo": SessaConfig(vocab_size=2048, max_position_embeddings=256),
    **_sizes("400k", 64, 4, 4, 3, (4, 160), (5, 32, 32)),
    **_sizes("1m", 128, 4, 4, 3, (4, 320), (5, 16, 64)),
    **_sizes("9m", 320, 5, 8, 6, (8, 800), (11, 16, 64)),
    **_sizes("10m", 256, 4, 16, 12, (16, 640), (22, 64, 64)),
    **_sizes("30m", 512, 8, 12, 9, (12, 1280), (17, 32, 64)),
    **_sizes("131m", 768, 12, 24, 18, (24, 1920), (35, 64, 64)),
    **_sizes("1b", 2048, 16, 28, 21, (28, 5120), (41, 64, 128)),
    **_sizes("3b", 2560, 20, 48, 36, (48, 6400), (70, 64, 128)),
}
