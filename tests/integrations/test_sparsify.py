"""fastsae.integrations.sparsify against sparsify itself."""

import copy
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else the library itself wants a GPU

import pytest
import torch
from common import assert_bits, assert_within_eager, randn, run_child
from datasets import Dataset
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from sparsify.fused_encoder import EncoderOutput
from sparsify.sign_sgd import SignSGD
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from fastsae.integrations import sparsify as fast
from fastsae.integrations.lazy import Lazy

D, F, K, N = 24, 512, 8, 60
MODULES = {name: importlib.import_module(f"sparsify.{name}") for name in ("fused_encoder", "utils")}
MODULES["sparse_coder"] = importlib.import_module("sparsify.sparse_coder")
REPLACED = [
    (MODULES["sparse_coder"], "fused_encoder"),
    (MODULES["fused_encoder"], "fused_encoder"),
    (MODULES["sparse_coder"], "decoder_impl"),
    (MODULES["utils"], "decoder_impl"),
    (SparseCoder, "encode"),
    (SparseCoder, "forward"),
    (SparseCoder, "set_decoder_norm_to_unit_norm"),
    (SparseCoder, "remove_gradient_parallel_to_decoder_directions"),
    (ScheduleFreeWrapper, "step"),
]
CONFIGS: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "multi": {"multi_topk": True},
    "groupmax-multi": {"activation": "groupmax", "multi_topk": True},
    "transcoder": {"transcode": True},
    "skip-multi": {"transcode": True, "skip_connection": True, "multi_topk": True},
}
configs = pytest.mark.parametrize("name", CONFIGS)
shorts = pytest.mark.parametrize("short", [False, True], ids=["full", "short"])
levels = pytest.mark.parametrize("fused", [True, False], ids=["fused", "functions"])


@pytest.fixture(autouse=True)
def _nothing_stays_replaced() -> Iterator[None]:
    before = [vars(owner)[name] for owner, name in REPLACED]
    yield
    assert [vars(owner)[name] for owner, name in REPLACED] == before


def coder(name: str, short: bool = False, dtype: torch.dtype = torch.float32) -> SparseCoder:
    """short: most tokens have fewer than k positive pre-activations."""
    torch.manual_seed(0)
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **CONFIGS[name]))
    with torch.no_grad():
        sae.W_dec.copy_(randn(F, D, seed=1))
        sae.set_decoder_norm_to_unit_norm()
        sae.b_dec.copy_(randn(D, seed=2) * 0.1)
        sae.encoder.bias.copy_(randn(F, seed=3) * 0.1 - (1.0 if short else 0.0))
        if sae.W_skip is not None:
            sae.W_skip.copy_(randn(D, D, seed=4) * 0.1)
    return sae.to(dtype)


def batch(sae: SparseCoder) -> dict[str, Tensor]:
    """x, y and dead latents, as the library's Trainer passes them."""
    x, y = randn(N, D, seed=5), randn(N, D, seed=6)
    y = y if sae.cfg.transcode else x
    dead = torch.rand(F, generator=torch.Generator().manual_seed(7)) < 0.2
    return {"x": x.to(sae.dtype), "y": y.to(sae.dtype), "dead_mask": dead}


def loss_of(out: Any) -> Tensor:
    return out.fvu + 0.3 * out.auxk_loss + out.multi_topk_fvu / 8


