"""Files of other people, opened so that a hostile or unsuitable one costs nothing."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

from sessa_common.errors import SessaError

# An archive may unpack to this many times its size, or to FREE_BYTES if that is more.
LARGEST_EXPANSION = 20
FREE_BYTES = 256 * 2**20


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a regular file, links followed.

    Raises SessaError for a missing path, a folder, a pipe, a device, and for a path that the
    system refuses to look at.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        told = "the link leads to no file" if path.is_symlink() else "no such file"
        raise SessaError(f"{path}: {told}") from None
    except (OSError, ValueError) as error:
        raise SessaError(f"{path}: cannot be read ({reason(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise SessaError(f"{path}: expected a file, found {kind}")
    return status


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; raises SessaError as `require_regular` does."""
    require_regular(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise SessaError(f"{path}: cannot be read ({reason(error)})") from None


def read_limited(path: Path, limit: int) -> bytes:
    """Read a whole regular file; SessaError when it is unreadable or longer than `limit` bytes."""
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise SessaError(f"{path}: cannot be read ({reason(error)})") from None
    if len(content) > limit:
        raise SessaError(f"{path}: larger than {limit:,} bytes, the most that is read of its kind")
    return content


def require_modest_archive(path: Path) -> None:
    """Raise SessaError when a zip archive (.npz, .pt) would unpack to far more than its size.

    A file that is no zip archive passes.
    """
    size = require_regular(path).st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    if unpacked > max(FREE_BYTES, LARGEST_EXPANSION * size):
        raise SessaError(
            f"{path}: its {size:,} bytes would unpack to {unpacked:,}, more than "
            f"{LARGEST_EXPANSION} times as many; weights do not compress like that"
        )


def reason(error: Exception) -> str:
    """The system's words for an error, without the path that they repeat."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
