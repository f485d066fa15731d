"""The SAE against a dense float64 implementation of its mathematics, written for these tests."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae.sae as sae_module
from fastsae import SAE, Codes, SAEConfig, TopK, ops
from fastsae.sae import geometric_median

D, F, K = 24, 96, 6
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the independent implementation ----


def top(h: Tensor, k: int) -> Tensor:
    """Where the k largest positive entries of each row are."""
    kept = torch.zeros_like(h, dtype=torch.bool)
    kept.scatter_(1, h.topk(min(k, h.shape[1]), dim=1).indices, True)
    return kept & (h > 0)


def parameters(sae: SAE, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The parameters by name, as leaves of a graph of their own."""
    return {n: p.detach().clone().to(dtype).requires_grad_() for n, p in sae.named_parameters()}


def dense(
    sae: SAE,
    p: dict[str, Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    chosen: Tensor | None = None,
    chosen_aux: Tensor | None = None,
) -> dict[str, Tensor]:
    """All that an SAE makes of x (N, D), by dense products and torch's autograd, in x's dtype.

    Of `sae` only the settings, the scales and the counts of tokens since a latent fired are used:
    call it before the SAE's own forward, which changes the counts. `chosen` and `chosen_aux`, masks
    (N, F), take the place of the selections.
    """
    c = sae.config
    scale_in = sae.input_scale.to(x.dtype)
    scale_out = sae.output_scale.to(x.dtype) if c.is_transcoder else scale_in
    xs = x * scale_in
    y = xs if target is None else target * scale_out
    skip = xs @ p["W_skip"].T if c.skip else 0
    h = (xs - p["b_dec"] if c.apply_b_dec_to_input else xs) @ p["W_enc"].T
    h = h + p["b_enc"] if c.encoder_bias else h
    assert isinstance(c.selection, TopK)
    mask = top(h, c.selection.k) if chosen is None else chosen
    xhat = (h * mask) @ p["W_dec"] + p["b_dec"] + skip
    out = {"mse": (y - xhat).square().mean(), "h": h, "mask": mask}
    loss = out["mse"]
    if sae.training and c.multi_topk_coef:
        wide = (h * top(h, 4 * c.selection.k)) @ p["W_dec"] + p["b_dec"] + skip
        out["multi_topk"] = (y - wide).square().mean()
        loss = loss + c.multi_topk_coef * out["multi_topk"]
    if sae.training:
        out["since"] = torch.where(mask.any(0), 0, sae.tokens_since_fired + len(x))
        out["dead"] = out["since"] >= c.dead_after
        if c.auxk_coef and out["dead"].any():
            e = (y - xhat).detach()
            ids = out["dead"].nonzero()[:, 0]
            if chosen_aux is None:
                chosen_aux = torch.zeros_like(mask)
                chosen_aux[:, ids] = top(h[:, ids], c.k_aux or c.d_in // 2)
            out["mask_aux"] = chosen_aux
            e_hat = (h * chosen_aux) @ p["W_dec"]
            out["auxk"] = (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
            loss = loss + c.auxk_coef * out["auxk"]
    return {**out, "loss": loss, "reconstruction": xhat / scale_out}


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    size = float(expected.detach().double().norm())
    assert size > 0, "expected something that is not zero"
    return float((got.detach().double() - expected.detach().double()).norm()) / size


def grad_of(t: Tensor) -> Tensor:
    assert t.grad is not None
    return t.grad


def assert_same_gradients(sae: SAE, p: dict[str, Tensor], rtol: float) -> None:
    errors = {n: relative_error(grad_of(q), grad_of(p[n])) for n, q in sae.named_parameters()}
    assert max(errors.values()) <= rtol, errors


# ---- SAEs to test, with every parameter, scale and count set to something of its own ----

AUXK: dict[str, Any] = {"auxk_coef": 0.5, "dead_after": 1000}
MULTI: dict[str, Any] = {"multi_topk_coef": 0.125}
TRANSCODER: dict[str, Any] = {"d_out": 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"auxk_coef": 0.0},
    "auxk": AUXK,
    "auxk-3": {**AUXK, "k_aux": 3},
    "auxk-all": {**AUXK, "k_aux": 1000},
    "multi": {"auxk_coef": 0.0, **MULTI},
    "auxk-multi": {**AUXK, **MULTI},
    "uncentred": {**AUXK, **MULTI, "apply_b_dec_to_input": False},
    "no-b_enc": {**AUXK, **MULTI, "encoder_bias": False},
    "free": {**AUXK, "decoder_norm": "free"},
    "transcoder": {**AUXK, **TRANSCODER},
    "transcoder-skip": {**AUXK, **MULTI, **TRANSCODER, "skip": True},
    "transcoder-skip-no-b_enc": {**AUXK, **TRANSCODER, "skip": True, "encoder_bias": False},
}
EACH_SETTING = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def make(settings: dict[str, Any], *, backend: str | None = None, k: int = K, seed: int = 1) -> SAE:
    """Half of its latents have not fired for long, and seldom will: they are small."""
    config = SAEConfig(d_in=D, d_sae=F, selection=TopK(k), **settings)
    sae = SAE(config, seed=seed, backend=backend)
    with torch.no_grad():
        for i, (name, p) in enumerate(sae.named_parameters()):
            noise = randn(*p.shape, seed=100 * seed + i)
            p.copy_(noise / 5 if name != "W_dec" else p.float() + 0.1 * noise)
            if name == "W_enc":
                p[: F // 2] *= 0.3
        sae.input_scale.fill_(0.7)
        sae.output_scale.fill_(1.9)
        sae.tokens_since_fired[: F // 2] = 10_000
    sae.normalize_decoder_()
    return sae


def batch(settings: dict[str, Any], *shape: int, seed: int = 7) -> tuple[Tensor, Tensor | None]:
    x = randn(*(shape or (30,)), D, seed=seed) + 0.5
    target = randn(*x.shape[:-1], settings["d_out"], seed=seed + 1) if "d_out" in settings else None
    return x, target


# ---- losses and gradients ----


def check_against_dense(
    sae: SAE, x: Tensor, target: Tensor | None, loss_rtol: float, rtol: float
) -> dict[str, Tensor]:
    """Losses, codes, counts, reconstruction and every gradient, of parameters and of the input."""
    p, x64 = parameters(sae), x.detach().double().requires_grad_()
    y64 = None if target is None else target.detach().double().requires_grad_()
    x = x.detach().clone().requires_grad_()
    target = None if target is None else target.detach().clone().requires_grad_()
    flat_target = None if y64 is None else y64.reshape(-1, y64.shape[-1])
    expected = dense(sae, p, x64.reshape(-1, D), flat_target)
    expected["loss"].backward()
    out = sae(x, target)
    out.loss.backward()
    assert set(out.losses) == {"mse", "auxk", "multi_topk"} & set(expected)
    for name, loss in (*out.losses.items(), ("loss", out.loss)):
        assert relative_error(loss, expected[name]) <= loss_rtol, name
    assert torch.equal(out.codes.validate().to_dense() != 0, expected["mask"])
    assert relative_error(out.codes.to_dense(), expected["h"] * expected["mask"]) <= loss_rtol
    l0 = expected["mask"].sum(1).double().mean()
    assert float(out.metrics["l0"]) == pytest.approx(float(l0), rel=1e-6)
    if sae.training:
        assert torch.equal(sae.tokens_since_fired, expected["since"])
        assert int(out.metrics["n_dead"]) == int(expected["dead"].sum())
    width = sae.b_dec.numel()
    assert out.reconstruction.shape == (*x.shape[:-1], width)
    got = out.reconstruction.reshape(-1, width)
    assert relative_error(got, expected["reconstruction"]) <= loss_rtol
    assert_same_gradients(sae, p, rtol)
    assert relative_error(grad_of(x), grad_of(x64)) <= rtol
    if target is not None and y64 is not None:
        assert relative_error(grad_of(target), grad_of(y64)) <= rtol
    return expected


@BACKENDS
@EACH_SETTING
@pytest.mark.parametrize("shape", [(30,), (5, 2, 3)], ids=str)
def test_training_losses_and_gradients(
    backend: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    sae = make(settings, backend=backend).train()
    expected = check_against_dense(sae, *batch(settings, *shape), 1e-6, 2e-6)
    if sae.config.auxk_coef:
        # The choice among the dead latents is a real one, and what it leaves out is positive.
        positive = (expected["h"] > 0) & expected["dead"]
        limit = settings.get("k_aux", D // 2)
        assert int(expected["dead"].sum()) > D // 2
        assert bool((positive.sum(1) > limit).any()) == (limit < F)


@EACH_SETTING
def test_training_losses_and_gradients_in_float64(settings: dict[str, Any]) -> None:
    sae = make({**settings, "dtype": "float64"}).train()
    x, target = batch(settings)
    y = None if target is None else target.double()
    check_against_dense(sae, x.double(), y, 1e-13, 1e-13)


@BACKENDS
@EACH_SETTING
def test_training_losses_and_gradients_in_bfloat16(backend: str, settings: dict[str, Any]) -> None:
    # The weights are bfloat16, all arithmetic is not: losses are as exact as in float32, and each
    # gradient is off by one rounding to bfloat16 (at most 2⁻⁹ of it; a sum of two, at most twice).
    sae = make({**settings, "dtype": "bfloat16"}, backend=backend).train()
    x, target = batch(settings)
    check_against_dense(sae, x, target, 1e-6, 2**-8)


@BACKENDS
@EACH_SETTING
def test_evaluation_has_the_mse_alone(backend: str, settings: dict[str, Any]) -> None:
    sae = make(settings, backend=backend).eval()
    before = sae.tokens_since_fired.clone()
    expected = check_against_dense(sae, *batch(settings), 1e-6, 2e-6)
    assert torch.equal(sae.tokens_since_fired, before)
    assert expected["loss"] is expected["mse"]


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip"])
@BACKENDS
def test_a_frozen_parameter_changes_no_other_gradient(backend: str, name: str) -> None:
    settings = SETTINGS["transcoder-skip" if name == "W_skip" else "auxk-multi"]
    x, target = batch(settings)
    sae = make(settings, backend=backend).train()
    sae(x, target).loss.backward()
    frozen = make(settings, backend=backend).train()
    getattr(frozen, name).requires_grad_(False)
    frozen(x, target).loss.backward()
    for other, p in sae.named_parameters():
        if other == name:
            assert frozen.get_parameter(name).grad is None
        else:
            assert torch.equal(grad_of(frozen.get_parameter(other)), grad_of(p)), other


@BACKENDS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("setting", ["auxk-multi", "transcoder-skip"])
def test_inside_a_model(backend: str, training: bool, setting: str) -> None:
    settings = SETTINGS[setting]
    sae = make(settings, backend=backend).train(training)
    u, target = batch(settings, 5, 6)
    before, after = torch.nn.Linear(D, D), torch.nn.Linear(sae.b_dec.numel(), 3)
    with torch.no_grad():
        for i, t in enumerate((*before.parameters(), *after.parameters())):
            t.copy_(randn(*t.shape, seed=50 + i) / 5)
    outside = {n: t for m in (before, after) for n, t in m.named_parameters(prefix=str(id(m)))}
    before64, after64 = copy.deepcopy(before).double(), copy.deepcopy(after).double()
    inside = [(m, n) for m in (before64, after64) for n, _ in m.named_parameters()]

    p, u64 = parameters(sae), u.double().requires_grad_()
    y64 = None if target is None else target.double().reshape(30, -1)
    expected = dense(sae, p, before64(u64).reshape(30, D), y64)
    (after64(expected["reconstruction"]).tanh().sum() + 3 * expected["loss"]).backward()

    u = u.requires_grad_()
    out = sae(before(u), target)
    (after(out.reconstruction).tanh().sum() + 3 * out.loss).backward()
    assert torch.equal(out.codes.to_dense() != 0, expected["mask"])
    assert_same_gradients(sae, p, 3e-6)
    assert relative_error(grad_of(u), grad_of(u64)) <= 3e-6
    for t, (m, name) in zip(outside.values(), inside, strict=True):
        assert relative_error(grad_of(t), grad_of(m.get_parameter(name))) <= 3e-6


@BACKENDS
def test_the_reconstruction_alone_has_gradients(backend: str) -> None:
    # Also through encode and decode, and for the stride-0 gradient that a sum sends back.
    settings = SETTINGS["transcoder-skip"]
    sae = make(settings, backend=backend).eval()
    x, target = batch(settings)
    p, x64 = parameters(sae), x.double().requires_grad_()
    dense(sae, p, x64, target.double())["reconstruction"].sum().backward()
    runs: list[Callable[[Tensor], Tensor]] = [
        lambda t: sae(t, target).reconstruction,
        lambda t: sae(t).reconstruction,
        lambda t: sae.decode(sae.encode(t), t),
    ]
    for run in runs:
        sae.zero_grad()
        t = x.clone().requires_grad_()
        run(t).sum().backward()
        assert_same_gradients(sae, p, 2e-6)
        assert relative_error(grad_of(t), grad_of(x64)) <= 2e-6


@BACKENDS
def test_k_of_all_latents_is_a_relu_sae(backend: str) -> None:
    sae = make(SETTINGS["plain"], backend=backend, k=F)
    x, _ = batch({})
    p, x64 = parameters(sae), x.double()
    xs = x64 * sae.input_scale.double()
    z = torch.relu((xs - p["b_dec"]) @ p["W_enc"].T + p["b_enc"])
    loss = (z @ p["W_dec"] + p["b_dec"] - xs).square().mean()
    loss.backward()
    out = sae(x)
    out.loss.backward()
    assert relative_error(out.codes.to_dense(), z) <= 1e-6
    assert relative_error(out.loss, loss) <= 1e-6
    assert_same_gradients(sae, p, 2e-6)


# ---- AuxK ----


@BACKENDS
def test_auxk_without_dead_latents_is_no_auxk(backend: str) -> None:
    x, _ = batch({})
    runs = []
    for settings in ({"auxk_coef": 0.5, "dead_after": 10_031}, {"auxk_coef": 0.0}):
        sae = make(settings, backend=backend).train()
        out = sae(x)
        out.loss.backward()
        runs.append((sae, out))
    (with_aux, out), (without, out_without) = runs
    assert int(out.metrics["n_dead"]) == 0 and set(out.losses) == {"mse"}
    assert torch.equal(out.loss, out_without.loss)
    for name, p in with_aux.named_parameters():
        assert torch.equal(grad_of(p), grad_of(without.get_parameter(name))), name


@BACKENDS
def test_auxk_trains_dead_latents_only_and_their_encoder_too(backend: str) -> None:
    x, _ = batch({})
    sae = make(SETTINGS["auxk"], backend=backend).train()
    p = parameters(sae)
    expected = dense(sae, p, x.double())
    (0.5 * expected["auxk"]).backward()
    with_aux, without = sae, make(SETTINGS["plain"], backend=backend).train()
    for run in (with_aux, without):
        run(x).loss.backward()
    dead = expected["dead"]
    for name in ("W_enc", "b_enc", "W_dec"):
        got, off = (grad_of(s.get_parameter(name)) for s in (with_aux, without))
        assert torch.equal(got[~dead], off[~dead]), name  # live rows: nothing at all
        assert not off[dead].any()
        assert relative_error(got[dead], grad_of(p[name])[dead]) <= 2e-6
        assert not grad_of(p[name])[~dead].any()
        rows = got[dead].reshape(int(dead.sum()), -1)
        assert int(rows.any(1).sum()) > len(rows) // 2
    got = grad_of(with_aux.b_dec) - grad_of(without.b_dec)  # it centres the dead latents' input
    assert relative_error(got, grad_of(p["b_dec"])) <= 1e-5


@BACKENDS
@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", range(3))
def test_auxk_of_a_constant_error_is_zero(backend: str, n: int, seed: int) -> None:
    # Its variance is 0, or what rounding leaves of it: a ratio to that would be 10⁷, or NaN.
    sae = make({"auxk_coef": 1.0, "dead_after": 1}, backend=backend, seed=1 + seed).train()
    off = make({"auxk_coef": 0.0}, backend=backend, seed=1 + seed).train()
    x = randn(1, D, seed=seed).expand(n, D)
    out = sae(x)
    out.loss.backward()
    off(x).loss.backward()
    assert float(out.losses["auxk"].detach()) == 0
    for name, p in sae.named_parameters():
        torch.testing.assert_close(grad_of(p), grad_of(off.get_parameter(name)), msg=name)


def test_auxk_of_a_perfect_reconstruction_is_zero() -> None:
    sae = SAE(SAEConfig(d_in=2, d_sae=4, selection=TopK(2), dead_after=1)).train()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
        sae.W_enc.copy_(sae.W_dec)
        sae.W_enc[2:] /= 2
    out = sae(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    out.loss.backward()
    assert float(out.loss.detach()) == float(out.losses["auxk"].detach()) == 0
    assert int(out.metrics["n_dead"]) == 2
    assert not any(grad_of(p).any() for p in sae.parameters())


# ---- which latents are dead ----


def one_latent_per_coordinate(**settings: Any) -> SAE:
    """Latent i fires exactly where coordinate i is positive."""
    config = SAEConfig(d_in=4, d_sae=4, selection=TopK(4), **settings)
    sae = SAE(config).train()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    return sae


def test_silence_is_counted_in_tokens() -> None:
    sae = one_latent_per_coordinate(dead_after=12, auxk_coef=0.0)
    x = torch.zeros(2, 3, 4)  # six tokens
    x[1, 0, 0] = 1.0  # latent 0 fires in one of them, latent 1 in all
    x[..., 1] = 1.0
    first = sae(x)
    assert sae.tokens_since_fired.tolist() == [0, 0, 6, 6]
    assert int(first.metrics["n_dead"]) == 0
    second = sae(x[0])  # three tokens; latent 0 is silent
    assert sae.tokens_since_fired.tolist() == [3, 0, 9, 9]
    assert int(second.metrics["n_dead"]) == 0
    third = sae(x[0])
    assert sae.tokens_since_fired.tolist() == [6, 0, 12, 12]
    assert int(third.metrics["n_dead"]) == 2  # 12 tokens are enough, and this batch counts
    revived = sae(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    assert sae.tokens_since_fired.tolist() == [7, 1, 0, 13]
    assert int(revived.metrics["n_dead"]) == 1


def test_evaluation_does_not_count_and_no_grad_does() -> None:
    sae = one_latent_per_coordinate()
    x = torch.zeros(5, 4)
    sae.eval()(x)
    sae.encode(x)
    sae.train()
    sae.encode(x)
    assert sae.tokens_since_fired.tolist() == [0, 0, 0, 0]
    with torch.no_grad():
        sae(x)
    assert sae.tokens_since_fired.tolist() == [5, 5, 5, 5]


# ---- shapes, dtypes, inputs ----


@BACKENDS
@pytest.mark.parametrize("setting", ["auxk-multi", "transcoder-skip"])
def test_leading_dimensions_change_nothing(backend: str, setting: str) -> None:
    settings = SETTINGS[setting]
    x, target = batch(settings, 24)
    flat = make(settings, backend=backend).train()(x, target)
    for shape in ((2, 3, 4), (24, 1), (1, 1, 24)):
        sae = make(settings, backend=backend).train()
        y = None if target is None else target.reshape(*shape, -1)
        out = sae(x.reshape(*shape, D), y)
        assert torch.equal(out.loss, flat.loss)
        assert torch.equal(out.codes.idx, flat.codes.idx)
        assert torch.equal(out.codes.vals, flat.codes.vals)
        assert out.reconstruction.shape == (*shape, sae.b_dec.numel())
        assert torch.equal(
            out.reconstruction.reshape(flat.reconstruction.shape), flat.reconstruction
        )


def test_a_single_token_needs_no_leading_dimension() -> None:
    sae = make({}).eval()
    x, _ = batch({})
    out = sae(x[0])
    assert out.reconstruction.shape == (D,) and len(out.codes) == 1
    assert torch.equal(out.reconstruction, sae(x[:1]).reconstruction[0])


@BACKENDS
@pytest.mark.parametrize("setting", ["auxk-multi", "transcoder-skip"])
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_no_tokens(backend: str, setting: str, shape: tuple[int, ...]) -> None:
    settings = SETTINGS[setting]
    sae = make(settings, backend=backend).train()
    x, target = batch(settings, *shape)
    out = sae(x, target)
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and float(out.metrics["l0"]) == 0
    assert out.reconstruction.shape == (*shape, sae.b_dec.numel())
    assert all(not grad_of(p).any() for p in sae.parameters())
    assert int(sae.tokens_since_fired.max()) == 10_000


@BACKENDS
def test_strides_of_the_input_change_nothing(backend: str) -> None:
    sae = make({}, backend=backend).eval()
    x, _ = batch({})
    columns, every_other = x.T.contiguous().T, torch.stack([x, -x], 1)[:, 0]
    assert not columns.is_contiguous() and not every_other.is_contiguous()
    for strided in (columns, every_other):
        assert torch.equal(sae(strided).reconstruction, sae(x).reconstruction)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("setting", ["auxk-multi", "transcoder-skip"])
def test_activations_of_other_dtypes_are_made_float32_first(
    backend: str, dtype: torch.dtype, setting: str
) -> None:
    # Scaling them in half precision would round them again, and the scale as well.
    settings = SETTINGS[setting]
    x, target = batch(settings)
    x, target = x.to(dtype), None if target is None else target.to(dtype)
    out = make(settings, backend=backend).train()(x, target)
    y = None if target is None else target.float()
    wide = make(settings, backend=backend).train()(x.float(), y)
    assert torch.equal(out.codes.idx, wide.codes.idx)
    assert torch.equal(out.codes.vals, wide.codes.vals)
    assert torch.equal(out.loss, wide.loss)
    assert out.reconstruction.dtype == dtype
    assert torch.equal(out.reconstruction, wide.reconstruction.to(dtype))


@BACKENDS
@EACH_SETTING
def test_encode_and_decode_are_what_forward_does(backend: str, settings: dict[str, Any]) -> None:
    sae = make(settings, backend=backend).train()
    x, target = batch(settings, 5, 6)
    out = sae(x, target)
    codes = sae.encode(x)
    assert torch.equal(codes.idx, out.codes.idx)
    assert torch.equal(codes.vals, out.codes.vals)
    decoded = sae.decode(codes, x)
    assert decoded.shape == (30, sae.b_dec.numel())
    torch.testing.assert_close(decoded, out.reconstruction.flatten(0, 1), rtol=1e-6, atol=1e-6)
    assert sae.losses(x, target).reconstruction is None


def test_decode_takes_codes_of_any_layout() -> None:
    sae = make({})
    x, _ = batch({})
    codes = sae.encode(x)
    varying = Codes.from_dense(codes.to_dense())
    assert varying.row_ptr is not None
    assert torch.equal(sae.decode(varying), sae.decode(codes))
    assert torch.equal(sae.decode(codes[3:7]), sae.decode(codes)[3:7])


@BACKENDS
@pytest.mark.parametrize("skip", [False, True], ids=["no-skip", "skip"])
def test_a_transcoder_without_its_target(backend: str, skip: bool) -> None:
    settings = {**SETTINGS["transcoder"], "skip": skip}
    sae = make(settings, backend=backend).eval()
    x, target = batch(settings)
    out, expected = sae(x), sae(x, target)
    torch.testing.assert_close(out.reconstruction, expected.reconstruction, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.codes.idx, expected.codes.idx)
    assert bool(out.loss.isnan()) and bool(expected.loss.isfinite())


WRONG_INPUTS: dict[str, tuple[str, tuple[Any, ...], type[Exception], str]] = {
    "width": (
        "plain",
        (torch.zeros(2, 3, D + 1),),
        ValueError,
        r"x: .*\(…, 24\), got \(2, 3, 25\)",
    ),
    "scalar": ("plain", (torch.tensor(1.0),), ValueError, r"x: expected shape \(…, 24\), got \(\)"),
    "integers": ("plain", (torch.zeros(2, D, dtype=torch.int64),), TypeError, "x: .*torch.int64"),
    "target": (
        "plain",
        (torch.zeros(2, D), torch.zeros(2, D)),
        ValueError,
        "target: expected None",
    ),
    "target-width": (
        "transcoder",
        (torch.zeros(2, D), torch.zeros(2, D)),
        ValueError,
        r"target: expected shape \(…, 20\), got \(2, 24\)",
    ),
    "target-tokens": (
        "transcoder",
        (torch.zeros(2, 3, D), torch.zeros(5, 20)),
        ValueError,
        "target: expected 6 tokens, got 5",
    ),
}


@pytest.mark.parametrize(
    ("setting", "args", "kind", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS
)
def test_wrong_inputs(
    setting: str, args: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(SETTINGS[setting])(*args)


@BACKENDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(backend: str, value: float) -> None:
    x, _ = batch({})
    x[3, 5] = value
    with pytest.raises(ValueError, match=r"x: expected finite values, got .* in row 3"):
        make({}, backend=backend)(x)


def test_decode_refuses_foreign_codes_and_a_missing_input() -> None:
    sae = make(SETTINGS["transcoder-skip"])
    x, _ = batch({})
    codes = sae.encode(x)
    with pytest.raises(ValueError, match=r"x: expected the codes' input .*skip.*, got None"):
        sae.decode(codes)
    with pytest.raises(ValueError, match="codes: expected 96 latents, got 95"):
        sae.decode(Codes(codes.vals, codes.idx, F - 1), x)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backend: expected one of reference, cpu, triton, got 'tp'"
    ):
        make({}, backend="tp").encode(batch({})[0])


# ---- the decoder's norm ----


@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unit_norm_projects_the_gradient_and_keeps_rows_at_one(backend: str, dtype: str) -> None:
    sae = make({**AUXK, "dtype": dtype}, backend=backend).train()
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, F)[:, None]  # rows need not have norm 1 to be projected
    sae(batch({})[0]).loss.backward()
    g, W = grad_of(sae.W_dec).double(), sae.W_dec.detach().double()
    unit = W / W.norm(dim=1, keepdim=True)
    sae.project_decoder_gradient_()
    got = grad_of(sae.W_dec).double()
    eps = 1e-7 if dtype == "float32" else 2**-8
    assert float(((g * unit).sum(1).abs() / g.norm(dim=1).clamp(min=1e-30)).max()) > 0.1
    assert float((got * unit).sum(1).abs().max()) <= 2 * eps * float(g.norm(dim=1).max())
    expected = g - (g * unit).sum(1, keepdim=True) * unit
    assert relative_error(got, expected) <= eps
    sae.normalize_decoder_()
    torch.testing.assert_close(sae.W_dec.detach().double(), unit, rtol=2 * eps, atol=0)


def test_free_norm_is_left_alone() -> None:
    sae = make(SETTINGS["free"]).train()
    with torch.no_grad():
        sae.W_dec *= 3
    sae(batch({})[0]).loss.backward()
    g, W = grad_of(sae.W_dec).clone(), sae.W_dec.detach().clone()
    sae.project_decoder_gradient_()
    sae.normalize_decoder_()
    assert torch.equal(grad_of(sae.W_dec), g) and torch.equal(sae.W_dec, W)


def test_there_may_be_no_gradient_to_project() -> None:
    sae = make({})
    sae.project_decoder_gradient_()
    assert sae.W_dec.grad is None


# ---- start ----


def test_an_autoencoder_starts_tied_with_unit_rows_and_no_biases() -> None:
    config = SAEConfig(d_in=D, d_sae=F, selection=TopK(K))
    sae, again, other = SAE(config, seed=3), SAE(config, seed=3), SAE(config, seed=4)
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc is not sae.W_dec
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    assert not sae.b_dec.any() and sae.b_enc is not None and not sae.b_enc.any()
    assert torch.equal(sae.W_dec, again.W_dec) and not torch.equal(sae.W_dec, other.W_dec)
    names = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    assert {n: tuple(p.shape) for n, p in sae.named_parameters()} == names
    assert len((sae.W_dec @ sae.W_dec.T).fill_diagonal_(0).abs().clamp(min=0.95).unique()) == 1


@pytest.mark.parametrize(
    ("dtype", "eps"), [("float64", 1e-15), ("float32", 1e-7), ("bfloat16", 2**-8)]
)
def test_unit_rows_start_as_exact_as_their_dtype(dtype: Any, eps: float) -> None:
    sae = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K), dtype=dtype))
    assert float((sae.W_dec.detach().double().norm(dim=1) - 1).abs().max()) <= eps


def test_a_transcoder_starts_untied() -> None:
    sae = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K), d_out=D, skip=True), seed=3)
    torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(F))
    assert float((sae.W_enc * sae.W_dec).detach().sum(1).abs().mean()) < 0.5
    assert sae.W_skip is not None and sae.W_skip.shape == (D, D) and not sae.W_skip.any()


def test_a_new_sae_leaves_torchs_random_state_alone() -> None:
    state = torch.get_rng_state()
    SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K)), seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def cloud(n: int = 2000, width: int = D, outliers: float = 0.0, seed: int = 0) -> Tensor:
    """Rows around (5, 5, …), unequal variances, some rows far away on one side."""
    x = randn(n, width, seed=seed) * torch.linspace(0.2, 3, width) + 5
    x[: int(outliers * n)] += 1000
    return x


