"""Metal Shading Language text to a C++20 file, compiled behind include/metal_shim.h."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LANGUAGE_VERSION = 320

_KERNEL = re.compile(r"(?:\[\[\s*kernel\s*\]\]|\bkernel\b)\s+void\s+(\w+)\s*\(")
_INSTANCE = re.compile(
    r'template\s*\[\[\s*host_name\s*\(\s*"([^"]+)"\s*\)\s*\]\]\s*(?:\[\[\s*kernel\s*\]\]|kernel)\s*'
    r"decltype\s*\(([^;]*?)\)\s*\2\s*;"
)
_ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]")
_VARIABLE = re.compile(
    r"\bthreadgroup\s+((?:const\s+)?[\w:]+(?:\s*<[^;<>]*>)?)\s+(\w+)\s*((?:\[[^\];]*\]\s*)*);"
)
_LEFT_OVER = re.compile(r"\bthreadgroup\s+[\w:]+(?:\s*<[^;<>]*>)?\s+\w+\s*[\[,;={]")


class MetalError(RuntimeError):
    """The text does not compile, or the emulated kernel did something that is a fault on a GPU."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be launched: its C++ name and its parameters in order.

    A parameter is a buffer index, or the name of a built-in such as thread_position_in_grid.
    """

    expression: str
    parameters: tuple[int | str, ...]


def compiler() -> str:
    """The C++ compiler: $CXX, or g++, which is clang on a Mac."""
    return os.environ.get("CXX") or "g++"


@cache
def is_clang(command: str) -> bool:
    """True if the command runs clang or Apple's clang."""
    return "clang" in run_compiler([command, "--version"])


def run_compiler(command: list[str], text: str | None = None) -> str:
    """The command's standard output; MetalError with its messages if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise MetalError(f"{command[0]} failed:\n{done.stderr[-6000:]}")
    return done.stdout


def preprocess(text: str, folders: Sequence[Path] = ()) -> str:
    """Metal text with its macros expanded and its line numbers kept; metal_* headers vanish.

    Other headers are taken from `folders`.
    """
    text = re.sub(r"(?m)^[ \t]*#[ \t]*include[ \t]*<metal_\w+>[ \t]*$", "", text)
    language = ["-x", "c++", "-std=c++20", "-nostdinc", "-w", "-U__x86_64__", "-Ulinux", "-Uunix"]
    metal = ["-D__METAL__=1", f"-D__METAL_VERSION__={LANGUAGE_VERSION}"]
    include = [f"-I{folder}" for folder in folders]
    text = run_compiler([compiler(), "-E", *language, *metal, *include, "-"], text)
    joined = 1
    while joined:
        text, joined = re.subn(r'("[^"\n]*)"[ \t]+"([^"\n]*")', r"\1\2", text)
    return text


def to_cpp(text: str) -> tuple[str, dict[str, Kernel]]:
    """The C++ file for preprocessed Metal text, and its kernels by host name."""
    text, kernels = find_kernels(text)
    parts = [without_attributes(share_variables(text))]
    parts.append("#undef kernel\n#undef device\n#undef constant\n#undef threadgroup\n#undef thread")
    parts += [_entry(i, kernel) for i, kernel in enumerate(kernels.values())]
    return "\n".join(parts), kernels


def find_kernels(text: str) -> tuple[str, dict[str, Kernel]]:
    """The text without its explicit instantiations, and every kernel by host name."""
    instances = [(m[1], m[2].strip()) for m in _INSTANCE.finditer(text)]
    text = _INSTANCE.sub(lambda m: "\n" * m[0].count("\n"), text)
    kernels, templates = {}, {}
    for match in _KERNEL.finditer(text):
        parameters = tuple(_parameters(text[match.end() : _closing(text, match.end() - 1)]))
        declaration = re.split(r"[;{}]", text[: match.start()])[-1]
        target = templates if re.search(r"\btemplate\s*<", declaration) else kernels
        target[match[1]] = Kernel(match[1], parameters)
    for name, expression in instances:
        base = expression.split("<")[0].strip()
        kernels[name] = Kernel(expression, templates[base].parameters)
    if not kernels:
        raise MetalError("the text has no kernel")
    return text, kernels


def _parameters(text: str) -> Iterator[int | str]:
    """Buffer index or attribute of every parameter; a bare one takes the next index."""
    index = 0
    for parameter in _split(text):
        attribute = _ATTRIBUTE.search(parameter)
        if attribute and attribute[1] != "buffer":
            yield attribute[1]
            continue
        index = int(attribute[2]) if attribute else index
        yield index
        index += 1


def _split(text: str) -> Iterator[str]:
    """Pieces of a parameter list between the commas outside brackets."""
    depth = start = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    if text[start:].strip():
        yield text[start:]


def _closing(text: str, opening: int) -> int:
    """Index of the bracket that closes the parenthesis at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise MetalError("a kernel's parameter list does not end")


def share_variables(text: str, pattern: str | None = None) -> str:
    """Give every threadgroup variable storage that the threads of a threadgroup share.

    `pattern` with {type}, {name} and {dimensions} overrides the declaration that takes its place.
    """
    pattern = pattern or (
        'auto& {name} = emu::threadgroup_variable<{type} {dimensions}>([]{{}}, "{name}", __LINE__);'
    )

    def declaration(match: re.Match[str]) -> str:
        kind, name, dimensions = (match[i].strip() for i in (1, 2, 3))
        return pattern.format(type=kind, name=name, dimensions=dimensions)

    text = _VARIABLE.sub(declaration, text)
    missed = _LEFT_OVER.search(text)
    if missed:
        raise MetalError(f"declare one threadgroup variable a statement: {missed[0]!r}")
    return text


def without_attributes(text: str) -> str:
    """The text without [[...]]."""
    return re.sub(r"\[\[[^\[\]]*\]\]", "", text)


def _entry(i: int, kernel: Kernel) -> str:
    parameters = ", ".join(
        f'{{{p}, ""}}' if isinstance(p, int) else f'{{-1, "{p}"}}' for p in kernel.parameters
    )
    return (
        f'extern "C" void emu_kernel_{i}(void** buffers, const emu::ThreadState& thread_state) {{\n'
        f"  static const emu::Parameter parameters[] = {{{parameters}}};\n"
        f"  emu::call(&{kernel.expression}, buffers, thread_state, parameters);\n}}"
    )
