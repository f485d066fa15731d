"""Sources, the held-out split, and the exactness, stability and resumption of shuffled batches."""

import errno
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsae import shards
from fastsae.batches import _AHEAD, Batches
from fastsae.data import (
    SAMPLES,
    Source,
    in_order,
    load_sample,
    open_source,
    split,
)
from fastsae.order import Order

PINNED_BLOCKS = [17, 0, 2, 13, 10, 8, 19, 1, 18, 3, 14, 6, 9, 5, 7, 4, 15, 16, 12, 11]
PINNED_POOL = [169, 26, 66, 94, 175, 93, 65, 64]

ROOT = Path(__file__).resolve().parent.parent


def numbered(n_rows: int, target: bool = False) -> Source:
    """A source whose row i is [i, -i], so that a batch tells which rows it holds."""
    x = torch.arange(n_rows, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0])
    return open_source(x, target=1000 + x if target else None)


def numbers(x: torch.Tensor) -> list[int]:
    return [int(value) for value in x[:, 0]]


def draw(source: Source, batch_size: int, n_batches: int, seed: int = 0, start: int = 0) -> list:
    batches = Batches(source, batch_size, seed, start)
    return [n for batch in itertools.islice(batches, n_batches) for n in numbers(batch.x)]


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


# Shuffled batches


@pytest.mark.parametrize("n_rows", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 64, 200])
def test_every_epoch_has_every_row_once(n_rows: int, batch_size: int) -> None:
    n_epochs = 5
    stream = draw(numbered(n_rows), batch_size, -(-n_epochs * n_rows // batch_size))
    for epoch in range(n_epochs):
        assert sorted(stream[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_epochs_and_seeds_have_their_own_orders() -> None:
    stream = draw(numbered(100), 100, 3)
    orders = [stream[:100], stream[100:200], stream[200:], draw(numbered(100), 100, 1, seed=1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_stream_does_not_depend_on_batch_size() -> None:
    whole = draw(numbered(50), 175, 1)
    for batch_size in (1, 7, 25, 35):
        assert draw(numbered(50), batch_size, 175 // batch_size) == whole


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 20, 29])
def test_stream_resumes_from_rows_seen(start: int) -> None:
    assert (
        draw(numbered(10), 3, 5, seed=4, start=start) == draw(numbered(10), 1, 60, 4)[start:][:15]
    )


def test_rows_seen_is_the_position_and_a_failed_batch_does_not_move_it() -> None:
    x = torch.zeros(10, 2)
    batches = Batches(open_source(x), 4)
    next(batches)
    assert batches.rows_seen == 4
    x[:] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        next(batches)
    assert batches.rows_seen == 4
    x[:] = torch.arange(10.0)[:, None]
    assert numbers(next(batches).x) == draw(numbered(10), 4, 1, start=4)
    assert batches.rows_seen == 8


def test_order_is_pinned() -> None:
    """A changed shuffle would silently change every run that is resumed or repeated."""
    source = numbered(10)
    assert draw(source, 10, 1) == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert draw(source, 10, 1, start=10) == [3, 5, 2, 7, 4, 6, 8, 9, 1, 0]
    assert draw(numbered(1_000_003), 4, 1, seed=2**63 + 5) == [34868, 303644, 244582, 178892]
    train, holdout = split(source, 3)
    assert numbers(holdout.rows(np.arange(3))) == [2, 6, 7]
    assert draw(train, 7, 1) == [8, 4, 3, 5, 1, 0, 9]


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    first = draw(split(numbered(100), 10)[0], 8, 20)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state
    torch.manual_seed(1)
    np.random.seed(1)
    assert draw(split(numbered(100), 10)[0], 8, 20) == first


def test_shuffle_is_uniform() -> None:
    """Position of row 0 over 3,000 epochs: χ² with 7 degrees of freedom is below 30 (p = 1e-4)."""
    stream = np.array(draw(numbered(8), 8, 3000)).reshape(3000, 8)
    counts = np.bincount(np.argmax(stream == 0, axis=1), minlength=8)
    assert ((counts - 375) ** 2 / 375).sum() < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "expected batch_size >= 1, got 0"),
        ({"batch_size": 4, "start": -1}, "expected start >= 0, got -1"),
        ({"batch_size": 4, "seed": -1}, "expected seed >= 0 and < 18446744073709551616, got -1"),
        ({"batch_size": 4, "seed": 2**64}, "expected seed >= 0"),
    ],
)
def test_batches_refuse_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(numbered(10), **arguments)


def test_batches_need_rows_and_integers() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Batches(split(numbered(10), 0)[1], 4)
    with pytest.raises(TypeError):
        Batches(numbered(10), 4.0)  # type: ignore[arg-type]


# One pass in order


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (99, [10])])
def test_in_order_is_one_pass_with_a_short_end(batch_size: int, sizes: list[int]) -> None:
    batches = list(in_order(numbered(10), batch_size))
    assert [len(batch.x) for batch in batches] == sizes
    assert [n for batch in batches for n in numbers(batch.x)] == list(range(10))


