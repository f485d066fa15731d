"""A folder of pages to browse the latents of an SAE by; it opens from a disk, without a network.

    DIR/index.html                the list of all latents: sorted, filtered, some rows at a time
    DIR/latents-00000.html …      `PER_PAGE` latents each, with what `fastsae.report.facts` finds
    DIR/data/index.json           what the list shows
    DIR/data/latents-00000.json … what those pages show: `Facts`, one object a latent

Pages hold their numbers and texts themselves, as a page from a disk may read no other file. In
memory is a line for each latent, and what `facts` holds of some. The folder appears whole.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fastsae.contexts import vocabulary_of
from fastsae.corpus import CodeSet
from fastsae.data import Source
from fastsae.files import new_folder, write_text
from fastsae.logits import folded_unembedding
from fastsae.models import LanguageModel
from fastsae.report.cards import PER_PAGE, card, file_name, label
from fastsae.report.facts import Facts, facts
from fastsae.report.shell import html_page, section, tile
from fastsae.report.text import percent
from fastsae.sae import SAE


def write_pages(
    out: str | Path,
    name: str,
    sae: SAE,
    codes: CodeSet,
    source: Source,
    model: LanguageModel | None = None,
    *,
    contexts: int = 10,
    progress: bool = False,
) -> Path:
    """Writes the pages of all latents and returns the path of index.html.

    codes: those that `encode_corpus` made of this SAE and this source. model: the one that the
    rows come from; its tokenizer gives token ids their text, and a causal one gives each decoder
    row its direct logit effects (`fastsae.logits`). contexts: shown of a latent, at most.
    ValueError: codes of something else, a model of another width, a folder with files in it.
    """
    if contexts < 1:
        raise ValueError(f"contexts: expected at least 1, got {contexts}")
    codes.check(sae, source)
    words: Mapping[int, str] = {}
    unembedding: Tensor | None = None
    if model is not None:
        words = vocabulary_of(model.tokenizer)
        if source.contexts is not None:
            source = replace(source, contexts=replace(source.contexts, vocabulary=words))
        if model.causal:
            unembedding = folded_unembedding(model)
    found = facts(sae, codes, source, unembedding, words, contexts=contexts)
    listed: dict[str, list[Any]] = {"count": [], "largest": [], "mean": [], "label": []}
    with (
        new_folder(Path(out)) as folder,
        tqdm(total=codes.n_latents, unit=" latents", disable=not progress) as bar,
    ):
        (folder / "data").mkdir()
        while some := list(itertools.islice(found, PER_PAGE)):
            page = file_name(some[0].latent)
            data = json.dumps({"latents": some}, default=vars)
            write_text(folder / "data" / page.replace(".html", ".json"), data)
            write_text(folder / page, _page(name, some, codes.n_latents))
            for one in some:
                entry = (one.count, one.largest, one.mean, label(one))
                for column, value in zip(listed.values(), entry, strict=True):
                    column.append(value)
            bar.update(len(some))
        listing = {"rows": codes.n_rows, "per_page": PER_PAGE, **listed}
        data = json.dumps(listing)
        write_text(folder / "data" / "index.json", data)
        write_text(folder / "index.html", _index(name, source, model, listing, data))
    return Path(out) / "index.html"


def _page(name: str, some: Sequence[Facts], n_latents: int) -> str:
    first, last = some[0].latent, some[-1].latent
    nav = "".join(
        f'<a href="{file}">{text}</a>'
        for file, text in (
            (file_name(first - PER_PAGE) if first else "", "← previous"),
            ("index.html", "all latents"),
            (file_name(last + 1) if last + 1 < n_latents else "", "next →"),
        )
        if file
    )
    nav = f'<nav class="pager">{nav}</nav>\n'
    cards = f'<div class="latents single">\n{"".join(map(card, some))}</div>\n'
    lead = f"{len(some):,} of {n_latents:,} latents of {name}."
    return html_page("latents", f"{first:,} to {last:,}", lead, nav + cards + nav)


_CONTROLS = """<div class="controls">
<label>token or number<input id="wanted" type="search" autocomplete="off"></label>
<label>active on at least, %<input id="least" type="number" min="0" max="100" step="any"></label>
<label>at most, %<input id="most" type="number" min="0" max="100" step="any"></label>
</div>
<table id="list">
<thead><tr>
<th><button data-by="latent">latent</button></th><th><button data-by="count">active</button></th>
<th><button data-by="largest">largest</button></th><th><button data-by="mean">mean</button></th>
<th><button data-by="label">tokens</button></th>
</tr></thead>
<tbody></tbody>
</table>
<nav class="pager">
<button id="back">← previous</button><span id="where"></span><button id="on">next →</button>
</nav>
"""


def _index(
    name: str, source: Source, model: LanguageModel | None, listing: Mapping[str, Any], data: str
) -> str:
    counts, n_rows = listing["count"], listing["rows"]
    silent = sum(count == 0 for count in counts)
    middle = percent(median(counts) / n_rows)
    tiles = [
        tile("Latents", f"{len(counts):,}", f"{silent:,} of them never active"),
        tile("Rows", f"{n_rows:,}", f"of {Path(source.name).name}"),
        tile("Active on", middle, "of the rows: the median latent"),
    ]
    about = (
        "Active: the share of rows on which a latent is. Largest and mean: of its activations "
        "where it is active. Tokens: the most frequent ones of the rows with its largest "
        "activations."
    )
    known = ""
    if model is not None and model.causal:
        known = (
            f"Promotes and suppresses: tokens by the direct logit effect of the latent's decoder "
            f"row in {model.name}: the unembedding's row of the token, times the final norm's "
            "scale, times the decoder row. The final norm's division and all blocks between are "
            "left out, so effects rank tokens, and are no logits."
        )
    how = (
        "A number leads to the latent's contexts, which are marked by its activation beside its "
        "largest, to its nearest latents, by the cosine of decoder rows, and to the deciles of its "
        f"sizes, within an eighth. {known} Every number is in the folder data beside this file."
    )
    embedded = data.replace("<", "\\u003c")  # so that no text ends the element
    embedded = f'<script type="application/json" id="data">{embedded}</script>'
    body = [
        f'<dl class="tiles even">\n{"".join(tiles)}</dl>',
        section("All latents", about, _CONTROLS),
        section("What the pages show", how, embedded),
    ]
    return html_page("latents", name, "What each latent responds to.", "\n".join(body), "index.js")
