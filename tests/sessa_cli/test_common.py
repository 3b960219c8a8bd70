"""What every command prints: text as it is, and JSON that is JSON."""

import json

import pytest
from rich.table import Table

from sessa_cli.common import make_console, print_json, say

NAME = "[red]a[/red] [1] :smile:"


def test_brackets_and_colons_in_names_are_printed_as_they_are(capsys):
    console = make_console()
    table = Table("name")
    table.add_row(NAME)
    say(console, NAME)
    console.print(NAME)
    console.print(table)
    assert capsys.readouterr().out.count(NAME) == 3


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_json_has_no_word_for_are_null(number, capsys):
    bad = float(number)
    print_json({"loss": bad, "rows": [1.5, (bad, "é")], "nested": {"x": bad, "n": 3}})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [1.5, [None, "é"]],
        "nested": {"x": None, "n": 3},
    }
