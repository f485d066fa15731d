"""Sparse probing against dense computations, and Newton's method for the probes."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import randn, refusals
from test_harvest import Tokenizer, causal
from torch import Tensor

from fastsae import SAE, Codes, SAEConfig, Selection, cli
from fastsae.evaluation import At, read_windows
from fastsae.order import permutation
from fastsae.probing import (
    columns,
    fit_probe,
    largest,
    mean_difference,
    scores,
    sparse_probing,
    token_labels,
)

D, F = 6, 20


def tiny_sae(rule: str = "topk") -> SAE:
    parameters = {"k": 4} if rule in ("topk", "batchtopk") else {}
    sae = SAE(SAEConfig(D, F, Selection.from_dict({"name": rule, **parameters})), seed=2)
    sae(randn(64, D))  # sets the threshold of the rules that have one at inference
    return sae.eval()


def newton(x: Tensor, y: Tensor, l2: float) -> tuple[np.ndarray, float]:
    """The documented objective's minimum, by Newton's method in the given columns."""
    a = x.double().numpy()
    mean, deviation = a.mean(0), a.std(0)
    deviation[deviation == 0] = 1
    a = np.column_stack([(a - mean) / deviation, np.ones(len(a))])
    t, n = y.numpy().astype(float), len(a)
    c = np.where(t > 0, n / 2 / t.sum(), n / 2 / (n - t.sum()))
    ridge = np.diag([l2] * x.shape[1] + [0.0])
    w = np.zeros(a.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-(a @ w)))
        gradient = a.T @ (c * (p - t)) + ridge @ w
        hessian = (a * (c * p * (1 - p))[:, None]).T @ a + ridge
        w -= np.linalg.solve(hessian, gradient)
    assert abs(gradient).max() < 1e-8
    raw = w[:-1] / deviation
    return raw, w[-1] - raw @ mean


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_a_probe_is_the_minimum(l2: float) -> None:
    x = randn(150, 4) * torch.tensor([1.0, 50.0, 0.01, 0.0]) + torch.tensor([0, 3.0, 0, 2.0])
    y = x[:, 0] + x[:, 1] / 50 + 0.5 * randn(150, seed=1) > 0.8
    assert 20 < int(y.sum()) < 70
    probe = fit_probe(x, y, l2=l2)
    weight, bias = newton(x, y, l2)
    np.testing.assert_allclose(probe.weight.numpy(), weight, rtol=1e-5, atol=1e-7)
    assert probe.bias == pytest.approx(bias, rel=1e-5) and probe.weight[3] == 0
    expected = x.double().numpy() @ weight + bias
    np.testing.assert_allclose(probe.scores(x).numpy(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(fit_probe(x, y, l2=l2).weight, probe.weight)


REFUSED = [
    (torch.ones(4, 2), torch.tensor([True, True, True, True]), "both classes, got 4 of 4"),
    (torch.ones(4, 2), torch.tensor([True, False]), "expected x [n, m] and y bool [n]"),
    (torch.ones(2, 2), torch.tensor([1, 0]), "expected x [n, m] and y bool [n]"),
    (torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False]), "x: expected finite values"),
]


@refusals("x, y, message", REFUSED)
def test_what_no_probe_can_fit_is_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit_probe(x, y)
    assert message in str(error.value)


def test_scores_count() -> None:
    y = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()
    predicted = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0]).bool()  # 2 TP, 1 FP, 1 FN
    assert scores(predicted, y) == (6 / 8, 4 / 6)
    assert scores(~y, y) == (0, 0) and scores(y, y) == (1, 1)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert scores(nothing, nothing) == (1, 0)


@pytest.mark.parametrize("layout", ["k", "row_ptr"])
def test_differences_and_columns_are_those_of_the_dense_codes(layout: str) -> None:
    dense = randn(80, F).relu() * (randn(80, F, seed=1) > 0.6)
    dense[:, 7], dense[5] = 0, 0
    codes = Codes.from_dense(dense, F if layout == "k" else None)
    y = randn(80, seed=3) > 0.2
    expected = dense[y].double().mean(0) - dense[~y].double().mean(0)
    torch.testing.assert_close(mean_difference(codes, y), expected, rtol=1e-12, atol=1e-12)
    chosen = torch.tensor([9, 7, 0, F - 1])
    assert torch.equal(columns(codes, chosen), dense[:, chosen].double())
    assert mean_difference(codes, torch.ones(80).bool()).isfinite().all()


def test_of_equal_values_the_first_is_largest() -> None:
    assert largest(torch.tensor([1.0, 3.0, 0.0, 3.0, 1.0]), 4).tolist() == [1, 3, 0, 4]


def by_hand(
    sae: SAE, x: Tensor, y: Tensor, window: Tensor, number: int, k: int, per_class: int
) -> dict:
    """The task of label `number` from dense codes."""
    dense = sae.encode(x, training=False).to_dense().detach().double()
    names = sorted(set(window.tolist()))
    order = permutation(len(names), 0, 5)
    training = {names[i] for i in order[: round(0.8 * len(names))].tolist()}
    parts = []
    for is_train, most in ((True, per_class), (False, per_class // 4)):
        inside = torch.tensor([(w in training) == is_train for w in window.tolist()])
        classes = [(inside & (y == value)).nonzero()[:, 0] for value in (False, True)]
        n = min(most, *map(len, classes))
        rows = [r[torch.from_numpy(permutation(len(r), number, 6)[:n])] for r in classes]
        parts.append(torch.cat(rows).sort().values)
    train, test = parts
    assert not {*window[train].tolist()} & {*window[test].tolist()}
    means = [dense[train][y[train] == value].mean(0) for value in (True, False)]
    best = (means[0] - means[1]).abs().argsort(descending=True, stable=True)[:k]
    found = {"train": train, "test": test, "latents": best.tolist()}
    for name, data in (("sparse", dense[:, best]), ("dense", x)):
        weight, bias = newton(data[train], y[train], 1.0)
        right = (data[test].double().numpy() @ weight + bias > 0) == y[test].numpy()
        found[name] = float(right.mean())
    return found


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "jumprelu"])
def test_sparse_probing_is_what_dense_codes_give(rule: str) -> None:
    sae, x = tiny_sae(rule), randn(900, D)
    window = torch.arange(900) // 9 * 3  # numbers need not follow each other
    labels = {
        "first": x[:, 0] + 0.3 * randn(900, seed=4) > 0.4,
        "never": torch.zeros(900, dtype=torch.bool),
        "second": x[:, 1] - x[:, 2] > 0.5,
    }
    sae.train()
    found = sparse_probing(sae, x, labels, window, ks=(1, 3, 5), per_class=120)
    assert sae.training and found["left_out"] == ["never"] and found["ks"] == [1, 3, 5]
    for number, name in ((0, "first"), (2, "second")):
        task = found["tasks"][name]
        for k in (1, 3, 5):
            expected = by_hand(sae, x, labels[name], window, number, k, 120)
            assert task["n_train"] == len(expected["train"]) == 240
            assert task["n_test"] == len(expected["test"]) == 60
            assert task["latents"][:k] == expected["latents"]
            assert task["k"][k]["accuracy"] == pytest.approx(expected["sparse"], abs=1 / 60 + 1e-9)
        assert task["dense"]["accuracy"] == pytest.approx(expected["dense"], abs=1 / 60 + 1e-9)


def test_a_latent_that_is_the_label_knows_it_and_noise_does_not() -> None:
    sae, x = tiny_sae(), randn(4000, D)
    fires = sae.encode(x).to_dense()[:, 3] > 0.3
    labels = {"latent 3": fires, "noise": randn(4000, seed=9) > 0}
    found = sparse_probing(sae, x, labels, torch.arange(4000) // 8, ks=(1, 5), per_class=600)
    task, noise = found["tasks"]["latent 3"], found["tasks"]["noise"]
    assert task["latents"][0] == 3 and task["k"][1]["f1"] > 0.97
    for figures in (noise["k"][1], noise["k"][5], noise["dense"]):
        assert abs(figures["accuracy"] - 0.5) < 0.1


def test_ks_and_widths_are_checked() -> None:
    sae, labels, window = tiny_sae(), {"a": torch.zeros(9).bool()}, torch.zeros(9).long()
    for x, ks, message in (
        (randn(9, D + 1), (1,), f"x: expected [N, {D}], got [9, {D + 1}]"),
        (randn(9, D), (), "ks: expected numbers in [1, 20], got []"),
        (randn(9, D), (1, F + 1), "ks: expected numbers in [1, 20], got [1, 21]"),
    ):
        with pytest.raises(ValueError) as error:
            sparse_probing(sae, x, labels, window, ks=ks)
        assert str(error.value) == message
    for per_class in (79, 0, -5):
        with pytest.raises(ValueError, match=f"per_class: expected at least 80, got {per_class}"):
            sparse_probing(sae, randn(9, D), labels, window, per_class=per_class)


def test_labels_of_tokens() -> None:
    texts = [" The", "the", " x1", "42", ",", " --", " ", "Été", "'s"]
    token, file = torch.arange(9), torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 0])
    found = token_labels(texts, token, file, ["p", "q", "r"])
    where = {name: y.nonzero()[:, 0].tolist() for name, y in found.items()}
    assert where["in p"] == [0, 1, 6, 7, 8] and where["in r"] == [4, 5]
    assert where["begins a word"] == [0, 2]
    assert where["capitalised"] == [0, 7]
    assert where["has a digit"] == [2, 3]
    assert where["punctuation"] == [4, 5]
    assert where["first letter t"] == [0, 1] and where["first letter x"] == [2]
    assert where["first letter e"] == [] and len(found) == 3 + 4 + 26
    assert "in p" not in token_labels(texts, token, file, ["p"])


# ---- the command ----


class Words(Tokenizer):
    """Bytes, of which each is a token with a text, capitals one that begins a word. As with
    SentencePiece a text does not begin with its first word's space."""

    TEXTS = tuple(f" {chr(i)}" if chr(i).isupper() else chr(i) for i in range(256))

    def __len__(self) -> int:
        return 256

    def decode(self, ids: list[int]) -> str:
        return "".join(self.TEXTS[i] for i in ids).removeprefix(" ")


