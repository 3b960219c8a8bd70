"""JSON files that anybody may have written: read exactly, or refused in one line."""

import os

import pytest

from sessa_common.errors import SessaError
from sessa_common.json_files import LARGEST_JSON, read_json


def test_an_object_is_read_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + '{"a": [1, -2.5e3, null, true, "é\\u00e9"]}\r\n'.encode())
        assert read_json(path) == {"a": [1, -2500.0, None, True, "éé"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b'{"a": 1', "not readable JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1e999}', "1e999 is beyond the range of float64"),
        (b'{"a": %s}' % (b"7" * 5000), "a number of 5,000 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b" " * (LARGEST_JSON + 1), "larger than 16,777,216 bytes"),
    ],
    ids=lambda value: value[:20].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_damage_is_named(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SessaError, match=rf"config\.json: .*{message}"):
        read_json(path)


def test_infinity_is_read_as_transformers_writes_it(tmp_path):
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json") == {"time_step_limit": [0.0, float("inf")]}


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("none", "no such file"),
        ("link", "the link leads to no file"),
        ("pipe", "expected a file, found a pipe"),
        (".", "expected a file, found a folder"),
    ):
        with pytest.raises(SessaError, match=message):
            read_json(tmp_path / name)
