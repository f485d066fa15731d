"""ops: gradients for every subset of inputs, on both backends, under torch.compile and autocast."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from common import (
    assert_bits,
    assert_within_eager,
    backends,
    name_of,
    poisoned_empties,
    ragged,
    randn,
    random_codes,
    refusals,
    threads,
    weights,
)
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastsae import cpu, ops, reference
from fastsae.ops import decoding, encoding, gradients

layouts = pytest.mark.parametrize("layout", ["padded", "ragged"])


@pytest.fixture
def poison():
    with poisoned_empties():
        yield


def subsets(*names: str) -> list[tuple[str, ...]]:
    return [s for size in range(len(names) + 1) for s in itertools.combinations(names, size)]


def leaves(tensors: dict[str, Tensor], needed: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_(name in needed) for name, t in tensors.items()}


def encode_inputs(dtype=torch.float32, n: int = 40, f: int = 70, d: int = 33) -> dict[str, Tensor]:
    x, W, b, pre = randn(n, d), randn(f, d, seed=1), randn(f, seed=2), randn(d, seed=3)
    return {"x": x, "W_enc": W.to(dtype), "b_enc": b, "pre_bias": pre}


def codes(layout: str, n: int = 40, k: int = 6, f: int = 70) -> dict[str, Tensor | None]:
    vals, idx = randn(n, k, seed=7), random_codes(n, k, f)[1]
    idx[:, 1] = idx[:, 0]  # twice in a row
    vals[:, 2] = 0
    if layout == "padded":
        return {"vals": vals, "idx": idx, "row_ptr": None}
    return dict(zip(("vals", "idx", "row_ptr"), ragged(vals, idx), strict=True))


def decode_inputs(dtype=torch.float32, f: int = 70, d: int = 33, n: int = 40) -> dict[str, Tensor]:
    W, b, target = randn(f, d, seed=1), randn(d, seed=2), randn(n, d, seed=3)
    return {"W_dec": W.to(dtype), "b_dec": b, "target": target}


# ---- the gradients of the reference are those of its own mathematics ----


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double().requires_grad_() for name, t in tensors.items()}


@pytest.mark.parametrize("bias", [(), ("b_enc",), ("pre_bias",), ("b_enc", "pre_bias")], ids=str)
@pytest.mark.parametrize("latents", [None, torch.tensor([0, 2, 3, 7], dtype=torch.int32)], ids=str)
def test_gradcheck_of_encode(latents, bias):
    inputs = double(encode_inputs(n=4, f=9, d=3))
    inputs = {name: t for name, t in inputs.items() if name in ("x", "W_enc", *bias)}

    def vals(*tensors: Tensor) -> Tensor:
        args = dict(zip(inputs, tensors, strict=True))
        found, idx = ops.encode(**args, k=8, latents=latents, backend="reference")
        assert (idx < 0).any()  # k is larger than what is positive somewhere
        return found

    assert torch.autograd.gradcheck(vals, tuple(inputs.values()))


@layouts
def test_gradcheck_of_decode(layout):
    inputs = decode_inputs(f=9, d=3, n=4)
    del inputs["target"]
    sparse = codes(layout, n=4, k=4, f=9)
    rest = {"idx": sparse["idx"], "row_ptr": sparse["row_ptr"], "backend": "reference"}
    inputs = double({"vals": sparse["vals"], **inputs})
    assert torch.autograd.gradcheck(
        lambda vals, W, b: ops.decode(vals=vals, W_dec=W, b_dec=b, **rest), tuple(inputs.values())
    )
    assert torch.autograd.gradcheck(
        lambda vals, W: ops.decode(vals=vals, W_dec=W, **rest), (inputs["vals"], inputs["W_dec"])
    )


OUTPUTS = [s for s in subsets("sse", "error", "reconstruction") if s]


@layouts
@pytest.mark.parametrize("outputs", OUTPUTS, ids="+".join)
def test_gradcheck_of_reconstruction_error(outputs, layout):
    sparse = codes(layout, n=4, k=4, f=9)
    rest = {"idx": sparse["idx"], "row_ptr": sparse["row_ptr"], "backend": "reference"}
    inputs = double({"vals": sparse["vals"], **decode_inputs(f=9, d=3, n=4)})

    def wanted(vals: Tensor, W: Tensor, b: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        found = ops.reconstruction_error(vals=vals, W_dec=W, b_dec=b, target=target, **rest)
        by_name = dict(zip(("sse", "error", "reconstruction"), found, strict=True))
        return tuple(by_name[name] for name in outputs)

    assert torch.autograd.gradcheck(wanted, tuple(inputs.values()))


def autograd_encode(inputs: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """encode without our gradients: torch differentiates the reference."""
    x, pre = inputs["x"], inputs.get("pre_bias")
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide) if pre is None else x.to(wide) - pre
    W = inputs["W_enc"].to(wide)
    return reference.encode(x, W, inputs.get("b_enc"), k)


def autograd_error(inputs: dict[str, Tensor], idx: Tensor, row_ptr: Tensor | None) -> list[Tensor]:
    W = inputs["W_dec"]
    wide = torch.promote_types(W.dtype, torch.float32)
    x = reference.decode_fwd(inputs["vals"].to(wide), idx, W.to(wide), inputs.get("b_dec"), row_ptr)
    error = x - inputs["target"].to(wide)
    return [error.square().sum(), error, x]


def test_formulas_are_torchs_own_gradients():
    ours, torchs = (double(encode_inputs()) for _ in range(2))
    vals, idx = ops.encode(**ours, k=6, backend="reference")
    expected, expected_idx = autograd_encode(torchs, 6)
    assert torch.equal(vals, expected)
    assert torch.equal(idx, expected_idx)
    dvals = randn(40, 6, seed=9).double()
    vals.backward(dvals)
    expected.backward(dvals)
    for name, t in ours.items():
        assert torch.allclose(t.grad, torchs[name].grad, rtol=1e-12, atol=1e-12), name


# ---- every subset of inputs ----


def check_gradients(
    run: Callable[[dict[str, Tensor]], list[Tensor]],
    eager: Callable[[dict[str, Tensor]], list[Tensor]],
    inputs: dict[str, Tensor],
    needed: tuple[str, ...],
) -> None:
    """Gradients where they are needed, None elsewhere, no worse than eager's in the same dtypes."""
    ours, same = leaves(inputs, needed), leaves(inputs, needed)
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in ours.items()}
    outputs = [(f(t), t) for f, t in ((run, ours), (eager, same), (eager, wide))]
    grads = [randn(*t.shape, seed=20 + i) for i, t in enumerate(outputs[0][0])]
    assert all(t.requires_grad == bool(needed) for t in outputs[0][0])
    for found, _ in outputs:
        pairs = [(t, g.to(t.dtype)) for t, g in zip(found, grads, strict=True) if t.requires_grad]
        if pairs:  # x̂ alone does not depend on the target
            torch.autograd.backward(*zip(*pairs, strict=True))
    for one, near, exact in zip(*(found for found, _ in outputs), strict=True):
        assert_within_eager(one, near, exact)
    for name, t in ours.items():
        if name not in needed:
            assert t.grad is None
            continue
        assert t.grad.dtype == t.dtype
        near, exact = (
            torch.zeros_like(e[name]) if e[name].grad is None else e[name].grad
            for e in (same, wide)
        )
        # Sums of up to 40 terms in another order than eager's.
        assert_within_eager(t.grad, near, exact, rtol=8 * 2.0**-23)