def step(sae: SparseCoder, **inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Forward, and the gradients that the optimiser gets."""
    sae.zero_grad()
    out = sae(**inputs)
    loss_of(out).backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    gradients = {}
    for name, p in sae.named_parameters():
        assert p.grad is not None, name
        gradients[name] = p.grad.clone()
    return out, gradients


# ---- one step ----


@configs
@shorts
@levels
def test_with_parity_a_step_is_theirs(name: str, short: bool, fused: bool) -> None:
    """All outputs and gradients; error against theirs in float64 not above theirs in float32."""
    theirs, exact = coder(name, short), coder(name, short, torch.float64)
    eager, expected = step(theirs, **batch(theirs)), step(exact, **batch(exact))
    with fast.accelerate(parity=True, fused=fused):
        got = step(theirs, **batch(theirs))
    order = [out.latent_indices.sort() for out, _ in (got, eager, expected)]
    assert torch.equal(order[0].values, order[1].values)
    for field in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
        values = [getattr(out, field) for out, _ in (got, eager, expected)]
        assert values[0].dtype == values[1].dtype
        assert_within_eager(*(v.detach() for v in values), rtol=2e-7)
    acts = [
        out.latent_acts.detach().gather(1, o.indices)
        for (out, _), o in zip((got, eager, expected), order, strict=True)
    ]
    assert_within_eager(*acts)
    for key in got[1]:
        assert_within_eager(*(g[key] for _, g in (got, eager, expected)), rtol=5e-7)
    assert short == bool((eager[0].latent_acts == 0).any())


def dense_step(sae: SparseCoder, x: Tensor, y: Tensor, dead_mask: Tensor) -> dict[str, Tensor]:
    """The gradients of the same losses by autograd alone, on dense matrices."""
    sae.zero_grad()
    cfg, W_dec = sae.cfg, sae.W_dec
    assert W_dec is not None
    centred = x if cfg.transcode else x - sae.b_dec
    h = torch.relu(centred @ sae.encoder.weight.T + sae.encoder.bias)

    def sparse(values: Tensor, k: int) -> Tensor:
        top = values.topk(k)
        return torch.zeros_like(values).scatter(1, top.indices, top.values)

    if cfg.activation == "topk":
        z = sparse(h, cfg.k)
    else:
        z = sparse(h.unflatten(1, (cfg.k, -1)).flatten(0, 1), 1).view_as(h)
    out = z @ W_dec + sae.b_dec
    error = y - (out if sae.W_skip is None else out + x @ sae.W_skip.T)
    variance = (y - y.mean(0)).square().sum()
    n_dead, k_aux = int(dead_mask.sum()), D // 2
    aux = sparse(h * dead_mask, min(k_aux, n_dead)) @ W_dec
    loss = error.square().sum() / variance
    aux_error = (aux - error.detach()).square().sum()
    loss = loss + 0.3 * min(n_dead / k_aux, 1.0) * aux_error / variance
    if cfg.multi_topk:
        multi = sparse(h, 4 * cfg.k) @ W_dec + sae.b_dec
        loss = loss + (multi - y).square().sum() / variance / 8
    loss.backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@configs
@shorts
@levels
def test_by_default_gradients_are_those_of_the_losses(name: str, short: bool, fused: bool) -> None:
    sae, exact = coder(name, short), coder(name, short, torch.float64)
    eager, expected = dense_step(sae, **batch(sae)), dense_step(exact, **batch(exact))
    theirs = step(sae, **batch(sae))[1]
    with fast.accelerate(fused=fused):
        _, got = step(sae, **batch(sae))
    assert got.keys() == expected.keys()
    for key in got:
        assert_within_eager(got[key], eager[key], expected[key], rtol=5e-7)
    # AuxK is on, so what the library's encoder drops shows.
    assert (theirs["encoder.weight"] - expected["encoder.weight"]).abs().max() > 1e-4


def test_without_auxk_and_zeros_both_forms_are_the_same() -> None:
    sae = coder("topk")
    inputs = batch(sae) | {"dead_mask": None}
    gradients = []
    for parity in (False, True):
        with fast.accelerate(parity=parity):
            gradients.append(step(sae, **inputs)[1])  # type: ignore[arg-type]
    for key in gradients[0]:
        assert_bits(gradients[0][key], gradients[1][key])


@levels
def test_end_to_end_gradients_reach_the_input(fused: bool) -> None:
    """As with loss_fn ce and kl: only sae_out counts, and x carries a gradient."""
    sae, exact, weights = coder("topk"), coder("topk", dtype=torch.float64), randn(N, D, seed=8)

    def run(sae: SparseCoder) -> Tensor:
        x = batch(sae)["x"].requires_grad_()
        (sae(x).sae_out * weights).sum().backward()
        assert x.grad is not None
        return x.grad

    eager, expected = run(sae), run(exact)
    with fast.accelerate(parity=True, fused=fused):
        assert_within_eager(run(sae), eager, expected, rtol=5e-7)


def test_total_variance_and_no_dead_latents() -> None:
    sae = coder("topk")
    inputs = {**batch(sae), "total_variance": torch.tensor(7.0), "dead_mask": torch.zeros(F) > 1}
    theirs, _ = step(sae, **inputs)
    with fast.accelerate():
        ours, _ = step(sae, **inputs)
    torch.testing.assert_close(ours.fvu, theirs.fvu)
    assert float(ours.auxk_loss) == float(theirs.auxk_loss) == 0


# ---- runs ----


def signum(sae: SparseCoder, lr: float = 2e-3) -> Any:
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
    optimizer.train()
    return optimizer


def activations(n: int) -> list[Tensor]:
    """Sparse causes; of a seed for which no choice in these tests is within float32's rounding."""
    causes = randn(64, D, seed=15)
    active = torch.rand(n, N, 64, generator=torch.Generator().manual_seed(11)) < 0.1
    return list((randn(n, N, 64, seed=12).abs() * active) @ causes + 0.05 * randn(n, N, D, seed=13))


def run_of(sae: SparseCoder, optimizer: Any, data: list[Tensor]) -> Iterator[float]:
    """What the library's Trainer does with each batch."""
    since_fired = torch.zeros(F, dtype=torch.int64)
    for x in data:
        sae.set_decoder_norm_to_unit_norm()
        out, _ = step(sae, x=x, dead_mask=since_fired > 3 * N)
        since_fired += N
        since_fired[out.latent_indices.flatten()] = 0
        optimizer.step()
        yield float(loss_of(out).detach())


@levels
def test_steps_from_the_states_of_a_run_are_theirs(fused: bool) -> None:
    """22 states of a run of the library; loss and gradients of a step from each."""
    run = coder("topk")
    dead = torch.rand(F, generator=torch.Generator().manual_seed(7)) < 0.2
    losses = run_of(run, signum(run), activations(22))
    for x, _ in zip(activations(22), losses, strict=True):
        results = []
        for dtype, accelerated in (
            (torch.float32, True),
            (torch.float32, False),
            (torch.float64, False),
        ):
            sae = copy.deepcopy(run).to(dtype)
            with fast.accelerate(parity=True, fused=fused) if accelerated else nullcontext():
                sae.set_decoder_norm_to_unit_norm()
                results.append(step(sae, x=x.to(dtype), dead_mask=dead))
        assert_within_eager(*(loss_of(out).detach() for out, _ in results), rtol=2e-7)
        for key in results[0][1]:
            assert_within_eager(*(g[key] for _, g in results), rtol=5e-7)


@levels
def test_ten_steps_agree_and_a_longer_run_is_as_good(fused: bool) -> None:
    *data, holdout = activations(121)
    theirs, ours = coder("topk"), coder("topk")
    expected = list(run_of(theirs, signum(theirs), data))
    with fast.accelerate(parity=True, fused=fused):
        got = list(run_of(ours, signum(ours), data))
    assert got[:10] == pytest.approx(expected[:10], rel=1e-4)
    with torch.no_grad():
        fvu = [float(sae(holdout).fvu) for sae in (theirs, ours)]
    assert fvu[1] == pytest.approx(fvu[0], rel=5e-3)
    assert fvu[1] < 0.5 * expected[0]


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return GPTNeoXForCausalLM(config)


@pytest.mark.parametrize(
    ("loss", "optimizer"), [("fvu", "signum"), ("fvu", "adam"), ("ce", "signum")], ids=str
)
def test_their_trainer_trains_the_same(
    model: GPTNeoXForCausalLM, tmp_path: Path, loss: Any, optimizer: Any
) -> None:
    ids = torch.randint(50, (64, 12), generator=torch.Generator().manual_seed(1))
    dataset = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    found = []
    for run in ("theirs", "ours"):
        with fast.accelerate(parity=True) if run == "ours" else nullcontext():
            config = TrainConfig(
                SparseCoderConfig(num_latents=F, k=K, multi_topk=loss == "fvu"),
                batch_size=4,
                hookpoints=["layers.1"],
                loss_fn=loss,
                optimizer=optimizer,
                auxk_alpha=1 / 32,
                dead_feature_threshold=60,
                micro_acc_steps=2 if loss == "fvu" else 1,
                lr=1e-3,
                lr_warmup_steps=2,
                save_dir=str(tmp_path),
                run_name=run,
                log_to_wandb=False,
            )
            trainer = Trainer(config, dataset, model)
            trainer.fit()
        found.append((SparseCoder.load_from_disk(tmp_path / run / "layers.1"), trainer))
    (theirs, a), (ours, b) = found
    for name, p in theirs.named_parameters():
        # Signs of rounded zeros differ, so a few entries take other steps of 1e-3.
        difference = p.detach() - ours.get_parameter(name).detach()
        assert float(difference.abs().mean()) < 2e-5, name
    counts = [t.num_tokens_since_fired["layers.1"] for t in (a, b)]
    assert (counts[0] == counts[1]).float().mean() > 0.98
    x = randn(N, D, seed=20)
    torch.testing.assert_close(ours(x).fvu, theirs(x).fvu, rtol=5e-3, atol=0)


# ---- the optimiser ----


def test_the_step_of_the_optimiser_is_theirs_to_the_bit() -> None:
    """Sizes around a block, several groups, a parameter without a gradient, a state from a file."""
    sizes = [(7, 5), (1 << 15,), ((1 << 15) + 3,), (300, 231)]
    theirs = [torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(sizes)]
    theirs.append(torch.nn.Parameter(torch.zeros(3)))
    ours = copy.deepcopy(theirs)

    def wrapped(p: list[Any]) -> Any:
        groups = [{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.003}]
        return ScheduleFreeWrapper(SignSGD(groups), momentum=0.9, r=0.5)

    optimizers = [wrapped(theirs), wrapped(ours)]
    for i in range(6):
        for optimizer, parameters in zip(optimizers, (theirs, ours), strict=True):
            optimizer.train()
            for j, p in enumerate(parameters[:-1]):
                p.grad = randn(*p.shape, seed=100 * i + j)
            with fast.accelerate() if parameters is ours else nullcontext():
                assert optimizer.step() is None
            if i == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.eval()
        for p, q in zip(theirs, ours, strict=True):
            assert_bits(q, p)
    for a, b in zip(*(o.state_dict()["param_groups"] for o in optimizers), strict=True):
        assert a == b


def test_other_optimisers_are_left_alone() -> None:
    def run(base: type, width: int, decay: float) -> Tensor:
        p = torch.nn.Parameter(randn(9, width)[:, :7])
        optimizer = ScheduleFreeWrapper(base([p], lr=0.1), momentum=0.9, weight_decay_at_y=decay)
        with pytest.raises(Exception, match="not in train mode"):
            optimizer.step()
        optimizer.train()
        for i in range(3):
            p.grad = randn(9, 7, seed=i)
            optimizer.step()
        if base is not SignSGD:
            assert optimizer.step(lambda: 5) == 5
        return p

    for arguments in ((torch.optim.SGD, 7, 0.0), (SignSGD, 8, 0.0), (SignSGD, 7, 0.1)):
        expected = run(*arguments)
        with fast.accelerate():
            assert_bits(run(*arguments), expected)


# ---- encode and decode ----


@pytest.mark.parametrize("name", ["topk", "groupmax", "transcoder"])
@shorts
def test_encode_and_decode_are_theirs(name: str, short: bool) -> None:
    sae, exact, x = coder(name, short), coder(name, short, torch.float64), randn(6, 10, D, seed=9)
    if name == "groupmax":  # which the library only does for one dimension of tokens
        x = x.flatten(0, 1)
    with torch.no_grad():
        theirs, expected = sae.encode(x), exact.encode(x.double())
        with fast.accelerate():
            ours = sae.encode(x)
            assert isinstance(ours, EncoderOutput) and len(ours) == 3
            for got, eager, ex in zip(ours[:2], theirs, expected, strict=False):
                assert got.shape == eager.shape and got.dtype == eager.dtype
                if not got.is_floating_point():
                    continue
                assert_within_eager(got.sort(-1).values, eager.sort(-1).values, ex.sort(-1).values)
            assert torch.equal(ours.top_indices.sort(-1).values, theirs.top_indices.sort(-1).values)
            if name == "groupmax":
                assert torch.equal(ours.top_indices, theirs.top_indices)
            acts, ids, pre_acts = ours
            assert isinstance(pre_acts, Lazy) and pre_acts.state.made is None  # nobody used it
            assert pre_acts.dtype == theirs.pre_acts.dtype
            torch.testing.assert_close(pre_acts * 1, theirs.pre_acts)
            flat = acts.reshape(60, K), ids.reshape(60, K)
            decoded = sae.decode(*flat)
        wide = flat[0].double()
        assert_within_eager(decoded, sae.decode(*flat), exact.decode(wide, flat[1]))
        scattered = torch.zeros(60, F).scatter(1, flat[1], flat[0])
        torch.testing.assert_close(scattered @ sae.W_dec + sae.b_dec, decoded)


def test_a_large_k_is_theirs() -> None:
    """As at the beginning of a run with k_decay_steps."""
    sae = coder("topk")
    sae.cfg.k = F // 4
    theirs = step(sae, **batch(sae))
    with fast.accelerate(parity=True):
        ours = step(sae, **batch(sae))
    torch.testing.assert_close(loss_of(ours[0]), loss_of(theirs[0]), rtol=1e-5, atol=0)
    for key, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][key], gradient, rtol=1e-4, atol=1e-6)


