"""`fastsae steer` and what it is made of, with a tiny model written by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import refusals
from test_harvest import CLS, Causal, Encoder, Tokenizer, transformers
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cli, steering
from fastsae.generation import continued, states, states_of_texts
from fastsae.harvest import HarvestConfig, harvest
from fastsae.models import LanguageModel
from fastsae.sites import find_module

D = 6


class Decoding(Tokenizer):
    """Bytes, and back."""

    eos_token_id = 257

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("latin-1")


def model() -> LanguageModel:
    return LanguageModel("tiny", Causal(), Decoding(), True, {"model.bin": "00"})


def greedy(net: Causal, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        ids = [*ids, int(net(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids


# ---- text ----


@torch.no_grad()
def test_a_prompt_is_continued_greedily_or_by_a_seeded_draw() -> None:
    tiny = model()
    prompt = list(b"the quick")
    expected = greedy(tiny.net, prompt, 12)[len(prompt) :]
    found = continued(tiny, "the quick", 12)
    assert found == tiny.tokenizer.decode(expected)
    drawn = [continued(tiny, "the quick", 12, temperature=3.0, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != found
    assert continued(tiny, "the quick", 12, temperature=1e-4) == found
    tiny.net.head.bias[Decoding.eos_token_id] = 1e6
    assert continued(tiny, "the quick", 12) == ""


@torch.no_grad()
def test_a_steered_continuation_is_steered_at_every_token() -> None:
    tiny, shift = model(), 4 * torch.randn(D, generator=torch.Generator().manual_seed(3))
    module = find_module(tiny.net, "residual", 2)

    def steered_logits(ids: list[int]) -> Tensor:
        x = tiny.net.layers[1](tiny.net.layers[0](tiny.net.embed(torch.tensor([ids]))))
        x[:, 1:] += shift
        return tiny.net.head(tiny.net.layers[2](x))[0, -1]

    ids = list(b"the quick")
    for _ in range(10):
        ids.append(int(steered_logits(ids).argmax()))
    with steering.steered(module, steering.toward(shift), positions=slice(1, None)):
        found = continued(tiny, "the quick", 10)
    assert found == tiny.tokenizer.decode(ids[9:]) != continued(tiny, "the quick", 10)


@torch.no_grad()
def test_states_are_those_of_all_tokens_but_the_first() -> None:
    tiny = model()
    module = find_module(tiny.net, "mlp", 2)
    ids = torch.tensor([list(b"quick"), list(b"brown")])
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, a, output: seen.append(output))
    tiny.net(ids, use_cache=False)
    handle.remove()
    assert torch.equal(states(tiny, module, ids), seen[0])
    found = states_of_texts(tiny, module, ["quick", "brown"])
    torch.testing.assert_close(found, seen[0][:, 1:].flatten(0, 1))


def test_special_tokens_that_end_a_text_are_left_out() -> None:
    """As harvests leave them out; behind them nothing goes on."""
    tiny = replace(model(), tokenizer=Decoding(special=True))
    module, ids = find_module(tiny.net, "residual", 2), torch.tensor([[CLS, *b"quick"]])
    x = states(tiny, module, ids)[0]
    torch.testing.assert_close(states_of_texts(tiny, module, ["quick"]), x[1:])
    best = int(tiny.net(ids, use_cache=False).logits[0, -1].argmax())
    assert continued(tiny, "quick", 1) == tiny.tokenizer.decode([best])


@refusals(
    ("call", "message"),
    [
        (lambda m: continued(m, "", 3), "prompt: expected at least one token, got none"),
        (lambda m: continued(m, "a", 0), "tokens: expected at least 1, got 0"),
        (lambda m: continued(m, "a", 1, temperature=-1.0), "temperature: .* at least 0, got -1.0"),
        (lambda m: states_of_texts(m, m.net.head, ["a"]), "text: .* two tokens, got 'a'"),
        (lambda m: states_of_texts(m, m.net.head, []), "texts: expected at least one"),
    ],
)
def test_text_that_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model())


def test_an_encoder_does_not_continue() -> None:
    with pytest.raises(ValueError, match="expected a causal language model, got tiny encoder"):
        continued(LanguageModel("tiny encoder", Encoder(), Tokenizer(), False, {}), "a", 1)


# ---- the command ----


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose data are a set harvested from the tiny model."""
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 9)
    config = HarvestConfig(layer=2, window=12, batch_size=2, dtype="float32", site="mlp")
    harvest(model(), [text], tmp_path / "set", config)
    out = tmp_path / "run"
    sae = SAE(SAEConfig(D, 24, TopK(3)), seed=4)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.save(out)
    (out / "run.json").write_text(json.dumps({"data": str(tmp_path / "set")}))
    module = transformers(monkeypatch, "LlamaForCausalLM", Causal())
    module.AutoTokenizer.value = Decoding()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"weights")
    return out


