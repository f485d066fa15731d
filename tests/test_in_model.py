"""Evaluation inside a language model, against the same model and formulas written out."""

import contextlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import refusals
from test_harvest import Causal, D, Tokenizer, causal, encoder
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cli
from fastsae.evaluation import At, Windows, read_windows
from fastsae.harvest import HarvestConfig, harvest
from fastsae.in_model import SPLICED, evaluate_in_model
from fastsae.models import LanguageModel
from fastsae.shards import ActivationSet

LAYER, WINDOW, K = 2, 9, 3
LOUD = 7  # a token whose activations are massive
AT = At(LAYER, batch_size=2)


def language_model() -> LanguageModel:
    net = Causal().double()
    with torch.no_grad():
        net.embed.weight[LOUD] *= 300
    return LanguageModel("tiny", net, Tokenizer(), True, {"model.bin": "00"})


def windows(special: tuple[int, int] = (0, 0)) -> Windows:
    ids = np.random.default_rng(0).integers(8, 256, (5, WINDOW)).astype(np.int32)
    ids[1, 4] = ids[3, 6] = ids[3, 8] = ids[4, 0] = LOUD
    return Windows(ids, ("a",), np.zeros(5, np.int64), None, special)


def random_sae(dtype: str = "float64") -> SAE:
    sae = SAE(SAEConfig(D, 4 * D, TopK(K), dtype=dtype), seed=1)
    with torch.no_grad():
        sae.b_dec += 0.3
        assert sae.b_enc is not None
        sae.b_enc += 0.1
    return sae


def identity_sae(dtype: str = "float32") -> SAE:
    """x = Σ max(x_i, 0) e_i + Σ max(−x_i, 0) (−e_i), to the bit."""
    sae = SAE(SAEConfig(D, 2 * D, TopK(2 * D), dtype=dtype))
    rows = torch.cat([torch.eye(D), -torch.eye(D)]).to(sae.W_enc)
    with torch.no_grad():
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
    return sae


def constant_sae(value: Tensor) -> SAE:
    """No latent is active, and the reconstruction is always `value`."""
    sae = random_sae()
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1)
        sae.b_dec.copy_(value)
    return sae


