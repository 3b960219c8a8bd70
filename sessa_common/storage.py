"""Durable files and folders: whole or not there at all, on disk before the old ones are removed.

A writer works in a scratch folder beside its target, syncs what it wrote, renames it into place
and syncs the folder that holds it. The scratch folder is locked while its writer lives, so that the
next writer can tell what a killed one left behind and remove it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sessa_common.errors import SessaError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The file that marks a folder as written by this program, and names its weights (`manifest.py`).
MANIFEST = "sessa_manifest.json"
LOCK = ".sessa.lock"
# A scratch folder (tmp), one whose files are being moved up (fill), a replaced folder (old).
LEFTOVER = re.compile(r"\.sessa-[0-9a-f]{16}\.(tmp|fill|old)")
# Entries of a folder that counts as empty; a new ext4 file system has lost+found.
UNSEEN = (LOCK, "lost+found")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; it becomes `path`, on disk, when the block ends well.

    Nothing but the finished file ever appears as `path`. A link of that name is replaced, not
    followed.
    """
    with _scratch(path.parent, path.parent) as (scratch, _):
        yield scratch / path.name
        (scratch / path.name).chmod(_default_mode(scratch))
        sync(scratch / path.name)
        os.replace(scratch / path.name, path)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; a file that already holds this text is left alone."""
    content = text.encode()
    if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
        return
    with atomic_path(path) as scratch:
        scratch.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; a file that already holds this value is left alone."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync leaves it in the drive's cache
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything below a folder is on disk."""
    for place, _, files in os.walk(folder):
        for path in (*(Path(place) / name for name in files), Path(place)):
            if not path.is_symlink():
                sync(path)


