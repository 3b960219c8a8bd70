"""Backends against the definition and each other; resumed runs against unbroken ones."""

import dataclasses
import importlib
import json
import math
import signal
from itertools import pairwise

import numpy as np
import pytest
from support.trainers import open_trainer

from sessa_common.checkpoint.folder import load_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.run_files import STATE, TRAINING
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.data.batches import Batch
from sessa_common.data.corpus import TextBatches, pack
from sessa_common.data.encoding import encode_texts
from sessa_common.data.sources import read_documents
from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.evaluation import token_losses
from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import learning_rate
from sessa_common.training.metrics import read_metrics

FRAMEWORKS = ("torch", "mlx")
CONFIG = SessaConfig(
    vocab_size=257,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=40,
)
SETTINGS = TrainConfig(
    steps=12,
    batch_size=3,
    sequence_length=37,
    gradient_accumulation_steps=2,
    learning_rate=5e-3,
    warmup_steps=4,
    evaluate_every=4,
    evaluate_batches=2,
    checkpoint_every=5,
    seed=3,
)


@pytest.fixture(scope="module")
def tokens():
    texts = list(read_documents(["pydoc"]))[:12]
    return pack(encode_texts(byte_tokenizer(), texts), 256, 0)


def make_backend(framework, settings=SETTINGS, config=CONFIG):
    module = importlib.import_module(f"sessa_{framework}.training")
    return module.TrainBackend(config, settings, initial_weights(config, 7), device="cpu")


def make_trainer(framework, folder, tokens, settings=SETTINGS, config=CONFIG, backend=None):
    """A trainer of a new run, or of the one that the folder holds."""
    backend = backend or make_backend(framework, settings, config)
    return open_trainer(folder, backend, TextBatches(tokens, config, settings), config, settings)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert np.array_equal(left[name], right[name]), name


def without_times(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder)]


def test_fifty_steps_agree_between_the_frameworks(tokens):
    settings = dataclasses.replace(SETTINGS, steps=50, warmup_steps=10)
    source = TextBatches(tokens, CONFIG, settings)
    losses = {}
    for framework in FRAMEWORKS:
        backend = make_backend(framework, settings)
        losses[framework] = [
            backend.step([source.batch(2 * i), source.batch(2 * i + 1)], rate)
            for i in range(50)
            for rate in [learning_rate(settings, i)]
        ]
    ours, theirs = (np.array(losses[name]) for name in FRAMEWORKS)
    assert abs(ours[:, 0] - theirs[:, 0]).max() < 1e-3
    np.testing.assert_allclose(ours[:10, 1], theirs[:10, 1], rtol=1e-3)
    assert ours[-1, 0] < ours[0, 0] - 1.5


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("stop", [3, 8], ids=lambda step: f"stop{step}")
def test_stopped_and_resumed_is_the_unbroken_run(framework, stop, tokens, tmp_path):
    whole = make_trainer(framework, tmp_path / "whole", tokens)
    assert whole.train()
    assert not make_trainer(framework, tmp_path / "parts", tokens).train(until=stop)
    resumed = make_trainer(framework, tmp_path / "parts", tokens)
    assert resumed.step == stop
    assert resumed.train()
    assert_same(whole.backend.state(), resumed.backend.state())
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")
    files = [STATE, "model.safetensors"]
    for file in files:
        left, right = (tmp_path / name / file for name in ("whole", "parts"))
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_interrupt_saves_after_the_step_under_way(framework, tokens, tmp_path):
    whole = make_trainer(framework, tmp_path / "whole", tokens)
    whole.train()
    broken = make_trainer(framework, tmp_path / "parts", tokens)
    step = broken.backend.step

    def interrupted(batches, rate):
        if broken.step == 6:
            signal.raise_signal(signal.SIGINT)
        return step(batches, rate)

    broken.backend.step = interrupted
    before = signal.getsignal(signal.SIGINT)
    assert not broken.train()
    assert signal.getsignal(signal.SIGINT) is before
    resumed = make_trainer(framework, tmp_path / "parts", tokens)
    assert resumed.step == 7
    resumed.train()
    assert_same(whole.backend.state(), resumed.backend.state())


