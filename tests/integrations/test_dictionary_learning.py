"""fastsae.integrations.dictionary_learning against dictionary_learning itself."""

import copy
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import assert_within_eager, randn, run_child
from dictionary_learning import AutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from torch import Tensor

from fastsae.integrations import dictionary_learning as fast

D, F, K, N = 24, 200, 5, 96
GROUPS = {"group_fractions": [0.25, 0.25, 0.5], "group_weights": [0.5, 0.3, 0.2]}
TRAINERS = {
    "topk": (TopKTrainer, fast.FastTopKTrainer, {}),
    "batchtopk": (BatchTopKTrainer, fast.FastBatchTopKTrainer, {}),
    "matryoshka": (MatryoshkaBatchTopKTrainer, fast.FastMatryoshkaBatchTopKTrainer, GROUPS),
}
trainers = pytest.mark.parametrize("name", TRAINERS)


def batches(n: int, seed: int = 1) -> list[Tensor]:
    """Activations with sparse causes, off centre."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(64, D, generator=generator)
    found = []
    for _ in range(n):
        active = torch.rand(N, 64, generator=generator) < 0.1
        strength = torch.rand(N, 64, generator=generator) * active
        found.append(strength @ causes + 0.05 * torch.randn(N, D, generator=generator) + 1)
    return found


def arguments(name: str, **more: Any) -> dict[str, Any]:
    """Such that a run of 30 steps sees warm-up, decay, thresholds and dead latents."""
    settings = {"steps": 30, "activation_dim": D, "dict_size": F, "k": K, "layer": 0}
    settings |= {"lm_name": "none", "seed": 0, "device": "cpu", "lr": 2e-3, "warmup_steps": 4}
    return settings | {"decay_start": 20, "threshold_start_step": 5} | TRAINERS[name][2] | more


def make(cls: type, name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    trainer = cls(**arguments(name, **more))
    trainer.dead_feature_threshold = 250
    trainer.ae.to(dtype)
    return trainer


def parameters(trainer: Any) -> list[Tensor]:
    """W_enc (F, D), b_enc, W_dec (F, D), b_dec: views."""
    ae = trainer.ae
    if isinstance(ae, MatryoshkaBatchTopKSAE):
        return [ae.W_enc.T, ae.b_enc, ae.W_dec, ae.b_dec]
    return [ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec]


def owners(trainer: Any) -> list[tuple[Tensor, bool]]:
    """What the optimiser's state is kept under, in that order, and whether it is transposed."""
    if hasattr(trainer, "leaves"):
        return [(leaf, False) for leaf in trainer.leaves]
    ae = trainer.ae
    if isinstance(ae, MatryoshkaBatchTopKSAE):
        return [(ae.W_enc, True), (ae.b_enc, False), (ae.W_dec, False), (ae.b_dec, False)]
    found = [(ae.encoder.weight, False), (ae.encoder.bias, False)]
    return [*found, (ae.decoder.weight, True), (ae.b_dec, False)]


def copy_state(source: Any, target: Any) -> None:
    """Everything that a step of the library's trainer depends on, in the target's dtype."""
    target.ae.load_state_dict(source.ae.state_dict())
    target.num_tokens_since_fired = source.num_tokens_since_fired.clone()
    target.optimizer.param_groups[0]["lr"] = source.optimizer.param_groups[0]["lr"]
    for (p, p_turned), (q, q_turned) in zip(owners(source), owners(target), strict=True):
        state = source.optimizer.state[p]
        if not state:
            continue
        moments = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            value = state[moment].T if p_turned else state[moment]
            value = (value.T if q_turned else value).to(q.dtype)
            moments[moment] = torch.empty_like(q).copy_(value)
        if hasattr(target, "leaves"):
            rows, step = len(q) if q.ndim == 2 else 1, int(state["step"])
            moments |= {"step": step, "last": torch.full((rows,), step, dtype=torch.int32)}
        else:
            moments["step"] = state["step"].clone()
        target.optimizer.state[q] = moments


