"""Selective retrieval (Theorem 12 of arXiv 2604.18580) by Sessa layers with weights set by hand.

One position tau* is marked. S(t, tau) is the derivative of the output at t by the value at tau, and
the margin is M(t) = S(t, tau*) - sum of |S(t, tau)| over the other tau. The theorem asks for
M(tau* + l) >= c (1 + l)^nu with nu = k (1 - beta) - 1 and c independent of the horizon H: memory
fades for nu < 0, is frozen for nu = 0 and grows for nu > 0.

Every layer is the project's own SessaLayer in float64 with LayerNorm replaced by the identity. GELU
cancels exactly because gelu(x) - gelu(-x) = x. There are 3 + 2k layers, the same for every H:

- writer: f = 1 under uniform feedback gives the increasing code of Lemma 4.10. A key that is a
  large multiple of it makes attention read the newest visible row: forward attention the row
  itself, the strict feedback the row before.
- counter: feedback from the row before at gain 0.999 makes P = 1 + 0.999 + ..., about t + 1.
- selector: Z = mark * value, the mark through the mixer and the value through the gate.
- k times: amplify, Y = P * Z; diffuse, Z = K Y with uniform feedback at gain 1 - beta.

As (tau + 1)(1 + l) >= t + 1, K[t, tau] (tau + 1) is at least c (1 + l)^-beta for every tau, so k of
them keep at least their convolution, (1 + l)^nu; no other value passes the selector. P falls short
of t + 1 by 12% at 256 positions, where the gain's limit of 0.999 ends the construction.

This is not the paper's own network. A network of 11 + 2k layers is reported to give 4.77 / 4.80 /
4.81 at H = 32 / 64 / 120 for beta = 0.5, k = 2; its weights and scales are not known here. c scales
with the output, so constants of different networks cannot be compared and none is fitted to those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_torch.mixer import SessaMixer
from sessa_torch.model import SessaLayer

MARK, VALUE, CODE, COUNT, CARRIED, AMPLIFIED = range(6)  # channels of the residual stream
POSITIONS = 256
WRITER_BIAS = 1.0  # the gain at initialisation, 0.999 tanh(1)
SHARPNESS = 40.0  # logit gap of neighbouring rows: a leak below exp(-40)
CONFIG = SessaConfig(
    hidden_size=6, num_attention_heads=1, use_forward_rope=False, dtype="float64", vocab_size=1
)


def blank_layer(gain: float = 0.0) -> SessaLayer:
    """A layer of zero weights and of constant gain, so uniform attention, that adds nothing."""
    layer = SessaLayer(CONFIG).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.zero_()
    layer.register_module("ln", nn.Identity())
    feedback(layer).gamma_bias.fill_(math.atanh(min(gain / CONFIG.gamma_max, 1 - 1e-16)))
    return layer


def feedback(layer: SessaLayer) -> SessaMixer:
    """The mixer of a layer with feedback."""
    assert isinstance(layer.mixer, SessaMixer)
    return layer.mixer


def key_scale() -> float:
    """The factor of the code that makes neighbours differ by SHARPNESS at the last position."""
    gain, t = CONFIG.gamma_max * math.tanh(WRITER_BIAS), POSITIONS - 1
    # The gap c_t - c_{t-1} of Lemma 4.10 is gain^2 Gamma(t - 1 + gain) / (Gamma(1 + gain) t!).
    log_gap = math.lgamma(t - 1 + gain) - math.lgamma(1 + gain) - math.lgamma(t + 1)
    return SHARPNESS / (gain**2 * math.exp(log_gap))


def feed(layer: SessaLayer, row: int, channel: int) -> None:
    """Set rows `row` and `row` + 1 of the mixer's input to gelu(x) and gelu(-x) of a channel."""
    layer.W_in.weight[row, channel] = 1
    layer.W_in.weight[row + 1, channel] = -1


def read_itself(layer: SessaLayer, channel: int) -> None:
    """Set mixer column 0 to the channel at the row itself."""
    feed(layer, 0, CODE)
    feed(layer, 2, channel)
    layer.mixer.q_proj.bias[0] = CONFIG.hidden_size**0.5
    layer.mixer.k_proj.weight[0, :2] = torch.tensor([1.0, -1.0]) * key_scale()
    layer.mixer.v_proj.weight[0, 2:4] = torch.tensor([1.0, -1.0])


def write(layer: SessaLayer, column: int, channel: int, gate: int | None, sign: float = 1) -> None:
    """Add sign * mixer column * gate to a channel; the gate is a channel or, when None, 1."""
    if gate is None:
        layer.W_in.bias[CONFIG.hidden_size + column] = 1
    else:
        layer.W_in.weight[CONFIG.hidden_size + column, gate] = 1
    layer.W_out.weight[channel, column] = sign


def clear(layer: SessaLayer, column: int, channel: int) -> None:
    """Subtract a channel from itself. The gain must be 0, so that the mixer keeps a 1."""
    layer.mixer.v_proj.bias[column] = 1
    write(layer, column, channel, gate=channel, sign=-1)


