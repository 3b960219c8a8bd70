"""Compile Metal text for the CPU and launch its kernels on NumPy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from metal_emulator.address_spaces import clang
from metal_emulator.rewrite import (
    Kernel,
    MetalError,
    compiler,
    is_clang,
    preprocess,
    run_compiler,
    to_cpp,
)

HERE = Path(__file__).parent
MEMORY_LIMIT = 32768  # bytes of threadgroup memory on every Apple GPU
MAX_THREADS = 1024

_FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-w",
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
    "-fno-math-errno",
    f"-I{HERE / 'include'}",
]
# Unsuffixed constants are float and half rounds at every operation, as in Metal.
_GCC_FLAGS = ["-fsingle-precision-constant", "-fexcess-precision=16"]
_CLANG_FLAGS = ["-cl-single-precision-constant", "-ffloat16-excess-precision=none"]
# "fast" has what fast math lets a compiler assume of numbers, without the flag that changes how the
# whole process rounds. clang, from which Metal's compiler is made, does remove comparisons then.
_MODES = {
    "": ["-O1"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
    "fast": ["-O1", "-ffinite-math-only", "-fno-signed-zeros"],
}

# Which mem_flags make a barrier order memory accesses for ThreadSanitizer.
DEVICE, THREADGROUP = 1, 2


@dataclass(frozen=True)
class Launch:
    """One launch: the whole text, the kernel's name in it, and every buffer before the launch."""

    text: str
    name: str
    arrays: list[np.ndarray]
    grid: tuple[int, ...]
    threadgroup: tuple[int, ...]


