"""Files and folders: whole or not there, never over what is not ours, one writer at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from sessa_common import storage
from sessa_common.errors import SessaError
from sessa_common.storage import (
    LOCK,
    MANIFEST,
    atomic_path,
    lock_folder,
    new_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, *files: str, force: bool = False, inputs=()) -> None:
    with new_folder(path, force=force, inputs=inputs) as scratch:
        for name in files:
            (scratch / name).write_text(name)


def killed(folder: Path, program: str) -> None:
    """Run lines of Python, with `folder` and `die` defined, that end their process at once."""
    start = f"""
import os, pathlib
from sessa_common import storage
folder = pathlib.Path({str(folder)!r})
die = lambda *arguments: os.kill(os.getpid(), 9)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", start + program], env=environment)
    assert done.returncode == -9


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_appears_whole_with_the_usual_permissions(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.bin") as scratch:
            scratch.write_bytes(b"12")
            scratch.chmod(0o600)
            assert not (tmp_path / "a.bin").exists()
        make(tmp_path / "folder", "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert names(tmp_path) == ["a.bin", "folder"]


def test_file_that_fails_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a") as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_unchanged_file_is_not_written_again(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    before = (tmp_path / "a.json").stat()
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").stat().st_ino == before.st_ino
    write_json(tmp_path / "a.json", {"a": 2})
    assert (tmp_path / "a.json").stat().st_ino != before.st_ino


def test_link_of_the_file_s_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.json").symlink_to(tmp_path / "victim")
    write_json(tmp_path / "a.json", {})
    assert not (tmp_path / "a.json").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_folder_appears_only_when_all_went_well(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_folder(target) as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError
    assert not target.exists() and names(target.parent) == []
    with new_folder(target) as scratch:
        (scratch / "whole").write_text("x")
        assert not target.exists()
    assert names(target) == [MANIFEST, "whole"]


def test_folder_that_is_not_empty_needs_force(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(SessaError, match="not empty"):
        make(tmp_path / "out", "new")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", force=True):
        raise RuntimeError
    assert names(tmp_path / "out") == ["old", MANIFEST]
    make(tmp_path / "out", "new", force=True)
    assert names(tmp_path / "out") == ["new", MANIFEST]
    assert names(tmp_path) == ["out"]


def test_folder_that_we_did_not_write_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(SessaError, match="did not write it"):
        make(tmp_path / "out", "new", force=True)
    assert names(tmp_path / "out") == ["thesis.txt"] and names(tmp_path) == ["out"]


def test_folder_is_replaced_where_the_system_cannot_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    make(tmp_path / "out", "old")
    make(tmp_path / "out", "new", force=True)
    assert names(tmp_path / "out") == ["new", MANIFEST] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("way", ["folder", "link", "here"])
def test_empty_folder_is_used_as_it_is(tmp_path, monkeypatch, way):
    target = tmp_path / "empty"
    target.mkdir()
    identity, given = target.stat().st_ino, target
    if way == "link":
        given = tmp_path / "link"
        given.symlink_to(target)
    if way == "here":
        monkeypatch.chdir(target)
        given = Path(".")
    make(given, "a", "b.json")
    assert names(target) == ["a", "b.json", MANIFEST] and target.stat().st_ino == identity
    assert given.is_symlink() == (way == "link")


def test_new_file_system_counts_as_empty(tmp_path):
    (tmp_path / "lost+found").mkdir()
    make(tmp_path, "a")
    assert names(tmp_path) == ["a", "lost+found", MANIFEST]


@pytest.mark.parametrize("old", ["nothing", "empty", "ours"])
def test_what_is_put_into_the_folder_meanwhile_stays(tmp_path, old):
    target = tmp_path / "out"
    if old == "ours":
        make(target, "before")
    if old == "empty":
        target.mkdir()
    with pytest.raises(SessaError, match="meanwhile"), new_folder(target, force=True) as scratch:
        (scratch / "new").write_text("x")
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("x")
    assert "thesis.txt" in names(target) and "new" not in names(target)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("way", ["itself", "parent", "through-a-link", "link-inside"])
def test_folder_that_holds_an_input_is_refused(tmp_path, way):
    make(tmp_path / "runs", "d.txt")
    (tmp_path / "elsewhere.txt").write_text("x")
    given = {"itself": tmp_path / "runs", "parent": tmp_path / "runs" / "d.txt",
             "through-a-link": tmp_path / "link" / "d.txt",
             "link-inside": tmp_path / "runs" / "link.txt"}[way]  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(SessaError, match="is read from it"):
        make(tmp_path / "runs", force=True, inputs=[given])
    assert "d.txt" in names(tmp_path / "runs")


def test_folder_inside_an_input_may_be_new_but_is_not_replaced(tmp_path):
    make(tmp_path / "model", "weights")
    make(tmp_path / "model" / "onnx", "a", inputs=[tmp_path / "model"])
    with pytest.raises(SessaError, match="lies inside"):
        make(tmp_path / "model" / "onnx", "b", force=True, inputs=[tmp_path / "model"])
    assert "a" in names(tmp_path / "model" / "onnx")


def test_current_folder_is_not_replaced(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(SessaError, match="current folder"):
        make(Path("."), "new", force=True)


@pytest.mark.parametrize("target", ["file", "file/out"])
def test_place_that_cannot_be_a_folder_is_named(tmp_path, target):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SessaError, match=f"{target}: (exists and is not|cannot be created)"):
        make(tmp_path / target, force=True)


def test_folder_has_one_writer(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(SessaError, match="another sessa command"), lock_folder(tmp_path):
            pass
        with pytest.raises(SessaError, match="another sessa command"):
            make(tmp_path, "a")
    assert names(tmp_path) == []


def test_folder_stays_locked_from_its_first_moment(tmp_path):
    make(tmp_path / "ours", "old")
    (tmp_path / "empty").mkdir()
    for name in ("new", "ours", "empty"):
        with ExitStack() as stack:
            with new_folder(tmp_path / name, force=True, lock_until=stack):
                pass
            with pytest.raises(SessaError, match="another"), lock_folder(tmp_path / name):
                pass
        with lock_folder(tmp_path / name):
            pass
        assert names(tmp_path / name) == [MANIFEST]


def test_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), lock_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("moment", ["yield", "locked", "unlocked", "removing"])
def test_killed_file_writer_leaves_nothing_for_long(tmp_path, moment):
    programs = {
        "yield": "with storage.atomic_path(folder / 'a') as p: p.write_text('half'); die()",
        "removing": "with storage.atomic_path(folder / 'a') as p: "
        "p.write_text('half'); p.with_name(storage.LOCK).unlink(); die()",
        "locked": "storage.fcntl.flock = die\nwith storage.atomic_path(folder / 'a'): pass",
        "unlocked": "storage._try_lock = die\nwith storage.atomic_path(folder / 'a'): pass",
    }
    killed(tmp_path, programs[moment])
    assert len(names(tmp_path)) == 1
    with lock_folder(tmp_path):
        assert names(tmp_path) == [LOCK]
    assert names(tmp_path) == []


def test_file_that_is_being_written_is_not_swept(tmp_path):
    with atomic_path(tmp_path / "a") as scratch:
        scratch.write_text("x")
        storage.sweep(tmp_path)
    assert names(tmp_path) == ["a"]


REPLACE = """
def dying(function, after):
    calls = []
    def call(*arguments):
        calls.append(1)
        if len(calls) == after: die()
        return function(*arguments)
    return call
os.rename = dying(os.rename, {after})
storage._exchange = {exchange}
with storage.new_folder(folder / 'out', force=True) as scratch:
    for name in 'ab': (scratch / name).write_text('new')
"""


@pytest.mark.parametrize("after", [1, 2])
def test_killed_replacement_is_repaired_by_the_next_writer(tmp_path, after):
    make(tmp_path / "out", "a")
    killed(tmp_path, REPLACE.format(after=after, exchange="lambda *a: False"))
    assert (tmp_path / "out").exists() == (after == 1)
    make(tmp_path / "other")
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert names(tmp_path) == ["other", "out"]


def test_replacement_never_leaves_the_name_empty(tmp_path):
    make(tmp_path / "out", "a")
    killed(tmp_path, REPLACE.format(after=0, exchange="lambda *a: exchange(*a) and die()").replace(
        "storage._exchange =", "exchange = storage._exchange; storage._exchange ="))  # fmt: skip
    assert (tmp_path / "out" / "a").read_text() == "new"
    make(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("after", [2, 3, 4])
def test_killed_filling_of_an_empty_folder_is_finished_by_the_next_writer(tmp_path, after):
    (tmp_path / "out").mkdir()
    killed(tmp_path, REPLACE.format(after=after, exchange="None"))
    assert MANIFEST not in names(tmp_path / "out")
    with lock_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / "out") == ["a", "b", MANIFEST]


def test_system_without_locks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "fcntl", None)
    with pytest.raises(SessaError, match="Windows"), lock_folder(tmp_path):
        pass


def test_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError) as error, atomic_path(tmp_path / "a.json") as scratch:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
    assert error.value.filename == str(tmp_path / "a.json")
    with pytest.raises(OSError) as error, new_folder(tmp_path / "out") as scratch:
        write_text(scratch / "b", "x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch / "b"))
    assert error.value.filename == str(tmp_path / "out" / "b")
    assert names(tmp_path) == []
