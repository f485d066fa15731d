"""Steering against its formulas, written out in float64; hooks; concepts; what is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import NAN, name_of, randn, refusals
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae import SAE, SAEConfig, TopK
from fastsae.selection import BatchTopK, JumpReLU, ReLU, Selection
from fastsae.sites import find_module, output_of
from fastsae.steering import (
    ablate,
    activations,
    add,
    clamp,
    concept,
    contrast,
    directions,
    steered,
    toward,
)

D, F, K = 12, 40, 5
DOCS = Path(__file__).parent.parent / "docs"


def sae_of(rule: Selection | None = None, dtype: torch.dtype = torch.float32, **options) -> SAE:
    sae = SAE(SAEConfig(D, F, rule or TopK(K), decoder_norm="free", **options), seed=1)
    with torch.no_grad():
        sae.W_enc.copy_(randn(F, D, seed=2))
        sae.W_dec.mul_(1 + randn(F, seed=3).abs()[:, None])
        if sae.b_enc is not None:
            sae.b_enc.copy_(0.3 * randn(F, seed=4))
        sae.b_dec.copy_(randn(D, seed=5))
        sae.input_scale.fill_(0.5)
    return sae.to(dtype).eval()


def h_by_hand(sae: SAE, x: Tensor) -> Tensor:
    h = (x.double() * sae.input_scale.double() - sae.b_dec.double()) @ sae.W_enc.double().T
    return h if sae.b_enc is None else h + sae.b_enc.double()


def z_by_hand(sae: SAE, x: Tensor) -> Tensor:
    """The codes of TopK, (…, F) in float64."""
    h = h_by_hand(sae, x).relu()
    kept = h.topk(K, dim=-1)
    return torch.zeros_like(h).scatter(-1, kept.indices, kept.values)


def units_by_hand(sae: SAE) -> Tensor:
    return sae.W_dec.double() / sae.input_scale.double()


class Returns(nn.Module):
    """A module that returns its input, or a tuple that begins with it."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str]:
        return (x, "more") if self.as_tuple else x


def through(x: Tensor, *changes: Callable[[Tensor], Tensor], as_tuple: bool = False, **options):
    module = Returns(as_tuple)
    with torch.no_grad(), steered(module, *changes, **options):
        out = module(x)
    assert module(x) is x or module(x)[0] is x
    if as_tuple:
        out, more = out
        assert more == "more"
    return out


# ---- against the formulas ----