def test_in_order_refuses_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        next(in_order(numbered(10), 0))


# The held-out split


@pytest.mark.parametrize("n_holdout", [0, 1, 50, 99])
def test_split_parts_are_disjoint_whole_and_in_the_order_of_the_data(n_holdout: int) -> None:
    source = numbered(100)
    train, holdout = split(source, n_holdout)
    rows = [numbers(part.rows(np.arange(part.n_rows))) for part in (train, holdout)]
    assert (train.n_rows, holdout.n_rows) == (100 - n_holdout, n_holdout)
    assert rows == [sorted(rows[0]), sorted(rows[1])]
    assert sorted(rows[0] + rows[1]) == list(range(100))


def test_split_depends_on_its_seed_and_not_on_the_data() -> None:
    def held_out(source: Source, seed: int) -> list[int]:
        index = split(source, 20, seed)[1].index
        assert index is not None
        return index.tolist()

    assert held_out(numbered(100), 0) == held_out(open_source(torch.ones(100, 7)), 0)
    assert held_out(numbered(100), 0) != held_out(numbered(100), 1)


@pytest.mark.parametrize("n_holdout", [-1, 10, 11])
def test_split_leaves_rows_to_train_on(n_holdout: int) -> None:
    with pytest.raises(ValueError, match=rf"expected n_holdout >= 0 and < 10, got {n_holdout}"):
        split(numbered(10), n_holdout)


def test_split_of_a_split_and_its_batches() -> None:
    train, _ = split(numbered(100), 30)
    inner, validation = split(train, 20, seed=1)
    outer_rows = set(numbers(train.rows(np.arange(70))))
    inner_rows = set(draw(inner, 50, 1))
    validation_rows = set(numbers(validation.rows(np.arange(20))))
    assert inner_rows | validation_rows == outer_rows
    assert not inner_rows & validation_rows


# Paired targets


def test_targets_stay_with_their_rows() -> None:
    source = numbered(50, target=True)
    train, holdout = split(source, 10)
    batches = [*itertools.islice(Batches(train, 16), 6), *in_order(holdout, 4)]
    for batch in batches:
        assert batch.target is not None
        torch.testing.assert_close(batch.target, 1000 + batch.x, rtol=0, atol=0)


def test_target_may_have_another_width_but_not_another_length() -> None:
    source = open_source(torch.zeros(10, 3), target=torch.zeros(10, 5))
    assert (source.d_in, source.d_out) == (3, 5)
    assert open_source(torch.zeros(10, 3)).d_out == 3
    with pytest.raises(ValueError, match="each of the 10 rows of tensor, got 9 rows in tensor"):
        open_source(torch.zeros(10, 3), target=torch.zeros(9, 3))


def test_an_opened_source_can_be_given_a_target() -> None:
    source = open_source(numbered(10), target=numbered(10))
    batch = source.batch(np.array([3, 1]))
    assert batch.target is not None
    assert numbers(batch.target) == numbers(batch.x) == [3, 1]


# Tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensor_rows_are_exact_float32_copies(dtype: torch.dtype) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    source = open_source(x.requires_grad_())
    index = np.array([19, 0, 7, 7])
    rows = source.rows(index)
    assert (source.n_rows, source.d_in, rows.dtype) == (20, 6, torch.float32)
    assert not rows.requires_grad
    assert torch.equal(rows, x.detach()[[19, 0, 7, 7]].float())
    rows.zero_()
    assert not torch.equal(source.rows(index), rows)


def test_tensor_may_be_strided() -> None:
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(open_source(x.T).rows(np.arange(20)), x.T)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"expected 2 dimensions .*, got \[4\]"),
        (torch.zeros(2, 3, 4), ValueError, r"got \[2, 3, 4\]"),
        (torch.zeros(0, 4), ValueError, r"at least 1 each, got \[0, 4\]"),
        (torch.zeros(4, 0), ValueError, r"at least 1 each, got \[4, 0\]"),
        (torch.zeros(4, 4, dtype=torch.int64), TypeError, "expected float16, .*, got torch.int64"),
        (torch.zeros(4, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
        ([[1.0]], TypeError, "expected a tensor, the path of a .npy file, .*, got list"),
    ],
)
def test_bad_tensors_are_refused(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_source(x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (np.array([0, 10]), ValueError, r"expected row numbers in \[0, 10\), got 0 to 10"),
        (np.array([-1]), ValueError, "got -1 to -1"),
        (np.array([0.0]), TypeError, "expected a 1-D integer index, got float64"),
        (np.array([[0]]), TypeError, r"got int64 \[1, 1\]"),
        (np.ones(10, dtype=bool), TypeError, "got bool"),
    ],
)
def test_bad_row_numbers_are_refused(
    index: np.ndarray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        numbered(10).rows(index)


# .npy files


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("as_text", [False, True])
def test_npy_rows_are_exact(tmp_path: Path, dtype: str, as_text: bool) -> None:
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(dtype)
    path = save(tmp_path / "x.npy", x)
    source = open_source(str(path) if as_text else path)
    rows = source.rows(np.array([19, 0, 7, 7]))
    assert (source.n_rows, source.d_in, rows.dtype) == (20, 6, torch.float32)
    assert np.array_equal(rows.numpy(), x[[19, 0, 7, 7]].astype(np.float32))


def test_every_finite_float16_is_read_exactly(tmp_path: Path) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)][:, None]
    rows = open_source(save(tmp_path / "x.npy", x)).rows(np.arange(len(x))).numpy()
    assert np.array_equal(rows.view(np.uint32), x.astype(np.float32).view(np.uint32))


