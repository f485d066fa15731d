"""SAEs for SAELens whose whole step is fused: no gradient of W_enc and W_dec exists either.

    trainer = FastSAETrainer(cfg, FastTopKTrainingSAE(sae_cfg), data_provider)

An SAE here is SAELens's class with the accelerated methods as its own, whether or not `accelerate`
is on. FastSAETrainer gives it fastsae.optim.Adam, which sums gradient rows where it updates them;
for that W_enc keeps its shape (D, F), and its memory holds latent after latent. While `accelerate`
is on, SAETrainer does so too for an SAE from here: `override_sae=` of SAELens's runner works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.saes import (
    BatchTopKTrainingSAE,
    JumpReLUTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,
    TopKTrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from fastsae.integrations.library import check_version
from fastsae.integrations.sae_lens.encoding import Method
from fastsae.integrations.sae_lens.methods import (
    METHODS,
    PROVEN,
    inherited,
    instead_of,
    replacements,
)
from fastsae.optim import Adam

CLIP = 1.0
"""The gradient norm that SAELens's step clips to."""


class Fast:
    """What the SAEs here share. RuntimeError as from `accelerate`, unless that is on."""

    W_enc: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version("sae-lens", PROVEN, force=bool(replacements.owners))
        super().__init__(*args, **kwargs)

    def latents_in_a_row(self) -> Tensor:
        """Puts W_enc's latents one after the other in memory; returns it as (F, D)."""
        rows = self.W_enc.detach().T.contiguous()
        self.W_enc.data = rows.T
        return rows

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """W_enc in SAELens's order, which safetensors wants."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        name = f"{prefix}W_enc"
        destination[name] = destination[name].contiguous()


def _accelerated(cls: type) -> type:
    for owner, name, stand_in in METHODS:
        if issubclass(cls, owner) and name not in cls.__dict__:
            setattr(cls, name, instead_of(inherited(cls, name), stand_in))
    return cls


@_accelerated
class FastTopKTrainingSAE(Fast, TopKTrainingSAE):
    """TopKTrainingSAE, accelerated and ready to be fused."""


@_accelerated
class FastBatchTopKTrainingSAE(Fast, BatchTopKTrainingSAE):
    """BatchTopKTrainingSAE, accelerated and ready to be fused."""


@_accelerated
class FastMatryoshkaBatchTopKTrainingSAE(Fast, MatryoshkaBatchTopKTrainingSAE):
    """MatryoshkaBatchTopKTrainingSAE, accelerated and ready to be fused."""


@_accelerated
class FastJumpReLUTrainingSAE(Fast, JumpReLUTrainingSAE):
    """JumpReLUTrainingSAE, accelerated and ready to be fused."""


class RowAdam(Adam):
    """fastsae's Adam for an SAE from here; its state_dict is that of torch.optim.Adam.

    So SAELens's checkpoints and those of a fused trainer are the same.
    """

    def __init__(self, sae: Any, lr: float, betas: tuple[float, float]) -> None:
        self.sae, self.rows = sae, nn.Parameter(sae.latents_in_a_row())
        super().__init__(
            [self.rows if p is sae.W_enc else p for p in sae.parameters()],
            lr=lr,
            betas=betas,
            clip=CLIP,
        )

    def _of_sae(self, p: Tensor, t: Tensor) -> Tensor:
        """A moment of p in the shape of the SAE's parameter, and back."""
        return t.T.contiguous() if p is self.rows else t

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Inside, gradients of W_enc belong to its rows; RuntimeError where these are not its own,
        or W_enc or W_dec has gradient hooks.

        Outside, the SAE's gradients are as everywhere.
        """
        if self.rows.data_ptr() != self.sae.W_enc.data_ptr():
            raise RuntimeError(
                "W_enc: expected the memory that the trainer was made with, got other; move or "
                "replace it before the trainer is made"
            )
        for name in ("W_enc", "W_dec"):
            p = getattr(self.sae, name)
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise RuntimeError(
                    f"{name}: expected no gradient hooks, got some; a fused step makes no gradient "
                    "of it, and a trainer of SAELens's own classes does"
                )
        self.zero_grad()
        self.sae.W_enc.grad = None
        self.rows.requires_grad_(self.sae.W_enc.requires_grad)
        object.__setattr__(self.sae, "bound_rows", self.rows)  # not a parameter of its own
        try:
            yield
        finally:
            del self.sae.__dict__["bound_rows"]
            self.receiving = False

    def step(self, *args: Any, **kwargs: Any) -> Any:
        given = self.sae.W_enc.grad  # of a step with hooks, which want dense matrices
        if given is not None:
            dense = given.T.contiguous()
            self.rows.grad = dense if self.rows.grad is None else self.rows.grad + dense
            self.sae.W_enc.grad = None
        return super().step(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        stored = super().state_dict()
        owned = [p for p, _ in self._owned()]
        beta2 = {i: g["betas"][1] for g in stored["param_groups"] for i in g["params"]}
        for i, state in stored["state"].items():
            p, v, steps = owned[i], state["exp_avg_sq"], int(state["step"])
            late = (steps - state["last"]).to(v.dtype)  # rows that nothing moved since then
            v = v * (beta2[i] ** late)[:, None] if v.ndim == 2 else v * beta2[i] ** late
            m = state.get("exp_avg", torch.zeros_like(v))
            stored["state"][i] = {
                "step": torch.tensor(float(steps)),
                "exp_avg": self._of_sae(p, m),
                "exp_avg_sq": self._of_sae(p, v),
            }
        return stored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        owned = dict(enumerate(p for p, _ in self._owned()))
        state = {}
        for i, given in state_dict["state"].items():
            p, steps = owned[i], int(given["step"])
            rows = len(p) if p.ndim == 2 else 1
            last = torch.full((rows,), steps, dtype=torch.int32, device=p.device)
            state[i] = {"step": steps, "last": last}
            kept = {"exp_avg": self.param_groups[0]["betas"][0], "exp_avg_sq": 1}
            for name in (name for name, wanted in kept.items() if wanted):
                state[i][name] = self._of_sae(p, given[name].to(p.device))
        super().load_state_dict({**state_dict, "state": state})


def _init(original: Method, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """SAETrainer.__init__: a fused optimiser for an SAE from here."""
    original(trainer, *args, **kwargs)
    sae, cfg = trainer.sae, trainer.cfg
    if not isinstance(sae, Fast) or isinstance(trainer.optimizer, RowAdam):
        return
    trainer.optimizer = RowAdam(sae, cfg.lr, (cfg.adam_beta1, cfg.adam_beta2))
    trainer.lr_scheduler = get_lr_scheduler(
        cfg.lr_scheduler_name,
        optimizer=trainer.optimizer,
        training_steps=cfg.total_training_steps,
        lr=cfg.lr,
        warm_up_steps=cfg.lr_warm_up_steps,
        decay_steps=cfg.lr_decay_steps,
        lr_end=cfg.lr_end,
        num_cycles=cfg.n_restart_cycles,
    )


def _train_step(original: Method, trainer: Any, sae: Any, sae_in: Tensor) -> TrainStepOutput:
    """SAETrainer._train_step, whose clipping and update are one for a fused optimiser."""
    if not isinstance(trainer.optimizer, RowAdam):
        return original(trainer, sae, sae_in)
    sae.train()
    step_input = TrainStepInput(
        sae_in=sae_in,
        coefficients=trainer.get_coefficients(),
        dead_neuron_mask=trainer.dead_neurons,
        n_training_steps=trainer.n_training_steps,
        is_logging_step=trainer._is_logging_step(),
    )
    with trainer.optimizer.whole_step():
        with trainer.autocast_if_enabled:
            output = sae.training_forward_pass(step_input=step_input)
        with torch.no_grad():
            fired = output.feature_acts.bool().float().sum(0)
            fired = fired.to_dense() if fired.is_sparse else fired  # use_sparse_activations
        output.loss.backward()
        trainer.optimizer.step()
    trainer.n_forward_passes_since_fired += 1
    trainer.n_forward_passes_since_fired[fired > 0] = 0
    trainer.act_freq_scores += fired
    trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
    trainer.lr_scheduler.step()
    for scheduler in trainer.coefficient_schedulers.values():
        scheduler.step()
    return output


TRAINER_METHODS: tuple[tuple[type, str, Method], ...] = (
    (SAETrainer, "__init__", _init),
    (SAETrainer, "_train_step", _train_step),
)


class FastSAETrainer(SAETrainer):
    """SAELens's trainer with the fused step for an SAE from here, and its own for any other.

    It trains with Adam, clipping and schedules as SAELens does. FloatingPointError where a gradient
    is not finite, before anything is written.
    """


for _owner, _name, _stand_in in TRAINER_METHODS:
    setattr(FastSAETrainer, _name, instead_of(inherited(FastSAETrainer, _name), _stand_in))