def dense(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, F] and reconstruction of rows, without anything of the SAE but its weights."""
    h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    kept = torch.zeros_like(h).scatter(1, h.topk(K).indices, 1)
    z = h.relu() * kept
    return z, z @ sae.W_dec + sae.b_dec


def by_hand(sae: SAE, where: Windows, splice: str, mean: Tensor | None = None) -> dict:
    """What `evaluate_in_model` should say of language_model(), from whole matrices."""
    net, ids = language_model().net, torch.from_numpy(where.ids).long()
    before, after = max(where.special[0], 1), WINDOW - where.special[1]

    def run(put: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = net.embed(ids)
        for number, block in enumerate(net.layers, 1):
            x = block(x)
            if number == LAYER:
                at_site = x = x if put is None else put
        return at_site, net.head(x).log_softmax(-1)

    x, log_p = run()
    norms = x.norm(dim=-1)
    limit = 10 * float(norms[:, before:after].quantile(0.5, interpolation="lower"))
    places = torch.arange(WINDOW).expand(5, WINDOW)
    rows = (places >= before) & (places < after)
    groups = {
        "ordinary": rows & (norms <= limit),
        "massive": rows & (norms > limit),
        "first": ~rows,
    }
    replaced = sum(groups[name] for name in SPLICED[splice]) > 0
    z, x_hat = dense(sae, x.reshape(-1, D))
    z, x_hat = z.view(5, WINDOW, -1), x_hat.view(5, WINDOW, D)
    mean = x[replaced].mean(0) if mean is None else mean
    found: dict = {"splice": splice, "massive_above": limit}
    ce, kl = {}, {}
    variants = {"with_sae": x_hat, "with_ablation": 0 * x, "with_mean_ablation": mean + 0 * x}
    for name, value in {"without_sae": x, **variants}.items():
        log_q = run(torch.where(replaced[:, :, None], value, x))[1]
        following = log_q[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
        ce[name] = float(-following[replaced[:, :-1]].mean())
        kl[name] = float((log_p.exp() * (log_p - log_q)).sum(-1)[replaced].mean())
    del kl["without_sae"]
    found |= {f"ce_loss_{name}": value for name, value in ce.items()}
    found |= {f"kl_div_{name}": value for name, value in kl.items()}
    found["delta_ce_loss"] = ce["with_sae"] - ce["without_sae"]
    for end, name in (("", "with_ablation"), ("_mean_ablation", "with_mean_ablation")):
        found[f"ce_loss_score{end}"] = (ce[name] - ce["with_sae"]) / (ce[name] - ce["without_sae"])
        found[f"kl_div_score{end}"] = (kl[name] - kl["with_sae"]) / kl[name]

    def figures(which: Tensor) -> dict:
        a, b, n = x[which], x_hat[which], int(which.sum())
        if n == 0:
            return {"n_tokens": 0}
        e = a - b
        total, error = (a - a.mean(0)).square().sum(), e.square().sum()
        has_variance = n > 1
        return {
            "n_tokens": n,
            "l2_norm_in": a.norm(dim=1).mean(),
            "l2_norm_out": b.norm(dim=1).mean(),
            "l2_ratio": (b.norm(dim=1) / a.norm(dim=1)).mean(),
            "cossim": torch.cosine_similarity(a, b).mean(),
            "l0": (z[which] > 0).sum(1).double().mean(),
            "relative_reconstruction_bias": b.square().sum() / (a * b).sum(),
            "fvu": error / total if has_variance else None,
            "explained_variance": 1 - error / total if has_variance else None,
            "frac_variance_explained": (
                1 - e.var(0).sum() / a.var(0).sum() if has_variance else None
            ),
        }

    return found | figures(replaced) | {"groups": {n: figures(g) for n, g in groups.items()}}


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(got[name], value)
        elif value is None or isinstance(value, str):
            assert got[name] == value, name
        else:
            assert got[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("special", [(0, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("splice", SPLICED)
@torch.no_grad()
def test_figures_are_those_of_the_formulas(splice: str, special: tuple[int, int]) -> None:
    where, sae = windows(special), random_sae()
    sae.train()
    got = evaluate_in_model(sae, language_model(), where, AT, splice=splice)
    expected = by_hand(sae, where, splice)
    assert_same(got, expected)
    assert sae.training
    n_first = 5 * max(special[0], 1) + 5 * special[1]
    n_tokens = {name: group["n_tokens"] for name, group in got["groups"].items()}
    assert n_tokens["first"] == n_first and min(n_tokens.values()) > 2
    spliced = sum(n_tokens[name] for name in SPLICED[splice])
    assert got["n_tokens"] == spliced and abs(got["delta_ce_loss"]) > 1e-3


@torch.no_grad()
def test_a_given_mean_and_another_limit() -> None:
    where, sae, mean = windows(), random_sae(), torch.linspace(-1, 1, D).double()
    got = evaluate_in_model(sae, language_model(), where, AT, mean=mean)
    assert_same(got, by_hand(sae, where, "rows", mean))
    found = evaluate_in_model(sae, language_model(), where, AT, massive=1.0)
    assert found["groups"]["massive"]["n_tokens"] == 5 * (WINDOW - 1) // 2


@pytest.mark.parametrize("splice", SPLICED)
def test_an_identity_loses_nothing(splice: str) -> None:
    got = evaluate_in_model(identity_sae(), causal(), windows(), AT, splice=splice)
    assert got["ce_loss_with_sae"] == got["ce_loss_without_sae"]
    assert got["delta_ce_loss"] == got["kl_div_with_sae"] == got["fvu"] == 0
    assert got["ce_loss_score"] == got["ce_loss_score_mean_ablation"] == 1
    assert got["kl_div_score"] == got["kl_div_score_mean_ablation"] == 1
    for name in ("l2_ratio", "cossim", "relative_reconstruction_bias", "frac_variance_explained"):
        assert got[name] == pytest.approx(1, abs=1e-12)
    assert got["kl_div_with_ablation"] > 0 and got["l0"] == D


def test_a_constant_is_its_ablation() -> None:
    zero, mean = torch.zeros(D).double(), torch.linspace(-1, 1, D).double()
    model = language_model()
    got = evaluate_in_model(constant_sae(zero), model, windows(), AT)
    assert got["ce_loss_with_sae"] == got["ce_loss_with_ablation"] and got["ce_loss_score"] == 0
    assert got["kl_div_with_sae"] == got["kl_div_with_ablation"] and got["kl_div_score"] == 0
    assert got["cossim"] == got["l2_ratio"] == got["l0"] == 0
    assert got["relative_reconstruction_bias"] is None
    got = evaluate_in_model(constant_sae(mean), model, windows(), AT, mean=mean)
    assert got["ce_loss_with_sae"] == got["ce_loss_with_mean_ablation"]
    assert got["ce_loss_score_mean_ablation"] == got["kl_div_score_mean_ablation"] == 0


def test_batches_do_not_matter() -> None:
    by_size = [
        evaluate_in_model(random_sae(), language_model(), windows(), At(LAYER, batch_size=n))
        for n in (1, 5)
    ]
    assert_same(*by_size)


def test_other_sites_are_replaced_too() -> None:
    for site in ("mlp", "attention"):
        at = At(LAYER, site=site, batch_size=3)
        got = evaluate_in_model(identity_sae("float64"), language_model(), windows(), at)
        assert got["kl_div_with_sae"] == 0 and got["kl_div_with_ablation"] > 1e-4


REFUSED = [
    ({"splice": "some"}, "splice: expected one of rows, ordinary, all, got 'some'"),
    ({"mean": torch.zeros(D + 1)}, f"mean: expected [{D}], got [{D + 1}]"),
    (
        {"sae": SAE(SAEConfig(D + 1, 8, TopK(2)))},
        f"sae: expected d_in {D}, the site's width, got 7",
    ),
    ({"sae": SAE(SAEConfig(D, 8, TopK(2), d_out=3))}, "expected an autoencoder, got a transcoder"),
    ({"at": At(4)}, "layer: expected at most 3, got 4"),
    ({"at": At(0)}, "layer: expected at least 1, got 0"),
    ({"at": At(1, site="mlps")}, "site: expected one of residual, mlp, attention, got 'mlps'"),
    ({"model": encoder()}, "model: expected a causal language model, got tiny encoder"),
    ({"windows": windows((5, 4))}, "window: expected positions beside special and first ones"),
]


@refusals("changes, message", REFUSED)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    given = {"sae": random_sae("float32"), "model": causal(), "windows": windows(), "at": AT}
    given |= changes
    with pytest.raises(ValueError) as error:
        evaluate_in_model(**given)
    assert message in str(error.value)


def test_windows_that_the_model_cannot_read_are_refused() -> None:
    model = language_model()
    model.net.config = SimpleNamespace(max_position_embeddings=WINDOW - 1)
    with pytest.raises(ValueError, match=f"window: expected at most the {WINDOW - 1} of tiny"):
        evaluate_in_model(random_sae(), model, windows(), AT)


# ---- windows, and which were seen ----

TEXTS = ["the quick brown fox jumps over the lazy dog, " * 6, "it was the best of times, " * 9]


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    paths = []
    for name, text in zip(
        ("one", "two", "new"), [*TEXTS, "call me what you like, " * 8], strict=True
    ):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(text)
    return paths


@pytest.fixture
def data(text: list[Path], tmp_path: Path) -> ActivationSet:
    config = HarvestConfig(layer=LAYER, window=WINDOW, rows=120, dtype="float32", shard_rows=40)
    return harvest(causal(), text[:2], tmp_path / "data", config)


def test_windows_that_a_harvest_took_are_known(text: list[Path], data: ActivationSet) -> None:
    taken = set(data.gather("window", np.arange(data.n_rows)).tolist())
    assert len(taken) == 15
    alone = read_windows(Tokenizer(), text[:2], WINDOW, data.index)
    assert set(np.flatnonzero(alone.seen).tolist()) == taken
    n_one = int((alone.file == 0).sum())
    between = read_windows(Tokenizer(), [text[0], text[2], text[1]], WINDOW, data.index)
    assert between.names == ("one", "new", "two") and not between.seen[between.file == 1].any()
    assert np.array_equal(between.seen[between.file != 1], alone.seen)
    assert np.array_equal(between.ids[between.file == 0], alone.ids[:n_one])
    for paths, length in (
        ([text[0], text[2]], WINDOW),
        ([text[1], text[0]], WINDOW),
        (text[:2], 8),
    ):
        others = read_windows(Tokenizer(), paths, length, data.index)  # not as it numbered them
        assert np.array_equal(others.seen, [others.names[i] != "new" for i in others.file])
    assert read_windows(Tokenizer(), text, WINDOW).seen is None


def test_windows_are_chosen_among_those_not_seen(text: list[Path], data: ActivationSet) -> None:
    found = read_windows(Tokenizer(), text[:2], WINDOW, data.index)
    unseen = int((~found.seen).sum())
    chosen = found.sample(5 * WINDOW + 1)
    assert len(chosen.ids) == 6 and not chosen.seen.any()
    assert np.array_equal(chosen.ids, found.sample(5 * WINDOW + 1).ids)
    assert len(found.sample(10**6).ids) == unseen and unseen > 6
    every = found.sample(10**6, seen=True)
    assert np.array_equal(every.ids, found.ids) and np.array_equal(every.file, found.file)
    of_them = read_windows(Tokenizer(), text[:1], WINDOW, data.index)
    with pytest.raises(ValueError, match="expected windows that the SAE's data do not hold"):
        of_them.sample(100)
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        of_them.sample(0)
    with pytest.raises(ValueError, match="text: expected at least one file"):
        read_windows(Tokenizer(), [], WINDOW)


def test_rows_are_the_positions_that_a_harvest_keeps() -> None:
    for special, kept in (((0, 0), range(1, 9)), ((1, 0), range(1, 9)), ((2, 1), range(2, 8))):
        assert np.flatnonzero(windows(special).rows).tolist() == list(kept)


# ---- the command ----


def command(*args: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main([str(arg) for arg in args])
    return out.getvalue()


@pytest.fixture
def run(data: ActivationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on harvested data; a model of any name is the tiny one."""
    monkeypatch.setattr("fastsae.commands.place.load_model", lambda *args: causal())
    out = tmp_path / "run"
    options = "--d-sae 24 --k 3 --steps 8 --batch-size 16 --holdout 20".split()
    command("train", "--data", data.folder, "--out", out, *options)
    return out