@configs
def test_one_token_is_encoded_as_the_library_does(name: str) -> None:
    sae = coder(name)
    one = {key: value[:1] for key, value in batch(sae).items() if key != "dead_mask"}
    inputs = {**one, "total_variance": torch.tensor(3.0), "dead_mask": batch(sae)["dead_mask"]}
    theirs = step(sae, **inputs)
    with fast.accelerate(parity=True):
        ours = step(sae, **inputs)
    assert torch.equal(ours[0].latent_indices.sort().values, theirs[0].latent_indices.sort().values)
    torch.testing.assert_close(loss_of(ours[0]), loss_of(theirs[0]), rtol=1e-5, atol=0)
    for key, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][key], gradient, rtol=1e-4, atol=1e-6)


@levels
def test_encode_has_gradients(fused: bool) -> None:
    def gradients(sae: SparseCoder) -> list[Tensor]:
        sae.zero_grad()
        out = sae.encode(randn(N, D, seed=9).to(sae.dtype))
        out.top_acts.square().sum().backward()
        return [
            p.grad for p in (sae.encoder.weight, sae.encoder.bias, sae.b_dec) if p.grad is not None
        ]

    sae, exact = coder("topk"), coder("topk", dtype=torch.float64)
    eager, expected = gradients(sae), gradients(exact)
    with fast.accelerate(fused=fused):
        for triple in zip(gradients(sae), eager, expected, strict=True):
            assert_within_eager(*triple, rtol=5e-7)


