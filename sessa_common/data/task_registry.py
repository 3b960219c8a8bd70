"""The registry of tasks: a new task is added to TASKS; names and folders are resolved here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sessa_common.data.mqar import DiffuseMqar
from sessa_common.data.symbolsoup import SymbolSoup
from sessa_common.data.tasks import (
    SPLITS,
    TASK,
    Task,
    TaskData,
    make_data,
    options_of,
    read_examples,
)
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json

# A task is a frozen dataclass that follows the protocol `sessa_common.data.tasks.Task`.
TASKS: dict[str, type[Task]] = {task.name: task for task in (SymbolSoup, DiffuseMqar)}


def new_task(name: str, options: Mapping[str, Any]) -> Task:
    """Build the task of that name; SessaError for an unknown name, option or value."""
    if name not in TASKS:
        raise SessaError(
            f"task is {name!r}, expected {', '.join(TASKS)} or a folder written by sessa data"
        )
    defaults = options_of(TASKS[name]())
    if unknown := sorted(options.keys() - defaults.keys()):
        raise SessaError(f"{name}: unknown option {unknown[0]}; known: {', '.join(defaults)}")
    for option, value in options.items():
        default = defaults[option]
        if not isinstance(value, (int, float) if isinstance(default, float) else type(default)):
            raise SessaError(f"{name}: {option} is {value!r}, expected a value like {default!r}")
    return TASKS[name](**options)


def parse_options(name: str, given: Sequence[str]) -> dict[str, Any]:
    """Read "name=value" texts as options, in the types of the task's defaults."""
    defaults = options_of(new_task(name, {}))
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise SessaError(f"task option is {text!r}, expected name=value")
        # An unknown key keeps its text here; `new_task` refuses it.
        options[key] = _parse(value, defaults.get(key, ""), text)
    return options


def _parse(value: str, default: Any, text: str) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(int(part) for part in re.split("[,:]", value))
        return type(default)(value)
    except (KeyError, ValueError):
        kind = "true or false" if isinstance(default, bool) else f"a value like {default!r}"
        raise SessaError(f"task option is {text!r}, expected {kind}") from None


def read_task(spec: str, options: Sequence[str] = ()) -> Task:
    """Return the task of a name and options, or of a folder written by `write_data`."""
    if not (Path(spec) / TASK).is_file():
        return new_task(spec, parse_options(spec, options))
    path = Path(spec) / TASK
    if options:
        raise SessaError(f"{path} already holds the options of the task; leave `task_options` out")
    stored = read_json(path)
    if not isinstance(found := stored.get("options"), dict):
        raise SessaError(f"{path}: it has no options, so `sessa data` did not write it")
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }
    task = new_task(str(stored.get("task")), given)
    if list(task.vocabulary) != stored.get("vocabulary"):
        raise SessaError(
            f"{path}: the vocabulary is not that of {task.name}; make the data again with "
            "`sessa data`"
        )
    return task


def load_data(spec: str, options: Sequence[str] = ()) -> TaskData:
    """Draw the data of a task's name and options, or read a folder written by `write_data`."""
    task, folder = read_task(spec, options), Path(spec)
    if not (folder / TASK).is_file():
        return make_data(task)
    train, validation, test = (
        read_examples(folder / f"{split}.safetensors", task) for split in SPLITS
    )
    return TaskData(task, train, validation, test)
