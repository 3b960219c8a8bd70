"""Options that `sessa generate` and `sessa chat` share, and the rules that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_cli.common import given_fields
from sessa_common.errors import SessaError
from sessa_common.fields import build
from sessa_common.inference.logit_rules import LogitRules
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.shortcuts import Shortcuts
from sessa_common.json_files import read_json

Checkpoint = Annotated[
    Path, typer.Argument(help="Checkpoint folder, or a folder that sessa export wrote.")
]
System = Annotated[str | None, typer.Option(help="System message of the conversation.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token. Default: 0.8.")
]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Keep the likeliest tokens that reach this probability.")
]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens below this share of the likeliest one's.")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the sampling; the same seed gives the same text.")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Make tokens of the prompt and the text less likely; 1 is off."),
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtract this from the logits of tokens in the text.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtract this for every time that the text has a token.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(help="ID=NUMBER to add to a token's logit, -inf to forbid it; repeatable."),
]
JsonSchema = Annotated[
    Path | None, typer.Option(help="File with a JSON schema that the text must follow.")
]
PromptCache = Annotated[
    Path | None,
    typer.Option(help="File that --save-prompt-cache wrote: what it holds is not read again."),
]
SavePromptCache = Annotated[
    Path | None,
    typer.Option(help="File for the cache of what was read: of a prompt, or of a whole chat."),
]
DraftModel = Annotated[
    Path | None,
    typer.Option(help="Folder of a smaller model of the same vocabulary that guesses tokens."),
]
DraftTokens = Annotated[
    int | None, typer.Option(help="Tokens that the draft model guesses at once. Default: 4.")
]
PromptLookup = Annotated[
    int | None, typer.Option(help="Guess so many tokens at once from earlier places in the text.")
]
Backend = Annotated[str | None, typer.Option(help="auto, torch, mlx or onnx (an exported folder).")]
Device = Annotated[
    str | None, typer.Option(help="Device of the framework, such as cpu, cuda, mps, gpu.")
]
Dtype = Annotated[
    str | None, typer.Option(help="Type to compute in. Default: the type of the checkpoint.")
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="Folder that sessa finetune wrote for this model, or PEFT or mlx-lm."),
]
NoGraphs = Annotated[
    bool,
    typer.Option(
        "--no-graphs", help="torch on CUDA: start every kernel from Python, for debugging."
    ),
]
Native = Annotated[
    bool,
    typer.Option("--native", help="onnx: use the native operator that sessa build-op compiled."),
]


def read_sampling(params: dict[str, Any]) -> SamplingConfig:
    """The sampling that the options of a command ask for."""
    return build(SamplingConfig, given_fields(params, SamplingConfig))


def read_rules(params: dict[str, Any]) -> LogitRules:
    """The rules on logits that the options of a command ask for."""
    fields = given_fields(params, LogitRules)
    if "logit_bias" in fields:
        fields["logit_bias"] = dict(_bias(text) for text in fields["logit_bias"])
    if "json_schema" in fields:
        fields["json_schema"] = read_json(fields["json_schema"])
    return build(LogitRules, fields)


def read_shortcuts(params: dict[str, Any]) -> Shortcuts:
    """The caches and the way of guessing tokens that the options of a command ask for."""
    return build(Shortcuts, given_fields(params, Shortcuts))


def _bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise SessaError(f"`logit_bias` is {text!r}, expected ID=NUMBER, such as 17=-5") from None
