"""The native ONNX Runtime operator: built once, on request, and registered with sessions.

The sources are in `ort_op`. Nothing here runs at installation: `sessa build-op` and
`sessa export --native` call `build`, everything else only looks for what was built.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessa_common.errors import SessaError
from sessa_export.cuda_toolkit import Toolkit, find_toolkit

# The commands that build the library, without and with the CUDA kernels.
BUILD, BUILD_CUDA = "sessa build-op", "sessa build-op --cuda"
INCLUDE_VARIABLE = "ONNXRUNTIME_INCLUDE_DIR"
HEADER = "onnxruntime_c_api.h"
# Where Homebrew and the Linux distributions put ONNX Runtime's headers.
INCLUDE_FOLDERS = (
    "/opt/homebrew/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "/usr/include/onnxruntime",
)
# The operator's entries of the C interface exist from here on (ONNX Runtime 1.17).
API_VERSION = 17
SOURCES = (".cpp", ".h", ".cu", ".cuh")
HASH_SUFFIX = ".sha256"
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
)
# One file per instruction set: which of them runs is decided in the library, by the processor.
AVX2 = ("-mavx2", "-mfma")
X86_FLAGS = {
    "kernels_avx2.cpp": AVX2,
    "kernels_avx512.cpp": (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
}


def source_folder() -> Path:
    """Folder of the C++ sources: inside an installed package, beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "ort_op"
    return inside if inside.is_dir() else here.parent / "ort_op"


