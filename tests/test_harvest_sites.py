"""Several layers and sites in one forward pass: each set is the one that is harvested alone."""

import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from common import threads
from test_harvest import (
    DOCUMENTS,
    ROOT,
    WINDOW,
    Attention,
    D,
    Mlp,
    causal,
    config,
    encoder,
    everything,
    transformers,
)
from torch import Tensor, nn

from fastsae import cli
from fastsae.data import open_source
from fastsae.harvest import HarvestConfig, harvest, harvest_sites
from fastsae.models import LanguageModel
from fastsae.shards import ActivationSet

ALL = ("residual", "mlp", "attention")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    path = tmp_path / "text.txt"
    path.write_text("".join(DOCUMENTS) * 4)
    return [path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def alone(model: LanguageModel, files: list[Path], out: Path, options: HarvestConfig) -> Path:
    """OUT/residual-1 and so on, each harvested by itself."""
    for name, (site, layer) in options.sites.items():
        one = {**vars(options), "layer": layer, "site": site}
        harvest(model, files, out / name, HarvestConfig(**one))
    return out


def passes(model: LanguageModel, module: str) -> list[int]:
    """Grows by the number of windows whenever a module is run."""
    seen: list[int] = []
    model.net.get_submodule(module).register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]))
    )
    return seen


class ParallelBlock(nn.Module):
    """GPT-NeoX's: its MLP does not depend on its attention. Then it writes into what it was given,
    as modules may that never need a gradient."""

    def __init__(self, narrow: bool = False, writes: bool = False) -> None:
        super().__init__()
        self.attn, self.mlp, self.writes = Attention(causal=True), Mlp(), writes
        if narrow:
            self.mlp.dense = nn.Linear(D, D - 2)

    def forward(self, x: Tensor) -> Tensor:
        attended, made = self.attn(x)[0], self.mlp(x)
        made = nn.functional.pad(made, (0, D - made.shape[-1]))
        if self.writes:
            x += attended
            return x.add_(made)
        return x + attended + made


def parallel(**options: bool) -> LanguageModel:
    model = causal()
    torch.manual_seed(3)
    model.net.layers = nn.ModuleList([ParallelBlock(**options) for _ in range(3)])
    model.net.requires_grad_(False)
    return model


MODELS = {
    "llama": causal,
    "gpt2": lambda: causal("attn"),
    "bert": encoder,
    "neox": parallel,
    "narrow": lambda: parallel(narrow=True),
    "writes": lambda: parallel(writes=True),
}


@pytest.mark.parametrize(
    ("kind", "gradients"),
    [*((kind, False) for kind in MODELS), ("llama", True), ("neox", True), ("narrow", True)],
)
def test_each_set_is_that_of_its_site_alone(
    kind: str, gradients: bool, files: list[Path], tmp_path: Path
) -> None:
    options = config(layer=(3, 1), site=ALL, gradients=gradients, shard_rows=40)
    with threads(1):
        found = harvest_sites(MODELS[kind](), files, tmp_path / "out", options)
        expected = alone(MODELS[kind](), files, tmp_path / "alone", options)
    assert list(found) == [f"{site}-{layer}" for layer in (3, 1) for site in ALL]
    assert contents(tmp_path / "out") == contents(expected)
    widths = {name: stored.d for name, stored in found.items()}
    assert widths["mlp-1"] == (D - 2 if kind == "narrow" else D) and widths["residual-1"] == D
    rows = {name: everything(stored) for name, stored in found.items()}
    first = rows["residual-3"]
    for name in found:
        for label in ("token", "window", "position"):
            assert torch.equal(rows[name][label], first[label])
    assert not torch.equal(rows["residual-1"]["x"], first["x"])
    assert open_source(tmp_path / "out" / "attention-1").n_rows == len(first["x"])


def test_one_pass_gives_them_all_and_ends_behind_the_last(
    files: list[Path], tmp_path: Path
) -> None:
    model = causal()
    first, last = passes(model, "layers.0"), passes(model, "layers.2")
    harvest_sites(model, files, tmp_path / "out", config(layer=(1, 2), site=("mlp", "residual")))
    windows = ActivationSet(tmp_path / "out" / "mlp-1").n_rows // (WINDOW - 1)
    assert sum(first) == windows + 1  # and a first look
    assert not last


