"""A small ext4 file system whose power can be cut, which loses everything that is not synced."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

# EXT4_IOC_SHUTDOWN of linux/fs/ext4, without writing the journal first.
SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2
SIZE = 256 * 2**20


class Disk:
    """A mounted file system in a file."""

    def __init__(self, folder: Path) -> None:
        self.image, self.folder = folder / "disk.img", folder / "disk"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(SIZE)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)
        self._mount()

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.folder], check=True)

    def cut_power(self) -> None:
        """Drop everything that is not on the disk, and mount what is left as after a start."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        finally:
            os.close(descriptor)
        self.close()
        self._mount()

    def close(self) -> None:
        """Unmount."""
        subprocess.run(["umount", self.folder], check=True)


def why_no_disk() -> str | None:
    """The reason why this machine has no disk whose power can be cut, None if it has one."""
    if os.name != "posix" or os.geteuid() != 0:
        return "mounting needs root"
    missing = [name for name in ("mkfs.ext4", "mount", "losetup") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    free = subprocess.run(["losetup", "--find"], capture_output=True, check=False)
    return None if free.returncode == 0 else "there is no loop device"


@contextlib.contextmanager
def open_disk(folder: Path) -> Iterator[Disk]:
    """A disk in a folder, unmounted at the end."""
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.close()
