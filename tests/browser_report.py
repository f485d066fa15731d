"""The report in a real browser: `make test-report`, which needs Debian's chromium.

Not a part of `make test`, which checks the same page with a parser. Pictures of what was checked
are left in build/report/.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from test_pages import model
from test_report import (
    COMPARED,
    HOSTILE,
    IN_MODEL,
    METRICS,
    log_lines,
    rows,
    tiny_sae,
    with_tokens,
    write_log,
)

from fastsae import SAE, SAEConfig, TopK
from fastsae.corpus import encode_corpus
from fastsae.data import open_source, split
from fastsae.report import pages as report_pages
from fastsae.report import write_report
from fastsae.report.pages import write_pages
from fastsae.report.text import activation, percent

PICTURES = Path("build/report")
WIDTHS = (1280, 768, 375, 360, 320)
schemes = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of real text, of hostile text, of a run that wrote nothing else, of a long run."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("words", "hostile"):
        write_log(folder / name, log_lines())
        for file, data in (("metrics", METRICS), ("in_model", IN_MODEL), ("consistency", COMPARED)):
            (folder / name / f"{file}.json").write_text(json.dumps(data))
    train, held_out = split(open_source("sample:minilm_l3"), 2048)
    sae = SAE(SAEConfig(d_in=384, d_sae=512, selection=TopK(16)))
    sae.initialize_from_(held_out.rows(torch.arange(2048).numpy()))
    words = write_report(folder / "words", sae, held_out, train.select(torch.arange(999).numpy()))
    (folder / "hostile" / "run.json").write_text(json.dumps({text: text for text in HOSTILE}))
    hostile = with_tokens(rows(60), dict(enumerate(HOSTILE)))
    (folder / "bare").mkdir()
    many = {"step": 25e6, "tokens": 1e11, "seconds": 2e6, "loss": 3e-7, "fvu": 1e-4, "l0": 1e4}
    write_log(folder / "long", [*log_lines(), many])
    return {
        "words": words,
        "hostile": write_report(folder / "hostile", tiny_sae(), hostile),
        "long": write_report(folder / "long", tiny_sae(d_sae=20_000), open_source(rows(3000))),
        "bare": write_report(folder / "bare", tiny_sae(), open_source(rows(60))),
    }


def complaints(browser: Browser) -> list[Any]:
    names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    return [event for name in names for event in browser.named(name)]


def requested(browser: Browser) -> list[str]:
    return [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]


def assert_fits(browser: Browser, file: Path, name: str, width: int, dark: bool) -> None:
    """Nothing is wider than the window, nothing was asked for, nothing complained."""
    browser.open(file, width, dark=dark)
    PICTURES.mkdir(parents=True, exist_ok=True)
    browser.picture(PICTURES / f"{name}-{width}-{'dark' if dark else 'light'}.png")
    beyond = browser.evaluate(
        """[document.documentElement.scrollWidth - innerWidth,
            ...[...document.querySelectorAll("body *")]
                .filter((e) => !e.closest(".before, .after, mark, output"))
                .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
                .map((e) => e.outerHTML.slice(0, 80))]"""
    )
    assert beyond == [0]
    assert complaints(browser) == []
    own = file.resolve().as_uri()
    assert [url for url in requested(browser) if url != "data:,"] == [own]


@schemes
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["words", "hostile", "bare", "long"])
def test_page_fits_asks_for_nothing_and_has_no_errors(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    assert_fits(browser, pages[name], name, width, dark)


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("name", ["words", "long"])
def test_no_label_covers_another(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width)
    covered = browser.evaluate(
        """[...document.querySelectorAll(".x, .y")].flatMap((axis) => {
            const boxes = [...axis.children].map((e) => [e.getBoundingClientRect(), e.textContent]);
            return boxes.flatMap(([a, name], i) => boxes.slice(i + 1)
                .filter(([b]) => a.left < b.right && b.left < a.right &&
                                 a.top < b.bottom && b.top < a.bottom)
                .map(([, other]) => [name, other]));
        })"""
    )
    assert covered == []
    smallest = browser.evaluate(
        """Math.min(...[...document.querySelectorAll("body *")].filter((e) => e.innerText)
            .map((e) => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 12


def assert_stands_out(browser: Browser) -> None:
    """Contrast of at least 4.5, as WCAG 2 asks for."""
    weak = browser.evaluate(
        """(() => {
            const parse = (c) => c.match(/[\\d.]+/g).map(Number);
            const over = ([r, g, b, alpha = 1], ground) =>
                [r, g, b].map((v, i) => alpha * v + (1 - alpha) * ground[i]);
            const light = (c) => c.slice(0, 3).map((v) => v / 255)
                .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const ground = (e) => e
                ? over(parse(getComputedStyle(e).backgroundColor), ground(e.parentElement))
                : [255, 255, 255];
            return [...document.querySelectorAll("body *")]
                .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
                .filter((e) => !["SCRIPT", "STYLE", "OUTPUT"].includes(e.tagName))
                .map((e) => {
                    const back = ground(e);
                    const ink = over(parse(getComputedStyle(e).color), back);
                    const [dim, bright] = [light(ink), light(back)].sort((a, b) => a - b);
                    return [(bright + 0.05) / (dim + 0.05), e.outerHTML.slice(0, 80)];
                })
                .filter(([contrast]) => contrast < 4.5);
        })()"""
    )
    assert weak == []


@schemes
def test_text_stands_out_from_its_ground(
    browser: Browser, pages: dict[str, Path], dark: bool
) -> None:
    browser.open(pages["words"], 1280, dark=dark)
    assert_stands_out(browser)


def test_charts_are_read_out(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["words"], 375)
    read = """(() => {
        const plot = document.querySelector(".plot"), output = plot.querySelector("output");
        const box = output.getBoundingClientRect();
        const inside = box.left >= 0 && box.right <= innerWidth;
        return [plot.classList.contains("read"), output.textContent, inside];
    })()"""
    assert browser.evaluate(read)[0] is False
    left, top, width, height = browser.evaluate(
        """(() => {
            const plot = document.querySelector(".plot");
            plot.scrollIntoView({block: "center"});
            const box = plot.getBoundingClientRect();
            return [box.left, box.top, box.width, box.height];
        })()"""
    )
    browser.move(left + width - 1, top + height / 2)
    assert browser.evaluate(read) == [True, "loss 0.0333 · step 300", True]
    browser.move(left + 1, top + height / 2)
    assert browser.evaluate(read) == [True, "loss 1 · step 10", True]
    browser.move(left + 1, top + height + 300)
    assert browser.evaluate(read)[0] is False
    browser.evaluate("document.querySelector('.plot').focus()")
    for _ in range(2):
        browser.key("ArrowRight")
    assert re.fullmatch(r"loss 0\.\d+ · step \d+", browser.evaluate(read)[1])
    assert complaints(browser) == []


def test_hostile_text_runs_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"], 1280)
    assert browser.evaluate("document.scripts.length") == 1
    assert browser.evaluate("document.querySelectorAll('img, svg[onload]').length") == 0
    assert not browser.named("Page.javascriptDialogOpening")
    marks = browser.evaluate("[...document.querySelectorAll('mark')].map((m) => m.textContent)")
    assert "</script><script>alert(1)</script>" in marks
    # The policy holds even where a script gets into the page.
    browser.evaluate(
        """document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = 1'>");
           const script = document.createElement("script");
           script.text = "window.ran = 1";
           document.body.append(script);"""
    )
    assert browser.evaluate("window.ran === undefined")


# ---- pages of latents ----


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of real text with logit effects, and of hostile text."""
    folder = tmp_path_factory.mktemp("browsed")
    source = open_source("sample:minilm_l3")
    assert source.contexts is not None
    rows_ = source.select(torch.arange(3000).numpy())
    sae = SAE(SAEConfig(d_in=384, d_sae=512, selection=TopK(16)))
    sae.initialize_from_(rows_.rows(torch.arange(2048).numpy()))
    words = [source.contexts.vocabulary.get(i, f" [{i}]") for i in range(30_522)]
    codes = encode_corpus(sae, rows_, folder / "codes")
    lm = model(384, words=words, n_ids=3000)
    hostile, small = with_tokens(rows(60), {}), tiny_sae()
    of_hostile = encode_corpus(small, hostile, folder / "hostile codes")
    strange = model(words=["a", *(text[:5000] for text in HOSTILE)])
    return {
        "words": write_pages(folder / "words", "minilm layer 3", sae, codes, rows_, lm),
        "hostile": write_pages(folder / "hostile", HOSTILE[0], small, of_hostile, hostile, strange),
    }


@schemes
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name in ("words", "hostile") for file in ("index", "latents-00000")],
)
def test_latent_pages_fit_ask_for_nothing_and_have_no_errors(
    browser: Browser, browsed: dict[str, Path], name: str, file: str, width: int, dark: bool
) -> None:
    path = browsed[name].with_name(f"{file}.html")
    assert_fits(browser, path, f"{name}-{file}", width, dark)
    if name == "words" and width in (1280, 375):
        assert_stands_out(browser)


LINES = """[...document.querySelectorAll("#list tbody tr")]
    .map((line) => [...line.cells].map((cell) => cell.textContent))"""


def enter(browser: Browser, field: str, text: str) -> list[list[str]]:
    browser.evaluate(
        f"""{{
            const field = document.getElementById({json.dumps(field)});
            field.value = {json.dumps(text)};
            field.dispatchEvent(new Event("input"));
        }}"""
    )
    return browser.evaluate(LINES)


def press(browser: Browser, button: str) -> list[list[str]]:
    browser.evaluate(f"document.querySelector({json.dumps(button)}).click()")
    return browser.evaluate(LINES)


def test_the_list_shows_sorts_and_filters(browser: Browser, browsed: dict[str, Path]) -> None:
    browser.open(browsed["words"], 1280)
    data = json.loads((browsed["words"].parent / "data" / "index.json").read_text())
    count, label = data["count"], data["label"]

    def line(i: int) -> list[str]:
        sizes = activation(data["largest"][i]), activation(data["mean"][i])
        return [str(i), percent(count[i] / data["rows"]), *sizes, label[i]]

    def lines(order: list[int]) -> list[list[str]]:
        return [line(i) for i in order[:50]]

    ids = list(range(512))
    where = "document.getElementById('where').textContent"
    assert browser.evaluate(LINES) == lines(ids)
    assert browser.evaluate(where) == "1 to 50 of 512"
    down = sorted(ids, key=lambda i: (-count[i], i))
    assert press(browser, "[data-by=count]") == lines(down)
    sorted_by = "document.querySelector('[data-by=count]').parentElement.ariaSort"
    assert browser.evaluate(sorted_by) == "descending"
    assert press(browser, "#on") == lines(down[50:])
    assert browser.evaluate(where) == "51 to 100 of 512"
    assert press(browser, "#back") == lines(down)
    assert browser.evaluate("document.getElementById('back').disabled")
    assert press(browser, "[data-by=count]") == lines(sorted(ids, key=lambda i: (count[i], i)))
    assert press(browser, "[data-by=largest]")[0] == line(
        max(ids, key=lambda i: (data["largest"][i], -i))
    )
    assert press(browser, "[data-by=label]")[0] == line(
        min(ids, key=lambda i: (label[i].lower() or "\uffff", i))
    )
    press(browser, "[data-by=latent]")
    word = label[down[0]].split(" · ")[0]
    having = [i for i in ids if word.lower() in label[i].lower()]
    assert enter(browser, "wanted", word.upper()) == lines(having) and having
    assert enter(browser, "wanted", "317")[-1] == line(317)
    assert enter(browser, "wanted", "no such token") == []
    assert browser.evaluate(where) == "none of 0"
    enter(browser, "wanted", "")
    enter(browser, "least", "1")
    between = [i for i in ids if 0.01 <= count[i] / data["rows"] <= 0.03]
    assert enter(browser, "most", "3") == lines(between) and 0 < len(between) < 512
    assert complaints(browser) == []


def test_a_number_leads_to_its_latent(browser: Browser, browsed: dict[str, Path]) -> None:
    browser.open(browsed["words"], 375)
    enter(browser, "wanted", "317")
    browser.events.clear()
    place = """[location.pathname.split("/").at(-1), location.hash,
        document.querySelector(":target")?.id,
        document.querySelector(":target")?.getBoundingClientRect().top]"""
    browser.evaluate("[...document.querySelectorAll('#list a')].at(-1).click()")
    browser.loaded()
    name, fragment, target, top = browser.evaluate(place)
    assert (name, fragment, target) == ("latents-00002.html", "#317", "317")
    assert 0 <= top < 900
    near = "document.querySelector(':target .facts a')"
    expected = browser.evaluate(f"{near}.textContent")
    browser.events.clear()
    other_page = browser.evaluate(f"!{near}.href.includes(location.pathname)")
    browser.evaluate(f"{near}.click()")
    if other_page:
        browser.loaded()
    assert browser.evaluate(place)[2] == expected
    assert complaints(browser) == []


def test_hostile_text_runs_nothing_on_latent_pages(
    browser: Browser, browsed: dict[str, Path]
) -> None:
    for file, n_scripts in (("index", 2), ("latents-00000", 0)):
        browser.open(browsed["hostile"].with_name(f"{file}.html"), 1280)
        assert browser.evaluate("document.scripts.length") == n_scripts
        assert browser.evaluate("document.querySelectorAll('img, svg').length") == 0
        assert not browser.named("Page.javascriptDialogOpening")
        assert "alert(1)" in browser.evaluate("document.body.innerText")
        browser.evaluate("document.body.innerHTML = `<img src=x onerror='window.ran = 1'>`")
        assert browser.evaluate("window.ran === undefined")


def test_a_list_of_131072_latents_is_usable(browser: Browser, tmp_path: Path) -> None:
    n = 1 << 17
    rng = torch.Generator().manual_seed(0)
    count = torch.randint(0, 100_000, (n,), generator=rng).tolist()
    label = [f"token{i % 977} · another{i % 31} · and{i % 7}" for i in range(n)]
    sizes = {"largest": [c / 1000 for c in count], "mean": [c / 4000 for c in count]}
    listing = {"rows": 1_000_000, "per_page": 128, "count": count, **sizes, "label": label}
    text = report_pages._index("wide", open_source(rows(9)), None, listing, json.dumps(listing))
    path = tmp_path / "index.html"
    path.write_text(text)
    assert path.stat().st_size < 100 * n
    browser.open(path, 375)
    down = sorted(range(n), key=lambda i: (-count[i], i))
    assert [line[0] for line in press(browser, "[data-by=count]")] == [str(i) for i in down[:50]]
    having = [i for i in down if "token976" in label[i]]
    assert [line[0] for line in enter(browser, "wanted", "token976")] == [
        str(i) for i in having[:50]
    ]
    milliseconds = browser.evaluate(
        """(() => {
            const before = performance.now();
            document.querySelector("[data-by=label]").click();
            return performance.now() - before;
        })()"""
    )
    assert milliseconds < 5000
    assert complaints(browser) == []
