"""Rows of text from one file: plain text, JSON lines, Parquet, and the first two compressed."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sessa_common.errors import SessaError, check_text
from sessa_common.extras import install
from sessa_common.input_files import FREE_BYTES, open_regular, reason, require_regular

PLAIN = (".txt", ".md", ".py")
FORMATS = (*PLAIN, ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
EXPECTED = f"{', '.join(FORMATS)}; all but .parquet also with .gz or .zst after it"
BYTE_ORDER_MARK = "\ufeff"
# Repetitive text compresses well, but a file that grows beyond this is made to fill the memory.
LARGEST_EXPANSION = 200
# Few rows at once, because one stored string may stand for all rows of a batch.
PARQUET_ROWS = 32
# Compression from which on a file counts as made of repetitions.
REPETITIVE = 50
# A row of text needs at least one bit of its file, however well it is compressed.
MOST_ROWS_PER_BYTE = 8
JSON_TYPES = {bool: "true or false", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Row:
    """The text of one row, or None where the file has null, and the place it was read from."""

    text: str | None
    where: str


def format_of(path: Path) -> str | None:
    """The format that a file's name tells, one of FORMATS, or None; letter case does not count."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    found = "".join(suffixes[:-1][-1:] if packed else suffixes[-1:])
    return found if found in FORMATS and not (packed and found == ".parquet") else None