# ---- trainers ----


@trainers
def test_a_step_from_each_state_of_a_run_is_theirs(name: str) -> None:
    """24 states. Error against their step in float64: not above their own in float32."""
    theirs, ours, _ = TRAINERS[name]
    run, eager, got = make(theirs, name), make(theirs, name), make(ours, name)
    exact = make(theirs, name, torch.float64)
    dead = 0
    for step, x in enumerate(batches(24)):
        for trainer in (eager, got, exact):
            copy_state(run, trainer)
        losses = [t.update(step, x.to(t.ae.b_dec.dtype)) for t in (got, eager, exact)]
        assert_within_eager(*(torch.tensor(v, dtype=torch.float64) for v in losses), rtol=1.2e-7)
        for triple in zip(*(parameters(t) for t in (got, eager, exact)), strict=True):
            assert_within_eager(*(p.detach() for p in triple))
        assert_within_eager(*(t.ae.threshold for t in (got, eager, exact)))
        assert torch.equal(got.num_tokens_since_fired, exact.num_tokens_since_fired)
        ours_log, theirs_log = (t.get_logging_parameters() for t in (got, eager))
        assert ours_log.keys() == theirs_log.keys()
        for key, value in ours_log.items():
            expected = torch.as_tensor(theirs_log[key]).item()
            assert float(value) == pytest.approx(expected, rel=1e-5), key
        dead += got.dead_features
        run.update(step, x)
    assert dead and float(run.ae.threshold) > 0


@trainers
def test_ten_steps_agree_and_a_longer_run_is_as_good(name: str) -> None:
    schedule = {"steps": 150, "decay_start": 100, "lr": 5e-3}
    theirs, ours = (make(cls, name, **schedule) for cls in TRAINERS[name][:2])
    *data, holdout = batches(151)
    for step, x in enumerate(data):
        a, b = theirs.update(step, x), ours.update(step, x)
        if step < 10:
            assert b == pytest.approx(a, rel=1e-4)
            for p, q in zip(parameters(theirs), parameters(ours), strict=True):
                torch.testing.assert_close(q, p, rtol=0, atol=1e-5)
    variance = (holdout - holdout.mean(0)).square().sum()
    with torch.no_grad():
        fvu = [float((holdout - t.ae(holdout)).square().sum() / variance) for t in (theirs, ours)]
    assert fvu[1] == pytest.approx(fvu[0], rel=5e-3)
    assert fvu[1] < 0.8


@trainers
def test_loss_outside_of_a_step_is_theirs_with_its_log_and_gradients(name: str) -> None:
    theirs, ours = (make(cls, name) for cls in TRAINERS[name][:2])
    for step, x in enumerate(batches(8)):
        theirs.update(step, x)
    copy_state(theirs, ours)
    x = batches(1, seed=5)[0]
    logs = [t.loss(x, step=9, logging=True) for t in (theirs, ours)]
    assert logs[0]._fields == logs[1]._fields
    for field in ("x", "x_hat", "f"):
        a, b = (getattr(log, field) for log in logs)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        assert b.is_contiguous()
    assert logs[0].losses.keys() == logs[1].losses.keys()
    assert logs[1].losses == pytest.approx(logs[0].losses, rel=1e-5)
    for trainer in (theirs, ours):
        trainer.ae.zero_grad()
        trainer.loss(x, step=10).backward()
    named = dict(ours.ae.named_parameters())
    for key, p in theirs.ae.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(named[key].grad, p.grad, rtol=1e-4, atol=1e-5, msg=key)


