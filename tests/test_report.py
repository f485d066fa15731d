"""The report: what it measures against dense torch, and its page as a parser sees it."""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import write_set

from fastsae import SAE, SAEConfig, Selection, TopK
from fastsae.cli import main
from fastsae.contexts import PAD, Contexts
from fastsae.corpus import digest
from fastsae.data import SAMPLES, Source, load_sample, open_source, split
from fastsae.matching import cosine_histogram
from fastsae.report import charts, latents, portrait, tables, write_report
from fastsae.report.history import Columns, History, read_history
from fastsae.report.page import document
from fastsae.report.text import duration, esc, percent, short, tick

VOID = {"meta", "link", "input"}


# ---- what the tests are made of ----


def tiny_sae(d_in: int = 6, d_sae: int = 24, rule: Selection | None = None, seed: int = 0) -> SAE:
    return SAE(SAEConfig(d_in=d_in, d_sae=d_sae, selection=rule or TopK(3)), seed=seed)


def rows(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def with_tokens(x: torch.Tensor, vocabulary: dict[int, str], every: int = 7) -> Source:
    """Row r has token r mod every; its neighbours are those of rows around it."""

    def ids(numbers: np.ndarray, reach: int) -> np.ndarray:
        wanted = numbers[:, None] + np.arange(-reach, reach + 1)
        return np.where((wanted >= 0) & (wanted < len(x)), wanted % every, PAD)

    return replace(open_source(x), name="words", contexts=Contexts(ids, vocabulary))


def write_log(run: Path, lines: list[Any]) -> None:
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def log_lines(n: int = 30) -> list[dict[str, Any]]:
    config = {"sae": {}, "train": {"steps": 10 * n, "lr": 0.001}}
    lines: list[dict[str, Any]] = [{"config": config, "engine": {"backend": "cpu"}}]
    for i in range(1, n + 1):
        line = {
            "step": 10 * i,
            "tokens": 640 * i,
            "seconds": 0.5 * i,
            "loss": 1 / i,
            "fvu": 0.9 / i,
        }
        lines.append({**line, "l0": 3.0, "n_dead": max(0, 10 - i), "tokens_per_s": 1280.0})
        if i % 10 == 0:
            figures = {"fvu": 1 / i, "l0": 3.0, "dead_share": 0.25}
            lines.append({"step": 10 * i, "eval": figures})
    return lines


METRICS = {
    "fvu": 0.2154,
    "pca_fvu": 0.5531,
    "pca_components": 3,
    "l0": 3.0,
    "dead_share": 0.125,
    "train_seconds": 15.0,
    "tokens_per_s": 1280.0,
    "product_seconds": 0.04,
    "step_ratio": 1.25,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_log(folder, log_lines())
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    return folder


class Page(HTMLParser):
    """Elements with attributes and text; raises where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def all(self, tag: str, css: str | None = None) -> list[dict[str, str | None]]:
        return [
            attrs
            for name, attrs in self.elements
            if name == tag and (css is None or css in (attrs.get("class") or "").split())
        ]

    @property
    def headings(self) -> list[str]:
        return self.texts["h3"]


def assert_self_contained(text: str) -> Page:
    """No element or style that could ask for anything, one script, known to the policy."""
    parsed = Page(text)
    assert {"img", "iframe", "object", "form", "base", "a"}.isdisjoint(
        t for t, _ in parsed.elements
    )
    for tag, attrs in parsed.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "srcset")]
        assert attrs.get("href", "data:,") == "data:,", tag
    (style,) = parsed.texts["style"]
    assert "url(" not in style and "@import" not in style
    (script,) = parsed.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (m["content"] for m in parsed.all("meta") if "http-equiv" in m)
    assert policy is not None
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy
    return parsed


def dense_codes(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """(N, F) codes of a TopK SAE in float64: a sort of all pre-activations."""
    h = (x.double() - sae.b_dec.double()) @ sae.W_enc.double().T
    kept = h.topk(sae.config.selection.k, dim=1)
    return torch.zeros_like(h).scatter(1, kept.indices, kept.values.clamp(min=0)).detach()


# ---- contexts ----


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_have_the_words_of_their_tokens_and_no_others(name: str) -> None:
    source, ctx = open_source(f"sample:{name}"), load_sample(name).ctx.astype(np.int64)
    assert source.contexts is not None
    assert set(source.contexts.vocabulary) == set(np.unique(ctx).tolist()) - {65535}
    assert all(source.contexts.vocabulary.values())
    index = np.array([5, 0, len(ctx) - 1])
    assert (source.token_ids(index, 8) == np.where(ctx == 65535, PAD, ctx)[index]).all()
    assert (source.token_ids(index, 0) == ctx[index, 8:9]).all()
    view = source.select(np.array([9, 5, 7]))
    assert (view.token_ids(np.array([1]), 2) == source.token_ids(index[:1], 2)).all()


def test_words_of_the_samples_read_as_text() -> None:
    def text(name: str, row: int) -> str:
        source = open_source(f"sample:{name}")
        assert source.contexts is not None
        ids = source.token_ids(np.array([row]), 8)[0].tolist()
        return "".join(source.contexts.piece(i) for i in ids if i != PAD)

    assert text("minilm_l3", 0) == " moreover the word of the lord came unto me, saying, also,"
    assert text("smollm2_l11", 1) == (
        " a chance to lead lives of dignity, respect, and possibility? Can our democracy deliver"
    )


def test_contexts_of_a_set_end_with_the_window(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [3, 1, 9])  # windows of 4 rows, tokens count from 0
    source = open_source(tmp_path / "set")
    assert source.contexts is not None and not source.contexts.vocabulary
    everything = source.token_ids(np.arange(13), 8)
    for row in range(13):
        wanted = [r if 0 <= r < 13 and r // 4 == row // 4 else PAD for r in range(row - 8, row + 9)]
        assert everything[row].tolist() == wanted
    assert source.contexts.piece(12) == " 12"


def test_data_without_tokens_say_so() -> None:
    with pytest.raises(ValueError, match="tensor: expected data with tokens, got none"):
        open_source(rows(3)).token_ids(np.array([0]), 0)


# ---- history ----


def test_history_reads_what_a_torn_and_resumed_log_says(tmp_path: Path) -> None:
    lines = [json.dumps(line) for line in log_lines(20)]
    torn = lines[5][: len(lines[5]) // 2]
    resumed = json.dumps({"config": {"sae": {}, "train": {"lr": 0.5}}})
    again = json.dumps({"step": 195, "tokens": 7, "seconds": 0.1, "loss": 8.0, "l0": "three"})
    text = [*lines, torn, "[1]", resumed, again, '{"step": -1, "loss": 1}', '{"step": NaN}']
    (tmp_path / "log.jsonl").write_text("\n".join(text))
    history = read_history(tmp_path)
    assert history.unreadable == 2
    assert history.config["config"]["train"]["lr"] == 0.5
    steps, loss = history.log.curve("loss")
    assert steps == [*range(10, 200, 10), 195] and loss[-1] == 8.0
    assert history.log.curve("l0")[0] == steps[:-1]
    assert history.evals.curve("fvu") == ([100.0, 200.0], [0.1, 0.05])
    assert history.speed()[0] == steps[1:-1]  # the clock went back at the last line


def test_speed_is_that_between_lines() -> None:
    history = History()
    for step, tokens, seconds in ((10, 100, 2.0), (20, 200, 2.5), (40, 400, 6.5)):
        history.log.add(step, {"tokens": tokens, "seconds": seconds})
    assert history.speed() == ([20, 40], [200.0, 50.0], [0.05, 0.2])


@pytest.mark.parametrize("text", ["[1]", "{", "1", "[" * 100_000])
def test_bad_figures_are_one_line(run: Path, text: str) -> None:
    (run / "metrics.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"metrics\.json: (expected a JSON object|not readable)"
    ) as error:
        write_report(run, tiny_sae(), open_source(rows(9)))
    assert "\n" not in str(error.value)
    assert not (run / "report.html").exists()


# ---- measure ----


def test_counts_and_l0_are_those_of_dense_codes() -> None:
    sae, x = tiny_sae(), rows(500)
    codes = dense_codes(sae, x)
    found = portrait.portray(sae, [open_source(x[:100]), open_source(x[100:])])
    assert found.rows == (100, 400) and found.n_rows == 500
    assert (found.counts == (codes > 0).sum(0).numpy()).all()
    assert (found.l0 == (codes > 0).sum(1).numpy()).all()
    limited = portrait.portray(sae, [open_source(x[:100]), open_source(x[100:])], max_rows=130)
    assert limited.rows == (100, 30)
    assert (limited.counts == (codes[:130] > 0).sum(0).numpy()).all()


@pytest.mark.parametrize("name", ["topk", "abs-topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_every_kind_of_rule_is_measured_as_at_inference(name: str) -> None:
    x, parameters = rows(300), {"k": 3} if "topk" in name else {}
    sae = tiny_sae(rule=Selection.from_dict({"name": name, **parameters}))
    sae.train()
    sae(rows(64, seed=1))  # sets the threshold of the rules that have one at inference
    found = portrait.portray(sae, [open_source(x)])
    assert sae.training
    codes = sae.encode(x, training=False)
    assert (found.counts == codes.firing_counts().numpy()).all() and found.counts.any()
    assert (found.l0 == codes.l0().numpy()).all()
    dense = codes.to_dense()
    for latent in found.latents:
        column = dense[:, latent.latent].detach()
        best = column.abs().sort(descending=True, stable=True).indices[: portrait.CONTEXTS]
        best = best[column[best] != 0]
        assert [e.row for e in latent.examples] == best.tolist()
        assert [e.value for e in latent.examples] == column[best].tolist()


def test_small_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, source = tiny_sae(), with_tokens(rows(150), {})
    whole = portrait.portray(sae, [source])
    monkeypatch.setattr(portrait, "_BATCH_PAIRS", 50)
    sizes = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    parts = portrait.portray(sae, [source])
    assert parts.latents == whole.latents and (parts.counts == whole.counts).all()
    assert sizes[:3] == [2, 16, 16] and sum(sizes) == 300  # 24 latents, then 3 active a row; twice


def test_examples_carry_their_text_and_the_most_frequent_tokens() -> None:
    words = {i: f" w{i}" for i in range(6)}  # 6 has no word
    x, sae = rows(200), tiny_sae()
    train, held_out = split(with_tokens(x, words), 50)
    found = portrait.portray(sae, [held_out, train])
    numbers = np.concatenate([held_out.index, train.index])
    codes = dense_codes(sae, x)
    piece = {**words, 6: " 6"}
    assert found.text == "words"
    for latent in found.latents:
        column = codes[numbers, latent.latent].numpy()
        fired = numbers[column > 0]
        assert latent.count == len(fired)
        example = latent.examples[0]
        row = int(numbers[column.argmax()])
        assert example.token == piece[row % 7]
        assert example.before == tuple(piece[r % 7] for r in range(max(0, row - 8), row))
        assert example.after == tuple(piece[r % 7] for r in range(row + 1, min(200, row + 9)))
        totals = sorted(Counter(fired % 7).items(), key=lambda item: (-item[1], item[0]))[:4]
        assert latent.tokens == tuple((piece[t], n / len(fired)) for t, n in totals)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_choice_of_latents(counts: list[int]) -> None:
    chosen = portrait.choose(np.array(counts))
    ids = [latent for latent, _ in chosen]
    alive = [i for i, count in enumerate(counts) if count]
    assert len(set(ids)) == len(ids) == min(len(alive), sum(size for _, size in portrait.GROUPS))
    assert set(ids) <= set(alive)
    groups = {name: [i for i, g in chosen if g == name] for name, _ in portrait.GROUPS}
    frequent = sorted(alive, key=lambda i: (-counts[i], i))[:6]
    assert groups["most frequent"] == frequent
    rest = [i for i in sorted(alive, key=lambda i: (counts[i], i)) if i not in frequent]
    assert groups["rarest that fire"] == rest[:6]


def test_measure_refuses_other_widths_and_no_rows() -> None:
    with pytest.raises(ValueError, match="tensor: expected width 6, got 5"):
        portrait.portray(tiny_sae(), [open_source(rows(4, 5))])
    with pytest.raises(ValueError, match="expected at least one row to look at, got none"):
        portrait.portray(tiny_sae(), [split(open_source(rows(4)), 0)[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_cosines_are_those_of_the_whole_matrix(dtype: torch.dtype) -> None:
    W = rows(300, 5, seed=1).to(dtype)
    W[7] = 0
    W[11] = 3 * W[10]
    unit = torch.nn.functional.normalize(W.double(), dim=1)
    expected = (unit @ unit.T - 10 * torch.eye(300)).amax(1).numpy()
    np.testing.assert_allclose(portrait.nearest_cosines(W), expected, atol=1e-6)


def test_nearest_cosines_of_many_latents_are_a_sample_across_blocks() -> None:
    W = rows(8192 + 300, 3, seed=2)
    unit = torch.nn.functional.normalize(W.double(), dim=1)
    found = portrait.nearest_cosines(W, max_pairs=1 << 20)
    queries = np.sort(portrait.permutation(len(W), seed=0)[:256])
    assert len(found) == 256 and queries[-1] >= 8192
    cosines = unit[queries] @ unit.T
    cosines[torch.arange(256), queries] = -1
    np.testing.assert_allclose(found, cosines.amax(1).numpy(), atol=1e-6)
    assert len(portrait.nearest_cosines(W[:1])) == 0


# ---- charts ----


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.booleans())
@settings(max_examples=300, deadline=None)
def test_ticks_are_round_few_and_on_the_axis(low: float, size: float, log: bool) -> None:
    scale = charts.Scale(abs(low) + 1e-9, (abs(low) + 1e-9) * (1 + size), True)
    if not log:
        scale = charts.Scale(low, low + size)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks)) or scale.high - scale.low < 1e-6 * abs(low)
    slack = 1e-9 * max(abs(scale.low), abs(scale.high)) + 0.001 * scale.high * log
    assert all(scale.low - slack <= t <= scale.high + slack for t in ticks)
    assert all(0 <= scale.at(t) <= 1 for t in ticks)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_finite_values_can_be_drawn(values: list[float], log: bool, from_zero: bool) -> None:
    steps = list(range(1, len(values) + 1))
    text = charts.curves(
        "t", [charts.Curve("c", steps, values)], "", unit="u", log=log, from_zero=from_zero
    )
    assert (text == "") == (log and max(values) <= 0)
    assert "nan" not in text and "inf" not in text


def test_long_curves_are_means_with_their_range() -> None:
    n = 10_000
    values = [math.sin(i / 50) + (i % 2) for i in range(n)]
    points = charts._thinned(charts.Curve("c", list(range(n)), values))
    assert len(points) <= charts.MAX_POINTS
    size = math.ceil(n / charts.MAX_POINTS)
    for i, (step, mean, low, high) in enumerate(points):
        group = values[i * size : (i + 1) * size]
        assert step == min((i + 1) * size, n) - 1
        assert (low, high) == (min(group), max(group))
        assert mean == pytest.approx(sum(group) / len(group))
    assert points[-1][0] == n - 1


def made(counts: Any, l0: Any = (3,), cosines: Any = (), n_rows: int = 100) -> portrait.Portrait:
    return portrait.Portrait(
        (n_rows,), np.array(counts), np.array(l0), np.array(cosines, float), (), "none"
    )


@given(st.integers(1, 100_000), st.lists(st.floats(0, 1), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_every_latent_is_in_the_bar_of_its_frequency(n: int, shares: list[float]) -> None:
    counts = np.array([round(share * n) for share in shares])
    bars = latents.frequency_bars(made(counts, n_rows=n))
    assert sum(bar.count for bar in bars) == len(counts)
    rest = [bar for bar in bars if bar.rest]
    assert sum(bar.count for bar in rest) == (counts == 0).sum() and len(rest) <= 1
    logs = np.log10(counts[counts > 0] / n)
    for bar in bars[len(rest) :]:
        inside = (logs >= bar.low - 1e-9) & ((logs < bar.high - 1e-9) | (bar.high == 0))
        assert bar.count == inside.sum()


@pytest.mark.parametrize("low, high", [(32, 32), (0, 3), (0, 0), (14, 58), (1, 5000)])
def test_every_token_is_in_the_bar_of_its_l0(low: int, high: int) -> None:
    l0 = np.random.default_rng(0).integers(low, high + 1, 400)
    bars = latents.l0_bars(made([1], l0))
    assert 9 <= len(bars) <= 40 and len({bar.high - bar.low for bar in bars}) == 1
    assert [bar.count for bar in bars] == [((l0 >= b.low) & (l0 < b.high)).sum() for b in bars]
    assert sum(bar.count for bar in bars) == 400


def test_every_latent_is_in_the_bar_of_its_cosine() -> None:
    cosines = [-0.31, -0.05, 0, 0.049, 0.05, 0.3, 0.95, 0.999, 1.0]
    bars = latents.cosine_bars(cosine_histogram(np.array(cosines)))
    assert (bars[0].low, bars[-1].high) == (-0.35, 1.0)
    counted = {round(bar.low, 2): bar.count for bar in bars if bar.count}
    assert counted == {-0.35: 1, -0.05: 1, 0.0: 2, 0.05: 1, 0.3: 1, 0.95: 3}


def test_numbers_as_they_are_shown() -> None:
    assert [short(v) for v in (0.2154, 0, 32.94, 1228800, -0.5, 1234.5, math.nan)] == [
        "0.2154", "0", "32.94", "1,228,800", "−0.5000", "1,234", "–",
    ]  # fmt: skip
    shown = [percent(v).replace("\u00a0", " ") for v in (0, 1, 0.1234, 0.0058, 1e-4, 1e-9)]
    assert shown == ["0 %", "100 %", "12.3 %", "0.58 %", "0.010 %", "< 0.001 %"]
    ticks = [tick(v) for v in (0, 0.2, 1500, 50_000, -1.5e6, 2e9, -2e-5, 1e15)]
    assert ticks == ["0", "0.2", "1,500", "50k", "−1.5M", "2G", "−2e−05", "1e+15"]
    seconds = [duration(s).replace("\u00a0", " ") for s in (0.0262, 0.1, 37.3, 700, 90000)]
    assert seconds == ["26.2 ms", "100.0 ms", "37.3 s", "12 min", "25.0 h"]
    assert esc("<\x00\ud800&'\">") == "&lt;\ufffd\ufffd&amp;&#x27;&quot;&gt;"


# ---- the page ----


def test_page_is_whole_self_contained_and_has_every_picture(run: Path) -> None:
    path = write_report(run, tiny_sae(), open_source(rows(80)))
    assert path == run / "report.html" and not list(run.glob("*.tmp"))
    parsed = assert_self_contained(path.read_text())
    pictures = ["Loss", "FVU", "Dead latents", "Speed"]
    pictures += ["Firing frequency", "L0", "Nearest decoder neighbour"]
    assert parsed.headings[: len(pictures)] == pictures
    assert len(parsed.all("figure")) == len(parsed.texts["figcaption"]) == len(pictures)
    assert all(caption.strip() for caption in parsed.texts["figcaption"])
    assert [svg["aria-label"] for svg in parsed.all("svg")] == pictures
    for plot in parsed.all("div", "plot"):
        places, texts = json.loads(plot["data-x"] or ""), json.loads(plot["data-t"] or "")
        assert len(places) == len(texts) > 0
        assert places == sorted(places) and 0 <= places[0] and places[-1] <= 100
    shapes = [e for e in parsed.elements if e[0] in ("path", "rect")]
    for _, attrs in shapes:
        where = " ".join(attrs.get(k) or "" for k in ("d", "x", "y", "width", "height"))
        assert all(0 <= float(v) <= charts.UNITS for v in re.findall(r"-?[\d.]+", where))
    assert len(parsed.texts["h2"]) == 4
    assert "tokens" not in parsed.texts["article"][0].partition("times")[2]


def test_page_shows_the_numbers_of_the_run(run: Path) -> None:
    (run / "run.json").write_text('{"data": "acts.npy", "lr": 0.001, "d_sae": 24, "holdout": 7}')
    sae, x = tiny_sae(), rows(80)
    text = write_report(run, sae, open_source(x)).read_text().replace("\u00a0", " ")
    parsed = Page(text)
    values = [
        t
        for e, t in zip(parsed.all("span"), parsed.texts["span"], strict=True)
        if e.get("class") == "value"
    ]
    assert values == ["0.2154", "3", "12.5 %", "1,280", "1.250"]
    assert "PCA, 3 components" in text and "0.5531" in text and "300 steps, 19,200 tokens" in text
    counts = (dense_codes(sae, x) > 0).sum(0)
    median = percent(float(counts.double().quantile(0.5)) / 80).replace("\u00a0", " ")
    captions = parsed.texts["figcaption"]
    assert captions[4].startswith(f"The median latent fires on {median} of the tokens; "
                                  f"{int((counts == 0).sum())} never fire, ")  # fmt: skip
    assert captions[5] == "Every token has 3 active latents." or "middle token" in captions[5]
    # 10 steps in 0.5 s: 1.25 products of 0.04 s a step
    assert "The median is 1,280 tokens/s, a step in the time of 1.250 dense" in captions[3]
    plots = {h: p for h, p in zip(parsed.headings, parsed.all("div", "plot"), strict=False)}
    fvu = json.loads(plots["FVU"]["data-t"] or "")
    assert "training batch 0.0300 · step 300" in fvu and "held-out 0.0333 · step 300" in fvu
    assert json.loads(plots["Dead latents"]["data-t"] or "")[0] == "in training 37.5 % · step 10"
    settings_shown = dict(zip(parsed.texts["dt"], parsed.texts["dd"], strict=True))
    assert settings_shown["selection.k"] == "3" and settings_shown["lr"] == "0.001"
    assert settings_shown["backend"] == "cpu" and settings_shown["data"] == "acts.npy"
    assert settings_shown["holdout"] == "7"
    assert parsed.texts["dt"].count("lr") == parsed.texts["dt"].count("d_sae") == 1


def test_a_run_that_wrote_nothing_still_has_a_report(tmp_path: Path) -> None:
    parsed = assert_self_contained(
        write_report(tmp_path, tiny_sae(), open_source(rows(9))).read_text()
    )
    assert parsed.headings[:3] == ["Firing frequency", "L0", "Nearest decoder neighbour"]
    assert "silent on 9 rows" in "".join(parsed.texts["small"])


def test_silent_latents_and_a_single_latent(tmp_path: Path) -> None:
    sae = tiny_sae(d_sae=1, rule=TopK(1))
    with torch.no_grad():
        sae.W_enc.zero_()
    text = write_report(tmp_path, sae, open_source(rows(1))).read_text()
    parsed = assert_self_contained(text)
    assert "No latent fires on these rows." in text
    assert parsed.headings[:2] == ["Firing frequency", "L0"]
    assert "Every token has 0 active latents." in parsed.texts["figcaption"]


IN_MODEL = {
    "l0": 3.0,
    "splice": "rows",
    "ce_loss_with_sae": 3.5125,
    "ce_loss_without_sae": 3.25,
    "ce_loss_score": 0.9375,
    "kl_div_score": None,
    "groups": {"massive": {"fvu": 0.5}},
}

COMPARED = {
    "runs": ["runs/a", "runs/b", "runs/c"],
    "pw_mcc": 0.4321,
    "deviation": 0.0123,
    "gap": 0.0,
    "pairs": [
        {
            "runs": [0, 1],
            "mcc": 0.4125,
            "gap": 0.0,
            "shared": 0.0625,
            "agreement": 0.25,
            "encoder_mcc": 0.2,
            "histogram": [0] * 18 + [1, 2, 3] + [0] * 17 + [4, 5],
        },
        {"runs": [0, 2], "mcc": 0.4517, "histogram": "none"},
    ],
    "gt_mcc": [0.7, 0.8],
}


def write_in_model(run: Path, figures: dict[str, Any], sae: SAE | None = None) -> None:
    """Figures of the weights of `sae`."""
    figures = {**figures, "sae": digest(tiny_sae() if sae is None else sae)}
    (run / "in_model.json").write_text(json.dumps(figures))


def table_of(text: str, kind: str) -> list[list[str]]:
    (found,) = re.findall(rf'<table class="{kind}">(.*?)</table>', text, re.DOTALL)
    lines = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in lines]


def test_figures_in_the_model_are_those_of_the_file(run: Path) -> None:
    write_in_model(run, IN_MODEL)
    text = write_report(run, tiny_sae(), open_source(rows(9))).read_text()
    assert "In the language model" in assert_self_contained(text).texts["h2"]
    head, *lines = table_of(text, "meanings")
    assert head == ["figure", "value", "what it is"]
    assert [(name, value) for name, value, _ in lines] == [
        ("ce_loss_without_sae", "3.250"),
        ("ce_loss_with_sae", "3.513"),
        ("ce_loss_score", "0.9375"),
        ("kl_div_score", "–"),
        ("l0", "3"),
        ("splice", "rows"),
        ("groups.massive.fvu", "0.5000"),
        ("sae", digest(tiny_sae())),
    ]
    assert all(bool(meaning) == (name in tables.IN_MODEL) for name, _, meaning in lines)
    other = tiny_sae()
    other.W_dec.data[0, 0] += 1
    left_out = write_report(run, other, open_source(rows(9))).read_text()
    assert "In the language model" not in assert_self_contained(left_out).texts["h2"]


def test_what_runs_have_in_common_is_that_of_the_file(run: Path) -> None:
    (run / "consistency.json").write_text(json.dumps(COMPARED))
    text = write_report(run, tiny_sae(), open_source(rows(9))).read_text()
    parsed = assert_self_contained(text)
    assert "In common with other runs" in parsed.texts["h2"]
    assert table_of(text, "pairs") == [
        ["runs", "mcc", "gap", "shared", "agreement"],
        ["runs/a, runs/b", "0.4125", "0", "0.0625", "0.2500"],
        ["runs/a, runs/c", "0.4517", "–", "–", "–"],
    ]
    shown = dict(zip(parsed.texts["dt"], parsed.texts["dd"], strict=True))
    assert shown["PW-MCC"].startswith("0.4321mean cosine") and "± 0.0123 over 2" in shown["PW-MCC"]
    assert re.findall(r"with the true directions: (.*?)<", text) == ["runs/a", "runs/b"]
    titles = [title for title in parsed.headings if title.startswith("Matched cosines")]
    assert titles == ["Matched cosines: runs/a, runs/b"]
    plot = parsed.all("div", "plot")[-1]
    counted = [int(t.split()[0]) for t in json.loads(plot["data-t"] or "")]
    assert counted == [1, 2, 3] + [0] * 17 + [4, 5]
    assert json.loads(plot["data-t"] or "")[0] == "1 latent at -0.10 to -0.05"
    assert "Of 15 latents, the cosine" in "".join(parsed.texts["figcaption"])


@pytest.mark.parametrize("value", [None, "x", [], [None], {}, {"a": 1}, 10**400, True, [[[]]]])
def test_strange_figures_leave_things_out(run: Path, value: Any) -> None:
    """A file of another version, or of someone else: what cannot be shown is not."""
    write_in_model(run, dict.fromkeys(IN_MODEL, value))
    pair = dict.fromkeys(COMPARED["pairs"][0], value)  # type: ignore[index]
    files = [dict.fromkeys(COMPARED, value), {**COMPARED, "runs": value, "pairs": [pair, value]}]
    for compared in files:
        (run / "consistency.json").write_text(json.dumps(compared))
        text = write_report(run, tiny_sae(), open_source(rows(9))).read_text()
        assert "Matched cosines" not in assert_self_contained(text).headings
        assert ">nan" not in text


HOSTILE = (
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style><!--",
    "<svg onload=alert(1)>",
    "&lt;b&gt; &#60;i&#62;",
    "\x00\ud800\u202e$title ${x}",
    "x" * 100_000,
)


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    run = tmp_path / "<b>run $body"
    train = {text: text for text in HOSTILE}
    write_log(run, [{"config": {"sae": {}, "train": train}, "engine": train}, *log_lines(3)[1:]])
    (run / "run.json").write_text(json.dumps({"data": HOSTILE[0], "nested": {HOSTILE[1]: train}}))
    write_in_model(run, train)
    compared = {**COMPARED, "runs": HOSTILE, "pairs": [{"runs": [HOSTILE[i], i]} for i in range(7)]}
    (run / "consistency.json").write_text(json.dumps(compared))
    source = with_tokens(rows(60), dict(enumerate(HOSTILE)))
    text = write_report(run, tiny_sae(), replace(source, name=HOSTILE[0])).read_text()
    parsed = assert_self_contained(text)
    assert len(parsed.all("svg")) == 7
    assert parsed.texts["h1"] == ["<b>run $body"]
    marks = set(parsed.texts["mark"])
    short_ones = {t for t in marks if len(t) <= 40}
    assert "</style><!--" in short_ones and "<svg onload=alert(1)>" in short_ones
    assert "&lt;b&gt; &#60;i&#62;" in short_ones and "\ufffd\ufffd\u202e$title ${x}" in short_ones
    assert max(len(mark) for mark in marks) <= 40


def test_the_file_stays_small(tmp_path: Path) -> None:
    lines = log_lines(1)
    for i in range(1, 60_001):
        line = {
            "step": i,
            "tokens": 1e9 * i,
            "seconds": 0.37 * i + i % 7,
            "loss": 1e3 / i,
            "fvu": 3.7 / i,
        }
        lines.append({**line, "l0": 30 + math.sin(i), "n_dead": i % 1000})
    lines += [{"step": i, "eval": {"fvu": 1 / i, "dead_share": 1 / i}} for i in range(1, 20_000)]
    write_log(tmp_path, lines)
    wide = {f"k{i}": "<" * 300 for i in range(20_000)}
    (tmp_path / "run.json").write_text(json.dumps(wide))
    many = {**COMPARED, "runs": ["<" * 300] * 500, "pairs": COMPARED["pairs"] * 5000}  # type: ignore[operator]
    (tmp_path / "consistency.json").write_text(json.dumps({**many, "gt_mcc": [0.5] * 5000}))
    sae = tiny_sae(d_in=2, d_sae=1 << 17, rule=TopK(40))
    write_in_model(tmp_path, wide, sae)
    words = {i: '"' * 1000 for i in range(7)}
    path = write_report(tmp_path, sae, with_tokens(rows(300, 2), words))
    assert_self_contained(path.read_text())
    assert path.stat().st_size < 2_000_000


def test_same_inputs_same_bytes(run: Path) -> None:
    source = with_tokens(rows(100), {0: " a"})
    first = write_report(run, tiny_sae(), source).read_bytes()
    torch.manual_seed(99)
    np.random.seed(99)
    assert write_report(run, tiny_sae(), source).read_bytes() == first
    assert write_report(run, tiny_sae(seed=1), source).read_bytes() != first


def test_a_failure_leaves_the_old_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(run, tiny_sae(), open_source(rows(9)))
    assert (run / "report.html").read_text() == "old"
    assert sorted(p.name for p in run.iterdir()) == ["log.jsonl", "metrics.json", "report.html"]


def test_a_transcoder_and_token_ids(run: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "set", [40], d=6)
    sae = SAE(SAEConfig(d_in=6, d_sae=24, d_out=4, selection=TopK(3)))
    parsed = assert_self_contained(
        write_report(run, sae, open_source(tmp_path / "set")).read_text()
    )
    assert any("tokens are shown as ids" in about for about in parsed.texts["p"])
    assert "activations of width 6 to 4" in parsed.texts["p"][1]
    assert all(mark.isdigit() for mark in parsed.texts["mark"])


def test_columns_take_back_what_a_resumed_run_repeats() -> None:
    columns = Columns(("loss",))
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (5, 5.0)):
        columns.add(step, {"loss": loss})
    assert columns.curve("loss") == ([1, 2, 5], [1.0, 20.0, 5.0])


def test_page_needs_no_run() -> None:
    found = portrait.portray(tiny_sae(), [open_source(rows(20))])
    assert_self_contained(document("p", tiny_sae().config, "s", History(), found))


# ---- the command line ----


def test_train_writes_the_report_and_report_writes_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "acts.npy", tmp_path / "run"
    np.save(data, rows(300, 8).numpy())
    options = "--d-sae 32 --k 4 --batch-size 64 --steps 6 --holdout 100 --log-every 2".split()
    main(["train", "--data", str(data), "--out", str(run), *options])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["report", str(run / "report.html")]
    first = (run / "report.html").read_bytes()
    assert "300 rows of" in first.decode() and "100 held out, 200 of those" in first.decode()
    (run / "report.html").unlink()
    main(["report", str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_bytes() == first
    main(["report", str(run), "--data", str(data)])
    assert "on 300 rows of acts.npy.<" in (run / "report.html").read_text()
    for name in ("sae.safetensors", "config.json", "metrics.json"):  # as if it had not finished
        (run / name).unlink()
    main(["report", str(run)])
    parsed = assert_self_contained((run / "report.html").read_text())
    assert parsed.headings[:4] == ["Loss", "FVU", "Dead latents", "Speed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: expected a file config.json, got none"),
        (["run"], "run/run.json: no such file"),
        (["run", "--data", "none.npy"], "none.npy: no such file"),
        (["run", "--data", "wide.npy"], "wide.npy: expected width 6, got 7"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sae().save("run")
    np.save("wide.npy", rows(5, 7).numpy())
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    error = str(stopped.value.code)
    assert error.startswith("fastsae: error: ") and message in error and "\n" not in error
    assert not Path("run/report.html").exists()