def read_rows(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of one file: the whole of a plain text, the field or column of the others.

    Raises SessaError that names the file and the row: for a file that is no regular file, is
    unreadable, damaged or not UTF-8, lacks the field, or unpacks to 200 times its size.
    """
    kind = format_of(path)
    if kind is None:
        raise SessaError(f"{path}: its name ends in {path.suffix!r}, expected {EXPECTED}")
    rows = _parquet_rows(path, field) if kind == ".parquet" else _text_rows(path, kind, field)
    left = _most_bytes(path)
    for row in rows:
        left -= len(row.text or "")
        if left < 0:
            raise _expands(path)
        yield row


def clean(text: str) -> str:
    """The text without a byte-order mark at its start, its lines ended by a line feed alone."""
    return text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


def decode(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes, cleaned; SessaError with the first byte that is not UTF-8."""
    try:
        return clean(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SessaError(f"{where}: not UTF-8 text (byte {error.start})") from None


def field_of(row: Any, field: str, where: str) -> Row:
    """The text of a row's field; null counts as no text, any other type is a SessaError."""
    row = _object_of(row, where)
    if field not in row:
        raise SessaError(
            f"{where}: no field {field!r}; it has {', '.join(map(str, row))} "
            "(`text_field` names the one to read)"
        )
    value = row[field]
    if value is None:
        return Row(None, where)
    if not isinstance(value, str):
        kind = JSON_TYPES.get(type(value), type(value).__name__)
        raise SessaError(f"{where}: {field!r} is {kind}, expected text")
    return Row(clean(check_text(value, f"{where}, {field!r}")), where)


def _object_of(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = JSON_TYPES.get(type(value), type(value).__name__)
        raise SessaError(f"{where}: expected a JSON object, found {kind}")
    return value


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the JSON objects of a .jsonl file, which may be compressed, and the place of each.

    Raises SessaError that names the file and the line as `read_rows` does.
    """
    kind = format_of(path)
    if kind != ".jsonl":
        raise SessaError(f"{path}: its name ends in {path.suffix!r}, expected .jsonl")
    with open_regular(path) as file:
        for value, where in _json_lines(path, _unpacked(path, file)):
            yield _object_of(value, where), where


def _most_bytes(path: Path) -> int:
    return max(FREE_BYTES, LARGEST_EXPANSION * require_regular(path).st_size)


def _expands(path: Path) -> SessaError:
    return SessaError(
        f"{path}: unpacks to more than {LARGEST_EXPANSION} times its size; if that is meant, "
        "unpack it first"
    )


def _text_rows(path: Path, kind: str, field: str) -> Iterator[Row]:
    with open_regular(path) as file:
        stream = _unpacked(path, file)
        if kind in PLAIN:
            yield Row(decode(_read_all(path, stream), str(path)), str(path))
            return
        for value, where in _json_lines(path, stream):
            yield field_of(value, field, where)


def _json_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(stream, 1):
        where = f"{path}, line {number}"
        text = decode(line, where)
        if text.strip():
            yield _parse_row(text, where), where


def _read_all(path: Path, stream: BinaryIO) -> bytes:
    try:
        return stream.read()
    except OSError as error:
        raise SessaError(f"{path}: cannot be read ({reason(error)})") from None


def _parse_row(text: str, where: str) -> Any:
    try:
        # Numbers are never read from a row, so they need not be exact, however long they are.
        return json.loads(text, parse_int=float)
    except json.JSONDecodeError as error:
        raise SessaError(f"{where}: not JSON ({error.msg})") from None
    except RecursionError:
        raise SessaError(f"{where}: lists or objects are nested too deeply") from None


def _unpacked(path: Path, file: BinaryIO) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return file
    packed = gzip.GzipFile(fileobj=file) if suffix == ".gz" else _open_zstd(path, file)
    return io.BufferedReader(_Unpacking(packed, path), 2**20)


class _Unpacking(io.RawIOBase):
    """A decompressed stream that ends in a SessaError when it grows beyond `_most_bytes`."""

    def __init__(self, stream: Any, path: Path) -> None:
        self.stream, self.path, self.left = stream, path, _most_bytes(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            chunk = self.stream.read(len(buffer))
        except Exception as error:  # each decompressor has its own types for a damaged file
            raise SessaError(f"{self.path}: cannot be unpacked ({reason(error)})") from None
        self.left -= len(chunk)
        if self.left < 0:
            raise _expands(self.path)
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _open_zstd(path: Path, file: BinaryIO) -> Any:
    # Python has its own reader from version 3.14 on; the other two come with common packages.
    if importlib.util.find_spec("compression") is not None:
        return importlib.import_module("compression.zstd").ZstdFile(file)
    if importlib.util.find_spec("zstandard") is not None:
        reader = importlib.import_module("zstandard").ZstdDecompressor().stream_reader
        return reader(file, read_across_frames=True)
    if importlib.util.find_spec("pyarrow") is not None:
        return importlib.import_module("pyarrow").CompressedInputStream(file, "zstd")
    raise SessaError(f"{path}: reading .zst needs zstandard or pyarrow; {install('data')}")


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise SessaError(f"{path}: reading .parquet needs pyarrow; {install('data')}")
    import pyarrow
    from pyarrow import parquet

    size = require_regular(path).st_size
    number = 0
    try:
        # A column that repeats one long text is read as the text and its places.
        repeated = [column] if _is_repetitive(parquet.read_metadata(path), size) else None
        with parquet.ParquetFile(path, read_dictionary=repeated) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise SessaError(
                    f"{path}: no column {column!r}; it has {', '.join(names)} "
                    "(`text_field` names the one to read)"
                )
            if file.metadata.num_rows > MOST_ROWS_PER_BYTE * size:
                raise SessaError(
                    f"{path}: claims {file.metadata.num_rows:,} rows in {size:,} bytes; "
                    "the file is damaged"
                )
            for rows in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in rows.column(0):
                    number += 1
                    yield field_of({column: value.as_py()}, column, f"{path}, row {number}")
    except SessaError:
        raise
    except UnicodeDecodeError:
        raise SessaError(f"{path}, row {number}: not UTF-8 text") from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise SessaError(f"{path}: not a readable parquet file ({error})") from None


def _is_repetitive(metadata: Any, size: int) -> bool:
    # Not the sizes of single columns: pyarrow 26 aborts the process where they are damaged.
    groups = range(metadata.num_row_groups)
    unpacked = sum(metadata.row_group(i).total_byte_size for i in groups)
    return bool(unpacked > REPETITIVE * size)
