"""The part of `sessa generate` that continues the prompts of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sessa_cli.common import Stopwatch, make_console, print_json, say
from sessa_common.errors import SessaError
from sessa_common.inference.prompt_file import Progress as TextsProgress
from sessa_common.inference.prompt_file import PromptFile
from sessa_common.inference.texts import TextWriter


def open_lines(file: Path | None, output: Path | None, force: bool) -> PromptFile | None:
    """Read the file of prompts, if one is given; the three options need one another."""
    if (file is None) != (output is None):
        raise SessaError(
            "`file` and `output` need one another: lines, and the file for their texts"
        )
    if file is None or output is None:
        if force:
            raise SessaError("`force` is for the file of `output`")
        return None
    return PromptFile.open(file, output, force=force)


def write_lines(writer: TextWriter, lines: PromptFile, json_output: bool, **fields: Any) -> None:
    """Continue the prompts of a file, with a bar on stderr."""
    console = make_console(json_output=True)
    watch = Stopwatch()
    with Progress(
        TextColumn("texts"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_interactive,
    ) as bar:
        task = bar.add_task("", total=None, speed=0.0)

        def show(progress: TextsProgress) -> None:
            speed = progress.tokens / watch.seconds
            bar.update(task, total=progress.total, completed=progress.done, speed=speed)

        try:
            done = lines.complete(writer, on_progress=show, **fields)
        except KeyboardInterrupt:
            say(console, f"the finished texts are in {lines.partial}; the same command goes on")
            raise
    if json_output:
        made = {"texts": done.total, "tokens": done.tokens, "seconds": watch.seconds}
        print_json({"output": str(lines.target), **made})
    else:
        say(
            console,
            f"{done.total:,} texts in {lines.target}, {done.tokens / watch.seconds:,.0f} tokens/s",
        )
