"""Benchmarks of lm-evaluation-harness: tasks on local files, the same scores from every runtime."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")
# Where mlx-lm has registered its model first, nothing else registers those of the harness.
pytest.importorskip("lm_eval.models")
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from support.export_models import small_config, write_checkpoint
from support.in_process import fails, sessa

import sessa_torch.hf  # noqa: F401 - registers the model for the harness's own `hf`
from sessa_common.errors import SessaError
from sessa_common.frameworks import framework
from sessa_common.inference import harness
from sessa_common.inference.harness import evaluate_tasks
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_export.exporter import Options, export_checkpoint
from sessa_export.runtime import load_decoder

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a rather long answer", "b"], "answer": 0},
    {"question": "One and one make", "choices": ["2", "3", "many apples"], "answer": 2},
    {"question": "Solve", "choices": ["it", "I will", "x"], "answer": 1},
]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two kinds of layers that every runtime has."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "m", small_config("hybrid"))[0]


@pytest.fixture(scope="module")
def tasks(folder, tmp_path_factory):
    """A folder of tasks; `writing` expects what the model writes, in PyTorch."""
    import sessa_torch

    path = tmp_path_factory.mktemp("tasks")
    prompts = [row["question"] for row in QUESTIONS]
    written = [
        sessa_torch.generate(folder, prompt, max_tokens=6, temperature=0)[0] for prompt in prompts
    ]
    long = "abcdefgh " * 50  # longer than the model's context
    rows = [
        {**row, "written": text, "text": row["question"] + long}
        for row, text in zip(QUESTIONS, written, strict=True)
    ]
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        data = f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        (path / f"{name}.yaml").write_text(head + data + text.lstrip())
    return path


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def expected(folder, tasks):
    """The metrics of the harness's own model for transformers."""
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32", "device": "cpu"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        log_samples=False,
    )
    return {
        name: {
            key.removesuffix(",none"): value for key, value in row.items() if key.endswith(",none")
        }
        for name, row in found["results"].items()
    }


def metrics(decoder, folder, tasks, **options):
    tokenizer = ModelTokenizer.open(folder, decoder.config, parse_special=True)
    found = evaluate_tasks(decoder, tokenizer, list(TASKS), include_path=tasks, **options)
    assert {score.documents for score in found.values()} == {3}
    return {name: dict(score.metrics) for name, score in found.items()}


@pytest.mark.parametrize("backend", ["torch", "mlx", "onnx"])
def test_every_runtime_has_the_scores_of_transformers(backend, folder, tasks, expected, tmp_path):
    if backend == "onnx":
        export_checkpoint(folder, tmp_path / "onnx", Options())
        decoder = load_decoder(tmp_path / "onnx")
    else:
        decoder = framework(backend, "decoding").load_decoder(folder, device="cpu")
    found = metrics(decoder, folder, tasks, batch_size=2)
    assert found.keys() == expected.keys() == TASKS.keys()
    assert found["writing"]["exact_match"] == 1
    for name, values in expected.items():
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        assert found[name] == pytest.approx(numbers, rel=1e-5, nan_ok=True), name


def test_the_command_prints_scores_and_json(folder, tasks, expected, capsys):
    options = ("--tasks", "choices", "--include-path", tasks, "--backend", "torch")
    assert sessa("eval", folder, *options, "--json") == 0
    row = json.loads(capsys.readouterr().out)["choices"]
    assert row["metrics"]["acc"] == expected["choices"]["acc"]
    assert (row["documents"], row["num_fewshot"]) == (3, 0)
    assert sessa("eval", folder, *options, "--max-documents", 2, "--num-fewshot", 1) == 0
    said = capsys.readouterr().out
    assert "acc_norm" in said and said.split()[-2:] == ["1", "2"]


def test_bad_requests_are_refused_by_name(folder, tasks, capsys, monkeypatch):
    said = fails(capsys, "eval", folder, "--tasks", "choices", "--stride", 2)
    assert "--stride has no effect with --tasks" in said
    assert "give --data or --tasks" in fails(capsys, "eval", folder)
    monkeypatch.setattr(harness, "is_installed", lambda name: False)
    said = fails(capsys, "eval", folder, "--tasks", "choices")
    assert "pip install 'sessa-toolchain[eval]'" in said


def test_tasks_that_cannot_run_are_refused(folder, tasks, monkeypatch):
    decoder = framework("torch", "decoding").load_decoder(folder, device="cpu")
    tokenizer = ModelTokenizer.open(folder, decoder.config, parse_special=True)
    text = (tasks / "writing.yaml").read_text().replace("task: writing", "task: wrong")
    for old, new, message in (
        ("toks: 6", "toks: 300", "asks for 300 new tokens"),
        ("do_sample: false", "num_beams: 2", "generation_kwargs have num_beams"),
    ):
        (tasks / "wrong.yaml").write_text(text.replace(old, new))
        with pytest.raises(SessaError, match=message):
            evaluate_tasks(decoder, tokenizer, ["wrong"], include_path=tasks)
    # Without the harness's own tasks, whose index takes seconds.
    own = TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: own)
    with pytest.raises(SessaError, match="no task is named 'nothing'"):
        evaluate_tasks(decoder, tokenizer, ["choices", "nothing"], include_path=tasks)