@weights
@pytest.mark.parametrize("needed", subsets("x", "W_enc", "b_enc", "pre_bias"), ids="+".join)
def test_subsets_of_encode(needed, dtype, poison):
    for absent in ((), ("b_enc",), ("pre_bias",), ("b_enc", "pre_bias")):
        if set(absent) & set(needed):
            continue
        inputs = {name: t for name, t in encode_inputs(dtype).items() if name not in absent}
        check_gradients(
            lambda t: [ops.encode(**t, k=6, backend="cpu")[0]],
            lambda t: [autograd_encode(t, 6)[0]],
            inputs,
            needed,
        )


@layouts
@weights
@pytest.mark.parametrize("needed", subsets("vals", "W_dec", "b_dec"), ids="+".join)
def test_subsets_of_decode(needed, dtype, layout, poison):
    sparse = codes(layout)
    rest = {"idx": sparse["idx"], "row_ptr": sparse["row_ptr"]}
    inputs = {"vals": sparse["vals"], **decode_inputs(dtype)}
    del inputs["target"]
    for absent in ("nothing", "b_dec"):
        if absent in needed:
            continue
        check_gradients(
            lambda t: [ops.decode(**t, **rest, backend="cpu")],
            lambda t: [
                reference.decode_fwd(
                    t["vals"], rest["idx"], t["W_dec"], t.get("b_dec"), rest["row_ptr"]
                )
            ],
            {name: t for name, t in inputs.items() if name != absent},
            needed,
        )


