"""`sessa data tokenize`: from text on disk to tokens, and from the tokens to a resumed run."""

import json

from support.in_process import fails, sessa

from sessa_common.training.metrics import read_metrics

TINY = (
    *("--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--batch-size", 2),
    *("--backend", "torch", "--device", "cpu", "--evaluate-every", 0, "--warmup-steps", 1),
)


def test_tokenize_train_and_resume(tmp_path, capsys):
    text = "".join(json.dumps({"story": f"once {i} was {i * i}"}) + "\n" for i in range(150))
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.txt").write_text("another text\n" * 40)
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    tokenize = ("data", "tokenize", tmp_path / "a.jsonl", tokens, "--tokenizer", "bytes")
    assert "no field 'text'; it has story" in fails(capsys, *tokenize)
    assert not tokens.exists()
    assert sessa(*tokenize, "--text-field", "story") == 0
    assert f"wrote {tokens}: " in capsys.readouterr().out
    assert sessa("data", "verify", tokens) == 0
    mixture = ("--data", f"{tokens}:0.7", "--data", f"{tmp_path / 'b.txt'}:0.3")
    assert sessa("train", *mixture, *TINY, "--steps", 4, "--out", tmp_path / "whole") == 0
    assert sessa("train", *mixture, *TINY, "--steps", 4, "--out", run) == 0
    assert json.loads((run / "config.json").read_text())["vocab_size"] == 257
    assert sessa("train", "--resume", run, "--steps", 6, "--backend", "torch") == 0
    losses = [
        [record["loss"] for record in read_metrics(folder) if "loss" in record]
        for folder in (tmp_path / "whole", run)
    ]
    assert losses[0] == losses[1][:4] and len(losses[1]) == 6
    other = ("--data", f"{tokens}:0.6", "--data", f"{tmp_path / 'b.txt'}:0.4")
    said = fails(capsys, "train", "--resume", run, "--steps", 7, *other, "--backend", "torch")
    assert "data" in said
    half = ("--data", f"{tokens}:0.6", "--data", tmp_path / "b.txt")
    assert "none for" in fails(capsys, "train", *half, *TINY, "--out", tmp_path / "x")
