"""Check that the wheel in a folder holds every file of the packages, and nothing else.

    python tools/check_wheel.py FOLDER [--tag TAG]

The packages are those that pyproject.toml names; their files are compared with the working tree.
With TAG, the versions of the wheel and of the source distribution must be those of the tag vX.Y.Z.
Exit code 1 if something is missing or too much.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
IGNORED = {"__pycache__", "node_modules", ".mypy_cache"}


def expected_files() -> set[str]:
    """The names in the wheel of every file of the packages."""
    built = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    folders = {name: Path(name).name for name in built["packages"]} | built["force-include"]
    return {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in folders.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and not IGNORED & set(path.parts)
    }


def faults(folder: Path, tag: str | None) -> list[str]:
    """Faults of the files that are to be published."""
    wheels, archives = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(archives) != 1:
        return [f"{folder} holds {len(wheels)} wheels and {len(archives)} .tar.gz, not one of each"]
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = expected_files()
    found = [f"missing in the wheel: {name}" for name in sorted(expected - names)]
    found += [f"only in the wheel: {name}" for name in sorted(names - expected)]
    version = PYPROJECT["project"]["version"]
    for path in (*wheels, *archives):
        if path.name.split("-")[1].removesuffix(".tar.gz") != version:
            found.append(f"{path.name} is not of the version {version} of pyproject.toml")
    if tag is not None and tag != f"v{version}":
        found.append(f"the tag {tag} is not v{version}, the version of pyproject.toml")
    return found


def main() -> int:
    """Print every fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag")
    arguments = parser.parse_args()
    found = faults(arguments.folder, arguments.tag)
    print("\n".join(found) or f"{arguments.folder}: the wheel holds every file of the packages")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