@layouts
@weights
@pytest.mark.parametrize("needed", subsets("vals", "W_dec", "b_dec", "target"), ids="+".join)
def test_subsets_of_reconstruction_error(needed, dtype, layout, poison):
    sparse = codes(layout)
    rest = {"idx": sparse["idx"], "row_ptr": sparse["row_ptr"]}
    inputs = {"vals": sparse["vals"], **decode_inputs(dtype)}
    for outputs in OUTPUTS:
        wanted = [("sse", "error", "reconstruction").index(name) for name in outputs]

        def ours(t: dict[str, Tensor], wanted: list[int] = wanted) -> list[Tensor]:
            found = ops.reconstruction_error(**t, **rest, backend="cpu")
            return [found[i] for i in wanted]

        def eager(t: dict[str, Tensor], wanted: list[int] = wanted) -> list[Tensor]:
            found = autograd_error(t, **rest)
            return [found[i] for i in wanted]

        check_gradients(ours, eager, inputs, needed)


@layouts
def test_without_reconstruction(layout):
    sparse = codes(layout)
    results = []
    for reconstruct in (True, False):
        inputs = leaves({"vals": sparse["vals"], **decode_inputs()}, ("vals", "W_dec", "b_dec"))
        rest = {"idx": sparse["idx"], "row_ptr": sparse["row_ptr"]}
        found = ops.reconstruction_error(**inputs, **rest, reconstruct=reconstruct, backend="cpu")
        assert (found[2] is not None) == reconstruct
        (found[0] + found[1].sum()).backward()
        results.append([*found[:2], *(inputs[name].grad for name in ("vals", "W_dec", "b_dec"))])
    for one, other in zip(*results, strict=True):
        assert_bits(one, other)


def test_gradients_of_stored_zeros_and_of_padding():
    sparse, W = codes("padded"), randn(70, 33)
    vals = sparse["vals"].requires_grad_()
    ops.decode(vals, sparse["idx"], W, backend="cpu").sum().backward()
    stored = (sparse["idx"] >= 0) & (vals == 0)
    assert stored.any()
    assert (vals.grad[stored] != 0).all()
    assert (vals.grad[sparse["idx"] < 0] == 0).all()


def test_gradients_at_padding_reach_nothing(poison):
    """What comes back for padded values does not count, whatever it is."""
    inputs = leaves(encode_inputs(), ("x", "W_enc", "b_enc", "pre_bias"))
    with torch.no_grad():
        inputs["b_enc"] -= 20
    vals, idx = ops.encode(**inputs, k=40, backend="cpu")
    assert (idx < 0).any()
    vals.backward(torch.ones_like(vals).masked_fill(idx < 0, float("nan")))
    for t in inputs.values():
        assert t.grad.isfinite().all()


# ---- gradients of any layout ----


def backward_bits(run: Callable[[], Tensor], inputs: dict[str, Tensor], g: Tensor) -> list[Tensor]:
    for t in inputs.values():
        t.grad = None
    run().backward(g)
    return [t.grad for t in inputs.values()]


@backends
@layouts
def test_strides_of_gradients(layout, backend):
    encoder = leaves(encode_inputs(), ("x", "W_enc", "b_enc", "pre_bias"))
    sparse = codes(layout)
    decoder = leaves({"vals": sparse["vals"], **decode_inputs()}, ("vals", "W_dec", "b_dec"))
    del decoder["target"]
    rest = {"idx": sparse["idx"], "row_ptr": sparse["row_ptr"], "backend": backend}
    for run, inputs, width in (
        (lambda: ops.encode(**encoder, k=6, backend=backend)[0], encoder, 6),
        (lambda: ops.decode(**decoder, **rest), decoder, 33),
    ):
        g = randn(40, width, seed=8)
        expected = backward_bits(run, inputs, g)
        wide = torch.full((80, 99), float("nan"))[::2, 5 : 5 + width].copy_(g)
        for other in (g.t().contiguous().t(), wide, g.repeat(1, 2).view(40, 2, width)[:, 0]):
            for one, exact in zip(backward_bits(run, inputs, other), expected, strict=True):
                assert_bits(one, exact)
        for narrow in ((1, 1), (40, 1), (1, width)):  # (1, 1) as .sum() sends it back
            g = randn(*narrow, seed=8).expand(40, width)
            expected = backward_bits(run, inputs, g.contiguous())
            for one, exact in zip(backward_bits(run, inputs, g), expected, strict=True):
                assert_bits(one, exact)


