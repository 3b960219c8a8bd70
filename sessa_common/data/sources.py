"""Documents from files, folders, wildcards, Hugging Face data sets and the text inside Python."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sessa_common.config import TrainConfig
from sessa_common.errors import SessaError, check_text

PLAIN = (".txt", ".md", ".py")
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")
# The name of a data set on the hub: owner/name or name, never with one of our suffixes.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PARQUET_ROWS = 1024
HUB_SECONDS = 20

Reader = Callable[[], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read rows: the text's field or column, the split and subset of a hub data set."""

    text_field: str = "text"
    split: str = "train"
    subset: str | None = None
    max_documents: int = 0

    @classmethod
    def of(cls, settings: TrainConfig) -> Reading:
        """The reading options of a training run."""
        return cls(
            text_field=settings.text_field,
            split=settings.split,
            subset=settings.subset,
            max_documents=settings.max_documents,
        )


def read_documents(names: Sequence[str], reading: Reading | None = None) -> Iterator[str]:
    """Yield the documents of every name in `names`, in a fixed order; blank documents are left out.

    A name is "pydoc" (the English reference text inside every Python), a file or folder or wildcard
    of .txt, .md, .py (one document a file), .jsonl and .parquet (one a row), "hf:" and a Hugging
    Face data set id or folder, or such an id alone. Every name is resolved before the first
    document is read; SessaError says which one is missing, unreadable, or lacks the asked field.
    """
    reading = reading or Reading()
    readers = [reader for name in names for reader in _readers(name, reading)]
    texts = chain.from_iterable(reader() for reader in readers)
    return islice((text for text in texts if text.strip()), reading.max_documents or None)


def check_names(names: Sequence[str]) -> None:
    """Raise SessaError for a name that `read_documents` could not resolve; nothing is read."""
    for name in names:
        _readers(name, Reading())


def _readers(name: str, reading: Reading) -> list[Reader]:
    if name == "pydoc":
        return [_pydoc_topics]
    if name.startswith("hf:"):
        return [lambda: _hub_rows(name[3:], reading)]
    path = Path(name).expanduser()
    if path.is_file():
        return [_file_reader(path, reading)]
    if path.is_dir():
        return [_file_reader(file, reading) for file in _folder_files(path)]
    if glob.has_magic(name):
        return [_file_reader(file, reading) for file in _wildcard_files(path)]
    if HUB_NAME.fullmatch(name) and path.suffix not in SUFFIXES:
        if importlib.util.find_spec("datasets") is None:
            raise SessaError(
                f"{name}: no such file or folder; to read it as a Hugging Face data set, "
                "pip install datasets"
            )
        return [lambda: _hub_rows(name, reading)]
    raise SessaError(f"{name}: no such file or folder")


def _folder_files(folder: Path) -> list[Path]:
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not found:
        raise SessaError(f"{folder}: the folder has no {', '.join(SUFFIXES)} file")
    return found


def _wildcard_files(pattern: Path) -> list[Path]:
    found = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    found = [file for file in found if file.is_file()]
    if not found:
        raise SessaError(f"{pattern}: no file matches")
    return found


def _file_reader(path: Path, reading: Reading) -> Reader:
    if path.suffix in PLAIN:
        return lambda: iter([_read_text(path)])
    if path.suffix == ".jsonl":
        return lambda: _jsonl_rows(path, reading.text_field)
    if path.suffix == ".parquet":
        return lambda: _parquet_rows(path, reading.text_field)
    raise SessaError(f"{path}: the file type is {path.suffix!r}, expected {', '.join(SUFFIXES)}")


def _pydoc_topics() -> Iterator[str]:
    # Imported by name: the standard library ships it without type information.
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return (topics[name] for name in sorted(topics))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SessaError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise SessaError(f"{path}: cannot be read ({error.strerror})") from None


def _jsonl_rows(path: Path, field: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field(json.loads(line), field, f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise SessaError(f"{path}, line {number}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise SessaError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise SessaError(f"{path}: cannot be read ({error.strerror})") from None


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise SessaError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if field not in row:
        raise SessaError(
            f"{where}: no field {field!r}; it has {', '.join(map(str, row))} (see --text-field)"
        )
    if not isinstance(row[field], str):
        raise SessaError(f"{where}: {field!r} is {type(row[field]).__name__}, expected text")
    return check_text(row[field], f"{where}, {field!r}")


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise SessaError(f"{path}: reading .parquet needs pyarrow; pip install pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise SessaError(
                    f"{path}: no column {column!r}; it has {', '.join(file.schema_arrow.names)} "
                    "(see --text-field)"
                )
            for rows in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in rows.column(0).to_pylist():
                    yield _field({column: value}, column, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise SessaError(f"{path}: not a readable parquet file ({error})") from None


def _hub_rows(name: str, reading: Reading) -> Iterator[str]:
    if importlib.util.find_spec("datasets") is None:
        raise SessaError(f"{name}: Hugging Face data sets need: pip install datasets")
    import datasets
    from huggingface_hub import HfApi

    try:
        if not Path(name).exists():
            # Loading a name that is not there would first retry for half a minute.
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
        rows = datasets.load_dataset(name, reading.subset, split=reading.split, streaming=True)
        for number, row in enumerate(rows):
            yield _field(row, reading.text_field, f"{name}, row {number}")
    except SessaError:
        raise
    # The library and the layers below it raise many types for a missing name, split or network.
    except Exception as error:
        raise SessaError(
            f"{name}: no such file or folder, and as a Hugging Face data set it cannot be read "
            f"({type(error).__name__}: {error})"
        ) from None
