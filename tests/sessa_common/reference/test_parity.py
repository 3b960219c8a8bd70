"""`sessa check` and the comparison behind it: it must see a runtime that is wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import typer
from support.export_models import MAMBA, lively_weights, small_config, write_checkpoint
from typer.testing import CliRunner

from sessa_cli.check import check
from sessa_cli.export import export
from sessa_cli.main import main
from sessa_common.errors import SessaError
from sessa_common.inference.evaluation import score_documents
from sessa_common.reference.model import model_logits
from sessa_common.reference.parity import TOLERANCE, compare, make_cases, require_ok
from sessa_export import runtime_check
from sessa_export.exporter import export_checkpoint
from sessa_export.runtime import load_decoder

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(check)
app.command()(export)


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("check")
    write_checkpoint(root / "checkpoint", small_config("untied"))
    export_checkpoint(root / "checkpoint", root / "exported")
    return root / "checkpoint", root / "exported"


def test_every_runtime_agrees(folders) -> None:
    code, out = command("check", folders[0], "--json")
    answer = json.loads(out)
    assert code == 0 and answer["ok"]
    assert list(answer["runtimes"]) == ["PyTorch", "MLX", "ONNX Runtime"]
    for results in answer["runtimes"].values():
        assert [r["case"] for r in results] == ["prefill", "decode", "padded batch"]
        assert all(r["difference"] < 1e-5 and r["agreement"] == 1 for r in results)


def test_table_names_runtimes_and_verdicts(folders) -> None:
    code, out = command("check", folders[0], "--export", folders[1])
    assert code == 0
    assert out.count(" ok ") == 9
    assert "DISAGREES" not in out


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "variant",
    ["single_head", "attention_gated", "grouped", "attention", "hybrid", "sessa_transformer"],
)
def test_variants_agree(tmp_path: Path, variant: str, bfloat16: bool) -> None:
    config = small_config(variant, dtype="bfloat16" if bfloat16 else "float32")
    write_checkpoint(tmp_path / "checkpoint", config)
    code, out = command("check", tmp_path / "checkpoint", "--json")
    assert code == 0, out


@pytest.mark.parametrize("variant", MAMBA)
def test_mamba2_is_checked_where_it_runs(tmp_path: Path, variant: str) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config(variant))
    code, out = command("check", tmp_path / "checkpoint", "--json")
    runtimes = json.loads(out)["runtimes"]
    assert code == 0, out
    assert runtimes["ONNX Runtime"] == "not supported (mamba2)"
    for name in ("PyTorch", "MLX"):
        assert all(r["difference"] < 1e-5 and r["agreement"] == 1 for r in runtimes[name]), name
    code, out = command("check", tmp_path / "checkpoint")
    assert code == 0 and "not supported" in out and out.count(" ok ") == 6


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(
    "variant", ["attention", "attention_gated", "hybrid", "sessa_transformer", *MAMBA]
)
def test_eval_and_generate_take_every_kind(
    tmp_path: Path, capsys, variant: str, backend: str
) -> None:
    config = small_config(variant, max_position_embeddings=40)
    checkpoint, weights = write_checkpoint(tmp_path / "checkpoint", config)
    text = "The rain fell in torrents, except at occasional intervals."
    (tmp_path / "text.txt").write_text(text)

    def sessa(*arguments: object) -> dict:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--backend", backend, "--json"])
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out)

    told = sessa("eval", checkpoint, "--data", tmp_path / "text.txt", "--stride", 7)
    logits = partial(model_logits, config, weights)
    documents = [(np.array(list(text.encode())), len(text))]
    score = score_documents(logits, documents, start_id=256, context=40, stride=7)
    assert told["loss"] == pytest.approx(score.loss, rel=1e-5)
    prompts = ["--prompt", "The rain", "--prompt", "A"]
    told = sessa("generate", checkpoint, *prompts, "--temperature", 0, "--max-tokens", 6)
    for given, found in zip(("The rain", "A"), told["texts"], strict=True):
        assert found["tokens"] > 0
        ids = list(given.encode())
        for _ in range(found["tokens"]):
            ids.append(int(logits(np.array([ids]))[0, -1].argmax()))
        tail = bytes(i for i in ids[len(given) :] if i < 256)
        assert found["text"] == tail.decode("utf-8", errors="replace")


def test_context_of_one_token(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config(max_position_embeddings=1))
    code, out = command("check", tmp_path / "checkpoint", "--json")
    assert code == 0, out


def test_export_of_another_checkpoint_disagrees(folders, tmp_path: Path) -> None:
    config = small_config("untied")
    weights = lively_weights(config)
    weights["model.layers.1.mixer.gamma_bias"] = weights["model.layers.1.mixer.gamma_bias"] + 0.5
    write_checkpoint(tmp_path / "other", config, weights)
    code, out = command("check", tmp_path / "other", "--export", folders[1], "--json")
    answer = json.loads(out)
    assert code == 1 and not answer["ok"]
    assert all(r["ok"] for r in answer["runtimes"]["PyTorch"])
    assert all(r["difference"] > TOLERANCE for r in answer["runtimes"]["ONNX Runtime"])
    code, out = command("check", tmp_path / "other", "--export", folders[1])
    assert code == 1 and "DISAGREES" in out


def test_missing_runtimes_are_named_and_no_error(folders, monkeypatch) -> None:
    monkeypatch.setattr(runtime_check, "is_installed", lambda name: name == "torch")
    code, out = command("check", folders[0], "--json")
    runtimes = json.loads(out)["runtimes"]
    assert code == 0 and runtimes["PyTorch"]
    assert runtimes["MLX"] == runtimes["ONNX Runtime"] == "not installed"
    code, out = command("check", folders[0])
    assert code == 0 and out.count("not installed") == 2


class Bent:
    """A decoder that adds an error to some of the logits of another one."""

    def __init__(self, decoder, error: float, where: str) -> None:
        self.decoder, self.error, self.where = decoder, error, where
        self.config = decoder.config

    def reset(self) -> None:
        self.decoder.reset()

    def logits(self, tokens, mask=None):
        found = self.decoder.logits(tokens, mask).copy()
        if self.where == "prefill" or (self.where == "padding" and mask is not None):
            found[0, -1, 0] += self.error
        return found

    def step(self, tokens, mask=None):
        found = self.decoder.step(tokens, mask).copy()
        found[-1, 0] += self.error if self.where == "decode" else 0
        return found


@pytest.mark.parametrize(
    "where, wrong",
    [
        ("prefill", {"prefill", "decode", "padded batch"}),
        ("decode", {"decode", "padded batch"}),
        ("padding", {"padded batch"}),
    ],
)
@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_comparison_sees_where_a_runtime_is_wrong(folders, where, wrong, error) -> None:
    config = small_config("untied")
    cases = make_cases(config, lively_weights(config))
    results = compare(Bent(load_decoder(folders[1]), error, where), cases)
    assert {r.case for r in results if not r.ok} == wrong
    with pytest.raises(SessaError, match="logits differ"):
        require_ok(results, "here")


def test_agreement_counts_greedy_tokens(folders) -> None:
    config = small_config("untied")
    cases = make_cases(config, lively_weights(config))
    last = cases[0].expected[0, -1]
    error = float(last.max() - last[0] + 1)
    results = compare(Bent(load_decoder(folders[1]), error, "prefill"), cases)
    assert results[0].agreement == pytest.approx(1 - 1 / 80)


def test_padding_does_not_count(folders) -> None:
    config = small_config("untied")
    case = make_cases(config, lively_weights(config))[2]
    assert case.mask is not None and (case.mask == 0).any()
    case.expected[case.mask == 0] = np.nan
    assert compare(load_decoder(folders[1]), [case])[0].ok


def test_export_command(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config())
    code, out = command("export", tmp_path / "checkpoint", tmp_path / "out", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["difference"] < 1e-5
    assert answer["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    with pytest.raises(SessaError, match="`force`"):
        command("export", tmp_path / "checkpoint", tmp_path / "out")
    code, out = command("export", tmp_path / "checkpoint", tmp_path / "out", "--force")
    assert code == 0 and "ONNX Runtime" in out


def test_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    config = small_config()
    weights = {**lively_weights(config), "model.layers.0.W_in.scales": np.ones(3, np.float32)}
    write_checkpoint(tmp_path / "checkpoint", config, weights)
    for arguments in (["check"], ["export"]):
        target = [tmp_path / "out"] if arguments == ["export"] else []
        with pytest.raises(SessaError, match="quantised"):
            command(*arguments, tmp_path / "checkpoint", *target)