@backends
def test_gradients_of_sums(backend):
    """.sum() sends back one number with strides of 0, to each of the outputs."""
    sparse = codes("padded")
    inputs = leaves(
        {"vals": sparse["vals"], **decode_inputs()}, ("vals", "W_dec", "b_dec", "target")
    )
    found = ops.reconstruction_error(**inputs, idx=sparse["idx"], backend=backend)
    (found[1].sum() + 3 * found[2].sum()).backward()
    assert torch.equal(inputs["b_dec"].grad, torch.full((33,), 160.0))
    assert torch.equal(inputs["target"].grad, torch.full((40, 33), -1.0))
    at = sparse["idx"].clamp(min=0).long()
    dvals = 4 * inputs["W_dec"].detach().sum(1)[at].where(sparse["idx"] >= 0, 0)
    assert torch.allclose(inputs["vals"].grad, dvals, rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_strides_of_inputs(layout, backend):
    x, target = randn(40, 33), randn(40, 33, seed=5)
    if layout == "expanded":
        x, target = x[:1].repeat(40, 1), target[:1].repeat(40, 1)
    change = {
        "transposed": lambda t: t.t().contiguous().t(),
        "strided": lambda t: torch.full((80, 40), float("nan"))[::2, 3:36].copy_(t),
        "expanded": lambda t: t[:1].expand(40, 33),
    }[layout]
    results = []
    for one, other in ((x, target), (change(x), change(target))):
        inputs = leaves(encode_inputs(), ("W_enc", "b_enc"))
        decoder = leaves(decode_inputs(), ("W_dec", "b_dec"))
        inputs["x"], decoder["target"] = one.detach().requires_grad_(), other
        for absent in ("pre_bias", None):
            args = {name: t for name, t in inputs.items() if name != absent}
            vals, idx = ops.encode(**args, k=6, backend=backend)
            # vals and idx as a view into something wider
            vals, idx = torch.cat([vals, vals], 1)[:, 3:9], torch.cat([idx, idx], 1)[:, 3:9]
            ops.reconstruction_error(vals, idx, **decoder, backend=backend)[0].backward()
        grads = [t.grad for t in (*inputs.values(), *decoder.values()) if t.grad is not None]
        assert len(grads) == 5
        results.append([vals, idx, *grads])
    for one, other in zip(*results, strict=True):
        assert_bits(one, other)


# ---- what is not differentiable ----


@backends
def test_second_backward_says_so(backend):
    inputs = leaves(encode_inputs(), ("x", "W_enc"))
    sparse = codes("padded")
    decoder = leaves({"vals": sparse["vals"], **decode_inputs()}, ("vals", "W_dec"))
    target = decoder.pop("target")
    idx = sparse["idx"]
    for run, t in (
        (lambda: ops.encode(**inputs, k=6, backend=backend)[0], inputs["x"]),
        (lambda: ops.decode(**decoder, idx=idx, backend=backend), decoder["vals"]),
        (
            lambda: ops.reconstruction_error(**decoder, idx=idx, target=target, backend=backend)[0],
            decoder["vals"],
        ),
    ):
        (grad,) = torch.autograd.grad(run().square().sum(), t, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


@backends
def test_indices_are_not_differentiable(backend):
    inputs = leaves(encode_inputs(), ("x", "W_enc", "b_enc", "pre_bias"))
    vals, idx = ops.encode(**inputs, k=6, backend=backend)
    assert vals.requires_grad
    assert not idx.requires_grad
    assert idx.dtype == torch.int32


@backends
def test_autograd_notices_changed_weights(backend):
    for name in ("x", "W_enc"):
        inputs = leaves(encode_inputs(), ("x", "W_enc"))
        del inputs["pre_bias"]
        vals, _ = ops.encode(**inputs, k=6, backend=backend)
        with torch.no_grad():
            inputs[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            vals.sum().backward()


# ---- torch.compile, custom ops, autocast ----


def whole_step(x, W_enc, b_enc, W_dec, b_dec, backend):
    vals, idx = ops.encode(x, W_enc, b_enc, b_dec, k=6, backend=backend)
    sse, error, xhat = ops.reconstruction_error(vals, idx, W_dec, b_dec, x, backend=backend)
    # 3·vals, so that the two gradients of vals differ
    return idx, sse, error, xhat, ops.decode(3 * vals, idx, W_dec, b_dec, backend=backend)


def step_bits(step: Callable, dtype=torch.float32, backend: str = "cpu") -> list[Tensor]:
    inputs = [randn(40, 33), randn(70, 33, seed=1), randn(70, seed=2)]
    inputs += [randn(70, 33, seed=3), randn(33, seed=4)]
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    idx, *outputs = step(*inputs, backend)
    grads = [randn(*t.shape, seed=i).to(t.dtype) for i, t in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    return [idx, *outputs, *(t.grad for t in inputs)]


@pytest.mark.parametrize(
    ("compiler", "dtype"),
    [("aot_eager", torch.float32), ("aot_eager", torch.bfloat16), ("inductor", torch.float32)],
)
def test_compiled_step_has_the_same_bits(compiler, dtype):
    torch.compiler.reset()
    compiled = torch.compile(whole_step, fullgraph=True, backend=compiler)
    expected = step_bits(whole_step, dtype)
    for one, other in zip(step_bits(compiled, dtype), expected, strict=True):
        assert_bits(one, other)


@weights
def test_threads_do_not_change_a_bit_of_a_step(dtype, poison):
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(step_bits(whole_step, dtype))
    for other in results[1:]:
        for one, exact in zip(other, results[0], strict=True):
            assert_bits(one, exact)


@functools.cache
def custom_op_calls() -> dict[str, tuple]:
    x, W, b = randn(9, 8), randn(14, 8, seed=1), randn(14, seed=2)
    latents = torch.tensor([1, 4, 5, 9], dtype=torch.int32)
    vals, idx = random_codes(9, 3, 14)
    vals = vals.nan_to_num()
    flat, flat_idx, row_ptr = ragged(vals, idx)
    bias, g = randn(8, seed=3), randn(9, 8, seed=4)
    h = torch.bfloat16
    fp32 = torch.float32
    calls = {
        "encode": [
            (x, W, b, 3, None, None, False, None, None, "screened"),
            (x, W, None, 5, latents, None, False, None, None, "bf16"),
            (x, W.to(h), b.to(h), 0, None, None, False, None, None, "fp32"),
            (x[:0], W, b, 3, None, None, False, None, None, "screened"),
            (x, W, b, 3, None, b.abs(), True, x, W, "screened"),
        ],
        "encode_groups": [(x, W, b, 7, "screened"), (x[:0], W.to(h), None, 2, "bf16")],
        "encode_batch": [
            (x, W, b, 20, None, False, "screened"),
            (x, W.to(h), None, 1000, b.abs(), True, "bf16"),
            (x[:0], W, b, 20, None, False, "fp32"),
        ],
        "encode_columns": [
            (x, W, b, torch.full((14,), 2, dtype=torch.int32), 30, "screened"),
            (x, W.to(h), None, torch.arange(14, dtype=torch.int32), 100, "bf16"),
        ],
        "encode_threshold": [
            (x, W, b, b, None, "screened"),
            (x, W.to(h), None, b.abs() + 100, 5, "bf16"),
        ],
        "decode": [
            (vals, idx, W, bias, None, fp32),
            (flat, flat_idx, W.to(h), None, row_ptr, h),
            (vals, idx, W.to(h), bias, None, fp32),
        ],
        "decode_bwd_vals": [(g, idx, W, None), (g.to(h), flat_idx, W.to(h), row_ptr)],
        "decode_error": [
            (vals, idx, W, bias, g, None, True),
            (flat, flat_idx, W.to(h), None, g.to(h), row_ptr, False),
        ],
        "row_gradients": [
            (vals, idx, g, 14, None, fp32, True),
            (flat, flat_idx, g.to(h), 14, row_ptr, h, True),
            (vals, idx, g, 14, None, fp32, False),
        ],
        "column_sum": [(g, None), (g.to(h), vals[:, 0].contiguous())],
    }
    return {f"{op}-{i}": (op, c) for op, list_ in calls.items() for i, c in enumerate(list_)}


@backends
@pytest.mark.parametrize("name", custom_op_calls())
def test_custom_ops(name, backend):
    op, args = custom_op_calls()[name]
    op = getattr(torch.ops.fastsae, op).default
    torch.library.opcheck(op, (*args, backend))
    real = op(*args, backend)
    shapes = ShapeEnv()  # nnz of encode_threshold is unknown
    with torch._subclasses.FakeTensorMode(shape_env=shapes) as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), backend)
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for one, other in pairs:
        assert (one.dtype, one.ndim, one.stride()) == (other.dtype, other.ndim, other.stride())
        for size, faked in zip(one.shape, other.shape, strict=True):
            assert (op._opname == "encode_threshold" and one.ndim == 1) or size == faked


def test_all_custom_ops_are_checked():
    modules = (encoding, decoding, gradients)
    registered = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, torch.library.CustomOpDef)
    }
    assert registered == {f"{op}_op" for op, _ in custom_op_calls().values()}