def mean_variance(x: Tensor) -> float:
    x = x.double()
    return float((x - x.mean(0)).square().mean())


@BACKENDS
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_scale_makes_the_mean_variance_one(backend: str, offset: float) -> None:
    sae = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K)), backend=backend)
    x = cloud() + offset
    sae.initialize_from_(x.reshape(4, 500, D))
    assert mean_variance(x.double() * sae.input_scale.double()) == pytest.approx(1, rel=1e-5)
    # …so that the loss is a fraction of the variance: this SAE has no latent that is on.
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
    sae.initialize_from_(x, b_dec="mean")
    assert float(sae.eval()(x).loss.detach()) == pytest.approx(1, rel=1e-5)


def test_a_transcoder_has_a_scale_for_each_side() -> None:
    sae = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K), d_out=10))
    x, y = cloud(), 7 * cloud(width=10, seed=1)
    sae.initialize_from_(x, y, b_dec="mean")
    assert mean_variance(x.double() * sae.input_scale.double()) == pytest.approx(1, rel=1e-5)
    assert mean_variance(y.double() * sae.output_scale.double()) == pytest.approx(1, rel=1e-5)
    centre = (y.double() * sae.output_scale.double()).mean(0)
    torch.testing.assert_close(sae.b_dec.detach().double(), centre, rtol=1e-5, atol=0)