def test_npy_header_of_version_2(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, np.eye(3, dtype=np.float32), version=(2, 0))
    assert torch.equal(open_source(tmp_path / "x.npy").rows(np.arange(3)), torch.eye(3))


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros(4), ValueError, r"expected 2 dimensions .*, got \[4\]"),
        (np.zeros((2, 3, 4)), ValueError, r"got \[2, 3, 4\]"),
        (np.zeros((0, 4)), ValueError, r"at least 1 each, got \[0, 4\]"),
        (np.zeros((4, 0)), ValueError, r"at least 1 each, got \[4, 0\]"),
        (np.zeros((4, 4), np.int8), TypeError, "expected float16, float32 or float64, got int8"),
        (np.zeros((4, 4), np.complex64), TypeError, "got complex64"),
        (np.zeros((4, 4), [("x", "<f4")]), TypeError, "got .*'x'"),
        (np.array([["a", None]]), TypeError, "got object"),
        (np.asfortranarray(np.ones((4, 3))), ValueError, "expected C order .*, got Fortran order"),
    ],
)
def test_bad_arrays_are_refused(
    tmp_path: Path, array: np.ndarray, error: type[Exception], message: str
) -> None:
    path = save(tmp_path / "x.npy", array)
    with pytest.raises(error, match=message) as raised:
        open_source(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = save(tmp_path / "x.npy", np.array([[Bomb()]], dtype=object))
    with pytest.raises(TypeError, match="got object"):
        open_source(path)
    assert not (tmp_path / "exploded").exists()
    np.load(path, allow_pickle=True)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("lost_bytes", "row"), [(1, 9), (24, 9), (25, 8), (240, 0)])
def test_truncated_npy_names_the_first_incomplete_row(
    tmp_path: Path, lost_bytes: int, row: int
) -> None:
    path = save(tmp_path / "x.npy", np.zeros((10, 6), dtype=np.float32))
    size = path.stat().st_size
    os.truncate(path, size - lost_bytes)
    with pytest.raises(ValueError) as raised:
        open_source(path)
    assert str(raised.value) == (
        f"{path}: truncated: 10 rows of 6 float32 need {size} bytes, the file has "
        f"{size - lost_bytes}; row {row} is the first incomplete one"
    )


def npy_with_shape(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable .npy file: EOF"),
        (b"\x93NUMPY\x01\x00", "not a readable .npy file: EOF"),
        (b"PK\x03\x04" + bytes(100), "not a readable .npy file: the magic string"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "expected format version 1.0 or 2.0"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "EOF: reading array header"),
        (npy_with_shape("(-1, 4)"), "the shape is out of range"),
        (npy_with_shape("(4611686018427387904, 4)"), "truncated"),
        (npy_with_shape("(0x" + "f" * 8000 + ", 4)"), "the shape is out of range"),
        (npy_with_shape("'many'"), "shape is not valid"),
    ],
)
def test_malformed_files_are_refused_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        open_source(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


GOOD_FILE = npy_with_shape("(10, 6)") + np.arange(60, dtype=np.float32).tobytes()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.dictionaries(st.integers(0, 80), st.integers(0, 255), max_size=4),
    cut=st.none() | st.integers(0, len(GOOD_FILE)),
)
def test_damaged_files_raise_nothing_else(
    tmp_path: Path, edits: dict[int, int], cut: int | None
) -> None:
    damaged = bytearray(GOOD_FILE)
    for position, byte in edits.items():
        damaged[position] = byte
    path = tmp_path / "x.npy"
    path.write_bytes(damaged[:cut])
    try:
        source = open_source(path)
        source.rows(np.arange(source.n_rows))
    except (ValueError, TypeError) as error:
        assert str(error).startswith(f"{path}: ")
        assert len(str(error).splitlines()) == 1


def test_paths_that_are_not_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("absent.npy", ".", "pipe.npy", "n" * 300 + ".npy"):
        with pytest.raises(ValueError, match=r"no such file|cannot be read"):
            open_source(tmp_path / name)


