"""Adam that consumes the gradients of selected rows as they are: pairs and the rows they weigh.

    optimizer = Adam(sae.parameters(), lr=1e-3, unit_rows=[sae.W_dec])
    optimizer.zero_grad()
    sae.losses(x).loss.backward()
    optimizer.step()

A batch touches nnz pairs of W_enc and W_dec. Plain autograd spreads their gradients over two F×D
matrices, which the optimiser reads again. Between `zero_grad` and `step` this one has the ops leave
the pairs with it instead (`RowGradient`), and sums a row's gradient when it updates the row: no F×D
gradient exists. A step that keeps no pairs (`fastsae.blocked`) leaves a `BlockGradient`: its rows
are made block by block when they are updated, and once more before that for the norm that `clip`
wants. In that time `.grad` of 2-D parameters stays None, so clip with `clip=`, not with
torch.nn.utils.clip_grad_norm_, and ask for other gradients of them (torch.autograd.grad) at another
time. A backward outside of it gives dense gradients as usual, and `step` takes those too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastsae import ops, reference
from fastsae.moments import STATES, State, n_blocks


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) with the row gradients of fastsae's ops.

    The update is torch.optim.Adam's for every row, to the rounding. With betas[0] = 0 an untouched
    row does not move, so its second moment is caught up when it is next touched, which is exact too
    and leaves untouched rows unread.

    lazy: untouched rows keep their moments and values, as in torch.optim.SparseAdam; not Adam. A
    dense or a block gradient touches all rows.
    clip: scales the whole gradient down to this global norm.
    weight_decay: decoupled (AdamW); ValueError with lazy, where it cannot be exact.
    unit_rows: parameters whose rows have norm 1: the gradient's part along a row is removed before
    the update (and before clipping), and the row is normalised after it.
    state: how the moments of matrices are kept: float32 (float64 for float64 parameters), bfloat16
    or int8, codes with a scale for each 256 columns (`fastsae.moments`). Those of vectors are
    float32. The narrow ones, and bfloat16 parameters with any state, are rounded up or down at
    random by how near both are, so that small updates are not lost on average.
    sum_over_shards: parameters of which this process holds some rows only, and what sums a 0-d
    tensor over all processes, for the norm of the whole gradient (`fastsae.sharding`).
    first_row: where those rows begin; what is drawn for a row of a matrix goes by its number.

    With backend "triton" nothing here waits for the device: the step count is a tensor there, and
    with `clip` a gradient that is not finite makes a step that writes nothing, instead of an
    exception.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        lazy: bool = False,
        clip: float | None = None,
        unit_rows: Iterable[Parameter] = (),
        state: State = "float32",
        sum_over_shards: tuple[Iterable[Tensor], Callable[[Tensor], Tensor]] | None = None,
        first_row: int = 0,
        backend: str | None = None,
    ) -> None:
        for name, value, top in (
            ("lr", lr, math.inf),
            ("betas[0]", betas[0], 1),
            ("betas[1]", betas[1], 1),
            ("eps", eps, math.inf),
            ("weight_decay", weight_decay, math.inf),
        ):
            if not 0 <= value < top:
                raise ValueError(f"{name}: expected a number in [0, {top}), got {value}")
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"clip: expected a finite number above 0, got {clip}")
        if lazy and weight_decay:
            raise ValueError(
                "weight_decay: expected 0 with lazy, which cannot decay untouched rows"
            )
        if state not in STATES:
            raise ValueError(f"state: expected one of {', '.join(STATES)}, got {state!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.lazy, self.clip, self.stored, self.backend = lazy, clip, state, backend
        self.unit_rows = {id(p) for p in unit_rows}
        divided, sums = sum_over_shards or ((), None)
        self.sum: Callable[[Tensor], Tensor] | None = sums
        self.divided, self.first_row = {id(p) for p in divided}, first_row
        owned = [p for group in self.param_groups for p in group["params"]]
        if not self.unit_rows <= {id(p) for p in owned}:
            raise ValueError(
                "unit_rows: expected parameters that the optimiser was given, got others"
            )
        for p in owned:
            if p.ndim == 2:
                ops.collect_row_gradients(p, self)
        self.receiving = False
        self.finite: Tensor | None = None
        """0-d bool, on the device, with clip: whether the last step's gradient was finite."""
        self.row_gradients: dict[int, list[ops.RowGradient]] = {}
        self.block_gradients: list[ops.BlockGradient] = []
        self.indices: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def receive(self, p: Tensor, gradient: ops.RowGradient) -> None:
        """Takes a share of p's gradient; called by the ops during backward."""
        self.row_gradients.setdefault(id(p), []).append(gradient)

    def receive_blocks(self, gradient: ops.BlockGradient) -> None:
        """Takes a share of the gradients of several parameters; called during backward."""
        self.block_gradients.append(gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients; from here until `step`, backward leaves row gradients here."""
        self._forget_row_gradients()
        self.receiving = True
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def gradient_norm(self) -> float | Tensor:
        """The global norm of the gradient, projected where rows have norm 1.

        A 0-d tensor with backend "triton".
        """
        square: float | Tensor = 0.0
        here: float | Tensor = 0.0
        for p, piece in self._pieces():
            norm = ops.gradient_square_norm(
                piece.of(p), piece.dense, piece.gradients, self._is_unit(p), backend=self.backend
            )
            if id(p) in self.divided:
                here = here + norm
            else:
                square = square + norm
        if self.sum is not None:
            device = self.param_groups[0]["params"][0].device
            there = self.sum(torch.as_tensor(here, dtype=torch.float64, device=device))
            here = there if isinstance(here, Tensor) else float(there)
        square = square + here
        return square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)

    def _is_unit(self, p: Tensor) -> bool:
        return id(p) in self.unit_rows

    def _owned(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"])

    def _has_gradient(self, p: Tensor) -> bool:
        return p.grad is not None or id(p) in self.row_gradients or self._is_blocked(p)

    def _is_blocked(self, p: Tensor) -> bool:
        return any(p is q for g in self.block_gradients for q in g.parameters)

    def _pieces(self) -> Iterator[tuple[Tensor, _Piece]]:
        """All gradients: a parameter's whole one, or blocks of rows that are there one by one."""
        for p, _ in self._owned():
            if self._has_gradient(p) and not self._is_blocked(p):
                gradients = [self._indexed(g, p) for g in self.row_gradients.get(id(p), [])]
                yield p, _Piece(None, p.grad, gradients)
        for n_rows in sorted({len(g.parameters[0]) for g in self.block_gradients}):
            together = [g for g in self.block_gradients if len(g.parameters[0]) == n_rows]
            block = min(g.block for g in together)
            for start in range(0, n_rows, block):
                stop = min(start + block, n_rows)
                dense: dict[Tensor, Tensor] = {}
                for g in together:
                    for p, rows in zip(g.parameters, g.rows(start, stop), strict=True):
                        dense[p] = dense[p] + rows if p in dense else rows
                for p, rows in dense.items():
                    rows = rows if p.grad is None else rows + p.grad[start:stop]
                    gradients = self.row_gradients.get(id(p), [])
                    gradients = [_of_rows(g, start, stop) for g in gradients]
                    yield p, _Piece(slice(start, stop), rows, gradients)

    def _indexed(self, g: ops.RowGradient, p: Tensor) -> ops.RowGradient:
        """g with its index, which the gradients of W_enc and W_dec from the same codes share."""
        backend = self._backend(p)
        if backend == "reference":
            return g
        n_latents = len(p)
        key = (n_latents, *((t.data_ptr(), t.shape) for t in (g.idx, g.row_ptr) if t is not None))
        if key not in self.indices:
            self.indices[key] = ops.inverse_index(g.idx, n_latents, g.row_ptr, backend=backend)
        return g._replace(inverse=self.indices[key])

    def _forget_row_gradients(self) -> None:
        self.row_gradients.clear()
        self.block_gradients.clear()
        self.indices.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, valid: Tensor | None = None) -> Any:
        """One update of every parameter that has a gradient.

        valid: 0-d bool, on the parameters' device; where it is false nothing is written.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        owned = [(p, group) for p, group in self._owned() if self._has_gradient(p)]
        for p, group in owned:
            self._initialize(p, group)
        scale = self._scale(valid)
        if scale is not None:
            for p, _ in owned:
                self.state[p]["step"] += scale.isfinite() if isinstance(scale, Tensor) else 1
            groups = {id(p): group for p, group in owned}
            for p, piece in self._pieces():
                self._update(p, piece, groups[id(p)], scale)
        self._forget_row_gradients()
        self.receiving = False
        return result

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("Adam: expected state_dict and load_state_dict, got a copy or a pickle")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments get this optimiser's dtype, not the parameter's.

        ValueError: codes where this optimiser has none, or none where it has them.
        """
        super().load_state_dict({**state_dict, "state": {}})  # which would convert and copy it
        own = (p for group in self.param_groups for p in group["params"])
        theirs = (i for group in state_dict["param_groups"] for i in group["params"])
        for p, i in zip(own, theirs, strict=True):
            given = state_dict["state"].get(i, {})
            if given and ("exp_avg_sq_scale" in given) != self._is_coded(p):
                own_kind = "int8 codes" if self._is_coded(p) else f"none with state {self.stored!r}"
                got = given["exp_avg_sq"].dtype
                raise ValueError(f"exp_avg_sq: expected {own_kind}, got {got}")
            for name, value in given.items():
                if name.endswith("_scale") or (name.startswith("exp_avg") and self._is_coded(p)):
                    value = value.detach().to(p.device, copy=True)
                elif name.startswith("exp_avg"):
                    value = value.detach().to(p.device, self._moment_dtype(p), copy=True)
                elif name == "step":
                    on_device = self._on_device(p)
                    value = torch.tensor(int(value), device=p.device) if on_device else int(value)
                elif isinstance(value, Tensor):
                    value = value.detach().to(p.device, copy=True)
                self.state[p][name] = value

    def _is_coded(self, p: Tensor) -> bool:
        return self.stored == "int8" and p.ndim == 2

    def _moment_dtype(self, p: Tensor) -> torch.dtype:
        if self.stored == "bfloat16" and p.ndim == 2:
            return torch.bfloat16
        return torch.promote_types(p.dtype, torch.float32)

    def _backend(self, p: Tensor) -> str:
        return self.backend or ops.choose_backend(p)

    def _on_device(self, p: Tensor) -> bool:
        return self._backend(p) == "triton"

    def _scale(self, valid: Tensor | None) -> float | Tensor | None:
        """What the gradient is multiplied with; None, or NaN on the device: do not update."""
        on_device = any(self._on_device(p) for p, _ in self._owned())
        if valid is not None and not on_device and not bool(valid):
            return None
        scale: float | Tensor = 1.0
        if self.clip is not None:
            norm = self.gradient_norm()
            if isinstance(norm, Tensor):
                self.finite = norm.isfinite()
                scale = (self.clip / (norm + 1e-6)).clamp(max=1).where(norm.isfinite(), math.nan)
            elif math.isfinite(norm):
                scale = min(1.0, self.clip / (norm + 1e-6))
            else:
                raise FloatingPointError(f"gradient: expected a finite norm, got {norm}")
        if valid is not None and on_device:
            if not isinstance(scale, Tensor):  # a fill: a copy would wait
                scale = torch.full((), scale, device=valid.device)
            scale = scale.where(valid, math.nan)
        return scale

    def _initialize(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if state:
            return
        on_device = self._on_device(p)
        # On the device a step that writes nothing must not count, so the count is there too.
        state["step"] = torch.zeros((), dtype=torch.int64, device=p.device) if on_device else 0
        kinds = {"exp_avg": torch.int8} if group["betas"][0] else {}
        for name, code in {**kinds, "exp_avg_sq": torch.uint8}.items():
            dtype = code if self._is_coded(p) else self._moment_dtype(p)
            state[name] = torch.zeros_like(p, dtype=dtype)
            if self._is_coded(p):
                blocks = n_blocks(p.shape[1])
                state[f"{name}_scale"] = torch.zeros(len(p), blocks, device=p.device)
        rows = len(reference.as_rows(p))
        state["last"] = torch.zeros(rows, dtype=torch.int32, device=p.device)

    def _update(
        self, p: Tensor, piece: _Piece, group: dict[str, Any], scale: float | Tensor
    ) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[p]
        m, v, m_scale, v_scale = (
            None if (t := state.get(name)) is None else piece.of(t)
            for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
        )
        assert v is not None
        first_row = self.first_row if id(p) in self.divided and p.ndim == 2 else 0
        ops.adam_(
            piece.of(p),
            piece.dense,
            piece.gradients,
            self._is_unit(p),
            m=m,
            v=v,
            last=piece.of(state["last"]),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            scale=scale,
            step=state["step"],
            lazy=self.lazy and p.ndim == 2,
            scales=(m_scale, v_scale),
            stochastic_rounding=torch.bfloat16 in (p.dtype, v.dtype),
            first_row=first_row + (0 if piece.rows is None else piece.rows.start),
            backend=self.backend,
        )


class _Piece(NamedTuple):
    """The gradient of some rows of a parameter."""

    rows: slice | None
    """None: all of them, of a parameter of any shape."""
    dense: Tensor | None
    gradients: list[ops.RowGradient]

    def of(self, t: Tensor) -> Tensor:
        return t if self.rows is None else t[self.rows]


def _of_rows(g: ops.RowGradient, start: int, stop: int) -> ops.RowGradient:
    there = (g.idx >= start) & (g.idx < stop)
    return g._replace(idx=(g.idx - start).where(there, -1))
