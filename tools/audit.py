"""Checks the pinned dependencies: their licences, and their known vulnerabilities with pip-audit.

`python tools/audit.py` reads the packages of constraints.txt that are installed here. It prints the
packages whose licence is not one of LICENCES, then runs pip-audit, which asks PyPI's advisory
database. Exit code 1 for a licence or a vulnerability, 2 where pip-audit cannot be run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# Names of permissive licences, and of weak copyleft ones that allow use as a library.
LICENCES = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|Apache-2\.0|ISC|PSF|Python Software Foundation|Unlicense|HPND|Zlib"
    r"|CNRI|MPL|Mozilla Public License|CC0|Public Domain)\b",
    re.IGNORECASE,
)


def pinned_names(text: str) -> list[str]:
    """The package names of a constraints file."""
    return [line.partition("==")[0].strip() for line in text.splitlines() if "==" in line]


def licence_of(name: str) -> str | None:
    """Return what an installed package says of its licence; None when it is not installed."""
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    classifiers = [c for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    said = [found.get("License-Expression"), *classifiers, found.get("License")]
    return "; ".join(text.strip().splitlines()[0] for text in said if text and text.strip())


def refused_licences(names: list[str]) -> dict[str, str]:
    """Installed packages whose licence is missing or is not among LICENCES, with what they say."""
    said = {name: licence_of(name) for name in names}
    return {
        name: licence or "no licence stated"
        for name, licence in said.items()
        if licence is not None and not LICENCES.search(licence)
    }


def main() -> int:
    """Run both checks and print what they find."""
    refused = refused_licences(pinned_names(CONSTRAINTS.read_text(encoding="utf-8")))
    for name, licence in refused.items():
        print(f"licence: {name}: {licence}")
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit is not installed (pip install pip-audit): vulnerabilities are unchecked")
        return 2
    command = ["pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    audit = subprocess.run([sys.executable, "-m", *command])
    return 1 if refused or audit.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
