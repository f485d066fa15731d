"""Our safetensors files, read by the library."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastsae.tensors import write_tensors


def test_the_library_reads_what_was_written(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator)
    tensors = {
        "bf16": x.bfloat16(),
        "fp16": x[:3, :1].half(),
        "fp32": x,
        "strided": x.T[1:, ::2],
        "fp64": x.double(),
        "zero-d": torch.tensor(2.5),
        "empty": x[:0],
        "a name with ünicode": torch.arange(-3, 3),
        "int32": torch.arange(5, dtype=torch.int32),
        "parameter": torch.nn.Parameter(x + 1),
    }
    path = tmp_path / "some.safetensors"
    write_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_slice("fp32")[2:4], x[2:4])
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for entry in header.values():
        width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4}.get(entry["dtype"], 2)
        assert entry["data_offsets"][0] % width == 0


def test_nothing_at_all(tmp_path) -> None:
    write_tensors(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}


def test_an_unknown_dtype_writes_no_file(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"z: expected one of torch.float64, .*got torch.complex64"):
        write_tensors(tmp_path / "no.safetensors", {"z": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "no.safetensors").exists()
