"""`sessa influence`: derivatives against dense Jacobians, kernels, fits, bad input, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from support.export_models import MAMBA, lively_weights, small_config, write_checkpoint
from support.frameworks import FRAMEWORKS
from typer.testing import CliRunner

import sessa_common.experiments.influence
import sessa_mlx.influence
import sessa_torch.influence
from sessa_cli.influence import influence
from sessa_common.checkpoint.folder import read_safetensors, write_safetensors
from sessa_common.errors import SessaError
from sessa_common.experiments.influence import (
    EPSILON,
    Curves,
    influence_curves,
    jacobian_norms,
    kernel_slope,
    log_lags,
    position_resolution,
)
from sessa_common.experiments.influence_fit import fit_laws
from sessa_common.experiments.influence_picture import draw_influence
from sessa_common.experiments.influence_report import Measurement, feedback_report

T = 19
# MLX computes normalisations, embeddings and erf of float64 arrays in float32.
RTOL = {"torch": 1e-9, "mlx": 5e-6}
PROBES = {"torch": sessa_torch.influence.InfluenceProbe, "mlx": sessa_mlx.influence.InfluenceProbe}
VARIANTS = ["heads", "attention", "attention_gated", "sessa_transformer", "norope", *MAMBA]
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(influence)
both = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.name)


def tiny(variant="heads", **changes):
    shape = {"hidden_size": 8, "vocab_size": 23, "num_attention_heads": 4}
    shape |= {"mamba_d_head": 4, "mamba_d_state": 3} if variant in MAMBA else {}
    return small_config(variant, **{**shape, "bos_token_id": 0, "eos_token_id": 0, **changes})


def probe_of(framework, config, weights=None, length=T, dtype="float64", seed=0):
    weights = lively_weights(config) if weights is None else weights
    model = framework.checkpoint.build_model(config, weights, dtype=dtype, device="cpu")
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, length)
    return PROBES[framework.name](model, ids)


def dense_norms(probe, first, last):
    """Norms (T, T) of the blocks of the whole Jacobian of layers first to last - 1."""
    backbone, x = probe.backbone, probe.inputs[first]

    def run(x):
        for layer in backbone.layers[first:last]:
            x = layer(x)
        return x

    jacobian = torch.autograd.functional.jacobian(run, x)[0, :, :, 0]  # (T, D, T, D)
    return jacobian.square().sum((1, 3)).sqrt().numpy()


@both
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_norms_are_those_of_the_dense_jacobian(framework, variant):
    config = tiny(variant)
    times = np.array([0, 1, 7, 12, T - 1])
    truth = probe_of(FRAMEWORKS[0], config)
    for first, last in ((0, config.num_hidden_layers), (1, 2)):
        got = jacobian_norms(probe_of(framework, config), times, first, last, draws=0)
        want = dense_norms(truth, first, last)[times]
        rtol = RTOL[framework.name]
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * want.max())


@both
@pytest.mark.parametrize("variant", ["heads", "attention", "mamba2"])
def test_the_future_has_no_influence(framework, variant):
    """One batch holds early and late t, so the zeros are computed, not left out."""
    probe = probe_of(framework, tiny(variant))
    unit = np.eye(8)[:2]
    squares = probe.squared_norms(0, 2, np.array([5, T - 1]), unit)
    assert squares.shape == (2, T)
    assert (squares[0, 6:] == 0).all() and (squares[0, :6] > 0).all()
    assert (squares[1] > 0).all()


@both
def test_small_batches_give_the_same_norms(framework, monkeypatch):
    probe = probe_of(framework, tiny())
    times = np.array([3, 18, 11])
    whole = jacobian_norms(probe, times, 0, 2, draws=3)
    monkeypatch.setattr(sessa_common.experiments.influence, "MAX_FLOATS", 1)
    found = jacobian_norms(probe, times, 0, 2, draws=3)
    # Products of batches of other sizes round differently in float32.
    np.testing.assert_allclose(found, whole, rtol=1e-6)


def test_probes_estimate_the_norm_and_follow_the_seed():
    probe = probe_of(FRAMEWORKS[0], tiny())
    times = np.array([4, 15])
    exact = jacobian_norms(probe, times, 0, 2, draws=0)
    many = jacobian_norms(probe, times, 0, 2, draws=2000)
    # A probe's squared norm varies by at most sqrt(2) of its mean; four deviations of 2000.
    np.testing.assert_allclose(many**2, exact**2, rtol=4 * math.sqrt(2 / 2000))
    few = [jacobian_norms(probe, times, 0, 2, draws=2, seed=seed) for seed in (0, 0, 1)]
    assert (few[0] == few[1]).all() and not np.allclose(few[0], few[2])


@pytest.mark.parametrize("variant", ["heads", "attention", "mamba2"])
def test_twins_agree_in_float32(variant):
    found = [
        influence_curves(
            [probe_of(f, tiny(variant), dtype="float32", length=40, seed=seed) for seed in (0, 1)],
            [0, 9],
            0,
            2,
            draws=2,
        )
        for f in FRAMEWORKS
    ]
    assert found[0].values.shape == (4, len(log_lags(31)))
    np.testing.assert_allclose(found[0].values, found[1].values, rtol=2e-4)


def test_curves_read_the_jacobian_at_tau_plus_lag():
    probe = probe_of(FRAMEWORKS[0], tiny())
    curves = influence_curves([probe], [2, 6], 0, 2, draws=0)
    dense = dense_norms(probe, 0, 2)
    assert curves.lags[-1] == T - 1 - 6
    for tau, row in zip([2, 6], curves.values, strict=True):
        for lag, value in zip(curves.lags, row, strict=True):
            assert value == pytest.approx(dense[tau + lag, tau], rel=1e-9)


def routing(config, ids):
    """Gains (T,), feedback weights (T, T) and K of layer 0, dense in NumPy float64."""
    w = {n: v.astype(np.float64) for n, v in lively_weights(config).items()}
    layer = {n.removeprefix("model.layers.0."): v for n, v in w.items()}
    x = w["model.embed_tokens.weight"][ids]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_eps)
    a = x * layer["ln.weight"] + layer["ln.bias"]
    if "W_in.weight" in layer:
        a = (a @ layer["W_in.weight"].T + layer["W_in.bias"])[:, : config.hidden_size]
        a = a * (1 + np.vectorize(math.erf)(a / math.sqrt(2))) / 2
    q, k = np.split(a @ layer["mixer.proj_fb.weight"].T + layer["mixer.proj_fb.bias"], 2, -1)
    logits = a @ layer["mixer.gamma_ctx.weight"][0] + layer["mixer.gamma_bias"]
    alpha = np.tril(np.exp(q @ k.T / math.sqrt(config.hidden_size)), -1)
    alpha /= np.maximum(alpha.sum(-1, keepdims=True), 1e-300)
    gamma = config.gamma_max * np.tanh(logits)
    return gamma, alpha, np.linalg.inv(np.eye(len(ids)) - gamma[:, None] * alpha)


@both
@pytest.mark.parametrize("variant", ["heads", "sessa_transformer"])
def test_kernel_is_the_inverse_of_the_dense_matrix(framework, variant):
    config = tiny(variant)
    probe = probe_of(framework, config)
    gamma, alpha, K = routing(config, np.random.default_rng(0).integers(0, config.vocab_size, T))
    gains, peak, columns = probe.feedback(0, [0, 3, 11])
    rtol = RTOL[framework.name]
    np.testing.assert_allclose(gains, gamma, rtol=rtol)
    np.testing.assert_allclose(peak, alpha.max(-1), rtol=rtol)
    np.testing.assert_allclose(columns, K[:, [0, 3, 11]], rtol=rtol, atol=rtol)
    report = feedback_report([probe], 0, [0, 3], log_lags(T - 3))
    c2 = max(t * alpha[t].max() for t in range(1, T))
    assert report["c2"] == pytest.approx(c2, rel=rtol)
    assert report["eta"] == pytest.approx(c2 * np.abs(gamma).max(), rel=rtol)
    bound = 1 / (1 - np.abs(gamma).max())
    assert report["gain_bound"] == pytest.approx(bound, rel=1e3 * rtol)


@both
def test_uniform_routing_has_the_theorems_slope(framework):
    """Zero feedback queries and a constant gain: c2 = 1, and log K falls by -(1 - gamma)."""
    config = tiny(num_hidden_layers=1)
    weights = lively_weights(config)
    for part in ("weight", "bias"):
        weights[f"model.layers.0.mixer.proj_fb.{part}"][: config.hidden_size] = 0
    weights["model.layers.0.mixer.gamma_ctx.weight"][:] = 0
    probe = probe_of(framework, config, weights, length=300)
    report = feedback_report([probe], 0, [0, 3, 50], log_lags(250))
    gamma = report["gamma"]["mean"]
    assert report["gamma"]["min"] == pytest.approx(report["gamma"]["max"]) and 0 < gamma < 1
    np.testing.assert_allclose(report["slopes"], -(1 - gamma), atol=1e-3)
    assert report["c2"] == pytest.approx(1) and report["theorem_8"]


@both
def test_decay_is_what_the_recurrence_forgets(framework):
    config = tiny("mamba2")
    weights = lively_weights(config)
    decay = probe_of(framework, config, weights).decay(0)
    w = {n.removeprefix("model.layers.0."): v.astype(float) for n, v in weights.items()}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, T)
    x = w["model.embed_tokens.weight"][ids]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps) * w["ln.weight"]
    heads = len(w["mixer.A_log"])
    dt = np.log1p(np.exp(x @ w["mixer.in_proj.weight"][-heads:].T + w["mixer.dt_bias"]))
    np.testing.assert_allclose(decay, np.exp(w["mixer.A_log"]) * dt, rtol=RTOL[framework.name])


def planted(law, rate, noise=0.2, curves=5, T=2000):
    lags = log_lags(T)
    x = {"power law": np.log(np.maximum(lags, 1)), "exponential": lags}[law]
    rng = np.random.default_rng(3)
    scale = rng.normal(0, 1, (curves, 1))
    return Curves(
        lags=lags, values=np.exp(scale - rate * x + rng.normal(0, noise, (curves, len(x))))
    )


@pytest.mark.parametrize(
    "law, rate, best",
    [
        ("power law", 0.4, "power law"),
        ("power law", 1.0, "1/lag"),
        ("power law", 1.6, "power law"),
        ("exponential", 0.003, "exponential"),
        ("exponential", 0.3, "exponential"),
    ],
)
def test_a_planted_law_is_found_and_significant(law, rate, best):
    fit = fit_laws(planted(law, rate))
    assert fit.best == best and fit.is_significant, fit.describe()
    found = fit.fits[law]
    assert found.low <= rate <= found.high
    assert found.rate == pytest.approx(rate, rel=0.1)
    assert fit.describe().endswith("of resamples")


@pytest.mark.parametrize("noise", [0.02, 0.3, 1.5])
def test_a_flat_curve_has_no_significant_law(noise):
    fit = fit_laws(planted("power law", 0.0, noise))
    assert not fit.is_significant and fit.describe().startswith("not significant")


def test_rounding_noise_is_left_out_and_counted():
    """Below the floor an exponential would seem to end in a plateau."""
    clean = planted("exponential", 0.1, noise=0)
    peak = clean.values.max(1, keepdims=True)
    lost = clean.values < EPSILON * peak
    dirty = Curves(lags=clean.lags, values=np.maximum(clean.values, 0.9 * EPSILON * peak))
    assert dirty.below_floor == lost.sum() > 0
    fit = fit_laws(dirty)
    assert fit.best == "exponential" and fit.fits["exponential"].rate == pytest.approx(0.1)


def test_too_few_points_are_said_to_be_too_few():
    lags = np.arange(7)
    fit = fit_laws(Curves(lags=lags, values=np.ones((3, 7))))
    assert fit.describe() == "too few points" and not fit.is_significant


def test_positions_that_each_dtype_tells_apart():
    """The numbers of the paper's gain at initialisation; a gain below 0 makes no code."""
    found = position_resolution(0.999 * math.tanh(1))
    assert found["bfloat16"] == 15 and found["float16"] == 71 and found["float32"] > 4095
    assert set(position_resolution(-0.5).values()) == {None}


