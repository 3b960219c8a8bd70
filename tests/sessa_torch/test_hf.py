"""Sessa in transformers: generation in every mode, files, gradients, adapters; all offline."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from support.block_options import FAMILIES
from support.export_models import MAMBA, VARIANTS, small_config, write_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    dynamic_module_utils,
    pipeline,
)

import sessa_common
import sessa_torch
import sessa_torch.hf
from sessa_common.checkpoint.folder import load_config
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.remote_code import CODE_FILES, CODE_KEYS
from sessa_common.errors import SessaError
from sessa_common.inference.model_tokenizer import stop_tokens
from sessa_torch.checkpoint import load_model, model_weights
from sessa_torch.decoding import Decoder

NEW = 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KINDS = ("grouped", "untied", "hybrid", "sessa_transformer", "attention_gated", *MAMBA)
TRIMMABLE = tuple(kind for kind in KINDS if kind not in MAMBA)
PROMPTS = torch.tensor([[5, 71, 9, 200, 33, 4, 90], [1, 2, 66, 17, 120, 8, 250]])


def folder_of(tmp_path_factory, kind):
    return write_checkpoint(tmp_path_factory.mktemp(kind) / "model", small_config(kind))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint folder for each kind of model."""
    return {kind: folder_of(tmp_path_factory, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders):
    """The same models, loaded by transformers."""
    return {kind: AutoModelForCausalLM.from_pretrained(path) for kind, path in folders.items()}


@pytest.fixture(scope="module")
def expected(folders):
    """Greedy ids (B, NEW) of this project's own decoder after PROMPTS."""
    return {kind: greedy(path, PROMPTS.numpy()) for kind, path in folders.items()}


def greedy(folder, prompts):
    decoder = Decoder(load_model(folder, device="cpu"))
    logits, found = decoder.step(prompts), []
    for _ in range(NEW):
        found.append(logits.argmax(-1))
        logits = decoder.step(found[-1][:, None])
    return np.stack(found, 1)


def continued(model, prompts=PROMPTS, **options):
    return model.generate(prompts, **GREEDY, **options)[:, prompts.shape[1] :].numpy()


MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
    "static cache, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_the_tokens_of_sessa_generate(kind, mode, models, expected):
    assert np.array_equal(continued(models[kind], **MODES[mode]), expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_the_tokens_of_its_rows_alone(kind, models, folders, expected):
    short = PROMPTS[:1, :4]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    found = continued(models[kind], torch.cat([padded, PROMPTS[1:]]), attention_mask=mask)
    assert np.array_equal(found[:1], greedy(folders[kind], short.numpy()))
    assert np.array_equal(found[1:], expected[kind][1:])


@pytest.mark.parametrize("kind", KINDS)
def test_beams_reorder_the_cache(kind, models):
    cached, plain = (
        continued(models[kind], num_beams=3, num_return_sequences=2, use_cache=use)
        for use in (True, False)
    )
    assert np.array_equal(cached, plain) and len(cached) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_the_user_is_continued(kind, models, expected):
    cache, model = DynamicCache(), models[kind]
    first = model.generate(PROMPTS, **{**GREEDY, "max_new_tokens": 4}, past_key_values=cache)
    assert cache.get_seq_length() == PROMPTS.shape[1] + 3
    rest = model.generate(first, **{**GREEDY, "max_new_tokens": NEW - 4}, past_key_values=cache)
    assert np.array_equal(rest[:, PROMPTS.shape[1] :].numpy(), expected[kind])


@pytest.mark.parametrize("kind", TRIMMABLE)
def test_drafts_leave_the_tokens_as_they_are(kind, models, expected):
    model, one = models[kind], PROMPTS[:1]
    assert np.array_equal(continued(model, one, prompt_lookup_num_tokens=3), expected[kind][:1])
    found = continued(model, one, assistant_model=models["grouped"])
    assert np.array_equal(found, expected[kind][:1])


@pytest.mark.parametrize("kind", MAMBA)
def test_drafts_are_refused_where_a_mamba2_state_cannot_be_rolled_back(kind, models):
    with pytest.raises(SessaError, match="the model has a Mamba-2 layer"):
        continued(models[kind], PROMPTS[:1], prompt_lookup_num_tokens=3)
    with pytest.raises(SessaError, match="the assistant model has a Mamba-2 layer"):
        continued(models["grouped"], PROMPTS[:1], assistant_model=models[kind])


def test_a_mamba2_cache_is_cropped_in_no_layer(models):
    with torch.no_grad():
        cache = models["mamba2_hybrid"](PROMPTS).past_key_values
    with pytest.raises(SessaError, match="Mamba-2"):
        cache.crop(-2)
    assert cache.layers[0].held.k.length == cache.get_seq_length() == PROMPTS.shape[1]


@pytest.mark.parametrize("kind", ["hybrid", "mamba2_hybrid"])
def test_embeddings_stand_for_token_ids(kind, models, expected):
    model = models[kind]
    found = model.generate(inputs_embeds=model.get_input_embeddings()(PROMPTS), **GREEDY)
    assert np.array_equal(found.numpy(), expected[kind])


def test_bad_inputs_are_refused_by_name(models):
    model, other = models["grouped"], DynamicCache()
    other.update(torch.zeros(2, 2, 3, 10), torch.zeros(2, 2, 3, 10), 0)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(2, -1)
    for arguments, message in (
        ({"past_key_values": other}, "filled by another model"),
        ({"position_ids": packed}, "position_ids do not rise by 1"),
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, "attention_mask has 4 axes"),
        ({"output_hidden_states": True}, "output_hidden_states is true"),
        ({"inputs_embeds": torch.zeros(2, 7, 40)}, "either input_ids or inputs_embeds"),
    ):
        with pytest.raises(SessaError, match=message):
            model(PROMPTS, **arguments)


def test_a_constant_offset_of_positions_changes_nothing(models):
    model = models["hybrid"]
    with torch.no_grad():
        moved = model(PROMPTS, position_ids=torch.arange(5, 12)[None]).logits
        assert torch.equal(moved, model(PROMPTS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_a_checkpoint_of_this_project(kind, models, folders, tmp_path):
    models[kind].save_pretrained(tmp_path)
    assert load_config(tmp_path) == load_config(folders[kind])
    before, after = (model_weights(load_model(f, device="cpu")) for f in (folders[kind], tmp_path))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_the_block_are_kept(family, tmp_path):
    config = small_config("grouped", hidden_size=24, **FAMILIES[family])
    folder, _ = write_checkpoint(tmp_path / "model", config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert np.array_equal(continued(model), greedy(folder, PROMPTS.numpy()))
    model.save_pretrained(tmp_path / "saved")
    assert load_config(tmp_path / "saved") == load_config(folder) == config


def test_several_end_tokens_are_kept(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["grouped"], eos_token_id=[9, 256])
    assert model.architecture.eos_token_id == 9
    model.save_pretrained(tmp_path)
    assert load_config(tmp_path).eos_token_id == 9
    assert stop_tokens(tmp_path, load_config(tmp_path)) == {9, 256}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [9, 256]


def test_a_folder_with_a_manifest_is_not_overwritten(models, folders):
    before = {path.name: path.read_bytes() for path in folders["grouped"].iterdir()}
    with pytest.raises(SessaError, match="save into another"):
        models["grouped"].save_pretrained(folders["grouped"])
    assert before == {path.name: path.read_bytes() for path in folders["grouped"].iterdir()}


def test_a_folder_quantised_by_mlx_is_refused_and_its_conversion_loads(tmp_path):
    source, _ = write_checkpoint(tmp_path / "model", small_config("heads", hidden_size=64))
    sessa_common.convert(source, tmp_path / "packed", bits=4, group_size=32)
    with pytest.raises(SessaError, match="convert the folder with `framework` torch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    assert tokenizer.decode(tokenizer("solve")["input_ids"]) == "solve"
    sessa_common.convert(tmp_path / "packed", tmp_path / "plain", framework="torch")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    expected = load_model(tmp_path / "packed", device="cpu")
    with torch.no_grad():
        assert torch.equal(found(PROMPTS).logits, expected(PROMPTS))


def test_exact_parameters_stay_in_float32_in_a_bfloat16_model(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["mamba2_hybrid"], dtype="bfloat16")
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"gamma_bias", "dt_bias", "A_log", "D"}
    reference = load_model(folders["mamba2_hybrid"], dtype="bfloat16", device="cpu")
    with torch.no_grad():
        assert torch.equal(model(PROMPTS).logits, reference(PROMPTS))


@pytest.mark.parametrize("kind", ["untied", "mamba2_hybrid"])
def test_a_new_model_starts_as_sessa_starts(kind, monkeypatch):
    seeds = []

    def draw(config, seed):
        seeds.append(seed)
        return initial_weights(config, seed)

    def new_weights(seed):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        return {name: p.detach().numpy() for name, p in model.named_parameters()}

    monkeypatch.setattr(sessa_torch.hf, "initial_weights", draw)
    config = sessa_torch.hf.SessaConfig(**small_config(kind).to_dict())
    first, again, other = new_weights(3), new_weights(3), new_weights(4)
    weights = initial_weights(small_config(kind), seeds[0])
    assert first.keys() == weights.keys()
    assert all(np.array_equal(first[name], weights[name]) for name in weights)
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(np.array_equal(first[name], again[name]) for name in weights)
    assert not np.array_equal(
        first["model.embed_tokens.weight"], other["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("kind", ["hybrid", "mamba2_hybrid"])
def test_gradient_checkpointing_changes_no_gradient(kind, folders):
    def gradients(checkpointing):
        model = AutoModelForCausalLM.from_pretrained(folders[kind]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(PROMPTS, labels=PROMPTS).loss.backward()
        assert model.model.checkpoint_layers == checkpointing
        return [p.grad for p in model.parameters()]

    pairs = zip(gradients(False), gradients(True), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_is_the_cross_entropy_of_the_next_token(models):
    model = models["grouped"]
    with torch.no_grad():
        found = model(PROMPTS, labels=PROMPTS)
    targets = PROMPTS[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), targets)
    assert torch.allclose(found.loss, loss)


def test_pipeline_writes_the_text_of_sessa_generate(folders, models):
    tokenizer = AutoTokenizer.from_pretrained(folders["grouped"])
    pipe = pipeline("text-generation", model=models["grouped"], tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    found = pipe("The lazy dog", **options)[0]["generated_text"]
    want = sessa_torch.generate(folders["grouped"], "The lazy dog", max_tokens=8, temperature=0)
    assert [found] == want


FRESH = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({0!r}, trust_remote_code=True)
print(type(model).__module__, type(model).__name__)
model.save_pretrained({1!r})
"""


@pytest.mark.slow
def test_a_new_process_finds_the_installed_package(models, tmp_path):
    models["hybrid"].save_pretrained(tmp_path / "saved")
    code = FRESH.format(str(tmp_path / "saved"), str(tmp_path / "again"))
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["sessa_torch.hf", "SessaForCausalLM"]
    first, second = tmp_path / "saved", tmp_path / "again"
    for name in CODE_FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert not (second / "hf.py").exists()
    assert AutoConfig.from_pretrained(second).auto_map == AutoConfig.from_pretrained(first).auto_map


def remote_class(folder, tmp_path, monkeypatch):
    """The class of a model that the code files of a folder name, found as transformers does."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    name = CODE_KEYS["auto_map"]["AutoModelForCausalLM"]
    return dynamic_module_utils.get_class_from_dynamic_module(name, str(folder))


def test_the_file_in_the_folder_finds_the_installed_package(folders, tmp_path, monkeypatch):
    found = remote_class(folders["hybrid"], tmp_path, monkeypatch)
    assert found is sessa_torch.hf.SessaForCausalLM


def test_without_the_package_the_message_says_how_to_install_it(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sessa_torch.hf", None)
    with pytest.raises(ImportError, match=r"pip install 'sessa-toolchain\[transformers\]'"):
        remote_class(folders["hybrid"], tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["hybrid", "mamba2_hybrid"])
def test_offloaded_layers_give_the_same_logits(kind, folders, models, tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(3)}
    model = AutoModelForCausalLM.from_pretrained(
        folders[kind],
        device_map={**places, "model.layers.0": "disk", "model.layers.2": "disk"},
        offload_folder=tmp_path,
    )
    with torch.no_grad():
        assert torch.equal(model(PROMPTS).logits, models[kind](PROMPTS).logits)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["hybrid", "mamba2_hybrid"])
def test_an_adapter_trains_and_its_merged_folder_is_a_checkpoint(kind, dora, folders, tmp_path):
    peft = pytest.importorskip("peft")

    def load():
        return AutoModelForCausalLM.from_pretrained(folders[kind])

    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.1, "use_dora": dora}
    model = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()
    model.gradient_checkpointing_enable()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, 1e-2), []
    for _ in range(4):
        losses.append(model(PROMPTS, labels=PROMPTS).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in weights)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model.eval()(PROMPTS).logits
        assert torch.equal(adapted(PROMPTS).logits, logits)
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = load_model(tmp_path / "merged", device="cpu")(PROMPTS)
    assert torch.allclose(merged, logits, atol=1e-4)


def test_trainer_takes_steps_and_resumes(folders, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def train(steps, resume=None):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            report_to=[],
            use_cpu=True,
            seed=0,
        )
        rows = [{"input_ids": row, "labels": row} for row in PROMPTS.repeat(4, 1)]
        model = AutoModelForCausalLM.from_pretrained(folders["hybrid"])
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.log_history[-1]["train_loss"], tmp_path / f"out/checkpoint-{steps}"

    first, folder = train(2)
    assert first > 0
    assert load_config(folder) == load_config(folders["hybrid"])
    _, longer = train(4, str(folder))
    changed, before = (model_weights(load_model(f, device="cpu")) for f in (longer, folder))
    assert any(not np.array_equal(changed[name], before[name]) for name in before)


def test_every_kind_of_layer_is_among_the_kinds_here():
    named = {kind.name for name in KINDS for kind in small_config(name).kinds}
    everything = {kind.name for name in VARIANTS | MAMBA for kind in small_config(name).kinds}
    assert named == everything