def test_a_file_cut_short_in_use_is_an_error_and_a_deleted_one_is_not(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", np.ones((5000, 64), dtype=np.float32))
    source = open_source(path)
    end = path.stat().st_size
    copy = open_source(save(tmp_path / "copy.npy", np.ones((5, 2))))
    os.truncate(path, end - 1)
    with pytest.raises(ValueError) as raised:
        source.rows(np.array([0]))
    assert str(raised.value) == f"{path}: cut short while in use: {end - 1} of {end} bytes left"
    (tmp_path / "copy.npy").unlink()
    assert torch.equal(copy.rows(np.array([4])), torch.ones(1, 2))


LARGER_THAN_MEMORY = """
import itertools, resource, sys
import numpy as np, torch
from fastsae.batches import Batches
from fastsae.data import in_order, open_source, split

def used():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024

torch.set_num_threads(1)
train, holdout = split(open_source(sys.argv[1]), 1000)
next(Batches(train, 1024))
limit = used() + 48 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
seen = sum(len(batch.x) for batch in itertools.islice(Batches(train, 1024), 50))
seen += sum(len(batch.x) for batch in in_order(holdout, 256))
print(seen)
try:
    np.load(sys.argv[1])
except MemoryError:
    print("the whole file does not fit")
"""


def test_npy_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(200_000, 384))
    file[::1000] = 1
    del file
    child = subprocess.run(
        [sys.executable, "-c", LARGER_THAN_MEMORY, path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert child.stdout.splitlines() == ["52200", "the whole file does not fit"], child.stderr


# Folders of shards


def write_set(
    folder: Path,
    sizes: list[int],
    d: int = 3,
    dtype: torch.dtype = torch.float16,
    gradients: bool = False,
) -> torch.Tensor:
    """A set of random rows x; gradients are −x, tokens count from 0. Returns x."""
    x = torch.randn(sum(sizes), d, generator=torch.Generator().manual_seed(0)).to(dtype)
    folder.mkdir(exist_ok=True)
    index = {"format": shards.FORMAT, "version": shards.VERSION, "d": d, "gradients": gradients}
    name = str(dtype).removeprefix("torch.")
    shards.write_index(folder, {**index, "dtype": name, "shards": sizes})
    start = 0
    for number, size in enumerate(sizes):
        rows = torch.arange(start, start + size, dtype=torch.int32)
        tensors = {"x": x[rows], "token": rows, "window": rows // 4, "position": rows % 4}
        if gradients:
            tensors["gradient"] = -x[rows]
        shards.write_shard(shards.shard_path(folder, number), tensors)
        start += size
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_shards_are_exact_by_number(tmp_path: Path, dtype: torch.dtype) -> None:
    x = write_set(tmp_path / "set", [5, 1, 7], dtype=dtype)
    source = open_source(str(tmp_path / "set"))
    assert (source.n_rows, source.d_in, source.target, source.gradient) == (13, 3, None, None)
    for index in (np.arange(13), np.array([12, 0, 5, 4, 6, 5, 5, 0]), np.array([], np.int64)):
        rows = source.rows(index)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, x[torch.from_numpy(index)].float())
    assert torch.equal(torch.cat([batch.x for batch in in_order(source, 4)]), x.float())
    with pytest.raises(ValueError, match=r"row numbers in \[0, 13\), got 13 to 13"):
        source.rows(np.array([13]))


def test_labels_of_shards(tmp_path: Path) -> None:
    write_set(tmp_path, [5, 1, 7])
    stored, numbers = shards.ActivationSet(tmp_path), np.array([12, 0, 5, 5])
    labels = [stored.gather(name, numbers) for name in ("token", "window", "position")]
    assert [label.tolist() for label in labels] == [[12, 0, 5, 5], [3, 0, 1, 1], [0, 0, 1, 1]]
    assert {label.dtype for label in labels} == {torch.int32}


def test_gradients_stay_with_their_rows(tmp_path: Path) -> None:
    x = write_set(tmp_path, [20, 30], gradients=True)
    source = open_source(tmp_path, target=1000 + x.float(), gradients=True)
    train, holdout = split(source, 10)
    batches = [*itertools.islice(Batches(train, 16), 6), *in_order(holdout.select(np.arange(7)), 4)]
    for batch in batches:
        assert batch.gradient is not None and batch.target is not None
        assert torch.equal(batch.gradient, -batch.x)
        assert torch.equal(batch.target, 1000 + batch.x)
    assert [len(batch.x) for batch in batches[-2:]] == [4, 3]
    again = open_source(source, gradients=True).batch(np.array([49, 3]))
    assert torch.equal(torch.stack([again.x, -again.gradient]), x[[49, 3]].float().expand(2, 2, 3))


def test_gradients_are_read_only_where_asked_for_and_must_be_there(tmp_path: Path) -> None:
    write_set(tmp_path / "with", [4], gradients=True)
    write_set(tmp_path / "without", [4])
    assert open_source(tmp_path / "with").batch(np.array([0])).gradient is None
    for spec in (tmp_path / "without", torch.zeros(4, 3), open_source(tmp_path / "with")):
        with pytest.raises(ValueError, match="expected stored gradients, got none"):
            open_source(spec, gradients=True)


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, [4, 4], gradients=True)
    stored = shards.ActivationSet(tmp_path)
    tensors = {name: stored.gather(name, np.arange(4, 8)) for name in stored.tensors}
    tensors["gradient"][2, 1] = float("nan")
    shards.write_shard(shards.shard_path(tmp_path, 1), tensors)
    with pytest.raises(ValueError, match=r": gradient: row 6 holds a NaN"):
        next(in_order(open_source(tmp_path, gradients=True), 8))
    assert len(next(in_order(open_source(tmp_path), 8)).x) == 8


def test_a_set_of_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    x = write_set(tmp_path, [2] * (shards._OPEN_SHARDS + 60), d=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + shards._OPEN_SHARDS + 10, limits[1]))
    try:
        source = open_source(tmp_path)
        batches = list(itertools.islice(Batches(source, 100), 8))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sum(len(batch.x) for batch in batches) == 800
    assert torch.equal(source.rows(np.arange(source.n_rows)), x.float())


