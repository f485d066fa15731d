"""Steering inside diffusers' pipelines, tiny ones with random weights, and on MiniLM's states."""

import string
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from fastsae import SAE, SAEConfig, TopK, steering
from fastsae.integrations.diffusers import states, steered
from fastsae.models import load_model
from fastsae.sites import find_module, output_of

L, D, LAYERS = 16, 16, 3


def tokenizer() -> CLIPTokenizer:
    """Letters are its words."""
    pieces = ["<|startoftext|>", "<|endoftext|>"]
    pieces += [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=L)


def text_config(**options) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=L,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **options,
    )


def parts(cross_attention_dim: int, **unet) -> dict:
    return {
        "vae": AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
        ).eval(),
        "unet": UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=4,
            **unet,
        ).eval(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "tokenizer": tokenizer(),
        "feature_extractor": None,
    }


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    made = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text_config()).eval(),
        safety_checker=None,
        requires_safety_checker=False,
        **parts(D),
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def sae() -> SAE:
    return SAE(SAEConfig(D, 64, TopK(4)), seed=1).eval()


def image(pipeline, prompt="cat", **options) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "negative_prompt": "dull", **options}
    return pipeline(prompt, generator=generator, output_type="pt", **options).images


def test_the_image_is_that_of_embeddings_changed_by_hand(
    pipeline: StableDiffusionPipeline, sae: SAE
) -> None:
    """The encoder's own layers, called one after another, with x_C's shift between them."""
    shift = -0.7 * steering.concept(sae, states(pipeline, "violence", 2))
    assert shift.shape == (L, D)
    encoder = pipeline.text_encoder

    def by_hand(prompt: str, change: Tensor) -> Tensor:
        x = states(pipeline, prompt, 2) + change
        with torch.no_grad(), steering.steered(encoder.encoder.layers[1], lambda _: x[None]):
            ids = pipeline.tokenizer(prompt, padding="max_length", max_length=L)["input_ids"]
            return encoder(torch.tensor([ids]))[0]

    embeds = {
        "prompt_embeds": by_hand("cat", shift),
        "negative_prompt_embeds": by_hand("dull", -shift),
    }
    expected = image(pipeline, None, negative_prompt=None, **embeds)
    plain = image(pipeline)
    with steered(pipeline, 2, shift / -0.7, -0.7):
        found = image(pipeline)
        nothing = image(pipeline, guidance_scale=1.0, negative_prompt=None)
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().max() > 1e-3
    assert torch.equal(image(pipeline), plain)
    alone = image(
        pipeline,
        None,
        negative_prompt=None,
        guidance_scale=1.0,
        prompt_embeds=by_hand("cat", shift),
    )
    torch.testing.assert_close(nothing, alone)


def test_signs_in_every_call_of_the_text_encoder(
    pipeline: StableDiffusionPipeline, sae: SAE
) -> None:
    """What the layer behind the steered one is given: batches, several images, a default negative
    prompt, one after another."""
    direction = steering.concept(sae, states(pipeline, "violence", 2), "selection")
    texts = {text: states(pipeline, text, 2) for text in ("cat", "dog", "dull", "flat", "")}
    given: list[Tensor] = []
    behind = pipeline.text_encoder.encoder.layers[2]
    handle = behind.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with steered(pipeline, 2, direction, 2.0):
        image(pipeline, ["cat", "dog"], negative_prompt=["dull", "flat"])
        image(pipeline, "dog", negative_prompt=None, num_images_per_prompt=2)
        image(pipeline, "cat", guidance_scale=0.0)
    handle.remove()
    expected = [
        torch.stack([texts["cat"], texts["dog"]]) + 2 * direction,
        torch.stack([texts["dull"], texts["flat"]]) - 2 * direction,
        texts["dog"][None] + 2 * direction,
        texts[""][None] - 2 * direction,
        texts["cat"][None] + 2 * direction,
    ]
    assert len(given) == len(expected)
    for found, right in zip(given, expected, strict=True):
        torch.testing.assert_close(found, right)


def test_no_strength_changes_no_bit(pipeline: StableDiffusionPipeline, sae: SAE) -> None:
    direction = steering.concept(sae, states(pipeline, "violence", 1))
    plain = image(pipeline)
    with steered(pipeline, 1, direction, 0.0):
        assert torch.equal(image(pipeline), plain)


