"""bindings and pool: the extension on its own, with hostile arguments and without torch.

Whatever Python passes, a call either works or raises; it never crashes, and never writes beyond
its outputs. Everything that could crash runs in a process of its own.
"""

import functools
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (
    ISAS,
    VARIANTS,
    assert_bits,
    fixed_order_encode,
    instruction_set,
    isas,
    randn,
    random_codes,
    run_child,
    threads,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastsae import _C, cpu

N, K, D, F, NNZ = 6, 3, 8, 10, 18


@functools.cache
def index() -> tuple[torch.Tensor, ...]:
    return cpu.inverse_index(random_codes(N, K, F)[1], F)


def allocate(nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(nnz), torch.empty(nnz, dtype=torch.int32)


def good_arguments() -> dict[str, dict[str, object]]:
    """Arguments that work, for each function."""
    vals, idx = random_codes(N, K, F)
    vals = vals.nan_to_num()
    ids = torch.arange(0, F, 2, dtype=torch.int32)
    row_ptr = torch.tensor([0, 2, 2, 9, 12, 17, 18])
    flat = {"vals": vals.view(-1), "idx": idx.view(-1), "row_ptr": row_ptr}
    padded = {"vals": vals, "idx": idx, "row_ptr": None}
    weight, bias, wide = randn(F, D), randn(D), randn(N, D)
    latent_ptr, token, entry = index()
    error = {"W_dec": weight, "b_dec": bias, "target": wide, "error": torch.empty(N, D)}
    error["reconstruction"] = torch.empty(N, D)
    segments = [(latent_ptr, token, entry, vals.view(-1), wide)]
    encoding = {"x": wide, "W_enc": weight, "b_enc": randn(F)}
    encoding |= {"screen": "fp32", "rounded": False, "block_tokens": 0}
    rows = {"vals": torch.empty(NNZ), "idx": torch.empty(NNZ, dtype=torch.int32)}
    rows["row_ptr"] = torch.empty(N + 1, dtype=torch.int64)
    calls: dict[str, dict[str, object]] = {
        "encode": {
            **{**encoding, "latents": ids, "scale": None, "absolute": False},
            **{"guide": None, "W_dec": None},
            **{"vals": torch.empty(N, K), "idx": torch.empty(N, K, dtype=torch.int32)},
        },
        "encode-scored": {
            **{**encoding, "latents": ids, "scale": randn(F).abs(), "absolute": True},
            **{"guide": randn(N, 5), "W_dec": randn(F, 5)},
            **{"vals": torch.empty(N, K), "idx": torch.empty(N, K, dtype=torch.int32)},
        },
        "encode_batch": {**encoding, "scale": randn(F).abs(), "absolute": False, **rows},
        "encode_columns": {**encoding, "budgets": torch.ones(F, dtype=torch.int32), **rows},
        "encode_threshold": {
            **{**encoding, "thresholds": randn(F), "limit": 1000, "allocate": allocate},
            "row_ptr": rows["row_ptr"],
        },
        "decode_fwd": {**padded, "W_dec": weight, "b_dec": bias, "out": torch.empty(N, D)},
        "decode_fwd-ragged": {**flat, "W_dec": weight, "b_dec": bias, "out": torch.empty(N, D)},
        "decode_error": {**padded, **error, "dvals": torch.empty(N, K)},
        "decode_error-ragged": {**flat, **error, "dvals": torch.empty(NNZ)},
        "decode_bwd_vals": {
            **{"g": wide, "idx": idx, "row_ptr": None, "W_dec": weight},
            "dvals": torch.empty(N, K),
        },
        "build_index": {
            **{"idx": idx, "row_ptr": None, "n_tokens": N, "latent_ptr": latent_ptr.clone()},
            **{"token": token.clone(), "entry": entry.clone()},
        },
        "build_index-ragged": {
            **{"idx": idx.view(-1), "row_ptr": row_ptr, "n_tokens": N},
            **{"latent_ptr": latent_ptr.clone(), "token": token.clone(), "entry": entry.clone()},
        },
        "row_gradients": {
            **{"latent_ptr": latent_ptr.clone(), "token": token.clone(), "entry": entry.clone()},
            **{"coef": vals.view(-1)},
            **{"src": wide, "rows": torch.empty(F, D), "coef_sums": torch.empty(F)},
        },
        "column_sum": {"m": wide, "coef": randn(N), "out": torch.empty(D)},
        "project_rows": {"grad": wide.clone(), "W_dec": randn(N, D, seed=1)},
        "normalize_rows": {"W_dec": weight.clone()},
        "gradient_square_norm": {
            **{"p": weight, "dense": randn(F, D), "segments": segments, "project": True}
        },
        "adam": {
            **{"p": weight.clone(), "m": randn(F, D), "v": randn(F, D).square()},
            **{"last": torch.zeros(F, dtype=torch.int32), "dense": randn(F, D)},
            **{"segments": segments, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
            **{"weight_decay": 0.0, "scale": 1.0, "step": 3, "first_row": 0},
            **{"lazy": False, "project": True, "normalize": True, "stochastic_rounding": True},
            **{"m_scale": None, "v_scale": None},
        },
    }
    codes = torch.arange(F * D).view(F, D) % 100
    calls["adam-coded"] = {
        **calls["adam"],
        **{"p": weight.bfloat16(), "m": codes.to(torch.int8) - 50, "v": codes.to(torch.uint8)},
        **{"m_scale": torch.ones(F, 1), "v_scale": torch.ones(F, 1)},
    }
    calls = {name: {**args, "threads": 2, "isa": ""} for name, args in calls.items()}
    calls["auction"] = {
        **{"values": randn(N, K).double().clamp(max=4), "columns": idx.clamp(min=0), "step": 0.01},
        **{"partners": torch.empty(N, dtype=torch.int64), "prices": torch.empty(F).double()},
    }
    return calls


def call(name: str, args: dict[str, object]) -> object:
    return getattr(_C, name.partition("-")[0])(**args)


@pytest.mark.parametrize("name", good_arguments())
def test_good_arguments(name):
    call(name, good_arguments()[name])


def none_for_each() -> None:
    """What is optional may be None; all else says so."""
    optional = {"b_enc", "latents", "b_dec", "reconstruction", "rows", "coef_sums", "dense"}
    optional |= {
        "lazy",
        "project",
        "normalize",
        "stochastic_rounding",
    }  # to pybind11, None is false
    for name in good_arguments():
        own = {"dvals"} if name.startswith("decode_error") else set()
        own |= {"coef"} if name == "column_sum" else set()
        own |= {"m_scale", "v_scale"} if name == "adam" else set()
        own |= {"scale", "limit"} if name.startswith("encode") else set()
        own |= {"guide", "W_dec"} if name == "encode" else set()
        own |= set() if name.endswith("ragged") or name.startswith("encode") else {"row_ptr"}
        for argument in good_arguments()[name]:
            args = {**good_arguments()[name], argument: None}
            if argument in optional | own:
                call(name, args)
                continue
            # Without row_ptr the shape of idx is a wrong one; beta1 above 0 needs m; guide W_dec.
            wrong_value = argument == "row_ptr" and name.endswith("ragged")
            wrong_value |= name.startswith("adam") and argument == "m"
            wrong_value |= name == "encode-scored" and argument in ("guide", "W_dec")
            with pytest.raises(ValueError if wrong_value else TypeError):
                call(name, args)


def test_none():
    run_child("from test_bindings import none_for_each; none_for_each()")


# ---- any wrong arguments ----

TENSORS = {
    "as another type": lambda t: t.to(torch.int64 if t.is_floating_point() else torch.float32),
    "as float64": lambda t: t.double(),
    "as bfloat16": lambda t: t.bfloat16(),
    "as int32": lambda t: t.int(),
    "as bool": lambda t: t.bool(),
    "as complex": lambda t: t.to(torch.complex64),
    "as a list": lambda t: t.tolist(),
    "as an array": lambda t: t.numpy(),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "a parameter": lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
    "empty": lambda t: t[:0],
    "of one row": lambda t: t[:1],
    "without its last row": lambda t: t[:-1],
    "one row longer": lambda t: torch.cat([t, t[:1]]),
    "without its last column": lambda t: t[..., :-1],
    "one column wider": lambda t: torch.cat([t, t[..., :1]], -1),
    "without columns": lambda t: t[..., :0],
    "transposed": lambda t: t.t().contiguous().t() if t.ndim == 2 else t.flip(0),
    "of every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "with gaps": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "rows on top of each other": lambda t: t[:1].expand(t.shape) if len(t) else t,
    "overlapping rows": lambda t: t.reshape(-1).as_strided(t.shape, [1] * t.ndim),
    "flat": lambda t: t.reshape(-1),
    "deeper": lambda t: t[None],
    "a number": lambda t: t.reshape(-1)[0] if t.numel() else torch.tensor(0),
    "negative": lambda t: -t - 1,
    "larger": lambda t: t + 5,
    "huge": lambda t: torch.full_like(
        t, torch.iinfo(t.dtype).max if t.dtype.is_signed and not t.is_floating_point() else 3e38
    ),
    "smallest": lambda t: torch.full_like(
        t, torch.iinfo(t.dtype).min if not t.is_floating_point() else -3e38
    ),
    "falling": lambda t: t.flip(0),
    "not a number": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
}
OBJECTS = (None, 0, -1, 1.5, "", "fp32", [], (), {}, object(), torch.Tensor, float("nan"))
NUMBERS = (0, -1, 1, 7, 1024, 1025, 2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, -(2**63), 1.5, "2")


ALLOCATES = (
    lambda nnz: allocate(nnz + 1),
    lambda nnz: allocate(nnz)[::-1],
    lambda nnz: allocate(nnz)[:1],
    lambda nnz: None,
    lambda nnz: 1 // 0,
    lambda: None,
)


def fuzz(seeds: int) -> None:
    """Calls with some arguments replaced; they may raise, and may not crash."""
    allowed = (TypeError, ValueError, IndexError, MemoryError, RuntimeError, ZeroDivisionError)

    @settings(
        max_examples=seeds,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
    )
    @given(st.data())
    def attack(data) -> None:
        calls = good_arguments()
        name = data.draw(st.sampled_from(sorted(calls)))
        args = calls[name]
        for argument in data.draw(st.sets(st.sampled_from(sorted(args)), min_size=1, max_size=3)):
            value = args[argument]
            if argument == "segments" and data.draw(st.booleans()):
                at = data.draw(st.integers(0, 4))
                (parts,) = value
                change = TENSORS[data.draw(st.sampled_from(sorted(TENSORS)))]
                args[argument] = [(*parts[:at], change(parts[at]), *parts[at + 1 :])] * 2
                continue
            if not isinstance(value, torch.Tensor):
                others = ISAS if argument == "isa" else NUMBERS
                others = ALLOCATES if argument == "allocate" else others
                args[argument] = data.draw(st.sampled_from([*others, *OBJECTS]))
                continue
            change = data.draw(st.sampled_from([*TENSORS, "object"]))
            if change == "object":
                args[argument] = data.draw(st.sampled_from(OBJECTS))
            else:
                args[argument] = TENSORS[change](value)
        try:
            call(name, args)
        except allowed as error:
            assert str(error), (name, args)

    attack()


def test_hostile_arguments():
    run_child("from test_bindings import fuzz; fuzz(2000)")


class Pretender:
    """Not a tensor, though it has all that one is asked for."""

    def __init__(self, **wrong: object) -> None:
        self._wrong = wrong

    def __getattr__(self, name: str) -> object:
        t = torch.empty(N, D)
        if name in self._wrong:
            return self._wrong[name]
        return getattr(t, name)


WRONG: tuple[dict[str, object], ...] = (
    {"shape": None},
    {"shape": "ab"},
    {"shape": (2**70, 2)},
    {"shape": ()},
    {"stride": lambda: None},
    {"stride": lambda: ()},
    {"stride": lambda: (1,)},
    {"stride": 3},
    {"dtype": 5},
    {"is_cpu": "no"},
    {"data_ptr": lambda: -1},
    {"data_ptr": lambda: None},
    {"data_ptr": None},
)


def meet_pretenders() -> None:
    for wrong in WRONG:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            _C.column_sum(Pretender(**wrong), None, torch.empty(D), 1)


def test_pretenders():
    run_child("from test_bindings import meet_pretenders; meet_pretenders()")


ENCODERS = ["encode", "encode_batch", "encode_columns", "encode_threshold"]


@pytest.mark.parametrize("name", [*ENCODERS, "decode_fwd", "column_sum", "normalize_rows"])
@pytest.mark.parametrize("isa", ["AVX2", "mmx", "avx2 ", "\0"], ids=repr)
def test_unknown_instruction_sets(name, isa):
    with pytest.raises(ValueError, match="isa: expected one of " + re.escape(", ".join(ISAS))):
        call(name, {**good_arguments()[name], "isa": isa})


def test_allocate():
    args = good_arguments()["encode_threshold"]
    found = _C.encode_threshold(**args)
    assert len(found[0]) == int(args["row_ptr"][-1]) > 0
    assert _C.encode_threshold(**{**args, "limit": len(found[0]) - 1}) is None
    for wrong, error, message in (
        (lambda nnz: allocate(nnz + 1), ValueError, r"vals: expected shape \(\d+\), got"),
        (lambda nnz: allocate(nnz)[::-1], TypeError, "vals: expected dtype float32, got int32"),
        (lambda nnz: allocate(nnz)[:1], ValueError, "allocate: expected it to return vals and idx"),
        (lambda nnz: 1 // 0, ZeroDivisionError, "division"),
        ("allocate", TypeError, "allocate: expected a function, got .*str"),
    ):
        with pytest.raises(error, match=message):
            _C.encode_threshold(**{**args, "allocate": wrong})


# ---- writing ----

ROOM = 64


def inside(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """t in the middle of a larger piece of memory, which holds a pattern."""
    room = torch.full((t.numel() + 2 * ROOM,), 77, dtype=t.dtype)
    return room, room[ROOM : ROOM + t.numel()].view(t.shape).copy_(t)


@isas
@pytest.mark.parametrize("name", good_arguments())
def test_nothing_is_written_beside_the_outputs(name, isa):
    for count in (1, 2):
        args = good_arguments()[name]
        args |= {"isa": isa, "threads": count} if "isa" in args else {}  # auction has one form
        rooms = {}
        for argument, value in args.items():
            if isinstance(value, torch.Tensor):
                rooms[argument], args[argument] = inside(value)
        before = {argument: room.clone() for argument, room in rooms.items()}
        call(name, args)
        for argument, room in rooms.items():
            assert (room[:ROOM] == 77).all()
            assert (room[-ROOM:] == 77).all()
            written = argument in good_outputs(name)
            if not written:
                assert torch.equal(room, before[argument]), argument


def good_outputs(name: str) -> tuple[str, ...]:
    return {
        "encode": ("vals", "idx"),
        "encode_batch": ("vals", "idx", "row_ptr"),
        "encode_columns": ("vals", "idx", "row_ptr"),
        "encode_threshold": ("row_ptr",),
        "decode_fwd": ("out",),
        "decode_error": ("error", "reconstruction", "dvals"),
        "decode_bwd_vals": ("dvals",),
        "build_index": ("latent_ptr", "token", "entry"),
        "auction": ("partners", "prices"),
        "row_gradients": ("rows", "coef_sums"),
        "column_sum": ("out",),
        "project_rows": ("grad",),
        "normalize_rows": ("W_dec",),
        "gradient_square_norm": (),
        "adam": ("p", "m", "v", "m_scale", "v_scale", "last"),
    }[name.partition("-")[0]]


# ---- threads ----


def test_calls_from_several_threads():
    x, W, b = randn(130, 40), randn(500, 40, seed=1), randn(500, seed=2)
    vals, idx = fixed_order_encode(x, W, b, 7)
    expected = cpu.decode_error(vals, idx, W, None, x)
    rows = cpu.row_gradients(vals, idx, x, 500)

    def work(seed: int) -> None:
        for i in range(10):
            forced = {"threads": 1 + (seed + i) % 4}
            got = cpu.encode(x, W, b, 7, forced=forced)
            assert_bits(got[0], vals)
            assert_bits(got[1], idx)
            for one, other in zip(cpu.decode_error(*got, W, None, x), expected, strict=True):
                assert_bits(one, other)
            for one, other in zip(cpu.row_gradients(vals, idx, x, 500), rows, strict=True):
                assert_bits(one, other)

    with threads(2), ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(4)))


# A process without torch: the pool's own threads, on arrays that look like tensors.
WITHOUT_TORCH = """
    import ctypes, importlib.util, itertools, os, signal, sys, threading
    import numpy as np

    spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
    C = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(C)
    given = dict(np.load(sys.argv[2]))
    BF16 = type("Half", (), {"__str__": lambda self: "torch.bfloat16"})()

    class Tensor:
        is_cpu, device = True, "cpu"

        def __init__(self, array):
            self.array, self.shape = array, array.shape
            self.dtype = BF16 if array.dtype == np.uint16 else f"torch.{array.dtype}"

        def data_ptr(self):
            return self.array.ctypes.data

        def stride(self):
            return tuple(s // self.array.itemsize for s in self.array.strides)

    x, W, half, b = (Tensor(given[name]) for name in ("x", "W", "half", "b"))
    n, d, f, k = *given["x"].shape, len(given["W"]), given["vals"].shape[1]
    vals, idx = Tensor(given["vals"]), Tensor(given["idx"])

    def same(**arrays):
        for name, array in arrays.items():
            if array.tobytes() != given[name].tobytes():
                raise SystemExit(f"{name} differs")

    def work(threads, isa=""):
        for weights, v, i in ((W, "vals", "idx"), (half, "half_vals", "half_idx")):
            out = np.full((n, k), np.nan, np.float32), np.full((n, k), 77, np.int32)
            C.encode(x, weights, b, None, None, False, None, None, *map(Tensor, out), "fp32",
                     False, threads, 0, isa)
            same(**{v: out[0], i: out[1]})
        error, dvals = np.empty((n, d), np.float32), np.empty((n, k), np.float32)
        sse = C.decode_error(vals, idx, None, W, None, x, Tensor(error), None, Tensor(dvals),
                             threads, isa)
        same(error=error, dvals=dvals, sse=np.float32(sse))
        index = np.empty(f + 1, np.int64), np.empty(n * k, np.int32), np.empty(n * k, np.int32)
        index = [Tensor(array) for array in index]
        C.build_index(idx, None, n, *index, threads, isa)
        rows, sums = np.empty((f, d), np.float32), np.empty(f, np.float32)
        C.row_gradients(*index, Tensor(given["vals"].reshape(-1)), x, Tensor(rows), Tensor(sums),
                        threads, isa)
        same(latent_ptr=index[0].array, rows=rows, sums=sums)
        columns = np.empty(d, np.float32)
        C.column_sum(x, None, Tensor(columns), threads, isa)
        unit = given["W"].copy()
        C.normalize_rows(Tensor(unit), threads, isa)
        same(columns=columns, unit=unit)

    def alone():
        for isa in C.isas():
            for threads in (1, 2, 3, 64, 2):
                work(threads, isa)

    def in_child():
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a lost thread would leave the child waiting
            try:
                work(3)
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"

    def together():
        failed = []

        def many(seed):
            try:
                for i in range(12):
                    work(1 + (seed + i) % 4)
            except BaseException as error:
                failed.append(error)

        workers = [threading.Thread(target=many, args=(seed,)) for seed in range(4)]
        [t.start() for t in workers]
        [t.join() for t in workers]
        assert not failed, failed

    def forked():
        work(4)
        for _ in range(3):
            in_child()
        work(4)
        stop = threading.Event()

        def background():
            while not stop.is_set():
                work(3)

        worker = threading.Thread(target=background)
        worker.start()
        for _ in range(12):  # at any point of a job
            in_child()
        stop.set()
        worker.join()

    locals()[sys.argv[3]]()
    assert "torch" not in sys.modules
    assert not hasattr(ctypes.CDLL(None), "GOMP_parallel"), "this was not the pool's own threads"
    running = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 2
    assert running > 1
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and what torch's threads make of them."""
    x, W, b = randn(130, 40), randn(300, 40, seed=1), randn(300, seed=2)
    half = W.bfloat16()
    with threads(2):
        vals, idx = cpu.encode(x, W, b, 7)
        half_vals, half_idx = cpu.encode(x, half, b, 7)
        sse, error, _, dvals = cpu.decode_error(vals, idx, W, None, x)
        latent_ptr = cpu.inverse_index(idx, 300)[0]
        rows, sums = cpu.row_gradients(vals, idx, x, 300)
        unit, columns = W.clone(), cpu.column_sum(x)
        cpu.normalize_rows_(unit)
    tensors = {"x": x, "W": W, "b": b, "half": half.view(torch.uint16), "vals": vals, "idx": idx}
    tensors |= {"half_vals": half_vals, "half_idx": half_idx, "sse": sse, "error": error}
    tensors |= {"dvals": dvals, "latent_ptr": latent_ptr, "rows": rows, "sums": sums}
    tensors |= {"unit": unit, "columns": columns}
    path = tmp_path_factory.mktemp("pool") / "results.npz"
    np.savez(path, **{name: t.numpy() for name, t in tensors.items()})
    return path


@pytest.mark.parametrize("how", ["alone", "together", "forked"])
def test_without_torch(how, results):
    run_child(WITHOUT_TORCH, _C.__file__, str(results), how)


def test_instruction_sets_are_of_this_cpu():
    assert ISAS[-1] == "base"
    assert len(set(ISAS)) == len(ISAS)
    order = ["avx512bf16", "avx512", "avx2", "base"]
    assert [isa for isa in order if isa in ISAS] == ISAS
    assert cpu.screen() == ("bf16" if (ISAS[0], "bf16") in VARIANTS else "fp32")
    for isa, count in itertools.product(ISAS, (1, 2)):
        with instruction_set(isa, count):
            assert cpu.column_sum(torch.ones(3, 2)).tolist() == [3, 3]