@pytest.mark.parametrize("start", ["geometric_median", "mean", "zero"])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_b_dec_starts_at_a_centre_of_the_scaled_rows(start: Any, scale: bool) -> None:
    sae = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K)))
    x = cloud(outliers=0.1)
    sae.initialize_from_(x, scale=scale, b_dec=start)
    if not scale:
        assert float(sae.input_scale) == float(sae.output_scale) == 1
    xs = x.double() * sae.input_scale.double()
    b_dec = sae.b_dec.detach().double()
    if start == "zero":
        assert not b_dec.any()
    elif start == "mean":
        torch.testing.assert_close(b_dec, xs.mean(0), rtol=1e-5, atol=0)
    else:
        assert pull(xs, b_dec) <= 2e-5
        # The outliers move the mean by 100 and the median by little.
        assert float((b_dec / sae.input_scale - 5).norm()) < 2
        assert float((x.double().mean(0) - 5).norm()) > 400


def test_constant_rows_have_no_scale() -> None:
    sae = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K)))
    sae.initialize_from_(torch.full((10, D), 3.0))
    assert float(sae.input_scale) == 1
    torch.testing.assert_close(sae.b_dec.detach(), torch.full((D,), 3.0))


def test_a_start_can_be_wrong() -> None:
    sae = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K)))
    with pytest.raises(ValueError, match="b_dec: expected one of geometric_median, mean, zero"):
        sae.initialize_from_(cloud(), b_dec="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: expected at least one token, got none"):
        sae.initialize_from_(cloud()[:0])
    with pytest.raises(ValueError, match=r"x: expected shape \(…, 24\)"):
        sae.initialize_from_(cloud(width=5))
    assert float(sae.input_scale) == 1 and not sae.b_dec.any()
    transcoder = SAE(SAEConfig(d_in=D, d_sae=F, selection=TopK(K), d_out=10))
    with pytest.raises(ValueError, match="target: expected a sample of targets"):
        transcoder.initialize_from_(cloud())