@trainers
def test_trainSAE_writes_the_same_files(name: str, tmp_path: Path) -> None:
    configs = [{"trainer": cls, **arguments(name)} for cls in TRAINERS[name][:2]]
    settings = {"save_steps": [5], "log_steps": 4, "verbose": True, "normalize_activations": True}
    trainSAE(batches(12), configs, steps=11, save_dir=str(tmp_path), device="cpu", **settings)
    theirs, ours = tmp_path / "trainer_0", tmp_path / "trainer_1"
    assert json.loads((ours / "config.json").read_text()) == json.loads(
        (theirs / "config.json").read_text()
    )
    for file in ("ae.pt", "checkpoints/ae_5.pt"):
        a, b = (torch.load(folder / file) for folder in (theirs, ours))
        assert list(a) == list(b)
        for key in a:
            assert a[key].dtype == b[key].dtype
            torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-4, msg=key)
    x = batches(1, seed=6)[0]
    dictionary, config = load_dictionary(str(ours), device="cpu")
    again = getattr(fast, config["trainer"]["dict_class"]).from_pretrained(ours / "ae.pt")
    assert type(again) is type(fast.accelerated(dictionary))
    torch.testing.assert_close(again(x), dictionary(x), rtol=1e-5, atol=1e-5)


def test_without_auxk_dead_latents_cost_nothing_and_change_nothing() -> None:
    theirs, ours = (cls(**arguments("topk", auxk_alpha=0)) for cls in TRAINERS["topk"][:2])
    for step, x in enumerate(batches(6)):
        for trainer in (theirs, ours):
            trainer.dead_feature_threshold = 1
        assert ours.update(step, x) == pytest.approx(theirs.update(step, x), rel=1e-5)
    assert ours.dead_features > 0 and ours.pre_norm_auxk_loss == -1


@trainers
def test_a_step_that_cannot_be_taken_changes_nothing(name: str) -> None:
    trainer = make(TRAINERS[name][1], name)
    x = batches(1)[0]
    trainer.update(1, x)
    before = copy.deepcopy(trainer.ae.state_dict())
    x[3, 4] = torch.nan
    for step in (0, 2):
        with pytest.raises(ValueError, match="finite"):
            trainer.update(step, x)
    x[3, 4] = 1e30  # the loss is not finite
    with pytest.raises(FloatingPointError, match="gradient: expected a finite norm"):
        trainer.update(2, x)
    for key, value in trainer.ae.state_dict().items():
        assert torch.equal(value, before[key])


def frozen(trainer: Any, part: str) -> list[Tensor]:
    """Freezes W_enc and b_enc, or b_dec."""
    ae = trainer.ae
    if part == "b_dec":
        found = [ae.b_dec]
    elif isinstance(ae, MatryoshkaBatchTopKSAE):
        found = [ae.W_enc, ae.b_enc]
    else:
        found = list(ae.encoder.requires_grad_(False).parameters())
    return [p.requires_grad_(False) for p in found]


@trainers
@pytest.mark.parametrize("part", ["encoder", "b_dec"])
def test_what_is_frozen_stays_and_the_rest_is_trained_as_theirs(name: str, part: str) -> None:
    theirs, ours = (make(cls, name) for cls in TRAINERS[name][:2])
    for trainer in (theirs, ours):
        parts = frozen(trainer, part)
        before = []
        for step, x in enumerate(batches(6)):
            trainer.update(step, x)
            before = before or [p.detach().clone() for p in parts]  # step 0 moves b_dec
        assert all(torch.equal(p, q) for p, q in zip(parts, before, strict=True))
        for p in parts:
            p.requires_grad_(True)
        trainer.update(6, batches(1, seed=3)[0])
        assert not any(torch.equal(p, q) for p, q in zip(parts, before, strict=True))
    for p, q in zip(parameters(theirs), parameters(ours), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5)


@trainers
def test_a_frozen_decoder_stays(name: str) -> None:
    """Which the library's trainers cannot have."""
    trainer = make(TRAINERS[name][1], name)
    decoder = parameters(trainer)[2]
    (trainer.ae.W_dec if name == "matryoshka" else trainer.ae.decoder.weight).requires_grad_(False)
    with torch.no_grad():
        decoder.mul_(2)
    before = [p.detach().clone() for p in parameters(trainer)]
    for step, x in enumerate(batches(2)):
        trainer.update(step, x)
    moved = [not torch.equal(p, q) for p, q in zip(parameters(trainer), before, strict=True)]
    assert moved == [True, True, False, True]