SHAPES = pytest.mark.parametrize("shape", [(7, D), (2, 5, D), (D,)], ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@SHAPES
@DTYPES
@pytest.mark.parametrize("as_tuple", [False, True])
def test_changes_are_the_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, as_tuple: bool
) -> None:
    sae = sae_of(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = randn(*shape, seed=6).to(dtype)
    z, d = z_by_hand(sae, x), units_by_hand(sae)
    latents = [*z.reshape(-1, F).sum(0).topk(2).indices.tolist(), 3]
    v = torch.tensor([2.0, -1.0, 0.25], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    expected = {
        "add": (add(sae, latents, v.tolist()), v),
        "ablate": (ablate(sae, latents), zeros - z[..., latents]),
        "clamp": (clamp(sae, latents, v.tolist()), v - z[..., latents]),
    }
    assert (z[..., latents] != 0).any()
    for change, coefficients in expected.values():
        out = through(x, change, as_tuple=as_tuple)
        assert out.dtype == dtype and out.shape == x.shape
        right = x.double() + coefficients @ d[latents]
        error = (out.double() - right).abs().max() / right.abs().max()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_what_is_clamped_to_its_own_value_keeps_every_bit(dtype: torch.dtype) -> None:
    sae, x = sae_of(), randn(3, 7, D, seed=7).to(dtype)
    latents = list(range(0, F, 3))
    own = activations(sae, x, latents)
    assert own.shape == (3, 7, len(latents)) and (own != 0).float().mean() > 0.1
    assert torch.equal(through(x, clamp(sae, latents, own)), x)
    idle = [i for i in range(F) if not activations(sae, x, [i]).any()]
    if idle:
        assert torch.equal(through(x, ablate(sae, idle)), x)
    assert torch.equal(through(x, add(sae, latents, 0.0)), x)


@pytest.mark.parametrize(
    "rule",
    [TopK(K), BatchTopK(K), JumpReLU(), ReLU()],
    ids=lambda rule: rule.name,
)
def test_clamp_keeps_the_error_of_the_sae(rule: Selection) -> None:
    """It is x + (x̂' − x̂), for the codes of any rule at inference, also of a module in training."""
    sae, x = sae_of(rule).train(), randn(9, D, seed=8)
    with torch.no_grad():
        codes = sae.encode(x, training=False)
    dense, latents = codes.to_dense().double(), [1, 8, 21, 30]
    assert torch.equal(activations(sae, x, latents), codes.to_dense()[:, latents])
    changed = dense.clone()
    changed[:, latents] = 1.5
    right = x.double() + (changed - dense) @ units_by_hand(sae)
    out = through(x, clamp(sae, latents, 1.5))
    torch.testing.assert_close(out.double(), right.detach(), rtol=1e-5, atol=1e-5)


def test_what_was_taken_out_can_be_added_back() -> None:
    sae, x = sae_of(), randn(D, seed=9)
    latents = z_by_hand(sae, x).topk(2).indices
    own = activations(sae, x, latents)
    assert own.all()
    without = through(x, ablate(sae, latents))
    assert (without - x).abs().max() > 0.1
    back = through(without, add(sae, latents, own.tolist()))
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)
    in_one = through(x, ablate(sae, latents), add(sae, latents, own.tolist()))
    assert torch.equal(in_one, back)


def test_each_latent_has_its_own_strength_and_an_integer_tensor_will_do() -> None:
    sae, x = sae_of(), randn(4, D)
    both = through(x, add(sae, torch.tensor([7, 2]), torch.tensor([3.0, -0.5])))
    one_by_one = through(x, add(sae, [7], 3.0), add(sae, [2], -0.5))
    torch.testing.assert_close(both, one_by_one)
    shift = through(x, add(sae, [7, 2], 2.0)) - x
    torch.testing.assert_close(shift, 2 * directions(sae, [7, 2]).sum(0).expand_as(x))
    assert directions(sae, [7]).dtype == torch.float32


# ---- where ----


@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        (slice(1, None), [0]),
        (slice(0, 4, 2), [1, 3, 4]),
        ([0, -1], [1, 2, 3]),
        (torch.tensor([True, False, False, True, False]), [1, 2, 4]),
    ],
    ids=["slice", "stride", "list", "mask"],
)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["rows", "batch"])
def test_chosen_positions(positions, kept: list[int], batch: tuple[int, ...]) -> None:
    sae, x = sae_of(), randn(*batch, 5, D)
    before = x.clone()
    latents = z_by_hand(sae, x).reshape(-1, F).sum(0).topk(3).indices
    everywhere = through(x, ablate(sae, latents))
    out = through(x, ablate(sae, latents), positions=positions)
    changed = [i for i in range(5) if i not in kept]
    assert torch.equal(out[..., kept, :], x[..., kept, :])
    assert torch.equal(out[..., changed, :], everywhere[..., changed, :])
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "positions", [slice(5, None), torch.zeros(5).bool()], ids=["slice", "mask"]
)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["rows", "batch"])
def test_no_position(positions, batch: tuple[int, ...]) -> None:
    """As behind the first of a prompt of one token."""
    sae, x = sae_of(), randn(*batch, 5, D)
    for change in (ablate(sae, [1]), clamp(sae, [1, 2], 3.0), toward(randn(D))):
        assert torch.equal(through(x, change, positions=positions), x)