def test_a_coder_in_bfloat16_and_tokens_in_bfloat16() -> None:
    sae = coder("topk")
    for module, x in (
        (sae.bfloat16(), randn(N, D).bfloat16()),
        (sae.float(), randn(N, D).bfloat16()),
    ):
        with torch.no_grad():
            theirs = module(x.to(module.dtype))
            exact = copy.deepcopy(module).double()(x.double())
            with fast.accelerate():
                ours = module(x)
        assert ours.sae_out.dtype == theirs.sae_out.dtype
        assert ours.latent_acts.dtype == theirs.latent_acts.dtype
        assert_within_eager(ours.sae_out, theirs.sae_out, exact.sae_out)


@configs
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
def test_dtypes_are_theirs(name: str, dead: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        sae = coder(name, dtype=dtype)
        inputs = batch(sae) if dead else batch(sae) | {"dead_mask": None}
        for variance in (None, torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64)):
            with torch.no_grad():
                theirs = sae(**inputs, total_variance=variance)
                with fast.accelerate():
                    ours = sae(**inputs, total_variance=variance)
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
            for field in ("fvu", "auxk_loss", "multi_topk_fvu"):
                a, b = getattr(ours, field), getattr(theirs, field)
                torch.testing.assert_close(a, b, rtol=0.05, atol=1e-5)


