"""Codes: the sparse latents of a batch, the one representation everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.reference import padded


@dataclass(frozen=True, eq=False)
class Codes:
    """Which latents are active in each token, and how strongly.

    Fixed K: ``vals`` and ``idx`` are (N, K), a row sorted by selection order; id -1 with value 0
    pads. Varying K: both are (nnz) and ``row_ptr`` (N+1, int64) bounds the entries of each token.
    vals is floating, idx int32 in [-1, n_latents). TypeError and ValueError say what does not fit;
    `validate` also reads the contents.
    """

    vals: Tensor
    idx: Tensor
    n_latents: int
    row_ptr: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.vals.is_floating_point():
            raise TypeError(f"vals: expected a floating dtype, got {self.vals.dtype}")
        if self.idx.dtype != torch.int32:
            raise TypeError(f"idx: expected torch.int32, got {self.idx.dtype}")
        if self.vals.shape != self.idx.shape:
            raise ValueError(
                f"vals and idx: expected one shape, got {tuple(self.vals.shape)} "
                f"and {tuple(self.idx.shape)}"
            )
        ndim = 2 if self.row_ptr is None else 1
        if self.idx.ndim != ndim:
            raise ValueError(f"idx: expected {ndim} dimensions, got {self.idx.ndim}")
        if self.row_ptr is not None and (
            self.row_ptr.dtype != torch.int64 or self.row_ptr.ndim != 1 or len(self.row_ptr) < 1
        ):
            raise ValueError(
                f"row_ptr: expected int64 of shape (N+1), got {self.row_ptr.dtype} "
                f"of shape {tuple(self.row_ptr.shape)}"
            )

    def validate(self) -> Codes:
        """Checks the contents; ValueError names the first thing that is wrong. Returns self."""
        if self.idx.numel() and not (
            -1 <= int(self.idx.min()) <= int(self.idx.max()) < self.n_latents
        ):
            raise ValueError(
                f"idx: expected ids in [-1, {self.n_latents}), got {int(self.idx.min())} "
                f"to {int(self.idx.max())}"
            )
        if bool((self.vals[self.idx < 0] != 0).any()):
            raise ValueError("vals: expected 0 where idx is -1")
        if self.row_ptr is not None:
            p = self.row_ptr
            if int(p[0]) != 0 or int(p[-1]) != len(self.idx) or bool((p.diff() < 0).any()):
                raise ValueError(
                    f"row_ptr: expected an ascending sequence from 0 to {len(self.idx)}, "
                    f"got {int(p[0])} to {int(p[-1])}"
                )
        pairs = self.token_ids() * self.n_latents + self.idx.reshape(-1).long()
        pairs = pairs[self.idx.reshape(-1) >= 0]
        if len(pairs.unique()) != len(pairs):
            raise ValueError("idx: expected each latent at most once in a token")
        return self

    @property
    def n_tokens(self) -> int:
        return len(self.idx) if self.row_ptr is None else len(self.row_ptr) - 1

    @property
    def device(self) -> torch.device:
        return self.vals.device

    def token_ids(self) -> Tensor:
        """The token of every stored entry, padding included: (N·K) or (nnz), int64."""
        tokens = torch.arange(self.n_tokens, device=self.device)
        if self.row_ptr is None:
            return tokens.repeat_interleave(self.idx.shape[1])
        return tokens.repeat_interleave(self.row_ptr.diff())

    def l0(self) -> Tensor:
        """How many latents are active (value not 0) in each token: (N), int64."""
        active = ((self.idx >= 0) & (self.vals != 0)).reshape(-1)
        return self.token_ids()[active].bincount(minlength=self.n_tokens)

    def firing_counts(self) -> Tensor:
        """In how many tokens each latent is active (value not 0): (n_latents), int64."""
        active = (self.idx >= 0) & (self.vals != 0)
        return self.idx[active].long().bincount(minlength=self.n_latents)

    def only(self, kept: Tensor) -> Codes:
        """The same codes with padding where `kept` (bool, as idx) is false."""
        vals, idx = self.vals.where(kept, 0), self.idx.where(kept, -1)
        return Codes(vals, idx, self.n_latents, self.row_ptr)

    def to_dense(self) -> Tensor:
        """The (N, n_latents) matrix. Differentiable in vals."""
        idx = self.idx.reshape(-1)
        place = self.token_ids() * self.n_latents + idx.clamp(min=0)
        vals = self.vals.reshape(-1).where(idx >= 0, 0)
        dense = vals.new_zeros(self.n_tokens * self.n_latents)
        n = len(vals) if len(dense) else 0  # without latents there is none that padding adds 0 to
        dense.scatter_add_(0, place[:n], vals[:n])
        return dense.view(self.n_tokens, self.n_latents)

    def to_sparse_csr(self) -> Tensor:
        """A torch.sparse_csr matrix (N, n_latents) of the entries that are not padding."""
        there = (self.idx >= 0).reshape(-1)
        token, latent = self.token_ids()[there], self.idx.reshape(-1)[there].long()
        order = (token * self.n_latents + latent).argsort()  # CSR wants ascending columns
        row_ptr = torch.zeros(self.n_tokens + 1, dtype=torch.int64, device=self.device)
        row_ptr[1:] = token.bincount(minlength=self.n_tokens).cumsum(0)
        return torch.sparse_csr_tensor(
            row_ptr,
            latent[order],
            self.vals.reshape(-1)[there][order],
            (self.n_tokens, self.n_latents),
            check_invariants=True,
        )

    @classmethod
    def from_dense(cls, dense: Tensor, k: int | None = None) -> Codes:
        """The nonzero entries of an (N, F) matrix, row by row, value descending, latent ascending.

        With k, in the (N, k) layout, ValueError where a row has more than k; without, with row_ptr.
        """
        if dense.ndim != 2:
            raise ValueError(f"dense: expected 2 dimensions, got {dense.ndim}")
        n_tokens, n_latents = dense.shape
        token, latent = dense.nonzero(as_tuple=True)
        row_ptr = torch.zeros(n_tokens + 1, dtype=torch.int64, device=dense.device)
        row_ptr[1:] = token.bincount(minlength=n_tokens).cumsum(0)
        longest = int(row_ptr.diff().max()) if n_tokens else 0
        if k is not None and longest > k:
            raise ValueError(f"dense: expected at most k = {k} nonzeros a row, got {longest}")
        vals = dense[token, latent]
        order = vals.argsort(descending=True, stable=True)
        order = order[token[order].argsort(stable=True)]
        vals, idx = vals[order], latent[order].to(torch.int32)
        if k is None:
            return cls(vals, idx, n_latents, row_ptr)
        room = (0, k - longest)
        vals = torch.nn.functional.pad(padded(vals, row_ptr, 0), room)
        return cls(
            vals, torch.nn.functional.pad(padded(idx, row_ptr, -1), room, value=-1), n_latents
        )

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, rows: int | slice | Tensor) -> Codes:
        """The codes of some tokens: an int, a slice, a boolean mask or token ids."""
        if isinstance(rows, int):
            if not -self.n_tokens <= rows < self.n_tokens:
                raise IndexError(f"token {rows} is out of range for {self.n_tokens} tokens")
            rows = torch.tensor([rows % self.n_tokens], device=self.device)
        elif isinstance(rows, slice):
            rows = torch.arange(self.n_tokens, device=self.device)[rows]
        elif rows.dtype == torch.bool:
            if rows.shape != (self.n_tokens,):
                raise IndexError(
                    f"mask: expected shape ({self.n_tokens},), got {tuple(rows.shape)}"
                )
            rows = rows.nonzero()[:, 0]
        if self.row_ptr is None:
            return Codes(self.vals[rows], self.idx[rows], self.n_latents)
        rows = torch.arange(self.n_tokens, device=self.device)[rows]  # checked, and not negative
        lengths = self.row_ptr.diff()[rows]
        row_ptr = torch.zeros(len(rows) + 1, dtype=torch.int64, device=self.device)
        row_ptr[1:] = lengths.cumsum(0)
        within = torch.arange(int(row_ptr[-1]), device=self.device)
        entry = (self.row_ptr[rows] - row_ptr[:-1]).repeat_interleave(lengths) + within
        return Codes(self.vals[entry], self.idx[entry], self.n_latents, row_ptr)

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        row_ptr = None if self.row_ptr is None else self.row_ptr.to(device)
        return Codes(self.vals.to(device), self.idx.to(device), self.n_latents, row_ptr)
