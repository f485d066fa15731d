"""A dictionary over several processes: shards of its latents, and copies for disjoint tokens.

    torchrun --nproc-per-node 4 -m fastsae train … --shard-latents 2 --data-parallel 2

P·Q ranks stand in a mesh of Q rows and P columns. The ranks of a row see the same tokens, and each
holds F/P consecutive latents with their optimiser state; the ranks of a column hold the same
latents and see disjoint tokens, N/Q of each batch. What is not of a latent (b_dec, W_skip, scales)
all ranks hold. A step exchanges:

    rows            each rank reads N/(P·Q) rows; a row of ranks gathers its N/Q tokens
    scores          each rank selects among its latents as if there were no others; the candidates'
                    scores are gathered, and a candidate stays where it is among the best of all
    reconstruction  a row of ranks sums what its latents decode to: N/Q × D_out
    gradients       W_enc, W_dec and b_enc: none but for Q > 1 (`merge_gradients`); b_dec's D
    counts          how many latents are active and dead, which latents fired, who wants to stop

Selection is that of one process to the bit, in its total order (score descending, token ascending,
latent ascending): a value comes from one dot product, which no shard changes. Losses and gradients
are equal up to the order of summation.
"""

from __future__ import annotations

import copy
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import init_device_mesh

from fastsae import ops
from fastsae.config import DTYPES, SAEConfig, TrainConfig
from fastsae.ops.gradients import row_gradients_op
from fastsae.sae import BY_LATENT
from fastsae.selection import BatchTopK, MutualChoice

if TYPE_CHECKING:
    from fastsae.optim import Adam


# Its name up to torch 2.12.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class LostRank(RuntimeError):
    """Another process of the training ended, or does not answer."""


