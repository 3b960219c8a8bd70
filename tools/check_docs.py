"""Check the pages of this project: links, headings, source files, commands and options of `sessa`.

    python tools/check_docs.py [PAGE ...]

Without arguments it reads PAGES. A link must lead to a file of the working tree, its fragment to a
heading there. A source file that a page names, from the root or from a package, must exist. A
command or an option must be one that a help text of `sessa` shows, so hidden aliases count as
unknown.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "export/README.md",
    "export/ort_op/README.md",
    "benchmarks/results/README.md",
    "tools/metal_emulator/README.md",
)
SHELL = ("", "sh", "bash", "console")
# Folders from which pages name source files.
SOURCES = (ROOT, ROOT / "sessa_common", ROOT / "sessa_torch", ROOT / "export" / "sessa_export")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_FILE = re.compile(r"(?:[\w-]+/)+[\w-]+\.(?:py|md|sh|cpp|h|js|mjs|metal)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_SEPARATORS = {";", "|", "&", "&&", "||", "(", ")", "<", ">", ">>"}


def broken_links(page: Path) -> Iterator[str]:
    """Every relative link of a page whose file or heading does not exist."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in _LINK.findall(_SPAN.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = unquote(link).partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif fragment and fragment not in _anchors(target):
            yield f"{link}: no such heading"


def _anchors(page: Path) -> set[str]:
    """The fragments that a Git host gives to the headings of a page."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_files(page: Path) -> Iterator[str]:
    """Every source file that a page names in code type and that does not exist."""
    spans = _SPAN.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    for name in (word for span in spans for word in span.split() if _FILE.fullmatch(word)):
        if not any((folder / name).exists() for folder in (*SOURCES, page.parent)):
            yield f"{name}: no such source file"


def unknown_commands(page: Path, command: Any) -> Iterator[str]:
    """Every use of `sessa` on a page with a command or an option that its help does not show."""
    for line in _shell_lines(page.read_text(encoding="utf-8")):
        for words in _simple_commands(line):
            yield from _unknown_words(words, command)


def _shell_lines(text: str) -> Iterator[str]:
    for language, block in _FENCE.findall(text):
        if language in SHELL:
            yield from block.replace("\\\n", " ").splitlines()
    for span in _SPAN.findall(_FENCE.sub("", text)):
        yield span.replace("\n", " ")


def _simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a shell line, without prompt, assignments and comments."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.wordchars += "*?[]{}:,=%@+…"
    try:
        words = list(lexer)
    except ValueError:  # a quote that the line does not close
        words = line.removeprefix("$ ").split()
    found: list[str] = []
    for word in words:
        if word in _SEPARATORS:
            yield found
            found = []
        elif found or "=" not in word:
            found.append(word)
    yield found


def _unknown_words(words: list[str], command: Any) -> Iterator[str]:
    if words and words[0].startswith("--"):  # an option that the text names alone
        known = set().union(*(_options(c) for c in [command, *_commands(command).values()]))
        yield from (f"{word}: no command has it" for word in _options_in(words) - known)
    if not words or words[0] != "sessa":
        return
    path = ["sessa"]
    for word in words[1:]:
        known_commands = _commands(command)
        if word.startswith("-") or not known_commands:
            break
        if word in known_commands:
            command = known_commands[word]
            path.append(word)
        elif not word.isupper():  # sessa COMMAND stands for any
            yield f"{' '.join([*path, word])}: no such command"
            return
        else:
            return
    for option in sorted(_options_in(words) - _options(command)):
        yield f"{' '.join(path)} {option}: no such option"


def _options_in(words: list[str]) -> set[str]:
    """The options among the words: `--tie/--no-tie` are two, `--lr=1e-3` is `--lr`."""
    given = [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    return {option for word in given for option in word.split("/")}


def _commands(command: Any) -> dict[str, Any]:
    commands = getattr(command, "commands", {})
    return {name: each for name, each in commands.items() if not each.hidden}


def _options(command: Any) -> set[str]:
    """The spellings of the options that the help of a command shows."""
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    spellings = {text for param in shown for text in (*param.opts, *param.secondary_opts)}
    return {"--help", "-h"} | {text for text in spellings if text.startswith("-")}


def main(arguments: list[str]) -> int:
    """Print what is wrong with each page; 1 if anything is."""
    from sessa_cli.main import app

    command = typer.main.get_command(app)
    pages = [Path(name).resolve() for name in arguments]
    pages = pages or [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    faults = [
        f"{page.relative_to(ROOT)}: {fault}"
        for page in pages
        for fault in (
            *broken_links(page),
            *missing_files(page),
            *unknown_commands(page, command),
        )
    ]
    print("\n".join(faults) or f"{len(pages)} pages: links, files, commands and options exist")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
