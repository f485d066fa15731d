"""Files that are broken or made to harm: a ValueError of one line that names the file, no more."""

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import refusals
from format_files import (
    B_DEC,
    BASE,
    CASES,
    DIRECT,
    LINEAR,
    THETA,
    W_DEC,
    D,
    F,
    K,
    gemma_scope,
    llama_scope,
    llamascopium,
    openai,
    pickled,
    sae_lens,
    sparsify,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fastsae
from fastsae import SAE, SAEConfig, TopK, formats

FIXED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ours(folder: Path) -> None:
    SAE(SAEConfig(D, F, TopK(K))).save(folder)


FIRST: dict[str, Callable[[Path], Any]] = {name: makers[-1] for name, makers in CASES.items()}
FIRST["fastsae"] = ours
FIRST["llamascopium-pt"] = CASES["llamascopium"][1]
FIRST["sae_lens-old"] = CASES["sae_lens"][2]


def load_or_refuse(path: Path, format: str, names: Path) -> None:
    """Loads an SAE of finite numbers, or raises a ValueError of one line that names the file."""
    try:
        sae = formats.read(path, format.partition("-")[0])
    except ValueError as error:
        assert str(names) in str(error) and len(str(error).splitlines()) == 1
        assert len(str(error)) < 1000
    else:
        assert all(bool(p.isfinite().all()) for p in sae.parameters(recurse=False))


def folders(tmp_path: Path) -> Path:
    folder = tmp_path / str(len(os.listdir(tmp_path)))
    folder.mkdir()
    return folder


@pytest.mark.parametrize("format", FIRST)
def test_damaged_files(format: str, tmp_path: Path) -> None:
    FIRST[format](source := folders(tmp_path))
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())

    @FIXED
    @given(
        which=st.sampled_from(files),
        how=st.sampled_from(["cut", "flip", "header", "insert", "empty", "ones"]),
        at=st.floats(0, 1, exclude_max=True),
        data=st.binary(min_size=1, max_size=12),
    )
    def damage(which: Path, how: str, at: float, data: bytes) -> None:
        file = source / which
        good = file.read_bytes()
        place = int(at * (min(len(good), 400) if how == "header" else len(good)))
        bad = {
            "cut": good[:place],
            "flip": good[:place]
            + bytes(a ^ b for a, b in zip(good[place:], data, strict=False))
            + good[place + len(data) :],
            "header": good[:place] + data + good[place + len(data) :],
            "insert": good[:place] + data + good[place:],
            "empty": b"",
            "ones": good[: place & ~7] + b"\xff" * 8 + good[(place & ~7) + 8 :],  # a NaN
        }[how]
        file.write_bytes(bad)
        try:
            load_or_refuse(file if format == "openai" else source, format, source)
        finally:
            file.write_bytes(good)

    damage()


VALUES: list[Any] = [
    None,
    -1,
    0,
    10**400,
    2**31,
    1e308,
    0.5,
    math.nan,
    math.inf,
    True,
    "",
    "x" * 999,
]
VALUES += ["../../etc/passwd", [], [1, "a"], {}, {"name": "topk"}, [[[[]]]]]


@pytest.mark.parametrize(
    "format", [name for name in FIRST if name not in ("openai", "gemma_scope")]
)
def test_hostile_configurations(format: str, tmp_path: Path) -> None:
    FIRST[format](source := folders(tmp_path))
    configs = [f for f in sorted(source.glob("*.json")) if json.loads(f.read_text())]
    good = {file: json.loads(file.read_text()) for file in configs}
    good.setdefault(source / "config.json", {"trainer": {"dict_class": "AutoEncoder"}})
    inner = [(f, ("trainer", k)) for f, c in good.items() for k in c.get("trainer", {})]
    places = [(file, (key,)) for file, config in good.items() for key in config] + inner

    @FIXED
    @given(where=st.sampled_from(places), value=st.sampled_from(VALUES))
    def edit(where: tuple[Path, tuple[str, ...]], value: Any) -> None:
        file, keys = where
        bad = json.loads(json.dumps(good[file]))
        target = bad if len(keys) == 1 else bad[keys[0]]
        target[keys[-1]] = value
        file.write_text(json.dumps(bad))
        try:
            load_or_refuse(source, format, source)
        finally:
            file.write_text(json.dumps(good[file]))

    edit()


# ---- one by one ----


def weights_of(folder: Path, **changes: Any) -> None:
    kept = {n: t.clone() for n, t in {**BASE, **changes}.items() if t is not None}
    sae_lens(folder, "topk", kept, k=K)