class Shards:
    """This process's place among the ranks of a training, and what they tell each other.

    All ranks call the same methods in the same order, with tensors of the same shapes. LostRank: a
    rank is gone, or was silent for `timeout`. torch.distributed must be initialised (`connect`
    does that); ValueError where it has another number of ranks than latents·data.
    """

    def __init__(self, latents: int = 1, data: int = 1, device: str = "cpu") -> None:
        for name, value in (("latents", latents), ("data", data)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        n_ranks = dist.get_world_size()
        if latents * data != n_ranks:
            raise ValueError(
                f"expected latents · data = {latents} · {data} = {latents * data} processes, "
                f"got {n_ranks}"
            )
        mesh = init_device_mesh(device, (data, latents), mesh_dim_names=("data", "latent"))
        self.n_latent, self.n_data, self.n_ranks = latents, data, n_ranks
        self.rank = dist.get_rank()
        self.at_data, self.at_latent = divmod(self.rank, latents)
        self._row, self._column = mesh.get_group("latent"), mesh.get_group("data")
        self._batch: Any = None
        """The group that sees the tokens of a batch; None: all ranks."""
        self.traffic: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """What each exchange took so far: bytes that this rank received, and seconds."""

    @classmethod
    def connect(
        cls, latents: int, data: int, device: str = "cpu", timeout: float = 600.0
    ) -> Shards:
        """The ranks that torchrun started: over gloo on a CPU, NCCL on a GPU. timeout: seconds."""
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"expected {latents * data} processes, got one: start it with torchrun "
                f"--nproc-per-node {latents * data} -m fastsae train …"
            )
        backend = "nccl" if device.startswith("cuda") else "gloo"
        if backend == "nccl" and ":" in device:  # where small tensors of exchanges are made
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        return cls(latents, data, device.split(":")[0])

    @property
    def n_here(self) -> int:
        """How many of the ranks share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.n_ranks))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what only one can write."""
        return self.rank == 0

    def own(self, d_sae: int) -> range:
        """The latents of this rank. ValueError: d_sae is no multiple of the number of shards."""
        if d_sae % self.n_latent:
            raise ValueError(
                f"d_sae: expected a multiple of the {self.n_latent} shards, got {d_sae}"
            )
        width = d_sae // self.n_latent
        return range(self.at_latent * width, (self.at_latent + 1) * width)

    def of_row(self) -> Shards:
        """This row of ranks by itself, for tokens that the other rows see too; not for training."""
        row = copy.copy(self)
        row.n_data, row.at_data, row._batch = 1, 0, self._row
        return row

    def close(self) -> None:
        """Ends the connections, when all ranks are done."""
        self.barrier()
        dist.destroy_process_group()

    # ---- exchanges ----

    def received(self) -> float:
        """Bytes that this rank received so far."""
        return sum(n_bytes for n_bytes, _ in self.traffic.values())

    def _exchange(self, what: str, n_bytes: float, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        try:
            call()
        except RuntimeError as error:
            raise LostRank(
                f"rank {self.rank} of {self.n_ranks} lost another one while it exchanged {what}; "
                f"a training goes on from its last checkpoint with --resume ({error})"
            ) from error
        entry = self.traffic[what]
        entry[0] += n_bytes
        entry[1] += time.perf_counter() - start

    def _gather(self, what: str, t: Tensor, group: Any) -> Tensor:
        """(n, *t.shape): t of each of the group's n ranks."""
        n = dist.get_world_size(group)
        if n == 1:
            return t.unsqueeze(0)
        t = t.contiguous()
        out = t.new_empty(n, *t.shape)
        n_bytes = (n - 1) * t.numel() * t.element_size()
        flat, flat_out = t.reshape(-1), out.view(-1)
        self._exchange(what, n_bytes, lambda: _all_gather(flat_out, flat, group=group))
        return out

    def _reduce_(self, what: str, t: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Puts the sum (or another op) of t over the group's ranks into t, which is contiguous."""
        n = dist.get_world_size(group)
        if n > 1:
            n_bytes = 2 * (n - 1) / n * t.numel() * t.element_size()
            self._exchange(what, n_bytes, lambda: dist.all_reduce(t, op, group=group))
        return t

    def sum(self, t: Tensor) -> Tensor:
        """Of a count or a small tensor: its sum over the shards."""
        return self._reduce_("counts", t.detach().clone(), self._row)

    def least(self, t: Tensor) -> Tensor:
        """The smallest of all ranks, element by element."""
        return self._reduce_("counts", t.detach().clone(), None, dist.ReduceOp.MIN)

    def mean(self, t: Tensor) -> Tensor:
        """Over the ranks with other tokens: the mean, of a loss for example."""
        return self._reduce_("counts", t.detach().clone(), self._column) / self.n_data

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        t = torch.tensor([int(flag)], dtype=torch.int32, device=self._device())
        return bool(self._reduce_("counts", t, None, dist.ReduceOp.MAX))

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.any(False)

    def check_same(self, what: str, number: int) -> None:
        """ValueError, on all ranks, where they have different numbers."""
        t = torch.tensor([number, -number], device=self._device())
        low, high = self.least(t).tolist()
        if low != -high:
            raise ValueError(
                f"{what}: expected the same on all ranks, which need one file system, "
                f"got {low} to {-high}, here {number}"
            )

    def fired(self, fired: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """(F/P) bool: which of this shard's latents fired, in the tokens of any rank.

        finite, 0-d: whether a rank's loss is → whether those of all are. On a GPU a step goes on
        with one that is not, and the ranks must still count the same latents as dead.
        """
        t = torch.cat([fired, ~finite.view(1)]).to(torch.uint8)
        self._reduce_("counts", t, self._column, dist.ReduceOp.MAX)
        return t[:-1] > 0, t[-1] == 0

    def whole(self, t: Tensor) -> Tensor:
        """(F, …) of what has a row for each latent of a shard (F/P, …)."""
        return self._gather("counts", t, self._row).flatten(0, 1)

    def equalize_(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the first one's tensors."""
        for t in tensors:
            data = t.detach().reshape(-1).contiguous()
            n_bytes = data.numel() * data.element_size()
            self._exchange("start", n_bytes, partial(dist.broadcast, data, 0))
            t.detach().copy_(data.view(t.shape))

    def rows(self, t: Tensor | None) -> Tensor | None:
        """The tokens of this row of ranks, of which t (n, D) are what this rank read."""
        return None if t is None else self._gather("rows", t, self._row).flatten(0, 1)

    def summed(self, t: Tensor) -> Tensor:
        """Σ over the shards of t, whose gradient is that of the sum."""
        return SumFunction.apply(t, self)

    def _device(self) -> torch.device:
        cuda = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    # ---- selection ----

    def best_of_token(
        self, k: int, scale: Tensor | None = None, *, absolute: bool = False
    ) -> Callable[..., tuple[Tensor, ...]]:
        """For `ops.encode`'s agree: of each shard's candidates those among a token's k best.

        vals, idx (N, at most k), by score descending, then latent ascending, become 0 and -1 where
        k candidates of all shards come before them. N·k scores are received from each other shard.
        """

        def agree(vals: Tensor, idx: Tensor) -> tuple[Tensor, ...]:
            own = _scores(vals, idx, scale, absolute)
            own = torch.nn.functional.pad(own, (0, k - own.shape[1]))
            before = torch.arange(k, device=own.device).expand(own.shape)
            ascending = -own
            for shard, theirs in enumerate(self._gather("scores", ascending, self._row)):
                if shard != self.at_latent:  # equal scores: those of lower latents come first
                    lower = shard < self.at_latent
                    before = before + torch.searchsorted(theirs, ascending, right=lower)
            kept = (before < k)[:, : idx.shape[1]]
            return vals.where(kept, 0), idx.where(kept, -1)

        return agree

    def best_of_batch(
        self, budget: int, scale: Tensor | None = None
    ) -> Callable[..., tuple[Tensor, ...]]:
        """For `ops.encode_batch`'s agree: of each rank's candidates the batch's `budget` best.

        The batch is that of all ranks, N tokens. vals, idx become 0 and -1 where the budget is
        spent before them. `budget` scores are received from each other rank; where more candidates
        than are left have the very score that the budget ends with, also their numbers a token.
        """

        def agree(vals: Tensor, idx: Tensor, row_ptr: Tensor) -> tuple[Tensor, ...]:
            own = _scores(vals, idx, scale, False)
            scores = self._gather("scores", own, self._batch).flatten()
            if len(scores) <= budget:
                return vals, idx, row_ptr
            last = scores.topk(budget, sorted=False).values.min()
            kept = own > last
            left = budget - int((scores > last).sum())
            tied = (own == last) & (idx >= 0)
            if last > 0 and int((scores == last).sum()) > left:
                tied &= self._tied_before(tied, row_ptr) < left
            kept |= tied
            return vals.where(kept, 0), idx.where(kept, -1), row_ptr

        return agree

    def _tied_before(self, tied: Tensor, row_ptr: Tensor) -> Tensor:
        """For each tied candidate, how many tied ones of all ranks come before it."""
        running = torch.zeros(len(tied) + 1, dtype=torch.int64, device=tied.device)
        torch.cumsum(tied, 0, out=running[1:])
        a_token = running[row_ptr].diff()
        # In the order (rank of the data, token, shard).
        counts = self._gather("scores", a_token, self._batch).view(self.n_data, self.n_latent, -1)
        counts = counts.transpose(1, 2)
        before = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
        own = before[self.at_data, :, self.at_latent]
        inside = running[:-1] - running[row_ptr[:-1]].repeat_interleave(row_ptr.diff())
        return own.repeat_interleave(row_ptr.diff()) + inside

    # ---- gradients ----

    def merge_gradients(self, optimizer: Adam, named: dict[str, Tensor]) -> None:
        """Brings the gradients of a backward together, before the optimiser's step.

        b_dec: the sum over all ranks. Of ranks with other tokens: either the pairs and the rows
        that they weigh are gathered, or the gradients of all F/P rows are summed, whichever moves
        fewer bytes (`gathers`).
        """
        for name, p in named.items():
            if name not in BY_LATENT:  # b_dec may have a gradient on the shard that adds it only
                gradient = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
                group = None if name == "b_dec" else self._column
                p.grad = self._reduce_("gradients", gradient, group)
        if self.n_data == 1:
            return
        matrices = [named[name] for name in ("W_enc", "W_dec")]
        gradients = {p: optimizer.row_gradients.pop(id(p), []) for p in matrices}
        if gathers(self, optimizer, gradients):
            known: dict[int, Tensor] = {}
            for p, shares in gradients.items():
                optimizer.row_gradients[id(p)] = [self._gathered(g, known) for g in shares]
            if named.get("b_enc") is not None:
                named["b_enc"].grad = self._bias_gradient(
                    optimizer.row_gradients[id(named["W_enc"])], named["b_enc"]
                )
            return
        for p, shares in gradients.items():
            backend = optimizer.backend or ops.choose_backend(p)
            rows = torch.zeros_like(p)
            for g in shares:
                pairs = g.coef, g.idx, g.src, len(p), g.row_ptr
                rows += row_gradients_op(*pairs, p.dtype, True, backend)[0]
            p.grad = self._reduce_("gradients", rows, self._column)
        if named.get("b_enc") is not None and named["b_enc"].grad is not None:
            self._reduce_("gradients", named["b_enc"].grad, self._column)

    def _gathered(self, g: ops.RowGradient, known: dict[int, Tensor]) -> ops.RowGradient:
        """A share of a gradient with the tokens of all ranks of the column."""
        for t in (g.idx, g.src):  # W_enc and W_dec have the same pairs
            if t.data_ptr() not in known:
                known[t.data_ptr()] = self._gather("gradients", t, self._column).flatten(0, 1)
        row_ptr = None
        if g.row_ptr is not None:
            if g.row_ptr.data_ptr() not in known:
                starts = self._gather("gradients", g.row_ptr[:-1], self._column)
                starts = starts + len(g.idx) * torch.arange(len(starts))[:, None].to(starts.device)
                end = starts.new_full((1,), self.n_data * len(g.idx))
                known[g.row_ptr.data_ptr()] = torch.cat([starts.flatten(), end])
            row_ptr = known[g.row_ptr.data_ptr()]
        coef = self._gather("gradients", g.coef, self._column).flatten(0, 1)
        return ops.RowGradient(coef, known[g.idx.data_ptr()], known[g.src.data_ptr()], row_ptr)

    @staticmethod
    def _bias_gradient(shares: list[ops.RowGradient], b_enc: Tensor) -> Tensor:
        sums = sum(ops.latent_sums(g.coef, g.idx, len(b_enc), g.row_ptr) for g in shares)
        return torch.as_tensor(sums).to(b_enc.dtype)


def _scores(vals: Tensor, idx: Tensor, scale: Tensor | None, absolute: bool) -> Tensor:
    """What the candidates were chosen by; 0 for padding, and above 0 for all others."""
    scores = vals.detach().abs() if absolute else vals.detach()
    if scale is not None:
        # Rounded as `ops.encode` does.
        scores = scores * scale.float().to(scores.dtype)[idx.clamp(min=0).long()]
    return scores.where(idx >= 0, 0)


def exchanged(config: SAEConfig, train: TrainConfig, latents: int, data: int) -> dict[str, float]:
    """Bytes that each rank receives in a step, on paper, by the names of `Shards.traffic`.

    A gather of n ranks takes n - 1 times its tensor, a sum in a ring 2·(n - 1)/n times. Without the
    AuxK loss, whose candidates and reconstruction come on top while latents are dead, and without
    what a tie of scores costs (`best_of_batch`).
    """
    n, d_in, d_out = train.batch_size / data, config.d_in, config.d_out or config.d_in
    width, ranks = config.d_sae / latents, latents * data
    rule = config.selection
    k = float(getattr(rule, rule.k_name or "k", 0))
    batch = isinstance(rule, BatchTopK | MutualChoice)
    pairs = k * train.batch_size if batch else k * n

    def ring(n_ranks: int, n_bytes: float) -> float:
        return 2 * (n_ranks - 1) / n_ranks * n_bytes

    target = 0 if config.d_out is None else d_out
    dense = 4 * width * (d_in + d_out)
    sparse = n * 4 * (d_in + d_out) + 12 * pairs
    lazy = train.optimizer == "adam-lazy" or DTYPES[config.dtype].itemsize < 4
    merged = 0.0
    if data > 1:
        gathered = lazy or _pairs_are_less(sparse + 4 * pairs, dense, data)
        matrices = ring(data, dense + 4 * width * config.encoder_bias)
        merged = (data - 1) * (sparse + 8 * n * batch) if gathered else matrices
    return {
        "rows": (latents - 1) / latents * n * 4 * (d_in + target),
        "scores": 4 * pairs * ((ranks if batch else latents) - 1),
        "reconstruction": ring(latents, 4 * n * d_out),
        "gradients": ring(ranks, 4 * d_out) + merged + ring(data, 4 * d_in * d_out * config.skip),
        # l0, dead latents (for AuxK too), a batch's threshold, a wish to stop; which latents fired,
        # and whether the loss is finite.
        "counts": (2 + bool(config.auxk_coef)) * ring(latents, 8)
        + (1 + batch) * ring(ranks, 4)
        + ring(data, width + 1),
    }


def _pairs_are_less(pairs: float, matrices: float, data: int) -> bool:
    return pairs <= 2 * matrices / data


def gathers(
    shards: Shards, optimizer: Adam, gradients: dict[Tensor, list[ops.RowGradient]]
) -> bool:
    """Whether data-parallel ranks gather pairs and rows; else they sum the rows' gradients.

    By the bytes that a rank receives: (Q - 1) times its pairs and tokens, or in a ring 2·(Q - 1)/Q
    times its matrices. Where these are less, F/P < N about, nearly all their rows are touched, and
    a sum of the touched ones would save nothing. A lazy optimiser must know which rows are, and
    gradients in 16 bits would lose what the rows' sums have: there they gather.
    """
    pairs = sum(
        t.numel() * t.element_size() for shares in gradients.values() for g in shares for t in g[:3]
    )
    matrices = sum(4 * p.numel() for p in gradients)
    wide = all(p.dtype.itemsize >= 4 for p in gradients)
    return optimizer.lazy or not wide or _pairs_are_less(pairs, matrices, shards.n_data)


class SumFunction(Function):
    """A sum over the shards, each of which has the whole gradient of it."""

    @staticmethod
    def forward(ctx, t, shards):
        return shards._reduce_("reconstruction", t.detach().clone(), shards._row)

    @staticmethod
    def backward(ctx, g):
        return g, None
