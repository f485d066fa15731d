"""Instruction counts of the C++ kernels against the committed ones: times are noisy, counts not.

    make counts                          compares; fails beyond ±5 %
    make counts COUNTS=--update          after a change that is meant: writes the new counts

Valgrind's callgrind runs tests/bits.cpp, every kernel on fixed data, with one thread. It has no
AVX-512, so this guards the AVX2 path: what the other paths share with it, and not their inner
loops. Counts depend on the compiler, so another one than the committed counts' is refused.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import Row, commit, read, write

FILE = Path(__file__).resolve().parent / "results" / "counts-avx2.csv"
TOLERANCE = 0.05
KERNEL = re.compile(r"^\s*([\d,]+) .*?:fastsae::avx2::(\w+)\(fastsae::")


def count(binary: Path) -> dict[str, int]:
    """Instructions of each kernel, with what it calls."""
    for tool in ("valgrind", "callgrind_annotate"):
        if shutil.which(tool) is None:
            sys.exit(
                f"counts: expected {tool} (Debian, Ubuntu: apt-get install valgrind), got none"
            )
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/callgrind.out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", str(binary), "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"counts: valgrind failed: {done.stderr.strip().splitlines()[-1]}")
        command = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", out]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [match for match in map(KERNEL.match, lines.splitlines()) if match]
    return {match[2]: int(match[1].replace(",", "")) for match in found}


def compiler_of(binary: Path) -> str:
    match = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", binary.read_bytes())
    return match[0].decode() if match else "unknown"


def compare(found: dict[str, int], expected: dict[str, int]) -> list[str]:
    """Prints a line for each kernel; what is wrong."""
    wrong = [f"{name}: no longer counted" for name in expected if name not in found]
    print(f"{'kernel':22} {'committed':>12} {'now':>12}")
    for name, n in sorted(found.items()):
        if name not in expected:
            wrong.append(f"{name}: not among the committed counts")
            continue
        change = n / expected[name] - 1
        print(f"{name:22} {expected[name]:12} {n:12} {change:+7.2%}")
        if abs(change) > TOLERANCE:
            wrong.append(f"{name}: expected {expected[name]} ±{TOLERANCE:.0%}, got {n}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("binary", type=Path, help="tests/bits.cpp, compiled for AVX2")
    parser.add_argument("--update", action="store_true", help="write the counts instead")
    parser.add_argument("--file", type=Path, default=FILE, help="the committed counts")
    args = parser.parse_args()
    compiler = compiler_of(args.binary)
    if not args.update:
        committed = read(args.file)
        theirs = committed[0]["compiler"]
        if compiler != theirs:
            sys.exit(
                f"counts: expected {theirs}, which the committed counts are of, got {compiler}"
            )
    found = count(args.binary)
    if args.update:
        shared = {"isa": "avx2", "compiler": compiler, "commit": commit()}
        rows: list[Row] = [
            {"bench": "counts", "op": name, "instructions": n, **shared}
            for name, n in sorted(found.items())
        ]
        write(rows, args.file)
        return
    wrong = compare(found, {row["op"]: row["instructions"] for row in committed})
    if wrong:
        sys.exit("counts: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
