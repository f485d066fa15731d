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
from test_report import HOSTILE, METRICS, log_lines, rows, tiny_sae, with_tokens, write_log

from fastsae import SAE, SAEConfig, TopK
from fastsae.data import open_source, split
from fastsae.report import write_report

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
        (folder / name / "metrics.json").write_text(json.dumps(METRICS))
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


@schemes
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["words", "hostile", "bare", "long"])
def test_page_fits_asks_for_nothing_and_has_no_errors(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width, dark=dark)
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
    own = pages[name].resolve().as_uri()
    assert [url for url in requested(browser) if url != "data:,"] == [own]


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


@schemes
def test_text_stands_out_from_its_ground(
    browser: Browser, pages: dict[str, Path], dark: bool
) -> None:
    """Contrast of at least 4.5, as WCAG 2 asks for."""
    browser.open(pages["words"], 1280, dark=dark)
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
