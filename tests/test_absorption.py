"""Absorption on dictionaries where it is known by construction, and against loops over words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import randn, refusals
from test_harvest import Causal, Tokenizer, causal
from torch import Tensor, nn

from fastsae import SAE, Codes, SAEConfig, TopK, cli
from fastsae.absorption import LETTERS, Criteria, _absorbed, absorption
from fastsae.evaluation import At
from fastsae.first_letter import (
    EXAMPLES,
    READ,
    absorption_in_model,
    letter_words,
    prompts,
)
from fastsae.models import LanguageModel
from fastsae.order import permutation

S, T, U = (LETTERS.index(c) for c in "stu")
PER_LETTER, RARE = 200, 40


def planted(absorbing: bool) -> tuple[SAE, Tensor, Tensor, Tensor, Tensor]:
    """An SAE, activations, letters, which words train, and which words with S are rare.

    Words with S, T and U are 2·(direction of the letter) and noise in dimensions of their own. RARE
    of those with S have a direction of their own, too, and a latent for it. Where it absorbs, it
    holds 2·S + 3·(own direction), and the latent for S has a negative weight for the latter.
    """
    n = 3 * PER_LETTER
    d = 3 + RARE + 8
    letter = torch.tensor([S, T, U]).repeat(PER_LETTER)
    order = torch.from_numpy(permutation(n, 1))
    train = torch.zeros(n, dtype=torch.bool)
    train[order[: n * 4 // 5]] = True
    x = torch.zeros(n, d)
    for i, name in enumerate((S, T, U)):
        x[letter == name, i] = 2
    rare = torch.zeros(n, dtype=torch.bool)
    rare[(letter == S).nonzero()[:, 0][:: PER_LETTER // RARE]] = True
    x[rare, torch.arange(3, 3 + RARE)] = 3
    x[:, 3 + RARE :] = 0.1 * randn(n, 8)

    sae = SAE(SAEConfig(d, 3 + RARE, TopK(2), decoder_norm="free"))
    own = torch.eye(d)[: 3 + RARE]
    with torch.no_grad():
        sae.W_enc.copy_(own)
        sae.W_dec.copy_(own)
        if absorbing:
            sae.W_enc[0, 3 : 3 + RARE] = -1
            sae.W_dec[3:, 0] = 2 / 3  # of an activation of 3
    return sae.eval(), x, letter, train, rare


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_what_is_absorbed_is_found(scale: float) -> None:
    sae, x, letter, train, rare = planted(absorbing=True)
    sae.input_scale.fill_(scale)  # which changes codes, and nothing else
    found = absorption(sae, x, letter, train)
    assert found["letters"].keys() == {"s", "t", "u"} and found["n_skipped"] == 23
    assert set(found["skipped"].values()) == {None}
    share = int((rare & ~train).sum()) / int(((letter == S) & ~train).sum())
    assert 0.1 < share < 0.3
    s = found["letters"]["s"]
    assert s["main_latents"] == [0] and s["probe_f1"] == 1 and 0.8 < s["main_latents_f1"] < 0.97
    assert s["num_probe_true_positives"] == int(((letter == S) & ~train).sum())
    assert s["num_full_absorption"] == int((rare & ~train).sum())
    assert s["full_absorption_rate"] == s["mean_absorption_fraction"] == share
    for name, latent in (("t", 1), ("u", 2)):
        other = found["letters"][name]
        assert other["main_latents"] == [latent] and other["main_latents_f1"] == 1
        assert other["full_absorption_rate"] == other["mean_absorption_fraction"] == 0
    assert found["mean_full_absorption_score"] == pytest.approx(share / 3)
    assert found["mean_absorption_fraction_score"] == pytest.approx(share / 3)
    assert found["mean_num_split_features"] == 1 and found["n_words"] == len(x)


def test_latents_of_words_that_leave_the_letter_alone_absorb_nothing() -> None:
    sae, x, letter, train, _ = planted(absorbing=False)
    sae.train()
    found = absorption(sae, x, letter, train)
    assert sae.training and found["n_letters"] == 3
    assert found["mean_full_absorption_score"] == found["mean_absorption_fraction_score"] == 0
    assert found["mean_main_latents_f1"] == 1


def test_a_letter_in_two_latents_is_split_not_absorbed() -> None:
    sae, x, letter, train, _ = planted(absorbing=False)
    half = torch.zeros(len(x))
    half[(letter == T).nonzero()[:, 0][::2]] = 1
    x[:, -1] = 4 * half  # half of the words with T, whose latent takes the letter over
    wide = SAE(SAEConfig(x.shape[1], len(sae.W_enc) + 1, TopK(1), decoder_norm="free")).eval()
    with torch.no_grad():
        for to, rows in ((wide.W_enc, sae.W_enc), (wide.W_dec, sae.W_dec)):
            to.zero_()
            to[:-1] = rows
        wide.W_enc[-1, -1] = wide.W_dec[-1, -1] = 1
        wide.W_dec[-1, 1] = 0.5
    found = absorption(wide, x, letter, train)["letters"]["t"]
    assert sorted(found["main_latents"]) == [1, len(sae.W_enc)] and found["num_split_features"] == 2
    assert found["full_absorption_rate"] == 0


def test_letters_that_no_probe_finds_are_skipped() -> None:
    sae, x, letter, train, _ = planted(absorbing=False)
    x[letter != S, :3] = 0
    others = torch.arange(len(x)) % 5  # five letters that look alike: a to e
    letter = letter.where(letter == S, others)
    found = absorption(sae, x, letter, train)
    assert found["letters"].keys() == {"s"} and found["n_skipped"] == 25
    assert found["skipped"]["a"] < 0.6 and found["skipped"]["t"] is None
    nothing = absorption(sae, 0.01 * randn(*x.shape), letter, train)
    assert nothing["mean_full_absorption_score"] is None and nothing["letters"] == {}
    every = absorption(sae, x, letter, train, criteria=Criteria(probe_f1=0.0))
    assert every["letters"].keys() == {*"sabcde"}


def by_hand(
    projection: float, z: Tensor, supplied: Tensor, cosine: Tensor, main: list[int], c: Criteria
) -> tuple[bool, float]:
    """Both figures of a word, from its dense codes, in the words of SAEBench's definition."""
    s = z * supplied
    others = [
        float(s[i])
        for i in range(len(z))
        if i not in main and cosine[i] >= c.fraction_cosine and s[i] > 0
    ]
    absorbed = sum(sorted(others, reverse=True)[: c.absorbers])
    kept = float(s[main].sum())
    if kept >= projection or absorbed / projection < c.share:
        fraction = 0.0
    elif kept <= 0:
        fraction = 1.0
    else:
        part = min(absorbed, projection - kept)
        fraction = min(max(part / (part + kept), 0.0), 1.0)
    top = int(s.argmax())
    full = bool((z[main].abs() < c.silent).all()) and projection >= 0
    full = full and bool(cosine[top] >= c.full_cosine) and float(s[top]) / projection >= c.share
    return full, fraction