def cache_folder() -> Path:
    """Folder that keeps built libraries: XDG_CACHE_HOME or the platform's own place."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        base = str(Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache"))
    return Path(base) / "sessa-toolchain"


def library_name() -> str:
    """File name of the library on this platform."""
    return "libsessa_ort.dylib" if sys.platform == "darwin" else "libsessa_ort.so"


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX when set, else the first of c++, g++ and clang++.

    Raises SessaError on Windows and when there is none.
    """
    if sys.platform == "win32":
        raise SessaError(
            "the native operator is built on Linux and macOS only; without it the "
            "exported model runs as it is"
        )
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise SessaError(
            f"CXX is {os.environ['CXX']!r}, which is not a command ({error})"
        ) from None
    found = next((path for name in given[:1] or COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise SessaError(
            f"no C++ compiler found (looked for {', '.join(given[:1] or COMPILERS)}); install one "
            "(Debian: apt install g++, macOS: xcode-select --install) or name it in CXX"
        )
    return [found, *given[1:]]


def find_headers() -> Path | None:
    """Folder of ONNX Runtime's C header, None when there is none that is new enough.

    Raises SessaError when ONNXRUNTIME_INCLUDE_DIR names a folder without a usable one.
    """
    given = os.environ.get(INCLUDE_VARIABLE)
    if given:
        if _header_version(Path(given)) < API_VERSION:
            raise SessaError(
                f"{INCLUDE_VARIABLE} is {given}, expected a folder with {HEADER} of ONNX Runtime "
                f"1.{API_VERSION} or later; unset it to build without headers"
            )
        return Path(given)
    usable = (Path(folder) for folder in INCLUDE_FOLDERS)
    return next((folder for folder in usable if _header_version(folder) >= API_VERSION), None)


def _header_version(folder: Path) -> int:
    """ORT_API_VERSION of the header in a folder, 0 without a header."""
    header = folder / HEADER
    if not header.is_file():
        return 0
    found = re.search(r"#define\s+ORT_API_VERSION\s+(\d+)", header.read_text(errors="replace"))
    return int(found.group(1)) if found else 0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the library will be."""

    sources: Path
    compiler: tuple[str, ...]
    headers: Path | None
    sanitize: bool
    cuda: Toolkit | None = None

    def key(self) -> str:
        """Hash of sources, compilers, flags and platform."""
        versions = [_version(self.compiler)]
        if self.cuda:
            versions += [str(self.cuda), _version([str(self.cuda.nvcc)])]
        flags = (FLAGS, X86_FLAGS, SANITIZE if self.sanitize else ())
        header = self.headers and (str(self.headers), _header_version(self.headers))
        system = (sys.platform, platform.machine())
        digest = hashlib.sha256(repr((self.compiler, versions, flags, header, system)).encode())
        for file in sorted(self.sources.iterdir()):
            if file.suffix in SOURCES:
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:20]

    def library(self, cache: Path | None) -> Path:
        """Path at which the library is kept."""
        return (cache or cache_folder()) / self.key() / library_name()

    def commands(self, folder: Path) -> tuple[list[list[str]], list[str]]:
        """The compilations, which do not depend on one another, and the link."""
        common = [*self.compiler, *FLAGS, *(SANITIZE if self.sanitize else ())]
        include = ["-isystem", str(self.headers)] if self.headers else []
        defined = ["-DSESSA_CUDA"] if self.cuda else []
        x86 = platform.machine() in ("x86_64", "AMD64")
        compilations, objects = [], []
        for source in sorted(self.sources.glob("*.cpp")):
            extra = X86_FLAGS.get(source.name, ()) if x86 else ()
            objects.append(str(folder / f"{source.stem}.o"))
            given = [*common, *defined, *extra, *include]
            compilations.append([*given, "-c", str(source), "-o", objects[-1]])
        library = str(folder / library_name())
        if self.cuda is None:
            return compilations, [*common, "-shared", *objects, "-o", library]
        compile_cuda, link = self.cuda.commands(self.compiler)
        for source in sorted(self.sources.glob("*.cu")):
            objects.append(str(folder / f"{source.stem}.o"))
            given = [*compile_cuda, "-I", str(self.sources)]
            compilations.append([*given, "-c", str(source), "-o", objects[-1]])
        return compilations, [*link, *objects, "-o", library]


def _version(command: Sequence[str]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout


def make_recipe(*, sanitize: bool = False, cuda: bool = False) -> Recipe:
    """Return the recipe of a build on this machine; SessaError without the compilers."""
    toolkit = find_toolkit() if cuda else None
    return Recipe(source_folder(), tuple(find_compiler()), find_headers(), sanitize, toolkit)


def library_path(
    *, sanitize: bool = False, cuda: bool = False, cache: Path | None = None
) -> Path | None:
    """The library that `build` made from these sources on this machine, None when it did not."""
    path = make_recipe(sanitize=sanitize, cuda=cuda).library(cache)
    if not path.is_file():
        return None
    require_trusted(path)
    return path


def require_trusted(library: Path) -> None:
    """Raise SessaError unless a library in the cache is this user's and is what was built.

    Loading a library runs its code. So the file, its folder, the cache and the folder around the
    cache must not be writable by others, all but the last must belong to this user, and the file
    must have the SHA-256 that `build` wrote beside it.
    """
    remedy = "remove it and run `sessa build-op` again"
    own, around = (library, library.parent, library.parent.parent), library.parent.parent.parent
    for path in (*own, around):
        status = path.stat()
        if status.st_mode & WRITABLE_BY_OTHERS:
            raise SessaError(
                f"{path}: other users may write here, so the native operator is not loaded; "
                "correct the permissions, or set XDG_CACHE_HOME to a folder of your own"
            )
        if path != around and status.st_uid != os.getuid():
            raise SessaError(f"{path}: belongs to another user, so it is not loaded; {remedy}")
    recorded = library.with_name(library.name + HASH_SUFFIX)
    if not recorded.is_file() or recorded.read_text(encoding="ascii").strip() != _sha256(library):
        raise SessaError(f"{library}: is not the file that was built here; {remedy}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _private_folder(path: Path) -> None:
    """Make the cache folder `path`, and make it readable by this user alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (path, path.parent):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)


def build(
    *, sanitize: bool = False, cuda: bool = False, force: bool = False, cache: Path | None = None
) -> Path:
    """Compile the library unless the cache has it, and return its path.

    It appears under its name only when it is complete, so several processes may build at once.
    `sanitize` adds AddressSanitizer and UndefinedBehaviorSanitizer, `cuda` the operator of the CUDA
    provider. Raises SessaError without a compiler, with the compiler's words when it fails, and for
    a cache that others may write to.
    """
    recipe = make_recipe(sanitize=sanitize, cuda=cuda)
    path = recipe.library(cache)
    if path.is_file() and path.with_name(path.name + HASH_SUFFIX).is_file() and not force:
        require_trusted(path)
        return path
    _private_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
        compilations, link = recipe.commands(Path(scratch))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compilations))
        _run(link)
        built, recorded = Path(scratch) / library_name(), path.name + HASH_SUFFIX
        (Path(scratch) / recorded).write_text(_sha256(built) + "\n", encoding="ascii")
        os.replace(Path(scratch) / recorded, path.with_name(recorded))
        os.replace(built, path)
    require_trusted(path)
    return path


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise SessaError(f"{command[0]}: cannot be run ({error.strerror})") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        said = " / ".join((errors or done.stderr.splitlines() or ["no message"])[:3])
        raise SessaError(f"{shlex.join(command[:1])} cannot build the native operator: {said}")


def register(options: Any, library: Path | str | None = None, *, cuda: bool = False) -> Path:
    """Add the operator to an onnxruntime.SessionOptions and return the library's path.

    Takes `library`, else what `build` made, for the CUDA provider too if `cuda`. Raises SessaError
    when it is not built or not loadable.
    """
    path = Path(library) if library else library_path(cuda=cuda)
    if path is None or not path.is_file():
        operator = "the native operator with its CUDA kernels" if cuda else "the native operator"
        missing = f"{path}: no such file" if path else f"{operator} is not built"
        raise SessaError(f"{missing}; build it with `{BUILD_CUDA if cuda else BUILD}`")
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # the binding raises one class per status, all plain Exceptions
        raise SessaError(f"{path}: ONNX Runtime cannot load it ({error})") from None
    return path