def steer(run: Path, capsys: pytest.CaptureFixture[str], *options: object) -> list[str]:
    arguments = ["steer", run, "--prompt", "the quick", "--tokens", 8, *options]
    arguments += ["--model", run.parent / "tiny"]
    capsys.readouterr()
    cli.main([*map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def test_steer_prints_both_texts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, sae = model(), SAE.load(run)
    module = find_module(tiny.net, "mlp", 2)
    head, prompt, before, after = steer(run, capsys, "--latents", 3, 5, "--strength", 40)
    assert head == f"{run.parent / 'tiny'}, mlp of layer 2: add 3, 5 by 40"
    assert prompt == "prompt  'the quick'"
    assert before == f"before  {continued(tiny, 'the quick', 8)!r}"
    change = steering.add(sae, [3, 5], 40.0)
    with steering.steered(module, change, positions=slice(1, None)):
        assert after == f"after   {continued(tiny, 'the quick', 8)!r}"
    assert before[8:] != after[8:]
    assert steer(run, capsys, "--latents", 3, 5, "--strength", 0)[3][8:] == before[8:]
    drawn = ("--temperature", 2, "--seed", 3)
    line = steer(run, capsys, "--latents", 3, "--strength", 0, *drawn)[2]
    assert line[8:] == repr(continued(tiny, "the quick", 8, temperature=2.0, seed=3))


@pytest.mark.parametrize("kind", ["ablate", "clamp", "relu", "selection", "against", "contrast"])
def test_every_way_to_steer(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the library, at a site other than the run's own."""
    tiny, sae = model(), SAE.load(run)
    module = find_module(tiny.net, "residual", 3)
    positive, negative = (
        states_of_texts(tiny, module, texts) for texts in (["fox", "dog"], ["lazy brown"])
    )
    relu = [steering.concept(sae, x).mean(0) for x in (positive, negative)]
    latents, difference = steering.contrast(sae, positive, negative, 4)
    texts: tuple[str, ...] = ("--concept", "fox", "dog")
    both = (*texts, "--against", "lazy brown")
    options, change = {
        "ablate": (("--latents", "3", "--change", "ablate"), steering.ablate(sae, [3])),
        "clamp": (
            ("--latents", "3", "--change", "clamp", "--strength", "9"),
            steering.clamp(sae, [3], 9.0),
        ),
        "relu": ((*texts, "--strength", "-30"), steering.toward(relu[0], -30.0)),
        "selection": (
            (*texts, "--form", "selection", "--strength", "30"),
            steering.toward(steering.concept(sae, positive, "selection").mean(0), 30.0),
        ),
        "against": ((*both, "--strength", "30"), steering.toward(relu[0] - relu[1], 30.0)),
        "contrast": (
            (*both, "--form", "contrast", "--top", "4", "--strength", "50"),
            steering.add(sae, latents, 50.0 * difference),
        ),
    }[kind]
    lines = steer(run, capsys, *options, "--layer", 3, "--site", "residual")
    assert "residual of layer 3" in lines[0]
    if kind == "contrast":
        assert f"latents {', '.join(map(str, latents.tolist()))} by" in lines[0]
    with steering.steered(module, change, positions=slice(1, None)):
        assert lines[3] == f"after   {continued(tiny, 'the quick', 8)!r}"


@refusals(
    ("options", "message"),
    [
        ((), "expected either --latents or --concept"),
        (("--latents", "3", "--concept", "fox", "--strength", "1"), "expected either --latents or"),
        (("--latents", "3"), "strength: expected a number for add, got None"),
        (
            ("--latents", "3", "--change", "ablate", "--strength", "1"),
            "strength: expected none for ablate, got 1.0",
        ),
        (
            ("--concept", "fox", "--change", "clamp", "--strength", "1"),
            "change: expected add for a concept, got clamp",
        ),
        (
            ("--concept", "fox", "--form", "contrast", "--strength", "1"),
            "against: expected texts for --form contrast, got none",
        ),
        (
            ("--latents", "3", "--strength", "1", "--against", "fox"),
            "against: expected --concept with it",
        ),
        (("--latents", "24", "--strength", "1"), r"latents: .* in \[0, 24\), got \[24\]"),
        (("--latents", "3", "--strength", "1", "--layer", "4"), "layer: expected at most 3, got 4"),
        (("--latents", "3", "--strength", "1", "--layer", "0"), "layer: expected at least 1"),
        (("--concept", "f", "--strength", "1"), "text: expected at least two tokens, got 'f'"),
    ],
)
def test_steer_refuses_in_one_line(
    options: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=rf"^fastsae: error: .*{message}"):
        steer(run, capsys, *options)


def test_a_run_on_other_data_wants_layer_and_site(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").write_text('{"data": "sample:minilm_l3"}')
    what = ("--latents", "3", "--strength", "40")
    with pytest.raises(SystemExit, match="or a run on a set of fastsae harvest"):
        steer(run, capsys, *what)
    lines = steer(run, capsys, *what, "--layer", 2, "--site", "mlp")
    assert lines[0].endswith("mlp of layer 2: add 3 by 40")


def test_without_transformers_the_extra_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"pip install 'fastsae-engine\[harvest\]'"):
        steer(run, capsys, "--latents", "3", "--strength", "1")
