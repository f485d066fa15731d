"""Codes on the disk against the SAE itself, and the index of latents against a full sort."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import randn, refusals
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae import SAE, Codes, SAEConfig, Selection, corpus
from fastsae.corpus import CodeSet, encode_corpus
from fastsae.data import open_source
from fastsae.latent_index import QUANTILES, LatentIndex, TopContexts
from fastsae.shards import shard_path
from fastsae.tensors import read_tensors


def tiny_sae(name: str = "topk", f: int = 24) -> SAE:
    parameters = {"k": 3} if "topk" in name else {}
    sae = SAE(SAEConfig(6, f, Selection.from_dict({"name": name, **parameters})), seed=1)
    sae(randn(64, 6, seed=1))  # sets the threshold of the rules that have one at inference
    return sae


def checked(found: CodeSet, sae: SAE, x: Tensor) -> None:
    """All that a set holds, from the dense codes."""
    dense = sae.encode(x, training=False).to_dense().detach().float()
    got = torch.cat([codes.to_dense() for _, codes in found.shards()])
    assert torch.equal(got, dense)
    assert [first for first, _ in found.shards()] == found.starts[:-1].tolist()
    assert torch.equal(found.counts, (dense != 0).sum(0)) and found.counts.any()
    m = found.rows.shape[1]
    for latent, column in enumerate(dense.T):
        best = column.abs().sort(descending=True, stable=True).indices[:m]
        best = best[column[best] != 0]
        room = m - len(best)
        assert found.rows[latent].tolist() == best.tolist() + [-1] * room
        assert found.values[latent].tolist() == column[best].tolist() + [0] * room
        sizes = column[column != 0].abs().sort().values
        for q, value in zip(QUANTILES, found.quantiles[latent].tolist(), strict=True):
            exact = float(sizes[int(np.ceil(q * len(sizes) - 1e-9)) - 1]) if len(sizes) else 0.0
            assert abs(value - exact) <= exact / 8


@pytest.mark.parametrize("name", ["topk", "abs-topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_a_set_is_what_the_sae_says(name: str, tmp_path: Path) -> None:
    x, sae = randn(300, 6), tiny_sae(name)
    sae.train()
    found = encode_corpus(sae, open_source(x), tmp_path / "codes", contexts=5, shard_rows=70)
    assert sae.training and found.n_rows == 300 and found.n_latents == 24
    assert found.index["shards"] == [70, 70, 70, 70, 20]
    checked(found, sae, x)
    checked(CodeSet(tmp_path / "codes"), sae, x)
    names = {path.name for path in (tmp_path / "codes").iterdir()}
    shards = {f"shard-0000{i}.safetensors" for i in range(5)}
    assert names == {"index.json", "latents.safetensors", *shards}


def test_small_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sae = randn(100, 6), tiny_sae()
    encode_corpus(sae, open_source(x), tmp_path / "whole")
    monkeypatch.setattr(corpus, "MAX_BATCH_PAIRS", 50)
    encode_corpus(sae, open_source(x), tmp_path / "parts")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_it_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sae, out = randn(100, 6), tiny_sae(), tmp_path / "codes"
    options = {"contexts": 4, "shard_rows": 30}
    encode_corpus(sae, open_source(x), tmp_path / "whole", **options)
    encode, calls = sae.encode, []

    def failing(rows: Tensor) -> Codes:
        calls.append(len(rows))
        if len(calls) == 3:
            raise OSError("no space left")
        return encode(rows)

    monkeypatch.setattr(sae, "encode", failing)
    with pytest.raises(OSError, match="no space"):
        encode_corpus(sae, open_source(x), out, **options)
    assert {path.name for path in out.iterdir()} == {
        "index.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    }
    with pytest.raises(ValueError, match=r"latents.safetensors: no such file"):
        CodeSet(out)
    encode_corpus(sae, open_source(x), out, **options)
    assert calls == [30, 30, 30, 30, 10]  # the first two once
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_it_goes_on_with_the_same_only(tmp_path: Path) -> None:
    x, sae, out = randn(50, 6), tiny_sae(), tmp_path / "codes"
    encode_corpus(sae, open_source(x), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = tiny_sae()
    with torch.no_grad():
        other.W_enc[3, 2] += 1e-6
    for changed, source, options, name in (
        (other, x, {}, "sae"),
        (sae, x + 1, {}, "data"),
        (sae, x, {"contexts": 3}, "contexts"),
        (sae, x, {"shard_rows": 20}, "shards"),
    ):
        with pytest.raises(ValueError, match=f"expected the same {name}, got another"):
            encode_corpus(changed, open_source(source), out, **options)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    sae, out = tiny_sae(), tmp_path / "codes"
    found = encode_corpus(sae, open_source(randn(50, 6)), out)
    found.index["shards"] = [49]
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: expected 49 rows, got 50"):
        list(found.shards())
    found.index["shards"], found.index["d_sae"] = [50], 4
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: idx: expected ids in \[-1, 4"):
        list(found.shards())
    path = shard_path(out, 0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors"):
        list(CodeSet(out).shards())
    index = json.loads((out / "index.json").read_text())
    for change, message in (
        ({"shards": "50"}, "expected shards, d_sae and contexts as counts >= 1"),
        ({"d_sae": True}, "expected shards, d_sae and contexts as counts >= 1"),
        ({"d_sae": 23}, r"latents.safetensors: counts: expected shape \(23,\), got \(24,\)"),
        ({"contexts": 3}, r"latents.safetensors: rows: expected shape \(24, 3\), got \(24, 20\)"),
    ):
        (out / "index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            CodeSet(out)
    (out / "index.json").write_text(json.dumps({**index, "format": "other"}))
    with pytest.raises(ValueError, match="expected 'fastsae-codes' version 1, got 'other' 1"):
        CodeSet(out)


@refusals(
    "x, options, message",
    [
        (randn(9, 5), {}, "expected width 6, got 5"),
        (randn(9, 6), {"contexts": 0}, "at least 1, got 0 and 16384"),
        (randn(9, 6), {"shard_rows": 0}, "at least 1, got 20 and 0"),
    ],
)
def test_refused(x: Tensor, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        encode_corpus(tiny_sae(), open_source(x), tmp_path / "codes", **options)
    assert not (tmp_path / "codes").exists()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_top_contexts_in_parts_are_those_of_a_full_sort(data: st.DataObject) -> None:
    """With many ties, values of both signs and zeros."""
    n, f, m = (data.draw(st.integers(1, top)) for top in (30, 4, 5))
    row = st.lists(st.integers(-3, 3), min_size=f, max_size=f)
    values = np.array(data.draw(st.lists(row, min_size=n, max_size=n)), np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    top = TopContexts(f, m)
    for first, end in zip([0, *cuts], [*cuts, n], strict=True):
        rows, latents = values[first:end].nonzero()
        top.update(latents, rows + first, values[first:end][rows, latents])
    for latent in range(f):
        order = np.argsort(-np.abs(values[:, latent]), kind="stable")[:m]
        order = order[values[order, latent] != 0]
        room = m - len(order)
        assert top.rows[latent].tolist() == [*order, *[-1] * room]
        assert top.values[latent].tolist() == [*values[order, latent], *[0] * room]


def test_quantiles_are_near_and_bounded_over_the_whole_range() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.exp2(30 * torch.rand(5000, generator=generator) - 15)
    codes = Codes(values, torch.zeros(5000, dtype=torch.int32), 2, torch.arange(5001))
    index = LatentIndex(2, 3)
    index.update(codes, 0)
    exact = np.quantile(values.numpy(), QUANTILES, method="inverted_cdf")
    got = index.quantiles()
    assert (np.abs(got[0] / exact - 1) < 1 / 8).all() and (np.diff(got[0]) > 0).all()
    assert np.abs(got[0] / exact - 1).mean() < 0.02
    assert (got[1] == 0).all() and index.counts.tolist() == [5000, 0]
    one = LatentIndex(1, 1)
    tensors = torch.tensor([1e-9]), torch.zeros(1, dtype=torch.int32)
    one.update(Codes(*tensors, 1, torch.tensor([0, 1])), 0)
    assert (one.quantiles() == np.float32(1e-9)).all()  # never above the largest value


def test_files_are_plain_tensors(tmp_path: Path) -> None:
    encode_corpus(tiny_sae(), open_source(randn(20, 6)), tmp_path / "codes", contexts=2)
    shard = read_tensors(shard_path(tmp_path / "codes", 0))
    kinds = {name: (t.dtype, tuple(t.shape)) for name, t in shard.items()}
    assert kinds == {
        "vals": (torch.float32, (60,)),
        "idx": (torch.int32, (60,)),
        "row_ptr": (torch.int64, (21,)),
    }


def test_means_are_those_of_the_sizes(tmp_path: Path) -> None:
    x, sae = randn(300, 6), tiny_sae("abs-topk")
    found = encode_corpus(sae, open_source(x), tmp_path / "codes", shard_rows=70)
    dense = sae.encode(x, training=False).to_dense().detach().double()
    assert (dense < 0).any()
    expected = dense.abs().sum(0) / (dense != 0).sum(0).clamp(min=1)
    torch.testing.assert_close(found.means(), expected)


def test_codes_know_what_they_are_of(tmp_path: Path) -> None:
    x, sae = randn(50, 6), tiny_sae()
    found = encode_corpus(sae, open_source(x), tmp_path / "codes")
    found.check(sae, open_source(x))
    with pytest.raises(ValueError, match="codes: expected codes of the same data, got another's"):
        found.check(sae, open_source(x[:49]))
    with torch.no_grad():
        sae.b_dec[0] += 1
    with pytest.raises(ValueError, match="codes: expected codes of the same sae, got another's"):
        found.check(sae, open_source(x))


@pytest.mark.parametrize("name", ["topk", "relu"])
def test_activations_of_pairs_are_those_of_the_dense_codes(name: str, tmp_path: Path) -> None:
    x, sae = randn(100, 6), tiny_sae(name)
    found = encode_corpus(sae, open_source(x), tmp_path / "codes", shard_rows=30)
    dense = sae.encode(x, training=False).to_dense().detach().float().numpy()
    rng = np.random.default_rng(0)
    rows, latents = rng.integers(-9, 109, 500), rng.integers(0, 24, 500)
    there = (rows >= 0) & (rows < 100)
    expected = np.where(there, dense[rows.clip(0, 99), latents], 0)
    assert np.array_equal(found.at(rows, latents), expected) and expected.any()
    assert found.at(rows[:0], latents[:0]).shape == (0,)