def test_a_kernel_that_is_soon_zero_has_no_slope():
    assert kernel_slope(np.eye(1, 40)[0], 0, 0.5) is None


def test_picture_holds_each_checkpoint_and_its_fit(tmp_path):
    drawn = []
    for name, law in (("a", "power law"), ("b", "exponential")):
        curves = planted(law, 0.5)
        fit = fit_laws(curves)
        drawn.append(
            Measurement(
                name=name,
                mixer="sessa",
                report={},
                curves=curves,
                selection=fit,
                layers={0: fit},
            )
        )
    assert draw_influence(tmp_path / "p.png", drawn)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("influence")
    shape = {"hidden_size": 8, "max_position_embeddings": 64}
    return {
        name: write_checkpoint(root / name, small_config(name, **shape, **more))[0]
        for name, more in (("heads", {}), ("mamba2_hybrid", {"mamba_d_head": 4}))
    }


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("backend", PROBES)
def test_command_writes_picture_and_numbers(folders, backend, tmp_path):
    out = run(
        *folders.values(),
        "--backend",
        backend,
        "--device",
        "cpu",
        "--probes",
        1,
        "--text",
        "a quick brown fox jumps over",
        "--text",
        "the lazy dog lies in the sun",
        "--tau",
        "0,5",
        "--out",
        tmp_path / "p.png",
    )
    assert (tmp_path / "p.png").stat().st_size > 10_000
    answer = json.loads((tmp_path / "p.json").read_text())
    first, second = answer["checkpoints"]
    assert (first["name"], first["mixer"], first["tokens"]) == ("heads", "sessa", [28, 28])
    assert first["tau"] == [0, 5] and len(first["end_to_end"]["values"]) == 4
    assert [one["mixer"] for one in second["layers"]] == ["transformer", "mamba2", "sessa"]
    assert all("feedback" in one for one in first["layers"])
    assert ["memory" in one for one in second["layers"]] == [False, True, False]
    for words in ("heads", "mamba2_hybrid", "η<1", "bfloat16", "freeze time", "R²"):
        assert words in out