def test_embeddings_in_the_place_of_texts_are_refused(pipeline: StableDiffusionPipeline) -> None:
    embeds = torch.zeros(1, L, D)
    with steered(pipeline, 2, torch.ones(D), 1.0):
        for prompt, options in (
            ("cat", {"negative_prompt": None, "negative_prompt_embeds": embeds}),
            (None, {"prompt_embeds": embeds}),
        ):
            with pytest.raises(ValueError, match=r"text_encoder: expected calls .*; got 1"):
                image(pipeline, prompt, **options)
    assert "encode_prompt" not in vars(pipeline)


def test_two_encoders_and_prompts_that_are_left_out() -> None:
    """SDXL makes zeros of a negative prompt that is not given: nothing could be subtracted."""
    torch.manual_seed(0)
    config = text_config(projection_dim=D)
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + D,
    }
    options = parts(2 * D, **extra)
    xl = StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
        **options,
    )
    xl.set_progress_bar_config(disable=True)
    a, b = torch.randn(D), torch.randn(L, D)
    layers = [
        encoder.text_model if hasattr(encoder, "text_model") else encoder
        for encoder in (xl.text_encoder, xl.text_encoder_2)
    ]
    given: list[Tensor] = []
    for net in layers:
        behind = net.encoder.layers[2]
        behind.register_forward_pre_hook(lambda module, args: given.append(args[0][0]))
    plain = [
        states(xl, text, 2, encoder=name)
        for name in ("text_encoder", "text_encoder_2")
        for text in ("cat", "dull")
    ]
    given.clear()
    with steered(xl, 2, a, 1.5), steered(xl, 2, b, -1.0, encoder="text_encoder_2"):
        image(xl)
        with pytest.raises(ValueError, match=r"give texts .* negative_prompt='' instead of none"):
            image(xl, negative_prompt=None)
    expected = [plain[0] + 1.5 * a, plain[2] - b, plain[1] - 1.5 * a, plain[3] + b]
    for found, right in zip(given[:4], expected, strict=True):
        torch.testing.assert_close(found, right)
    last_but_one = LAYERS - 1  # what SDXL reads of an encoder
    direction = torch.randn(L, D)
    x = {text: states(xl, text, last_but_one) for text in ("cat", "dull")}
    with steered(xl, last_but_one, direction, 2.0):
        found = xl.encode_prompt("cat", device="cpu", negative_prompt="dull")
    torch.testing.assert_close(found[0][0, :, :D], x["cat"] + 2 * direction)
    torch.testing.assert_close(found[1][0, :, :D], x["dull"] - 2 * direction)


# ---- MiniLM ----


def test_states_of_minilm(tmp_path: Path) -> None:
    """Changes at its third block, in float64 written out; what comes out of the last block."""
    model = load_model("minilm", tmp_path)
    module = find_module(model.net, "residual", 3)
    batch = model.tokenizer(
        ["a whale at sea", "the president speaks"], return_tensors="pt", padding=True
    )

    def last() -> Tensor:
        with torch.no_grad():
            return model.net(**batch).last_hidden_state

    with torch.no_grad():
        x = output_of(module, lambda: model.net(**batch))
    sae = SAE(SAEConfig(384, 512, TopK(8)))
    sae.initialize_from_(x.reshape(-1, 384), fit_encoder=True)
    sae.eval().requires_grad_(False)
    plain, codes = last(), sae.encode(x)
    latents = codes.firing_counts().topk(5).indices
    own = steering.activations(sae, x, latents)
    assert (own != 0).any() and torch.equal(own.flatten(0, 1), codes.to_dense()[:, latents])
    with steering.steered(module, steering.clamp(sae, latents, own)):
        assert torch.equal(last(), plain)
    with steering.steered(module, steering.ablate(sae, latents)):
        ablated = last()
        seen = output_of(module, lambda: model.net(**batch))
    units = sae.W_dec[latents].double() / sae.input_scale.double()
    torch.testing.assert_close(seen.double(), x.double() - own.double() @ units, rtol=0, atol=1e-5)
    assert (ablated - plain).abs().max() > 1e-3

    h = (x.double() * sae.input_scale.double() - sae.b_dec.double()) @ sae.W_enc.double().T
    relu = (h + sae.b_enc.double()).relu() @ sae.W_dec.double() / sae.input_scale.double()
    found = steering.concept(sae, x)
    torch.testing.assert_close(found.double(), relu, rtol=1e-5, atol=1e-5)