@pytest.mark.parametrize("seed", range(4))
def test_words_against_loops(seed: int) -> None:
    n, f = 300, 12
    z = (randn(n, f, seed=seed) + 0.3).relu() * (randn(n, f, seed=seed + 50) > 0.4)
    z[5] = 0
    z[:, 0] *= randn(n, seed=seed + 99) > 0.8  # the main latents are often silent
    z[:, 4] *= z[:, 0] > 0
    cosine = (randn(f, seed=seed + 7) * 0.4).clamp(-1, 1).double()
    supplied = cosine * (randn(f, seed=seed + 8).abs() + 0.5).double()
    projection = (z.double() @ supplied) * (0.5 + randn(n, seed=seed + 9).abs()).double()
    projection += 0.2 * randn(n, seed=seed + 10).double()
    for criteria in (Criteria(), Criteria(share=0.1, absorbers=1, fraction_cosine=-1.0)):
        full, fraction = _absorbed(
            projection, Codes.from_dense(z), supplied, cosine, torch.tensor([0, 4]), criteria
        )
        for i in range(n):
            expected = by_hand(
                float(projection[i]), z[i].double(), supplied, cosine, [0, 4], criteria
            )
            assert (bool(full[i]), float(fraction[i])) == pytest.approx(expected, abs=1e-12)
        assert full.any() and not full.all() and 0 < float(fraction.mean()) < 1


REFUSED = [
    ({"x": randn(4, 3)}, "x: expected [N, 51], got [4, 3]"),
    ({"letter": torch.zeros(3).long()}, "letter and train: expected [600], got [3] and [600]"),
    ({"sae": SAE(SAEConfig(51, 9, TopK(2), d_out=3))}, "expected an autoencoder, got a transcoder"),
]


@refusals("changes, message", REFUSED)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    sae, x, letter, train, _ = planted(absorbing=False)
    given = {"sae": sae, "x": x, "letter": letter, "train": train} | changes
    with pytest.raises(ValueError) as error:
        absorption(**given)
    assert message in str(error.value)


# ---- in a model ----