def test_what_a_fused_step_would_pass_by_is_refused() -> None:
    trainer, (x,) = make(fast.FastTopKTrainer, "topk"), batches(1)
    trainer.update(0, x)
    ae, before = trainer.ae, copy.deepcopy(trainer.ae.state_dict())

    def refused(what: str, step: Callable[..., Any] = trainer.update) -> None:
        with pytest.raises((RuntimeError, ValueError), match=what):
            step(1, x)

    weight = ae.decoder.weight
    for register in (weight.register_hook, weight.register_post_accumulate_grad_hook):
        handle = register(lambda _: None)
        refused(r"ae\.decoder\.weight: expected no gradient hooks, got some")
        trainer.loss(x, 1).backward()  # which makes that gradient
        handle.remove()
    handle = ae.encoder.register_forward_hook(lambda *_: None)
    refused(r"ae\.encoder: expected fastsae's own without hooks")
    refused(r"ae\.encoder: expected", lambda step, x: trainer.loss(x, step))
    handle.remove()
    ae.decode = lambda f: f
    refused(r"ae\.decode: expected fastsae's own")
    del ae.decode
    for key, value in ae.state_dict().items():
        assert torch.equal(value, before[key])
    trainer.update(1, x)


@trainers
def test_autocast_does_not_change_a_step(name: str) -> None:
    a, b = (make(TRAINERS[name][1], name) for _ in range(2))
    for step, x in enumerate(batches(8)):
        a.update(step, x)
        with torch.autocast("cpu", torch.bfloat16):
            b.update(step, x)
    assert a.dead_features
    for p, q in zip(parameters(a), parameters(b), strict=True):
        assert torch.equal(p, q)


def test_weight_decay_is_refused_also_from_a_file() -> None:
    trainer, (x,) = make(fast.FastTopKTrainer, "topk"), batches(1)
    trainer.update(0, x)
    state = trainer.optimizer.state_dict()
    state["param_groups"][0]["weight_decay"] = 0.1
    trainer.optimizer.load_state_dict(state)
    before = copy.deepcopy(trainer.ae.state_dict())
    with pytest.raises(ValueError, match=r"weight_decay: expected 0, got 0\.1, which would be dec"):
        trainer.update(1, x)
    for key, value in trainer.ae.state_dict().items():
        assert torch.equal(value, before[key])
    trainer.optimizer.param_groups[0]["weight_decay"] = 0
    trainer.update(1, x)


def test_the_trainer_follows_parameters_that_move() -> None:
    """load_state_dict(assign=True) replaces the parameters and their layout."""
    theirs, ours = (make(cls, "topk") for cls in TRAINERS["topk"][:2])
    state = {key: value.clone() for key, value in make(TopKTrainer, "topk").ae.state_dict().items()}
    state["decoder.weight"] = state["decoder.weight"].contiguous() + 0.01
    theirs.ae.load_state_dict(state)
    ours.ae.load_state_dict(state, assign=True)
    for step, x in enumerate(batches(6)):
        assert ours.update(step, x) == pytest.approx(theirs.update(step, x), rel=1e-5)
    torch.testing.assert_close(ours.ae.decoder.weight, theirs.ae.decoder.weight)


def test_dict_class_must_be_ours() -> None:
    with pytest.raises(TypeError, match="dict_class: expected fastsae's AutoEncoderTopK"):
        fast.FastTopKTrainer(**arguments("topk", dict_class=AutoEncoderTopK))
    own = type("Own", (fast.AutoEncoderTopK,), {})
    assert type(fast.FastTopKTrainer(30, D, F, K, 0, "none", own, warmup_steps=1).ae) is own


