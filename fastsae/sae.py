"""The sparse autoencoder: parameters, codes, losses. Training lives in train.py.

    x' = s·x                       input scale (1 unless set; can be folded into the weights)
    h  = W_enc (x' - b_dec) + b_enc
    z  = selection(h)
    x̂' = W_dec z + b_dec           loss = mean over tokens and width of (x' - x̂')² + auxiliary terms

A transcoder predicts another activation y (D_out) from x: its input is not centred, and it may have
a skip connection, x̂' = W_dec z + b_dec + W_skip x'.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastsae import losses, ops
from fastsae.codes import Codes
from fastsae.config import B_DEC_STARTS, DTYPES, SAEConfig
from fastsae.files import sync_folder, write_json
from fastsae.selection import Call, Selected, Selection, State, TopK
from fastsae.selection.base import Terms
from fastsae.sums import row_norms, total
from fastsae.tensors import Part, own_rows, read_tensors, write_tensors

if TYPE_CHECKING:
    from fastsae.sharding import Shards

BY_LATENT = ("W_enc", "W_dec", "b_enc", "tokens_since_fired")
"""The tensors that have a row for each latent."""

_BLOCK_ROWS = 1 << 12  # of random rows that are made at once; a multiple of 16


@dataclass(frozen=True, eq=False)
class SAEOutput:
    """What an SAE makes of a batch. Losses are 0-d and in the scaled space."""

    codes: Codes | None
    """Of the N tokens, leading dimensions flattened; None where they are too dense to be kept."""
    loss: Tensor
    """What training minimises: mse (or nested) + auxk_coef·auxk + … + the rule's own terms."""
    losses: dict[str, Tensor]
    """The terms by name, not weighted: "mse" always; "nested" (the weighted mse of prefixes of the
    codes), "auxk", "multi_topk" and those of the selection rule where they apply."""
    metrics: dict[str, Tensor]
    """"l0", the mean number of active latents a token, and in training "n_dead"."""
    firing_counts: Tensor
    """(F) integers: in how many tokens each latent is active; of this rank's latents and tokens."""
    reconstruction: Tensor | None
    """x̂ in the input's leading shape, (…, D_out); None if not asked for."""


