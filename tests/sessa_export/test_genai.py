"""onnxruntime-genai generates from an exported folder what PyTorch does from the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.export_clients import NEW_TOKENS, PROMPTS, export_clients, greedy_tokens, need_module

from sessa_export.runtime_configs import CLIENTS

genai = need_module("onnxruntime_genai")


FOLDERS = [
    ("grouped", "natural"),
    ("grouped", "uniform"),
    ("hybrid", "natural"),
    ("hybrid", "uniform"),
]


@pytest.fixture(scope="module", params=FOLDERS, ids="-".join)
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    variant, layout = request.param
    # Text of the hybrid's first weights ends early.
    seed = 2 if variant == "hybrid" else 1
    folder = tmp_path_factory.mktemp("genai")
    return export_clients(folder, variant=variant, seed=seed, layout=layout)


@pytest.fixture(scope="module")
def native_folders(tmp_path_factory) -> tuple[Path, Path]:
    return export_clients(tmp_path_factory.mktemp("native"), native=True, clients=CLIENTS)


def make_generator(model: Any, length: int, **search: object) -> Any:
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=length + NEW_TOKENS, do_sample=False, **search)
    return genai.Generator(model, params)


def generate(model: Any, prompt: list[int], **search: object) -> list[int]:
    generator = make_generator(model, len(prompt), **search)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)[len(prompt) :].tolist()


def test_greedy_tokens(folders) -> None:
    model = genai.Model(str(folders[1]))
    expected = greedy_tokens(folders[0], PROMPTS)
    assert [generate(model, prompt) for prompt in PROMPTS] == expected


def test_chunked_prompt(folders) -> None:
    model = genai.Model(str(folders[1]))
    assert generate(model, PROMPTS[0], chunk_size=7) == greedy_tokens(folders[0], PROMPTS)[0]


def test_padded_batch(folders) -> None:
    model = genai.Model(str(folders[1]))
    longest, end = max(map(len, PROMPTS)), 256
    generator = make_generator(model, longest, batch_size=len(PROMPTS))
    generator.append_tokens([p + [end] * (longest - len(p)) for p in PROMPTS])
    while not generator.is_done():
        generator.generate_next_token()
    got = [generator.get_sequence(i)[longest:].tolist() for i in range(len(PROMPTS))]
    assert got == greedy_tokens(folders[0], PROMPTS)


def test_beam_search_runs(folders) -> None:
    model = genai.Model(str(folders[1]))
    assert len(generate(model, PROMPTS[1], num_beams=3)) == NEW_TOKENS


@pytest.mark.parametrize("native", [True, False])
def test_native_operator(native_folders, tmp_path: Path, native: bool) -> None:
    checkpoint, exported = native_folders
    folder = shutil.copytree(exported, tmp_path / "exported")
    settings = json.loads((folder / "genai_config.json").read_text())
    options = settings["model"]["decoder"]["session_options"]
    assert (folder / options["custom_ops_library"]).is_file()
    if not native:
        del options["custom_ops_library"]
    options["enable_profiling"] = str(tmp_path / "profile")
    (folder / "genai_config.json").write_text(json.dumps(settings))
    model = genai.Model(str(folder))
    assert [generate(model, p) for p in PROMPTS] == greedy_tokens(checkpoint, PROMPTS)
    del model
    (profile,) = tmp_path.glob("profile*.json")
    ran = {event["args"].get("op_name") for event in json.loads(profile.read_text())}
    assert ("FeedbackSolve" in ran) == native


def test_broken_library_is_named(native_folders, tmp_path: Path) -> None:
    folder = shutil.copytree(native_folders[1], tmp_path / "exported")
    (library,) = folder.glob("*sessa_ort*")
    library.unlink()
    library.write_bytes(b"not a library")
    with pytest.raises(Exception, match=library.name):
        genai.Model(str(folder))


def test_tokenizer_of_the_folder(folders) -> None:
    tokenizer = genai.Tokenizer(genai.Model(str(folders[1])))
    text = "Grüße, 東京!"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_rewind_in_the_uniform_layout(tmp_path) -> None:
    checkpoint, folder = export_clients(tmp_path, layout="uniform")
    model = genai.Model(str(folder))
    first, other = PROMPTS[0], list(b"and the wind")
    kept = 20
    generator = make_generator(model, len(first))
    generator.append_tokens([first])
    for _ in range(4):
        generator.generate_next_token()
    generator.rewind_to(kept)
    generator.append_tokens([other])
    prompt = first[:kept] + other
    for _ in range(NEW_TOKENS):
        generator.generate_next_token()
    got = generator.get_sequence(0)[len(prompt) : len(prompt) + NEW_TOKENS].tolist()
    assert got == greedy_tokens(checkpoint, [prompt])[0]