def pull(x: Tensor, centre: Tensor) -> float:
    """Size of the gradient of the mean distance to the rows: 0 at the geometric median."""
    away = x.double() - centre.double()
    return float((away / away.norm(dim=1, keepdim=True)).mean(0).norm())


@BACKENDS
@pytest.mark.parametrize("outliers", [0.0, 0.3])
@pytest.mark.parametrize("n", [3, 50, 5000])
def test_geometric_median_is_where_nothing_pulls(backend: str, n: int, outliers: float) -> None:
    x = cloud(n, outliers=outliers)
    median = geometric_median(x, backend=backend)
    assert median.shape == (D,) and median.dtype == torch.float32
    assert pull(x, median) <= 2e-5
    assert pull(x, x.mean(0)) > 1e-4


def test_geometric_median_leaves_a_row_that_it_starts_on() -> None:
    # The mean is 3, a row, but the median is 0: dividing by the distance to that row would hold
    # the iteration there for ever.
    x = torch.tensor([[0.0], [0.0], [0.0], [3.0], [12.0]])
    assert float(geometric_median(x)) == pytest.approx(0, abs=1e-4)
    # Here it is right to stay: the others pull to the left, but less than the three rows hold.
    stay = torch.tensor([[0.0], [0.0], [0.0], [-1.0], [-2.0], [-3.0], [6.0]])
    assert geometric_median(stay).tolist() == [0]
    assert geometric_median(torch.full((7, 3), 2.0)).tolist() == [2, 2, 2]
    assert geometric_median(torch.tensor([[4.0, 2.0]])).tolist() == [4, 2]


