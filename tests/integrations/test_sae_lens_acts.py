"""TrainStepOutput.feature_acts and hidden_pre of an accelerated step: matrices that nobody made."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_sae_lens import F, N, batch, make, step_input
from torch import Tensor

from fastsae.codes import Codes
from fastsae.integrations.lazy import Lazy, lazy_codes
from fastsae.integrations.sae_lens import accelerate, restore


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    restore()


def outputs(kind: str = "topk") -> tuple[Any, Any, Any]:
    """The SAE, its own output and the accelerated one."""
    sae = make(kind)
    eager = sae.training_forward_pass(step_input(batch(0)))
    with accelerate():
        return sae, eager, sae.training_forward_pass(step_input(batch(0)))


CHEAP: dict[str, Callable[[Tensor], Tensor]] = {
    "fired": lambda t: t.bool().float().sum(-2).bool(),
    "counts": lambda t: t.bool().float().sum(0),
    "l0": lambda t: t.bool().float().sum(-1).to_dense().mean(),
    "sum": lambda t: t.detach().sum(1),
    "half": lambda t: t.to(torch.bfloat16).float().sum(-1),
}
DENSE: dict[str, Callable[[Tensor], Any]] = {
    "above": lambda t: t > 0,
    "masked": lambda t: t[t > 0].min(),
    "columns": lambda t: t[:, 3:77],
    "row": lambda t: t[5],
    "product": lambda t: t @ torch.ones(F, 3),
    "scaled": lambda t: 2 * t + 1,
    "integers": lambda t: t.int().sum(0),
    "kept": lambda t: t.sum(0, keepdim=True),
    "all": lambda t: t.sum(),
    "norm": lambda t: t.norm(p=1, dim=-1),
    "topk": lambda t: t.topk(3).values,
    "nonzero": lambda t: t.nonzero(),
    "numpy": lambda t: torch.from_numpy(t.detach().cpu().numpy()),
    "list": lambda t: torch.tensor(t[0].tolist()),
    "list of all": lambda t: torch.tensor(t.detach().tolist()),
    "view": lambda t: t.view(-1),
    "iterated": lambda t: torch.stack(list(t)),
    "stacked": lambda t: torch.cat([t, t]),
    "transposed": lambda t: t.T.contiguous(),
    "copied": lambda t: copy.deepcopy(t.detach()),
    "data": lambda t: t.data + 0,
    "double": lambda t: t.double().sum(0),
    "vmapped": lambda t: torch.func.vmap(lambda row: row.max())(t.detach().clone()),
}


@pytest.mark.parametrize("name", CHEAP)
def test_counting_makes_no_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, eager, fast = outputs()
    monkeypatch.setattr(Lazy, "matrix", None)
    got, expected = CHEAP[name](fast.feature_acts), CHEAP[name](eager.feature_acts)
    assert type(got) is Tensor and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("which", ["feature_acts", "hidden_pre"])
@pytest.mark.parametrize("name", [*CHEAP, *DENSE])
def test_is_the_matrix(name: str, which: str) -> None:
    _, eager, fast = outputs()
    operation = (CHEAP | DENSE)[name]
    got, expected = getattr(fast, which), getattr(eager, which)
    assert isinstance(got, Lazy) and isinstance(got, Tensor)
    for attribute in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_sparse"):
        assert getattr(got, attribute) == getattr(expected, attribute)
    assert len(got) == len(expected) and got.numel() == expected.numel() and not got.is_leaf
    for _ in range(2):  # also once it is made
        torch.testing.assert_close(operation(got), operation(expected), atol=1e-5, rtol=1e-5)


def test_can_be_written_to() -> None:
    sae, eager, fast = outputs("batchtopk")
    found = []
    for out in (eager, fast):
        acts = out.feature_acts.detach()
        acts[:, 3] = 2.0
        acts.mul_(2)
        acts.select(0, 4).zero_()
        with torch.no_grad():
            sae.update_topk_threshold(acts)
        found.append((acts.clone(), acts.bool().float().sum(0), out.feature_acts + 0))
    torch.testing.assert_close(found[1], found[0])
    with accelerate():
        torch.testing.assert_close(
            sae.decode(fast.feature_acts), sae.decode(eager.feature_acts), atol=1e-5, rtol=1e-5
        )


def test_what_is_stored_is_plain() -> None:
    _, eager, fast = outputs()
    file = io.BytesIO()
    torch.save({"acts": fast.feature_acts.detach()}, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file)["acts"], eager.feature_acts.detach())
    assert "tensor(" in repr(fast.feature_acts)
    with pytest.raises(RuntimeError, match="detach"):
        fast.feature_acts.numpy()


def test_gradients_reach_the_parameters_through_it() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            ctx.save_for_backward(t)
            return t * t

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

    found = []
    sae, eager, fast = outputs()
    for out in (eager, fast):
        sae.zero_grad()
        loss = Square.apply(out.feature_acts).mean() + Square.apply(out.hidden_pre).sin().mean()
        (loss + out.feature_acts[:, ::7].sum()).backward()
        found.append({name: p.grad.clone() for name, p in sae.named_parameters()})
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_watching_its_gradient_is_refused() -> None:
    _, _, fast = outputs()
    for watch in (fast.feature_acts.retain_grad, lambda: fast.hidden_pre.register_hook(print)):
        with pytest.raises(RuntimeError, match="hook_sae_acts_post"):
            watch()


@pytest.mark.parametrize("of", [lambda p: p, lambda p: p.data], ids=["parameter", "data"])
def test_stays_what_it_was_after_the_update(of: Callable[[Tensor], Tensor]) -> None:
    sae, eager, fast = outputs()
    expected = eager.feature_acts.clone(), eager.hidden_pre.clone()
    with torch.no_grad():
        for p in sae.parameters():
            of(p).add_(1)
    got = fast.feature_acts.clone(), fast.hidden_pre.clone()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_padding_is_nothing() -> None:
    idx = torch.tensor([[0, 2, -1], [-1, -1, -1]], dtype=torch.int32)
    acts = lazy_codes(Codes(torch.tensor([[1.0, 2, 0], [0, 0, 0]]), idx, 4), torch.Size([2, 4]))
    assert acts.bool().float().sum(0).tolist() == [1, 0, 1, 0]
    assert acts.sum(-1).tolist() == [3, 0]
    assert acts.tolist() == [[1, 0, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_sums_of_16_bits_are_rounded_once(dtype: torch.dtype, dim: int) -> None:
    """As torch's: one by one, in 16 bits, a count ends at 256 or 2048."""
    vals = torch.rand(3000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    idx = torch.zeros(3000, 1, dtype=torch.int32)
    if dim:
        vals, idx = vals.T, torch.arange(3000, dtype=torch.int32)[None]
    codes = Codes(vals, idx, 3000 if dim else 1)
    acts = lazy_codes(codes, torch.Size([1, 3000] if dim else [3000, 1]))
    dense = codes.to_dense()
    for kind in (lambda t: t.bool().to(dtype), lambda t: t.to(dtype)):
        got, expected = kind(acts).sum(dim), kind(dense).sum(dim)
        assert got.dtype == dtype and float(expected.max()) > 2500
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(acts.sum(dim, dtype=dtype), dense.sum(dim, dtype=dtype))


def test_three_dimensions() -> None:
    codes = Codes(torch.ones(6, 1), torch.arange(6, dtype=torch.int32)[:, None], 6)
    acts = lazy_codes(codes, torch.Size([2, 3, 6]))
    dense = torch.eye(6).view(2, 3, 6)
    for dim in (0, 1, 2, -1, -2):
        assert torch.equal(acts.detach().sum(dim), dense.sum(dim))


def test_a_batch_of_no_tokens_and_of_few() -> None:
    sae = make("topk")
    for n in (0, 1, N - 50):
        x = batch(0, n)
        expected = sae.training_forward_pass(step_input(x))
        with accelerate():
            got = sae.training_forward_pass(step_input(x))
        assert got.feature_acts.shape == expected.feature_acts.shape
        torch.testing.assert_close(got.loss, expected.loss, equal_nan=True)
