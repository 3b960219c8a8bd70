"""Small damage to files, drawn from a seed: bytes, JSON values, and the insides of containers."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, -(2**63), 10**12, 10**25, 0.5, -1e300]
VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "\ud800",
    "\x1b[31m",
    "../../x",
    "a\0b",
    [],
    {},
    [[]],
    [None],
    {"": None},
    ["x"] * 50,
    float("nan"),
    float("inf"),
    *NUMBERS,
]
BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"[" * 3000,
    b"9" * 5000,
    b"NaN",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"<|endoftext|>",
]


def mutate_file(path: Path, random_: random.Random) -> None:
    """Damage one file in a way that suits it, or put something else in its place."""
    if random_.random() < 0.04:
        _replace(path, random_)
        return
    content = path.read_bytes()
    mutate = _by_structure(path) if random_.random() < 0.7 else mutate_bytes
    for _ in range(random_.choice([1, 1, 1, 2, 4])):
        content = mutate(content, random_)
    path.write_bytes(content)


def _by_structure(path: Path) -> Callable[[bytes, random.Random], bytes]:
    name = path.name.lower()
    if name.endswith(".json"):
        return mutate_json
    if name.endswith(".jsonl"):
        return _mutate_json_lines
    if name.endswith(".safetensors"):
        return _mutate_safetensors
    if name.endswith((".npz", ".pt")):
        return _mutate_zip
    if name.endswith(".gz"):
        return lambda content, random_: gzip.compress(mutate_bytes(_unzip(content), random_))
    return mutate_bytes


def _replace(path: Path, random_: random.Random) -> None:
    path.unlink()
    how = random_.randrange(6)
    if how == 0:
        path.write_bytes(b"")
    elif how == 1:
        path.mkdir()
    elif how == 2 and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif how == 3:
        path.symlink_to(path)
    elif how == 4:
        path.symlink_to("/dev/zero")
    # Otherwise the file is missing.


def mutate_bytes(content: bytes, random_: random.Random) -> bytes:
    """Change, insert, remove, repeat or cut off a few bytes."""
    at = random_.randrange(len(content) + 1)
    length = random_.choice([1, 1, 4, 8, 100])
    how = random_.randrange(6)
    if how == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << random_.randrange(8)]) + content[at + 1 :]
    if how == 1:
        return content[:at] + random_.choice(BYTES) + content[at:]
    if how == 2:
        return content[:at] + content[at + length :]
    if how == 3:
        return content[:at]
    if how == 4:
        return content[: at + length] + content[at:]
    value = random_.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])
    width = random_.choice([4, 8])
    return content[:at] + (value % 2 ** (8 * width)).to_bytes(width, "little") + content[at + 8 :]


def mutate_json(content: bytes, random_: random.Random) -> bytes:
    """Change one value somewhere in a JSON document; bytes where it is not JSON any more."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(content, random_)
    return json.dumps(_mutate_tree(tree, random_)).encode("utf-8", "surrogatepass")


def _mutate_json_lines(content: bytes, random_: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = random_.randrange(len(lines))
    lines[at] = mutate_json(lines[at], random_)
    return b"\n".join(lines)


def _mutate_tree(tree: Any, random_: random.Random) -> Any:
    if not isinstance(tree, (dict, list)) or not tree or random_.random() < 0.05:
        return _other_value(tree, random_)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = random_.choice(keys)
    if random_.random() < 0.6:
        tree[key] = _mutate_tree(tree[key], random_)
    elif random_.random() < 0.5:
        del tree[key]
    elif isinstance(tree, dict):
        tree[random_.choice(["", "x", "text", str(key).upper()])] = tree.pop(key)
    else:
        tree.insert(key, random_.choice(VALUES))
    return tree


def _other_value(value: Any, random_: random.Random) -> Any:
    if isinstance(value, str) and random_.random() < 0.3:
        return mutate_bytes(value.encode("utf-8", "surrogatepass"), random_).decode("latin-1")
    if isinstance(value, (int, float)) and random_.random() < 0.7:
        return random_.choice(NUMBERS)
    return random_.choice(VALUES)


def _mutate_safetensors(content: bytes, random_: random.Random) -> bytes:
    """Change the header and keep its length true, so that the reader goes on behind it."""
    if len(content) < 8 or random_.random() < 0.3:
        return mutate_bytes(content, random_)
    length = struct.unpack("<Q", content[:8])[0]
    header = mutate_json(content[8 : 8 + length], random_)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _mutate_zip(content: bytes, random_: random.Random) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged by an earlier change
        return mutate_bytes(content, random_)
    if not members:
        return mutate_bytes(content, random_)
    name = random_.choice(list(members))
    members[name] = mutate_bytes(members[name], random_)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return packed.getvalue()


def _unzip(content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except Exception:  # damaged by an earlier change
        return content