class _Launch(ctypes.Structure):
    """`Launch` of runtime.h."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("buffer_count", ctypes.c_int32),
        ("sync_mask", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("memory_limit", ctypes.c_uint64),
        ("memory_used", ctypes.c_uint64),
        ("error", ctypes.c_char * 4096),
    )


class Library:
    """The kernels of one compiled text, by host name."""

    def __init__(self, path: Path, kernels: Iterable[str]):
        self.kernels = list(kernels)
        self._library = ctypes.CDLL(str(path))
        self._library.emu_allocate.restype = ctypes.c_void_p
        self._library.emu_allocate.argtypes = [ctypes.c_size_t]
        self._library.emu_free.restype = ctypes.c_bool
        self._library.emu_free.argtypes = [ctypes.c_void_p]

    def run(
        self,
        name: str,
        arrays: list[np.ndarray],
        grid: tuple[int, ...],
        threadgroup: tuple[int, ...],
        *,
        seed: int = 0,
        sync: int = DEVICE | THREADGROUP,
    ) -> int:
        """Launch kernel `name` on `grid` threads; give the bytes of threadgroup memory it used.

        Array i is buffer i, C-contiguous; writable arrays are copied back. `seed` permutes the
        schedule: 0 all threads in turn, even random order, odd one simdgroup far ahead.
        Raises MetalError for whatever the runtime finds wrong.
        """
        if name not in self.kernels:
            raise MetalError(f"no kernel {name}; the text has {', '.join(self.kernels)}")
        if np.prod(threadgroup) > MAX_THREADS:
            raise MetalError(f"threadgroup {threadgroup} exceeds {MAX_THREADS} threads")
        if not all(array.flags.c_contiguous for array in arrays):
            raise MetalError(f"{name}: an array is not contiguous")
        buffers = [self._library.emu_allocate(max(array.nbytes, 1)) for array in arrays]
        for buffer, array in zip(buffers, arrays, strict=True):
            ctypes.memmove(buffer, array.ctypes.data, array.nbytes)
        launch = self._launch(name, arrays, buffers)
        launch.grid[:] = (*grid, 1, 1)[:3]
        launch.group[:] = (*threadgroup, 1, 1)[:3]
        launch.seed, launch.sync_mask = seed, sync
        failed = self._library.emu_launch(ctypes.byref(launch))
        underrun = []
        for i, (buffer, array) in enumerate(zip(buffers, arrays, strict=True)):
            if not failed and array.flags.writeable:
                ctypes.memmove(array.ctypes.data, buffer, array.nbytes)
            if not self._library.emu_free(buffer):
                underrun.append(i)
        if failed:
            raise MetalError(f"{name}: {launch.error.decode()}")
        if underrun:
            raise MetalError(f"{name}: write before the start of buffer {underrun}")
        return launch.memory_used

    def _launch(self, name: str, arrays: list[np.ndarray], buffers: list[int]) -> _Launch:
        launch = _Launch()
        entry = getattr(self._library, f"emu_kernel_{self.kernels.index(name)}")
        launch.kernel = ctypes.cast(entry, ctypes.c_void_p)
        # Kept on the object: the structure holds bare addresses.
        launch.arrays = (ctypes.c_void_p * len(buffers))(*buffers)
        launch.bytes = (ctypes.c_uint64 * len(buffers))(*(array.nbytes for array in arrays))
        launch.buffers = ctypes.cast(launch.arrays, ctypes.c_void_p)
        launch.sizes = ctypes.cast(launch.bytes, ctypes.c_void_p)
        launch.buffer_count, launch.memory_limit = len(buffers), MEMORY_LIMIT
        return launch


@cache
def compile_metal(text: str, mode: str = "") -> Library:
    """The kernels of Metal `text`; raises MetalError with the compiler's messages.

    In mode "fast", which needs clang, no number is assumed to be infinite or NaN.
    """
    return Library(*compiled(text, mode))


def compiled(text: str, mode: str = "") -> tuple[Path, dict[str, Kernel]]:
    """The shared library made from `text` and its kernels; "tsan" is for ThreadSanitizer.

    Compiled files are kept by the hash of what they were made from.
    """
    cpp, kernels = to_cpp(preprocess(text))
    shim, runtime = _prepared(mode)
    path = cache_folder() / f"{_hash(cpp, shim.name, runtime.name)}.so"
    if not path.exists():
        source = path.with_suffix(".cc")
        source.write_text(cpp)
        # The folder comes first: its precompiled header stands in for the one in include/.
        program, *flags = _command(mode)
        flags = [f"-I{shim}", *flags, "-include", "metal_shim.h"]
        _build(path, [program, *flags, "-shared", str(source), str(runtime)])
    return path, kernels


def _command(mode: str) -> list[str]:
    """The compiler with the flags of a mode."""
    command = compiler() if mode != "fast" else clang()
    if command is None:
        raise MetalError("clang++ is not installed")
    for_clang = [word for flag in _CLANG_FLAGS for word in ("-Xclang", flag)]
    return [command, *_FLAGS, *(for_clang if is_clang(command) else _GCC_FLAGS), *_MODES[mode]]


@cache
def _prepared(mode: str) -> tuple[Path, Path]:
    """The folder of the precompiled shim and the compiled runtime."""
    files = sorted(p for p in HERE.rglob("*") if p.suffix in (".h", ".cc"))
    command = _command(mode)
    key = _hash(*command, *(p.read_text() for p in files))
    folder, runtime = cache_folder() / f"shim-{key}", cache_folder() / f"runtime-{key}.o"
    folder.mkdir(exist_ok=True)
    shim = HERE / "include" / "metal_shim.h"
    # clang would want a precompiled header by another name and option; it reads the plain one.
    if not (folder / "metal_shim.h.gch").exists() and not is_clang(command[0]):
        _build(folder / "metal_shim.h.gch", [*command, "-x", "c++-header", str(shim)])
    if not runtime.exists():
        tsan = ["-DEMU_TSAN"] if mode == "tsan" else []
        flags = ["-std=c++20", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", *tsan, "-c"]
        _build(runtime, [compiler(), *flags, str(HERE / "runtime.cc")])
    return folder, runtime


def _build(target: Path, command: list[str]) -> None:
    """Run a compiler command into `target`, which appears complete or not at all."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    run_compiler([*command, "-o", str(part)])
    part.rename(target)


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept between runs; only its owner may write there."""
    folder = Path(tempfile.gettempdir()) / f"metal-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise MetalError(f"{folder} belongs to or is writable by somebody else; remove it")
    return folder


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