@configs
@levels
def test_under_autocast_on_a_cpu_it_is_the_library(name: str, fused: bool) -> None:
    sae = coder(name)
    inputs = batch(sae)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs, encoded = sae(**inputs), sae.encode(inputs["x"])
        decoded = sae.decode(*encoded[:2])
        with fast.accelerate(fused=fused):
            ours, got = sae(**inputs), sae.encode(inputs["x"])
            ours_decoded = sae.decode(*got[:2])
    for a, b in zip((*ours, *got, ours_decoded), (*theirs, *encoded, decoded), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", ["x", "weight", "bias", "b_dec"])
def test_pre_acts_of_what_was_written_to_are_refused(changed: str) -> None:
    sae, x = coder("topk"), randn(N, D)
    expected = sae.encode(x).pre_acts.detach()
    written = {"x": x, "weight": sae.encoder.weight, "bias": sae.encoder.bias, "b_dec": sae.b_dec}
    with fast.accelerate():
        early, late = sae.encode(x).pre_acts, sae.encode(x).pre_acts
        torch.testing.assert_close(early.detach() * 1, expected)
        with torch.no_grad():
            written[changed].add_(1)
            torch.testing.assert_close(early.detach() * 1, expected)  # it is made
            with pytest.raises(RuntimeError, match="expected its first use before activations"):
                late.sum()


def test_a_coder_without_a_decoder_encodes() -> None:
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K), decoder=False)
    x = randn(N, D)
    with torch.no_grad(), fast.accelerate():
        ours = sae.encode(x).top_acts
    torch.testing.assert_close(ours, sae.encode(x).top_acts.sort(descending=True).values)