# ---- dictionaries ----


def jumprelu(cls: type) -> Any:
    ae = cls(D, F)
    ae.threshold.data.copy_(randn(F, seed=3).abs() + 2.0)
    ae.threshold.data[::7] = -0.5
    ae.b_enc.data.copy_(randn(F, seed=4) * 0.3)
    ae.b_enc.data[::7] -= 6.0
    return ae


def budgeted(cls: type, *arguments: Any) -> Any:
    ae = cls(D, F, K, *arguments)
    ae.threshold.fill_(3.0)
    return ae


def nested(cls: type) -> Any:
    return budgeted(cls, [50, 50, 100])


def inner(cls: type) -> Any:
    """Only the first two groups."""
    ae = nested(cls)
    ae.active_groups = 2
    return ae


DICTIONARIES: dict[str, tuple[Callable[[type], Any], type, type, str]] = {
    "topk": (budgeted, AutoEncoderTopK, fast.AutoEncoderTopK, "return_topk"),
    "batchtopk": (budgeted, BatchTopKSAE, fast.BatchTopKSAE, "return_active"),
    "matryoshka-inner": (
        inner,
        MatryoshkaBatchTopKSAE,
        fast.MatryoshkaBatchTopKSAE,
        "return_active",
    ),
    "matryoshka": (nested, MatryoshkaBatchTopKSAE, fast.MatryoshkaBatchTopKSAE, "return_active"),
    "jumprelu": (jumprelu, JumpReluAutoEncoder, fast.JumpReluAutoEncoder, "output_pre_jump"),
    "jumprelu-centred": (
        jumprelu,
        JumpReluAutoEncoder,
        fast.JumpReluAutoEncoder,
        "output_pre_jump",
    ),
}
dictionaries = pytest.mark.parametrize("name", DICTIONARIES)


def pair(name: str) -> tuple[Any, Any]:
    """The library's and ours with one state, b_dec and biases not 0."""
    build, theirs, ours, _ = DICTIONARIES[name]
    torch.manual_seed(0)
    a, b = build(theirs), build(ours)
    with torch.no_grad():
        a.b_dec.copy_(randn(D, seed=1) * 0.2)
        if hasattr(a, "encoder"):
            a.encoder.bias.copy_(randn(F, seed=2) * 0.1)
    b.load_state_dict(a.state_dict())
    assert list(a.state_dict()) == list(b.state_dict())
    a.apply_b_dec_to_input = b.apply_b_dec_to_input = name == "jumprelu-centred"
    return a, b


def tokens(*shape: int) -> Tensor:
    return randn(*shape, D, seed=7) * 1.5


