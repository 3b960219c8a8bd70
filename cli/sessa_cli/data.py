"""`sessa data`: token folders, the examples of a task, or the stories of SimpleStories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sessa_cli.common import make_console, say
from sessa_cli.progress import TerminalReporter
from sessa_common.data.simplestories import VALIDATION_FRACTION, write_stories
from sessa_common.data.sources import TextSource
from sessa_common.data.task_registry import TASKS, new_task, parse_options
from sessa_common.data.tasks import write_task
from sessa_common.data.token_shards import TokenShards
from sessa_common.data.tokenization import SHARD_TOKENS, TokenizeRequest
from sessa_common.data.tokenization import tokenize as tokenize_text

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that is not empty.")]

data = typer.Typer(help="Prepare data once, to train on them many times.", no_args_is_help=True)


@data.command()
def tokenize(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, wildcards, hf:owner/name, pydoc or -.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    tokenizer: Annotated[
        str,
        typer.Option(help="A tokenizer.json, a model's folder, a BPE's size to train, or bytes."),
    ],
    text_field: Annotated[str, typer.Option(help="Field or column with the text.")] = (
        TextSource.text_field
    ),
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = (
        TextSource.split
    ),
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a Hugging Face data set.")
    ] = TextSource.subset,
    max_documents: Annotated[
        int, typer.Option(help="Read only the first documents; 0 for all.")
    ] = TextSource.max_documents,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens/--plain-special-tokens",
            help="Read the name of a special token in the text as the token.",
        ),
    ] = False,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a file.")] = SHARD_TOKENS,
    jobs: Annotated[int, typer.Option(help="Processes that tokenize.")] = 1,
) -> None:
    """Tokenize text once, into a folder that `sessa train --data` reads without holding it.

    A run that is interrupted goes on when the command is repeated.

    Example: sessa data tokenize "books/*.jsonl" data/books --tokenizer 32768 --jobs 8; then
    sessa train --data data/books
    """
    source = TextSource(
        text_field=text_field, split=split, subset=subset, max_documents=max_documents
    )
    request = TokenizeRequest(
        sources=tuple(sources),
        out=out,
        tokenizer=tokenizer,
        source=source,
        special_tokens=special_tokens,
        shard_tokens=shard_tokens,
        jobs=jobs,
    )
    console = make_console()
    with TerminalReporter(console, "") as reporter:
        shards = tokenize_text(request, reporter.preparing)
    for note in shards.notes:
        say(console, note)
    say(
        console,
        f"wrote {out}: {len(shards):,} tokens of {shards.documents:,} documents in "
        f"{len(shards.shards):,} files",
    )


@data.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of `sessa data tokenize`.")],
) -> None:
    """Read a folder of tokens and compare every file with its checksum."""
    shards = TokenShards(folder)
    shards.verify()
    say(make_console(), f"{folder}: {len(shards):,} tokens in {len(shards.shards):,} files, whole")


@data.command()
def simplestories(
    out: Out,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Source: .parquet, .jsonl or .txt files, or hf:owner/name."),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the stories that is held out.")
    ] = VALIDATION_FRACTION,
    force: Force = False,
) -> None:
    """Write the stories of SimpleStories as two files, one to train on and one held out.

    Example: sessa data simplestories --data train.parquet --out data/stories; then
    sessa train --data data/stories/train.jsonl --text-field story
    """
    train, held_out = write_stories(data or (), out, validation_fraction, force=force)
    say(make_console(), f"wrote {out}: {train:,} training and {held_out:,} held-out stories")


def _task_command(name: str) -> Callable[..., None]:
    def write(
        out: Out,
        task_options: Annotated[
            list[str] | None,
            typer.Option("--task-option", help="Option of the task, as name=value; repeatable."),
        ] = None,
        train_examples: Annotated[
            int | None,
            typer.Option("--examples", help="Number of training examples of an endless task."),
        ] = None,
        force: Force = False,
    ) -> None:
        task = new_task(name, parse_options(name, task_options or ()))
        written = write_task(task, out, train_examples, force=force)
        say(
            make_console(),
            f"wrote {out}: {train_examples or task.train_examples:,} training, "
            f"{len(written.validation.tokens):,} validation, {len(written.test.tokens):,} test "
            f"examples of up to {task.context:,} tokens",
        )

    write.__doc__ = f"""Write the examples of {name} into a folder to train on.

    Example: sessa data {name} --out data/{name}; then sessa train --task data/{name}
    """
    return write


for _name in TASKS:
    data.command(_name)(_task_command(_name))