# ---- folding the scale ----


@BACKENDS
@EACH_SETTING
def test_folding_the_scale_preserves_the_function(backend: str, settings: dict[str, Any]) -> None:
    sae = make(settings, backend=backend).eval()
    x, target = batch(settings)
    before, W_dec = sae(x, target), sae.W_dec.detach().clone()
    assert sae.fold_scale_() is sae
    after = sae(x, target)
    scale = 1.9 if "d_out" in settings else 0.7
    assert float(sae.input_scale) == float(sae.output_scale) == 1
    assert torch.equal(sae.W_dec, W_dec)  # rows keep their norm
    assert torch.equal(after.codes.idx, before.codes.idx)
    assert relative_error(after.codes.vals, before.codes.vals / scale) <= 1e-6
    assert relative_error(after.reconstruction, before.reconstruction) <= 1e-6
    torch.testing.assert_close(after.loss, before.loss / scale**2, rtol=1e-5, atol=0)
    folded = {n: p.detach().clone() for n, p in sae.named_parameters()}
    sae.fold_scale_()
    assert all(torch.equal(p, folded[n]) for n, p in sae.named_parameters())


@pytest.mark.parametrize("setting", ["plain", "transcoder-skip"])
def test_folding_the_scale_in_float64_is_exact_in_float64(setting: str) -> None:
    settings = {**SETTINGS[setting], "dtype": "float64"}
    sae = make(settings).eval()
    x = batch({})[0].double()
    before = sae(x).reconstruction
    assert relative_error(sae.fold_scale_()(x).reconstruction, before) <= 1e-14


