"""Pages of docs/, run as they stand: their commands in a shell, their Python in one namespace."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae import SAE

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands are there wherever the tests run, also from a source tree."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, module in (("fastsae", "fastsae"), ("torchrun", "torch.distributed.run")):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        command.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_page(page: str) -> tuple[list[str], dict[str, Any], str]:
    """The kinds of its blocks, the names that its Python leaves, and what its commands said."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.M)
    names: dict[str, Any] = {}
    said = ""
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, page, "exec"), names)
        else:
            command = ["sh", "-e", "-c", text]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{text}\n{done.stderr}"
            said += done.stdout
    return [kind for kind, _ in blocks], names, said


def test_the_guide_runs() -> None:
    kinds, names, said = run_page("guide.md")
    assert kinds.count("sh") >= 4 and len(kinds) >= 8
    assert said.count("held-out FVU of PCA") == 5 and '"fvu": ' in said
    assert names["codes"].n_latents == 1024 and names["trainer"].step_count == 100


def test_the_page_on_very_wide_dictionaries_runs() -> None:
    kinds, names, said = run_page("wide.md")
    assert kinds == ["sh", "sh", "sh", "python"]
    assert "received in a step" in said and said.count("held-out FVU of PCA") == 2
    assert len(names["sae"].latents) == 6144


def test_the_page_on_consistency_runs() -> None:
    kinds, names, said = run_page("consistency.md")
    assert kinds.count("sh") == 6 and kinds.count("python") == 4
    assert said.count("PW-MCC") == 2 and said.count("GT-MCC") == 2
    compared = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    (pair,) = compared["pairs"]
    assert json.loads(Path("runs/seed0/consistency.json").read_text()) == compared
    assert "In common with other runs" in Path("runs/seed0/report.html").read_text()
    assert len(list(Path("pages").glob("*.html"))) == 3
    assert pair["mcc"] == names["pair"].decoder.mean and pair["shared"] == names["pair"].shared()
    figures = dict(re.findall(r"^(fvu_\w+|novel|replaced) +([\d.,]+)$", said, re.M))
    assert 0 < int(figures["novel"]) <= 1024
    assert float(figures["fvu_large"]) < float(figures["fvu_small"]) < 1
    assert names["codes"].n_latents == 256 and len(names["rows"]) == 20
    assert SAE.load("runs/meta").config.d_in == 384


TRANSFORMERS = """
from types import SimpleNamespace
from test_harvest import Causal, Loaded, Tokenizer

AutoConfig = Loaded(SimpleNamespace(architectures=["LlamaForCausalLM"], is_encoder_decoder=False))
AutoModelForCausalLM, AutoTokenizer = Loaded(Causal()), Loaded(Tokenizer())
"""


def test_the_page_on_harvesting_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in the place of a real one, and a stand-in for transformers."""
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "transformers.py").write_text(TRANSFORMERS)
    paths = [tmp_path / "stand_in", Path(__file__).parent, DOCS.parent]
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*map(str, paths), before]))
    monkeypatch.syspath_prepend(str(tmp_path / "stand_in"))
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    (tmp_path / "model").mkdir()
    lines = (f"{i} bottles, take {i % 7} down, {i * i} on the wall." for i in range(400))
    (tmp_path / "text.txt").write_text(" ".join(lines))
    kinds, names, said = run_page("harvest.md")
    monkeypatch.delitem(sys.modules, "transformers")
    assert kinds == ["sh", "sh", "sh", "sh", "python"]
    assert "4 of 4 shards to write" in said and "late-wide:" in said
    assert said.count("held-out FVU of PCA") == 1  # the transcoder has none, live runs neither
    sets = sorted(path.name for path in (tmp_path / "sets").iterdir())
    assert sets == ["mlp-1", "mlp-3", "residual-1", "residual-3"]
    live = SAE.load("runs/live")
    assert live.config.d_in == names["rows"].d_in == 6
    assert SAE.load("runs/suite/late-wide").config.d_sae == 512