@contextmanager
def lock_folder(folder: Path | str, writer: str = "sessa command") -> Iterator[int]:
    """Hold the lock of a folder and remove what killed writers left in it.

    Yields the lock's file descriptor: a child process that inherits it keeps the folder locked.
    Raises SessaError, which calls the other a `writer`, when another process holds the lock.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SessaError(f"{folder}: no such folder")
    descriptor = _try_lock(folder)
    if descriptor is None:
        raise SessaError(
            f"{folder}: another {writer} works there, or a training run that one left behind"
        )
    try:
        sweep(folder)
        yield descriptor
    finally:
        _unlock(descriptor, folder)


def _unlock(descriptor: int, folder: Path) -> None:
    # The folder may have been replaced by one that another process has locked since.
    if _is_lock_of(descriptor, folder):
        (folder / LOCK).unlink()
    os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove scratch folders whose writers were killed; finish what they had begun to move."""
    for path in sorted(folder.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            path.rmdir()  # Succeeds where a writer was killed before it could lock its folder.
            continue
        try:
            descriptor = _try_lock(path, create=False)
        except (OSError, SessaError):  # Another user's.
            continue
        if descriptor is None and (path / LOCK).exists():
            continue
        # Without a lock file it holds what a writer was killed while it removed.
        if match[1] == "fill":
            _move_up(path, folder)
        if match[1] == "old":
            _restore(path)
        shutil.rmtree(path, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def check_new_folder(
    path: Path | str, *, force: bool = False, inputs: Iterable[Path | str] = ()
) -> None:
    """Raise SessaError when `new_folder` with these arguments would refuse; change nothing."""
    path = Path(path)
    target = Path(os.path.realpath(path))
    for given in inputs:
        for source in {Path(os.path.abspath(given)), Path(os.path.realpath(given))}:
            if source == target or target in source.parents:
                raise SessaError(f"{path}: {given} is read from it; choose another folder")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise SessaError(f"{path}: exists and is not a folder")
    if not _entries(target):
        return
    if not force:
        raise SessaError(f"{path}: the folder is not empty; choose another or add `force`")
    _check_replaceable(path, target, inputs)


def _check_replaceable(path: Path, target: Path, inputs: Iterable[Path | str]) -> None:
    if not is_ours(target):
        raise SessaError(
            f"{path}: this program did not write it (there is no {MANIFEST} in it), so it is not "
            "replaced; choose another folder, or remove it yourself"
        )
    for given in inputs:
        if Path(given).is_dir() and Path(os.path.realpath(given)) in target.parents:
            raise SessaError(f"{path}: lies inside {given}, which is read; choose another folder")
    here = Path.cwd()
    if here == target or target in here.parents:
        raise SessaError(f"{path}: is the current folder; replace it from another one")
    if os.path.ismount(target):
        raise SessaError(f"{path}: a mount point cannot be replaced; empty it yourself")


def is_ours(folder: Path) -> bool:
    """Return True for a folder that this program wrote, which holds a manifest."""
    path = folder / MANIFEST
    return path.is_file() and not path.is_symlink()


@contextmanager
def new_folder(
    path: Path | str,
    *,
    force: bool = False,
    inputs: Iterable[Path | str] = (),
    lock_until: ExitStack | None = None,
) -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` if the block ends well and vanishes if not.

    An existing empty folder is filled; `force` replaces one that this program wrote. The folder
    stays locked until the stack `lock_until` is closed. Raises SessaError before anything is
    written for every other folder, for one that holds any of `inputs`, and at the end when
    something was put into the folder meanwhile.
    """
    path, inputs = Path(path), tuple(inputs)
    target = Path(os.path.realpath(path))
    with ExitStack() as stack:
        if target.is_dir():
            (lock_until or stack).enter_context(lock_folder(target))
        check_new_folder(path, force=force, inputs=inputs)
        before = _entries(target)
        fill = target.is_dir() and not before
        try:
            if not fill:
                _make_folder(target.parent)
                sweep(target.parent)
            parent = target if fill else target.parent
            scratch, lock = stack.enter_context(_scratch(parent, path))
        except OSError as error:
            raise SessaError(f"{path}: cannot be created ({error.strerror})") from None
        yield scratch
        if not (scratch / MANIFEST).exists():
            write_json(scratch / MANIFEST, {"format": 1})
        sync_tree(scratch)
        if added := sorted(_entries(target) - before):
            raise SessaError(f"{path}: {added[0]} was put into it meanwhile, so it is not replaced")
        if fill:
            filling = scratch.rename(scratch.with_suffix(".fill"))
            _move_up(filling, target)
            shutil.rmtree(filling)
        else:
            scratch.chmod(_folder_mode(scratch))
            _put_in_place(scratch, target, replace=bool(before))
            if lock_until is None:
                (target / LOCK).unlink()
            else:
                lock_until.callback(_unlock, os.dup(lock), target)


def remove_folder(path: Path) -> None:
    """Remove a folder; a reader finds all of it or nothing."""
    with _scratch(path.parent, path.parent) as (scratch, _):
        os.rename(path, scratch / path.name)
        sync(path.parent)


def _put_in_place(scratch: Path, target: Path, *, replace: bool) -> None:
    """Give a finished scratch folder its name; `scratch` then names the folder that it replaced."""
    if not replace:
        try:
            os.rename(scratch, target)
        except OSError as error:
            raise SessaError(f"{target}: appeared meanwhile ({error.strerror})") from None
    elif not _exchange(scratch, target):
        # Without an exchange there is a moment without either; `sweep` then restores the old one.
        with _scratch(target.parent, target, ".old") as (old, _):
            os.rename(target, old / target.name)
            os.rename(scratch, target)
            sync(target.parent)
    sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names, exchange = (os.fsencode(one), os.fsencode(other)), 2
    if sys.platform == "darwin":
        return libc.renamex_np(*names, exchange) == 0
    here = -100  # AT_FDCWD; the paths are absolute
    rename = getattr(libc, "renameat2", None)
    return rename is not None and rename(here, names[0], here, names[1], exchange) == 0


def _move_up(scratch: Path, folder: Path) -> None:
    """Move the entries of a scratch folder into the folder around it, the manifest last."""
    names = [path.name for path in scratch.iterdir() if path.name != LOCK]
    for name in sorted(names, key=lambda name: (name == MANIFEST, name.endswith(".json"), name)):
        os.rename(scratch / name, folder / name)
    sync(folder)


def _restore(old: Path) -> None:
    """Give a replaced folder its name back when its replacement did not get it."""
    for path in old.iterdir():
        if path.name != LOCK and not os.path.lexists(old.parent / path.name):
            os.rename(path, old.parent / path.name)
            sync(old.parent)


def is_empty(folder: Path) -> bool:
    """Return True for a folder that is absent or holds only what writers keep while they work."""
    return not _entries(folder)


def _entries(folder: Path) -> set[str]:
    """Everything in a folder and below it, without what writers keep there while they work."""
    found: set[str] = set()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not LEFTOVER.fullmatch(name)]
        inside = os.path.relpath(place, folder)
        found |= {os.path.normpath(os.path.join(inside, name)) for name in (*folders, *files)}
    return {name for name in found if os.path.basename(name) not in UNSEEN}


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, each on disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextmanager
def _scratch(parent: Path, target: Path, suffix: str = ".tmp") -> Iterator[tuple[Path, int]]:
    """Make a folder that only its owner may enter, and its lock; what is left in it is removed.

    Errors name the file in `target`, for which the scratch folder stands.
    """
    descriptor, scratch = None, parent
    try:
        while descriptor is None:  # A sweep may take a folder away before it is locked.
            scratch = parent / f".sessa-{secrets.token_hex(8)}{suffix}"
            scratch.mkdir(0o700)
            with contextlib.suppress(FileNotFoundError):
                descriptor = _try_lock(scratch)
        yield scratch, descriptor
    except OSError as error:  # A full disk, for example, is not the fault of the scratch folder.
        error.filename = str(error.filename or target).replace(str(scratch), str(target))
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _default_mode(scratch: Path) -> int:
    """The permissions that the system gives to new files, as its lock file has them."""
    return (scratch / LOCK).stat().st_mode & 0o777


def _folder_mode(scratch: Path) -> int:
    mode = _default_mode(scratch)
    return mode | (mode & 0o444) >> 2  # Whoever may read may enter.


def _try_lock(folder: Path, *, create: bool = True) -> int | None:
    """The descriptor of a folder's lock, None when another holds it or there is none to take."""
    if fcntl is None:
        raise SessaError("folders cannot be locked on Windows, which is not supported; use WSL")
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    while True:
        try:
            descriptor = os.open(folder / LOCK, flags, 0o666)
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise SessaError(f"{folder}: cannot be locked ({error.strerror})") from None
        # Its last holder may have removed the file after it was opened here.
        if _is_lock_of(descriptor, folder):
            return descriptor
        os.close(descriptor)


def _is_lock_of(descriptor: int, folder: Path) -> bool:
    """Return True when an open file is the lock file that a folder has now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder / LOCK))
    except FileNotFoundError:
        return False
