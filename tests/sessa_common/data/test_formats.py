"""Text files in every form: one reading of marks, line ends and compression, damage named."""

import gzip
import json
import zlib

import pytest

from sessa_common.data import formats
from sessa_common.data.formats import format_of, read_rows
from sessa_common.errors import SessaError

TEXT = "Ein Bär\nlief.\n"


def write(path, text, form):
    """Write one document in a form such as ".jsonl.zst"; the file."""
    path = path.with_name(f"x{form}")
    if form.lower().endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"text": [text]}), path, compression="zstd"
        )
        return path
    raw = text.encode()
    if ".jsonl" in form.lower():
        raw = json.dumps({"text": text}).encode() + b"\r\n"
    if form.lower().endswith(".gz"):
        raw = gzip.compress(raw)
    elif form.lower().endswith(".zst"):
        raw = compress_zstd(raw)
    path.write_bytes(raw)
    return path


def compress_zstd(raw):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


FORMS = (".txt", ".MD", ".txt.gz", ".txt.ZST", ".jsonl", ".JSONL.gz", ".jsonl.zst", ".parquet")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "written", [TEXT, "\ufeff" + TEXT, TEXT.replace("\n", "\r\n")], ids=["plain", "mark", "CRLF"]
)
def test_marks_and_line_ends_are_read_alike_in_every_form(form, written, tmp_path):
    path = write(tmp_path / "x", written, form)
    assert [row.text for row in read_rows(path, "text")] == [TEXT]


def test_a_mark_before_json_lines_is_no_part_of_them(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b", "n": %s, "x": NaN}' % (b"9" * 5000)
    )
    assert [(row.text, row.where) for row in read_rows(path, "text")] == [
        ("a", f"{path}, line 1"),
        ("b", f"{path}, line 3"),
    ]


def test_a_zstandard_file_of_several_frames_is_read_whole(tmp_path):
    path = tmp_path / "x.txt.zst"
    path.write_bytes(compress_zstd(b"one ") + compress_zstd(b"two"))
    assert [row.text for row in read_rows(path, "text")] == ["one two"]


def test_only_known_names_are_text(tmp_path):
    names = {
        "a.txt": ".txt",
        "a.b.JSONL.Gz": ".jsonl",
        "a.parquet": ".parquet",
        ".txt": None,
        "a.parquet.gz": None,
        "a.tar.gz": None,
        "a.gz": None,
        "a": None,
    }
    for name, expected in names.items():
        assert format_of(tmp_path / name) == expected, name


@pytest.mark.parametrize("form", [form for form in FORMS if form != ".MD"])
def test_every_cut_and_every_changed_byte_is_read_or_named(form, tmp_path):
    path = write(tmp_path / "x", TEXT * 20, form)
    whole = path.read_bytes()
    changed = [whole[:cut] for cut in range(0, len(whole), 37)]
    changed += [whole[:i] + b"\xff" + whole[i + 1 :] for i in range(0, len(whole), 31)]
    for content in changed:
        path.write_bytes(content)
        try:
            list(read_rows(path, "text"))
        except SessaError as error:
            assert str(error).startswith(str(path))


def test_a_parquet_column_of_broken_text_is_named_with_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = pyarrow.array([b"ok", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    with pytest.raises(SessaError, match=r"x\.parquet, row 2: not UTF-8 text"):
        list(read_rows(tmp_path / "x.parquet", "text"))


def test_deep_nesting_in_a_row_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 100_000)
    with pytest.raises(SessaError, match="line 2: lists or objects are nested too deeply"):
        list(read_rows(tmp_path / "x.jsonl", "text"))


@pytest.mark.parametrize("form", [".txt.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_fills_the_memory_is_refused_on_the_way(form, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FREE_BYTES", 2**20)
    path = write(tmp_path / "x", "a" * 2**24, form)
    with pytest.raises(SessaError, match="unpacks to more than 200 times its size"):
        list(read_rows(path, "text"))


def test_rows_that_need_no_bytes_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": pyarrow.nulls(10_000_000, pyarrow.string())})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SessaError, match="claims 10,000,000 rows in"):
        list(read_rows(tmp_path / "x.parquet", "text"))


def test_a_text_that_a_tiny_file_repeats_is_read_in_little_memory(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    # 320 rows of 4 MB in a file of some hundred bytes.
    once = pyarrow.array(["a" * 2**22])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 320, pyarrow.int32()), once)
    path = tmp_path / "x.parquet"
    parquet.write_table(
        pyarrow.table({"text": column}), path, compression="zstd", store_schema=False
    )
    assert path.stat().st_size < 1000
    before = pyarrow.default_memory_pool().max_memory()
    monkeypatch.setattr(formats, "FREE_BYTES", 2**25)
    with pytest.raises(SessaError, match="unpacks to more than"):
        list(read_rows(path, "text"))
    assert pyarrow.default_memory_pool().max_memory() < before + 2**25


def test_the_package_for_a_form_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    for form, package in {".txt.zst": "zstandard", ".parquet": "pyarrow"}.items():
        message = rf"needs {package}.*pip install 'sessa-toolchain\[data\]'"
        path = tmp_path / f"x{form}"
        path.write_bytes(zlib.compress(b"never read"))
        with pytest.raises(SessaError, match=message):
            list(read_rows(path, "text"))