@dictionaries
@pytest.mark.parametrize("shape", [(40,), (6, 7), (1,)], ids=str)
def test_dictionary_outputs_are_theirs(name: str, shape: tuple[int, ...]) -> None:
    a, b = pair(name)
    exact, x = copy.deepcopy(a).double(), tokens(*shape)
    thresholds = (
        ({},) if "jumprelu" in name else ({"use_threshold": True}, {"use_threshold": False})
    )
    for options in thresholds:
        f = [ae.encode(x.to(ae.b_dec.dtype), **options) for ae in (b, a, exact)]
        assert f[0].shape == (*shape, F) and f[0].is_contiguous()
        left_to_theirs = b.codes(x, options.get("use_threshold", True)) is None
        assert left_to_theirs == (name == "matryoshka-inner" and len(shape) == 2)
        assert 0 < int((f[1] != 0).sum())
        assert torch.equal(f[0] != 0, f[1] != 0)
        assert_within_eager(*(t.detach() for t in f))
        with torch.no_grad():
            assert_within_eager(b.decode(f[1]), a.decode(f[1]), exact.decode(f[2]), rtol=1e-6)
    outputs = [ae(x.to(ae.b_dec.dtype), output_features=True) for ae in (b, a, exact)]
    for triple in zip(*outputs, strict=True):
        assert_within_eager(*(t.detach() for t in triple), rtol=1e-6)
    assert torch.equal(b(x), outputs[0][0])
    if len(shape) == 2 and "matryoshka" in name:
        return  # return_active wants tokens in one dimension
    more = {DICTIONARIES[name][3]: True}
    for ours, theirs in zip(b.encode(x, **more), a.encode(x, **more), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@dictionaries
def test_dictionary_gradients_are_theirs(name: str) -> None:
    a, b = pair(name)
    exact = copy.deepcopy(a).double()
    weights = randn(30, D, seed=9)
    gradients = []
    for ae in (b, a, exact):
        x = tokens(30).to(ae.b_dec.dtype).requires_grad_()
        x_hat, f = ae(x, output_features=True)
        assert x_hat.requires_grad and f.requires_grad
        ((x_hat * weights).sum() + (f * f).sum() + ae.decode(f).square().sum()).backward()
        assert x.grad is not None
        found = {key: p.grad for key, p in ae.named_parameters() if p.grad is not None}
        gradients.append(found | {"x": x.grad})
    assert gradients[0].keys() == gradients[1].keys()
    for key in gradients[0]:
        assert_within_eager(*(g[key] for g in gradients), rtol=1e-5)


@dictionaries
def test_dictionaries_follow_dtype_and_assigned_files(name: str) -> None:
    a, b = pair(name)
    state = {key: value.contiguous() for key, value in a.state_dict().items()}
    b.load_state_dict(state, assign=True)
    x = tokens(20)
    with torch.inference_mode():
        torch.testing.assert_close(b(x), a(x), rtol=1e-5, atol=1e-5)
    b(x).sum().backward()  # what inference laid out anew can be trained
    a, b, x = a.bfloat16(), b.bfloat16(), x.bfloat16()
    exact = copy.deepcopy(a).double()
    outputs = [ae(x.to(ae.b_dec.dtype), output_features=True) for ae in (b, a, exact)]
    for triple in zip(*outputs, strict=True):
        assert triple[0].dtype == triple[1].dtype
        assert_within_eager(*(t.detach() for t in triple))


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka", "matryoshka-inner"])
def test_what_is_dense_is_left_to_the_library(name: str) -> None:
    """Before a threshold is learned every positive feature passes: above 5 % codes do not pay."""
    a, b = pair(name)
    x = tokens(20)
    for threshold in (-1.0, 0.0):
        for ae in (a, b):
            ae.threshold.fill_(threshold)
        assert torch.equal(b(x), a(x))
        assert torch.equal(b.encode(x), a.encode(x))
        assert (a.encode(x) != 0).float().mean() > 0.05
        with torch.no_grad():
            assert torch.equal(b.decode(a.encode(x)), a.decode(a.encode(x)))


def overridden(ae: Any, own: str) -> Any:
    base = type(ae)
    if own == "encode":
        ae.__class__ = type("Own", (base,), {"encode": lambda *given: 2 * base.encode(*given)})
    elif own == "decode":
        ae.__class__ = type("Own", (base,), {"decode": lambda *given: 1 + base.decode(*given)})
    else:
        ae.decode = lambda f: 3 * base.decode(ae, f)
    return ae


@dictionaries
@pytest.mark.parametrize("own", ["encode", "decode", "attribute"])
def test_forward_calls_what_a_subclass_or_an_object_overrides(name: str, own: str) -> None:
    x = tokens(30)
    plain = pair(name)[0](x)
    theirs, ours = (overridden(ae, own)(x, output_features=True) for ae in pair(name))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[0] - plain).abs().max() > 0.1


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_hooks_and_replaced_layers_are_seen(name: str, layer: str) -> None:
    x, seen, outputs = tokens(30), [], []

    def double(module: Any, inputs: Any, output: Tensor) -> Tensor:
        seen.append(module)
        return 2 * output

    for ae in pair(name):
        handle = getattr(ae, layer).register_forward_hook(double)
        outputs.append((ae(x), ae.encode(x), ae.decode(ae.encode(x).detach())))
        handle.remove()
        setattr(ae, layer, torch.nn.Sequential(getattr(ae, layer), torch.nn.Tanh()))
        outputs[-1] += (ae(x),)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert len(seen) == 2 * (3 if layer == "encoder" else 2)


