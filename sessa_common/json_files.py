"""JSON objects read from files that anybody may have written."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from sessa_common.errors import SessaError, check_text
from sessa_common.input_files import read_limited

# The parsed form of the worst JSON needs some twenty times its bytes.
LARGEST_JSON = 16 * 2**20
# Digits of the largest 64-bit number; nothing that this project reads counts further.
MOST_DIGITS = 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most 16 MiB.

    Raises SessaError that names the file when it is missing, unreadable, not UTF-8, not JSON, or
    when it holds NaN, a number beyond 64 bits or beyond float64, a key twice in one
    object, half of a surrogate pair, or anything but an object at the top.
    """
    content = read_limited(path, LARGEST_JSON)
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SessaError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise SessaError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise SessaError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: str) -> Any:
    """Parse one JSON value; ValueError for everything that `read_json` refuses inside a file."""
    try:
        value = json.loads(
            text,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_parse_constant,
            object_pairs_hook=_object,
        )
        if "\\u" in text:
            check_text(json.dumps(value, ensure_ascii=False), "a string")
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    return value


def _parse_int(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits.lstrip('-')):,} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond the range of float64")
    return value


def _parse_constant(name: str) -> float:
    # Infinity is not JSON either, but transformers writes it (time_step_limit of Mamba-2).
    if name == "NaN":
        raise ValueError("NaN is not JSON")
    return float(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} appears twice")
    return found