def edited(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text()) | changes
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, r"expected 'fastsae-activations' version 1, got 'other' 1"),
        ({"version": 2}, "got 'fastsae-activations' 2"),
        ({"d": 0}, "expected a width d >= 1, got 0"),
        ({"d": "3"}, "expected a width d >= 1, got '3'"),
        ({"d": True}, "expected a width d >= 1, got True"),
        ({"dtype": "int8"}, "expected a dtype of float16, bfloat16, float32, got 'int8'"),
        ({"dtype": ["float16"]}, "expected a dtype of"),
        ({"gradients": None}, "expected gradients true or false, got None"),
        ({"shards": []}, "expected shards as the row counts"),
        ({"shards": [5, -1]}, "expected shards as the row counts"),
        ({"shards": [5, 1 << 60]}, "expected shards as the row counts"),
    ],
)
def test_bad_indices_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write_set(tmp_path, [5, 6])
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        open_source(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'index.json'}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": 4}, r"00000.safetensors: tensor x: expected F16 \[5, 4\], got F16 \[5, 3\]"),
        ({"dtype": "float32"}, r"00000.safetensors: tensor x: expected F32 \[5, 3\], got F16"),
        (
            {"shards": [5, 7]},
            r"00001.safetensors: tensor x: expected F16 \[7, 3\], got F16 \[6, 3\]",
        ),
        ({"gradients": True}, r"tensor gradient: expected F16 \[5, 3\], got none"),
        ({"shards": [5, 6, 7]}, "00002.safetensors: no such file, .* when it is started again"),
    ],
)
def test_an_index_that_its_shards_do_not_agree_with(
    tmp_path: Path, changes: dict, message: str
) -> None:
    write_set(tmp_path, [5, 6])
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def safetensors_file(header: bytes, data: int = 100) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data)


def entry(**changes: object) -> bytes:
    x = {"dtype": "F16", "shape": [5, 3], "data_offsets": [0, 30]} | changes
    return safetensors_file(json.dumps({"x": x}).encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the header's length is wrong"),
        (b"\xff" * 100, "the header's length is wrong"),
        (safetensors_file(b"{}")[:9], "truncated: the header needs 2 bytes"),
        (safetensors_file(b"[1]"), "expected a JSON object, got list"),
        (safetensors_file(b"{nonsense"), "not readable as JSON"),
        (safetensors_file(b"[" * 60_000), "not readable as JSON"),
        (safetensors_file(b"{}"), r"tensor x: expected F16 \[5, 3\], got none"),
        (entry(dtype="I8"), r"got I8 \[5, 3\]"),
        (entry(shape=[3, 5]), r"got F16 \[3, 5\]"),
        (entry(data_offsets=[0, 32]), r"expected offsets 30 bytes apart, got \[0, 32\]"),
        (entry(data_offsets=[-8, 22]), "expected offsets 30 bytes apart"),
        (entry(data_offsets=[0.0, 30.0]), "expected two data offsets"),
        (entry(data_offsets=[1 << 70, (1 << 70) + 30]), "truncated: tensor x ends at byte 11805"),
        (entry(data_offsets=[80, 110]), "truncated: tensor x ends at byte"),
    ],
)
def test_malformed_shards_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_set(tmp_path, [4, 5])
    path = shards.shard_path(tmp_path, 1)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        open_source(tmp_path)
    assert str(raised.value).startswith(f"{path}: ")
    assert len(str(raised.value).splitlines()) == 1


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["index.json", "shard-00000.safetensors"]),
    edits=st.dictionaries(st.integers(0, 500), st.integers(0, 255), max_size=4),
    cut=st.none() | st.integers(0, 700),
)
def test_damaged_sets_raise_nothing_else(
    tmp_path: Path, name: str, edits: dict[int, int], cut: int | None
) -> None:
    write_set(tmp_path / "set", [4, 2], gradients=True)
    path = tmp_path / "set" / name
    damaged = bytearray(path.read_bytes())
    for position, byte in edits.items():
        if position < len(damaged):
            damaged[position] = byte
    path.write_bytes(damaged[:cut])
    try:
        source = open_source(tmp_path / "set", gradients=True)
        source.batch(np.arange(source.n_rows))
    except ValueError as error:
        assert str(tmp_path / "set") in str(error)
        assert len(str(error).splitlines()) == 1