def tensors(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: weights_of(folder, **changes)


def with_nan(t: torch.Tensor, value: float = math.nan) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] = value
    return t


def edited(make: Callable, name: str, **changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        make(folder)
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **changes}))

    return write


def header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights_of(folder)
        size = struct.pack("<Q", len(text) if length is None else length)
        (folder / "sae_weights.safetensors").write_bytes(size + text + b"\0" * 64)

    return write


def giant(shape: list[int], end: int) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    return json.dumps({"W_enc": entry}).encode()


def pt(name: str = "AutoEncoder", **changes: Any) -> Callable[[Path], None]:
    return lambda folder: pickled(folder, name, **{**LINEAR, "bias": B_DEC, **changes})


def native(**changes: torch.Tensor) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        ours(folder)
        state = load_file(folder / "sae.safetensors")
        save_file({**state, **changes}, folder / "sae.safetensors")

    return write


def scope_2(**changes: torch.Tensor) -> Callable[[Path], None]:
    own = {name.lower(): t.clone() for name, t in (DIRECT | {"threshold": THETA}).items()}
    own |= {name: t.clone() for name, t in changes.items()}
    return lambda folder: save_file(own, folder / "params.safetensors")


def npz(**changes: Any) -> Callable[[Path], None]:
    arrays = {name: t.numpy() for name, t in (DIRECT | {"threshold": THETA}).items()}
    return lambda folder: np.savez(folder / "params.npz", **{**arrays, **changes})


def giant_npz(folder: Path) -> None:
    npy = b"\x93NUMPY\x01\x00"
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 9999)}"
    text += b" " * (117 - len(text)) + b"\n"
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy + struct.pack("<H", len(text)) + text + b"\0" * 64)


def bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", b"\0" * 2**24)