def test_eval_in_a_model(run: Path, text: list[Path]) -> None:
    shown = command("eval", run, "--model", "tiny", "--text", *text[:2], "--tokens", 60)
    figures = json.loads((run / "in_model.json").read_text())
    index = json.loads((run.parent / "data" / "index.json").read_text())
    found = read_windows(Tokenizer(), text[:2], WINDOW, index).sample(60)
    expected = evaluate_in_model(SAE.load(run), causal(), found, At(LAYER))
    assert_same({name: figures[name] for name in expected}, expected)
    said = {"model": "tiny", "layer": LAYER, "site": "residual", "window": WINDOW, "windows": 7}
    said |= {"windows_seen": 0, "text": ["one.txt", "two.txt"], "weights_as_harvested": True}
    assert {name: figures[name] for name in said} == said
    assert f"{figures['ce_loss_score']:.4f}" in shown and "data hold: 0" in shown
    command("report", run)
    assert f"{figures['delta_ce_loss']:+.4f}</span>" in (run / "report.html").read_text()
    (run / "in_model.json").write_text(json.dumps(figures | {"sae": "another"}))
    command("report", run)
    assert "Loss in the model" not in (run / "report.html").read_text()
    again = command("eval", run, "--model", "tiny", "--text", *text[:2], "--tokens", 60, "--json")
    assert json.loads(again) == figures
    options = ["--layer", 3, "--site", "mlp", "--splice", "all", "--seen"]
    other = json.loads(command("eval", run, "--model", "tiny", "--text", *text, *options, "--json"))
    assert other["site"] == "mlp" and other["splice"] == "all" and other["windows_seen"] == 15