def test_a_shard_cut_short_in_use_is_an_error(tmp_path: Path) -> None:
    write_set(tmp_path, [3, 5000])
    source = open_source(tmp_path)
    path = shards.shard_path(tmp_path, 1)
    end = path.stat().st_size
    os.truncate(path, end - 1)
    with pytest.raises(ValueError, match=f"00001.*: cut short while in use: {end - 1} of {end} by"):
        source.rows(np.array([3]))
    assert len(source.rows(np.array([0, 2]))) == 2


# Reading ahead


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastsae-reader")]


def assert_soon(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within 10 s")


@pytest.mark.parametrize("start", [0, 3, 999])
@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_batches_of_a_file_are_those_of_a_tensor(tmp_path: Path, kind: str, start: int) -> None:
    x = write_set(tmp_path / "set", [400, 1, 599], d=5, gradients=True)
    file: Path = tmp_path / "set"
    if kind == "npy":
        file = save(tmp_path / "x.npy", x.numpy())
    target = open_source(save(tmp_path / "y.npy", x.numpy()[:, :2] + 1))
    in_file = open_source(file, target, gradients=kind == "shards")
    sources = [split(source, 50)[0] for source in (in_file, open_source(x, x[:, :2] + 1))]
    found, expected = (Batches(source, 64, seed=3, start=start) for source in sources)
    for _ in range(35):  # more than two epochs
        a, b = next(found), next(expected)
        assert torch.equal(a.x, b.x) and a.x.dtype == torch.float32
        assert a.target is not None and b.target is not None and torch.equal(a.target, b.target)
        assert a.gradient is None if kind == "npy" else torch.equal(a.gradient, -b.x)
        assert found.rows_seen == expected.rows_seen
    assert reading()
    found.close()
    assert not reading()
    assert torch.equal(next(found).x, next(expected).x)
    found.close()


def test_a_thread_only_reads_what_is_in_a_file_and_asked_for_twice(tmp_path: Path) -> None:
    x = np.ones((100, 3), np.float32)
    held = Batches(open_source(torch.from_numpy(x)), 10)
    batches = Batches(open_source(save(tmp_path / "x.npy", x)), 10)
    next(batches)
    for _ in range(5):
        next(held)
    assert not reading()
    next(batches)
    assert len(reading()) == 1
    del batches
    assert_soon(lambda: not reading())


def test_no_more_is_read_ahead_than_is_said(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "x.npy", np.ones((1000, 3), np.float32)))
    read: list[int] = []

    def gather(numbers: np.ndarray) -> torch.Tensor:
        read.append(len(numbers))
        return source.gather(numbers)

    batches = Batches(replace(source, gather=gather), 10)
    for handed_out in range(1, 6):
        next(batches)
        due = handed_out + _AHEAD if handed_out > 1 else 1
        assert_soon(lambda due=due: len(read) == due)
    batches.close()
    assert read == [10] * (5 + _AHEAD)


def test_what_is_wrong_is_raised_at_its_own_batch(tmp_path: Path) -> None:
    x = np.arange(300, dtype=np.float32).reshape(100, 3)
    path = save(tmp_path / "x.npy", x)
    expected = list(itertools.islice(Batches(open_source(torch.from_numpy(x)), 10), 8))
    bad = int(expected[4].x[3, 0]) // 3
    data = np.lib.format.open_memmap(path, "r+")
    data[bad, 1] = np.nan
    data.flush()
    batches = Batches(open_source(path), 10)
    for batch in expected[:4]:
        assert torch.equal(next(batches).x, batch.x)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"row {bad} holds a NaN"):
            next(batches)
        assert batches.rows_seen == 40 and not reading()
    data[bad, 1] = 3 * bad + 1
    data.flush()
    for batch in expected[4:]:
        assert torch.equal(next(batches).x, batch.x)


@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_a_file_cut_short_while_it_is_read_ahead(tmp_path: Path, kind: str) -> None:
    """A map would end the process here, in the thread and in the middle of a batch alike."""
    x = write_set(tmp_path / "set", [4000], d=64)
    file = tmp_path / "set" / "shard-00000.safetensors"
    source = open_source(tmp_path / "set")
    if kind == "npy":
        file = save(tmp_path / "x.npy", x.numpy())
        source = open_source(file)
    batches = Batches(source, 100)
    next(batches)
    next(batches)
    os.truncate(file, 8192)
    with pytest.raises(
        ValueError, match=rf"{file}: cut short while in use: 8192 of \d+ bytes left"
    ):
        for _ in range(2 + _AHEAD):
            next(batches)
    assert 200 <= batches.rows_seen <= 200 + 100 * _AHEAD
    assert not reading()