@dictionaries
def test_what_they_refuse_to_decode_is_refused(name: str) -> None:
    a, b = pair(name)
    f = a.encode(tokens(30)).detach()
    for wrong in (f[:, : F // 2], f.bfloat16(), f.double(), f.int()):
        for ae in (a, b):
            with pytest.raises(RuntimeError):
                ae.decode(wrong)


@dictionaries
def test_autocast_transforms_and_thresholds_of_nan_are_the_library(name: str) -> None:
    a, b = pair(name)
    x = tokens(30)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda ae: ae(x),
            lambda ae: ae.encode(x),
            lambda ae: ae.decode(a.encode(x)),
        ):
            assert call(a).dtype == call(b).dtype
            assert torch.equal(call(a), call(b))
    if name in ("topk", "jumprelu", "jumprelu-centred"):  # others want two dimensions
        rows = torch.func.vmap(lambda t: b(t))(x[:, None])
        torch.testing.assert_close(rows[:, 0], a(x), rtol=1e-5, atol=1e-5)
    jacobians = [torch.func.jacrev(lambda t, ae=ae: ae(t).sum(0))(x[:2]) for ae in (a, b)]
    assert torch.equal(*jacobians)
    if name != "topk":  # its forward has no threshold
        for ae in (a, b):
            ae.threshold.data.fill_(torch.nan)
        assert torch.equal(b.encode(x), a.encode(x)) and not b.encode(x).any()
        assert torch.equal(b(x), a(x))


@dictionaries
def test_accelerated_shares_the_parameters(name: str) -> None:
    a, _ = pair(name)
    x = tokens(10)
    before = a(x)
    fast_one = fast.accelerated(a)
    assert isinstance(fast_one, type(a)) and type(fast_one) is not type(a)
    torch.testing.assert_close(fast_one(x), before, rtol=1e-5, atol=1e-5)
    a.b_dec.data += 1
    torch.testing.assert_close(fast_one(x), a(x), rtol=1e-5, atol=1e-5)


def test_accelerated_refuses_other_dictionaries() -> None:
    with pytest.raises(TypeError, match=r"dictionary: expected an AutoEncoderTopK, .* got Auto"):
        fast.accelerated(AutoEncoder(D, F))


# ---- the package ----


def test_other_versions_are_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = pair("topk")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2.0")
    refused = pytest.raises(RuntimeError, match=r"expected version 0\.1\.0, .* got 0\.2\.0; force=")
    for call in (
        lambda **more: fast.AutoEncoderTopK(D, F, K, **more),
        lambda **more: fast.accelerated(a, **more),
        lambda **more: fast.FastTopKTrainer(**arguments("topk"), **more),
    ):
        with refused:
            call()
        assert call(force=True) is not None


def test_fastsae_does_not_import_the_library() -> None:
    run_child(
        """
        import sys, fastsae, fastsae.integrations
        assert not {"dictionary_learning", "sparsify"} & set(sys.modules)
        """
    )


def test_bench_measures_every_case() -> None:
    command = [
        sys.executable,
        "bench/integrations.py",
        "dictionary_learning",
        "--shape",
        "260,16,512,4",
    ]
    command += ["--steps", "1", "--threads", "1", "--json", "-"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=-1, check=True)
    rows = json.loads(done.stdout)
    assert len({row["case"] for row in rows}) == len(rows) == 6
    for row in rows:
        assert [row[size] for size in "ndfk"] == [260, 16, 512, 4]
        assert row["ratio"] == row["before_s"] / row["after_s"]
