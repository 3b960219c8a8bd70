"""Documents from every kind of source, found, read in order, and refused by name."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from sessa_common.data import sources
from sessa_common.data.sources import ReadCounts, TextSource, check_names, read_documents
from sessa_common.errors import SessaError

STORIES = ["Once upon a time.", "The fox slept.", "Ein Bär lief."]


def write_source(folder, kind):
    """A file or folder with STORIES in it, and its name for --data."""
    if kind in ("folder", "wildcard"):
        (folder / "sub").mkdir()
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "no.txt").write_text("never read")
        (folder / "sub" / "ignored.bin").write_bytes(b"\xff")
        for name, text in zip(("a.txt", "sub/b.md", "sub/c.py"), STORIES, strict=True):
            (folder / name).write_text(text, encoding="utf-8")
        return str(folder) if kind == "folder" else str(folder / "**" / "*.[tmp]*")
    path = folder / f"stories.{kind}"
    if kind == "txt":
        path.write_text("\n".join(STORIES), encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps({"story": text, "id": i}) for i, text in enumerate(STORIES)]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"id": [1, 2, 3], "story": STORIES})
        parquet.write_table(table, path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "wildcard", "jsonl", "parquet"])
def test_each_kind_gives_its_documents_in_order(kind, tmp_path):
    name = write_source(tmp_path, kind)
    assert list(read_documents([name], TextSource(text_field="story"))) == STORIES


def test_a_text_file_is_one_document(tmp_path):
    assert list(read_documents([write_source(tmp_path, "txt")])) == ["\n".join(STORIES)]


def test_names_follow_each_other_blanks_are_dropped_and_the_limit_holds(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "z.txt").write_text("z")
    names = [str(tmp_path / "z.txt"), str(tmp_path / "blank.txt"), "pydoc"]
    found = list(read_documents(names, TextSource(max_documents=3)))
    assert found[0] == "z" and len(found) == 3
    assert len(list(read_documents(["pydoc"]))) > 50


def test_a_hugging_face_data_set_is_streamed(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"story": t}) + "\n" for t in STORIES))
    source = TextSource(text_field="story", split="test")
    name = f"hf:{tmp_path}"
    assert list(read_documents([name], source)) == STORIES
    with pytest.raises(SessaError, match="no field 'text'; it has story"):
        list(read_documents([name], TextSource(split="test")))
    with pytest.raises(SessaError, match="validation"):
        list(read_documents([name], TextSource(text_field="story", split="validation")))


@pytest.mark.parametrize("name", ["owner/stories", "stories"])
def test_only_hf_names_go_to_the_network(name, monkeypatch):
    def never(*_):
        raise AssertionError("looked up")

    monkeypatch.setattr(sources, "_hub_rows", never)
    with pytest.raises(SessaError, match=f"{name}: no such file .* named hf:{name}"):
        read_documents([name])


def test_standard_input_is_one_document_that_may_be_read_again(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffBär\r\n".encode())))
    assert [list(read_documents(["-"])) for _ in range(2)] == [["Bär\n"]] * 2
    with pytest.raises(SessaError, match="named twice"):
        read_documents(["-", "-"])
    with pytest.raises(SessaError, match="by one run only"):
        check_names(["-"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SessaError, match="closed"):
        list(read_documents(["-"]))


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**"])
def test_links_are_followed_and_every_file_is_read_once(pattern, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    (inside / "sub" / "a.txt").write_text("a")
    (outside / "b.txt").write_text("b")
    for name, target in {
        "sub/loop": inside,
        "other": outside,
        "0.txt": inside / "sub/a.txt",
        "self.txt.d": inside,
    }.items():
        (inside / name).symlink_to(target)
    assert list(read_documents([str(inside / pattern)])) == ["b", "a"]


def test_a_wildcard_matches_folders_and_names_as_a_shell_does(tmp_path):
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "z/y/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern, expected in {
        "*.txt": ["a.txt"],
        "*/*": ["x/b.txt"],
        "**/y/*": ["x/y/c.txt", "z/y/d.md"],
        "x/**": ["x/b.txt", "x/y/c.txt"],
        "?/**/[cd].*": ["x/y/c.txt", "z/y/d.md"],
    }.items():
        assert list(read_documents([str(tmp_path / pattern)])) == expected, pattern


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    for name in ("~/a.txt", "~", "~/*.txt"):
        assert list(read_documents([name])) == ["home"]


def test_what_is_left_out_is_counted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": null}\n{"text": " "}\n{"text": null}\n')
    counts = ReadCounts()
    assert list(read_documents([str(rows)], counts=counts)) == ["a"]
    assert counts.notes() == [
        f"skipped 2 rows whose text is null, the first in {rows}, line 2",
        "skipped 1 document of white space only",
    ]
    assert ReadCounts().notes() == []


def _bad_source(folder, case):
    path = folder / "x.jsonl"
    if case == "missing":
        return folder / "none.txt"
    if case == "no match":
        return folder / "*.txt"
    if case == "empty folder":
        return folder
    if case == "unknown type":
        path = folder / "x.docx"
        path.write_bytes(b"PK")
    elif case == "not utf-8":
        path = folder / "x.txt"
        path.write_bytes(b"ok \xff")
    elif case == "jsonl not utf-8":
        path.write_bytes(b'{"text": "\xff"}\n')
    elif case == "not json":
        path.write_text('{"text": "a"}\n{"text": \n')
    elif case == "no object":
        path.write_text("[1]\n")
    elif case == "no field":
        path.write_text('{"text": "a"}\n{"body": "b"}\n')
    elif case == "not text":
        path.write_text('{"text": 7}\n')
    elif case == "pipe":
        path = folder / "x.txt"
        os.mkfifo(path)
    elif case == "broken link":
        (folder / "x.txt").symlink_to(folder / "gone")
        return folder
    elif case == "link to itself":
        path.symlink_to(path)
    elif case == "half a pair":
        path.write_text('{"text": "abc\\ud800"}\n')
    elif case == "not parquet":
        path = folder / "x.parquet"
        path.write_bytes(b"PAR1 no")
    elif case == "no column":
        from pyarrow import parquet, table

        path = folder / "x.parquet"
        parquet.write_table(table({"body": ["a"]}), path)
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"none\.txt: no such file"),
        ("no match", r"\*\.txt: no file matches"),
        ("empty folder", "no text file in the folder"),
        ("pipe", r"x\.txt: expected a file, found a pipe"),
        ("broken link", r"x\.txt: the link leads to no file"),
        ("link to itself", r"x\.jsonl: cannot be read \(Too many levels"),
        ("unknown type", "its name ends in '.docx'"),
        ("not utf-8", r"x\.txt: not UTF-8 text \(byte 3\)"),
        ("jsonl not utf-8", r"x\.jsonl, line 1: not UTF-8"),
        ("not json", r"x\.jsonl, line 2: not JSON"),
        ("no object", "line 1: expected a JSON object, found a list"),
        ("no field", "line 2: no field 'text'; it has body"),
        ("not text", "line 1: 'text' is a number, expected text"),
        ("half a pair", "line 1, 'text': character 4 is half of a surrogate pair"),
        ("not parquet", r"x\.parquet: not a readable parquet"),
        ("no column", r"x\.parquet: no column 'text'; it has body"),
    ],
)
def test_bad_sources_are_named(case, message, tmp_path):
    with pytest.raises(SessaError, match=message):
        list(read_documents([str(_bad_source(tmp_path, case))]))


def test_what_may_not_be_read_is_named_and_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "x.txt", tmp_path / "sub" / "y.txt"):
        path.write_text("secret")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    # The user root may read everything, whatever the mode of a file says.
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(SessaError, match=r"x\.txt: cannot be read \(Permission denied\)"):
            list(read_documents([str(tmp_path / "x.txt")]))
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        with pytest.raises(SessaError, match="the folder cannot be read"):
            read_documents([str(tmp_path)])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refuse)
        with pytest.raises(SessaError, match="cannot be read"):
            read_documents([str(tmp_path / "x.txt")])


def test_every_name_is_resolved_before_the_first_is_read(tmp_path):
    with pytest.raises(SessaError, match="no such file"):
        read_documents(["pydoc", str(tmp_path / "none.txt")])
