"""Options that would change nothing are refused, with the reason."""

import pytest
from support.export_models import small_config, write_checkpoint
from support.in_process import fails


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, _ = write_checkpoint(tmp_path_factory.mktemp("model") / "m", small_config())
    return folder


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("convert", ("--group-size", 32), "--group-size says how weights are quantised"),
        (
            "export",
            ("--data", "pydoc", "--data", "pydoc"),
            "--data measures the cost of fewer bits",
        ),
    ],
)
def test_of_conversion_and_export(command, options, says, checkpoint, tmp_path, capsys):
    assert says in fails(capsys, command, checkpoint, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_of_reading_text(checkpoint, capsys):
    said = fails(capsys, "eval", checkpoint, "--data", "pydoc", "--subset", "en")
    assert "--subset is a part of a Hugging Face data set, but none is named" in said


def test_of_cuda_graphs(checkpoint, capsys):
    said = fails(capsys, "generate", checkpoint, "--backend", "mlx", "--no-graphs")
    assert "--no-graphs is for CUDA graphs, which mlx does not use" in said
