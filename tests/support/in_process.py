"""The command `sessa` in this process."""

import pytest

from sessa_cli.main import main


def sessa(*arguments):
    """Run the command; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def fails(capsys, *arguments):
    """Run a command that must refuse its input; the one line that it says."""
    capsys.readouterr()
    assert sessa(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err
