"""Fast…TrainingSAE in FastSAETrainer, and in SAETrainer while `accelerate` is on."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import sae_lens
import torch
from datasets import Dataset
from test_sae_lens import TRAINING, D, F, K, Made, N, batch, make, train, trainer_of, training
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from fastsae.integrations import sae_lens as fast
from fastsae.integrations.lazy import Lazy
from fastsae.integrations.sae_lens import accelerate, restore
from fastsae.integrations.sae_lens.fused import RowAdam

CLASSES = {
    "topk": fast.FastTopKTrainingSAE,
    "batchtopk": fast.FastBatchTopKTrainingSAE,
    "matryoshka": fast.FastMatryoshkaBatchTopKTrainingSAE,
    "jumprelu": fast.FastJumpReLUTrainingSAE,
}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    restore()


def fast_of(kind: str) -> Any:
    """The Fast class with the weights of `make`."""
    sae = CLASSES[kind.split("-")[0]](TRAINING[kind]())
    sae.load_state_dict(make(kind).state_dict())
    return sae


def fused(kind: str, **settings: Any) -> Any:
    return trainer_of(fast_of(kind), fast.FastSAETrainer, **settings)


def assert_same_state(a: Any, b: Any, rel: float = 1e-3) -> None:
    theirs, ours = a.sae.state_dict(), b.sae.state_dict()
    assert theirs.keys() == ours.keys()
    start = make("topk").W_dec
    for name, value in theirs.items():
        assert ours[name].shape == value.shape and ours[name].is_contiguous()
        error = (ours[name] - value).norm()
        assert error <= rel * (value.norm() + 1e-3), f"{name}: {error} of {value.norm()}"
    assert start.shape == theirs["W_dec"].shape
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        differs = (getattr(a, name) != getattr(b, name)).float().mean()
        assert differs < 0.01, name


@training
def test_runs_stay_together(kind: str) -> None:
    ours, theirs = fused(kind), trainer_of(make(kind))
    expected = train(theirs, 10)
    assert train(ours, 10) == pytest.approx(expected, rel=1e-4)
    assert int(theirs.dead_neurons.sum()) > 0
    assert_same_state(theirs, ours)
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]


@training
def test_a_step_from_an_equal_state(kind: str) -> None:
    """At 20 points of a run: the update of every parameter."""
    theirs = trainer_of(make(kind))
    for i in range(20):
        ours = fused(kind)
        ours.sae.load_state_dict(theirs.sae.state_dict())
        for name in ("act_freq_scores", "n_forward_passes_since_fired"):
            setattr(ours, name, getattr(theirs, name).clone())
        if i:
            ours.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))
            ours.lr_scheduler.load_state_dict(copy.deepcopy(theirs.lr_scheduler.state_dict()))
        before = {name: t.clone() for name, t in theirs.sae.state_dict().items()}
        expected = float(theirs.step(batch(i)).loss.detach())
        assert float(ours.step(batch(i)).loss.detach()) == pytest.approx(expected, rel=1e-5)
        got = ours.sae.state_dict()
        for name, value in theirs.sae.state_dict().items():
            moved = (value - before[name]).norm()
            # The first steps of Adam are signs of gradients, of which some are rounding.
            assert (got[name] - value).norm() <= 0.02 * moved + 1e-7, (i, name)


def made_in_a_step(trainer: Any) -> set[str]:
    """What returns matrices (F, D) or (D, F) other than weights and moments."""
    train(trainer, 1)
    owned = [*trainer.sae.parameters()]
    for state in trainer.optimizer.state.values():
        owned += [t for t in state.values() if isinstance(t, Tensor)]
    with Made({(F, D), (D, F)}, owned) as made:
        train(trainer, 1)
    return made.operations


@training
def test_a_step_makes_no_gradient_matrix(kind: str) -> None:
    trainer = fused(kind, dead_feature_window=1000)
    assert not made_in_a_step(trainer)
    assert trainer.sae.W_enc.grad is None and trainer.sae.W_dec.grad is None
    # Not so in SAELens's own trainer.
    assert "fastsae.row_gradients.default" in made_in_a_step(trainer_of(fast_of(kind)))


def test_accelerated_trainers_fuse_them() -> None:
    assert isinstance(trainer_of(fast_of("topk")).optimizer, torch.optim.Adam)
    with accelerate():
        trainer = trainer_of(fast_of("topk"))
        assert isinstance(trainer.optimizer, RowAdam)
        assert isinstance(trainer_of(make("topk")).optimizer, torch.optim.Adam)
        again = trainer_of(fast_of("topk"), fast.FastSAETrainer)
        assert train(trainer, 3) == train(again, 3)


def run_on_a_model(sae: Any) -> Any:
    """SAELens's whole runner, on a small model with random weights."""
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=D, n_ctx=16, d_head=8, act_fn="relu", d_vocab=50, seed=0
        )
    )
    tokens = torch.randint(50, (400, 16), generator=torch.Generator().manual_seed(1))
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=TRAINING["topk"](),
        model_name="small",
        hook_name="blocks.0.hook_resid_post",
        dataset_path="none",
        is_dataset_tokenized=True,
        prepend_bos=False,
        context_size=16,
        training_tokens=6 * 320,
        train_batch_size_tokens=320,
        store_batch_size_prompts=8,
        n_batches_in_buffer=64,
        lr=1e-3,
        device="cpu",
        output_path=None,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(0)
    return sae_lens.LanguageModelSAETrainingRunner(
        config,
        override_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        override_model=model,
        override_sae=sae,
    ).run()