# ---- state and files ----


def test_state_dict_is_what_training_leaves_behind() -> None:
    sae = make(SETTINGS["transcoder-skip"])
    state = sae.state_dict()
    weights = {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}
    assert set(state) == weights | {"input_scale", "output_scale"}
    other = SAE(sae.config, seed=9)
    other.load_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch for W_enc"):
        SAE(SAEConfig(d_in=D, d_sae=F + 1, selection=TopK(K), d_out=20, skip=True)).load_state_dict(
            state
        )


def test_a_deep_copy_is_another_sae() -> None:
    sae = make(SETTINGS["auxk-multi"]).train()
    twin = copy.deepcopy(sae)
    x, _ = batch({})
    out, expected = twin(x), make(SETTINGS["auxk-multi"]).train()(x)
    assert torch.equal(out.loss, expected.loss)
    out.loss.backward()
    with torch.no_grad():
        twin.W_dec.zero_()
    assert sae.W_dec.any() and sae.W_dec.grad is None
    assert int(sae.tokens_since_fired.min()) == 0 and int(sae.tokens_since_fired.max()) == 10_000
    assert not torch.equal(sae.tokens_since_fired, twin.tokens_since_fired)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("setting", ["no-b_enc", "transcoder-skip"])
def test_save_and_load_keep_every_bit(tmp_path: Path, dtype: str, setting: str) -> None:
    sae = make({**SETTINGS[setting], "dtype": dtype})
    folder = tmp_path / "not" / "there"
    sae.save(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "sae.safetensors"]
    again = SAE.load(str(folder))
    assert again.config == sae.config and not again.training
    state, loaded = sae.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    for name, t in state.items():
        assert loaded[name].dtype == t.dtype
        assert torch.equal(loaded[name], t), name
    assert not again.tokens_since_fired.any()


