"""Type-check Metal text with real address spaces: clang's C++ for OpenCL has the same ones.

The emulator's C++ has none, so it accepts a device pointer where Metal wants a threadgroup one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from metal_emulator.rewrite import find_kernels, preprocess, share_variables, without_attributes

INCLUDE = Path(__file__).parent / "include"
KERNEL = "text.metal"

_SPACES = {"device", "threadgroup", "constant", "thread"}
_POINTER = re.compile(
    r"([^,(;{}<>)=]*?\b(?:void|float|half|bfloat|int|uint|long|bool|auto|T|U|Out)\s*[*&])\s*(\w+)\s*[,)=;\[]"
)
_VECTOR = re.compile(r"\b((?:float|half|int|uint|ulong|long)[234])\s*\(")
# A reference to storage that nobody has: clang only looks at its type.
_SHARED = "__local {type} (&{name}){dimensions} = *(__local {type} (*){dimensions})0;"
_OPTIONS = [
    "-cl-std=clc++2021",
    "-cl-single-precision-constant",
    "-fsyntax-only",
    "-Wno-everything",
    "-Xclang",
    "-cl-ext=-all,+__opencl_c_generic_address_space,+cl_khr_fp16,"
    "+__cl_clang_function_pointers,+__opencl_c_program_scope_global_variables",
]


@cache
def clang() -> str | None:
    """The newest clang++ here that knows the dialect and bfloat16 (16 does); None without one."""
    names = [f"clang++-{version}" for version in range(25, 15, -1)] + ["clang++"]
    found = (path for name in names if (path := shutil.which(name)))
    return next((path for path in found if not _errors(path, '#include "metal_strict.h"\n')), None)


def _errors(compiler: str, source: str) -> list[str]:
    command = [compiler, "-x", "clcpp", *_OPTIONS, f"-I{INCLUDE}", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if "error:" in line]


def problems(text: str, mlx: Path | None = None) -> list[str]:
    """Faults of the address spaces of Metal `text`; needs clang.

    With MLX's include folder the text comes behind the header that MLX puts before a kernel, so
    that a name or an overload of MLX's that does not go with the text is found as well. What clang
    says about MLX's header itself is left out.
    """
    compiler = clang()
    if compiler is None:
        raise FileNotFoundError("clang++ is not installed")
    flat = preprocess(text)
    found = bare_pointers(flat)
    if mlx is not None:
        header = f'#include "mlx/backend/metal/kernels/utils.h"\n#line 1 "{KERNEL}"\n'
        flat = preprocess(header + text, [INCLUDE / "metal", mlx])
        names = sorted(set(re.findall(r"\b__metal_\w+", flat)))
        declared = [f"template <class... T> built_in {name}(T...);" for name in names]
        flat = "\n".join(['#include "mlx_strict.h"', *declared, flat])
    text, kernels = find_kernels(flat)
    # float4(a, b) is written (float4)(a, b) in this dialect.
    text = _VECTOR.sub(r"(\1)(", without_attributes(share_variables(text, _SHARED)))
    text = re.sub(r"\bkernel\b", "", text)
    uses = [
        f"void instantiate_{i}() {{ auto p = &{kernel.expression}; (void)p; }}"
        for i, kernel in enumerate(kernels.values())
    ]
    source = "\n".join(['#include "metal_strict.h"', text, *uses, ""])
    errors = _errors(compiler, source)
    return found + [error for error in errors if mlx is None or error.startswith(KERNEL)]


def bare_pointers(text: str) -> list[str]:
    """Pointers and references declared without an address space: legal in C++, not in Metal."""
    return [
        f"{match[2]} has no address space: {match[0].strip()}"
        for match in _POINTER.finditer(text)
        if not _SPACES & set(re.findall(r"\w+", match[1])) and "return" not in match[1]
    ]
