"""Directions of imports between packages and wings, and circles between modules, read from source.

An import inside a function counts like any other; one under `if TYPE_CHECKING` does not run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"torch", "triton", "mlx", "onnx", "onnxruntime", "onnxruntime_genai", "transformers"}
# Each package with the packages of this project that it may import.
PACKAGES = {
    "sessa_common": set(),
    "sessa_torch": {"sessa_common"},
    "sessa_mlx": {"sessa_common"},
    "sessa_export": {"sessa_common"},
    "sessa_cli": {"sessa_common", "sessa_torch", "sessa_mlx", "sessa_export"},
}
FOLDERS = {"sessa_export": ROOT / "export", "sessa_cli": ROOT / "cli"}
# Each wing of sessa_common with the wings that it may import. A wing may also import the modules
# directly in sessa_common, which may import one another, but no wing.
WINGS = {
    "kernels": set(),
    "checkpoint": set(),
    "data": {"checkpoint"},
    "inference": {"checkpoint", "data"},
    "reference": {"inference"},
    "training": {"checkpoint", "data", "inference"},
    "experiments": {"checkpoint", "data", "inference", "training"},
    "serving": {"checkpoint", "data", "inference"},
    "selftest": {"checkpoint", "data", "inference", "reference"},
}
# Modules directly in sessa_common that serve its users and stand above the wings.
ABOVE_WINGS = {"sessa_common", "sessa_common.inspection"}


def read_modules() -> dict[str, str]:
    """Return the source of every module by its dotted name."""
    modules = {}
    for package in PACKAGES:
        base = FOLDERS.get(package, ROOT)
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join(parts)] = path.read_text(encoding="utf-8")
    return modules


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and all below it, without the bodies of `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from executed(child)


def imported_names(source: str) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports."""
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the imported modules of this project for each module."""
    graph = {}
    for module, source in modules.items():
        names = imported_names(source)
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (found & modules.keys()) - {module}
    return graph


def wrong_packages(modules: Mapping[str, str]) -> set[str]:
    """Return the imports that go against PACKAGES, and frameworks in sessa_common."""
    wrong = set()
    for module, source in modules.items():
        package = module.split(".")[0]
        forbidden = PACKAGES.keys() - PACKAGES[package] - {package}
        forbidden = forbidden | FRAMEWORKS if package == "sessa_common" else forbidden
        names = imported_names(source)
        wrong |= {f"{module} -> {name}" for name in names if name.split(".")[0] in forbidden}
    return wrong


def wing_of(module: str) -> str | None:
    """Return the wing of a module of sessa_common, None for one directly in it."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in WINGS else None


def wrong_wings(modules: Mapping[str, str]) -> set[str]:
    """Return the imports inside sessa_common that go against WINGS."""
    wrong = set()
    for module, imported in import_graph(modules).items():
        if not module.startswith("sessa_common") or module in ABOVE_WINGS:
            continue
        wing = wing_of(module)
        allowed = {wing, None} | (WINGS[wing] if wing else set())
        for name in imported:
            if wing_of(name) not in allowed or name in ABOVE_WINGS:
                wrong.add(f"{module} -> {name}")
    return wrong


def find_circle(modules: Mapping[str, str]) -> list[str]:
    """Return the modules of one import circle in order, empty without a circle."""
    graph = import_graph(modules)
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        for imported in () if module in finished else sorted(graph[module]):
            if circle := search(imported, [*path, module]):
                return circle
        finished.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := search(module, []))), [])


def test_packages_import_in_one_direction():
    assert wrong_packages(read_modules()) == set()


def test_wings_import_in_one_direction():
    modules = read_modules()
    folders = {path.parent.name for path in (ROOT / "sessa_common").glob("*/__init__.py")}
    assert folders <= WINGS.keys(), "give a new wing its line in WINGS"
    assert wrong_wings(modules) == set()


def test_no_modules_import_each_other_in_a_circle():
    assert find_circle(read_modules()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sessa_common.config", "import torch"),
        ("sessa_common.config", "def f():\n    from mlx import core"),
        ("sessa_common.config", "import sessa_torch.model"),
        ("sessa_torch.model", "from sessa_mlx import model"),
        ("sessa_export.graph", "from sessa_cli.common import say"),
    ],
)
def test_a_wrong_package_is_found(module, source):
    assert len(wrong_packages({module: source, "sessa_mlx.model": ""})) == 1


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("sessa_common.data.tasks", "sessa_common.training.trainer"),
        ("sessa_common.checkpoint.folder", "sessa_common.data.tasks"),
        ("sessa_common.config", "sessa_common.data.tasks"),
    ],
)
def test_a_climbing_import_is_found(module, imported):
    package, _, name = imported.rpartition(".")
    sources = {module: f"def f():\n    from {package} import {name}", imported: ""}
    assert wrong_wings(sources) == {f"{module} -> {imported}"}
    assert wrong_wings({module: "", imported: f"import {module}"}) == set()


def test_a_circle_is_found():
    modules = {
        "sessa_common.a": "from sessa_common import b",
        "sessa_common.b": "def f():\n    from sessa_common.c import x",
        "sessa_common.c": "import sessa_common.a",
        "sessa_common.d": "import sessa_common.a",
    }
    circle = ["sessa_common.a", "sessa_common.b", "sessa_common.c"]
    assert find_circle(modules) == circle
    typed = "if TYPE_CHECKING:\n    import sessa_common.a"
    assert find_circle({**modules, "sessa_common.c": typed}) == []
