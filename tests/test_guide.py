"""docs/guide.md, run as it stands: its commands in a shell, its Python in one namespace."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("sh") >= 4 and len(blocks) >= 8
    monkeypatch.chdir(tmp_path)
    # The command is there wherever the tests run, also from a source tree.
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "fastsae"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastsae "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    names: dict[str, Any] = {}
    threads = torch.get_num_threads()
    said = ""
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(GUIDE), "exec"), names)
        else:
            done = subprocess.run(
                ["sh", "-e", "-c", text],
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{text}\n{done.stderr}"
            said += done.stdout
    torch.set_num_threads(threads)
    assert said.count("held-out FVU of PCA") == 5 and '"fvu": ' in said
    assert names["codes"].n_latents == 1024 and names["trainer"].step_count == 100
