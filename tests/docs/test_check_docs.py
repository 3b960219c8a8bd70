"""The check of the pages notices links, commands and options that lead nowhere."""

import check_docs
import pytest
import typer


@pytest.fixture(scope="module")
def command():
    app = typer.Typer()

    @app.command()
    def train(
        steps: int = typer.Option(1, "--steps"),
        tie: bool = typer.Option(True, "--tie/--no-tie"),
        old: int = typer.Option(1, "--old-steps", hidden=True),
    ): ...

    @app.command(hidden=True)
    def secret(): ...

    @app.command()
    def info(path: str): ...

    return typer.main.get_command(app)


def _page(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_links_that_lead_somewhere(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, with `code`\n")
    text = "[a](other.md) [b](other.md#a-heading-with-code) ![c](page.md) [d](https://x.y/z)\n"
    fence = "```python\nrows[0](missing.md)\n```\n"
    assert list(check_docs.broken_links(_page(tmp_path, text + fence))) == []


@pytest.mark.parametrize("link", ["missing.md", "../none/x.png", "#nowhere", "page.md#nowhere"])
def test_a_broken_link_is_named(tmp_path, link):
    (fault,) = check_docs.broken_links(_page(tmp_path, f"# Here\n[text]({link})\n"))
    assert fault.startswith(link)


@pytest.mark.parametrize("name", ["sessa_common/missing.py", "tests/docs/missing.md"])
def test_a_missing_source_file_is_named(tmp_path, name):
    there = "`tools/check_docs.py`, `feedback/naive.py` and `runs/model.json`"
    (fault,) = check_docs.missing_files(_page(tmp_path, f"{there}\n`python {name}`\n"))
    assert fault.startswith(name)


@pytest.mark.parametrize(
    "text",
    [
        "`sessa train --steps 3`, `--no-tie` and `sessa COMMAND --help`\n",
        "```sh\nOMP_NUM_THREADS=1 sessa train --tie \\\n    --steps=3   # --unknown\n```\n",
        "```\n$ sessa info --help\nan --unknown option of the output\n```\n",
        "```python\nsessa = 'train --unknown'\n```\n",
        "`pip install --unknown`\n",
    ],
)
def test_commands_that_exist(tmp_path, command, text):
    assert list(check_docs.unknown_commands(_page(tmp_path, text), command)) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("`sessa tran`\n", "sessa tran"),
        ("`sessa secret`\n", "sessa secret"),
        ("`--unknown`\n", "--unknown"),
        ("`sessa train --old-steps 3`\n", "--old-steps"),
        ("`sessa info x --steps 3`\n", "--steps"),
        ("```sh\ncd x && sessa train \\\n  --unknown=3\n```\n", "--unknown"),
        ("```\n$ sessa info x | sessa secret\n```\n", "sessa secret"),
    ],
)
def test_an_unknown_command_or_option_is_named(tmp_path, command, text, named):
    (fault,) = check_docs.unknown_commands(_page(tmp_path, text), command)
    assert named in fault
