"""Prompt caches and speculative decoding as the command and the Python function offer them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from support.export_models import small_config, write_checkpoint
from typer.testing import CliRunner

import sessa_mlx
import sessa_torch
from sessa_cli.generate import generate as generate_command
from sessa_common.data.tokenizer import train_bpe, write_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.shortcuts import Shortcuts
from sessa_export.exporter import export_checkpoint

TEXT = "A prompt cache keeps what a model has read of a text"
WRITE = ["--max-tokens", 30, "--temperature", 0]
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(generate_command)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shortcuts")
    config = small_config("untied", num_key_value_heads=2)
    write_checkpoint(root / "model", config)
    export_checkpoint(root / "model", root / "exported")
    write_checkpoint(root / "draft", small_config("single_head", hidden_size=16))
    export_checkpoint(root / "draft", root / "exported draft")
    write_checkpoint(root / "hybrid", small_config("mamba2_hybrid"))
    write_checkpoint(root / "other tokens", config)
    write_tokenizer(root / "other tokens", train_bpe(["some text"], 257), 0, 300)
    return {path.name: path for path in root.iterdir()}


def run(*arguments: object) -> tuple[str, str]:
    """Texts that the command writes to stdout and to stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception:
        raise result.exception
    return result.stdout, result.stderr


BACKENDS = [("torch", "model"), ("mlx", "model"), ("onnx", "exported")]


def test_rules_that_do_not_fit_are_refused_before_a_cache_is_written(folders, tmp_path) -> None:
    file = tmp_path / "text.safetensors"
    fields = {"save_prompt_cache": file, "logit_bias": {999: 1.0}}
    for package in (sessa_torch, sessa_mlx):
        with pytest.raises(SessaError, match="logit_bias"):
            package.generate(folders["model"], TEXT, **fields)
    with pytest.raises(SessaError, match="logit_bias"):
        run(folders["model"], "--logit-bias", "999=1", "--save-prompt-cache", file)
    assert not file.exists()


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_the_command_saves_and_continues_a_prompt(backend, name, folders, tmp_path) -> None:
    file, model = tmp_path / "text.safetensors", [folders[name], "--backend", backend, *WRITE]
    want, _ = run(*model, "--prompt", TEXT)
    saved, _ = run(*model, "--prompt", TEXT, "--save-prompt-cache", file)
    assert saved == want
    again, told = run(*model, "--prompt", TEXT, "--prompt-cache", file)
    assert again == want and "the prompt cache holds 51 of 52 tokens of the prompt" in told
    # Without a prompt the cached text itself goes on.
    assert TEXT + run(*model, "--prompt-cache", file)[0] == want
    longer, told = run(*model, "--prompt", f"{TEXT}, and", "--prompt-cache", file)
    assert longer == run(*model, "--prompt", f"{TEXT}, and")[0]
    assert "holds 51 of 57 tokens" in told
    changed, told = run(*model, "--prompt", f"{TEXT[:20]}!", "--prompt-cache", file)
    assert changed == run(*model, "--prompt", f"{TEXT[:20]}!")[0]
    assert "holds 20 of 21 tokens" in told


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_stack_with_mamba2_goes_on_or_reads_anew(backend, folders, tmp_path) -> None:
    file, model = tmp_path / "a.safetensors", [folders["hybrid"], "--backend", backend, *WRITE]
    want, _ = run(*model, "--prompt", TEXT, "--save-prompt-cache", file)
    again, told = run(*model, "--prompt", TEXT, "--prompt-cache", file)
    assert again == want and "holds 51 of 52 tokens" in told
    changed, told = run(*model, "--prompt", TEXT[:20], "--prompt-cache", file)
    assert changed == run(*model, "--prompt", TEXT[:20])[0]
    assert "read from its beginning" in told and "Mamba-2" in told


