"""Pages of latents: facts against dense torch, pages against the JSON beside them."""

import html
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_data import write_set
from test_report import HOSTILE, Page, assert_self_contained, rows, tiny_sae
from test_report import with_tokens as with_tokens_of
from torch import Tensor, nn

from fastsae import SAE, TopK
from fastsae.cli import main
from fastsae.contexts import vocabulary_of
from fastsae.corpus import CodeSet, encode_corpus
from fastsae.data import Source, open_source
from fastsae.latent_index import QUANTILES
from fastsae.logits import folded_unembedding
from fastsae.models import LanguageModel
from fastsae.report import cards, facts
from fastsae.report.pages import write_pages
from fastsae.report.text import activation, percent

WORDS = ["a", " b", "c", " whale", " sea", "\n", " </b>", " not a word"]


class Tokenizer:
    """A word an id; the first is what "a" is."""

    def __init__(self, words: Any = WORDS) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert text == "a" and not add_special_tokens
        return {"input_ids": [0]}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


class Head(nn.Module):
    """As much of a causal model as its logits need; of two ids the tokenizer knows nothing."""

    def __init__(self, d: int, n_ids: int = 10) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.norm = nn.Embedding(n_ids, d), nn.LayerNorm(d)
        self.head = nn.Linear(d, n_ids, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.norm(self.embed(input_ids))))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def model(d: int = 6, causal: bool = True, words: Any = WORDS, n_ids: int = 10) -> LanguageModel:
    net = Head(d, n_ids).eval().requires_grad_(False)
    return LanguageModel("tiny", net, Tokenizer(words), causal, {})


def with_tokens(x: Tensor) -> Source:
    return with_tokens_of(x, {})


@pytest.fixture
def made(tmp_path: Path) -> tuple[SAE, CodeSet, Source]:
    """An SAE with a latent that never fires, two of one direction, and one with none near it."""
    sae, source = tiny_sae(), with_tokens(rows(300))
    with torch.no_grad():
        sae.W_enc[5], sae.b_enc[5] = 0, -1  # type: ignore[index]
        sae.W_dec[7] = 2 * sae.W_dec[3]
        sae.W_dec[8] = 0
    return sae, encode_corpus(sae, source, tmp_path / "codes", contexts=12), source


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def latents_in(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "data").glob("latents-*.json"))
    return [found for file in files for found in read(file)["latents"]]


# ---- facts ----


def test_facts_are_those_of_dense_torch(made: tuple[SAE, CodeSet, Source]) -> None:
    sae, codes, source = made
    lm = model()
    U, words = folded_unembedding(lm), vocabulary_of(lm.tokenizer)
    found = list(facts.facts(sae, codes, source, U, words, contexts=4))
    dense = sae.encode(rows(300), training=False).to_dense().detach()
    unit = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    cosines = unit @ unit.T - 2 * torch.eye(24)
    effects = sae.W_dec.detach().double() @ U.double().T
    assert [f.latent for f in found] == list(range(24)) and found[5].count == 0
    for f, column in zip(found, dense.T, strict=True):
        active = column[column != 0]
        assert f.count == len(active) and f.density == len(active) / 300
        assert f.mean == pytest.approx(float(active.double().mean()) if f.count else 0)
        order = column.sort(descending=True, stable=True).indices[: f.count]
        assert f.largest == pytest.approx(float(column.max())) and len(f.deciles) == 9
        assert f.deciles == pytest.approx(codes.quantiles[f.latent].tolist())
        assert [c.row for c in f.contexts] == order[:4].tolist()
        assert [c.value for c in f.contexts] == pytest.approx(column[order[:4]].tolist())
        tokens = Counter(f" {row % 7}" for row in order[:12].tolist())
        assert dict(f.tokens).items() <= tokens.items() and len(f.tokens) == min(4, len(tokens))
        assert [n for _, n in f.tokens] == sorted(tokens.values(), reverse=True)[:4]
        near = cosines[f.latent].sort(descending=True)
        pairs = zip(near.indices.tolist(), near.values.tolist(), strict=True)
        expected = [(i, c) for i, c in pairs if c > 1e-6]
        assert {i for i, _ in f.nearest} == {i for i, _ in expected[:8]}
        assert [c for _, c in f.nearest] == pytest.approx([c for _, c in expected[:8]], abs=1e-5)
        for side, sign in ((f.promoted, 1), (f.suppressed, -1)):
            best = (sign * effects[f.latent]).sort(descending=True)
            ids = best.indices[best.values > 0].tolist()
            assert [i for i, _, _ in side] == ids
            assert [v for _, _, v in side] == pytest.approx(
                effects[f.latent, ids].tolist(), rel=1e-4, abs=1e-6
            )
            assert [text for _, text, _ in side] == [words.get(i, f" {i}") for i in ids]
    assert found[3].nearest[0] == (7, 1.0) and found[7].nearest[0] == (3, 1.0)
    assert found[8].nearest == () and found[8].promoted == ()
    first = found[0].contexts[0]
    assert first.token == f" {first.row % 7}"
    assert first.before == tuple(f" {i % 7}" for i in range(max(0, first.row - 8), first.row))


