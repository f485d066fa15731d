"""Steering through a pipeline's text encoder, with one written by hand: which call gets which sign.

tests/integrations/test_diffusers.py holds diffusers' own pipelines to the same.
"""

import pytest
import torch
from common import randn
from torch import Tensor, nn

from fastsae.integrations.diffusers import states, steered

L, D = 4, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mlp(x))


class TextEncoder(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(128, D)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return (x,)


class Pipeline:
    """The part of a pipeline that reads text, with diffusers' arguments and order of calls."""

    def __init__(self) -> None:
        self.text_encoder, self.text_encoder_2 = TextEncoder(0), TextEncoder(1)
        self.tokenizer = None

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
    ):
        def read(texts):
            texts = [texts] if isinstance(texts, str) else texts
            ids = torch.tensor([[*text.encode()[:L].ljust(L, b"\0")] for text in texts])
            return [encoder(ids)[0] for encoder in (self.text_encoder, self.text_encoder_2)]

        if prompt_embeds is None:
            prompt_embeds = read(prompt)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt_embeds = read(negative_prompt or "")
        return prompt_embeds, negative_prompt_embeds

    def __call__(self, prompt, guidance_scale=7.5, **options):
        return self.encode_prompt(prompt, "cpu", 1, guidance_scale > 1, **options)


def last(pipeline: Pipeline, x: Tensor) -> Tensor:
    with torch.no_grad():
        return pipeline.text_encoder.layers[1](x)


def test_the_prompt_is_added_to_and_the_negative_prompt_subtracted_from() -> None:
    pipeline, direction = Pipeline(), randn(L, D)
    prompt, negative = (states(pipeline, text, 1) for text in ("cat", "dull"))
    assert prompt.shape == (L, D) and not torch.equal(prompt, negative)
    plain = pipeline("cat", negative_prompt="dull")
    assert torch.equal(plain[0][0][0], last(pipeline, prompt))
    with steered(pipeline, 1, direction, -0.5):
        for _ in range(3):  # every image counts anew
            found = pipeline("cat", negative_prompt="dull")
            torch.testing.assert_close(found[0][0][0], last(pipeline, prompt - 0.5 * direction))
            torch.testing.assert_close(found[1][0][0], last(pipeline, negative + 0.5 * direction))
            assert torch.equal(found[0][1], plain[0][1])  # the other encoder
        unguided, none = pipeline("cat", guidance_scale=1.0)
        torch.testing.assert_close(unguided[0][0], last(pipeline, prompt - 0.5 * direction))
        assert none is None
        batch = pipeline(["cat", "dog"], negative_prompt=["dull", "flat"])
        torch.testing.assert_close(batch[0][0][:1], found[0][0])
        torch.testing.assert_close(batch[1][0][:1], found[1][0])
        outside = pipeline.text_encoder(torch.tensor([[*b"cat\0"]]))[0]
    assert torch.equal(outside, plain[0][0])  # a call that encode_prompt does not make
    again = pipeline("cat", negative_prompt="dull")
    assert torch.equal(again[0][0], plain[0][0]) and torch.equal(again[1][0], plain[1][0])


def test_two_encoders_and_two_concepts() -> None:
    pipeline, a, b, c = Pipeline(), randn(D), randn(L, D, seed=1), randn(D, seed=2)
    firsts = states(pipeline, "cat", 2), states(pipeline, "cat", 2, encoder="text_encoder_2")
    with (
        steered(pipeline, 2, a, 1.0),
        steered(pipeline, 2, b, 2.0, encoder="text_encoder_2"),
        steered(pipeline, 2, c, -1.0),
    ):
        prompt, negative = pipeline("cat")
    torch.testing.assert_close(prompt[0][0], firsts[0] + a - c)
    torch.testing.assert_close(prompt[1][0], firsts[1] + 2 * b)
    empty = states(pipeline, "", 2)
    torch.testing.assert_close(negative[0][0], empty - a + c)
    assert "encode_prompt" not in vars(pipeline)


def test_other_calls_than_expected_are_an_error() -> None:
    pipeline, given = Pipeline(), [randn(1, L, D), randn(1, L, D)]
    cases = (
        ({"negative_prompt_embeds": given}, r"expected .* 2, for prompt and negative .*; got 1"),
        ({"prompt_embeds": given}, r"text_encoder: expected calls .* 2, .*; got 1"),
        ({"prompt_embeds": given, "guidance_scale": 1.0}, "1, without guidance; got 0"),
    )
    with steered(pipeline, 1, randn(D), 1.0):
        for options, message in cases:
            with pytest.raises(ValueError, match=message):
                pipeline("cat", **options)
        assert len(pipeline("cat")) == 2  # the next image counts anew

    twice = Pipeline()
    plain = twice.encode_prompt

    def encode_prompt(prompt, device, num_images_per_prompt, do_classifier_free_guidance):
        plain(prompt, device, num_images_per_prompt, False)
        return plain(prompt, device, num_images_per_prompt, do_classifier_free_guidance)

    twice.encode_prompt = encode_prompt
    with steered(twice, 1, randn(D), 1.0), pytest.raises(ValueError, match="got 3"):
        twice("cat")
    assert twice.encode_prompt is encode_prompt
    assert not twice.text_encoder.layers[0]._forward_hooks


def test_after_an_exception_the_pipeline_is_as_before() -> None:
    pipeline = Pipeline()
    with pytest.raises(KeyError), steered(pipeline, 1, randn(D), 1.0):
        raise KeyError("in the middle")
    assert "encode_prompt" not in vars(pipeline)
    assert not pipeline.text_encoder.layers[0]._forward_hooks


def test_what_is_refused() -> None:
    pipeline, direction = Pipeline(), randn(D)
    cases = (
        (ValueError, "layer: expected at most 2, got 3", pipeline, 3, {}),
        (
            ValueError,
            "text encoder of Pipeline, got 'tokenizer'",
            pipeline,
            1,
            {"encoder": "tokenizer"},
        ),
        (ValueError, "text encoder of Pipeline, got 'unet'", pipeline, 1, {"encoder": "unet"}),
        (
            TypeError,
            "expected one with encode_prompt, got TextEncoder",
            pipeline.text_encoder,
            1,
            {},
        ),
    )
    for error, message, given, layer, options in cases:
        with pytest.raises(error, match=message), steered(given, layer, direction, 1.0, **options):
            raise AssertionError("entered")
        with pytest.raises(error, match=message):
            states(given, "cat", layer, **options)
    with steered(pipeline, 1, randn(D + 1), 1.0), pytest.raises(ValueError, match="x: expected"):
        pipeline("cat")