def test_save_replaces_what_was_there(tmp_path: Path) -> None:
    make(SETTINGS["plain"]).save(tmp_path)
    sae = make(SETTINGS["transcoder-skip"], seed=2)
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert again.config == sae.config and torch.equal(again.W_dec, sae.W_dec)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class DiskFull(OSError):
    """What a full disk raises, in the middle of writing."""


@pytest.mark.parametrize("old", [False, True], ids=["new", "over-old"])
@pytest.mark.parametrize("stage", ["weights", "config", "replace"])
def test_a_failed_save_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, old: bool
) -> None:
    if old:
        make(SETTINGS["auxk"], seed=2).save(tmp_path)
    before = contents(tmp_path)

    def save_half(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise DiskFull

    def write_half(path: Path, data: Any) -> None:
        path.write_bytes(b'{"d_in":')
        raise DiskFull

    def replace(*_: Any) -> None:
        raise DiskFull

    with monkeypatch.context() as patch:
        if stage == "weights":
            patch.setattr(sae_module, "write_tensors", save_half)
        elif stage == "config":
            patch.setattr(sae_module, "write_json", write_half)
        else:
            patch.setattr(os, "replace", replace)
        with pytest.raises(DiskFull):
            make(SETTINGS["plain"]).save(tmp_path)
    assert contents(tmp_path) == before  # also: no leftovers beside them
    make(SETTINGS["plain"]).save(tmp_path)
    assert SAE.load(tmp_path).config == make(SETTINGS["plain"]).config


def saved(tmp_path: Path, **changes: Any) -> Path:
    """A saved SAE whose config.json is edited; a value of None removes a field."""
    make(SETTINGS["plain"]).save(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    removed = [name for name, value in changes.items() if value is None]
    path.write_text(json.dumps({n: v for n, v in config.items() if n not in removed}))
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "sae.safetensors"])
def test_load_names_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"nowhere: expected a file config.json, got none"):
        SAE.load(tmp_path / "nowhere")
    (saved(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"expected a file {name}, got none"):
        SAE.load(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_load_refuses_cut_weights(tmp_path: Path, kept: float) -> None:
    path = saved(tmp_path) / "sae.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"sae\.safetensors: "):
        SAE.load(tmp_path)


def test_load_refuses_foreign_bytes(tmp_path: Path) -> None:
    (saved(tmp_path) / "sae.safetensors").write_bytes(os.urandom(4096))
    with pytest.raises(ValueError, match=r"sae\.safetensors: "):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"d_in": 24}', "\x00"], ids=lambda t: repr(t)
)
def test_load_refuses_a_foreign_config(tmp_path: Path, text: str) -> None:
    (saved(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        SAE.load(tmp_path)


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"d_sae": 97}, r"sae\.safetensors: W_dec: expected shape \(97, 24\), got \(96, 24\)"),
    "width": ({"d_in": 25}, r"sae\.safetensors: W_dec: expected shape \(96, 25\), got \(96, 24\)"),
    "huge": ({"d_sae": 2**31 - 1}, r"sae\.safetensors: W_dec: expected shape \(2147483647, "),
    "extra-tensor": ({"encoder_bias": False}, r"sae\.safetensors: .*Unexpected key.*b_enc"),
    "missing-tensor": (
        {"d_out": 24, "skip": True, "apply_b_dec_to_input": False},
        r"sae\.safetensors: .*Missing key.*W_skip",
    ),
    "unknown-field": ({"colour": "blue"}, r"config\.json: .*colour"),
    "missing-field": ({"d_sae": None}, r"config\.json: .*d_sae"),
    "no-selection": ({"selection": None}, r"config\.json: .*selection"),
    "selection": ({"selection": {"name": "bottomk", "k": 3}}, r"config\.json: .*bottomk"),
    "value": ({"dtype": "float8"}, r"config\.json: dtype: .*float8"),
    "not-a-number": ({"auxk_coef": float("nan")}, r"config\.json: auxk_coef: .*nan"),
}


