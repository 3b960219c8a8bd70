"""The command `sessa`."""

from __future__ import annotations

import functools
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from sessa_cli.build_op import build_op
from sessa_cli.chat import chat
from sessa_cli.check import check
from sessa_cli.common import BAD_INPUT, DIVERGED, INTERRUPTED
from sessa_cli.compare import compare
from sessa_cli.convert import convert
from sessa_cli.data import data
from sessa_cli.eval import evaluate
from sessa_cli.export import export
from sessa_cli.finetune import finetune
from sessa_cli.foreign_errors import foreign_message
from sessa_cli.generate import generate
from sessa_cli.home_paths import expand_home
from sessa_cli.influence import influence
from sessa_cli.info import info
from sessa_cli.messages import name_options, options_of
from sessa_cli.old_options import rename_options
from sessa_cli.selftest import selftest
from sessa_cli.serve import serve
from sessa_cli.terminal import printable, safe_output
from sessa_cli.train import train
from sessa_common import __version__
from sessa_common.errors import DivergedError, SessaError

app = typer.Typer(
    name="sessa",
    help="Train, convert, generate with and deploy Sessa sequence models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(finetune)
app.add_typer(data, name="data")
app.command()(compare)
app.command()(influence)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command("eval")(evaluate)
app.command()(convert)
app.command()(export)
app.command()(check)
app.command()(info)
app.command("build-op")(build_op)
app.command()(selftest)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"sessa {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: bad input is one line on stderr and exit code 2, Ctrl-C is 130.

    Training that met a loss which is not finite is one line and exit code 3.
    """
    given = expand_home(sys.argv[1:] if arguments is None else arguments)
    with safe_output() as out:
        try:
            _command()(args=rename_options(given), prog_name="sessa")
        except SystemExit as ended:
            out.flush()
            if not ended.code and out.lost:
                _refuse(f"standard output could not be written ({out.lost})")
            raise
        except SessaError as error:
            code = DIVERGED if isinstance(error, DivergedError) else BAD_INPUT
            _refuse(name_options(str(error), _options(given)), code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BaseException as error:
            if (message := foreign_message(error)) is None:
                raise
            _refuse(message)


@functools.cache
def _command() -> Any:
    """The command with its subcommands, which takes Typer a while to make."""
    return get_command(app)


def _options(arguments: list[str]) -> dict[str, str]:
    """The options of the command that was called, by field."""
    command = _command()
    for word in arguments:
        if not hasattr(command, "commands"):
            break
        command = command.commands.get(word, command)
    return options_of(command)


def _refuse(message: str, code: int = BAD_INPUT) -> NoReturn:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
