"""Selection rules: TopK, and a rule of one's own that no file of fastsae knows."""

import json
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastsae import SAE, Codes, SAEConfig, Selection, TopK, ops
from fastsae.data import open_source
from fastsae.selection import Call, Selected, State
from fastsae.train import TrainConfig, Trainer, evaluate

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


@dataclass(frozen=True)
class Above(Selection):
    """The latents above a threshold, as many as there are: codes with row_ptr.

    With `keep_zeros`, each token also stores latent 0, with value 0 where it is not above: what a
    rule with a straight-through gradient needs.
    """

    name: ClassVar[str] = "above"
    threshold: float
    keep_zeros: bool = False

    def check(self, d_sae: int) -> None:
        if d_sae < 2:
            raise ValueError(f"above: expected at least 2 latents, got {d_sae}")

    def select(self, call: Call) -> Selected:
        vals, idx = ops.encode(*call.encoder, k=len(call.W_enc), **call.options)
        vals = vals * (vals > self.threshold)
        kept = vals > 0
        if self.keep_zeros:
            kept |= idx == 0
        row_ptr = torch.zeros(len(idx) + 1, dtype=torch.int64)
        row_ptr[1:] = kept.sum(1).cumsum(0)
        return Selected(Codes(vals[kept], idx[kept], len(call.W_enc), row_ptr))


def tokens(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def encoded(rule: Selection, x: Tensor, W: Tensor, *biases: Tensor | None, backend: str) -> Codes:
    state = State(rule.state(x.shape[1], len(W)))
    codes = rule.select(Call(x, W, *(biases or (None, None)), W, state, backend=backend)).codes
    assert codes is not None
    return codes


# ---- TopK ----


@pytest.mark.parametrize("k", [0, -3, True, 2.0, "2", None], ids=repr)
def test_topk_refuses(k: Any) -> None:
    with pytest.raises(ValueError, match=f"k: expected an integer of at least 1, got {k!r}"):
        TopK(k)


def test_topk_needs_as_many_latents() -> None:
    assert SAEConfig(d_in=4, d_sae=8, selection=TopK(8)).selection == TopK(8)
    with pytest.raises(ValueError, match="k: expected at most d_sae = 8, got 9"):
        SAEConfig(d_in=4, d_sae=8, selection=TopK(9))


def test_topk_is_frozen_and_equal_by_value() -> None:
    assert TopK(3) == TopK(3) != TopK(4)
    with pytest.raises(FrozenInstanceError):
        TopK(3).k = 4  # type: ignore[misc]


@pytest.mark.parametrize(("factor", "d_sae", "k"), [(4, 100, 12), (4, 12, 12), (4, 7, 7)])
def test_topk_widened_stays_within_the_latents(factor: int, d_sae: int, k: int) -> None:
    assert TopK(3).widened(factor, d_sae) == TopK(k)


@BACKENDS
def test_topk_is_a_full_sort(backend: str) -> None:
    # Small integers: exact in float32 in any order, and full of ties.
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-2, 3, (n, 5), generator=generator).float() for n in (40, 33))
    b, c = torch.randint(-12, 0, (33,), generator=generator).float(), torch.ones(5)
    codes = encoded(TopK(6), x, W, b, c, backend=backend).validate()
    h = ((x - 1) @ W.T + b).tolist()
    for n, row in enumerate(h):
        best = sorted((i for i in range(33) if row[i] > 0), key=lambda i: (-row[i], i))[:6]
        assert codes.idx[n].tolist() == best + [-1] * (6 - len(best))
        assert codes.vals[n].tolist() == [row[i] for i in best] + [0.0] * (6 - len(best))
    ties = (codes.vals.diff(dim=1) == 0) & (codes.idx[:, 1:] >= 0)
    assert (codes.idx < 0).any() and (codes.idx >= 0).all(1).any() and ties.any()


@BACKENDS
def test_topk_treats_each_token_alone(backend: str) -> None:
    x, W = tokens(50, 24), tokens(64, 24, seed=1)
    codes = encoded(TopK(5), x, W, backend=backend)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    permuted = encoded(TopK(5), x[order], W, backend=backend)
    assert torch.equal(permuted.idx, codes.idx[order])
    # The C++ backend promises bits that no batch changes; a matrix product of torch does not.
    atol = 0 if backend == "cpu" else 1e-5
    torch.testing.assert_close(permuted.vals, codes.vals[order], rtol=0, atol=atol)


# ---- plain data ----


@pytest.mark.parametrize("rule", [TopK(7), Above(0.25), Above(1.0, keep_zeros=True)], ids=repr)
def test_rules_survive_json(rule: Selection) -> None:
    data = json.loads(json.dumps(rule.to_dict()))
    assert data["name"] == rule.name
    again = Selection.from_dict(data)
    assert again == rule and type(again) is type(rule)


def test_from_dict_leaves_its_argument_as_it_is() -> None:
    data = {"name": "topk", "k": 3}
    Selection.from_dict(data)
    assert data == {"name": "topk", "k": 3}


UNKNOWN = {
    "name": ({"name": "bottomk", "k": 3}, "expected one of .*topk.*, got 'bottomk'"),
    "no-name": ({"k": 3}, "expected one of .*topk.*, got None"),
    "parameter": ({"name": "topk", "k": 3, "j": 4}, "selection topk: .*'j'"),
    "no-parameter": ({"name": "topk"}, "selection topk: .*'k'"),
    "value": ({"name": "topk", "k": 0}, "k: expected an integer of at least 1, got 0"),
}