def test_probe_writes_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(causal(), tokenizer=Words())
    monkeypatch.setattr("fastsae.commands.place.load_model", lambda *args: model)
    tiny_sae().save(tmp_path / "run")
    for name, text in (("one", "many Words, AND some are LOUD. "), ("two", "only a few; quiet ")):
        (tmp_path / f"{name}.txt").write_text(text * 120)
    files = [str(tmp_path / f"{name}.txt") for name in ("one", "two")]
    options = "--layer 2 --window 12 --tokens 4000 --ks 1 4 --per-class 200 --words 0".split()
    command = ["probe", str(tmp_path / "run"), "--model", "tiny", "--text", *files, *options]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(command)
    figures = json.loads((tmp_path / "run" / "probes.json").read_text())
    tasks = figures["sparse_probing"]["tasks"]
    names = {"in one", "begins a word", "capitalised", "punctuation", "first letter a"}
    assert names <= tasks.keys()
    assert "has a digit" in figures["sparse_probing"]["left_out"]
    found = read_windows(Words(), [Path(file) for file in files], 12).sample(4000)
    x = torch.cat(list(At(2).activations(model, found.ids)))[:, 1:].flatten(0, 1)
    token = torch.from_numpy(found.ids)[:, 1:].flatten().long()
    window = torch.arange(len(found.ids)).repeat_interleave(11)
    labels = token_labels(Words.TEXTS, token, torch.tensor(found.file)[window], ["one", "two"])
    expected = sparse_probing(
        SAE.load(tmp_path / "run"), x, labels, window, ks=(1, 4), per_class=200
    )
    assert json.loads(json.dumps(expected)) == figures["sparse_probing"]
    assert figures["windows_seen"] is None and "absorption" not in figures
    assert f"{tasks['capitalised']['dense']['f1']:.3f}" in out.getvalue()
    with pytest.raises(SystemExit, match="text: expected a file, as there are no words either"):
        cli.main([*command[:4], "--words", "0", "--layer", "2"])
