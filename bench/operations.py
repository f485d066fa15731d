"""The operations of a training step as several libraries of kernels do them, each with a gate.

An operation is what `providers` compute, each from the same inputs; `check` raises AssertionError
for a result that is not the float64 one, of which it computes some tokens or latents. Providers:
fastsae's backends, and torch as users write it: dense (products and masks over all F latents),
sparse (topk, then embedding_bag, sparse.mm or index_add_ on the chosen ones) and compiled (the
dense form under torch.compile).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from limits import Cost
from measure import Shape
from problem import ROTATED, Op, Problem, Run, close
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastsae.ops import RowGradient
from fastsae.ops.backend import kernel_of

SAMPLED = 16  # tokens or latents that a check computes in float64


class Operations:
    """The operations at a shape, one after the other, so that each one's memory is given back."""

    def __init__(self, shape: Shape, device: torch.device, backends: list[str]) -> None:
        self.shape, self.device, self.backends = shape, device, backends
        self.problems = [Problem(shape, device, seed) for seed in range(ROTATED)]
        self.first = self.problems[0]

    def makers(self) -> dict[str, Callable[[], Op]]:
        return {
            "encode": self.encode,
            "encode, one token": lambda: self.encode(one=True),
            "select": self.select,
            "decode": self.decode,
            "decode, loss, dvals": self.decode_error,
            "inverse index": self.index,
            "row gradients": self.rows,
            "gradient + Adam": lambda: self.adam(lazy=False),
            "gradient + lazy Adam": lambda: self.adam(lazy=True),
        }

    def __iter__(self) -> Iterator[Op]:
        for make in self.makers().values():
            yield make()

    def ours(self, stem: str, name: str, call: Callable[[Any, Problem], Any]) -> dict[str, Run]:
        """The backends' providers: `call` is given the backend's function and a problem."""
        found: dict[str, Run] = {}
        for backend in self.backends:
            kernel = kernel_of(backend, stem, name)
            found[f"fastsae {backend}"] = self.rotated(lambda p, kernel=kernel: call(kernel, p))
        return found

    def rotated(self, call: Callable[..., Any]) -> Run:
        return lambda i: call(self.problems[i % ROTATED])

    def rotated_with(self, made: list[Tensor], call: Callable[..., Any]) -> Run:
        """`call` on a problem and what was made of it beforehand."""
        return lambda i: call(self.problems[i % ROTATED], made[i % ROTATED])

    @functools.cached_property
    def dense(self) -> list[Tensor]:
        return [p.dense_codes() for p in self.problems]

    @functools.cached_property
    def ids(self) -> list[Tensor]:
        return [p.idx.long() for p in self.problems]

    # ---- the encoder ----

    def encode(self, one: bool = False) -> Op:
        n, d, f, k = self.shape
        rows = 1 if one else n

        def dense(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            top = torch.relu(torch.addmm(b, x, W.T)).topk(k)
            return top.values, top.indices

        compiled = torch.compile(dense, dynamic=False)
        ours = self.ours("encode", "encode", lambda fn, p: fn(p.x[:rows], p.W, p.b, k))
        if not one:
            exact = self.ours("encode", "encode", lambda fn, p: fn(p.x, p.W, p.b, k, None, "fp32"))
            ours |= {
                f"{name}, fp32 screen": run for name, run in exact.items() if "ref" not in name
            }
        providers = {
            **ours,
            "torch dense": self.rotated(lambda p: dense(p.x[:rows], p.W, p.b)),
            "torch compiled": self.rotated(lambda p: compiled(p.x[:rows], p.W, p.b)),
        }
        cost = Cost(2 * rows * d * f, "bf16", 4 * (f * d + rows * d + 2 * rows * k))
        note = "products in bf16, then fp32 dot products of what can be selected"
        if one:
            note = "reading W_enc once, in fp32"
        return Op("encode, one token" if one else "encode", providers, self.check_codes, cost, note)

    def check_codes(self, found: tuple[Tensor, Tensor]) -> None:
        p, k = self.first, self.shape[3]
        vals, idx = found[0].double(), found[1].long()
        rows = self.sample(len(vals))
        vals, idx = vals[rows], idx[rows]
        h = p.x[rows].double() @ p.W.double().T + p.b.double()
        expected = h.topk(k).values.clamp(min=0)
        own = h.gather(1, idx.clamp(min=0)).where((idx >= 0) & (vals > 0), 0.0)
        close(vals, expected)
        close(vals, own)

    def select(self) -> Op:
        """Of pre-activations that are there already: what torch pays after its product."""
        h = [p.x @ p.W.T + p.b for p in self.problems]
        k = self.shape[3]

        def topk(i: int) -> tuple[Tensor, Tensor]:
            top = torch.relu(h[i % ROTATED]).topk(k)
            return top.values, top.indices

        n, _, f, _ = self.shape
        note = "fastsae has no such pass: it selects from each tile of the product while it is hot"
        return Op("select", {"torch dense": topk}, self.check_codes, Cost(moved=4 * n * f), note)

    # ---- the decoder ----

    def decode(self) -> Op:
        n, d, _, k = self.shape
        providers = {
            **self.ours("decode", "decode_fwd", lambda fn, p: fn(p.vals, p.idx, p.W)),
            "torch dense": self.rotated_with(self.dense, lambda p, z: z @ p.W),
            "torch embedding_bag": self.rotated_with(
                self.ids,
                lambda p, idx: embedding_bag(idx, p.W, per_sample_weights=p.vals, mode="sum"),
            ),
            "torch sparse.mm": self.rotated_with(
                [p.sparse_codes() for p in self.problems], lambda p, z: torch.sparse.mm(z, p.W)
            ),
        }
        rows = self.sample(n)

        def check(found: Tensor) -> None:
            close(found[rows].double(), self.expected_decode(rows))

        moved, named = 4 * d * (self.touched() + n), 4 * d * (n * k + n)
        cost = Cost(2 * n * k * d, "fp32", moved, named)
        return Op("decode", providers, check, cost, "rows of W_dec that come from memory at random")

    def expected_decode(self, rows: Tensor) -> Tensor:
        p = self.first
        return (p.vals[rows].double()[..., None] * p.W[p.idx[rows].long()].double()).sum(1)

    def decode_error(self) -> Op:
        """x̂ - target, Σ‖·‖² and the gradient of every value of the codes."""
        n, d, _, k = self.shape

        def dense(z: Tensor, W: Tensor, idx: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            error = z @ W - target
            return error.square().sum(), error, (error @ W.T).gather(1, idx)

        compiled = torch.compile(dense, dynamic=False)

        def sparse(p: Problem, idx: Tensor) -> tuple[Tensor, ...]:
            error = embedding_bag(idx, p.W, per_sample_weights=p.vals, mode="sum") - p.g
            return error.square().sum(), error, torch.bmm(p.W[idx], error[..., None])[..., 0]

        def ours(fn: Callable[..., Any], p: Problem) -> tuple[Tensor, ...]:
            sse, error, _, dvals = fn(p.vals, p.idx, p.W, None, p.g, None, False)
            return sse, error, dvals

        def with_dense(form: Callable[..., Any]) -> Run:
            return self.rotated_with(self.dense, lambda p, z: form(z, p.W, p.idx.long(), p.g))

        providers = {
            **self.ours("decode_error", "decode_error", ours),
            "torch dense": with_dense(dense),
            "torch sparse": self.rotated_with(self.ids, sparse),
            "torch compiled": with_dense(compiled),
        }
        rows, p = self.sample(n), self.first

        def check(found: tuple[Tensor, ...]) -> None:
            sse, error, dvals = found
            expected = self.expected_decode(rows) - p.g[rows].double()
            close(error[rows].double(), expected)
            W = p.W[p.idx[rows].long()].double()
            close(dvals[rows].double(), (W * expected[:, None]).sum(2))
            close(sse.double(), error.double().square().sum())

        moved, named = 4 * d * (self.touched() + 2 * n), 4 * d * (n * k + 2 * n)
        cost = Cost(4 * n * k * d, "fp32", moved, named)
        note = "rows of W_dec that come from memory at random, read once for both sums"
        return Op("decode, loss, dvals", providers, check, cost, note)

    # ---- the gradients ----

    def index(self) -> Op:
        n, _, f, k = self.shape

        def sort(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
            flat = p.idx.view(-1)
            entry = flat.argsort(stable=True)
            ends = torch.zeros(f + 1, dtype=torch.int64, device=flat.device)
            ends[1:] = flat.bincount(minlength=f).cumsum(0)
            return ends, (entry // k).int(), entry.int()

        providers = self.ours("index", "inverse_index", lambda fn, p: fn(p.idx, f))
        providers["torch sort"] = self.rotated(sort)
        expected = sort(self.first)

        def check(found: tuple[Tensor, Tensor, Tensor]) -> None:
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), "expected the index of a stable sort"

        cost = Cost(moved=4 * n * k * 3 + 8 * f)
        return Op("inverse index", providers, check, cost, "counting: two passes over the pairs")

    def rows(self) -> Op:
        """dW_dec as a dense matrix; a step of fastsae's Adam never makes one."""
        n, d, f, k = self.shape

        providers = {
            **self.ours("rows", "row_gradients", lambda fn, p: fn(p.vals, p.idx, p.g, f)[0]),
            "torch dense": self.rotated_with(self.dense, lambda p, z: z.T @ p.g),
            "torch index_add_": self.rotated_with(self.ids, self.index_add),
        }
        latents = self.sample(f)

        def check(found: Tensor) -> None:
            close(found[latents].double(), self.expected_rows(latents))

        cost = Cost(2 * n * k * d, "fp32", 4 * d * (n + f), 4 * d * (n * k + f))
        note = "writing F×D once; the rows that are summed come from caches"
        return Op("row gradients", providers, check, cost, note)

    def index_add(self, p: Problem, idx: Tensor) -> Tensor:
        _, d, f, _ = self.shape
        terms = (p.vals[..., None] * p.g[:, None]).view(-1, d)
        return p.g.new_zeros(f, d).index_add_(0, idx.view(-1), terms)

    def expected_rows(self, latents: Tensor) -> Tensor:
        p, found = self.first, []
        for latent in latents.tolist():
            token, entry = (p.idx == latent).nonzero(as_tuple=True)
            found.append((p.vals[token, entry].double()[:, None] * p.g[token].double()).sum(0))
        return torch.stack(found)

    def adam(self, lazy: bool) -> Op:
        """From pairs to parameters; the gradient is made in it, where it is not given."""
        n, d, f, k = self.shape
        lr, eps = 1e-4, 1e-8

        def ours(backend: str) -> Run:
            kernel, W = kernel_of(backend, "adam", "adam_"), self.first.W.clone()
            m, v = torch.zeros_like(W), torch.zeros_like(W)
            last = torch.ones(f, dtype=torch.int32, device=self.device)
            steps = itertools.count(2)

            def run(i: int) -> Tensor:
                p = self.problems[i % ROTATED]
                gradient = [RowGradient(p.vals, p.idx, p.g, None)]
                hyper = (lr, 0.9, 0.999, eps, 0.0, 1.0, next(steps), lazy)
                kernel(W, None, gradient, False, m, v, last, *hyper)
                return W

            return run

        def theirs(made: list[Tensor], gradient: Callable[..., Tensor]) -> Run:
            q = torch.nn.Parameter(self.first.W.clone())
            optimizer = torch.optim.Adam([q], lr=lr, eps=eps, fused=True)
            optimizer.state[q] = {
                "step": torch.ones((), device=self.device),
                "exp_avg": torch.zeros_like(q),
                "exp_avg_sq": torch.zeros_like(q),
            }

            def update(p: Problem, z: Tensor) -> Tensor:
                q.grad = gradient(p, z)
                optimizer.step()
                return q.detach()

            return self.rotated_with(made, update)

        providers = {f"fastsae {backend}": ours(backend) for backend in self.backends}
        if not lazy:
            providers |= {
                "torch dense": theirs(self.dense, lambda p, z: z.T @ p.g),
                "torch sparse": theirs(self.ids, self.index_add),
                "torch, gradient given": theirs(
                    [self.index_add(p, p.idx.long()) for p in self.problems],
                    lambda p, gradient: gradient,
                ),
            }
        latents = self.sample(f)

        def check(found: Tensor) -> None:
            g = self.expected_rows(latents)
            first, second = 0.1 * g / (1 - 0.9**2), 0.001 * g * g / (1 - 0.999**2)
            step = lr * first / (second.sqrt() + eps)
            close((found - self.first.W)[latents].double() / lr, -step / lr, 2e-3)

        rows = self.touched() if lazy else f
        cost = Cost(2 * n * k * d, "fp32", 4 * d * (6 * rows + n), 4 * d * (6 * rows + n * k))
        name, note = "gradient + Adam", "reading and writing p, m and v, of all rows"
        if lazy:
            name, note = "gradient + lazy Adam", "reading and writing p, m and v, of touched rows"
        return Op(name, providers, check, cost, note)

    # ---- shared ----

    def touched(self) -> int:
        """Latents that the first batch uses."""
        return len(self.first.idx.unique())

    def sample(self, n: int) -> Tensor:
        """Some of n places, the first and the last among them."""
        return torch.linspace(0, n - 1, min(SAMPLED, n), device=self.device).long().unique()
