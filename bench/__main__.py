"""The benchmarks, one command: `fastsae bench`, or `python bench`.

    fastsae bench                                 ops, step and peers, at two shapes
    fastsae bench ops --shape 2048,768,24576,32
    fastsae bench step --json now.json --compare before.json

    ops           every operation on every backend, beside torch and the machine's limits
    step          a whole training step, beside dense torch
    peers         the same in other libraries, each in its own environment (make peers)
    scaling       a step by width, and by processes
    integrations  other libraries before and after fastsae stands behind them

Each is a file here that also runs alone, with more options (--help). What they print is on stderr;
stdout has nothing but what `--json -` writes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import parse_shape
from peers import ENVIRONMENTS
from rows import Row, add_outputs, compare, outputs, read, write

HERE = Path(__file__).resolve().parent
DEFAULT = ("ops", "step", "peers")
PARTS = (*DEFAULT, "scaling", "integrations")
LIBRARIES = {"sae_lens": "saelens"} | {n: n for n in ("dictionary_learning", "sparsify")}
"""What integrations.py calls a library → the name of its environment."""


def commands(part: str, args: argparse.Namespace) -> list[list[str]]:
    """What is run for a part, without where its rows go."""
    options = [
        word for shape in args.shape or () for word in ("--shape", ",".join(map(str, shape)))
    ]
    if args.threads is not None:
        options += ["--threads", str(args.threads)]
    if part == "ops":
        options += [word for backend in args.backend or () for word in ("--backend", backend)]
    script = HERE / f"{part}.py"
    if not script.exists():
        raise SystemExit(f"bench: expected {script}, got none")
    if part != "integrations":
        return [[sys.executable, str(script), *options]]
    return [
        [str(ENVIRONMENTS / name / "bin" / "python"), str(script), library, *options]
        for library, name in LIBRARIES.items()
    ]


def run(part: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a part; a message on stderr where it fails."""
    rows: list[Row] = []
    for command in commands(part, args):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            try:
                status = subprocess.run([*command, "--json", str(file)]).returncode
            except OSError as error:
                status = f"{error.strerror}: {command[0]}"  # type: ignore[assignment]
            if status:
                print(f"bench: {part} failed: {status}", file=sys.stderr)
            else:
                rows += read(file)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="fastsae bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="*", metavar="PART", help="see above")
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument("--backend", action="append", help="of ops; may be repeated")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--compare", metavar="OLD", help="rows (.json, .csv) to compare with")
    parser.add_argument(
        "--results", metavar="MACHINE", help="write bench/results/PART-MACHINE.csv, too"
    )
    add_outputs(parser)
    args = parser.parse_args()
    for part in args.part:
        if part not in PARTS:
            parser.error(f"PART: expected one of {', '.join(PARTS)}, got {part!r}")
    old = read(args.compare) if args.compare else []
    start = time.monotonic()
    of: dict[str, list[Row]] = {}
    for part in args.part or DEFAULT:
        print(f"\n{part}", file=sys.stderr, flush=True)
        of[part] = run(part, args)
    for part, rows in of.items():  # at the end: rows say whether the checkout was as committed
        if rows and args.results:
            write(rows, HERE / "results" / f"{part}-{args.results}.csv")
    found = [row for rows in of.values() for row in rows]
    outputs(found, args)
    if args.compare:
        print(f"\nms before and now, now ÷ before ({args.compare})", file=sys.stderr)
        print("\n".join(compare(found, old)), file=sys.stderr)
    print(f"\n{len(found)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)
    wrong = [row for row in found if str(row.get("error", "")).startswith("WRONG")]
    sys.exit(0 if all(of.values()) and not wrong else 1)


if __name__ == "__main__":
    main()
