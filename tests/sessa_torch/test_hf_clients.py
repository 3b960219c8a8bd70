"""Sessa in transformers: compiled models, larger vocabularies, the hub."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
import huggingface_hub
from support.export_models import small_config, write_checkpoint
from transformers import AutoModelForCausalLM

import sessa_torch.hf  # noqa: F401 - registers the model
from sessa_common.checkpoint.remote_code import CODE_FILES
from sessa_torch.checkpoint import load_model

PROMPTS = torch.tensor([[5, 71, 9, 200, 33, 4, 90], [1, 2, 66, 17, 120, 8, 250]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "m", small_config("hybrid"))[0]


def test_a_compiled_model_has_the_logits_and_gradients(folder):
    def run(compiled):
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        call = torch.compile(model, backend="aot_eager") if compiled else model
        found = call(PROMPTS, labels=PROMPTS)
        found.loss.backward()
        return found.logits.detach(), [p.grad for p in model.parameters()]

    (logits, grads), (expected, expected_grads) = run(True), run(False)
    assert torch.allclose(logits, expected, atol=1e-5)
    pairs = zip(grads, expected_grads, strict=True)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs)


def test_a_larger_vocabulary_keeps_the_logits_of_the_old_one(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        before = model(PROMPTS).logits
        model.resize_token_embeddings(264)
        model.save_pretrained(tmp_path)
        logits = load_model(tmp_path, device="cpu")(PROMPTS)
    # A product of another width may round differently.
    assert logits.shape[-1] == 264
    torch.testing.assert_close(logits[..., :257], before)
    assert model.generate(PROMPTS, max_new_tokens=3, pad_token_id=0).shape == (2, 10)


def test_an_automatic_device_map_changes_nothing(folder):
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    prompts = PROMPTS.to(placed.device)
    with torch.no_grad():
        expected = load_model(folder, device="cpu")(PROMPTS)
        assert torch.allclose(placed(prompts).logits.cpu(), expected, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = AutoModelForCausalLM.from_pretrained(folder).generate(PROMPTS, **options)
    assert torch.equal(placed.generate(prompts, **options).cpu(), plain)


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API by which a small repository is made and filled."""

    files: dict[str, bytes]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{huggingface_hub.constants.ENDPOINT}/me/small", "id": "me/small"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            rows = [json.loads(line)["value"] for line in body.splitlines() if '"file"' in line]
            self.files.update({row["path"]: base64.b64decode(row["content"]) for row in rows})
            commit = {"commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/small/commit/1"}
            self.answer({**commit, "commitOid": "1", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; the files that it holds."""
    handler = type("Handler", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    yield handler.files
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_pushed_model_loads_from_its_files(folder, hub, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.push_to_hub("me/small", token="none")
    assert {"config.json", "model.safetensors", "README.md", *CODE_FILES} <= hub.keys()
    for name, content in hub.items():
        (tmp_path / name).write_bytes(content)
    with torch.no_grad():
        found = load_model(tmp_path, device="cpu")(PROMPTS)
        assert np.array_equal(found.numpy(), model(PROMPTS).logits.numpy())