def writer() -> SessaLayer:
    """CODE = (I - N)^-1 1 under uniform feedback."""
    layer = blank_layer(CONFIG.gamma_max * math.tanh(WRITER_BIAS))
    layer.mixer.v_proj.bias[0] = 1
    write(layer, 0, CODE, gate=None)
    return layer


def counter() -> SessaLayer:
    """COUNT_t = 1 + gamma_max COUNT_{t-1}."""
    layer = blank_layer(CONFIG.gamma_max)
    D = CONFIG.hidden_size
    feed(layer, 0, CODE)
    layer.mixer.v_proj.bias[0] = 1
    feedback(layer).proj_fb.bias[0] = D**0.5
    feedback(layer).proj_fb.weight[D, :2] = torch.tensor([1.0, -1.0]) * key_scale()
    write(layer, 0, COUNT, gate=None)
    return layer


def selector() -> SessaLayer:
    """CARRIED = MARK * VALUE."""
    layer = blank_layer()
    read_itself(layer, MARK)
    write(layer, 0, CARRIED, gate=VALUE)
    return layer


def amplify() -> SessaLayer:
    """AMPLIFIED = COUNT * CARRIED, and CARRIED is emptied."""
    layer = blank_layer()
    read_itself(layer, COUNT)
    write(layer, 0, AMPLIFIED, gate=CARRIED)
    clear(layer, 1, AMPLIFIED)
    clear(layer, 2, CARRIED)
    return layer


def diffuse(beta: float) -> SessaLayer:
    """CARRIED = (I - N)^-1 AMPLIFIED under uniform feedback at gain 1 - beta."""
    layer = blank_layer(1 - beta)
    read_itself(layer, AMPLIFIED)
    write(layer, 0, CARRIED, gate=None)
    return layer


def network(beta: float, k: int) -> nn.Sequential:
    """Build the 3 + 2k layers; SessaError unless 1 - gamma_max <= beta < 1 and k >= 1."""
    if not 1 - CONFIG.gamma_max <= beta < 1 or k < 1:
        raise SessaError(f"beta {beta}, k {k}: expected 0.001 <= beta < 1 and k of at least 1")
    macro = [layer for _ in range(k) for layer in (amplify(), diffuse(beta))]
    return nn.Sequential(writer(), counter(), selector(), *macro)


def influence(layers: nn.Module, tau: int, T: int, seed: int = 0) -> Tensor:
    """Compute S (T, T), the derivative of the output at t by each value, with tau marked.

    A SessaError when tau is not one of T positions or T is beyond what the layers are made for.
    """
    if not 0 <= tau < T <= POSITIONS:
        raise SessaError(f"tau {tau}, T {T}: expected 0 <= tau < T <= {POSITIONS}")
    x = torch.zeros(1, T, CONFIG.hidden_size, dtype=torch.float64)
    x[0, tau, MARK] = 1
    generator = torch.Generator().manual_seed(seed)
    x[0, :, VALUE] = torch.randn(T, generator=generator, dtype=torch.float64)
    # One copy of the sequence for each output position, so that one backward pass gives all rows.
    x = x.repeat(T, 1, 1).requires_grad_()
    outputs = layers(x)[..., CARRIED].diagonal()
    (gradient,) = torch.autograd.grad(outputs.sum(), x)
    return gradient[..., VALUE]


def margins(S: Tensor, tau: int) -> Tensor:
    """M(tau + l) for l = 0 ... T - 1 - tau."""
    wanted = S[tau:, tau]
    return wanted - (S[tau:].abs().sum(1) - wanted.abs())


def smallest_ratios(beta: float, k: int, tau: int, horizons: tuple[int, ...]) -> list[float]:
    """Compute the least M(tau + l) / (1 + l)^nu over lags 0 ... H, for each horizon H.

    The network is causal and the same for all, so the longest run holds the shorter ones.
    """
    H = max(horizons)
    M = margins(influence(network(beta, k), tau, tau + H + 1), tau)
    ratios = M / torch.arange(1, H + 2, dtype=torch.float64) ** (k * (1 - beta) - 1)
    return [float(ratios[: h + 1].min()) for h in horizons]


def main() -> None:
    """Print the least ratio for marks early and late and for horizons up to 120."""
    torch.set_num_threads(1)
    taus, horizons = (0, 8, 40), (32, 64, 120)
    heads = "".join(f"{f'tau* = {tau}':>12}" for tau in taus)
    print("least M(tau* + l) / (1 + l)^nu over l = 0 ... H")
    print(f"{'beta':>6}{'k':>4}{'nu':>7}{'H':>6}{heads}")
    for beta, k in ((0.5, 1), (0.5, 2), (0.3, 2)):
        columns = [smallest_ratios(beta, k, tau, horizons) for tau in taus]
        for H, *found in zip(horizons, *columns, strict=True):
            numbers = "".join(f"{ratio:12.4f}" for ratio in found)
            print(f"{beta:6.1f}{k:4d}{k * (1 - beta) - 1:7.2f}{H:6d}{numbers}")


if __name__ == "__main__":
    main()