def test_what_cannot_be_encoded_is_refused() -> None:
    sae, x = coder("topk"), randn(N, D)
    with fast.accelerate():
        x[2, 3] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            sae(x)
        sae.cfg.activation = "relu"  # type: ignore[assignment]
        with pytest.raises(ValueError, match="activation: expected topk or groupmax, got 'relu'"):
            sae(randn(N, D))
    with pytest.raises(ValueError, match="activation: expected topk or groupmax, got 'relu'"):
        fast.fused_encoder(x, sae.encoder.weight, sae.encoder.bias, K, "relu")  # type: ignore[arg-type]


# ---- accelerate and restore ----


def test_restore_puts_everything_back() -> None:
    originals = [vars(owner)[name] for owner, name in REPLACED]
    acceleration = fast.accelerate()
    assert all(vars(o)[n] is not old for (o, n), old in zip(REPLACED, originals, strict=True))
    for other in ({"fused": False}, {"parity": True}):
        with pytest.raises(RuntimeError, match=r"expected parity=False, fused=True, which .* got"):
            fast.accelerate(**other)
    acceleration.restore()
    assert [vars(owner)[name] for owner, name in REPLACED] == originals
    acceleration.restore()
    with pytest.raises(KeyError), fast.accelerate(fused=False):
        changed = [vars(o)[n] is not old for (o, n), old in zip(REPLACED, originals, strict=True)]
        assert changed == [True] * 4 + [False] * 5
        raise KeyError
    assert [vars(owner)[name] for owner, name in REPLACED] == originals