def test_a_direction_for_each_position() -> None:
    x, direction = randn(2, 5, D), randn(5, D, seed=1)
    assert torch.equal(through(x, toward(direction, -2.0)), x - 2 * direction)
    some = through(x, toward(direction[1:3]), positions=slice(1, 3))
    assert torch.equal(some[:, 1:3], x[:, 1:3] + direction[1:3])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@torch.no_grad()
def test_several_sites_and_steers_within_steers() -> None:
    net, sae, x = Stack(), sae_of(), randn(6, D)
    a, b, c = (randn(D, seed=seed) for seed in (1, 2, 3))
    first, _, last = net.layers
    plain = net(x)
    with steered(first, toward(a)), steered(last, toward(b)):
        two = net(x)
        with steered(last, ablate(sae, [4, 5]), toward(c)):
            three = net(x)
        assert torch.equal(net(x), two)
    assert torch.equal(net(x), plain)

    hidden = torch.tanh(net.layers[1](torch.tanh(first(x) + a)))
    at_last = last(hidden) + b
    assert torch.equal(two, torch.tanh(at_last))
    z = activations(sae, at_last, [4, 5])
    torch.testing.assert_close(three, torch.tanh(at_last - z @ directions(sae, [4, 5]) + c))
    with steered(first):
        assert torch.equal(net(x), plain)


@torch.no_grad()
def test_other_hooks_see_what_takes_the_place() -> None:
    """As those of transformers, which are there from the first run that kept hidden states."""
    net, x, a, b = nn.Identity(), randn(6, D), randn(D, seed=1), randn(D, seed=2)
    seen: list[Tensor] = []
    net.register_forward_hook(lambda module, args, output: seen.append(output))
    with steered(net, toward(a)), steered(net, toward(b)):
        assert torch.equal(net(x), x + a + b)
    net(x)
    assert torch.equal(seen[0], x + a + b) and torch.equal(seen[1], x)
    first, second = steered(net, toward(a)), steered(net, toward(b))
    with first:
        second.__enter__()
    assert torch.equal(net(x), x + b)
    second.__exit__(None, None, None)
    assert torch.equal(net(x), x) and len(net._forward_hooks) == 1


def test_hooks_are_gone_after_an_exception() -> None:
    net, sae, x = Stack(), sae_of(), randn(6, D)
    plain = net(x)
    for inner in (ablate(sae, [1]), toward(randn(D + 1))):
        with (
            pytest.raises((ValueError, KeyError)),
            steered(net.layers[0], toward(randn(D))),
            steered(net.layers[1], inner),
        ):
            net(x)
            raise KeyError("in the middle")
        assert torch.equal(net(x), plain)
        assert not any(layer._forward_hooks for layer in net.layers)