@pytest.mark.parametrize(("changes", "message"), EDITS.values(), ids=EDITS)
def test_load_refuses_what_does_not_match(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SAE.load(tmp_path)


# ---- modules in torch ----


def test_a_module_can_be_moved_to_bfloat16(tmp_path: Path) -> None:
    low = make(SETTINGS["plain"]).eval().to(torch.bfloat16)
    assert {t.dtype for t in low.state_dict().values()} == {torch.bfloat16}
    check_against_dense(low, *batch({}), 1e-6, 2**-8)
    low.save(tmp_path)
    loaded = SAE.load(tmp_path).state_dict()
    assert all(
        torch.equal(t.to(loaded[name]), loaded[name]) for name, t in low.state_dict().items()
    )


def test_compiled_inference_is_one_graph_with_the_same_result() -> None:
    sae = make(SETTINGS["transcoder-skip"]).eval()
    x, target = batch(SETTINGS["transcoder-skip"])
    expected = sae(x, target)
    torch.compiler.reset()
    out = torch.compile(sae, fullgraph=True)(x, target)
    assert torch.equal(out.codes.idx, expected.codes.idx)
    torch.testing.assert_close(out.reconstruction, expected.reconstruction, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)


def test_compiled_training_is_the_same() -> None:
    # Without code generation: what is tried is that the graph can be captured and differentiated.
    settings = SETTINGS["auxk-multi"]
    sae = make(settings).train()
    p = parameters(sae)
    x, _ = batch({})
    expected = dense(sae, p, x.double())
    expected["loss"].backward()
    torch.compiler.reset()
    out = torch.compile(sae, backend="aot_eager")(x)
    out.loss.backward()
    assert relative_error(out.loss, expected["loss"]) <= 1e-6
    assert_same_gradients(sae, p, 2e-6)
    assert torch.equal(sae.tokens_since_fired, expected["since"])


def test_repr_tells_the_settings() -> None:
    assert "d_in=24, d_sae=96, selection=TopK(k=6, score=" in repr(make({}))


# ---- configuration ----

CONFIGS: dict[str, dict[str, Any]] = {
    "smallest": {"d_in": 1, "d_sae": 32},
    "transcoder": {"d_in": 8, "d_sae": 64, "d_out": 3, "skip": True, "encoder_bias": False},
    "all": {
        "d_in": 8,
        "d_sae": 64,
        "selection": TopK(5),
        "apply_b_dec_to_input": False,
        "decoder_norm": "free",
        "dtype": "bfloat16",
        "auxk_coef": 0.25,
        "k_aux": 7,
        "dead_after": 5,
        "multi_topk_coef": 0.125,
    },
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_json(settings: dict[str, Any]) -> None:
    config = SAEConfig(**settings)
    data = json.loads(json.dumps(config.to_dict()))
    assert SAEConfig.from_dict(data) == config
    assert {"d_in", "d_sae", "selection", "d_out", "k_aux", "dead_after"} <= set(data)
    for name, value in settings.items():
        assert getattr(config, name) == value
        assert name == "selection" or data[name] == value


def test_config_centres_autoencoders_only() -> None:
    assert SAEConfig(d_in=4, d_sae=32).apply_b_dec_to_input is True
    assert SAEConfig(d_in=4, d_sae=32, apply_b_dec_to_input=False).apply_b_dec_to_input is False
    assert SAEConfig(d_in=4, d_sae=32, d_out=4).apply_b_dec_to_input is False


def test_config_defaults_are_those_of_the_literature() -> None:
    config = SAEConfig(d_in=4, d_sae=32)
    assert config.selection == TopK(32) and config.decoder_norm == "unit"
    assert config.auxk_coef == 1 / 32 and config.dead_after == 10_000_000
    assert config.k_aux is None and config.multi_topk_coef == 0


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "d_in": ({"d_in": 0}, "d_in: expected an integer of at least 1, got 0"),
    "d_in-float": ({"d_in": 4.0}, "d_in: expected an integer of at least 1, got 4.0"),
    "d_in-bool": ({"d_in": True}, "d_in: expected an integer of at least 1, got True"),
    "d_in-none": ({"d_in": None}, "d_in: expected an integer of at least 1, got None"),
    "d_sae": ({"d_sae": -1}, "d_sae: expected an integer of at least 1, got -1"),
    "d_sae-big": ({"d_sae": 2**31}, r"d_sae: expected fewer than 2\*\*31 latents"),
    "d_out": ({"d_out": 0}, "d_out: expected an integer of at least 1, got 0"),
    "k_aux": ({"k_aux": 0}, "k_aux: expected an integer of at least 1, got 0"),
    "dead_after": ({"dead_after": 0}, "dead_after: expected an integer of at least 1, got 0"),
    "k": ({"selection": TopK(33)}, "k: expected at most d_sae = 32, got 33"),
    "selection": ({"selection": "topk"}, "selection: expected a Selection, got 'topk'"),
    "dtype": ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, .*, got 'int8'"),
    "norm": ({"decoder_norm": "long"}, "decoder_norm: expected unit or free, got 'long'"),
    "auxk": ({"auxk_coef": -0.1}, "auxk_coef: expected a finite number of at least 0, got -0.1"),
    "auxk-nan": ({"auxk_coef": float("nan")}, "auxk_coef: expected a finite number .*, got nan"),
    "multi": ({"multi_topk_coef": float("inf")}, "multi_topk_coef: expected a finite .*, got inf"),
    "centring": (
        {"d_out": 4, "apply_b_dec_to_input": True},
        "apply_b_dec_to_input: expected False with d_out, got True",
    ),
    "skip": ({"skip": True}, "skip: expected d_out with it"),
    "skip-type": ({"skip": "no", "d_out": 4}, "skip: expected True or False, got 'no'"),
    "bias-type": ({"encoder_bias": 1}, "encoder_bias: expected True or False, got 1"),
    "centring-type": ({"apply_b_dec_to_input": 0}, "apply_b_dec_to_input: expected True or F"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAEConfig(**{"d_in": 4, "d_sae": 32, **settings})


@BACKENDS
def test_multi_topk_trains_on_the_codes_of_the_first_k(backend: str) -> None:
    # The K codes are the first K of the 4K, to the bit.
    x, _ = batch({})
    multi, plain = (make(SETTINGS[s], backend=backend).train() for s in ("multi", "plain"))
    out, expected = multi(x), plain(x)
    assert torch.equal(out.codes.idx, expected.codes.idx)
    assert torch.equal(out.codes.vals, expected.codes.vals)
    assert torch.equal(out.losses["mse"], expected.loss)
    assert torch.equal(
        ops.encode(x * 0.7, plain.W_enc, plain.b_enc, plain.b_dec, k=K)[1], out.codes.idx
    )
