"""`sessa check` and the comparison behind it: it must see a runtime that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from export_models import lively_weights, small_config, write_checkpoint
from typer.testing import CliRunner

import sessa_cli.check
from sessa_cli.check import check
from sessa_cli.export import export
from sessa_common.errors import SessaError
from sessa_export.check import TOLERANCE, compare, make_cases, require_ok
from sessa_export.folder import export_checkpoint
from sessa_export.runtime import load_stepper

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
@pytest.mark.parametrize("variant", ["single_head", "no_feedback", "grouped"])
def test_variants_agree(tmp_path: Path, variant: str, bfloat16: bool) -> None:
    config = small_config(variant, dtype="bfloat16" if bfloat16 else "float32")
    write_checkpoint(tmp_path / "checkpoint", config)
    code, out = command("check", tmp_path / "checkpoint", "--json")
    assert code == 0, out


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
    monkeypatch.setattr(sessa_cli.check, "is_installed", lambda name: name == "torch")
    code, out = command("check", folders[0], "--json")
    runtimes = json.loads(out)["runtimes"]
    assert code == 0 and runtimes["PyTorch"]
    assert runtimes["MLX"] is None and runtimes["ONNX Runtime"] is None
    code, out = command("check", folders[0])
    assert code == 0 and out.count("not installed") == 2


class Bent:
    """A stepper that adds an error to some of the logits of another one."""

    def __init__(self, stepper, error: float, where: str) -> None:
        self.stepper, self.error, self.where = stepper, error, where
        self.config = stepper.config

    def reset(self) -> None:
        self.stepper.reset()

    def logits(self, tokens, mask=None):
        found = self.stepper.logits(tokens, mask).copy()
        if self.where == "prefill" or (self.where == "padding" and mask is not None):
            found[0, -1, 0] += self.error
        return found

    def step(self, tokens, mask=None):
        found = self.stepper.step(tokens, mask).copy()
        found[-1, 0] += self.error if self.where == "decode" else 0
        return found


@pytest.mark.parametrize(
    "where, wrong",
    [("prefill", {"prefill", "decode", "padded batch"}), ("decode", {"decode", "padded batch"}),
     ("padding", {"padded batch"})],
)  # fmt: skip
@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_comparison_sees_where_a_runtime_is_wrong(folders, where, wrong, error) -> None:
    config = small_config("untied")
    cases = make_cases(config, lively_weights(config))
    results = compare(Bent(load_stepper(folders[1]), error, where), cases)
    assert {r.case for r in results if not r.ok} == wrong
    with pytest.raises(SessaError, match="logits differ"):
        require_ok(results, "here")


def test_agreement_counts_greedy_tokens(folders) -> None:
    config = small_config("untied")
    cases = make_cases(config, lively_weights(config))
    last = cases[0].expected[0, -1]
    error = float(last.max() - last[0] + 1)
    results = compare(Bent(load_stepper(folders[1]), error, "prefill"), cases)
    assert results[0].agreement == pytest.approx(1 - 1 / 80)


def test_padding_does_not_count(folders) -> None:
    config = small_config("untied")
    case = make_cases(config, lively_weights(config))[2]
    assert case.mask is not None and (case.mask == 0).any()
    case.expected[case.mask == 0] = np.nan
    assert compare(load_stepper(folders[1]), [case])[0].ok


def test_export_command(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config())
    code, out = command("export", tmp_path / "checkpoint", tmp_path / "out", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["difference"] < 1e-5
    assert answer["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    with pytest.raises(SessaError, match="--force"):
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
