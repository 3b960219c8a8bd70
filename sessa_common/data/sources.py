"""Documents from files, folders, wildcards, Hugging Face data sets and the text inside Python."""

from __future__ import annotations

import functools
import glob
import importlib
import importlib.util
import math
import os
import re
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from sessa_common.checkpoint.run_files import TRAINING
from sessa_common.data.formats import EXPECTED, Row, decode, field_of, format_of, read_rows
from sessa_common.data.token_shards import TokenShards, is_token_folder
from sessa_common.errors import SessaError
from sessa_common.extras import install
from sessa_common.input_files import reason, require_regular
from sessa_common.train_config import TrainConfig

HUB_PREFIX = "hf:"
# Training on such a set reads it while it trains and keeps no token.
STREAM_PREFIX = "hf-stream:"
HUB_SECONDS = 20
STANDARD_INPUT = "-"
# A name with its weight in a mixture.
WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")

Reader = Callable[[], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Choices for reading text: the field or column of rows, the split and subset of a hub set.

    `max_documents` ends the reading after so many documents; 0 reads all.
    """

    text_field: str = "text"
    split: str = "train"
    subset: str | None = None
    max_documents: int = 0

    @classmethod
    def of(cls, settings: TrainConfig) -> TextSource:
        """The choices of a training run."""
        return cls(
            text_field=settings.text_field,
            split=settings.split,
            subset=settings.subset,
            max_documents=settings.max_documents,
        )


@dataclass
class ReadCounts:
    """Numbers of what `read_documents` left out, counted while it reads."""

    blank: int = 0
    null_rows: int = 0
    first_null: str = ""

    def notes(self) -> list[str]:
        """One sentence for each kind of document that was left out."""
        notes = []
        if self.null_rows:
            notes.append(
                f"skipped {count_of(self.null_rows, 'row')} whose text is null, "
                f"the first in {self.first_null}"
            )
        if self.blank:
            notes.append(f"skipped {count_of(self.blank, 'document')} of white space only")
        return notes


def count_of(number: int, noun: str) -> str:
    """A number with its noun, such as "1 row" and "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def read_documents(
    names: Sequence[str], source: TextSource | None = None, counts: ReadCounts | None = None
) -> Iterator[str]:
    """Yield the documents of every name in `names`, in a fixed order.

    A name is "pydoc" (the English reference text inside every Python), "-" (standard input, one
    document), "hf:" and a Hugging Face data set id or folder, or a file, folder or wildcard. A
    .txt, .md or .py file is one document, a .jsonl or .parquet file has one in each row; all but
    .parquet may be compressed (.gz, .zst). Folders and "**" follow links, but read every file
    once, and leave out the folders of training runs below them. Documents of white space and rows
    of null are left out and counted in `counts`.

    Every name is resolved before the first document is read. Raises SessaError that says which
    name is missing or unreadable, or which row lacks the text.
    """
    source, counts = source or TextSource(), counts or ReadCounts()
    hub = (HUB_PREFIX, STREAM_PREFIX)
    if source.subset is not None and not any(name.startswith(hub) for name in names):
        raise SessaError(
            f"`subset` is a part of a Hugging Face data set, but none is named ({HUB_PREFIX}NAME)"
        )
    if list(names).count(STANDARD_INPUT) > 1:
        raise SessaError("standard input ('-') is named twice, but it can be read only once")
    readers = [reader for name in names for reader in _readers(name, source)]
    return islice(_documents(readers, counts), source.max_documents or None)


def local_paths(names: Iterable[str]) -> list[Path]:
    """Files and folders of this machine that `read_documents` would read for these names."""
    paths: list[Path] = []
    for name, _ in map(_split_weight, names):
        name = name.removeprefix(STREAM_PREFIX).removeprefix(HUB_PREFIX)
        pattern = os.path.expanduser(name)
        paths += [Path(pattern), *map(Path, glob.glob(pattern, recursive=True))]
    return [path for path in paths if path.exists()]