def test_the_last_owner_restores() -> None:
    originals = [vars(owner)[name] for owner, name in REPLACED]

    def replaced() -> list[bool]:
        return [vars(o)[n] is not old for (o, n), old in zip(REPLACED, originals, strict=True)]

    first, second = fast.accelerate(), fast.accelerate()
    first.restore()
    first.restore()
    assert all(replaced())
    with fast.accelerate():
        second.restore()
        assert all(replaced())
    assert not any(replaced())


def test_many_threads_leave_the_library_as_it_was() -> None:
    originals = [vars(owner)[name] for owner, name in REPLACED]

    def work(_: int) -> bool:
        with fast.accelerate():
            return all(
                vars(o)[n] is not old for (o, n), old in zip(REPLACED, originals, strict=True)
            )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert [vars(owner)[name] for owner, name in REPLACED] == originals


def test_restore_keeps_what_others_put_in_since(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = SparseCoder.encode
    monkeypatch.setattr(SparseCoder, "forward", SparseCoder.forward)  # so that it ends as it was
    acceleration = fast.accelerate()
    other = SparseCoder.forward = lambda self, x: x  # type: ignore[method-assign]
    acceleration.restore()
    assert SparseCoder.forward is other and SparseCoder.encode is encode


def test_methods_of_a_subclass_or_of_one_coder_are_called() -> None:
    class Louder(SparseCoder):
        def encode(self, x: Tensor) -> EncoderOutput:
            acts, ids, pre_acts = super().encode(x)
            return EncoderOutput(2 * acts, ids, pre_acts)

    class Shifted(SparseCoder):
        def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
            return super().decode(top_acts, top_indices) + 1

    louder, shifted, tripled = coder("topk"), coder("topk"), coder("topk")
    louder.__class__, shifted.__class__ = Louder, Shifted
    tripled.decode = lambda *given: 3 * SparseCoder.decode(tripled, *given)  # type: ignore[method-assign]
    for sae in (louder, shifted, tripled):
        inputs = batch(sae) | {"total_variance": torch.tensor(7.0)}
        theirs, expected = step(sae, **inputs)
        with fast.accelerate(parity=True):
            ours, got = step(sae, **inputs)
        for field in ("sae_out", "fvu", "auxk_loss"):
            a, b = getattr(ours, field), getattr(theirs, field)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for key, gradient in expected.items():
            torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-5)


def test_other_versions_are_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("eai-sparsify", "schedulefree"):
        real = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name, wrong=wrong, real=real: "9.9" if name == wrong else real(name),
        )
        with pytest.raises(RuntimeError, match=rf"{wrong}: expected version .*, got 9\.9; fo"):
            fast.accelerate()
        fast.accelerate(force=True).restore()
        monkeypatch.undo()


def test_it_needs_no_environment_variable_on_a_cpu() -> None:
    """Where Triton is installed, the library's own decoder asks for a GPU."""
    run_child(
        """
        import os
        os.environ.pop("SPARSIFY_DISABLE_TRITON", None)
        import sparsify, sparsify.sparse_coder, torch
        from fastsae.integrations import sparsify as fast

        def no_gpu(*_):
            raise RuntimeError("0 active drivers")

        sparsify.sparse_coder.decoder_impl = no_gpu
        sae = sparsify.SparseCoder(16, sparsify.SparseCoderConfig(num_latents=64, k=4))
        x = torch.randn(20, 16)
        for fused in (True, False):
            with fast.accelerate(fused=fused):
                sae(x).fvu.backward()
                sae.decode(*sae.encode(x)[:2])
        """
    )


def test_bench_measures_every_case() -> None:
    command = [sys.executable, "bench/integrations.py", "sparsify", "--shape", "260,16,512,4"]
    command += ["--steps", "1", "--threads", "1", "--json", "-"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=-1, check=True)
    rows = json.loads(done.stdout)
    assert len({row["case"] for row in rows}) == len(rows) == 5
    for row in rows:
        assert [row[size] for size in "ndfk"] == [260, 16, 512, 4]
        assert row["ratio"] == row["before_s"] / row["after_s"]