def test_in_the_runner() -> None:
    theirs = run_on_a_model(make("topk"))
    with accelerate():
        ours = run_on_a_model(fast_of("topk"))
        accelerated = run_on_a_model(make("topk"))
    assert ours.W_enc.T.is_contiguous()  # it was fused
    start = make("topk").state_dict()
    for name, value in theirs.state_dict().items():
        moved = (value - start[name]).norm()
        assert moved > 0
        for other in (ours, accelerated):
            assert (other.state_dict()[name] - value).norm() < 0.01 * moved, name


def test_other_saes_are_trained_as_they_were() -> None:
    ours, theirs = trainer_of(make("topk"), fast.FastSAETrainer), trainer_of(make("topk"))
    assert isinstance(ours.optimizer, torch.optim.Adam)
    assert train(ours, 3) == train(theirs, 3)


@training
def test_accelerated_without_patches(kind: str) -> None:
    """In SAELens's own trainer, with its Adam."""
    ours, theirs = trainer_of(fast_of(kind)), trainer_of(make(kind))
    expected = train(theirs, 5)
    assert train(ours, 5) == pytest.approx(expected, rel=1e-4)
    assert isinstance(ours.step(batch(7)).feature_acts, Lazy)
    assert type(theirs.step(batch(7)).feature_acts) is Tensor


def test_gradients_outside_of_a_step_are_the_sae_s_own() -> None:
    trainer = fused("topk")
    train(trainer, 2)
    with pytest.raises(KeyError):
        trainer.sae.mse_loss_fn = lambda *args: {}["missing"]
        trainer.step(batch(3))
    sae, x = trainer.sae, batch(4)
    del sae.mse_loss_fn
    sae.mse_loss_fn = sae_lens.saes.sae.mse_loss
    plain = make("topk")
    plain.load_state_dict(sae.state_dict())
    found = []
    for s in (sae, plain):
        s.zero_grad()
        s(x).square().mean().backward()
        found.append({name: p.grad for name, p in s.named_parameters()})
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


