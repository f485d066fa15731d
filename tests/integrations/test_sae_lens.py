"""SAELens with `accelerate`: the same results, in training and at inference.

Results are compared with SAELens's own in float64: the error is at most that of SAELens in float32.
"""

import copy
import importlib.metadata
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sae_lens
import torch
from common import assert_within_eager, randn
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes import topk_sae
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens import HookedTransformerConfig

from fastsae.integrations.lazy import Lazy
from fastsae.integrations.sae_lens import FastTopKTrainingSAE, accelerate, patch, restore
from fastsae.integrations.sae_lens.methods import METHODS, replacements

N, D, F, K = 259, 24, 640, 8
COMMON = {"d_in": D, "d_sae": F}
WIDTHS = [40, 200, F]

TRAINING: dict[str, Callable[[], Any]] = {
    "topk": lambda: sae_lens.TopKTrainingSAEConfig(**COMMON, k=K),
    "topk-plain": lambda: sae_lens.TopKTrainingSAEConfig(
        **COMMON, k=K, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False
    ),
    "batchtopk": lambda: sae_lens.BatchTopKTrainingSAEConfig(**COMMON, k=K + 0.5),
    "matryoshka": lambda: sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
        **COMMON, k=K, matryoshka_widths=list(WIDTHS)
    ),
    "matryoshka-aux": lambda: sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
        **COMMON, k=K, matryoshka_widths=list(WIDTHS), use_matryoshka_aux_loss=True
    ),
    **{
        f"jumprelu-{mode}": lambda mode=mode: sae_lens.JumpReLUTrainingSAEConfig(
            **COMMON,
            jumprelu_sparsity_loss_mode=mode,
            jumprelu_init_threshold=0.2,
            jumprelu_ste_to_input=mode == "tanh",
            pre_act_loss_coefficient=3e-3,
            l0_coefficient=1e-2,
            target_l0=12.0 if mode == "quadratic" else None,
        )
        for mode in ("step", "tanh", "quadratic")
    },
}
training = pytest.mark.parametrize("kind", TRAINING)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    restore()


def batch(seed: int, n: int = N) -> Tensor:
    """Tokens that are sums of a few of 100 directions."""
    directions = randn(100, D, seed=1000)
    weights = randn(n, 100, seed=seed).relu() * (randn(n, 100, seed=seed + 500) > 1)
    return weights @ directions / 4


def make(kind: str, **changes: Any) -> Any:
    cfg = TRAINING[kind]()
    for name, value in changes.items():
        setattr(cfg, name, value)
    torch.manual_seed(7)
    sae = sae_lens.TrainingSAE.get_sae_class_for_architecture(cfg.architecture())(cfg)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * randn(D, seed=3))
        sae.b_enc.copy_(0.05 * randn(F, seed=4))
        sae.W_dec.mul_(1 + 0.3 * randn(F, 1, seed=5))  # norms that matter
        sae.b_enc[::16] -= 3  # these never fire
        if kind.startswith("jumprelu"):
            sae.b_enc.sub_(0.05)  # else more than 5 % are active soon
    return sae


def in_float64(sae: Any) -> Any:
    return copy.deepcopy(sae).to(dtype=torch.float64)