def split_weights(names: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Split names such as "books:0.7" into names and weights, which are None where none has one.

    A file of the whole name counts as a name. Raises SessaError when only some names have a weight,
    or one is not above 0.
    """
    pairs = [_split_weight(name) for name in names]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        bare = next(name for name, weight in pairs if weight is None)
        raise SessaError(
            f"`data` has a weight for some names, but none for {bare}; write {bare}:WEIGHT, or "
            "leave all weights out"
        )
    if any(not 0 < weight < math.inf for weight in weights):
        raise SessaError(f"`data` has a weight of {min(weights):g}, expected a number above 0")
    return [name for name, _ in pairs], weights or None


def _split_weight(name: str) -> tuple[str, float | None]:
    found = WEIGHTED.fullmatch(name)
    if found is None or os.path.lexists(os.path.expanduser(name)):
        return name, None
    return found[1], float(found[2])


def check_names(names: Iterable[str]) -> None:
    """Raise SessaError for a name that several commands could not read one after the other.

    Nothing is read; the names of data sets on the hub are not looked up.
    """
    for name in split_weights(list(names))[0]:
        if name == STANDARD_INPUT:
            raise SessaError("standard input ('-') can be read by one run only; name a file")
        if is_token_folder(name):
            TokenShards(name)
        else:
            _readers(name, TextSource())


def _documents(readers: Iterable[Reader], counts: ReadCounts) -> Iterator[str]:
    for reader in readers:
        for row in reader():
            if row.text is None:
                counts.first_null = counts.first_null or row.where
                counts.null_rows += 1
            elif not row.text.strip():
                counts.blank += 1
            else:
                yield row.text


def _readers(name: str, source: TextSource) -> list[Reader]:
    if name == "pydoc":
        return [_pydoc_topics]
    if name == STANDARD_INPUT:
        return [_standard_input]
    if name.startswith((HUB_PREFIX, STREAM_PREFIX)):
        dataset = name.partition(":")[2]
        return [lambda: _hub_rows(dataset, source)]
    return [_file_reader(file, source) for file in find_files(name)]


def find_files(name: str) -> list[Path]:
    """The files that a name means: itself, the text files of a folder, or those of a wildcard.

    Raises SessaError when there is none.
    """
    path = Path(os.path.expanduser(name))
    if is_token_folder(path):
        raise SessaError(f"{path}: holds tokens, which only training reads; name the text here")
    if (mode := _mode(path)) is not None:
        return _text_files(path) if stat.S_ISDIR(mode) else [path]
    if glob.has_magic(name):
        return _matching_files(path)
    hint = "" if format_of(path) else f"; a Hugging Face data set is named {HUB_PREFIX}{name}"
    raise SessaError(f"{name}: no such file or folder{hint}")


def _mode(path: Path) -> int | None:
    """The file mode of what a path leads to, None where there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SessaError(f"{path}: cannot be read ({reason(error)})") from None


def _file_reader(path: Path, source: TextSource) -> Reader:
    require_regular(path)
    if format_of(path) is None:
        raise SessaError(f"{path}: its name ends in {path.suffix!r}, expected {EXPECTED}")
    return lambda: read_rows(path, source.text_field)


def _text_files(folder: Path) -> list[Path]:
    found = [path for path in _files_below(folder) if format_of(path) is not None]
    if not found:
        raise SessaError(f"{folder}: no text file in the folder (expected {EXPECTED})")
    return found


def _matching_files(pattern: Path) -> list[Path]:
    parts = pattern.parts
    if "**" in parts:
        # Not by glob: its "**" walks a link to a parent folder until the system refuses.
        at = parts.index("**")
        folders = [Path(name) for name in glob.glob(str(Path(*parts[:at]))) if os.path.isdir(name)]
        found = [
            path
            for folder in folders
            for path in _files_below(folder)
            if _matches(path.relative_to(folder).parts, parts[at:])
        ]
    else:
        found = [path for path in map(Path, glob.glob(str(pattern))) if not path.is_dir()]
    if not found:
        raise SessaError(f"{pattern}: no file matches")
    return sorted(_each_once(found))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return True when the folders and the name of a file fit the parts of a wildcard."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _each_once(paths: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            yield path


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder, sorted; links are followed after everything else, each file once.

    Names that begin with a dot are left out, and the folders of training runs, whose metrics are no
    text. Raises SessaError for a folder that may not be read.
    """
    files, links, folders, seen = [], deque[Path](), deque([folder]), set()
    while folders or links:
        current = folders.popleft() if folders else links.popleft()
        if not current.is_dir():
            files.append(current)
            continue
        if (real := os.path.realpath(current)) in seen:
            continue
        if current != folder and (current / TRAINING).is_file():
            continue
        seen.add(real)
        for entry in _entries(current):
            if entry.is_symlink():
                links.append(Path(entry))
            elif entry.is_dir():
                folders.append(Path(entry))
            else:
                files.append(Path(entry))
    return sorted(_each_once(files))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if not entry.name.startswith(".")),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        raise SessaError(f"{folder}: the folder cannot be read ({reason(error)})") from None


def _pydoc_topics() -> Iterator[Row]:
    # Imported by name: the standard library ships it without type information.
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return (Row(topics[name], f"pydoc, {name}") for name in sorted(topics))


def _standard_input() -> Iterator[Row]:
    yield Row(_read_stream(sys.stdin), "standard input")


# A run reads its text twice, once for the tokenizer and once for the tokens.
@functools.lru_cache(maxsize=1)
def _read_stream(stream: Any) -> str:
    content = getattr(stream, "buffer", None)
    if content is None:
        raise SessaError("standard input is closed, but '-' reads text from it")
    return decode(content.read(), "standard input")


def _hub_rows(name: str, source: TextSource) -> Iterator[Row]:
    with hub_errors(name):
        rows, _ = open_hub(name, source)
        for number, row in enumerate(rows, 1):
            yield field_of(row, source.text_field, f"{HUB_PREFIX}{name}, row {number}")


def open_hub(name: str, source: TextSource) -> tuple[Any, str]:
    """Open a Hugging Face data set, or a folder, row by row; and its commit on the hub.

    No code of a data set is run. The commit is empty for a folder.
    """
    if importlib.util.find_spec("datasets") is None:
        raise SessaError(f"{HUB_PREFIX}{name}: reading it needs datasets; {install('data')}")
    import datasets
    from huggingface_hub import HfApi

    commit = None
    if not Path(name).exists():
        # Loading a name that is not there would first retry for half a minute.
        commit = HfApi().dataset_info(name, timeout=HUB_SECONDS).sha
    rows = datasets.load_dataset(
        name, source.subset, split=source.split, streaming=True, revision=commit
    )
    return rows, commit or ""


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the errors of reading a Hugging Face data set into SessaError."""
    try:
        yield
    except SessaError:
        raise
    # The library and the layers below it raise many types for a missing name, split or network.
    except Exception as error:
        raise SessaError(
            f"{HUB_PREFIX}{name}: the Hugging Face data set cannot be read "
            f"({type(error).__name__}: {error})"
        ) from None