def climbing(folder: Path) -> None:
    """An archive whose names lead out of it: they are not those that are looked up."""
    gemma_scope(folder)
    with zipfile.ZipFile(folder / "params.npz") as archive:
        members = {f"../../{name}": archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def pipe(folder: Path) -> None:
    weights_of(folder)
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")


HUGE = torch.zeros(1).expand(2**31, 2**31)
REFUSED: list[tuple] = [
    ("sae_lens", tensors(W_enc=W_DEC), r"W_dec: expected shape \(4, 20\), got \(20, 4\)"),
    ("sae_lens", tensors(W_enc=None), "W_enc: expected a tensor, got none; there are W_dec, b_dec"),
    ("sae_lens", tensors(b_enc=B_DEC), r"b_enc: expected shape \(20,\), got \(4,\)"),
    ("sae_lens", tensors(b_dec=B_DEC[None]), r"b_dec: expected shape \(4,\), got \(1, 4\)"),
    (
        "sae_lens",
        tensors(W_dec=W_DEC.long()),
        "W_dec: expected one of float32, .*, got torch.int64",
    ),
    ("sae_lens", tensors(W_dec=W_DEC[None]), r"W_dec: expected a matrix, got shape \(1, 20, 4\)"),
    ("sae_lens", tensors(W_dec=with_nan(W_DEC)), "W_dec: expected finite numbers, got nan"),
    ("sae_lens", tensors(b_enc=with_nan(BASE["b_enc"], -math.inf)), "b_enc: .* finite.* got -inf"),
    ("sae_lens", tensors(scaling_factor=2 * THETA), "scaling_factor: expected ones"),
    ("sae_lens", header(b"{}"), "sae_weights.safetensors: .*not fully covered"),
    ("sae_lens", header(b"{" * 100), "sae_weights.safetensors: .*[Hh]eader"),
    ("sae_lens", header(b"{}", 2**63), "sae_weights.safetensors: .*[Hh]eader"),
    ("sae_lens", header(giant([2**40, 2**20], 64)), "sae_weights.safetensors: "),
    ("sae_lens", header(giant([2**16, 2**16], 2**34)), "sae_weights.safetensors: "),
    ("sae_lens", header(giant([-4, 4], 64)), "sae_weights.safetensors: "),
    ("sae_lens", pipe, "expected a file cfg.json, got none"),
    ("sae_lens", edited(weights_of, "cfg.json", d_sae=21), "d_sae: expected 20, as .*, got 21"),
    ("sae_lens", edited(weights_of, "cfg.json", architecture="temporal"), "architecture: expected"),
    ("sae_lens", edited(weights_of, "cfg.json", k=21), "k: expected at most d_sae = 20, got 21"),
    (
        "sae_lens",
        edited(weights_of, "cfg.json", normalize_activations="layer_norm"),
        "normalize_activations: layer_norm: no SAE here does that",
    ),
    (
        "sae_lens",
        edited(weights_of, "cfg.json", normalize_activations="covariance_whitening"),
        "normalize_activations: covariance_whitening: no SAE here does that",
    ),
    ("fastsae", native(b_dec=torch.full((D,), math.inf)), "b_dec: expected finite .*, got inf"),
    ("fastsae", native(input_scale=torch.tensor(0.0)), "input_scale: expected a number above 0"),
    ("gemma_scope_2", scope_2(w_enc=W_DEC[None]), r"w_enc: expected a matrix, got shape \(1, "),
    ("gemma_scope_2", scope_2(affine_skip_connection=B_DEC), "affine_skip_.* expected a matrix"),
    ("dictionary_learning", pt(k=2.5, name="AutoEncoderTopK", b_dec=B_DEC), "k: expected an int"),
    ("dictionary_learning", pt(**{"encoder.weight": HUGE}), "expected the bytes of shape"),
    ("dictionary_learning", pt(bias=torch.zeros(D).to_sparse()), "bias: expected a dense tensor"),
    ("dictionary_learning", pt(bias="b"), "bias: expected a tensor, got str"),
    (
        "dictionary_learning",
        pt(bias=torch.zeros(D, dtype=torch.cfloat)),
        "b_dec: expected one of float32, .*, got torch.complex64",
    ),
    (
        "dictionary_learning",
        lambda folder: pickled(folder, "CrossCoder", **LINEAR),
        "dict_class: expected one of AutoEncoderTopK",
    ),
    ("sparsify", lambda folder: sparsify(folder, signed=True), "signed: expected false"),
    ("sparsify", lambda folder: sparsify(folder, activation="gelu"), "activation: expected topk"),
    ("sparsify", lambda folder: sparsify(folder, d_in=9), "d_in: expected 4, as .*, got 9"),
    ("llamascopium", lambda folder: llamascopium(folder, "gelu"), "act_fn: expected relu"),
    (
        "llamascopium",
        lambda folder: llamascopium(folder, "relu", use_glu_encoder=True),
        "use_glu_encoder: expected false",
    ),
    (
        "llamascopium",
        lambda folder: llamascopium(folder, "relu", norm_activation="token-wise"),
        "norm_activation: token-wise: no SAE here does that",
    ),
    (
        "llama_scope",
        lambda folder: llama_scope(folder, dataset_average_activation_norm={"in": 0, "out": 1}),
        "in: expected a number above 0, got 0",
    ),
    ("gemma_scope", npz(threshold=np.array(["a"] * F)), "expected .* bytes of floats, got <U1"),
    ("gemma_scope", npz(W_enc=np.array([{}] * F)), "expected .* bytes of floats, got object"),
    (
        "gemma_scope",
        npz(threshold=with_nan(THETA).numpy()),
        "threshold: expected finite .*, got nan",
    ),
    ("gemma_scope", npz(threshold=THETA[:5].numpy()), "threshold: expected 20 floats, got"),
    ("gemma_scope", giant_npz, "expected .* bytes of floats, got float64 of shape"),
    ("gemma_scope", bomb, "W_enc: expands to 16777216 bytes"),
    ("gemma_scope", climbing, "W_enc: expected a tensor, got none"),
]


@refusals(("format", "make", "message"), REFUSED)
def test_each_is_refused(format: str, make: Callable, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        formats.read(tmp_path, format)
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["FASTSAE_HARM"],)


def test_no_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAE_HARM", str(tmp_path / "harm"))
    pickled(tmp_path, "AutoEncoder", **LINEAR, bias=Harmful())
    with pytest.raises(ValueError, match=r"ae\.pt: not readable as plain tensors: .*"):
        fastsae.load(tmp_path)
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Harmful(), 2))
    with pytest.raises(ValueError, match=r"ae\.pt: not readable as plain tensors: .*"):
        fastsae.load(tmp_path)
    openai(tmp_path)
    (tmp_path / "7.pt").write_bytes(pickle.dumps({"pre_bias": Harmful()}, 2))
    with pytest.raises(ValueError, match=r"7\.pt: not readable as plain tensors: .*"):
        formats.guess(tmp_path / "7.pt")
    assert not (tmp_path / "harm").exists()