def test_a_run_killed_before_its_first_interval_can_be_resumed(tokens, tmp_path):
    make_trainer("torch", tmp_path / "whole", tokens).train()
    make_trainer("torch", tmp_path / "parts", tokens)
    other = dataclasses.replace(SETTINGS, seed=99)
    backend = make_backend("torch", other)
    backend.step([TextBatches(tokens, CONFIG, SETTINGS).batch(0)], 0.1)
    make_trainer("torch", tmp_path / "parts", tokens, backend=backend).train()
    left, right = ((tmp_path / name / STATE).read_bytes() for name in ("whole", "parts"))
    assert left == right


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_interrupt_ends_at_once(tokens, tmp_path, interruptible):
    broken = make_trainer("torch", tmp_path / "run", tokens)

    def interrupted(batches, rate):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    broken.backend.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.train()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_killed_run_resumes_from_its_last_save(framework, tokens, tmp_path):
    whole = make_trainer(framework, tmp_path / "whole", tokens)
    whole.train()
    killed = make_trainer(framework, tmp_path / "parts", tokens)
    step = killed.backend.step

    def dies(batches, rate):
        if killed.step == 7:
            raise RuntimeError("killed")
        return step(batches, rate)

    killed.backend.step = dies
    with pytest.raises(RuntimeError):
        killed.train()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    resumed = make_trainer(framework, tmp_path / "parts", tokens)
    assert resumed.step == 5
    resumed.train()
    assert_same(whole.backend.state(), resumed.backend.state())
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


@pytest.mark.parametrize(("first", "second"), [FRAMEWORKS, FRAMEWORKS[::-1]])
def test_a_run_goes_on_in_the_other_framework(first, second, tokens, tmp_path):
    make_trainer(first, tmp_path / "whole", tokens).train()
    make_trainer(first, tmp_path / "parts", tokens).train(until=6)
    make_trainer(second, tmp_path / "parts", tokens).train()
    whole, parts = (
        [r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r]
        for name in ("whole", "parts")
    )
    assert whole[:6] == parts[:6]
    np.testing.assert_allclose(whole, parts, atol=1e-3)