def test_a_cache_grows_from_file_to_file(folders, tmp_path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    run(folders["model"], *WRITE, "--prompt", TEXT, "--save-prompt-cache", first)
    both = ["--prompt-cache", first, "--save-prompt-cache", second]
    want, _ = run(folders["model"], *WRITE, "--prompt", f"{TEXT} more", *both)
    again, told = run(folders["model"], *WRITE, "--prompt-cache", second)
    assert f"{TEXT} more{again}" == want and "holds 56 of 57 tokens" in told


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
@pytest.mark.parametrize("how", ["--draft-model", "--prompt-lookup"])
@pytest.mark.parametrize("sampling", [["--temperature", 0], ["--temperature", 0.9, "--seed", 3]])
def test_the_command_speculates(backend, name, how, sampling, folders) -> None:
    draft = folders["exported draft" if backend == "onnx" else "draft"]
    options = ["--draft-model", draft, "--draft-tokens", 3]
    if how == "--prompt-lookup":
        options = ["--prompt-lookup", 3]
    model = [folders[name], "--backend", backend, "--max-tokens", 40, *sampling]
    prompts = ["--prompt", TEXT, "--prompt", "abcabcabc"]
    want, _ = run(*model, *prompts)
    got, told = run(*model, *prompts, *options)
    assert got == want and "guessed tokens were right" in told
    answer = json.loads(run(*model, *prompts, *options, "--json")[0])
    counts = answer["speculation"]
    assert counts["acceptance_rate"] == counts["accepted"] / max(counts["guessed"], 1)
    # Each text begins with one token that is drawn before there is anything to guess.
    written = sum(text["tokens"] for text in answer["texts"])
    assert 2 + counts["rounds"] + counts["accepted"] >= written > 30


def test_rules_on_logits_hold_while_guessing(folders) -> None:
    model = [folders["model"], *WRITE, "--prompt", TEXT, "--backend", "torch"]
    rules = ["--repetition-penalty", 1.3, "--frequency-penalty", 0.2, "--logit-bias", "101=-inf"]
    want, _ = run(*model, *rules)
    assert want != run(*model)[0] and "e" not in want[len(TEXT) :]
    assert run(*model, *rules, "--prompt-lookup", 4)[0] == want
    assert run(*model, *rules, "--draft-model", folders["model"])[0] == want


def test_guessing_goes_on_behind_a_prompt_cache(folders, tmp_path) -> None:
    file, model = tmp_path / "a.safetensors", [folders["model"], *WRITE]
    want, _ = run(*model, "--prompt", TEXT, "--save-prompt-cache", file)
    guess = ["--draft-model", folders["model"], "--draft-tokens", 5, "--json"]
    answer = json.loads(run(*model, "--prompt", TEXT, "--prompt-cache", file, *guess)[0])
    assert TEXT + answer["texts"][0]["text"] + "\n" == want
    # The model guesses its own tokens from the whole text, the cached part included.
    assert answer["speculation"]["acceptance_rate"] == 1


@pytest.mark.parametrize("twin", [sessa_torch, sessa_mlx])
def test_python_has_the_same_shortcuts(twin, folders, tmp_path) -> None:
    options, file = {"max_tokens": 30, "temperature": 0}, tmp_path / "a.safetensors"
    (want,) = twin.generate(folders["model"], TEXT, **options)
    for shortcut in (
        {"save_prompt_cache": file},
        {"prompt_cache": file},
        {"prompt_lookup": 4},
        {"draft_model": folders["draft"], "draft_tokens": 2, "prompt_cache": file},
    ):
        assert twin.generate(folders["model"], TEXT, **options, **shortcut) == [want]
    model = twin.load_model(folders["model"])
    assert twin.generate(model, TEXT, tokenizer=folders["model"], prompt_lookup=4, **options) == [
        want
    ]
    with pytest.raises(SessaError, match="give its folder, not a model in memory"):
        twin.generate(model, TEXT, tokenizer=folders["model"], prompt_cache=file)


REFUSED = {
    "two guessers": (["--draft-model", "{draft}", "--prompt-lookup", 3], "give one of them"),
    "number": (["--prompt-lookup", -1], "prompt_lookup is -1"),
    "draft tokens": (["--draft-model", "{draft}", "--draft-tokens", 0], "draft_tokens is 0"),
    "no draft": (["--draft-model", "{draft}s"], "no such folder for `draft_model`"),
    "draft of Mamba-2": (["--draft-model", "{hybrid}"], r"draft model .* is mamba2, whose state"),
    "other tokens": (["--draft-model", "{other tokens}"], "differs from the model's at token id 0"),
    "two prompts": (["--prompt", "b", "--prompt-cache", "{file}"], "one prompt; 2 were given"),
    "no cache": (["--prompt-cache", "{file}s"], "no such file"),
    "no place": (["--save-prompt-cache", "{file}s/a"], "there is no folder"),
    "a folder": (["--save-prompt-cache", "{draft}"], "is a folder"),
    "too long": (["--prompt-cache", "{file}", "--max-tokens", 300], "reads at most 300"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_the_command_refuses(options, message, folders, tmp_path, monkeypatch) -> None:
    file = tmp_path / "cache.safetensors"
    run(folders["model"], *WRITE, "--prompt", TEXT, "--save-prompt-cache", file)
    names = {**{name: str(path) for name, path in folders.items()}, "file": str(file)}
    given = [str(option).format(**names) for option in options]
    monkeypatch.setattr(sessa_torch.SessaForCausalLM, "forward", None)  # nothing is computed
    with pytest.raises(SessaError, match=message):
        run(folders["model"], "--backend", "torch", "--prompt", "a", *given)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exported", "the prompt cache of another model"),
        ("hybrid", "the prompt cache of another model"),
        ("other tokens", "the prompt cache of another tokenizer"),
    ],
)
def test_a_cache_of_another_model_is_refused(name, message, folders, tmp_path) -> None:
    file = tmp_path / "cache.safetensors"
    run(folders["model"], *WRITE, "--prompt", TEXT, "--save-prompt-cache", file)
    with pytest.raises(SessaError, match=message):
        run(folders[name], *WRITE, "--prompt", TEXT, "--prompt-cache", file)


def test_a_model_with_mamba2_cannot_check_guesses(folders) -> None:
    with pytest.raises(SessaError, match="layer 1 of the model is mamba2, whose state cannot be"):
        run(folders["hybrid"], *WRITE, "--prompt", TEXT, "--prompt-lookup", 3)


def test_shortcuts_are_off_by_default() -> None:
    assert not Shortcuts().guesses and not Shortcuts().caches