def test_gradients_pass_through_to_what_comes_before() -> None:
    sae, x = sae_of().requires_grad_(False), randn(4, D).requires_grad_()
    module, g = Returns(), randn(4, D, seed=2)
    with steered(module, add(sae, [3], 2.0)):
        assert torch.equal(torch.autograd.grad(module(x), x, g)[0], g)
    latents = z_by_hand(sae, x.detach()).sum(0).topk(3).indices
    with steered(module, ablate(sae, latents)):
        (found,) = torch.autograd.grad(module(x), x, g)
    wide = x.detach().double().requires_grad_()
    right = wide - z_by_hand(sae, wide)[:, latents] @ units_by_hand(sae)[latents]
    (expected,) = torch.autograd.grad(right, wide, g.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


# ---- concepts ----


@pytest.mark.parametrize("rule", [TopK(K), JumpReLU()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("block", [1 << 20, 21], ids=["one block", "blocks"])
def test_the_relu_form_is_equation_5(
    rule: Selection, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsae.blocked.BLOCK", block)
    sae, x = sae_of(rule), randn(2, 3, D, seed=10)
    right = h_by_hand(sae, x).relu() @ units_by_hand(sae)
    found = concept(sae, x)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-5, atol=1e-5)
    steered_x = through(x, toward(found[0], -0.7))
    torch.testing.assert_close(steered_x, x - 0.7 * found[0])


def test_the_selection_form_keeps_k_latents_and_adds_no_bias() -> None:
    sae, x = sae_of(), randn(2, 3, D, seed=11)
    right = z_by_hand(sae, x) @ units_by_hand(sae)
    found = concept(sae, x, "selection")
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        bias = sae.b_dec / sae.input_scale
        torch.testing.assert_close(found + bias, sae(x).reconstruction)
    assert (found - concept(sae, x)).abs().max() > 0.1


def test_a_wide_dictionary_has_no_pre_activations_of_all() -> None:
    """The largest tensor made is a block, N·F being four times as large."""
    n, f = 64, 1 << 16
    sae, x, sizes = SAE(SAEConfig(4, f, TopK(2))).eval(), randn(n, 4), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Sizes():
        concept(sae, x)
        concept(sae, x, "selection")
        add(sae, *contrast(sae, x[:32], x[32:], 3))(x)
        ablate(sae, [5])(x)
    assert f * 4 <= max(sizes) <= 1 << 20 < n * f


def test_contrast_finds_what_tells_texts_apart() -> None:
    sae = sae_of(encoder_bias=False)
    with torch.no_grad():
        sae.W_dec.copy_(torch.linalg.qr(randn(F, F))[0][:, :D] + 0.2 * randn(F, D))
        sae.W_enc.copy_(sae.W_dec)
    positive, negative = randn(30, D, seed=12), randn(2, 10, D, seed=13) - 1
    means = [z_by_hand(sae, x.reshape(-1, D)).mean(0) for x in (positive, negative)]
    difference = means[0] - means[1]
    weight = difference.abs() * sae.W_dec.double().norm(dim=1)
    latents, values = contrast(sae, positive, negative, 6)
    assert latents.tolist() == weight.topk(6).indices.tolist()
    assert (values < 0).any() and (values > 0).any()
    torch.testing.assert_close(values.double(), difference[latents].detach(), rtol=1e-4, atol=1e-6)
    everything, parts = contrast(sae, positive, negative, F)
    assert len(everything) == int((difference != 0).sum()) < F
    decoded = [concept(sae, x.reshape(-1, D), "selection").mean(0) for x in (positive, negative)]
    x = randn(3, D)
    torch.testing.assert_close(
        through(x, add(sae, everything, parts)), x + decoded[0] - decoded[1], rtol=1e-4, atol=1e-5
    )
    assert len(contrast(sae, positive, positive, 3)[0]) == 0


# ---- sites ----


def test_layers_are_counted_from_one() -> None:
    block = nn.ModuleDict({"mlp": nn.Linear(D, D), "attn": nn.Linear(D, D)})
    net = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    assert find_module(net, "residual", 1) is block
    for layer, message in ((0, "layer: expected at least 1, got 0"), (2, "at most 1, got 2")):
        with pytest.raises(ValueError, match=message):
            find_module(net, "residual", layer)


def test_the_output_of_a_module_ends_the_run() -> None:
    net, x, seen = Stack(), randn(2, D), []
    handle = net.layers[2].register_forward_hook(lambda *args: seen.append(args))
    found = output_of(net.layers[1], lambda: net(x))
    assert torch.equal(found, net.layers[1](torch.tanh(net.layers[0](x)))) and not seen
    handle.remove()
    with pytest.raises(ValueError, match="expected a model that runs its Linear, got none"):
        output_of(nn.Linear(D, D), lambda: net(x))
    assert not net.layers[1]._forward_hooks


# ---- refusals ----


@refusals(
    ("make", "error", "message"),
    [
        (lambda s: add(s, [], 1.0), ValueError, r"latents: expected .* in \[0, 40\), got \[\]"),
        (lambda s: add(s, [40], 1.0), ValueError, r"got \[40\]"),
        (lambda s: ablate(s, [-1]), ValueError, r"got \[-1\]"),
        (lambda s: ablate(s, [0.5]), ValueError, r"got \[0.5\]"),
        (lambda s: ablate(s, [True]), ValueError, r"got \[True\]"),
        (lambda s: clamp(s, [3, 3], 1.0), ValueError, r"each id once, got \[3, 3\]"),
        (lambda s: clamp(s, 3, 1.0), ValueError, "latents: expected a list of ids"),
        (lambda s: add(s, [3, 4], [1.0]), ValueError, r"strengths: .* one or 2, got \[1"),
        (lambda s: add(s, [3], [[1.0], [2.0]]), ValueError, r"strengths: .*, got \(2, 1\)"),
        (lambda s: add(s, [3], NAN), ValueError, "strengths: expected finite numbers, got nan"),
        (lambda s: clamp(s, [3], [NAN]), ValueError, "values: expected finite numbers"),
        (lambda s: clamp(s, [3, 4], [1.0]), ValueError, "values: expected one or 2"),
        (lambda s: toward(randn(D), NAN), ValueError, "strength: expected a finite number"),
        (lambda s: toward(NAN * randn(D)), ValueError, "direction: expected finite values"),
        (lambda s: toward(randn(1, 2, D)), ValueError, r"\(D\) or \(L, D\), got \(1, 2, 12\)"),
        (lambda s: toward(torch.arange(D)), TypeError, "direction: expected a floating dtype"),
        (lambda s: concept(s, randn(2, D), "topk"), ValueError, "relu, selection, got 'topk'"),
        (lambda s: concept(s, randn(2, D + 1)), ValueError, r"x: expected shape \(…, 12\)"),
        (lambda s: contrast(s, randn(2, D), randn(2, D), 0), ValueError, "m: expected 1 to 40"),
        (lambda s: contrast(s, randn(2, D), randn(0, D), 1), ValueError, "negative: .* one state"),
    ],
)
def test_what_is_refused_at_once(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(sae_of())


@refusals(
    ("make", "positions", "message"),
    [
        (lambda s: add(s, [1], 1.0), None, r"x: expected shape \(…, 12\), got \(2, 5, 13\)"),
        (lambda s: ablate(s, [1]), None, r"x: expected shape \(…, 12\), got \(2, 5, 13\)"),
        (lambda s: toward(randn(4, 13)), None, r"x: expected shape \(…, 4, 13\), got \(2, 5, 13\)"),
        (lambda s: toward(randn(13)), [5], r"along dimension -2 of \(2, 5, 13\), got \[5\]"),
        (lambda s: toward(randn(13)), [0.5], r"positions: expected some"),
    ],
)
def test_what_is_refused_when_the_model_runs(make, positions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        through(randn(2, 5, 13), make(sae_of()), positions=positions)


def test_values_for_other_positions_and_transcoders_are_refused() -> None:
    sae = sae_of()
    with pytest.raises(ValueError, match=r"values: .* dimensions of \(2, 5, 1\), got \(4, 1\)"):
        through(randn(2, 5, D), clamp(sae, [1], torch.ones(4, 1)))
    with pytest.raises(ValueError, match="positions: expected some along"):
        through(randn(D), toward(randn(D)), positions=[0])
    transcoder = SAE(SAEConfig(D, F, TopK(K), d_out=7))
    for refused in (lambda: ablate(transcoder, [1]), lambda: concept(transcoder, randn(2, D))):
        with pytest.raises(ValueError, match="expected an autoencoder, got a transcoder"):
            refused()


# ---- the page ----


def test_the_page_on_steering_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "steering.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.M)[:1]
    names: dict = {}
    exec(compile(block, "steering.md", "exec"), names)
    assert torch.equal(names["unchanged"], names["plain"])
    assert not torch.equal(names["changed"], names["plain"])
