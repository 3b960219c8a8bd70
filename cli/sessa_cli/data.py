"""`sessa data`: a task's examples, or SimpleStories, as a folder to train on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sessa_cli.common import make_console, say
from sessa_common.checkpoint.folder import new_folder
from sessa_common.data.sources import Reading, read_documents
from sessa_common.data.tasks import known_tasks, make_data, new_task, parse_options, write_data
from sessa_common.errors import SessaError

STORIES, STORY_COLUMN = "simplestories", "story"


def data(
    name: Annotated[str, typer.Argument(help=f"{', '.join(known_tasks())} or {STORIES}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    task_options: Annotated[
        list[str] | None, typer.Option("--task-option", help="name=value of the task; repeatable.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Training examples of an endless task.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--data", help=f"{STORIES}: .parquet, .jsonl or .txt files, or a hub id."),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help=f"{STORIES}: share of the stories that is held out.")
    ] = 0.01,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder not empty.")] = False,
) -> None:
    """Write the examples of a task, or the stories of SimpleStories, into a folder.

    Example: sessa data symbolsoup --task-option max_tokens=800 --out data/soup; then
    sessa train --task data/soup

    Example: sessa data simplestories --data train.parquet --out data/stories; then
    sessa train --data data/stories/train.jsonl --text-field story
    """
    console = make_console()
    if name == STORIES:
        if task_options or examples is not None:
            raise SessaError("--task-option and --examples do not go with simplestories")
        counts = write_stories(source or (), out, validation_fraction, force=force)
        say(console, f"wrote {out}: {counts[0]:,} training and {counts[1]:,} held-out stories")
        return
    if source:
        raise SessaError(f"--data is for {STORIES}; {name} makes its own")
    if examples is not None and examples < 1:
        raise SessaError(f"--examples is {examples}, expected 1 or more")
    task = new_task(name, parse_options(name, task_options or ()))
    if task.train_examples and examples is not None:
        raise SessaError(f"{name} has a training set: use --task-option train_examples={examples}")
    if not (task.train_examples or examples):
        raise SessaError(f"{name} is endless: say how many training examples with --examples")
    made = make_data(task, examples)
    write_data(made, out, force=force)
    say(console, f"wrote {out}: {examples or task.train_examples:,} training, "
                 f"{len(made.validation.tokens):,} validation, {len(made.test.tokens):,} test "
                 f"examples of up to {task.context:,} tokens")  # fmt: skip


def write_stories(
    names: Iterable[str], out: Path, held_out: float, *, force: bool = False
) -> tuple[int, int]:
    """Write train.jsonl and validation.jsonl with one story a line; the numbers of stories.

    A story's own checksum decides its file, so that the same story is never in both. Raises
    SessaError for a source without the column "story" and when either file would be empty.
    """
    names = tuple(names)
    if not names:
        raise SessaError(f"{STORIES} needs --data: files, or SimpleStories/SimpleStories")
    if not 0 < held_out < 1:
        raise SessaError(f"--validation-fraction is {held_out}, expected between 0 and 1")
    counts = [0, 0]
    with new_folder(out, force=force) as scratch:
        paths = (scratch / "train.jsonl", scratch / "validation.jsonl")
        with (
            paths[0].open("w", encoding="utf-8") as train,
            paths[1].open("w", encoding="utf-8") as validation,
        ):
            for story in read_documents(names, Reading(text_field=STORY_COLUMN)):
                held = zlib.crc32(story.encode()) < held_out * 2**32
                line = json.dumps({STORY_COLUMN: story}, ensure_ascii=False)
                (validation if held else train).write(line + "\n")
                counts[held] += 1
        if not all(counts):
            raise SessaError(
                f"{counts[0]} training and {counts[1]} held-out stories: there are too few; give "
                "more, or another --validation-fraction"
            )
    return counts[0], counts[1]