def step_input(x: Tensor, dead: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(x, {"l0": 0.5}, dead, 0, False)


def results(sae: Any, x: Tensor, dead: Tensor | None, fast: bool = False) -> dict[str, Tensor]:
    """The losses, gradients and tensors of one step, which is accelerated or not."""
    sae.zero_grad()
    threshold = copy.deepcopy(getattr(sae, "topk_threshold", None))
    x = x.detach().requires_grad_()
    out = sae.training_forward_pass(step_input(x, dead))
    assert isinstance(out.feature_acts, Lazy) == fast
    (out.loss + (out.sae_out**2).mean()).backward()
    found = {f"losses/{name}": value for name, value in out.losses.items()}
    found |= {"loss": out.loss, "sae_out": out.sae_out, "acts": out.feature_acts.clone()}
    found |= {"hidden_pre": out.hidden_pre.clone(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in sae.named_parameters()}
    if threshold is not None:
        found["threshold"] = sae.topk_threshold
        sae.topk_threshold = threshold
    return {name: t.detach().clone() for name, t in found.items() if t is not None}


def compare(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert got.keys() == eager.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        # The rounding of a loss is that of its sum's terms; of another order, up to twice as much.
        try:
            assert_within_eager(value, eager[name], exact[name].double(), rtol=1e-6)
        except AssertionError:
            error, allowed = ((t - exact[name]).abs().max() for t in (value, eager[name]))
            size = exact[name].abs().max()
            raise AssertionError(f"{name}: {error:.3g}, not {allowed:.3g} of {size:.3g}") from None


def narrowest(sae: Any, h: Tensor, dead: Tensor) -> float:
    """How near (float64) pre-activations are to where rounding would choose other pairs."""

    def gap(h: Tensor, k: int) -> Tensor:
        best = h.topk(min(k + 1, h.shape[-1])).values
        return (best[..., k - 1] - best[..., k]).min() if best.shape[-1] > k else h.new_ones(())

    if hasattr(sae, "threshold"):
        distance = h - sae.threshold.double()
        return min(float((distance - c * sae.bandwidth).abs().min()) for c in (-0.5, 0, 0.5))
    k = sae.activation_fn.k
    per_batch = sae.cfg.architecture() != "topk"
    found = [gap(h.flatten(), int(k * len(h))) if per_batch else gap(h, k)]
    widths = [*getattr(sae.cfg, "matryoshka_widths", []), F]
    for start, width in [(0, F), *itertools.pairwise([0, *widths])]:
        level = dead[start:width].nonzero()[:, 0] + start
        if len(level):
            found.append(gap(h[:, level], D // 2))
    return min(found).item()


def trainer_of(sae: Any, cls: Any = sae_lens.SAETrainer, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "total_training_samples": 100 * N,
        "train_batch_size_samples": N,
        "lr": 5e-4,
        "lr_end": 5e-5,
        "dead_feature_window": 2,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    cfg = SAETrainerConfig(**(settings | changes))
    return cls(cfg=cfg, sae=sae, data_provider=(batch(i) for i in itertools.count()))


def train(trainer: Any, steps: int) -> list[float]:
    losses = []
    for i in range(steps):
        losses.append(trainer.step(batch(i)).loss.item())
        trainer.n_training_steps += 1
    return losses


# ---- training ----


@training
def test_steps_from_equal_states_along_a_run(kind: str) -> None:
    sae = make(kind)
    trainer = trainer_of(sae)
    for i in range(20):
        dead = trainer.dead_neurons
        for seed in itertools.count(100 * i):
            x = batch(seed)
            exact = results(in_float64(sae), x.double(), dead)
            if narrowest(sae, exact["hidden_pre"], dead) > 1e-7:
                break
        eager = results(sae, x, dead)
        with accelerate():
            got = results(sae, x, dead, fast=True)
        sae.zero_grad()
        compare(got, eager, exact)
        assert int((got["acts"] != 0).sum()) > N
        train(trainer, 1)
    assert int(trainer.dead_neurons.sum()) > 0  # so the losses on them were compared


@training
def test_runs_stay_together(kind: str) -> None:
    eager, fast = (trainer_of(make(kind)) for _ in range(2))
    expected = train(eager, 10)
    with accelerate():
        assert train(fast, 10) == pytest.approx(expected, rel=1e-4)
        log = fast.build_train_step_log_dict(fast.step(batch(11)), N)
    expected_log = eager.build_train_step_log_dict(eager.step(batch(11)), N)
    assert log == pytest.approx(expected_log, rel=1e-3)
    counted = ("act_freq_scores", "n_forward_passes_since_fired")
    for name in counted:
        differs = (getattr(eager, name) != getattr(fast, name)).float().mean()
        assert differs < 0.01, name


def fvu_of(trainer: Any, steps: int) -> float:
    """Of held-out tokens, after these steps."""
    train(trainer, steps)
    x = batch(999)
    with torch.no_grad():
        error = trainer.sae(x) - x
    return float(error.square().sum() / (x - x.mean(0)).square().sum())


def test_a_longer_run_explains_as_much() -> None:
    expected = fvu_of(trainer_of(make("topk"), lr=2e-3), 60)
    assert expected < 0.5
    with accelerate():
        got = fvu_of(trainer_of(make("topk"), lr=2e-3), 60)
    assert got == pytest.approx(expected, rel=5e-3)


class Made(TorchDispatchMode):
    """Records the operations that return a new matrix of some shapes."""

    def __init__(self, shapes: set[tuple[int, ...]], known: list[Tensor]) -> None:
        super().__init__()
        self.shapes, self.operations = shapes, set()
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not isinstance(t, Lazy) and tuple(t.shape) in self.shapes:
                if t.untyped_storage().data_ptr() not in self.known:
                    self.operations.add(str(func))
        return out


@training
def test_no_dense_product_in_a_step(kind: str) -> None:
    """Neither forward nor backward nor the trainer makes a matrix (N, F)."""
    trainer = trainer_of(make(kind), dead_feature_window=1000)
    with Made({(N, F), (F, N)}, []) as made:
        train(trainer, 1)
    assert made.operations
    with accelerate(), Made({(N, F), (F, N)}, []) as made:
        train(trainer, 1)
    assert not made.operations


def test_multi_sae_trainer() -> None:
    trainers = []
    for _ in range(2):
        saes = {"a": make("topk"), "b": make("batchtopk")}
        cfg = trainer_of(make("topk")).cfg
        trainers.append(
            sae_lens.training.multi_sae_trainer.MultiSAETrainer(
                cfg, saes, {"a": "hook", "b": "hook"}, iter(())
            )
        )
    losses = []
    for trainer, context in zip(trainers, (accelerate, torch.enable_grad), strict=True):
        with context():
            losses.append([train(t, 3) for t in trainer.trainers.values()])
    assert losses[0] == [pytest.approx(x, rel=1e-4) for x in losses[1]]


def test_a_fit_saves_and_resumes(tmp_path: Any) -> None:
    with accelerate():
        sae = make("batchtopk")
        trainer_of(
            sae,
            total_training_samples=6 * N,
            save_final_checkpoint=True,
            checkpoint_path=str(tmp_path),
        ).fit()
        folder = tmp_path / f"final_{6 * N}"
        again = sae_lens.TrainingSAE.load_from_disk(folder)
        resumed = trainer_of(again)
        resumed.load_trainer_state(folder)
        assert torch.equal(again(batch(1)), sae(batch(1)))
        assert resumed.n_training_steps == 6
        train(resumed, 1)


def test_hidden_pre_of_a_custom_loss() -> None:
    class Custom(sae_lens.TopKTrainingSAE):
        def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
            ours = (feature_acts * feature_acts.detach()).sum(-1).mean()
            pre = torch.nn.functional.softplus(hidden_pre[:, ::3]).mean()
            return {"ours": ours, "pre": pre, "norm": feature_acts.norm(p=1, dim=-1).mean()}

    torch.manual_seed(0)
    sae = Custom(TRAINING["topk"]())
    x = batch(0)
    exact = results(in_float64(sae), x.double(), None)
    eager = results(sae, x, None)
    with accelerate():
        compare(results(sae, x, None, fast=True), eager, exact)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_steps_on_sequences(kind: str) -> None:
    sae, x, dead = make(kind), batch(0, 7 * 40).view(7, 40, D), torch.arange(F) % 16 == 0
    exact = results(in_float64(sae), x.double(), dead)
    eager = results(sae, x, dead)
    with accelerate():
        compare(results(sae, x, dead, fast=True), eager, exact)


@training
def test_frozen_parameters_get_no_gradient(kind: str) -> None:
    x, dead = batch(0), torch.arange(F) % 16 == 0
    names = [name for name, _ in make(kind).named_parameters()]
    for frozen in (*([name] for name in names), names):
        found = []
        for context in (torch.enable_grad(), accelerate()):
            sae = make(kind)
            for name in frozen:
                sae.get_parameter(name).requires_grad_(False)
            with context:
                out = sae.training_forward_pass(step_input(x, dead))
            if frozen != names:
                out.loss.backward()
            found.append({name: p.grad for name, p in sae.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys() and not found[0].keys() & set(frozen)
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


# ---- inference ----


def inference(kind: str, **changes: Any) -> Any:
    torch.manual_seed(5)
    if "transcoder" in kind:
        cls, config = {
            "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig),
            "skip_transcoder": (sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig),
            "jumprelu_transcoder": (sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig),
            "jumprelu_skip_transcoder": (
                sae_lens.saes.JumpReLUSkipTranscoder,
                sae_lens.saes.JumpReLUSkipTranscoderConfig,
            ),
        }[kind]
        sae = cls(config(**COMMON, d_out=20, apply_b_dec_to_input=False, **changes))
    elif kind == "standard":
        sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**COMMON, **changes))
    elif kind == "jumprelu":
        sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**COMMON, **changes))
    else:
        scaled = kind == "topk"
        sae = sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(**COMMON, k=K, rescale_acts_by_decoder_norm=scaled, **changes)
        )
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.2 * torch.randn_like(p))
        sae.b_enc.sub_(2.0)  # few latents are active
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(0.4 * randn(F, seed=8))
    return sae


INFERENCE = (
    "topk",
    "topk-unscaled",
    "jumprelu",
    "standard",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
kinds = pytest.mark.parametrize("kind", INFERENCE)


def outputs(sae: Any, x: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    x = x.detach().requires_grad_()
    out = sae(x)
    (out**2).sum().backward()
    with torch.no_grad():
        acts = sae.encode(x)
        found = {"out": out, "acts": acts.clone(), "decoded": sae.decode(acts), "x.grad": x.grad}
        acts = sae.encode(x)
        acts[..., :50] *= 0.5
        acts[..., 60] += 1
        found["steered"] = sae.decode(acts)
    found |= {f"{name}.grad": p.grad for name, p in sae.named_parameters()}
    return {name: t.detach().clone() for name, t in found.items() if t is not None}


def compare_outputs(sae: Any, x: Tensor) -> None:
    exact = outputs(in_float64(sae), x.double())
    eager = outputs(sae, x)
    with accelerate():
        got = outputs(sae, x)
        assert type(sae.encode(x)) is Tensor
    compare(got, eager, exact)


@kinds
def test_inference(kind: str) -> None:
    compare_outputs(inference(kind), batch(0))


@kinds
def test_leading_dimensions(kind: str) -> None:
    compare_outputs(inference(kind), batch(0, 7 * 40).view(7, 40, D))


@kinds
def test_few_tokens_are_encoded_as_they_were(kind: str) -> None:
    sae = inference(kind)
    for x in (batch(0, 3), batch(0)[0], batch(0, 0)):
        expected = sae.encode(x)
        decoded = sae.decode(expected)
        with accelerate():
            assert torch.equal(sae.encode(x), expected)
            torch.testing.assert_close(sae.decode(sae.encode(x)), decoded)


def test_few_tokens_are_decoded_from_their_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsae.integrations.sae_lens.decoding.MIN_PRODUCT", 0)
    for kind in INFERENCE:
        compare_outputs(inference(kind), batch(0, 2))


@pytest.mark.parametrize("kind", [*INFERENCE, *(k for k in TRAINING if k != "topk")])
def test_forward_makes_no_matrix(kind: str) -> None:
    sae = inference(kind) if kind in INFERENCE else make(kind)
    with Made({(N, F)}, []) as made:
        sae(batch(0)).sum().backward()
    assert made.operations
    with accelerate(), Made({(N, F)}, []) as made:
        sae(batch(0)).sum().backward()
    assert not made.operations


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_normalised_activations(mode: Any) -> None:
    compare_outputs(inference("topk", normalize_activations=mode), batch(0))
    sae = make("topk", normalize_activations=mode)
    sae._setup_activation_normalization()
    x = batch(0)
    exact, eager = results(in_float64(sae), x.double(), None), results(sae, x, None)
    with accelerate():
        compare(results(sae, x, None, fast=True), eager, exact)


def test_head_dimensions() -> None:
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.attn.hook_z")
    sae = inference("topk", reshape_activations="hook_z", metadata=metadata)
    x = batch(0, N).view(N, 4, D // 4)
    expected, acts = sae(x), sae.encode(x)
    with accelerate():
        torch.testing.assert_close(sae(x), expected)
        torch.testing.assert_close(sae.encode(x), acts)


@pytest.mark.filterwarnings("ignore:Setting use_error_term")
def test_error_term() -> None:
    sae = inference("jumprelu")
    sae.use_error_term = True
    x = batch(0)
    expected = sae(x)
    with accelerate():
        torch.testing.assert_close(sae(x), expected)
        torch.testing.assert_close(sae(x), x, atol=1e-5, rtol=0)


def test_transcoder_returns_its_activations() -> None:
    sae, x = inference("jumprelu_skip_transcoder"), batch(0)
    expected = sae.forward_with_activations(x)
    with accelerate():
        got = sae.forward_with_activations(x)
    assert type(got[1]) is Tensor
    torch.testing.assert_close(got, expected)


def test_in_a_language_model() -> None:
    """HookedSAETransformer calls encode and decode itself; with hooks, caches and gradients."""
    config = HookedTransformerConfig(
        n_layers=1, d_model=D, n_ctx=32, d_head=8, act_fn="relu", d_vocab=50, seed=0
    )
    model = sae_lens.HookedSAETransformer(config)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.hook_resid_post")
    model.add_sae(inference("topk", metadata=metadata), use_error_term=True)
    tokens = torch.randint(50, (10, 32), generator=torch.Generator().manual_seed(0))
    post = "blocks.0.hook_resid_post.hook_sae_acts_post"
    found = []
    for context in (torch.enable_grad(), accelerate()):
        with context:
            model.zero_grad()
            logits, cache = model.run_with_cache(tokens)
            steered = model.run_with_hooks(tokens, fwd_hooks=[(post, lambda t, hook: 0.5 * t)])
            model(tokens).square().sum().backward()
            with torch.no_grad():
                found.append([logits, steered, model(tokens), cache[post], model.embed.W_E.grad])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


# ---- what it steps aside for, and what must keep working ----

HOOKS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


@pytest.mark.filterwarnings("ignore:Setting use_error_term")
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("kind", ["inference", "training"])
def test_hooks(kind: str, name: str) -> None:
    sae = inference("topk") if kind == "inference" else make("topk")
    sae.use_error_term = name == "error"
    seen: list[Tensor] = []

    def hook(t: Tensor, hook: Any) -> Tensor:
        seen.append(t.detach().clone())
        return t * 1.5

    x = batch(0)
    found = []
    for on in (False, True):
        context = accelerate() if on else torch.enable_grad()
        with context, sae.hooks(fwd_hooks=[(f"hook_sae_{name}", hook)]):
            out = [sae(x)]
            if kind == "training":
                step = sae.training_forward_pass(step_input(x))
                out += [step.loss, step.sae_out, step.feature_acts.clone()]
        assert all(type(t) is Tensor for t in seen)
        found.append([*out, *seen])
        seen.clear()
    assert found[0][-1].shape == found[1][-1].shape
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    if name == "input" or (name.startswith("acts") and kind == "training"):  # SAELens's own path
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [*INFERENCE, *TRAINING])
def test_input_hooks_run_once_whatever_comes(kind: str) -> None:
    sae = inference(kind) if kind in INFERENCE else make(kind)
    calls = []
    x = batch(0)
    with accelerate(), sae.hooks(fwd_hooks=[("hook_sae_input", lambda t, hook: calls.append(0))]):
        for given in (x, 50 * x, x.index_fill(0, torch.tensor(3), torch.nan)):
            for call in (sae, sae.encode):
                calls.clear()
                call(given)
                assert len(calls) == 1


def test_backward_hooks_and_caches() -> None:
    sae, x = make("topk"), batch(0)
    grads = []

    def hook(g: Any, hook: Any) -> None:
        grads.append(g[0].clone() if isinstance(g, tuple) else g.clone())

    caches = []
    for context in (torch.enable_grad(), accelerate()):
        with context, sae.hooks(bwd_hooks=[("hook_sae_acts_post", hook)]):
            sae(x).sum().backward()
        with context:
            caches.append(sae.run_with_cache(x)[1])
    assert torch.equal(grads[0], grads[1])
    assert caches[0].keys() == caches[1].keys()
    for name in caches[0]:
        assert torch.equal(caches[0][name], caches[1][name]), name


@training
def test_autocast(kind: str) -> None:
    sae, x = make(kind), batch(0)
    dead = torch.arange(F) % 16 == 0
    exact = results(in_float64(sae), x.double(), dead)
    with torch.autocast("cpu", torch.bfloat16):
        eager = results(sae, x, dead)
        with accelerate():
            got = results(sae, x, dead, fast=True)
    got.pop("acts"), eager.pop("acts"), exact.pop("acts")  # other pairs at the edge of the budget
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        if "grad" in name or name == "hidden_pre":
            error, allowed = ((t.double() - exact[name]).norm() for t in (value, eager[name]))
            assert error <= allowed * 1.1 + 1e-6, name


@pytest.mark.parametrize(("kind", "backend"), [("topk", "inductor"), ("matryoshka", "eager")])
def test_compiled_saes(kind: str, backend: str) -> None:
    """As SAELens's runner does for compile_sae."""
    expected = train(trainer_of(make(kind)), 3)
    with accelerate():
        trainer = trainer_of(make(kind))
        sae = trainer.sae
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend=backend)
        assert train(trainer, 3) == pytest.approx(expected, rel=1e-4)
        assert isinstance(trainer.step(batch(5)).feature_acts, Lazy)


def test_saving_and_loading_on_meta(tmp_path: Any) -> None:
    with accelerate():
        sae, x = make("batchtopk"), batch(0)
        sae.topk_threshold.fill_(0.02)
        sae.save_model(tmp_path / "training")
        sae.save_inference_model(tmp_path / "inference")
        again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "training")
        assert torch.equal(again(x), sae(x))
        frozen = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert isinstance(frozen, sae_lens.JumpReLUSAE)
    assert (frozen.encode(x) > 0).float().mean() > 0.001
    compare_outputs(frozen, x)


def test_swapped_and_written_parameters() -> None:
    sae, x = inference("topk"), batch(0)

    def changes() -> Iterator[None]:
        yield
        sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().roll(1, 1))
        yield
        sae.W_enc.data.mul_(1.5)
        sae.W_dec.data[:9] = 0.25
        yield
        sae.W_dec.data = sae.W_dec.data.roll(1, 0)
        yield
        sae.fold_W_dec_norm()
        yield
        sae.activation_fn.k = 3
        yield

    for _ in changes():
        compare_outputs(sae, x)


def test_bfloat16() -> None:
    sae, x = make("topk").to(dtype=torch.bfloat16), batch(0).bfloat16()
    exact = in_float64(sae)
    eager = results(sae, x, None)
    with accelerate():
        got = results(sae, x, None, fast=True)
    expected = results(exact, x.double(), None)
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        error, allowed = ((t.double() - expected[name]).norm() for t in (value, eager[name]))
        assert error <= allowed * 1.1 + 1e-3, name


@pytest.mark.parametrize("name", ["Standard", "Gated", "AbsTopK", "MatchingPursuit"])
def test_other_saes_are_as_they_were(name: str) -> None:
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**COMMON)
    torch.manual_seed(0)
    sae, x = getattr(sae_lens, f"{name}TrainingSAE")(config), batch(0, 40)
    given = TrainStepInput(x, {"l1": 1.0}, torch.arange(F) < 9, 0, False)
    expected = sae.training_forward_pass(given), sae(x), sae.encode(x)
    with accelerate():
        got = sae.training_forward_pass(given), sae(x), sae.encode(x)
    assert torch.equal(got[0].loss, expected[0].loss)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])