FIRST = 300  # the first of the ids that are words of two letters


class Pairs(Tokenizer):
    """Bytes, and all words of two small letters, behind a space where the first is below n."""

    def __len__(self) -> int:
        return FIRST + 26 * 26

    def decode(self, ids: list[int]) -> str:
        if ids[0] < FIRST:
            return "é1"
        a, b = divmod(ids[0] - FIRST, 26)
        return (" " if a < 13 else "") + LETTERS[a] + LETTERS[b]


def model_of_pairs() -> LanguageModel:
    net = Causal()
    torch.manual_seed(5)
    net.embed = nn.Embedding(FIRST + 26 * 26, 6)
    net.embed.weight.data[FIRST:] *= 0.3
    for pair in range(26 * 26):  # the first letter lies on a circle: a probe may find it
        angle = torch.tensor(pair // 26 / 26 * 2 * torch.pi)
        net.embed.weight.data[FIRST + pair, :2] = 3 * torch.stack([angle.cos(), angle.sin()])
    net.config.max_position_embeddings = 4096
    return replace(causal(), net=net, tokenizer=Pairs())


def test_words_and_their_prompts() -> None:
    words, letter = letter_words(Pairs())
    assert words.tolist() == list(range(FIRST, FIRST + 26 * 26))
    assert letter.tolist() == [i // 26 for i in range(26 * 26)]
    n = READ + EXAMPLES + 3
    windows, places = prompts(Pairs(), words[:n], letter[:n])
    assert windows.shape[0] == 2 and len(places) == READ

    def line(i: int) -> list[int]:
        answer = f" has the first letter: {LETTERS[letter[i % n]].upper()}\n"
        return [int(words[i % n]), *answer.encode()]

    for number, window in enumerate(windows):
        lines = range(number * READ - EXAMPLES, (number + 1) * READ)
        assert window.tolist() == [ord("\n"), *(t for i in lines for t in line(i))]
        found = [int(window[place]) for place in places]
        assert found == [int(words[(number * READ + i) % n]) for i in range(READ)]
    with pytest.raises(ValueError, match="words: expected at least 40, got 39"):
        prompts(Pairs(), words[:39], letter[:39])


def test_rows_are_those_of_the_words() -> None:
    """The same figures as from activations of whole passes, found word by word."""
    model, at = model_of_pairs(), At(2, batch_size=3)
    sae = SAE(SAEConfig(6, 24, TopK(3)), seed=1).eval()
    words, letter = letter_words(model.tokenizer)
    order = permutation(len(words), 0, 7)[:420]
    words, letter = words[order], letter[order]
    rows = []
    for part in (slice(0, 336), slice(336, 420)):
        windows, places = prompts(model.tokenizer, words[part], letter[part])
        batches = []
        for ids in torch.from_numpy(windows).long().split(3):
            x = model.net.embed(ids)
            for block in model.net.layers[:2]:
                x = block(x)
            batches.append(x)
        count = len(words[part])
        rows.append(torch.cat(batches)[:, places].reshape(-1, 6)[:count].detach())
        assert np.array_equal(windows[:, places].reshape(-1)[:count], words[part])
    expected = absorption(sae, torch.cat(rows), letter, torch.arange(420) < 336)
    criteria = Criteria(probe_f1=0.05)
    assert absorption_in_model(sae, model, at, n_words=420) == expected
    loose = absorption_in_model(sae, model, at, n_words=420, criteria=criteria)
    assert loose["n_letters"] > 3
    assert absorption_in_model(sae, model, at, criteria=criteria)["n_words"] == 676
    with pytest.raises(ValueError, match="n_words: expected at least 1, got -5"):
        absorption_in_model(sae, model, at, n_words=-5)
    model.net.config.max_position_embeddings = 64
    with pytest.raises(ValueError, match="window: expected at most the 64 of tiny, got"):
        absorption_in_model(sae, model, at, n_words=420)


def test_the_command_writes_absorption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastsae.commands.place.load_model", lambda *args: model_of_pairs())
    sae = SAE(SAEConfig(6, 24, TopK(3)), seed=1)
    sae.save(tmp_path)
    command = ["probe", str(tmp_path), "--model", "tiny", "--layer", "2", "--words", "400"]
    cli.main(command)
    figures = json.loads((tmp_path / "probes.json").read_text())
    shown = capsys.readouterr().out
    assert figures["absorption"]["n_words"] == 400 and "sparse_probing" not in figures
    assert "mean_full_absorption_score" in shown and "skipped letters: " in shown
    cli.main([*command, "--json"])
    assert json.loads(capsys.readouterr().out) == figures