def test_eval_in_a_model_refuses_in_one_line(
    run: Path, text: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    SAE.load(run).save(tmp_path / "alone")
    cases = [
        ((run, "--text", text[0]), "model: expected one with text, a place or splice, got none"),
        ((run, "--splice", "all"), "model: expected one with text, a place or splice, got none"),
        ((run, "--model", "tiny"), "text: expected at least one file, got none"),
        (
            (run, "--model", "tiny", "--text", text[0]),
            "expected windows that the SAE's data do not",
        ),
        ((run, "--model", "tiny", "--text", tmp_path / "no.txt"), "cannot be read"),
        ((run, "--model", "tiny", "--data", "x.npy"), "data: expected none with a model"),
        ((tmp_path / "alone", "--model", "tiny", "--text", text[0]), "layer: expected a number"),
        ((run, "--model", "tiny", "--text", text[2], "--window", 1), "window: expected positions"),
    ]
    for args, message in cases:
        with pytest.raises(SystemExit) as stopped:
            command("eval", *args)
        assert message in str(stopped.value.code) and "\n" not in str(stopped.value.code)
        assert not (run / "in_model.json").exists()
    index = run.parent / "data" / "index.json"
    index.write_text(index.read_text().replace(f'"layer": {LAYER}', '"layer": "two"'))
    with pytest.raises(SystemExit, match="layer: expected it as harvest wrote it, got 'two'"):
        command("eval", run, "--model", "tiny", "--text", text[2])


def test_a_figure_that_is_not_defined_is_null() -> None:
    sae = constant_sae(torch.zeros(D).double())
    net = language_model().net
    net.head.weight.data.zero_()  # nothing that happens before the head matters
    model = SimpleNamespace(**vars(language_model()) | {"net": net})
    got = evaluate_in_model(sae, model, windows(), AT)
    assert got["kl_div_score"] is None and got["ce_loss_score"] is None
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in got.values())