def test_the_folder_has_weights_metrics_and_picture(tokens, tmp_path):
    trainer = make_trainer("torch", tmp_path / "run", tokens)
    trainer.train()
    config, weights = load_weights(tmp_path / "run")
    assert config == CONFIG
    assert_same(weights, trainer.backend.weights())
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    checks = [r for r in records if "validation_loss" in r]
    assert [r["step"] for r in checks] == [4, 8, 12]
    assert checks[-1]["validation_perplexity"] == math.exp(checks[-1]["validation_loss"])
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "run" / TRAINING).read_text())
    assert TrainConfig.from_dict(saved) == SETTINGS
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_save_that_fails_leaves_the_older_state_whole(tokens, tmp_path, monkeypatch):
    trainer = make_trainer("torch", tmp_path / "run", tokens)
    trainer.train(until=2)
    before = (tmp_path / "run" / STATE).read_bytes()

    def full_disk(file, *_):
        file.write(b"half")
        raise OSError(28, "no space left")

    monkeypatch.setattr("sessa_common.checkpoint.folder.write_tensors", full_disk)
    with pytest.raises(SessaError, match="cannot be written"):
        trainer.train(until=4)
    assert (tmp_path / "run" / STATE).read_bytes() == before


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_adamw_step_is_the_definition(framework, tokens):
    settings = dataclasses.replace(
        SETTINGS,
        max_grad_norm=0.05,
        weight_decay=0.3,
        adam_eps=1e-4,
        layer_rate_decay=0.5,
        feedback_rate=3.0,
    )
    # Of the two layers the first learns half as fast as the last, and the embedding half of that.
    rates = {"model.embed_tokens": 0.005, "model.layers.0": 0.01}
    backend = make_backend(framework, settings)
    source = TextBatches(tokens, CONFIG, settings)
    start, highest, steps = backend.state(), 0.02, 2
    for i in range(steps):
        before = backend.state()
        _, norm = backend.step([source.batch(i)], highest)
        after = backend.state()
        grads = {
            name: (after[f"m.{name}"] - settings.beta1 * before[f"m.{name}"]) / (1 - settings.beta1)
            for name in parameter_shapes(CONFIG)
        }
        assert norm > settings.max_grad_norm
        clipped = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        assert clipped == pytest.approx(settings.max_grad_norm, rel=1e-3)
    for name, shape in parameter_shapes(CONFIG).items():
        m, v, old, new = (
            arrays[f"{kind}.{name}"].astype(np.float64)
            for arrays, kind in (
                (after, "m"),
                (after, "v"),
                (before, "weights"),
                (after, "weights"),
            )
        )
        np.testing.assert_allclose(
            v,
            settings.beta2 * before[f"v.{name}"]
            + (1 - settings.beta2) * grads[name].astype(np.float64) ** 2,
            rtol=1e-3,
            atol=1e-12,
        )
        decay = settings.weight_decay if len(shape) >= 2 else 0.0
        rate = next((x for first, x in rates.items() if name.startswith(first)), highest)
        rate *= 3 if ".proj_fb." in name or "gamma" in name else 1
        update = (m / (1 - settings.beta1**steps)) / (
            np.sqrt(v / (1 - settings.beta2**steps)) + settings.adam_eps
        )
        np.testing.assert_allclose(new, old * (1 - rate * decay) - rate * update, atol=1e-6)
    assert not np.array_equal(start["weights.model.norm.bias"], after["weights.model.norm.bias"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_accumulation_is_a_larger_batch(framework, tokens):
    source = TextBatches(tokens, CONFIG, dataclasses.replace(SETTINGS, batch_size=6))
    whole = source.batch(0)
    # Parts of different weight: a mean of the parts' means would not be the mean of all rows.
    weights = whole.weights.copy()
    weights[:2, 5:] = 0
    whole = Batch(whole.inputs, whole.targets, weights)
    parts = [
        Batch(whole.inputs[i : i + 2], whole.targets[i : i + 2], weights[i : i + 2])
        for i in (0, 2, 4)
    ]
    results, states = [], []
    for batches in ([whole], parts):
        backend = make_backend(framework)
        results.append(backend.step(batches, 1e-3))
        states.append(backend.state())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    for name, value in states[0].items():
        if name.startswith("m."):
            np.testing.assert_allclose(value, states[1][name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_loss_is_the_weighted_cross_entropy_of_the_logits(framework, tokens):
    backend = make_backend(framework)
    batch = TextBatches(tokens, CONFIG, SETTINGS).batch(1)
    weights = np.random.default_rng(0).random(batch.weights.shape).astype(np.float32)
    weights[0] = 0
    batch = Batch(batch.inputs, batch.targets, weights)
    # A model of its own, because the backend's holds no weights between its calls.
    package = f"sessa_{framework}"
    model = importlib.import_module(f"{package}.checkpoint").build_model(CONFIG, backend.weights())
    logits = importlib.import_module(f"{package}.evaluation").logits_function(model)
    losses = [token_losses(*row) for row in zip(logits(batch.inputs), batch.targets, strict=True)]
    expected = (np.array(losses) * weights).sum()
    assert backend.evaluate(batch)[0] == pytest.approx(expected, rel=1e-5)
    assert backend.step([batch], 0.0)[0] == pytest.approx(expected / weights.sum(), rel=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bfloat16_keeps_float32_weights_and_learns_alike(framework, tokens):
    source = TextBatches(tokens, CONFIG, SETTINGS)
    last = {}
    for precision in ("float32", "bfloat16"):
        backend = make_backend(framework, dataclasses.replace(SETTINGS, precision=precision))
        for i in range(20):
            loss, _ = backend.step([source.batch(i)], 3e-3)
        last[precision] = loss
        assert {value.dtype for value in backend.state().values()} == {np.dtype(np.float32)}
    assert last["bfloat16"] != last["float32"]
    assert last["bfloat16"] == pytest.approx(last["float32"], abs=0.05)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_weights(
    framework, tokens, tmp_path
):
    trainer = make_trainer(framework, tmp_path / "run", tokens)
    trainer.train(until=2)
    before = trainer.backend.state()
    good = trainer.source.batch(0)
    bad = Batch(good.inputs, good.targets, good.weights * np.float32(np.inf))
    trainer.source.batch = lambda index: bad
    with pytest.raises(SessaError, match=r"step 3: the loss is .* smaller `learning_rate`"):
        trainer.train()
    assert_same(before, trainer.backend.state())


def test_an_error_in_the_data_ends_the_run_at_its_step(tokens, tmp_path):
    trainer = make_trainer("torch", tmp_path / "run", tokens)
    batch = trainer.source.batch

    def broken(index):
        if index == 9:
            raise SessaError("the disk is gone")
        return batch(index)

    trainer.source.batch = broken
    with pytest.raises(SessaError, match="the disk is gone"):
        trainer.train()
    # Two batches a step, so the tenth is of the fifth step.
    assert trainer.step == 4


def test_schedule_rises_falls_and_ends_at_the_floor():
    settings = TrainConfig(steps=110, warmup_steps=10, learning_rate=2.0, min_lr_ratio=0.25)
    rates = [learning_rate(settings, step) for step in range(110)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.25)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(settings, 110) == pytest.approx(0.5)
    flat = TrainConfig(steps=5, warmup_steps=0, learning_rate=1.0)
    assert learning_rate(flat, 0) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48, "head_dim": 8}, "another architecture"),
        ({"num_hidden_layers": 3}, "another architecture: m.model.layers.2.W_in.bias is missing"),
        ({"layer_kinds": "gated_attention"}, "another architecture: .* no such tensor"),
    ],
    ids=["width", "layers", "feedback"],
)
def test_resume_with_another_architecture_is_refused(change, message, tokens, tmp_path):
    make_trainer("torch", tmp_path / "run", tokens).train(until=1)
    other = dataclasses.replace(CONFIG, **change)
    with pytest.raises(SessaError, match=message):
        make_trainer("torch", tmp_path / "run", tokens, config=other)


def test_resume_with_other_data_is_refused(tokens, tmp_path):
    make_trainer("torch", tmp_path / "run", tokens).train(until=1)
    with pytest.raises(SessaError, match="data are not those"):
        make_trainer("torch", tmp_path / "run", tokens[:-1])


@pytest.mark.parametrize("damage", ["cut", "plain"])
def test_a_damaged_state_is_named(damage, tokens, tmp_path):
    make_trainer("torch", tmp_path / "run", tokens).train(until=1)
    path = tmp_path / "run" / STATE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    with pytest.raises(SessaError, match=r"training_state\.safetensors: not a"):
        make_trainer("torch", tmp_path / "run", tokens)


@pytest.mark.parametrize(
    ("framework", "device"), [("torch", "cuda:99"), ("torch", "tpu"), ("mlx", "tpu")]
)
def test_a_device_that_is_not_there_is_refused(framework, device):
    with pytest.raises(SessaError, match=f"device.* '{device}'"):
        importlib.import_module(f"sessa_{framework}.training").choose_device(device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a positive integer"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"data": ()}, "data is empty"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"validation_fraction": -0.1}, "validation_fraction is -0.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_train_are_refused(change, message):
    with pytest.raises(SessaError, match=message):
        TrainConfig(**change)


def test_settings_from_a_file_name_the_unknown_key():
    with pytest.raises(SessaError, match=r"t\.json: unknown key stepz; known: .*steps"):
        TrainConfig.from_dict({"stepz": 3}, "t.json")
    with pytest.raises(SessaError, match=r"t\.json: learning_rate is 'high', expected a number"):
        TrainConfig.from_dict({"learning_rate": "high"}, "t.json")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_predicted_token_has_the_smallest_loss(framework):
    config = dataclasses.replace(CONFIG, vocab_size=11)
    backend = make_backend(framework, config=config)
    inputs = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)
    predicted = backend.predict(inputs)
    assert predicted.dtype == np.int32 and predicted.shape == inputs.shape
    for row, place in ((0, 0), (0, 4), (1, 2)):
        weights = np.zeros(inputs.shape, np.float32)
        weights[row, place] = 1
        losses = []
        for token in range(11):
            batch = Batch(inputs, np.full_like(inputs, token), weights)
            loss, same = backend.evaluate(batch)
            losses.append(loss)
            assert np.array_equal(same, predicted)
        assert predicted[row, place] == np.argmin(losses)