@backends
def test_autocast_changes_nothing(backend):
    expected = step_bits(whole_step, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one, other in zip(step_bits(whole_step, backend=backend), expected, strict=True):
            assert_bits(one, other)


@backends
def test_inference_mode(backend):
    inputs, decoder = encode_inputs(), decode_inputs()
    vals, idx = ops.encode(**inputs, k=6, backend=backend)
    found = ops.reconstruction_error(vals, idx, **decoder, backend=backend)
    with torch.inference_mode():
        again = ops.encode(**inputs, k=6, backend=backend)
        assert_bits(again[0], vals)
        assert_bits(again[1], idx)
        again = ops.reconstruction_error(*again, **decoder, backend=backend)
        for one, other in zip(again, found, strict=True):
            assert_bits(one, other)


# ---- dtypes ----


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("of_W", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("of_b", [torch.float32, torch.bfloat16], ids=name_of)
@backends
def test_dtypes(of_x, of_W, of_b, backend):
    x, W, b = randn(40, 33).to(of_x), randn(70, 33, seed=1).to(of_W), randn(70, seed=2).to(of_b)
    pre, W_dec, b_dec = randn(33).to(of_b), randn(70, 33, seed=3).to(of_W), randn(33).to(of_b)
    tensors = [t.requires_grad_() for t in (x, W, b, pre, W_dec, b_dec)]
    vals, idx = ops.encode(x, W, b, pre, k=6, backend=backend)
    assert vals.dtype == torch.float32
    sse, error, xhat = ops.reconstruction_error(vals, idx, W_dec, b_dec, x, backend=backend)
    assert {sse.dtype, error.dtype, xhat.dtype} == {torch.float32}
    decoded = ops.decode(vals, idx, W_dec, b_dec, backend=backend)
    assert decoded.dtype == of_W
    (sse + decoded.float().square().sum()).backward()
    assert [t.grad.dtype for t in tensors] == [of_x, of_W, of_b, of_b, of_W, of_b]


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_vals_of_any_dtype(dtype, backend):
    sparse, W = codes("padded"), randn(70, 33)
    vals = sparse["vals"].to(dtype).requires_grad_()
    decoded = ops.decode(vals, sparse["idx"], W, backend=backend)
    same = ops.decode(vals.detach().float(), sparse["idx"], W, backend=backend)
    assert_bits(decoded, same)
    decoded.sum().backward()
    assert vals.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=name_of)
def test_other_dtypes_take_the_reference(dtype):
    inputs = {name: t.to(dtype) for name, t in encode_inputs().items()}
    wide = torch.promote_types(dtype, torch.float32)
    vals, idx = ops.encode(**inputs, k=6)
    assert vals.dtype == wide
    W, b = randn(70, 33).to(dtype), randn(33).to(dtype)
    assert ops.decode(vals, idx, W, b).dtype == dtype
    found = ops.reconstruction_error(vals, idx, W, b, inputs["x"])
    assert {t.dtype for t in found} == {wide}
    assert ops.choose_backend(W) == "reference"
    assert ops.choose_backend(W.float()) == "cpu"


def test_double_tokens_keep_their_precision():
    """float64 tokens with float32 weights: neither h nor dx may pass through float32."""
    inputs = encode_inputs()
    x = inputs.pop("x").double().requires_grad_()
    vals, idx = ops.encode(x, **inputs, k=6)
    assert vals.dtype == torch.float64
    vals.sum().backward()
    rows = inputs["W_enc"].double()[idx.clamp(min=0).long()]
    exact = rows.where((idx >= 0)[..., None], 0).sum(1)
    assert (x.grad - exact).abs().max() < 1e-13


# ---- sizes ----


@backends
@pytest.mark.parametrize(("n", "k"), [(0, 6), (5, 0), (1, 1), (5, 70), (5, 75)])
def test_sizes(n, k, backend, poison):
    inputs = leaves(encode_inputs(n=n), ("x", "W_enc", "b_enc", "pre_bias"))
    decoder = leaves(decode_inputs(n=n), ("W_dec", "b_dec", "target"))
    vals, idx = ops.encode(**inputs, k=k, backend=backend)
    assert vals.shape == idx.shape == (n, k)
    decoded = ops.decode(vals, idx, decoder["W_dec"], decoder["b_dec"], backend=backend)
    sse, error, xhat = ops.reconstruction_error(vals, idx, **decoder, backend=backend)
    assert decoded.shape == error.shape == xhat.shape == (n, 33)
    (sse + decoded.sum()).backward()
    for t in (*inputs.values(), *decoder.values()):
        assert t.grad.shape == t.shape
        assert t.grad.isfinite().all()
    if not n:
        assert sse == 0
        assert all((t.grad == 0).all() for t in (*inputs.values(), *decoder.values()))


@backends
def test_no_pairs_at_all(backend):
    empty = torch.empty(0)
    idx, row_ptr = torch.empty(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    decoder = leaves(decode_inputs(n=3), ("W_dec", "b_dec"))
    target = decoder.pop("target")
    args = {"row_ptr": row_ptr, "backend": backend, **decoder}
    assert torch.equal(ops.decode(empty, idx, **args), decoder["b_dec"].expand(3, -1))
    sse, _, _ = ops.reconstruction_error(empty, idx, target=target, **args)
    sse.backward()
    assert (decoder["W_dec"].grad == 0).all()


# ---- the operations on rows ----


@backends
@weights
def test_operations_on_rows(dtype, backend):
    W, g = randn(40, 50).to(dtype), randn(40, 50, seed=1).to(dtype)
    total = ops.column_sum(g, backend=backend)
    assert total.dtype == torch.float32
    assert torch.allclose(total.double(), g.double().sum(0), atol=1e-4)
    ops.project_rows_(g, W, backend=backend)
    ops.normalize_rows_(W, backend=backend)
    eps = torch.finfo(dtype).eps
    assert ((W.double().norm(dim=1) - 1).abs() < 4 * eps).all()
    assert ((g.double() * W.double()).sum(1).abs() < 50 * eps).all()


# ---- what is refused ----


def call(op: str, **changes: object) -> object:
    args: dict[str, object]
    if op == "encode":
        args = {**encode_inputs(), "k": 6}
    else:
        sparse = codes("padded")
        args = {"vals": sparse["vals"], "idx": sparse["idx"], **decode_inputs()}
        if op == "decode":
            del args["target"]
    return getattr(ops, op)(**{**args, **changes})


@refusals(
    "op, changes, error, message",
    [
        ("encode", {"x": randn(33)}, ValueError, r"x: expected shape \(\*, \*\), got \(33,\)"),
        ("encode", {"x": randn(2, 4, 33)}, ValueError, r"x: expected shape .* \(2, 4, 33\)"),
        ("encode", {"x": randn(40, 32)}, ValueError, r"W_enc: expected shape \(\*, 32\)"),
        ("encode", {"x": torch.ones(40, 33).int()}, TypeError, "x: expected a floating dtype"),
        ("encode", {"W_enc": randn(33)}, ValueError, "W_enc: expected shape"),
        ("encode", {"b_enc": randn(69)}, ValueError, r"b_enc: expected shape \(70\), got \(69,\)"),
        ("encode", {"pre_bias": randn(34)}, ValueError, r"pre_bias: expected shape \(33\)"),
        ("encode", {"k": -1}, ValueError, "k: expected at least 0, got -1"),
        ("decode", {"idx": torch.zeros(40, 6).long()}, TypeError, "idx: expected torch.int32"),
        ("decode", {"idx": torch.zeros(240).int()}, ValueError, r"idx: expected \(N, K\), or"),
        ("decode", {"vals": randn(40, 5)}, ValueError, r"vals: expected shape \(40, 6\)"),
        ("decode", {"vals": torch.ones(40, 6).int()}, TypeError, "vals: expected a floating"),
        ("decode", {"W_dec": randn(70)}, ValueError, r"W_dec: expected shape \(\*, \*\)"),
        ("decode", {"b_dec": randn(70)}, ValueError, r"b_dec: expected shape \(33\)"),
        ("decode", {"row_ptr": torch.tensor([0, 240])}, ValueError, "idx: expected .* row_ptr"),
        ("reconstruction_error", {"target": randn(39, 33)}, ValueError, r"target: .*\(40, 33\)"),
        ("reconstruction_error", {"target": randn(40, 32)}, ValueError, r"target: .*\(40, 33\)"),
        ("reconstruction_error", {"vals": randn(6, 40)}, ValueError, r"vals: .*\(40, 6\)"),
    ],
)
@backends
def test_says_what_is_wrong(op, changes, error, message, backend):
    with pytest.raises(error, match=message):
        call(op, **changes, backend=backend)


@backends
@pytest.mark.parametrize("op", ["decode", "reconstruction_error"])
def test_ids_beyond_the_latents(op, backend):
    idx = codes("padded")["idx"]
    idx[7, 3] = 70
    with pytest.raises(IndexError):
        call(op, idx=idx, backend=backend)


@pytest.mark.parametrize("op", ["encode", "decode", "reconstruction_error"])
def test_backends_that_cannot(op):
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, got 'c"):
        call(op, backend="cuda")
    name = "W_enc" if op == "encode" else "W_dec"
    for W in (randn(70, 33).double(), randn(70, 33).half()):
        with pytest.raises(TypeError, match=f"'cpu': expected float32 or .*{W.dtype} on cpu"):
            call(op, **{name: W}, backend="cpu")
    with pytest.raises(TypeError, match=r"'cpu': expected float32 or bfloat16 .* on meta"):
        call(op, **{name: randn(70, 33).to("meta")}, backend="cpu")


def test_triton_without_a_kernel(monkeypatch):
    monkeypatch.delattr("fastsae.kernels.encode.encode")
    with pytest.raises(NotImplementedError, match="backend 'triton' has no encode"):
        call("encode", backend="triton")


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(cpu, "_C", None)
    assert ops.choose_backend(randn(3)) == "reference"
    assert call("encode")[0].shape == (40, 6)
    with pytest.raises(RuntimeError, match=r"backend 'cpu': fastsae._C is not built"):
        call("encode", backend="cpu")


NNZ = 7
PAIRS = torch.tensor([0, 1, 2, 3, 4, -1, 9], dtype=torch.int32)
ROWS = torch.tensor([0, 2, 4, NNZ])


def changed(t: Tensor, at: int, value: int) -> Tensor:
    t = t.clone()
    t[at] = value
    return t


@refusals(
    "changes, error, message",
    [
        *(
            ({"idx": changed(PAIRS, 2, bad)}, IndexError, rf"idx: .*\[-1, 10\), got {bad} at .* 2$")
            for bad in (-2, -(2**31), 10, 2**31 - 1)
        ),
        ({"row_ptr": changed(ROWS, 0, 1)}, ValueError, "row_ptr: .* from 0 to nnz = 7"),
        ({"row_ptr": changed(ROWS, 0, -1)}, ValueError, "row_ptr: .* from 0 to nnz = 7"),
        ({"row_ptr": changed(ROWS, 3, 6)}, ValueError, "row_ptr: .* from 0 to nnz = 7"),
        ({"row_ptr": changed(ROWS, 3, 8)}, ValueError, "row_ptr: .* from 0 to nnz = 7"),
        ({"row_ptr": changed(ROWS, 1, 5)}, ValueError, "row_ptr: expected an ascending seq"),
        ({"row_ptr": changed(ROWS, 2, 2**62)}, ValueError, "row_ptr: expected an ascending seq"),
        ({"row_ptr": changed(ROWS, 1, -(2**62))}, ValueError, "row_ptr: expected an ascending"),
        ({"row_ptr": ROWS.int()}, TypeError, "row_ptr: expected .*int64, got .*int32"),
        ({"row_ptr": ROWS.double()}, TypeError, "row_ptr: expected .*int64, got .*float64"),
    ],
)
@backends
def test_hostile_pairs(changes, error, message, backend):
    W, target = randn(10, 4), randn(3, 4)
    sparse = {"vals": randn(NNZ), "idx": PAIRS, "row_ptr": ROWS}
    ops.decode(**sparse, W_dec=W, backend=backend)
    sparse |= changes
    with pytest.raises(error, match=message):
        ops.decode(**sparse, W_dec=W, backend=backend)
    with pytest.raises(error, match=message):
        ops.reconstruction_error(**sparse, W_dec=W, b_dec=None, target=target, backend=backend)
    idx, row_ptr = sparse["idx"], sparse["row_ptr"]
    kernels = cpu if backend == "cpu" else reference
    with pytest.raises(error, match=message):
        kernels.decode_bwd_vals(target, idx, W, row_ptr)
    with pytest.raises(error, match=message):
        kernels.row_gradients(sparse["vals"], idx, target, 10, row_ptr)


@backends
@pytest.mark.parametrize("bad", [-2, -(2**31), 10, 2**31 - 1])
def test_hostile_ids_in_padded_rows(bad, backend):
    vals, idx, W = randn(3, 2), changed(PAIRS[:6], 4, bad).view(3, 2), randn(10, 4)
    message = rf"idx: expected values in \[-1, 10\), got {bad} at position 4"
    with pytest.raises(IndexError, match=message):
        ops.decode(vals, idx, W, backend=backend)
    with pytest.raises(IndexError, match=message):
        ops.reconstruction_error(vals, idx, W, None, randn(3, 4), backend=backend)


@refusals(
    "latents, error, message",
    [
        (torch.tensor([3, 1, 5]).int(), ValueError, "strictly ascending ids, got 1 at position 1"),
        (torch.tensor([1, 3, 3]).int(), ValueError, "strictly ascending ids, got 3 at position 2"),
        (torch.tensor([0, 70]).int(), IndexError, r"values in \[0, 70\), got 70 at position 1"),
        (torch.tensor([-1, 3]).int(), IndexError, r"values in \[0, 70\), got -1 at position 0"),
        (torch.tensor([2, -1]).int(), IndexError, r"values in \[0, 70\), got -1 at position 1"),
        (torch.tensor([1, 3]), TypeError, r"int32, got (torch\.)?int64"),
        (torch.ones(70).bool(), TypeError, r"int32, got (torch\.)?bool"),
        (torch.tensor([[1, 3]]).int(), ValueError, r"expected shape \(\*\), got \(1, 2\)"),
        (torch.tensor(1).int(), ValueError, r"expected shape \(\*\), got \(\)"),
    ],
)
@backends
def test_hostile_latents(latents, error, message, backend):
    with pytest.raises(error, match="^latents: expected .*" + message.removeprefix("expected ")):
        call("encode", latents=latents, backend=backend)