def test_it_goes_on_with_what_each_set_lacks(files: list[Path], tmp_path: Path) -> None:
    options, out = config(layer=(1, 3), shard_rows=40), tmp_path / "out"
    harvest_sites(causal(), files, out, options)
    whole = contents(out)
    lost = ["residual-1/shard-00001.safetensors", "residual-3/shard-00003.safetensors"]
    for name in lost:
        (out / name).unlink()
    kept = {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")}
    model = causal()
    first, last = passes(model, "layers.0"), passes(model, "layers.2")
    harvest_sites(model, files, out, options)
    assert contents(out) == whole
    assert all(f.stat().st_mtime_ns == time for f, time in kept.items())
    rows = ActivationSet(out / "residual-1").index["shards"]
    windows = [n // (WINDOW - 1) for n in rows]
    assert sum(first) == 1 + windows[1] + windows[3]
    assert sum(last) == 1 + windows[3]  # the first set's shard needs no third block


CHILD = """
import os, signal, sys
from pathlib import Path
from fastsae import shards
from tests.test_harvest import causal, config
from fastsae.harvest import harvest_sites
calls, fsync = 0, os.fsync
def count(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
shards.os.fsync = count
options = config(layer=(1, 3), gradients=True, shard_rows=60)
harvest_sites(causal(), [Path(sys.argv[3])], Path(sys.argv[1]), options)
"""


@pytest.mark.parametrize(("fsync", "shards"), [(3, 0), (5, 0), (6, 1), (9, 2), (11, 3)])
def test_a_killed_harvest_goes_on_to_the_same_bits(
    fsync: int, shards: int, files: list[Path], tmp_path: Path
) -> None:
    """kill -9 between the indexes (3), and where one set has a shard that the other lacks."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, out, str(fsync), *files]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(list(out.rglob("*.safetensors"))) == shards
    options = config(layer=(1, 3), gradients=True, shard_rows=60)
    harvest_sites(causal(), files, out, options)
    harvest_sites(causal(), files, tmp_path / "whole", options)
    assert contents(out) == contents(tmp_path / "whole")


def test_the_disk_must_have_room_for_all(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    usage = namedtuple("usage", "total used free")
    options = config(layer=(1, 2), site=("mlp", "residual"), dtype="float16")
    n = harvest(causal(), files, tmp_path / "one", config()).n_rows
    needed = n * 2 * ((D - 2 + D) * 2 + 2 * 3 * 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(ValueError, match=f"expected {needed} bytes .*, got {needed - 1}"):
        harvest_sites(parallel(narrow=True), files, tmp_path / "out", options)
    assert f"mlp of layer 2: {n:,} rows × {D - 2} float16" in capsys.readouterr().out
    assert not contents(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    assert len(harvest_sites(parallel(narrow=True), files, tmp_path / "out", options)) == 4


def test_what_cannot_be_is_refused(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong = {
        "layer: expected at least one, each of them once, got 2 2": {"layer": (2, 2)},
        "layer: expected at least one, each of them once, got none": {"layer": ()},
        "layer: expected at most 3, got 4": {"layer": (1, 4)},
        "layer: expected at least 1, got 0": {"layer": (1, 0)},
        "site: expected one of residual, mlp, attention, got 'head'": {"site": ("mlp", "head")},
        "site: expected at least one, each of them once": {"site": ("mlp", "mlp")},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            harvest_sites(causal(), files, out, config(**options))
        assert not out.exists()
    harvest_sites(causal(), files, out, config(layer=(1, 2)))
    with pytest.raises(ValueError, match=r"residual-2: expected .* with seed 0 instead of 1"):
        harvest_sites(causal(), files, out, config(layer=(2, 3), seed=1))
    harvest(causal(), files, tmp_path / "one", config())
    with pytest.raises(ValueError, match="one: expected a folder for sets of several sites"):
        harvest_sites(causal(), files, tmp_path / "one", config(layer=(1, 2)))
    model = causal()
    with torch.no_grad():
        model.net.layers[1].mlp.dense.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"row 0 .*: x of residual-2 holds nan"):
        harvest_sites(model, files, tmp_path / "nan", config(layer=(1, 2)))


def test_the_command_line(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    command = ["harvest", str(model), "--text", str(files[0]), "--window", "10"]
    command += ["--dtype", "float32", "--batch-size", "2"]
    transformers(monkeypatch, "LlamaForCausalLM", causal().net)
    several = ["--layer", "1", "3", "--site", "residual", "mlp", "--out", str(tmp_path / "a")]
    cli.main([*command, *several])
    cli.main([*command, "--layer", "3", "--out", str(tmp_path / "b")])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["mlp-1", "mlp-3", "residual-1", "residual-3"]
    assert contents(tmp_path / "a" / "residual-3") == contents(tmp_path / "b")
    data = ["--data", str(tmp_path / "a" / "mlp-1"), "--d-sae", "8", "--k", "2", "--steps", "2"]
    cli.main(["train", *data, "--holdout", "20", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "metrics.json").exists()