def test_command_is_deterministic_and_prints_json(folders, tmp_path):
    command = (
        folders["heads"],
        "--json",
        "--tokens",
        20,
        "--layer",
        1,
        "--out",
        tmp_path / "p.png",
    )
    first, second = json.loads(run(*command)), json.loads(run(*command))
    assert first == second and [x["layer"] for x in first["checkpoints"][0]["layers"]] == [1]
    assert first != json.loads(run(*command, "--seed", 1))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tau", "13"], "from 0 to 12"),
        (["--tau", "-1"], "from 0 to 12"),
        (["--tau", "a,b"], "expected positions"),
        (["--layer", "2"], "0 to 1"),
        (["--layer", "first"], "all, none or"),
        (["--tokens", "8"], "at least 16"),
        (["--tokens", "65"], "context of 64"),
        (["--tokens", "20", "--text", "both"], "not both"),
        (["--length", "21"], "less than .*length.* 21"),
        (["--device", "tpu"], "tpu"),
        (["--backend", "jax"], "jax"),
        (["--out", "p.pdf"], r"\.png"),
        (["--out", "nowhere/p.png"], "no folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(folders, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sessa_cli.influence.measure", lambda *_, **__: pytest.fail("work was started")
    )
    given = arguments if {"--tokens", "--text"} & {*arguments} else [*arguments, "--tokens", "20"]
    with pytest.raises(SessaError, match=words):
        run(folders["heads"], *given)
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_checkpoint_or_has_no_tokenizer_is_refused(folders, tmp_path):
    with pytest.raises(SessaError, match="no such checkpoint folder"):
        run(folders["heads"], tmp_path / "none", "--out", tmp_path / "p.png")
    (tmp_path / "config.json").write_bytes((folders["heads"] / "config.json").read_bytes())
    with pytest.raises(SessaError, match=r"random `?tokens|--tokens"):
        run(tmp_path, "--text", "words", "--out", tmp_path / "p.png")


def test_the_numbers_replace_no_file_of_another_kind(folders, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(SessaError, match="is another file"):
        run(folders["heads"], "--tokens", "20", "--out", tmp_path / "config.png")
    assert json.loads((tmp_path / "config.json").read_text()) == {"hidden_size": 8}


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_weights_that_carry_nothing_and_weights_that_overflow(tmp_path, factor):
    config = small_config("heads", hidden_size=8, max_position_embeddings=64)
    folder = write_checkpoint(tmp_path / "silent", config)[0]
    (file,) = folder.glob("*.safetensors")
    arrays = read_safetensors(file)
    changed = {n: x * np.float32(factor if "W_out" in n else 1) for n, x in arrays.items()}
    assert sum("W_out" in name for name in arrays) == 2 * config.num_hidden_layers
    write_safetensors(file, changed, {"format": "pt"})
    arguments = (folder, "--tokens", "40", "--probes", "1", "--out", tmp_path / "p.png")
    if factor:
        with pytest.raises(SessaError, match="not finite"):
            run(*arguments)
        assert not (tmp_path / "p.json").exists()
    else:
        run(*arguments)
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
