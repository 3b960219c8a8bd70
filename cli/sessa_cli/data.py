"""`sessa data`: write the examples of a task, or the stories of SimpleStories, as a data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sessa_cli.common import make_console, say
from sessa_common.data.simplestories import VALIDATION_FRACTION, write_stories
from sessa_common.data.task_registry import TASKS, new_task, parse_options
from sessa_common.data.tasks import write_task
from sessa_common.errors import SessaError

STORIES = "simplestories"


def data(
    name: Annotated[str, typer.Argument(help=f"{', '.join(TASKS)} or {STORIES}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    task_options: Annotated[
        list[str] | None,
        typer.Option("--task-option", help="Option of the task, as name=value; repeatable."),
    ] = None,
    train_examples: Annotated[
        int | None,
        typer.Option("--examples", help="Number of training examples of an endless task."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help=f"Source of {STORIES}: .parquet, .jsonl or .txt files, or hf:owner/name."
        ),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help=f"Share of {STORIES} that is held out.")
    ] = VALIDATION_FRACTION,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that is not empty.")
    ] = False,
) -> None:
    """Write the examples of a task, or the stories of SimpleStories, into a folder to train on.

    Example: sessa data symbolsoup --task-option max_tokens=800 --out data/soup; then
    sessa train --task data/soup

    Example: sessa data simplestories --data train.parquet --out data/stories; then
    sessa train --data data/stories/train.jsonl --text-field story
    """
    console = make_console()
    if name == STORIES:
        if task_options or train_examples is not None:
            raise SessaError(f"--task-option and --examples do not go with {STORIES}")
        train, held_out = write_stories(data or (), out, validation_fraction, force=force)
        say(console, f"wrote {out}: {train:,} training and {held_out:,} held-out stories")
        return
    if data:
        raise SessaError(f"--data goes with {STORIES}; {name} draws its own examples")
    task = new_task(name, parse_options(name, task_options or ()))
    written = write_task(task, out, train_examples, force=force)
    say(
        console,
        f"wrote {out}: {train_examples or task.train_examples:,} training, "
        f"{len(written.validation.tokens):,} validation, {len(written.test.tokens):,} test "
        f"examples of up to {task.context:,} tokens",
    )
