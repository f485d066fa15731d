"""``fastsae bench``: the benchmarks in a checkout's folder bench/, which no wheel contains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """Runs bench/ with these arguments; its exit status. FileNotFoundError without a checkout."""
    root = Path(__file__).resolve().parent.parent
    front = root / "bench" / "__main__.py"
    if not front.exists():
        raise FileNotFoundError(
            f"bench: expected a checkout with the folder bench/, got none at {front.parent}; "
            "clone the repository and `pip install -e .` there"
        )
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(front.parent), *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