def test_hooks_in_a_fused_step() -> None:
    """SAELens's own forward then, whose gradients are dense, and the same update."""
    ours, theirs = fused("topk"), trainer_of(make("topk"))
    hook = [("hook_sae_acts_post", lambda t, hook: t * 0.9)]
    with ours.sae.hooks(fwd_hooks=hook), theirs.sae.hooks(fwd_hooks=hook):
        assert train(ours, 4) == pytest.approx(train(theirs, 4), rel=1e-4)
    assert train(ours, 2) == pytest.approx(train(theirs, 2), rel=1e-4)
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_checkpoints_are_sae_lens_own(beta1: float, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"adam_beta1": beta1, "adam_beta2": 0.5, "lr_warm_up_steps": 3}
    settings |= {"checkpoint_path": str(tmp_path)}
    ours, theirs = fused("batchtopk", **settings), trainer_of(make("batchtopk"), **settings)
    train(ours, 5), train(theirs, 5)
    ours.save_checkpoint("ours"), theirs.save_checkpoint("theirs")
    resumed = []
    for folder, trainer in itertools.product(
        ("ours", "theirs"),
        (lambda: fused("batchtopk", **settings), lambda: trainer_of(make("batchtopk"), **settings)),
    ):
        new = trainer()
        new.load_trainer_state(tmp_path / folder)
        new.sae.load_weights_from_checkpoint(tmp_path / folder)
        assert new.n_training_steps == 5
        resumed.append(train(new, 3))
    for losses in resumed[1:]:
        assert losses == pytest.approx(resumed[0], rel=1e-4)
    stored = [
        torch.load(tmp_path / folder / "trainer_state.pt")["optimizer"]["state"]
        for folder in ("ours", "theirs")
    ]
    assert stored[0].keys() == stored[1].keys()
    for a, b in zip(stored[0].values(), stored[1].values(), strict=True):
        assert a.keys() == b.keys() and float(a["step"]) == float(b["step"])
        assert a["exp_avg"].shape == b["exp_avg"].shape
        torch.testing.assert_close(a["exp_avg_sq"], b["exp_avg_sq"], rtol=0.05, atol=1e-7)


def test_saved_for_inference(tmp_path: Any) -> None:
    trainer = fused("topk")
    train(trainer, 2)
    trainer.sae.save_inference_model(tmp_path)
    frozen = sae_lens.SAE.load_from_disk(tmp_path)
    x = batch(50)
    torch.testing.assert_close(frozen(x), trainer.sae(x), atol=1e-5, rtol=1e-4)
    assert trainer.sae.state_dict()["W_enc"].shape == (D, F)
    copied = copy.deepcopy(trainer.sae)
    assert torch.equal(copied(x), trainer.sae(x))


def test_a_fit(tmp_path: Any) -> None:
    trainer = fused(
        "matryoshka",
        total_training_samples=5 * N,
        save_final_checkpoint=True,
        checkpoint_path=str(tmp_path),
        n_checkpoints=1,
    )
    sae = trainer.fit()
    assert sae.cfg.metadata.l0 == pytest.approx(K, rel=0.2)
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path / f"final_{5 * N}")
    assert type(again) is sae_lens.MatryoshkaBatchTopKTrainingSAE
    assert torch.equal(again.W_enc, sae.W_enc)


def test_weights_moved_elsewhere_are_refused() -> None:
    trainer = fused("topk")
    train(trainer, 1)
    trainer.sae.W_enc.data = trainer.sae.W_enc.data.clone()
    with pytest.raises(RuntimeError, match="W_enc: expected the memory that the trainer was made"):
        train(trainer, 1)


def test_reading_hidden_pre_after_the_update_is_refused() -> None:
    trainer = fused("topk")
    output = trainer.step(batch(0))
    assert output.feature_acts.sum() > 0
    with pytest.raises(RuntimeError, match=r"expected .* before"):
        output.hidden_pre.mean()


def test_a_gradient_that_is_not_finite_writes_nothing() -> None:
    trainer = fused("topk")
    train(trainer, 1)
    before = {name: t.clone() for name, t in trainer.sae.state_dict().items()}
    with pytest.raises(FloatingPointError, match="gradient: expected a finite norm"):
        trainer.step(batch(1).index_fill(0, torch.tensor(2), torch.nan))
    assert all(torch.equal(t, before[name]) for name, t in trainer.sae.state_dict().items())


@training
def test_autocast(kind: str) -> None:
    ours, theirs = fused(kind, autocast=True), trainer_of(make(kind))  # more exact than autocast
    assert train(ours, 5) == pytest.approx(train(theirs, 5), rel=1e-2)
