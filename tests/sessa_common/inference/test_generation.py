"""The generation loop, and the same text from every runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from support.decoders import ReferenceDecoder, ScriptedDecoder
from support.export_models import lively_weights, small_config, write_checkpoint
from typer.testing import CliRunner

import sessa_export.runtime
from sessa_cli.generate import generate as generate_command
from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.generation import (
    MAX_TOKENS,
    generate,
    left_pad,
    prefill,
    token_budget,
)
from sessa_common.inference.model_tokenizer import encode_prompt, stop_tokens
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.storage import write_json
from sessa_export.exporter import export_checkpoint

GREEDY = SamplingConfig(temperature=0)
RUNTIMES = ["reference", "torch", "mlx", "onnx"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """An untied checkpoint, whose greedy text wanders, and its export."""
    root = tmp_path_factory.mktemp("generate")
    write_checkpoint(root / "checkpoint", small_config("untied", num_key_value_heads=2))
    export_checkpoint(root / "checkpoint", root / "exported")
    return root / "checkpoint", root / "exported"


@pytest.fixture(scope="module")
def decoders(folders) -> dict:
    checkpoint, exported = folders
    config = small_config("untied", num_key_value_heads=2)
    found = {
        "reference": ReferenceDecoder(config, lively_weights(config)),
        "onnx": sessa_export.runtime.load_decoder(exported),
    }
    for name in ("torch", "mlx"):
        module = pytest.importorskip(f"sessa_{name}.decoding")
        found[name] = module.load_decoder(checkpoint)
    return found


def collect(decoder, prompts, sampling=GREEDY, **options) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(decoder, prompts, sampling, **options):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


PROMPT = list(b"The feedback solve")


def test_greedy_text_is_the_same_in_every_runtime(decoders) -> None:
    found = {name: collect(decoders[name], [PROMPT], max_tokens=200)[0] for name in RUNTIMES}
    assert len(found["reference"]) == 200
    assert len(set(found["reference"])) > 10
    for name in RUNTIMES:
        assert found[name] == found["reference"], name


KINDS = {
    "sessa_transformer": {"layer_kinds": "sessa_transformer"},
    "transformer": {"layer_kinds": "transformer"},
    "gated": {"layer_kinds": "gated_attention"},
    "mamba2": {"layer_kinds": "mamba2"},
    "hybrid": {"layer_kinds": ("mamba2", "transformer", "sessa"), "num_hidden_layers": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_the_same_text_in_each_framework(kind: str, tmp_path: Path) -> None:
    config = small_config("untied", mamba_d_state=12, mamba_d_head=16, **KINDS[kind])
    write_checkpoint(tmp_path / "checkpoint", config)
    runtimes = [ReferenceDecoder(config, lively_weights(config))]
    for name in ("torch", "mlx"):
        module = pytest.importorskip(f"sessa_{name}.decoding")
        runtimes.append(module.load_decoder(tmp_path / "checkpoint"))
    # The first prompt is padded on the left to the second, which is read in chunks.
    prompts, sampling = [PROMPT[:3], PROMPT * 5], SamplingConfig(temperature=0.9, seed=3)
    options = {"max_tokens": 60, "prefill_chunk": 35}
    found = [collect(decoder, prompts, sampling, **options) for decoder in runtimes]
    assert all(rows == found[0] for rows in found)
    alone = [collect(decoder, prompts[:1], sampling, **options) for decoder in runtimes]
    assert alone == [found[0][:1]] * 3
    assert len(set(found[0][0])) > 10


@pytest.mark.parametrize("seed", [0, 7])
def test_sampled_text_is_the_same_in_every_runtime(decoders, seed: int) -> None:
    sampling = SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=seed)
    found = [collect(decoders[name], [PROMPT], sampling, max_tokens=100) for name in RUNTIMES]
    assert all(rows == found[0] for rows in found)


@pytest.mark.parametrize("name", RUNTIMES)
def test_batch_equals_single_prompts(decoders, name: str) -> None:
    prompts = [PROMPT, list(b"a"), list(b"of a batch") * 9]
    sampling = SamplingConfig(temperature=1.0, seed=3)
    together = collect(decoders[name], prompts, sampling, max_tokens=30)
    assert together[0] == collect(decoders[name], prompts[:1], sampling, max_tokens=30)[0]
    greedy = collect(decoders[name], prompts, max_tokens=30)
    assert greedy == [collect(decoders[name], [p], max_tokens=30)[0] for p in prompts]


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_one_piece(decoders, name: str, chunk: int) -> None:
    tokens, mask = left_pad([PROMPT * 5, PROMPT])
    decoder = decoders[name]
    decoder.reset()
    whole = prefill(decoder, tokens, mask)
    decoder.reset()
    pieces = prefill(decoder, tokens, mask, chunk)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", RUNTIMES)
def test_logits_and_step_agree(decoders, name: str) -> None:
    decoder = decoders[name]
    tokens, mask = left_pad([PROMPT, PROMPT[:4]])
    decoder.reset()
    every = decoder.logits(tokens, mask)
    assert every.shape == (2, len(PROMPT), 257)
    decoder.reset()
    last = decoder.step(tokens, mask)
    assert last.shape == (2, 257)
    np.testing.assert_allclose(last, every[:, -1], rtol=0, atol=1e-5)


def test_rows_stop_on_their_own() -> None:
    decoder = ScriptedDecoder([1, 2, 256, 3], [4, 256, 4], [5, 5, 5, 5])
    steps = list(generate(decoder, [[1]] * 3, GREEDY, max_tokens=4, stop={256}))
    assert steps == [[1, 4, 5], [2, None, 5], [None, None, 5], [None, None, 5]]
    assert decoder.calls == 4
    # Rows leave the batch when half of them have ended.
    assert [len(tokens) for tokens in decoder.fed] == [3, 3, 3, 1]


def test_generation_ends_when_every_row_has() -> None:
    decoder = ScriptedDecoder([1, 256], [256])
    assert list(generate(decoder, [[1]] * 2, GREEDY, max_tokens=9, stop={256})) == [[1, None]]
    assert decoder.calls == 2


def test_no_step_is_made_for_a_token_nobody_asked_for() -> None:
    decoder = ScriptedDecoder([1, 2, 3])
    assert list(generate(decoder, [[1]], GREEDY, max_tokens=2)) == [[1], [2]]
    assert decoder.calls == 2


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "prompt is empty"),
        ([[1], []], {}, "prompt is empty"),
        ([[1, 257]], {}, r"token id 257 is out of range 0\.\.256"),
        ([[-1]], {}, "token id -1 is out of range"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk is 0"),
        ([[1] * 200], {"max_tokens": 101}, "200 tokens and 101 more .* at most 300"),
        ([[1], [1] * 300], {}, "300 tokens and 1 more"),
    ],
)
def test_bad_requests_are_refused_before_the_model_runs(prompts, options, message) -> None:
    decoder = ScriptedDecoder([1])
    with pytest.raises(SessaError, match=message):
        generate(decoder, prompts, GREEDY, **options)
    assert decoder.calls == 0


def test_token_budget() -> None:
    config = small_config()
    assert token_budget(config, 10, None) == MAX_TOKENS
    assert token_budget(config, 290, None) == 10
    assert token_budget(config, 100, 200) == 200


def test_context_can_be_filled_to_the_end(decoders) -> None:
    rows = collect(decoders["onnx"], [PROMPT], max_tokens=300 - len(PROMPT))
    assert len(rows[0]) == 300 - len(PROMPT)


def test_left_pad() -> None:
    tokens, mask = left_pad([[1, 2, 3], [4]], pad_id=9)
    np.testing.assert_array_equal(tokens, [[1, 2, 3], [9, 9, 4]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1]])
    assert left_pad([[1, 2], [3, 4]])[1] is None


def test_stop_tokens(tmp_path: Path) -> None:
    config = small_config()
    assert stop_tokens(tmp_path, config) == {256}
    assert stop_tokens(tmp_path, small_config(eos_token_id=None)) == frozenset()
    for given_ids, expected in [(7, {7}), ([7, 8], {7, 8}), (None, {256})]:
        write_json(tmp_path / "generation_config.json", {"eos_token_id": given_ids})
        assert stop_tokens(tmp_path, config) == expected
    write_json(tmp_path / "generation_config.json", {"eos_token_id": "end"})
    with pytest.raises(SessaError, match="eos_token_id is 'end'"):
        stop_tokens(tmp_path, config)


def test_empty_prompt_begins_a_text() -> None:
    assert encode_prompt(byte_tokenizer(), "", small_config()) == [256]
    with pytest.raises(SessaError, match="the prompt is empty"):
        encode_prompt(byte_tokenizer(), "", small_config(bos_token_id=None, eos_token_id=None))


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(generate_command)


def command(*arguments: object, stdin: str = "") -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("backend", ["torch", "mlx", "onnx", None])
def test_command_writes_the_same_text_with_every_backend(folders, decoders, backend) -> None:
    folder = folders[1] if backend in ("onnx", None) else folders[0]
    arguments = [folder, "--prompt", "The", "--max-tokens", 40, "--temperature", 0.7, "--seed", 5]
    arguments += ["--backend", backend] if backend else []
    sampling = SamplingConfig(temperature=0.7, seed=5)
    (ids,) = collect(decoders["reference"], [list(b"The")], sampling, max_tokens=40, stop={256})
    expected = byte_tokenizer().decode(ids)
    assert command(*arguments) == f"The{expected}\n"
    answer = json.loads(command(*arguments, "--json"))
    made = {"text": expected, "tokens": len(ids), "finish": "length"}
    assert answer["texts"] == [{"prompt": "The", **made}]
    assert answer["tokens_per_second"] > 0


def test_command_reads_prompts_from_everywhere(folders, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Once", encoding="utf-8")
    rest = ["--max-tokens", 20, "--temperature", 0]
    expected = command(folders[1], "--prompt", "Once", *rest)
    assert command(folders[1], "--prompt-file", file, *rest) == expected
    assert command(folders[1], "--prompt", "-", *rest, stdin="Once") == expected
    assert command(folders[1], "--prompt-file", "-", *rest, stdin="Once") == expected
    both = command(folders[1], "--prompt", "A", "--prompt", "Once", *rest)
    assert both.endswith(f"[2] {expected}")


def test_command_follows_rules(folders, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    write_json(
        tmp_path / "schema.json", {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 9}
    )
    options = ["--prompt", "a", "--json", "--logit-bias", "93=-50", "--logit-bias", "50=-inf"]
    answer = json.loads(command(folders[1], *options, "--json-schema", tmp_path / "schema.json"))
    [text] = answer["texts"]
    # "]" comes where nothing else may, and "2" never.
    assert json.loads(text["text"]) == [1] * 9 and text["finish"] == "stop"


def test_command_refuses(folders, tmp_path: Path) -> None:
    checkpoint, exported = folders
    cases = [
        ([tmp_path / "none", "--prompt", "a"], "no such checkpoint folder"),
        ([checkpoint, "--prompt", "a", "--backend", "onnx"], "sessa export"),
        ([checkpoint, "--prompt", "a", "--backend", "jax"], "backend is 'jax'"),
        ([exported, "--prompt", "a", "--device", "cuda"], "has no CUDA provider"),
        ([exported, "--prompt", "a", "--max-tokens", 300], "reads at most 300"),
        ([exported, "--prompt", "a", "--top-p", 2], "top_p is 2"),
        ([exported, "--prompt", "a", "--repetition-penalty", 0], "repetition_penalty is 0"),
        ([exported, "--prompt", "a", "--logit-bias", "the=2"], "expected ID=NUMBER"),
        ([exported, "--prompt", "a", "--logit-bias", "300=2"], "logit_bias is 300"),
        ([exported, "--prompt", "a", "--json-schema", tmp_path / "no.json"], r"no\.json"),
        ([exported, "--prompt", "a", "--prompt-file", "b"], "not both"),
        ([exported, "--prompt", "-", "--prompt", "-"], "only one"),
        ([exported, "--prompt-file", tmp_path / "none.txt"], r"none\.txt"),
    ]
    for arguments, message in cases:
        with pytest.raises(SessaError, match=message):
            command(*arguments)