@training
def test_inference_mode(kind: str) -> None:
    sae, x = make(kind), batch(0)
    with torch.inference_mode():
        expected = sae(x), sae.encode(x), sae.training_forward_pass(step_input(x)).hidden_pre
        with accelerate():
            out = sae.training_forward_pass(step_input(x))
            got = sae(x), sae.encode(x), out.hidden_pre.clone()
        assert isinstance(out.feature_acts, Lazy)
        assert torch.equal(
            out.feature_acts.bool().float().sum(0), (expected[1] != 0).float().sum(0)
        )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_what_is_left_to_sae_lens() -> None:
    x = batch(0)

    def same(sae: Any, x: Tensor, dead: Tensor | None = None) -> None:
        expected = results(sae, x, dead)
        with accelerate():
            got = results(sae, x, dead)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True, msg=name)

    same(in_float64(make("topk")), x.double())  # fastsae has no kernels for it
    same(make("jumprelu-step", jumprelu_init_threshold=0.2), 50 * x)  # too many are active
    same(make("topk"), x.index_fill(0, torch.tensor(3), torch.nan))  # NaN goes through
    sparse = make("topk-plain")
    sparse.activation_fn.use_sparse_activations = True
    with accelerate():
        assert sparse.training_forward_pass(step_input(x)).feature_acts.is_sparse
        with pytest.raises(RuntimeError, match="out of range"):
            make("topk").activation_fn.forward(x[:, :2])
        jacobian = torch.func.jacrev(lambda t: inference("topk")(t).sum(0))(x[:2])
    assert jacobian.shape == (D, 2, D)