def test_reads_that_come_in_parts_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(3000, 3)).astype(np.float32)
    source = open_source(save(tmp_path / "x.npy", x))
    index = np.concatenate([np.arange(100, 2500), [7, 7, 2999, 0]])
    preadv = os.preadv

    def seven_bytes(descriptor: int, views: list[memoryview], start: int) -> int:
        return preadv(descriptor, [views[0][:7]], start)

    monkeypatch.setattr(os, "preadv", seven_bytes)
    assert np.array_equal(source.rows(index).numpy(), x[index])

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(ValueError, match=r"x.npy: cannot be read: Input/output error"):
        source.rows(index)
    with pytest.raises(ValueError, match=r"x.npy: cannot be read: Input/output error"):
        open_source(tmp_path / "x.npy")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)  # it ends, after its size was asked for
    with pytest.raises(ValueError, match="cut short while in use"):
        source.rows(index)


# Shuffled by blocks


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.order.POOL_ROWS", 64)


@pytest.mark.parametrize("n_rows", [1, 2, 63, 64, 65, 200, 1003])
@pytest.mark.parametrize("block", [2, 7, 64])
def test_every_epoch_of_blocks_has_every_row_once(
    small_pools: None, n_rows: int, block: int
) -> None:
    order, position, whole = Order(n_rows, 5, block), 0, []
    for epoch in range(3):
        found: list[int] = []
        while len(found) < n_rows:
            pool = order.pool(position)
            assert pool.first == position and 0 < len(pool.rows) <= 64
            inside = {Order(n_rows, 5, block).pool(p).first for p in range(position, pool.end)}
            assert inside == {position}
            blocks = {int(row) // block for row in pool.rows}
            together = [row for b in blocks for row in range(b * block, (b + 1) * block)]
            assert sorted(pool.rows) == [row for row in sorted(together) if row < n_rows]
            found += pool.rows.tolist()
            position = pool.end
        assert sorted(found) == list(range(n_rows)) and position == (epoch + 1) * n_rows
        whole.append(found)
    assert n_rows < 60 or whole[0] != whole[1] != whole[2] != sorted(whole[2])


def test_rows_of_a_block_are_far_apart_in_a_large_pool() -> None:
    """Of 65,536 rows in blocks of 256, a batch of 2,048 has 8 of each block on average."""
    rows = Order(1 << 20, 0, 256).pool(0).rows
    assert len(rows) == 65536
    counts = np.bincount(np.unique(rows // 256, return_inverse=True)[1][:2048])
    assert len(counts) == 256 and 5 < counts.var() < 11  # the hypergeometric one: 7.7


def test_order_of_blocks_is_pinned(small_pools: None) -> None:
    assert Order(20, 0, 4).pool(0).rows.tolist() == PINNED_BLOCKS
    assert Order(200, 3, 16).pool(230).rows[:8].tolist() == PINNED_POOL


@pytest.mark.parametrize("start", [0, 3, 63, 64, 999])
@pytest.mark.parametrize("block", [5, 32])
@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_blocks_of_a_file_are_those_of_a_tensor(
    small_pools: None, tmp_path: Path, kind: str, block: int, start: int
) -> None:
    x = write_set(tmp_path / "set", [400, 1, 599], d=5, gradients=True)
    file: Path = tmp_path / "set"
    if kind == "npy":
        file = save(tmp_path / "x.npy", x.numpy())
    target = open_source(save(tmp_path / "y.npy", x.numpy()[:, :2] + 1))
    in_file = open_source(file, target, gradients=kind == "shards")
    sources = [split(source, 50)[0] for source in (in_file, open_source(x, x[:, :2] + 1))]
    found, expected = (Batches(s, 48, 3, start, block=block) for s in sources)
    parts = [Batches(sources[0], 48, 3, start, (i, 3), block) for i in range(3)]
    for _ in range(45):  # more than two epochs
        a, b = next(found), next(expected)
        assert torch.equal(a.x, b.x) and a.x.dtype == torch.float32
        assert a.target is not None and b.target is not None and torch.equal(a.target, b.target)
        assert a.gradient is None if kind == "npy" else torch.equal(a.gradient, -b.x)
        assert torch.equal(torch.cat([next(part).x for part in parts]), b.x)
    found.close()
    assert torch.equal(next(found).x, next(expected).x)
    for batches in (found, *parts):
        batches.close()
    assert not reading()


def test_each_row_of_a_pool_is_read_once_and_a_share_with_each_batch(
    small_pools: None, tmp_path: Path
) -> None:
    source = open_source(save(tmp_path / "x.npy", np.ones((640, 3), np.float32)))
    read: list[list[int]] = []

    def gather(numbers: np.ndarray) -> torch.Tensor:
        read.append(numbers.tolist())
        return source.gather(numbers)

    batches = Batches(replace(source, gather=gather), 8, block=16)
    for _ in range(80 - _AHEAD):
        next(batches)
    batches.close()
    rows = [row for piece in read for row in piece]
    assert sorted(rows[:640]) == list(range(640))
    assert all(piece == sorted(piece) for piece in read)
    assert len(read[0]) == 64 and {len(piece) for piece in read[2:]} == {8}


def test_what_is_wrong_in_a_block_does_not_move_the_position(
    small_pools: None, tmp_path: Path
) -> None:
    x = np.arange(600, dtype=np.float32).reshape(200, 3)
    path = save(tmp_path / "x.npy", x)
    expected = list(itertools.islice(Batches(open_source(torch.from_numpy(x)), 10, block=8), 12))
    bad = int(expected[9].x[3, 0]) // 3
    data = np.lib.format.open_memmap(path, "r+")
    data[bad, 1] = np.nan
    data.flush()
    batches = Batches(open_source(path), 10, block=8)
    for batch in expected[:9]:
        assert torch.equal(next(batches).x, batch.x)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"row {bad} holds a NaN"):
            next(batches)
        assert batches.rows_seen == 90 and not reading()


@pytest.mark.parametrize("block", [0, 65537])
def test_blocks_are_of_one_row_to_those_of_a_pool(block: int) -> None:
    with pytest.raises(ValueError, match=f"expected block >= 1 and < 65537, got {block}"):
        Batches(numbered(10), 4, block=block)


FORKED = """
import os, sys
from fastsae.batches import Batches
from fastsae.data import open_source

batches = Batches(open_source(sys.argv[1]), 8)
for _ in range(3):
    next(batches)
child = os.fork()
rows = [next(batches).x[:, 0].tolist() for _ in range(4)]
if child == 0:
    os.write(1, f"{rows}\\n".encode())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
os.write(1, f"{rows}\\n".encode())
# Here the thread is alive, with batches that nobody asks for: the interpreter ends all the same.
"""


def test_a_fork_reads_on_by_itself_and_the_interpreter_ends(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", np.arange(100, dtype=np.float32)[:, None])
    child = subprocess.run(
        [sys.executable, "-c", FORKED, path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    expected = draw(open_source(path), 8, 4, start=24)
    rows = [expected[i : i + 8] for i in range(0, 32, 8)]
    assert [json.loads(line) for line in child.stdout.splitlines()] == [rows, rows], child.stderr


# Rows that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_are_named_by_file_and_row(tmp_path: Path, bad: float) -> None:
    x = np.ones((100, 5), dtype=np.float16)
    x[41, 3] = x[77, 0] = bad
    path = save(tmp_path / "x.npy", x)
    source = open_source(path)
    assert torch.equal(source.rows(np.arange(41)), torch.ones(41, 5))
    with pytest.raises(ValueError) as raised:
        source.rows(np.array([77, 5, 41]))
    assert str(raised.value) == (
        f"{path}: row 41 holds a NaN, an infinity or a value too large for float32 "
        "(2 such rows among the 3 just read)"
    )


def test_float64_beyond_float32_is_refused() -> None:
    x = torch.full((3, 2), 3e38, dtype=torch.float64)
    assert torch.isfinite(open_source(x).rows(np.arange(3))).all()
    x[1, 1] = 1e39
    with pytest.raises(ValueError, match=r"tensor: row 1 holds .* too large for float32"):
        open_source(x).rows(np.arange(3))


def test_bad_row_is_numbered_as_in_the_file_when_read_through_a_split() -> None:
    source = numbered(100)
    train, _ = split(source, 50)
    assert train.index is not None
    row = int(train.index[20])
    assert row != 20
    x = torch.zeros(100, 2)
    x[row] = float("nan")
    with pytest.raises(ValueError, match=rf"tensor: row {row} holds"):
        list(in_order(split(open_source(x), 50)[0], 7))


def test_bad_target_row_is_refused() -> None:
    target = torch.zeros(10, 3)
    target[6] = float("inf")
    with pytest.raises(ValueError, match="row 6 holds"):
        open_source(torch.zeros(10, 2), target=target).batch(np.arange(10))


# The embedded samples


@pytest.mark.parametrize(
    ("name", "shape", "model"),
    [
        ("minilm_l3", (20480, 384), "sentence-transformers/all-MiniLM-L6-v2"),
        ("smollm2_l11", (12288, 576), "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_samples(name: str, shape: tuple[int, int], model: str) -> None:
    sample = load_sample(name)
    assert tuple(sample.x.shape) == shape
    assert sample.x.dtype == torch.float32
    assert sample.ctx.shape == (shape[0], 17)
    assert sample.ctx.dtype == np.uint16
    assert sample.meta["model"].startswith(model)
    assert sample.meta["model_licence"] == "Apache-2.0"
    with np.load(ROOT / "fastsae" / "samples" / f"{name}.npz") as archive:
        exact = archive["q"].astype(np.float64) * archive["scale"] + archive["mean"]
    np.testing.assert_allclose(sample.x.numpy(), exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    source = open_source(f"sample:{name}")
    assert torch.equal(source.rows(np.array([0, 9999])), sample.x[[0, 9999]])


@pytest.mark.parametrize("name", ["nothing", "", "../samples/minilm_l3", "minilm_l3.npz"])
def test_unknown_sample_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=rf"samples {', '.join(SAMPLES)}, got '{name}'"):
        open_source(f"sample:{name}")