@pytest.mark.parametrize(("data", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_from_dict_refuses_what_it_does_not_know(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection.from_dict(data)


# ---- a rule of one's own ----


def dense_above(
    sae: SAE, x: Tensor, threshold: float
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """z, loss and the gradients of an SAE with `Above`, dense and in float64."""
    p = {name: t.detach().double().requires_grad_() for name, t in sae.named_parameters()}
    x = x.double().requires_grad_()
    h = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    z = h * (h > threshold)
    loss = (x - z @ p["W_dec"] - p["b_dec"]).square().mean()
    loss.backward()
    assert x.grad is not None
    grads = {name: t.grad for name, t in p.items() if t.grad is not None}
    return z.detach(), loss.detach(), grads, x.grad


def own_sae(rule: Selection, **settings: Any) -> SAE:
    sae = SAE(SAEConfig(d_in=16, d_sae=40, selection=rule, **settings), seed=3)
    with torch.no_grad():
        assert sae.b_enc is not None
        sae.b_enc.copy_(tokens(1, 40, seed=4)[0] * 0.1)
        sae.b_dec.copy_(tokens(1, 16, seed=5)[0] * 0.1)
    return sae


@BACKENDS
@pytest.mark.parametrize("keep_zeros", [False, True], ids=["nonzeros", "stored-zeros"])
def test_own_rule_in_an_sae(backend: str, keep_zeros: bool) -> None:
    sae = own_sae(Above(0.9, keep_zeros))
    sae.backend = backend
    x = tokens(30, 16).requires_grad_()
    out = sae(x.reshape(5, 6, 16))
    out.loss.backward()
    z, loss, grads, dx = dense_above(sae, x.detach(), 0.9)
    codes = out.codes.validate()
    lengths = codes.row_ptr.diff()
    assert lengths.min() < lengths.max()  # it does vary
    assert torch.equal(codes.to_dense() != 0, z != 0)
    assert torch.equal(codes.l0(), (z != 0).sum(1))
    assert float(out.metrics["l0"]) == pytest.approx(float((z != 0).sum()) / 30)
    torch.testing.assert_close(out.loss.detach().double(), loss, rtol=1e-6, atol=0)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad.double(), grads[name], rtol=1e-5, atol=1e-7, msg=name)
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-7)
    expected = z @ sae.W_dec.detach().double() + sae.b_dec.detach().double()
    got = out.reconstruction.detach().double()
    torch.testing.assert_close(got.reshape(30, 16), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.decode(codes).double(), expected, rtol=1e-5, atol=1e-6)


def test_stored_zeros_do_not_fire() -> None:
    sae = own_sae(Above(0.9, keep_zeros=True))
    x = tokens(30, 16)
    codes = sae.encode(x)
    stored = int((codes.idx == 0).sum())
    active = int(((codes.idx == 0) & (codes.vals != 0)).sum())
    assert 0 < active < stored
    # On these tokens latent 0 is stored, and never with another value than 0.
    below = [n for n in range(30) if 0 in codes[n].idx and codes[n].firing_counts()[0] == 0]
    sae.train()(x[below])
    assert int(sae.tokens_since_fired[0]) == len(below)
    fired = sae.encode(x[below]).firing_counts() > 0
    assert fired.any()
    assert torch.equal(sae.tokens_since_fired, torch.where(fired, 0, len(below)))


def test_own_rule_with_auxk_trains_and_is_saved(tmp_path: Any) -> None:
    rows = tokens(256, 16)
    config = SAEConfig(d_in=16, d_sae=40, selection=Above(0.9), dead_after=64)
    assert SAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    sae = SAE(config)
    source = open_source(rows)
    before = evaluate(sae, source)
    losses: list[float] = []
    Trainer(sae, source, TrainConfig(steps=60, batch_size=64, lr=5e-3), out=tmp_path).run(
        progress=False, on_step=lambda _, out: losses.append(float(out.losses["mse"].detach()))
    )
    assert losses[-1] < 0.8 * losses[0]
    assert evaluate(sae, source)["fvu"] < 0.8 * before["fvu"]
    again = SAE.load(tmp_path)
    assert again.config.selection == Above(0.9)
    assert evaluate(again, source) == evaluate(sae, source)


def test_own_rule_checks_the_latents() -> None:
    with pytest.raises(ValueError, match="above: expected at least 2 latents, got 1"):
        SAEConfig(d_in=4, d_sae=1, selection=Above(1.0))


def test_multi_topk_is_for_topk() -> None:
    with pytest.raises(ValueError, match="multi_topk_coef: expected a TopK selection with it"):
        SAEConfig(d_in=4, d_sae=8, selection=Above(1.0), multi_topk_coef=0.125)


# ---- names ----


def test_a_rule_needs_a_name_of_its_own() -> None:
    with pytest.raises(TypeError, match="Nameless: expected a name of its own, got None"):

        class Nameless(Selection):
            pass

    # Inheriting the name would quietly replace TopK wherever a file says "topk".
    with pytest.raises(TypeError, match="Better: expected a name of its own, got None"):

        class Better(TopK):
            pass

    with pytest.raises(TypeError, match=r"Thief: expected a new name, got that of .*: 'topk'"):

        class Thief(Selection):
            name = "topk"

    assert Selection.rules["topk"] is TopK


def test_a_rule_may_be_defined_again() -> None:
    # As a notebook does when its cell is run twice; also what dataclass(slots=True) does.
    made = []
    for default in (1.0, 2.0):

        @dataclass(frozen=True)
        class Again(Selection):
            name: ClassVar[str] = "again"
            level: float = default

        made.append(Again)
    assert Selection.rules["again"] is made[1]
    assert Selection.from_dict({"name": "again"}).to_dict() == {"name": "again", "level": 2.0}
    del Selection.rules["again"]


def test_the_interface_alone_does_not_encode() -> None:
    with pytest.raises(NotImplementedError):
        encoded(Selection(), tokens(2, 3), tokens(4, 3), backend="reference")