def test_chunks_change_nothing_and_bound_what_is_held(
    made: tuple[SAE, CodeSet, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(facts.facts(*made, folded_unembedding(model())))
    asked = []

    def nearest(units: Tensor, ids: np.ndarray, count: int) -> Any:
        asked.append(len(ids))
        return of_all(units, ids, count)

    of_all = facts.nearest_others
    monkeypatch.setattr(facts, "nearest_others", nearest)
    monkeypatch.setattr(facts, "_CHUNK", 7)
    found = facts.facts(*made, folded_unembedding(model()))
    first = next(found)
    assert asked == [7]  # only as far as latents are asked for
    assert [first, *found] == whole and asked == [7, 7, 7, 3]


def test_contexts_show_what_the_latent_does_on_the_tokens_around(tmp_path: Path) -> None:
    """Of data whose rows lie in the order of the text; not beyond a window's ends."""
    write_set(tmp_path / "set", [30, 11], d=6)  # windows of 4 rows, tokens count from 0
    source, sae = open_source(tmp_path / "set"), tiny_sae()
    codes = encode_corpus(sae, source, tmp_path / "codes", shard_rows=16)
    dense = sae.encode(source.rows(np.arange(41)), training=False).to_dense().detach().numpy()
    found = list(facts.facts(sae, codes, source, contexts=5))
    for f in found:
        for c in f.contexts:
            window = range(c.row // 4 * 4, min(c.row // 4 * 4 + 4, 41))
            around = {r - c.row: dense[r, f.latent] for r in window if r != c.row}
            assert c.active == tuple((at, pytest.approx(v)) for at, v in around.items() if v)
    assert sum(len(c.active) for f in found for c in f.contexts) > 20
    assert all(
        not c.active
        for f in facts.facts(sae, codes, source.select(np.arange(41)))
        for c in f.contexts
    )  # rows whose order is another's

    path = write_pages(tmp_path / "pages", "run", sae, codes, source, model(), contexts=5)
    shown = cards_in((path.parent / "latents-00000.html").read_text())
    for f, of_facts in zip(latents_in(path.parent), found, strict=True):
        expected = []
        for c, of_fact in zip(f["contexts"], of_facts.contexts, strict=True):
            assert c["active"] == [list(pair) for pair in of_fact.active]
            marks = {**dict(c["active"]), 0: c["value"]}
            tokens = [*c["before"], c["token"], *c["after"]]
            for at in sorted(marks):
                share = abs(marks[at]) / abs(f["largest"])
                token = cards.token_name(tokens[len(c["before"]) + at])
                expected.append((f"{share:.2f}", token))
        marks = texts(r'<mark style="--heat:([\d.]+)">(.*?)</mark>', shown[f["latent"]])
        assert marks == expected


def test_numbers_read_back_as_the_same_float32() -> None:
    values = torch.randn(50, 3).numpy() * 10.0 ** np.arange(-3, 3, 2, dtype=np.float32)
    found = facts.exact(values)
    assert np.array_equal(np.array(found, np.float32), values)
    assert max(len(str(value)) for row in found for value in row) <= 15


def test_vocabulary_is_how_ids_read_behind_a_token() -> None:
    assert vocabulary_of(Tokenizer()) == dict(enumerate(WORDS))


# ---- pages ----


def cards_in(text: str) -> dict[int, str]:
    found = re.findall(r'<article class="latent" id="(\d+)">(.*?)</article>', text, re.DOTALL)
    return {int(latent): card for latent, card in found}


def texts(pattern: str, text: str) -> list[Any]:
    found = re.findall(pattern, text, re.DOTALL)
    return [
        tuple(map(html.unescape, t)) if isinstance(t, tuple) else html.unescape(t) for t in found
    ]


def test_pages_show_what_the_json_beside_them_says(
    made: tuple[SAE, CodeSet, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "PER_PAGE", 10)
    monkeypatch.setattr("fastsae.report.pages.PER_PAGE", 10)
    path = write_pages(tmp_path / "pages", "a run", *made, model(), contexts=3)
    names = [f"latents-0000{i}" for i in range(3)]
    assert path == tmp_path / "pages" / "index.html"
    assert {p.name for p in path.parent.iterdir()} == {
        "data",
        "index.html",
        *(f"{n}.html" for n in names),
    }
    assert {p.name for p in (path.parent / "data").iterdir()} == {
        "index.json",
        *(f"{n}.json" for n in names),
    }
    seen = []
    for name in names:
        page = (path.parent / f"{name}.html").read_text()
        shown = cards_in(page)
        data = read(path.parent / "data" / f"{name}.json")["latents"]
        assert list(shown) == [f["latent"] for f in data]
        for f in data:
            card = shown[f["latent"]]
            (about,) = texts(r"<header><h4>\d+</h4><span>(.*?)</span>", card)
            if f["count"]:
                times = "once" if f["count"] == 1 else f"{f['count']:,} times"
                assert about == (
                    f"active on {percent(f['density'])} of rows, {times}; largest "
                    f"{activation(f['largest'])}, mean {activation(f['mean'])}"
                )
                deciles = texts(r'<span style="--share:[\d.]+">(.*?)</span>', card)
                assert deciles == [activation(v) for v in f["deciles"]]
            else:
                assert about == "never active" and 'class="deciles"' not in card
            assert texts(r'<span class="act">(.*?)</span>', card) == [
                activation(c["value"]) for c in f["contexts"]
            ]
            marks = texts(r"<mark[^>]*>(.*?)</mark>", card)
            assert marks == [cards.token_name(c["token"]) for c in f["contexts"]]
            chips = [(t, f"× {n}") for t, n in f["tokens"]]
            chips += [(t, activation(v)) for _, t, v in (*f["promoted"], *f["suppressed"])]
            chips = [(cards.token_name(t), number) for t, number in chips]
            assert texts(r"<span><b>(.*?)</b> (.*?)</span>", card) == chips
            links = texts(r'<a href="([^"]*)">(\d+)</a> (.*?)</span>', card)
            assert links == [
                (f"latents-0000{i // 10}.html#{i}", str(i), activation(c)) for i, c in f["nearest"]
            ]
        seen += data
    assert [f["latent"] for f in seen] == list(range(24))
    whole = list(facts.facts(*made, contexts=3))
    assert [f["count"] for f in seen] == [f.count for f in whole]
    listing = read(path.parent / "data" / "index.json")
    assert (listing["rows"], listing["per_page"]) == (300, 10)
    for name in ("count", "largest", "mean"):
        assert listing[name] == [f[name] for f in seen]
    assert listing["label"][0] == " · ".join(cards.token_name(t) for t, _ in seen[0]["tokens"])
    (embedded,) = texts(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text()
    )
    assert json.loads(embedded) == listing


def assert_no_request(text: str) -> Page:
    """As the report's pages, but for links to other pages and data for the script."""
    data = '<script type="application/json" id="data">'
    text = re.sub(f"{re.escape(data)}[^<]*</script>", "", text)
    parsed = Page(text)
    hrefs = [attrs["href"] or "" for tag, attrs in parsed.elements if tag == "a"]
    assert all(re.fullmatch(r"index\.html|latents-\d{5}\.html(#\d+)?", href) for href in hrefs)
    text = re.sub(r"</?a\b[^>]*>", "", text)
    if "<script>" in text:
        assert_self_contained(text)
    else:
        (policy,) = (m["content"] for m in parsed.all("meta") if "http-equiv" in m)
        assert policy is not None and "script-src 'none'" in policy
        assert "default-src 'none'" in policy
        names = {name for _, attrs in parsed.elements for name in attrs}
        assert not [name for name in names if name.startswith("on") or name in ("src", "srcset")]
        assert {"img", "iframe", "object", "form", "base", "script"}.isdisjoint(
            tag for tag, _ in parsed.elements
        )
    return parsed


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    words = ["a", *(text[:5000] for text in HOSTILE)]
    sae, source = tiny_sae(), with_tokens(rows(80))
    codes = encode_corpus(sae, source, tmp_path / "codes")
    name = "<b>run $body"
    source = replace(source, name=HOSTILE[0])
    path = write_pages(tmp_path / "pages", name, sae, codes, source, model(words=words))
    page = assert_no_request((path.parent / "latents-00000.html").read_text())
    shown = set(page.texts["mark"]) | set(page.texts["b"])
    assert {"</style><!--", "<svg onload=alert(1)>", "&lt;b&gt; &#60;i&#62;"} <= shown
    assert max(len(text) for text in shown) <= 40
    index = assert_no_request(path.read_text())
    assert index.texts["h1"] == [name] and "<svg" not in path.read_text()
    assert "<svg onload=alert(1)>" in "".join(read(path.parent / "data" / "index.json")["label"])
    promoted = {text for f in latents_in(path.parent) for _, text, _ in f["promoted"]}
    assert HOSTILE[0] in promoted


def test_data_without_tokens_a_model_without_logits_and_a_single_latent(tmp_path: Path) -> None:
    sae, source = tiny_sae(), open_source(rows(40))
    codes = encode_corpus(sae, source, tmp_path / "codes")
    path = write_pages(tmp_path / "plain", "run", sae, codes, source)
    page = assert_no_request((path.parent / "latents-00000.html").read_text())
    found = latents_in(path.parent)
    assert all(not f["tokens"] and not f["promoted"] for f in found) and "mark" not in page.texts
    (shown,) = texts(r'<li class="row"><span>row (\d+)</span>', cards_in_file(path, 0))[:1]
    assert int(shown) == found[0]["contexts"][0]["row"]
    assert "direct logit effect" not in path.read_text()
    path = write_pages(tmp_path / "causal", "run", sae, codes, source, model())
    assert latents_in(path.parent)[0]["promoted"][0][1] in [*WORDS, " 8", " 9"]
    assert "direct logit effect" in path.read_text()

    one, source = tiny_sae(d_sae=1, rule=TopK(1)), with_tokens(rows(9))
    codes = encode_corpus(one, source, tmp_path / "one")
    path = write_pages(tmp_path / "encoder", "run", one, codes, source, model(causal=False))
    (found,) = latents_in(path.parent)
    assert found["nearest"] == found["promoted"] == []
    assert found["tokens"][0][0] in WORDS
    assert 'href="latents' not in (path.parent / "latents-00000.html").read_text()


def cards_in_file(index: Path, latent: int) -> str:
    return cards_in((index.parent / cards.file_name(latent)).read_text())[latent]


def test_links_lead_somewhere(tmp_path: Path) -> None:
    sae, source = tiny_sae(d_sae=300), with_tokens(rows(500))
    codes = encode_corpus(sae, source, tmp_path / "codes")
    path = write_pages(tmp_path / "pages", "run", sae, codes, source)
    pages = {file.name: file.read_text() for file in path.parent.glob("*.html")}
    assert len(pages) == 4
    ids = {name: set(cards_in(text)) for name, text in pages.items()}
    for text in pages.values():
        for name, latent in texts(r'href="([^"#:]+)#?(\d*)"', text):
            assert name in pages and (not latent or int(latent) in ids[name])
    order = [re.findall(r'<nav class="pager">(.*?)</nav>', pages[n]) for n in sorted(pages)[1:]]
    assert [re.findall(r'href="(.*?)"', nav) for nav, _ in order] == [
        ["index.html", "latents-00001.html"],
        ["latents-00000.html", "index.html", "latents-00002.html"],
        ["latents-00001.html", "index.html"],
    ]


def test_bytes_a_latent_are_bounded(tmp_path: Path) -> None:
    """Whatever the rows are: all latents of a wide SAE fire, and every token is long."""
    sae, source = tiny_sae(d_sae=1000, rule=TopK(40)), with_tokens(rows(600))
    codes = encode_corpus(sae, source, tmp_path / "codes")
    words = ["a", *(letter * 60 for letter in "bcdefg"), "<" * 60]
    path = write_pages(tmp_path / "pages", "run", sae, codes, source, model(words=words))
    size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    assert size / 1000 < 60_000
    assert path.stat().st_size / 1000 < 400


def test_same_inputs_same_bytes(made: tuple[SAE, CodeSet, Source], tmp_path: Path) -> None:
    first, second = (
        write_pages(tmp_path / name, "run", *made, model()).parent for name in ("one", "two")
    )
    for file in first.rglob("*.*"):
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes()


# ---- refusals ----


def test_refused(made: tuple[SAE, CodeSet, Source], tmp_path: Path) -> None:
    sae, codes, source = made
    out = tmp_path / "pages"
    for changed, options, message in (
        ((tiny_sae(seed=1), codes, source), {}, "expected codes of the same sae, got another's"),
        ((sae, codes, with_tokens(rows(300, seed=1))), {}, "codes of the same data, got another's"),
        (made, {"contexts": 0}, "contexts: expected at least 1, got 0"),
        (made, {"model": model(8)}, r"directions: expected shape \(rows, 8\), .* got \(24, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_pages(out, "run", *changed, **options)  # type: ignore[arg-type]
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(ValueError, match="pages: expected a new or empty folder, got one with"):
        write_pages(out, "run", *made)
    assert [p.name for p in out.iterdir()] == ["mine"]
    assert {p.name for p in tmp_path.iterdir()} == {"codes", "pages"}


def test_a_failure_leaves_nothing(
    made: tuple[SAE, CodeSet, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("fastsae.report.pages._index", fail)
    with pytest.raises(OSError, match="no space"):
        write_pages(tmp_path / "pages", "run", *made)
    assert [p.name for p in tmp_path.iterdir()] == ["codes"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    x = rows(200)
    np.save("acts.npy", x.numpy())
    train = (
        "train --data acts.npy --out run --d-sae 24 --k 3 --steps 2 --batch-size 16 --holdout 50"
    )
    main(train.split())
    main("encode acts.npy --sae run --out codes".split())
    capsys.readouterr()
    main("pages run --codes codes --out pages --contexts 2".split())
    assert capsys.readouterr().out == f"{Path('pages') / 'index.html'}\n"
    found = latents_in(tmp_path / "pages")
    counts = SAE.load("run").encode(x, training=False).firing_counts()
    assert [f["count"] for f in found] == counts.tolist()
    assert max(len(f["contexts"]) for f in found) == 2
    np.save("other.npy", -x.numpy())
    for arguments, message in (
        ("run --codes codes --data other.npy --out no", "codes of the same data, got another's"),
        ("run --codes acts.npy --out no", "acts.npy/index.json: no such file"),
        ("codes --codes codes --out no", "expected a file config.json"),
        ("run --codes codes --out pages", "pages: expected a new or empty folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["pages", *arguments.split()])
        error = str(stopped.value.code)
        assert error.startswith("fastsae: error: ") and message in error and "\n" not in error
    assert not Path("no").exists()


def test_quantiles_are_the_deciles() -> None:
    assert [round(10 * q) for q in QUANTILES] == list(range(1, 10))
