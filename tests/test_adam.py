"""fastsae.optim.Adam against torch's optimisers, which see the same gradients as dense matrices."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastsae import SAE, SAEConfig, TopK, cpu, ops
from fastsae.optim import Adam
from fastsae.selection import ReLU

BACKENDS = ("cpu", "reference")


def make(unit: bool = True, backend: str | None = None, **config: Any) -> SAE:
    config = {"d_in": 21, "d_sae": 300, "selection": TopK(4), "dead_after": 150, **config}
    sae = SAE(SAEConfig(**config, decoder_norm="unit" if unit else "free"), backend=backend)
    sae.normalize_decoder_()  # rows start at norm 1 to the rounding of their own dtype
    return sae


def batches(n: int, d: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(48, d, generator=generator) for _ in range(n)]


def fused(sae: SAE, **options: Any) -> Adam:
    unit = [sae.W_dec] if sae.config.decoder_norm == "unit" else []
    return Adam(sae.parameters(), lr=2e-3, unit_rows=unit, backend=sae.backend, **options)


def fused_step(sae: SAE, optimizer: Adam, x: torch.Tensor) -> float:
    loss = sae.losses(x).loss
    optimizer.zero_grad()
    loss.backward()
    assert sae.W_enc.grad is None and sae.W_dec.grad is None
    optimizer.step()
    return float(loss.detach())


def dense_step(
    sae: SAE, optimizer: torch.optim.Optimizer, x: torch.Tensor, clip: float | None = None
) -> float:
    loss = sae.losses(x).loss
    optimizer.zero_grad()
    loss.backward()
    assert sae.W_enc.grad is not None and sae.W_dec.grad is not None
    sae.project_decoder_gradient_()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
    optimizer.step()
    sae.normalize_decoder_()
    return float(loss.detach())


def assert_same_parameters(a: SAE, b: SAE, atol: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.0, 0.99)},
        {"betas": (0.0, 0.99), "lazy": True},
        {"weight_decay": 0.1},
        {"clip": 0.01},
        {"eps": 1e-3},
    ],
    ids=["default", "beta1=0", "beta1=0-lazy", "decay", "clip", "eps"],
)
def test_the_update_is_torchs(backend: str, unit: bool, options: dict[str, Any]) -> None:
    """30 steps, AuxK active (dead_after is small); in float64 nothing differs but the rounding."""
    precise = backend == "reference"
    config = {"dtype": "float64"} if precise else {}
    ours, theirs = make(unit, backend, **config), make(unit, backend, **config)
    clip = options.get("clip")
    rest = {name: value for name, value in options.items() if name not in ("clip", "lazy")}
    cls = torch.optim.AdamW if "weight_decay" in rest else torch.optim.Adam
    a, b = fused(ours, **options), cls(theirs.parameters(), lr=2e-3, **rest)
    aux = False
    for x in batches(30):
        x = x.double() if precise else x
        loss = fused_step(ours, a, x)
        assert loss == pytest.approx(dense_step(theirs, b, x, clip), rel=1e-9 if precise else 1e-5)
        aux |= bool((ours.tokens_since_fired >= 150).any())
    assert aux
    assert_same_parameters(ours, theirs, 1e-12 if precise else 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_is_sparse_adam(backend: str) -> None:
    ours, theirs = make(False, backend, auxk_coef=0.0), make(False, backend, auxk_coef=0.0)
    # A tiny eps: SparseAdam adds it before the bias correction, not after.
    a = Adam([ours.W_enc, ours.W_dec], lr=2e-3, eps=1e-15, lazy=True, backend=backend)
    b = torch.optim.SparseAdam([theirs.W_enc, theirs.W_dec], lr=2e-3, eps=1e-15)
    for x in batches(12):
        fused_step(ours, a, x)
        codes = theirs.encode(x)
        touched = codes.firing_counts() > 0
        theirs.zero_grad()
        theirs.losses(x).loss.backward()
        for p in (theirs.W_enc, theirs.W_dec):
            assert p.grad is not None
            rows = touched.nonzero()[:, 0]
            p.grad = torch.sparse_coo_tensor(
                rows[None], p.grad[rows], p.shape, check_invariants=True
            )
        b.step()
    assert_same_parameters(ours, theirs, 2e-6)


def test_untouched_rows_are_not_written_by_the_lazy_forms() -> None:
    for options in ({"lazy": True}, {"betas": (0.0, 0.999)}):
        sae = make()
        optimizer = fused(sae, **options)
        x = batches(1)[0]
        silent = sae.encode(x).firing_counts() == 0
        before = copy.deepcopy(sae.state_dict())
        fused_step(sae, optimizer, x)
        for name in ("W_enc", "W_dec"):
            p = sae.state_dict()[name]
            assert torch.equal(p[silent], before[name][silent])
            assert bool((p[~silent] != before[name][~silent]).any(1).all())


def test_bits_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            sae = make()
            optimizer = fused(sae, clip=0.02)
            losses = [fused_step(sae, optimizer, x) for x in batches(10)]
            results.append((losses, [p.detach().clone() for p in sae.parameters()]))
    finally:
        torch.set_num_threads(threads)
    for losses, parameters in results[1:]:
        assert losses == results[0][0]
        for p, q in zip(parameters, results[0][1], strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("isa", cpu.isas())
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    torch.manual_seed(0)
    n, d, f, k = 40, 37, 50, 4
    idx = torch.stack([torch.randperm(f)[:k] for _ in range(n)]).to(torch.int32)
    gradient = ops.RowGradient(torch.randn(n, k), idx, torch.randn(n, d), None)
    start = [torch.randn(f, d), torch.randn(f, d), torch.rand(f, d)]
    last = torch.ones(f, dtype=torch.int32)
    hyper = (1e-3, 0.9, 0.99, 1e-8, 0.01, 0.7, 3, False)
    index = (*cpu.inverse_index(idx, f), gradient.coef.view(-1), gradient.src)
    names = ("lr", "beta1", "beta2", "eps", "weight_decay", "scale", "step", "lazy")
    results = []
    for forced in (isa, cpu.isas()[-1]):
        p, m, v = (t.clone() for t in start)
        cpu._C.adam(
            *(p, m, v, None, None, last.clone(), None, [index]),
            **dict(zip(names, hyper, strict=True)),
            first_row=0,
            stochastic_rounding=False,
            project=True,
            normalize=True,
            threads=2,
            isa=forced,
        )
        results.append((p, m, v))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_parameters_keep_float32_moments() -> None:
    sae = make(dtype="bfloat16")
    optimizer = fused(sae)
    first = [fused_step(sae, optimizer, x) for x in batches(1) * 40]
    assert first[-1] < 0.9 * first[0]
    state = optimizer.state[sae.W_dec]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    norms = sae.W_dec.float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=2**-8)


def test_gradients_accumulate_over_backwards() -> None:
    ours, theirs = make(), make()
    a, b = fused(ours), torch.optim.Adam(theirs.parameters(), lr=2e-3)
    for sae in (ours, theirs):
        for x in batches(2):
            sae.losses(x).loss.backward()
    a.step()
    theirs.project_decoder_gradient_()
    b.step()
    theirs.normalize_decoder_()
    assert_same_parameters(ours, theirs, 2e-6)


def test_a_dense_share_of_the_gradient_counts_too() -> None:
    ours, theirs = make(False), make(False)
    a, b = fused(ours), torch.optim.Adam(theirs.parameters(), lr=2e-3)
    for sae in (ours, theirs):
        (sae.losses(batches(1)[0]).loss + 1e-3 * sae.W_dec.square().sum()).backward()
    a.step()
    b.step()
    assert_same_parameters(ours, theirs, 2e-6)


def test_a_lost_optimiser_gives_dense_gradients_back() -> None:
    sae = make()
    optimizer = fused(sae)
    fused_step(sae, optimizer, batches(1)[0])
    del optimizer
    gc.collect()
    sae.losses(batches(1)[0]).loss.backward()
    assert sae.W_dec.grad is not None and sae.W_enc.grad is not None


def test_gradient_norm_is_the_projected_one() -> None:
    ours, theirs = make(), make()
    optimizer = fused(ours)
    for sae in (ours, theirs):
        sae.losses(batches(1)[0]).loss.backward()
    theirs.project_decoder_gradient_()
    grads = [p.grad for p in theirs.parameters() if p.grad is not None]
    expected = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    assert optimizer.gradient_norm() == pytest.approx(float(expected), rel=1e-5)


def test_zero_grad_forgets_pairs() -> None:
    sae = make()
    optimizer = fused(sae)
    before = copy.deepcopy(sae.state_dict())
    sae.losses(batches(1)[0]).loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    for name, p in sae.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_no_gradient_matrix_is_allocated() -> None:
    """The largest allocation of a step after the first is far below F·D."""
    sae = make(d_in=64, d_sae=20_000, selection=TopK(4))
    optimizer = fused(sae)
    fused_step(sae, optimizer, batches(1, 64)[0])
    with torch.profiler.profile(profile_memory=True) as profile:
        fused_step(sae, optimizer, batches(2, 64)[1])
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 20_000 * 64 * 4 / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]: expected"),
        ({"clip": 0.0}, "clip: expected"),
        ({"lazy": True, "weight_decay": 0.1}, "weight_decay: expected 0 with lazy"),
        ({"unit_rows": [torch.nn.Parameter(torch.ones(2, 2))]}, "unit_rows: expected"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adam(make().parameters(), **options)


def test_row_sparse_gradients_on_request() -> None:
    """For SparseAdam and others: the same gradient, as torch.sparse_coo of the touched rows."""
    sparse, dense = make(auxk_coef=0.0), make(auxk_coef=0.0)
    for p in (sparse.W_enc, sparse.W_dec):
        ops.set_sparse_gradient(p)
    x = batches(1)[0]
    for sae in (sparse, dense):
        sae.losses(x).loss.backward()
    touched = dense.encode(x).firing_counts().nonzero()[:, 0]
    for p, q in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert p.grad.is_sparse == (p.ndim == 2)
        if p.grad.is_sparse:
            assert torch.equal(p.grad.coalesce().indices()[0], touched)
        assert torch.equal(p.grad.to_dense(), q.grad)
    torch.optim.SparseAdam([sparse.W_enc, sparse.W_dec], lr=1e-3).step()
    ops.set_sparse_gradient(sparse.W_enc, False)
    sparse.zero_grad()
    sparse.losses(x).loss.backward()
    assert sparse.W_enc.grad is not None and not sparse.W_enc.grad.is_sparse


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_from_before_the_step_notices_it(backend: str) -> None:
    """The update goes past autograd, but not past its version counters."""
    sae = make(backend=backend)
    optimizer = fused(sae)
    loss = sae.losses(batches(1)[0]).loss
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_are_refused():
    sae = SAE(SAEConfig(8, 40, TopK(3)))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="expected state_dict"):
            copied(Adam(sae.parameters()))


def test_weights_share_the_index_of_their_codes(monkeypatch):
    built = []

    def counted(idx, *args, **kwargs):
        built.append(idx)
        return index(idx, *args, **kwargs)

    index = ops.inverse_index
    monkeypatch.setattr(ops, "inverse_index", counted)
    sae = make()
    optimizer = fused(sae, clip=1.0)
    for step in (1, 2):
        optimizer.zero_grad()
        sae.losses(batches(1)[0]).loss.backward()
        optimizer.step()
        assert len(built) == step  # for W_enc, W_dec, the norm and the update


# ---- gradients that are made block by block ----


@pytest.fixture
def blocks(monkeypatch) -> Callable[[bool], None]:
    """Steps keep no pairs, in blocks of 110 latents; or, when told so, all pairs."""
    monkeypatch.setattr("fastsae.blocked.BLOCK", 110 * 48)

    def keep(pairs: bool) -> None:
        monkeypatch.setattr(
            "fastsae.selection.per_pair.pair_limit", lambda n, f: n * f if pairs else -1
        )

    keep(False)
    return keep


def make_dense_by_nature(unit: bool = True, backend: str | None = None, **config: Any) -> SAE:
    """AuxK and the norms in the penalty give W_enc and W_dec row gradients as well."""
    rule = ReLU(l1_coef=1e-3, decoder_norm_weighted=True)
    sae = make(unit, backend, selection=rule, **config)
    with torch.no_grad():
        assert sae.b_enc is not None
        sae.b_enc[::7] = -100.0
        sae.b_enc[1::7] = -3.0  # positive now and then
    sae.tokens_since_fired[1::7] = 10**6
    return sae


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.0, 0.99)},
        {"lazy": True},
        {"weight_decay": 0.1},
        {"clip": 0.01},
    ],
    ids=["default", "beta1=0", "lazy", "decay", "clip"],
)
def test_blocks_are_updated_as_dense_gradients_are(blocks, backend, unit, options) -> None:
    """With the pairs of AuxK and of the norms in the same rows, and some steps with pairs only."""
    precise = backend == "reference"
    config = {"dtype": "float64"} if precise else {}
    ours, theirs = (make_dense_by_nature(unit, backend, **config) for _ in range(2))
    rest = {name: value for name, value in options.items() if name not in ("clip", "lazy")}
    cls = torch.optim.AdamW if "weight_decay" in rest else torch.optim.Adam
    a, b = fused(ours, **options), cls(theirs.parameters(), lr=2e-3, **rest)
    aux = False
    for step, x in enumerate(batches(6)):
        blocks(step == 2 and "lazy" not in options)  # lazy is Adam where all rows are touched
        x = x.double() if precise else x
        aux |= bool((ours.tokens_since_fired >= 150).any())
        fused_step(ours, a, x)
        dense_step(theirs, b, x, options.get("clip"))
        if step == 3:
            state = copy.deepcopy(a.state_dict())
            a = fused(ours, **options)
            a.load_state_dict(state)
    assert aux
    assert_same_parameters(ours, theirs, 1e-12 if precise else 4e-6)


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
def test_the_norm_counts_blocks(blocks, unit) -> None:
    ours, theirs = make_dense_by_nature(unit), make_dense_by_nature(unit)
    optimizer = fused(ours)
    optimizer.zero_grad()
    for sae in (ours, theirs):
        sae.losses(batches(1)[0]).loss.backward()
    theirs.project_decoder_gradient_()
    grads = [p.grad for p in theirs.parameters() if p.grad is not None]
    expected = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    assert optimizer.gradient_norm() == pytest.approx(float(expected), rel=1e-5)


def test_blocks_of_several_backwards_add_up(blocks) -> None:
    """Of batches with other block sizes, one with pairs, and a dense share; in two groups."""
    ours, theirs = make_dense_by_nature(False), make_dense_by_nature(False)
    optimizers = []
    for sae, cls in ((ours, Adam), (theirs, torch.optim.Adam)):
        others = [p for p in sae.parameters() if p is not sae.W_dec]
        groups = [{"params": [sae.W_dec], "lr": 5e-3}, {"params": others}]
        optimizers.append(cls(groups, lr=1e-3))
    for sae, optimizer in zip((ours, theirs), optimizers, strict=True):
        optimizer.zero_grad()
        for i, x in enumerate(batches(3)):
            blocks(i == 1)
            sae.losses(x[: 48 - 7 * i]).loss.backward()
        (1e-3 * sae.W_enc.square().sum()).backward()
    assert len(optimizers[0].block_gradients) == 2 and ours.W_dec.grad is None
    for optimizer in optimizers:
        optimizer.step()
    assert_same_parameters(ours, theirs, 4e-6)


def test_blocks_are_forgotten(blocks) -> None:
    """By zero_grad, and by a step that is not valid."""
    sae = make_dense_by_nature()
    optimizer = fused(sae)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    optimizer.zero_grad()
    sae.losses(batches(1)[0]).loss.backward()
    assert optimizer.block_gradients
    optimizer.step(valid=torch.tensor(False))
    assert not optimizer.block_gradients
    optimizer.zero_grad()
    sae.losses(batches(1)[0]).loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    for name, p in sae.named_parameters():
        assert torch.equal(p, before[name]), name
