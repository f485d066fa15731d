"""A whole training step of the peer libraries beside fastsae's, each in its own environment.

    make peers                                     # once: installs them, in .peers
    python bench/peers.py --shape 2048,768,24576,32

Same shapes, tokens and unit as step.py: a library's step with its own optimiser, its time ÷ that of
one dense encoder product in the same process, and its memory. peer.py says what a step is. A peer
that fails has its error in its row.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
from pathlib import Path

from measure import Shape
from ops import SHAPES
from peer import PEERS
from rows import Row, machine, outputs, say_busy
from step import add_arguments, print_header, print_row

ENVIRONMENTS = Path(__file__).resolve().parent.parent / ".peers"


def run(name: str, shape: Shape, *options: object) -> Row:
    """What peer.py prints in the peer's environment, or a row with its error."""
    row: Row = {"bench": "peers", "provider": name, "optimizer": PEERS[name].optimizer}
    row |= {"options": PEERS[name].options, **dict(zip("ndfk", shape, strict=True))}
    if not (ENVIRONMENTS / name / "installed").exists():
        return row | {"error": "not installed: make peers"}
    command = [ENVIRONMENTS / name / "bin" / "python", Path(__file__).with_name("peer.py"), name]
    command += ["--shape", ",".join(map(str, shape)), *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode == 0:
        return row | json.loads(done.stdout)
    if done.returncode < 0:  # as when memory runs out
        return row | {"error": f"killed by {signal.Signals(-done.returncode).name}"}
    lines = done.stderr.strip().splitlines()
    return row | {"error": lines[-1] if lines else f"exit status {done.returncode}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--peer", action="append", choices=PEERS, help="may be repeated")
    args = parser.parse_args()
    rows = []
    print_header()
    for shape in args.shape or SHAPES:
        for name in args.peer or PEERS:
            row = run(name, shape, "--steps", args.steps, "--threads", args.threads)
            rows.append(machine() | row)
            print_row(rows[-1])
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