class SAE(nn.Module):
    """A sparse autoencoder or transcoder over the streaming ops.

    Parameters: W_enc (F, D), b_enc (F), W_dec (F, D_out), b_dec (D_out), W_skip (D_out, D). The
    decoder starts as random unit rows; an autoencoder's encoder starts as its copy (tied start),
    biases and W_skip at 0. precision and backend are those of `fastsae.ops.encode`.

    shards: the ranks that hold the dictionary together (`fastsae.sharding`). F is then their share
    of d_sae in this module's tensors, in codes and in firing_counts; losses, reconstructions and
    metrics are of all latents, and all ranks call the same methods.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_enc: nn.Parameter | None
    W_skip: nn.Parameter | None
    input_scale: Tensor
    output_scale: Tensor
    tokens_since_fired: Tensor
    selection_state: State
    """What the selection rule trains and tracks."""
    progress: float
    """Share of the training steps done, for the rule's schedules; 1 outside of a Trainer."""

    def __init__(
        self,
        config: SAEConfig,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        precision: ops.Precision = "screened",
        backend: str | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__()
        self.config, self.shards = config, shards
        self.precision, self.backend = precision, backend
        if shards is not None:
            _check_sharded(config, len(self.latents))
        d_in, d_sae, d_out = config.d_in, len(self.latents), config.d_out or config.d_in
        dtype = DTYPES[config.dtype]
        generator = torch.Generator().manual_seed(seed)

        def unit_rows(width: int) -> nn.Parameter:
            rows = torch.empty(d_sae, width, dtype=dtype, device=device)
            if not rows.is_meta:  # or a reader has them
                _fill_unit_rows(rows, self.latents, config.d_sae, generator)
            return nn.Parameter(rows)

        self.W_dec = unit_rows(d_out)
        self.W_enc = (
            unit_rows(d_in) if config.is_transcoder else nn.Parameter(self.W_dec.detach().clone())
        )

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        self.b_dec = zeros(d_out)
        self.b_enc = zeros(d_sae) if config.encoder_bias else None
        self.W_skip = zeros(d_out, d_in) if config.skip else None
        self.register_buffer("input_scale", torch.ones((), device=device))
        self.register_buffer("output_scale", torch.ones((), device=device))
        since = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", since, persistent=False)
        self.selection_state = State(config.selection.state(d_in, d_sae)).to(device)
        self.progress = 1.0

    @property
    def latents(self) -> range:
        """Which of the d_sae latents this module holds; all of them without shards."""
        d_sae = self.config.d_sae
        return range(d_sae) if self.shards is None else self.shards.own(d_sae)

    # ---- codes ----

    def _tokens(self, x: Tensor, width: int, name: str) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != width:
            raise ValueError(f"{name}: expected shape (…, {width}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
        return x.reshape(-1, width)

    def _scaled(self, x: Tensor) -> Tensor:
        """Input tokens as the encoder and the skip connection see them; float32 or float64."""
        return self._wide(self._tokens(x, self.config.d_in, "x")) * self.input_scale

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(self.W_dec.dtype, torch.float32))

    def _skipped(self, tokens: Tensor) -> Tensor:
        assert self.W_skip is not None
        return tokens @ self.W_skip.T.to(tokens.dtype)

    @property
    def _pre_bias(self) -> Tensor | None:
        return self.b_dec if self.config.apply_b_dec_to_input else None

    def _call(self, tokens: Tensor, gradient: Tensor | None, target: Tensor | None = None) -> Call:
        if gradient is not None:  # of the scaled tokens
            gradient = self._wide(self._tokens(gradient, self.config.d_in, "gradient"))
            if len(gradient) != len(tokens):
                raise ValueError(f"gradient: expected {len(tokens)} tokens, got {len(gradient)}")
            gradient = gradient / self.input_scale
        return Call(
            tokens,
            self.W_enc,
            self.b_enc,
            self._pre_bias,
            self.W_dec,
            self.selection_state,
            b_dec=self.b_dec,
            target=target,
            gradient=gradient,
            training=self.training,
            progress=self.progress,
            shards=self.shards,
            precision=self.precision,
            backend=self.backend,
        )

    def everywhere(self, count: Tensor) -> Tensor:
        """A count over this module's latents → over all."""
        return count if self.shards is None else self.shards.sum(count)

    def encode(
        self, x: Tensor, gradient: Tensor | None = None, *, training: bool | None = None
    ) -> Codes:
        """The codes of x (…, D), its leading dimensions flattened to N tokens.

        In the rule's form for training or for inference, by default as the module is. gradient: of
        a language model's loss at x, for rules that look at it.
        """
        call = self._call(self._scaled(x), gradient)
        call.training = self.training if training is None else training
        call.needs_codes = True
        codes = self.config.selection.select(call).codes
        assert codes is not None
        return codes

    def decode(self, codes: Codes, x: Tensor | None = None) -> Tensor:
        """The reconstruction (N, D_out) of codes; a skip connection needs their input x (…, D)."""
        if codes.n_latents != len(self.latents):
            raise ValueError(f"codes: expected {len(self.latents)} latents, got {codes.n_latents}")
        out = self._decoded(codes, self.b_dec)
        if self.W_skip is not None:
            if x is None:
                raise ValueError(
                    "x: expected the codes' input (the SAE has a skip connection), got None"
                )
            out = out + self._skipped(self._scaled(x))
        return (out / self._out_scale).to(self.W_dec.dtype)

    @property
    def _out_scale(self) -> Tensor:
        return self.output_scale if self.config.is_transcoder else self.input_scale

    # ---- losses ----

    def forward(
        self, x: Tensor, target: Tensor | None = None, gradient: Tensor | None = None
    ) -> SAEOutput:
        """Codes, losses and reconstruction of x (…, D); a transcoder needs its target (…, D_out).

        In training mode it also counts which latents fired, updates what the selection rule tracks
        and adds the AuxK loss when some latents are dead. A transcoder without a target has a
        reconstruction and a loss of NaN.
        """
        return self.losses(x, target, gradient, reconstruct=True)

    def losses(
        self,
        x: Tensor,
        target: Tensor | None = None,
        gradient: Tensor | None = None,
        *,
        reconstruct: bool = False,
    ) -> SAEOutput:
        """As `forward`, without the reconstruction unless asked for: what a training step needs."""
        c = self.config
        tokens = self._scaled(x)
        if c.is_transcoder:
            if target is None:
                target = x.new_full((*x.shape[:-1], self.b_dec.numel()), torch.nan)
            y = self._wide(self._tokens(target, self.b_dec.numel(), "target")) * self.output_scale
            if len(y) != len(tokens):
                raise ValueError(f"target: expected {len(tokens)} tokens, got {len(y)}")
        elif target is not None:
            raise ValueError(
                "target: expected None for an autoencoder (set d_out for a transcoder)"
            )
        else:
            y = tokens
        skipped = None if self.W_skip is None else self._skipped(tokens)
        if skipped is not None:
            y = y - skipped

        call = self._call(tokens, gradient, y)
        multi = self._multi_topk(call)
        selected = multi or c.selection.select(call)
        if multi is not None:
            selected = self._first_k(multi, call)
        codes, n = selected.codes, max(len(tokens), 1)
        xhat: Tensor | None
        elements = n * y.shape[1]
        nested = None
        if codes is None:
            assert selected.reconstruction is not None
            xhat = selected.reconstruction.x_hat
            error = xhat - y
            sse, l0 = total(error.square(), backend=self.backend), selected.reconstruction.l0
            counts = selected.reconstruction.firing_counts
        else:
            parts = c.selection.parts(codes) if self.training else None
            if parts is None:
                sse, error, xhat = self._error(codes, self.b_dec, y, reconstruct)
            else:
                nested, sse, error = losses.nested_error(self._error, parts, self.b_dec, y)
                xhat = error + y
            l0, counts = (codes.vals.detach() != 0).sum(), self._firing_counts(codes)
            l0 = self.everywhere(l0) / n
        terms = {"mse": sse / elements}
        loss = terms["mse"]
        if nested is not None:
            loss = terms["nested"] = nested / elements
        if multi is not None and multi.codes is not None:
            terms["multi_topk"] = self._error(multi.codes, self.b_dec, y)[0] / elements
            loss = loss + c.multi_topk_coef * terms["multi_topk"]
        loss = _with_terms(loss, terms, selected.terms)
        metrics = {"l0": l0}
        if self.training:
            finite = loss.detach().isfinite()
            fired, n_tokens = counts > 0, len(tokens)
            if self.shards is not None:
                fired, finite = self.shards.fired(fired, finite)
                n_tokens *= self.shards.n_data
            is_dead = self._count_fired(fired, n_tokens, finite)
            metrics["n_dead"] = self.everywhere(is_dead.sum())
            if c.auxk_coef:  # waits for a GPU: how many are dead decides shapes
                dead = is_dead
                if len(tokens):
                    dead = c.selection.revivable(call, selected, is_dead)
                n_dead = int(self.everywhere(dead.sum()))
                if n_dead:
                    latents = dead.nonzero()[:, 0].to(torch.int32)
                    terms["auxk"] = self._auxk(tokens, y, sse, error, latents, n_dead)
                    loss = loss + c.auxk_coef * terms["auxk"]
            loss = _with_terms(loss, terms, c.selection.dead_terms(call, is_dead))
            if len(tokens):
                self._observe(call, selected, finite)
        reconstruction = None
        if reconstruct:
            assert xhat is not None
            if skipped is not None:
                xhat = xhat + skipped
            xhat = (xhat / self._out_scale).to(x.dtype)
            reconstruction = xhat.reshape(*x.shape[:-1], self.b_dec.numel())
        return SAEOutput(codes, loss, terms, metrics, counts, reconstruction)

    def _multi_topk(self, call: Call) -> Selected | None:
        """The codes with 4k latents a token, where the Multi-TopK loss wants them."""
        c = self.config
        if not (self.training and c.multi_topk_coef):
            return None
        assert isinstance(c.selection, TopK)
        wide = c.selection.widened(4, c.d_sae)  # k may still be above 4k where it is annealed
        return replace(wide, k=max(wide.k, c.selection.k_at(call))).select(call)

    def _first_k(self, wide: Selected, call: Call) -> Selected:
        assert isinstance(self.config.selection, TopK) and wide.codes is not None
        k = self.config.selection.k_at(call)  # rows are in selection order: their first k
        return Selected(Codes(wide.codes.vals[:, :k], wide.codes.idx[:, :k], self.config.d_sae))

    def _error(
        self, codes: Codes, b_dec: Tensor | None, target: Tensor, reconstruct: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.shards is not None:  # what others decode must come in between
            xhat = self._decoded(codes, b_dec)
            error = xhat - target
            return total(error.square(), backend=self.backend), error, xhat
        return ops.reconstruction_error(
            codes.vals,
            codes.idx,
            self.W_dec,
            b_dec,
            target,
            row_ptr=codes.row_ptr,
            reconstruct=reconstruct,
            backend=self.backend,
        )

    def _decoded(self, codes: Codes, b_dec: Tensor | None) -> Tensor:
        """x̂' of all latents (N, D_out), float32 or wider."""
        shards = self.shards
        out = ops.decode(
            codes.vals,
            codes.idx,
            self.W_dec,
            b_dec if shards is None or shards.at_latent == 0 else None,
            row_ptr=codes.row_ptr,
            dtype=torch.promote_types(self.W_dec.dtype, torch.float32),
            backend=self.backend,
        )
        return out if shards is None else shards.summed(out)

    @torch.no_grad()
    def _firing_counts(self, codes: Codes) -> Tensor:
        nowhere = len(self.latents)
        latents = codes.idx.where(codes.vals != 0, nowhere).reshape(-1).long()
        counts = torch.zeros(nowhere + 1, dtype=torch.int32, device=codes.device)
        return counts.index_add_(0, latents, counts.new_ones(()).expand(len(latents)))[:-1]

    @torch.no_grad()
    def _observe(self, call: Call, selected: Selected, finite: Tensor) -> None:
        """Lets the rule update its state, unless the loss is not finite: a bad step writes nothing.

        Nothing here waits for a GPU.
        """
        tensors = [*self.selection_state.parameters(), *self.selection_state.buffers()]
        before = [(t, t._version, t.clone()) for t in tensors]
        self.config.selection.observe(call, selected)
        for tensor, version, old in before:
            if tensor._version != version:
                tensor.copy_(tensor.where(finite, old))

    @torch.no_grad()
    def _count_fired(self, fired: Tensor, n_tokens: int, finite: Tensor) -> Tensor:
        """Updates tokens_since_fired with a good batch; returns which latents are dead (F)."""
        self.tokens_since_fired += n_tokens * finite
        self.tokens_since_fired.masked_fill_(fired & finite, 0)
        return self.tokens_since_fired >= self.config.dead_after

    def _auxk(
        self, tokens: Tensor, y: Tensor, sse: Tensor, error: Tensor, dead: Tensor, n_dead: int
    ) -> Tensor:
        c = self.config
        k_aux = c.k_aux or max(1, c.d_in // 2)
        b_enc: Tensor | None = self.b_enc
        lift = None
        if c.auxk in losses.KEEPS_NEGATIVE:  # encode keeps what is positive: all h are lifted
            lift = self._most_negative(tokens, dead)
            b_enc = lift.expand(len(self.latents)) if b_enc is None else self._wide(b_enc) + lift
        k = min(k_aux, n_dead)
        vals, idx = ops.encode(
            tokens,
            self.W_enc,
            b_enc,
            self._pre_bias,
            k=min(k, len(dead)),
            latents=dead,
            agree=None if self.shards is None else self.shards.best_of_token(k),
            precision=self.precision,
            backend=self.backend,
        )
        vals = vals if lift is None else vals - lift
        codes, share = Codes(vals, idx, len(self.latents)), min(n_dead / k_aux, 1)
        return losses.auxk(
            c.auxk, self._error, codes, self.b_dec, y, sse, error, share, self.backend, self.shards
        )

    @torch.no_grad()
    def _most_negative(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """More than -h for any h of these tokens and latents (0-d)."""
        x = tokens if self._pre_bias is None else tokens - self._pre_bias
        norms = row_norms(self.W_enc.detach())[latents]
        most = torch.linalg.vector_norm(x, dim=1).max() * norms.max()
        if self.b_enc is not None:
            most = most - self._wide(self.b_enc[latents]).min()
        return 1.01 * most.clamp(min=1e-6)

    # ---- the decoder's norm ----

    @torch.no_grad()
    def project_decoder_gradient_(self) -> None:
        """With decoder_norm "unit": removes from W_dec's gradient what only changes row norms."""
        if self.config.decoder_norm == "unit" and self.W_dec.grad is not None:
            ops.project_rows_(self.W_dec.grad, self.W_dec, backend=self.backend)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """With decoder_norm "unit": scales every row of W_dec back to norm 1."""
        if self.config.decoder_norm == "unit":
            ops.normalize_rows_(self.W_dec, backend=self.backend)

    # ---- start and scale ----

    @torch.no_grad()
    def initialize_from_(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        scale: bool = True,
        b_dec: Literal["geometric_median", "mean", "zero"] = "geometric_median",
        fit_encoder: bool = False,
    ) -> None:
        """Sets the start from a sample of activations x (n, D) and targets (n, D_out).

        With scale, the coordinates of x' = s·x have a variance of 1 on average, so that the mse is
        a fraction of the variance and learning rates and coefficients mean the same on any data.
        b_dec starts at a centre of the (scaled) target; a rule may adapt what it starts with. With
        fit_encoder, activations are scaled by the one factor that reconstructs the sample best: the
        most active of very many random latents point the same way, and what they decode to together
        is too long by far.
        """
        if b_dec not in B_DEC_STARTS:
            raise ValueError(f"b_dec: expected one of {', '.join(B_DEC_STARTS)}, got {b_dec!r}")
        x = self._tokens(x, self.config.d_in, "x")
        if len(x) == 0:
            raise ValueError("x: expected at least one token, got none")
        y = x if target is None else self._tokens(target, self.b_dec.numel(), "target")
        if self.config.is_transcoder and target is None:
            raise ValueError("target: expected a sample of targets for a transcoder, got None")
        if scale:
            for t, buffer in ((x, self.input_scale), (y, self.output_scale)):
                deviation = t.float() - _mean(t, self.backend)
                variance = float(ops.column_sum(deviation * deviation).double().mean()) / len(t)
                if variance > 0:
                    buffer.fill_(variance**-0.5)
        y = y.float() * self._out_scale
        if b_dec == "geometric_median":
            self.b_dec.copy_(geometric_median(y, backend=self.backend))
        elif b_dec == "mean":
            self.b_dec.copy_(_mean(y, self.backend))
        self.config.selection.start_(self._call(self._scaled(x), None))
        if fit_encoder:
            self._fit_encoder_(x, y)
        if self.shards is not None:  # that processors differ must not let the ranks drift apart
            replicated = [t for name, t in self.state_dict().items() if name not in BY_LATENT]
            self.shards.equalize_(replicated)

    def _fit_encoder_(self, x: Tensor, y: Tensor) -> None:
        """h ← s·h with the s > 0 that minimises Σ‖y - b_dec - s·W_dec z‖², y being scaled."""
        product = square = 0.0
        for tokens, target in zip(x.split(4096), y.split(4096), strict=True):
            decoded = self._decoded(self.encode(tokens, training=False), None)
            centred = target - self._wide(self.b_dec)
            product += float(total(decoded * centred, backend=self.backend))
            square += float(total(decoded.square(), backend=self.backend))
        if product > 0:
            factor = product / square
            for p in (self.W_enc, self.b_enc):
                if p is not None:
                    p.mul_(factor)
            self.config.selection.rescale_(self.selection_state, factor)

    @torch.no_grad()
    def fold_scale_(self) -> SAE:
        """Folds the scales into the weights: same reconstruction, scales of 1. Returns self.

        Activations shrink by the scale of what is reconstructed, and W_dec keeps its norms; ReLU
        and the selection do not mind a positive factor.
        """
        s_in, s_out = self.input_scale.double(), self._out_scale.double()
        for p, factor in (
            (self.W_enc, s_in / s_out),
            (self.b_enc, 1 / s_out),
            (self.b_dec, 1 / s_out),
            (self.W_skip, s_in / s_out),
        ):
            if p is not None and factor != 1:
                p.mul_(float(factor))
        self.config.selection.rescale_(self.selection_state, float(1 / s_out))
        self.input_scale.fill_(1)
        self.output_scale.fill_(1)
        return self

    @torch.no_grad()
    def fold_decoder_norm_(self) -> SAE:
        """Moves the norms of W_dec's rows into the encoder: same reconstruction, norms of 1.

        ValueError where the selection would not be the same. Returns self.
        """
        norms = row_norms(self.W_dec)
        norms = norms.where(norms > 0, 1)
        self.config.selection.fold_norms_(self.selection_state, norms)
        self.W_enc.copy_(self.W_enc * norms[:, None])
        self.W_dec.copy_(self.W_dec / norms[:, None])
        if self.b_enc is not None:
            self.b_enc.copy_(self.b_enc * norms)
        return self

    # ---- files ----

    def save(self, folder: str | Path) -> None:
        """Writes config.json and sae.safetensors; each appears whole or not at all.

        Shards write one file together, the same that one process would.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = folder / "sae.safetensors", folder / "config.json"
        new_weights, new_config = Path(f"{weights}.tmp"), Path(f"{config}.tmp")
        try:
            write_tensors(new_weights, self.state_dict(), self.part)
            if self.writes:
                write_json(new_config, self.config.to_dict())
                os.replace(new_weights, weights)
                os.replace(new_config, config)
        finally:
            if self.writes:
                new_weights.unlink(missing_ok=True)
                new_config.unlink(missing_ok=True)
        sync_folder(folder)

    @property
    def writes(self) -> bool:
        """Whether this process writes what only one of all shards can."""
        return self.shards is None or self.shards.first

    @property
    def part(self) -> Part | None:
        """Which rows of a file's tensors are this module's; None: all."""
        if self.shards is None:
            return None
        return Part(BY_LATENT, self.latents, self.config.d_sae, self.shards)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        shards: Shards | None = None,
    ) -> SAE:
        """The SAE that `save` wrote. ValueError names the file and what is wrong with it.

        shards: load their part of it, however many wrote it.
        """
        folder = Path(folder)
        for name in ("config.json", "sae.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: expected a file {name}, got none")
        config = SAEConfig.read(folder / "config.json")
        tensors = read_tensors(folder / "sae.safetensors")
        shape = (config.d_sae, config.d_out or config.d_in)
        if "W_dec" in tensors and tuple(tensors["W_dec"].shape) != shape:  # before F×D is allocated
            found = tuple(tensors["W_dec"].shape)
            raise ValueError(
                f"{folder / 'sae.safetensors'}: W_dec: expected shape {shape}, got {found}"
            )
        sae = cls(config, device="meta", shards=shards).to_empty(device=device or "cpu").eval()
        sae.tokens_since_fired.zero_()
        try:
            sae.load_state_dict(own_rows(tensors, sae.part))
        except RuntimeError as error:
            raise ValueError(f"{folder / 'sae.safetensors'}: {error}") from None
        return sae

    def extra_repr(self) -> str:
        return ", ".join(f"{f.name}={getattr(self.config, f.name)}" for f in fields(self.config))


def _check_sharded(config: SAEConfig, width: int) -> None:
    """ValueError: something in the configuration looks at all latents in one process."""
    rule = config.selection
    if not rule.sharded or getattr(rule, "nested", None):
        known = ", ".join(sorted(name for name, r in Selection.rules.items() if r.sharded))
        nested = " with nested budgets" if rule.sharded else ""
        raise ValueError(
            f"selection: expected one of {known}, without nested budgets, on shards, "
            f"got {rule.name}{nested}"
        )
    if config.multi_topk_coef:
        raise ValueError("multi_topk_coef: expected 0 on shards")
    if config.auxk in losses.KEEPS_NEGATIVE:
        raise ValueError(f"auxk: expected a variant with a ReLU on shards, got {config.auxk}")
    try:
        rule.check(width)
    except ValueError as error:
        raise ValueError(f"a shard has d_sae = {width} latents: {error}") from None


def _fill_unit_rows(out: Tensor, latents: range, d_sae: int, generator: torch.Generator) -> None:
    """Random unit rows of these latents, whoever else makes the others' with this generator.

    Block by block, in the order of one draw of all of them: a generator of torch goes on in a next
    call where it stopped, but for a last block that is no multiple of 16 long.
    """
    starts = list(range(0, d_sae - _BLOCK_ROWS + 1, _BLOCK_ROWS)) or [0]
    wide = torch.promote_types(out.dtype, torch.float32)
    for start, stop in zip(starts, [*starts[1:], d_sae], strict=True):
        rows = torch.randn(stop - start, out.shape[1], generator=generator)
        first, last = max(start, latents.start), min(stop, latents.stop)
        if first < last:
            rows = rows[first - start : last - start].to(wide).contiguous()
            ops.normalize_rows_(rows)
            out[first - latents.start : last - latents.start] = rows.to(out.dtype)


def _with_terms(loss: Tensor, terms: dict[str, Tensor], more: Terms) -> Tensor:
    for name, (coef, term) in more.items():
        terms[name] = term
        loss = loss + coef * term
    return loss


def _mean(x: Tensor, backend: str | None = None) -> Tensor:
    return ops.column_sum(x, backend=backend) / max(len(x), 1)


def geometric_median(
    x: Tensor, *, max_steps: int = 100, tolerance: float = 1e-5, backend: str | None = None
) -> Tensor:
    """The point with the least mean distance to the rows of x (n, D), by Weiszfeld's iteration.

    Starts at the mean; stops when a step is shorter than `tolerance` times the median's own mean
    distance to the rows, or after max_steps. Leaves a row that it meets as Vardi and Zhang (2000)
    do. float32 (D).
    """
    x = x.float()
    centre = _mean(x, backend)
    for _ in range(max_steps):
        distance = torch.linalg.vector_norm(x - centre, dim=1)
        here = int((distance == 0).sum())
        weight = (1 / distance.clamp(min=1e-30)).where(distance > 0, 0)
        total = float(weight.double().cpu().numpy().sum())
        if total == 0:
            break
        pull = ops.column_sum((x - centre) * weight[:, None], backend=backend)
        step = pull / total
        if here:  # these rows hold the centre back, and keep it if the others pull less than that
            step = step * max(0.0, 1 - here / max(float(pull.norm()), 1e-30))
        centre = centre + step
        if float(step.norm()) <= tolerance * len(x) / total:
            break
    return centre