# ---- on and off ----


def methods() -> dict[tuple[str, str], Any]:
    owners = {owner for owner, *_ in (*METHODS, *patch.TRAINER_METHODS)}
    owners |= {topk_sae.TopK, sae_lens.AbsTopKSAE}
    return {(o.__name__, name): f for o in owners for name, f in vars(o).items()}


def test_restore_restores_everything() -> None:
    before = methods()
    accelerate()
    changed = {name for name, f in methods().items() if before[name] is not f}
    assert changed == {(o.__name__, name) for o, name, _ in (*METHODS, *patch.TRAINER_METHODS)}
    accelerate()
    restore()  # of both
    after = methods()
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    assert not replacements.owners and not replacements.originals
    restore()


def test_blocks() -> None:
    before = methods()
    with pytest.raises(KeyError), accelerate():
        with accelerate():
            pass
        assert methods() != before
        raise KeyError
    assert methods() == before
    accelerate()
    with accelerate():
        pass
    assert methods() != before


def test_the_last_of_several_restores() -> None:
    before = methods()
    first, second = accelerate(), accelerate()
    first.restore(), first.restore()
    assert methods() != before
    second.restore()
    assert methods() == before
    restore()
    early = accelerate()
    restore()
    late = accelerate()
    early.restore()
    assert methods() != before
    late.restore()
    assert methods() == before


def test_blocks_of_threads_that_overlap() -> None:
    """Whichever ends first, it is on until both have ended."""
    before = methods()
    inside, done = threading.Event(), threading.Event()

    def block() -> None:
        with accelerate():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=block)
    with accelerate():
        thread.start()
        assert inside.wait(10)
    assert methods() != before
    done.set()
    thread.join()
    assert methods() == before


def test_what_others_replaced_since_stays() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x

    before, original = methods(), sae_lens.SAE.forward
    try:
        with accelerate():
            sae_lens.SAE.forward = forward
        assert sae_lens.SAE.forward is forward
    finally:
        sae_lens.SAE.forward = original
    assert methods() == before


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "7.0.0")
    before = methods()
    with pytest.raises(RuntimeError, match=r"sae-lens: expected version 6\.54\.12.*got 7\.0\.0"):
        accelerate()
    assert methods() == before
    with pytest.raises(RuntimeError, match="expected version"):
        FastTopKTrainingSAE(TRAINING["topk"]())
    with accelerate(force=True):
        assert methods() != before
        FastTopKTrainingSAE(TRAINING["topk"]())
