"""Activation sources: shuffled ``[n_tokens, d_in]`` float32 batches from a tensor or a file.

    open_source(spec) ──▶ Source ──split──▶ train, holdout ──▶ Batches (endless, shuffled)
                                                           └─▶ in_order (one pass)

A ``Source`` is rows by number: of files only the rows asked for are read, so they may be larger
than RAM, and ``Batches`` reads them in a thread while the batch before is trained on. Order is
decided apart from storage, in ``fastsae.order``.

Whatever is wrong with the data is raised as ``ValueError`` (its content) or ``TypeError`` (its
type), naming the file and, where there is one, the row.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsae.batches import Batch, Batches
from fastsae.contexts import Contexts, sample_contexts, set_contexts
from fastsae.files import RowFile
from fastsae.order import HOLDOUT, RowIndex, in_range, permutation
from fastsae.shards import ActivationSet
from fastsae.sums import unit_rows
from fastsae.tensors import read_tensors

SAMPLES = ("minilm_l3", "smollm2_l11")
_SAMPLE_DIR = Path(__file__).with_name("samples")

_TENSOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NPY_DTYPES = (np.float16, np.float32, np.float64)
_NPY_HEADER_BYTES = 16384  # more than the longest header that NumPy itself agrees to read


@dataclass(frozen=True)
class Sample:
    """An embedded sample: see samples/README.md for its origin and licences."""

    name: str
    x: Tensor  # float32 [N, D]
    ctx: npt.NDArray[np.uint16]  # [N, 17]: 8 tokens before, the row's own, 8 after; 65535 pads
    meta: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """``n_rows`` rows of width ``d_in``, perhaps paired with rows of ``target`` and ``gradient``.

    Made by ``open_source``. ``gather`` reads rows of the underlying data by number, in the data's
    own dtype, and ``will_need``, where the data lie in a file, says which will be read next; both
    may be called in another thread. ``index`` holds the numbers of the rows that belong to this
    source (None: all).
    """

    name: str
    n_rows: int
    d_in: int
    gather: Callable[[RowIndex], Tensor]
    index: RowIndex | None = None
    target: Source | None = None
    gradient: Source | None = None  # of width d_in
    will_need: Callable[[RowIndex], None] | None = None
    contexts: Contexts | None = None  # the text around rows of the underlying data

    @property
    def d_out(self) -> int:
        """Width of what is to be reconstructed: the target's, or ``d_in`` where there is none."""
        return self.d_in if self.target is None else self.target.d_in

    def rows(self, index: npt.NDArray[np.integer[Any]]) -> Tensor:
        """Rows ``index`` (1-D, each in [0, n_rows), repeats allowed) → new float32 [len, d_in].

        The result lies where the data lies: on the CPU, or on the device of the tensor.
        ValueError: an index out of range, or a row with a value that is not finite in float32.
        """
        return self._float32(index, self.gather(self._numbers(index)))

    def batch(self, index: npt.NDArray[np.integer[Any]]) -> Batch:
        """Rows ``index`` with their targets and gradients."""
        return self.checked(index, self.stored(index))

    def stored(self, index: npt.NDArray[np.integer[Any]]) -> Batch:
        """What ``batch`` is made of: the data as they lie there, of their own dtypes, unchecked."""
        target = None if self.target is None else self.target.stored(index).x
        gradient = None if self.gradient is None else self.gradient.stored(index).x
        return Batch(self.gather(self._numbers(index)), target, gradient)

    def checked(self, index: npt.NDArray[np.integer[Any]], stored: Batch) -> Batch:
        """The batch of rows ``index``, from what is stored of them."""
        x, target, gradient = stored
        if self.target is not None and target is not None:
            target = self.target._float32(index, target)
        if self.gradient is not None and gradient is not None:
            gradient = self.gradient._float32(index, gradient)
        return Batch(self._float32(index, x), target, gradient)

    def _float32(self, index: npt.NDArray[np.integer[Any]], stored: Tensor) -> Tensor:
        x = stored.to(torch.float32)
        # NumPy's takes a twentieth of the time of torch's, which makes tensors on its way.
        all_finite = np.isfinite(x.numpy()).all() if x.device.type == "cpu" else x.isfinite().all()
        if not all_finite:
            numbers = self._numbers(index)
            bad = numbers[~x.isfinite().all(dim=1).cpu().numpy()]
            raise ValueError(
                f"{self.name}: row {bad.min()} holds a NaN, an infinity or a value too large for "
                f"float32 ({len(bad)} such rows among the {len(numbers)} just read)"
            )
        return x

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others: number, widths and a digest of three of them."""
        rows = np.unique(np.array([0, self.n_rows // 2, self.n_rows - 1]).clip(min=0))
        sample = self.gather(self._numbers(rows[: self.n_rows])).cpu().contiguous()
        digest = hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()
        return {"n_rows": self.n_rows, "d_in": self.d_in, "d_out": self.d_out, "rows": digest[:16]}

    @property
    def in_files(self) -> bool:
        """Whether rows of it have to be read from a file."""
        parts = (self, self.target, self.gradient)
        return any(part is not None and part.will_need is not None for part in parts)

    def prefetch(self, index: npt.NDArray[np.integer[Any]]) -> None:
        """Lets the system read rows ``index`` ahead, where they lie in a file."""
        if self.will_need is not None:
            self.will_need(self._numbers(index))
        for paired in (self.target, self.gradient):
            if paired is not None:
                paired.prefetch(index)

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        block: int = 1,
    ) -> Batches:
        """``Batches`` of this source."""
        return Batches(self, batch_size, seed, start, part, block)

    def select(self, index: npt.NDArray[np.integer[Any]]) -> Source:
        """The source of rows ``index`` only, in that order: no data is read or copied."""
        numbers = self._numbers(index)
        target = None if self.target is None else self.target.select(index)
        gradient = None if self.gradient is None else self.gradient.select(index)
        return replace(self, n_rows=len(numbers), index=numbers, target=target, gradient=gradient)

    def token_ids(self, index: npt.NDArray[np.integer[Any]], reach: int) -> RowIndex:
        """Ids of the tokens around rows ``index`` [m], of ``contexts``: int64 [m, 2·reach + 1]."""
        if self.contexts is None:
            raise ValueError(f"{self.name}: expected data with tokens, got none")
        return self.contexts.ids(self._numbers(index), reach)

    def _numbers(self, index: npt.NDArray[np.integer[Any]]) -> RowIndex:
        """Numbers in the underlying data of rows ``index``, which is checked."""
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise TypeError(f"expected a 1-D integer index, got {index.dtype} {list(index.shape)}")
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.n_rows:
            raise ValueError(
                f"{self.name}: expected row numbers in [0, {self.n_rows}), "
                f"got {index.min()} to {index.max()}"
            )
        numbers = index.astype(np.int64)
        return numbers if self.index is None else self.index[numbers]


def load_sample(name: str) -> Sample:
    """The embedded sample ``name`` (one of ``SAMPLES``), dequantised. ValueError: unknown name."""
    if name not in SAMPLES:
        raise ValueError(f"expected one of the samples {', '.join(SAMPLES)}, got {name!r}")
    with np.load(_SAMPLE_DIR / f"{name}.npz", allow_pickle=False) as archive:
        x = archive["q"] * archive["scale"] + archive["mean"]
        return Sample(name, torch.from_numpy(x), archive["ctx"], json.loads(archive["meta"].item()))


def open_source(
    spec: Tensor | str | os.PathLike[str] | Source,
    target: Tensor | str | os.PathLike[str] | Source | None = None,
    *,
    gradients: bool = False,
) -> Source:
    """Open what ``spec`` names, with the rows of ``target`` as what is to be reconstructed.

    ``spec`` is one of: a tensor [rows, D] (float16, bfloat16, float32, float64; any device); the
    path of a C-order 2-D ``.npy`` file (float16, float32, float64) or of a folder that ``fastsae
    harvest`` wrote, which stay there; ``"sample:NAME"`` with a name of ``SAMPLES``;
    ``"decoder:FOLDER"``, the decoder rows at norm 1 of the SAE saved there; a ``Source``.
    ``gradients`` pairs the rows with those stored in the folder. Values are checked as
    they are read.

    TypeError: another kind of spec or dtype. ValueError: everything else that is wrong with it, a
    missing file included, a target with another number of rows, and gradients where there are none.
    """
    if isinstance(spec, Source):
        source = spec
    elif isinstance(spec, Tensor):
        source = _tensor_source(spec, "tensor")
    elif isinstance(spec, str) and spec.startswith("sample:"):
        sample = load_sample(spec.removeprefix("sample:"))
        contexts = sample_contexts(sample.ctx, _SAMPLE_DIR / f"{sample.name}.vocab.json")
        source = replace(_tensor_source(sample.x, spec), contexts=contexts)
    elif isinstance(spec, str) and spec.startswith("decoder:"):
        source = _tensor_source(_decoder_rows(Path(spec.removeprefix("decoder:"))), spec)
    elif isinstance(spec, str) and spec.startswith("live:"):
        raise ValueError(f"{spec}: expected rows that are stored, got a live model's: harvest them")
    elif isinstance(spec, str | os.PathLike):
        path = Path(spec)
        source = _set_source(path, gradients) if os.path.isdir(path) else _npy_source(path)
    else:
        raise TypeError(
            "expected a tensor, the path of a .npy file, a folder of activations, 'sample:NAME' "
            f"or a Source, got {type(spec).__name__}"
        )
    if gradients and source.gradient is None:
        raise ValueError(f"{source.name}: expected stored gradients, got none")
    if target is None:
        return source
    paired = open_source(target)
    if paired.n_rows != source.n_rows:
        raise ValueError(
            f"expected a target row for each of the {source.n_rows} rows of {source.name}, "
            f"got {paired.n_rows} rows in {paired.name}"
        )
    return replace(source, target=paired)


def _decoder_rows(folder: Path) -> Tensor:
    path = folder / "sae.safetensors"
    tensors = read_tensors(path)
    if "W_dec" not in tensors:
        raise ValueError(f"{path}: expected a tensor W_dec, got none")
    return unit_rows(tensors["W_dec"], f"{path}: W_dec")


def split(source: Source, n_holdout: int, seed: int = 0) -> tuple[Source, Source]:
    """(train, holdout): two views of ``source`` without a row in common, together all of it.

    Which rows are held out depends on ``source.n_rows``, ``n_holdout`` and ``seed`` only; each view
    keeps them in the order of the data. ValueError: n_holdout not in [0, n_rows).
    """
    n_holdout = in_range("n_holdout", n_holdout, 0, source.n_rows)
    order = permutation(source.n_rows, seed, HOLDOUT)
    train, holdout = np.sort(order[n_holdout:]), np.sort(order[:n_holdout])
    return source.select(train), source.select(holdout)


def in_order(source: Source, batch_size: int) -> Iterator[Batch]:
    """One pass over all rows in the order of the source; the last batch may be short."""
    batch_size = in_range("batch_size", batch_size, 1)
    for first in range(0, source.n_rows, batch_size):
        rows = np.arange(first, min(first + batch_size, source.n_rows))
        source.prefetch(rows)
        yield source.batch(rows)


def _tensor_source(x: Tensor, name: str) -> Source:
    if x.dtype not in _TENSOR_DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    n_rows, d_in = _matrix_shape(name, tuple(x.shape))
    x = x.detach()

    def gather(numbers: RowIndex) -> Tensor:
        return x.index_select(0, torch.from_numpy(numbers).to(x.device))

    return Source(name, n_rows, d_in, gather)


def _set_source(path: Path, gradients: bool) -> Source:
    stored = ActivationSet(path)

    def source(name: str, tensor: str) -> Source:
        return Source(
            name,
            stored.n_rows,
            stored.d,
            lambda numbers: stored.gather(tensor, numbers),
            will_need=lambda numbers: stored.will_need(tensor, numbers),
        )

    x = replace(source(str(path), "x"), contexts=set_contexts(stored))
    if not (gradients and stored.index["gradients"]):
        return x
    return replace(x, gradient=source(f"{path}: gradient", "gradient"))


def _npy_source(path: Path) -> Source:
    name = str(path)
    file = RowFile(path)
    shape, fortran_order, dtype, offset = _npy_header(name, file.head(_NPY_HEADER_BYTES))
    native = dtype.newbyteorder("=")
    if native not in _NPY_DTYPES:  # object arrays end here: nothing is ever unpickled
        raise TypeError(f"{name}: expected float16, float32 or float64, got {dtype}")
    n_rows, d_in = _matrix_shape(name, shape)
    if fortran_order:
        raise ValueError(
            f"{name}: expected C order (each row contiguous), got Fortran order; "
            "save it with np.save(path, np.ascontiguousarray(x))"
        )
    row_bytes = d_in * dtype.itemsize
    file.end = offset + n_rows * row_bytes
    if (size := file.size()) < file.end:
        raise ValueError(
            f"{name}: truncated: {n_rows} rows of {d_in} {dtype} need {file.end} bytes, the file "
            f"has {size}; row {(size - offset) // row_bytes} is the first incomplete one"
        )

    def gather(numbers: RowIndex) -> Tensor:
        rows = np.empty((len(numbers), d_in), dtype)
        order = np.argsort(numbers, kind="stable")
        file.rows(offset, numbers[order], order, rows.view(np.uint8))
        return torch.from_numpy(rows.astype(native, copy=False))

    def will_need(numbers: RowIndex) -> None:
        file.will_need(offset, row_bytes, numbers)

    return Source(name, n_rows, d_in, gather, will_need=will_need)


def _npy_header(name: str, start: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, fortran_order, dtype, offset of the data), from the bytes a file starts with."""
    npy: Any = np.lib.format  # for which NumPy ships no types
    # Version 3.0 exists for field names outside latin-1, and a matrix of floats has no fields.
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    head = io.BytesIO(start)
    try:
        version = npy.read_magic(head)
        if version not in readers:
            raise ValueError(f"expected format version 1.0 or 2.0, got {version}")
        shape, fortran_order, dtype = readers[version](head)
        if not all(0 <= length < 1 << 63 for length in shape):
            raise ValueError("the shape is out of range")
    except Exception as error:  # whatever the parsers of literals and dtypes raise on garbage
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{name}: not a readable .npy file: {reason}") from error
    return shape, fortran_order, dtype, head.tell()


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"{name}: expected 2 dimensions [rows, width] of at least 1 each, got {list(shape)}"
        )
    return shape[0], shape[1]
