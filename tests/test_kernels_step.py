"""Whole steps with backend "triton": the Trainer's own, from equal states, against the reference.

In Triton's interpreter, and on a GPU where there is one.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from aot import interpreted
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, reference
from fastsae.batches import Batch
from fastsae.data import open_source
from fastsae.optim import Adam
from fastsae.sae import SAEOutput
from fastsae.train import TrainConfig, Trainer

N, D, F, K = 8, 16, 96, 4
SETTINGS = {
    "adam": {},
    "lazy": {"optimizer": "adam-lazy"},
    "clip": {"clip": 0.05},
    "no-momentum": {"beta1": 0.0},
    "torch-adam": {"optimizer": "torch-adam"},
}


def make(backend: str, device: str, auxk: bool = False, **settings) -> Trainer:
    config = SAEConfig(D, F, TopK(K), dead_after=10**9, k_aux=3)
    sae = SAE(config, device=device, backend=backend)
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-0.1, 0.1, F))
        sae.b_dec.copy_(torch.linspace(-0.2, 0.2, D))
    if auxk:
        sae.tokens_since_fired[::2] = 10**9
    settings = {"steps": 10**6, "warmup_steps": 0, "lr": 1e-2, **settings}
    data = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return Trainer(sae, open_source(data), TrainConfig(**settings))


def batches() -> Tensor:
    return torch.randn(3, N, D, generator=torch.Generator().manual_seed(5))


def steps(device: str, settings: dict) -> list[dict[str, Tensor]]:
    """The loss and the parameters after each of three steps, with no reference function in use."""
    trainer = make("triton", device, **settings)
    forbidden = mock.Mock(side_effect=AssertionError("the reference ran"))
    names = ("encode", "decode_fwd", "decode_error", "decode_bwd_vals", "row_gradients", "adam_")
    found = []
    with mock.patch.multiple(reference, **dict.fromkeys(names, forbidden)):
        for batch in batches():
            loss = trainer.step(Batch(batch, None)).loss.detach()
            state = {name: p.detach().cpu().clone() for name, p in trainer.sae.named_parameters()}
            found.append({"loss": loss.cpu(), **state})
    return found


def bad_step(device: str, gradient: bool) -> dict[str, list[Tensor]]:
    """Parameters and optimiser state before and after a batch that is not finite.

    gradient: of the loss only the gradient is not, which clipping finds.
    """
    trainer = make("triton", device, clip=0.05 if gradient else None)
    first, bad, _ = batches()
    trainer.step(Batch(first, None))
    if gradient:
        own = trainer.sae.losses

        def steep(*batch: Tensor) -> SAEOutput:
            output = own(*batch)
            return replace(output, loss=output.loss + (trainer.sae.b_dec * 0).sqrt().sum())

        trainer.sae.losses = steep
    else:
        bad[3, 2] = torch.nan

    def snapshot() -> list[Tensor]:
        states = trainer.optimizer.state.values()
        of_adam = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [t.detach().cpu().clone() for t in [*trainer.sae.parameters(), *of_adam]]

    before = snapshot()
    trainer.step(Batch(bad, None))
    return {"before": before, "after": snapshot(), "finite": [trainer.all_finite.cpu()]}


def bf16_losses(device: str) -> list[float]:
    """A run with bfloat16 weights and moments, both rounded stochastically."""
    sae = SAE(SAEConfig(D, F, TopK(K), dtype="bfloat16"), device=device, backend="triton")
    adam = Adam(
        sae.parameters(), lr=1e-2, unit_rows=[sae.W_dec], state="bfloat16", backend="triton"
    )
    x = batches()[0].to(device)
    losses = []
    for _ in range(6):
        adam.zero_grad()
        loss = sae.losses(x).loss
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    kinds = {1: torch.float32, 2: torch.bfloat16}
    assert all(s["exp_avg_sq"].dtype == kinds[p.ndim] for p, s in adam.state.items())
    wide = Adam(sae.parameters(), lr=1e-2, unit_rows=[sae.W_dec], backend="triton")
    wide.load_state_dict(adam.state_dict())
    for p in sae.parameters():
        state, loaded = adam.state[p], wide.state[p]
        assert loaded["exp_avg"].dtype == torch.float32
        assert torch.equal(loaded["exp_avg"], state["exp_avg"].float())
        assert loaded["step"].item() == 6 and loaded["step"].device == p.device
    return losses


def fp16_losses(device: str) -> list[float]:
    """A run with float16 weights, whose moments are float32."""
    sae = SAE(SAEConfig(D, F, TopK(K), dtype="float16"), device=device, backend="triton")
    adam = Adam(sae.parameters(), lr=1e-2, unit_rows=[sae.W_dec], backend="triton")
    x = batches()[0].to(device)
    losses = []
    for _ in range(6):
        adam.zero_grad()
        loss = sae.losses(x).loss
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert all(p.dtype == torch.float16 for p in sae.parameters())
    assert all(s["exp_avg_sq"].dtype == torch.float32 for s in adam.state.values())
    return losses


def interpret(function, *args):
    return interpreted(function, "cpu", *args)


def on_gpu(function, *args):
    return function("cuda", *args)


RUNNERS = [
    pytest.param(interpret, id="interpreter"),
    pytest.param(on_gpu, id="gpu", marks=pytest.mark.gpu),
]
run_all = pytest.mark.parametrize("run", RUNNERS)


@run_all
@pytest.mark.parametrize("name", [*SETTINGS, "auxk"])
def test_steps_follow_the_reference(run, name):
    settings = {"auxk": True} if name == "auxk" else SETTINGS[name]
    oracle = make("reference", "cpu", **settings)
    for found, batch in zip(run(steps, settings), batches(), strict=True):
        loss = oracle.step(Batch(batch, None)).loss.detach()
        torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=0)
        for parameter, p in oracle.sae.named_parameters():
            # Adam's first steps are sign-like: a tiny gradient's sign may differ.
            error = (found[parameter] - p.detach()).abs()
            assert error.mean() < 1e-5, parameter
            assert (error > 1e-4).float().mean() < 1e-2, parameter


@run_all
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_bad_step_writes_nothing(run, gradient):
    found = run(bad_step, gradient)
    assert not found["finite"][0]
    assert len(found["before"]) > 8
    for before, after in zip(found["before"], found["after"], strict=True):
        assert torch.equal(before, after)


@run_all
def test_bf16_weights_and_state_train(run):
    losses = run(bf16_losses)
    assert losses[-1] < 0.8 * losses[0]


@run_all
def test_fp16_weights_train(run):
    losses = run(fp16_losses)
    assert losses[-1] < 0.8 * losses[0]
