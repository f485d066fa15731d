"""Direct logit effects against a dense float64 product, on models made by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import randn
from torch import Tensor, nn

from fastsae import logits
from fastsae.logits import folded_unembedding, logit_effects
from fastsae.models import LanguageModel

D, V = 6, 50


class GemmaNorm(nn.Module):
    """RMSNorm whose stored weight is the scale less 1."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Causal(nn.Module):
    """Embedding, a norm of a block that nothing reads, a final norm and a head."""

    def __init__(self, norm: nn.Module, d: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.final = nn.Embedding(V, d), nn.LayerNorm(d), norm
        self.head = nn.Linear(d, V, bias=False)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        assert not use_cache
        x = self.embed(input_ids)
        x = x + self.inner(x)
        return SimpleNamespace(logits=self.head(self.final(x)[:, -1:]))

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head


def model(net: nn.Module, causal: bool = True) -> LanguageModel:
    return LanguageModel("tiny", net.eval().requires_grad_(False), None, causal, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, GemmaNorm])
@pytest.mark.parametrize("d", [6, 7])
def test_the_scale_of_the_final_norm_is_folded_in(kind: Any, d: int, dtype: torch.dtype) -> None:
    net = Causal(kind(d), d).to(dtype)
    scale = net.final.weight.double() + (kind is GemmaNorm)
    expected = net.head.weight.double() * scale
    found = folded_unembedding(model(net))
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effects_are_those_of_the_dense_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "_BLOCK_ROWS", 7)  # several blocks
    U, W_dec = randn(V, D), randn(40, D, seed=1).to(dtype).requires_grad_()
    dense = W_dec.double().detach() @ U.double().T
    both = logit_effects(U, W_dec, 5)
    for found, largest in zip(both, (True, False), strict=True):
        expected = dense.topk(5, largest=largest)
        assert torch.equal(found.ids.long(), expected.indices)
        torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-5, atol=1e-6)
        assert found.ids.dtype == torch.int32 and found.values.dtype == torch.float32


def test_only_effects_of_the_sign_count_and_ties_go_by_id() -> None:
    U = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [0, 5], [2, 0]])
    promoted, suppressed = logit_effects(U, torch.tensor([[3.0, 0], [0, 0], [-1, 0]]), 4)
    assert promoted.ids.tolist() == [[1, 4, 0, -1], [-1] * 4, [2, -1, -1, -1]]
    assert promoted.values.tolist() == [[6, 6, 3, 0], [0] * 4, [1, 0, 0, 0]]
    assert suppressed.ids.tolist() == [[2, -1, -1, -1], [-1] * 4, [1, 4, 0, -1]]
    assert suppressed.values.tolist() == [[-3, 0, 0, 0], [0] * 4, [-2, -2, -1, 0]]
    everything, _ = logit_effects(U, torch.ones(1, 2), 99)
    assert everything.ids.tolist() == [[3, 1, 4, 0, -1]]


def test_an_effect_is_the_slope_of_the_logit_where_the_norm_divides_by_one() -> None:
    """What the name says: for an RMSNorm at a point of RMS 1, along directions that keep it."""
    net = Causal(nn.RMSNorm(D, eps=0.0))
    at = torch.tensor([1.0, -1, 1, -1, 1, -1])
    directions = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 2, 2, 3, 3]])
    folded = folded_unembedding(model(net))
    for d in directions:
        _, slope = torch.autograd.functional.jvp(lambda x: net.head(net.final(x)), at, d)
        torch.testing.assert_close(folded @ d, slope)


class Headless(Causal):
    def get_output_embeddings(self) -> None:
        return None


class Normless(Causal):
    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        x = self.final(self.embed(input_ids))
        return SimpleNamespace(logits=self.head(self.embed(input_ids) + x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (model(Causal(nn.LayerNorm(D)), causal=False), "tiny: expected a causal language model"),
        (model(Headless(nn.LayerNorm(D))), r"get_output_embeddings\(\), got NoneType"),
        (model(nn.Linear(D, D)), r"get_output_embeddings\(\), got NoneType"),
        (model(Normless(nn.LayerNorm(D))), "reads the output of a norm, got none among the 2"),
    ],
)
def test_models_without_what_is_needed(given: LanguageModel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folded_unembedding(given)


def test_refused() -> None:
    U = randn(V, D)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        logit_effects(U, U, 0)
    with pytest.raises(ValueError, match=r"expected shape \(rows, 6\), .* got \(50, 5\)"):
        logit_effects(U, U[:, :5], 3)
    with pytest.raises(ValueError, match="finite"):
        logit_effects(U, U.log(), 3)
