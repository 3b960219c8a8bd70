"""Sessions on a CUDA device: what is asked of ONNX Runtime, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.export_models import small_config, write_checkpoint

from sessa_cli.main import main
from sessa_common.errors import SessaError
from sessa_export import sessions
from sessa_export.exporter import Options, write_model
from sessa_export.runtime import MODEL_FILE, Decoder, load_decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = small_config()
    _, weights = write_checkpoint(tmp_path / "checkpoint", config)
    write_model(tmp_path / MODEL_FILE, config, weights, Options())
    return tmp_path


class FakeRuntime:
    """An onnxruntime with a CUDA provider, whose sessions record how they were opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, providers: list[str]) -> None:
        self.opened: dict[str, Any] = {}
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
        monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda level: None)
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.open)
        self.usable = True

    def open(self, model: Any, options: Any, providers: list[Any]) -> Any:
        self.opened = {"model": model, "options": options, "providers": providers}
        names = [sessions.CUDA] if self.usable else []
        return SimpleNamespace(get_providers=lambda: names)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    return FakeRuntime(monkeypatch, [sessions.CUDA, "CPUExecutionProvider"])


@pytest.mark.parametrize(
    "device, tf32, number", [("cuda", False, "0"), ("cuda:3", True, "3")], ids=str
)
def test_cuda_is_asked_for_with_the_body_for_a_gpu(cuda, folder, device, tf32, number) -> None:
    sessions.open_session(folder / MODEL_FILE, device=device, tf32=tf32)
    (name, options), last = cuda.opened["providers"]
    assert (name, last) == (sessions.CUDA, "CPUExecutionProvider")
    assert options == {"device_id": number, "use_tf32": str(int(tf32))}
    nodes = onnx.load_from_string(cuda.opened["model"]).graph.node
    assert nodes[-1].op_type == "If", "the choice between the forms for a GPU"


@pytest.mark.parametrize(
    "variant, external",
    [("heads", 0), ("hybrid", None), ("attention", None), ("options", None), ("untied", None)],
)
def test_the_form_for_a_gpu_gives_the_same_logits(tmp_path, variant, external, monkeypatch) -> None:
    """The bytes that a CUDA session is opened with, run on the CPU."""
    config = small_config(variant)
    _, weights = write_checkpoint(tmp_path / "checkpoint", config)
    options = Options(external_data_bytes=external)
    write_model(tmp_path / MODEL_FILE, config, weights, options)
    plain = load_decoder(tmp_path)
    fake = FakeRuntime(monkeypatch, [sessions.CUDA])
    monkeypatch.setattr(sessions, "LARGE_BLOCK", 128)
    sessions.open_session(tmp_path / MODEL_FILE, device="cuda")
    monkeypatch.undo()
    given = fake.opened
    decoder = Decoder(onnxruntime.InferenceSession(given["model"], given["options"]), config)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 400))
    mask = np.ones((2, 100), np.int64)
    mask[1, :30] = 0
    # Up to a block, one token, a few tokens, more than a block.
    for T, given_mask in ((100, mask), (1, None), (3, None), (200, None), (1, None)):
        want, got = (d.logits(tokens[:, :T], given_mask) for d in (plain, decoder))
        assert abs(got - want).max() <= 1e-5 * abs(want).max(), T


def test_what_cannot_run_is_said(folder, monkeypatch, capsys) -> None:
    for device in ("gpu", "cuda:x", "mps"):
        with pytest.raises(SessaError, match=r"expected|runs on cpu, cuda or cuda:1"):
            load_decoder(folder, device=device)
    FakeRuntime(monkeypatch, ["CPUExecutionProvider"])
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(folder), "--device", "cuda", "--prompt", "a"])
    assert ended.value.code == 2
    assert "has no CUDA provider; install `onnxruntime-gpu[cuda,cudnn]`" in capsys.readouterr().err


def test_a_cuda_device_that_cannot_be_used_is_said(cuda, folder) -> None:
    cuda.usable = False
    with pytest.raises(SessaError, match=r"cannot use CUDA device 1 .*onnxruntime-gpu"):
        load_decoder(folder, device="cuda:1")


def test_the_cpu_library_is_not_registered_for_cuda(cuda, folder, monkeypatch, tmp_path) -> None:
    """Its kernel would take the node from the body and run on the CPU, copying every cache."""
    toolkit = tmp_path / "toolkit" / "bin" / "nvcc"
    toolkit.parent.mkdir(parents=True)
    toolkit.write_text("#!/bin/sh\n")
    toolkit.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("CUDAARCHS", "90")
    with pytest.raises(SessaError, match=r"CUDA kernels is not built; .*`sessa build-op --cuda`"):
        load_decoder(folder, device="cuda", native=True)


def test_buffers_stay_on_the_processor(monkeypatch) -> None:
    session = SimpleNamespace(
        get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={}),
        get_outputs=lambda: [SimpleNamespace(name="new.0.key")],
        get_providers=lambda: [sessions.CUDA],
        get_provider_options=lambda: {sessions.CUDA: {"device_id": "0"}},
    )
    with pytest.raises(SessaError, match="layout natural to run it on cuda:0"):
        Decoder(session, small_config())
