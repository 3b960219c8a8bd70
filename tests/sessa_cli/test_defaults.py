"""Defaults of the command line are those of the library, written down once."""

import dataclasses
import inspect

import pytest
import typer

from sessa_cli.main import app
from sessa_common import SessaConfig, TrainConfig, convert
from sessa_common.checkpoint.conversion import parse_size
from sessa_common.data.simplestories import write_stories
from sessa_common.data.tokenization import TokenizeRequest
from sessa_common.experiments.comparison import Comparison
from sessa_torch import evaluate

COMMANDS = typer.main.get_command(app).commands
LIBRARY = {
    "compare": Comparison,
    "convert": convert,
    "data simplestories": write_stories,
    "data tokenize": TokenizeRequest,
    "eval": evaluate,
}


def _options(command):
    name, *rest = command.split()
    found = COMMANDS[name].commands[rest[0]] if rest else COMMANDS[name]
    return {param.name: param.default for param in found.params}


@pytest.mark.parametrize("command", LIBRARY)
def test_a_default_that_help_shows_is_the_library_s(command):
    fields = inspect.signature(LIBRARY[command]).parameters
    shared = {name: value for name, value in _options(command).items() if name in fields}
    shown = {name: value for name, value in shared.items() if value not in (None, False)}
    assert shown
    for name, value in shown.items():
        default = fields[name].default
        if isinstance(default, tuple):
            value = tuple(type(default[0])(part) for part in value.split(","))
        elif name == "shard_size":
            value = parse_size(value)
        assert value == default, name


def test_training_has_no_defaults_of_its_own():
    fields = {f.name for cls in (SessaConfig, TrainConfig) for f in dataclasses.fields(cls)}
    given = {name: value for name, value in _options("train").items() if name in fields}
    assert len(given) > 20
    assert set(given.values()) <= {None}
