"""bench/steering.py's figures, on a tiny model written by hand; its tables and its curve."""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from test_steer_command import D, model

from fastsae import SAE, SAEConfig, TopK
from fastsae.generation import continued
from fastsae.sites import find_module
from fastsae.steering import steered, toward

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")


def test_gain_and_perplexity_by_hand() -> None:
    import steering

    tiny = model()
    windows = torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(0))
    words = torch.tensor([3, 200])
    plain = steering.measured(tiny, windows, words)
    with torch.no_grad():
        tiny.net.head.bias += torch.randn(258, generator=torch.Generator().manual_seed(1))
        p = tiny.net(windows, use_cache=False).logits[:, :-1].double().softmax(-1)
    found = steering.measured(tiny, windows, words)
    row = found.over(plain)
    text = p.gather(-1, windows[:, 1:, None])
    assert row["perplexity"] == pytest.approx(float(text.log().mean().neg().exp()), rel=1e-5)
    mass = (p[..., 3] + p[..., 200]).log().mean(1)
    assert row["log_probability"] == pytest.approx(float(mass.mean()), rel=1e-5)
    gain = mass - plain.log_probability
    assert row["gain"] == pytest.approx(float(gain.mean()), abs=1e-5)
    assert row["gain_error"] == pytest.approx(float(gain.std() / 5**0.5), abs=1e-5)
    before = plain.over(plain)
    assert before["gain"] == before["gain_error"] == 0 and before["ratio"] == 1
    assert row["ratio"] == pytest.approx(row["perplexity"] / before["perplexity"])


def test_every_way_moves_the_states_equally_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steering

    tiny = model()
    module = find_module(tiny.net, "residual", 2)
    for book, text in (("austen", "the lady"), ("moby", "a whale"), ("sotu", "of laws")):
        (tmp_path / f"{book}.jsonl").write_text(json.dumps({"text": f"{text} and so on, " * 40}))
    monkeypatch.setattr(steering, "WINDOW", 24)
    concept = steering.Concept("moby", "sotu", ("w", "h"))
    monkeypatch.setitem(steering.CONCEPTS, "sea", concept)
    sae = SAE(SAEConfig(D, 32, TopK(3)), seed=1).eval()
    args = Namespace(text=tmp_path, windows=3, strengths=[0.0, 0.5], write_at=0.5, prompt="a")
    args.temperature = 0.0
    rows = list(steering.measure(tiny, module, sae, "sea", args))
    assert [row["way"] for row in rows[1::2]] == list(steering.WAYS)
    assert all(row["gain"] == 0 and row["ratio"] == 1 for row in rows if row["strength"] == 0)
    assert rows[0]["text"] == " ".join(continued(tiny, "a", 40).split())
    assert all(("text" in row) == (row["strength"] == 0.5) for row in rows[1:])

    windows = steering.windows_of(tiny, tmp_path / "austen.jsonl", 3)
    about, other = (
        steering.states_in(tiny, module, steering.windows_of(tiny, tmp_path / f"{book}.jsonl", 3))
        for book in ("moby", "sotu")
    )
    assert about.shape == (3 * 23, D)
    norm = steering.states_in(tiny, module, windows).norm(dim=1).mean()
    shift = about.mean(0) - other.mean(0)
    shift *= 0.5 * norm / shift.norm()
    with steered(module, toward(shift), positions=slice(1, None)):
        expected = steering.measured(tiny, windows, torch.tensor([119, 104]))
    (row,) = (row for row in rows if row["way"] == "means" and row["strength"] == 0.5)
    assert row["perplexity"] == pytest.approx(float(expected.loss.mean().exp()), rel=1e-4)
    moved = float(expected.log_probability.mean()) - rows[0]["log_probability"]
    assert row["gain"] == pytest.approx(moved, abs=1e-4) and moved != 0
    assert math.isfinite(row["factor"]) and row["mean_norm"] == pytest.approx(float(norm))
    with pytest.raises(ValueError, match="words: expected one token each, got 5 for 'whale'"):
        steering.word_ids(tiny, ("whale",))
    with pytest.raises(ValueError, match=r"expected at least 999 windows of 24, got \d+"):
        steering.windows_of(tiny, tmp_path / "moby.jsonl", 999)


def test_tables_follow_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import steering
    import steering_tables

    rows = [
        {
            "concept": concept,
            "way": way,
            "strength": s,
            "gain": 2 * s + i,
            "ratio": 1 + s,
            "text": "a|b",
        }
        for concept in ("sea", "law")
        for i, way in enumerate(steering.WAYS)
        for s in (0.1, 0.2, 0.4, 0.8)
    ]
    monkeypatch.setattr(steering_tables, "results", lambda part, of: rows)
    head, _, first, *_ = steering_tables.steering_table().splitlines()
    assert head == "| | sea, 0.1 | sea, 0.2 | sea, 0.4 | law, 0.1 | law, 0.2 | law, 0.4 |"
    assert first.startswith("| ReLU form (eq. 5) | +0.20 (×1.10) | +0.40 (×1.20) | +0.80 (×1.40) |")
    texts = steering_tables.texts_table().splitlines()
    assert texts[2] == "| sea | ReLU form (eq. 5) | a\\|b |" and len(texts) == 2 + 2 * 6 * 4
    drawn = steering_tables.steering_figure()
    assert drawn.count('fill="none"') == len(steering.WAYS)
    assert all(
        name.replace("'", "&#x27;") in drawn or name in drawn for name in steering.WAYS.values()
    )
    lora = {
        "lr": 3e-4,
        "held_out_tokens": 1536,
        "tokens": 10240,
        "seconds": 61.4,
        "ce_model": 3.0,
        "ce_spliced": 3.5,
        "gap": 0.5,
    }
    monkeypatch.setattr(steering_tables, "results", lambda part, of: [lora | {"kl": 0.25}])
    assert steering_tables.lora_table().splitlines()[-1] == (
        "| 0.0003 | 1,536 | 10,240 | 61 s | 3.0000 | 3.5000 | 0.5000 | 0.2500 |"
    )
