"""SAEs to write for the real libraries, and what is compared."""

import torch
from torch import Tensor

from fastsae import SAE, SAEConfig, Selection, TopK
from fastsae.selection import (
    AbsTopK,
    BatchTopK,
    FeatureChoice,
    Gated,
    GradientTopK,
    GroupTopK,
    JumpReLU,
    Matryoshka,
    MutualChoice,
    ReLU,
    TemporalMask,
)

D, F, K, N = 12, 48, 4, 300
WEIGHTED = "activation·decoder_norm"
FREE = {"decoder_norm": "free"}
RAW = {"apply_b_dec_to_input": False}

RULES: dict[str, tuple[Selection, dict]] = {
    "topk": (TopK(K), {}),
    "topk-weighted": (TopK(K, score=WEIGHTED), FREE),
    "topk-free": (TopK(K), FREE),
    "topk-raw": (TopK(K), RAW),
    "topk-no-bias": (TopK(K), {"encoder_bias": False}),
    "gradient-topk": (GradientTopK(K), {}),
    "temporal-mask": (TemporalMask(K), {}),
    "batchtopk": (BatchTopK(K), {}),
    "batchtopk-weighted": (BatchTopK(K, score=WEIGHTED), FREE),
    "mutual-choice": (MutualChoice(2.5), {}),
    "matryoshka": (Matryoshka(K, groups=(1 / 4, 1 / 4, 1 / 2)), {}),
    "feature-choice": (FeatureChoice(K, warmup=0.0), {}),
    "jumprelu": (JumpReLU(threshold=0.4), {}),
    "jumprelu-raw-free": (JumpReLU(threshold=0.4), {**RAW, **FREE}),
    "gated": (Gated(), {}),
    "gated-raw": (Gated(), RAW),
    "relu": (ReLU(), {}),
    "relu-raw": (ReLU(), RAW),
    "abs-topk": (AbsTopK(K), {}),
    "group-topk": (GroupTopK(K), {}),
    "transcoder": (ReLU(), {"d_out": 7}),
    "transcoder-skip": (ReLU(), {"d_out": 7, "skip": True}),
    "transcoder-jumprelu": (JumpReLU(threshold=0.4), {"d_out": 7}),
    "transcoder-jumprelu-skip": (JumpReLU(threshold=0.4), {"d_out": 7, "skip": True}),
    "transcoder-topk": (TopK(K), {"d_out": D}),
    "transcoder-topk-skip": (TopK(K), {"d_out": D, "skip": True}),
}


def tokens(seed: int = 9, width: int = D) -> Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def example(name: str, dtype: str = "float32") -> SAE:
    """An SAE with scales, random biases and, where the rule tracks them, thresholds."""
    rule, config = RULES[name]
    generator = torch.Generator().manual_seed(len(name))
    sae = SAE(SAEConfig(D, F, rule, dtype=dtype, **config), seed=1)
    if config.get("decoder_norm") == "free":
        sae.W_dec.mul_(torch.linspace(0.3, 2, F)[:, None])
    own = [p for key, p in sae.selection_state.named_parameters() if key in ("r_mag", "b_mag")]
    for p in (sae.b_enc, sae.b_dec, sae.W_skip, *own):
        if p is not None:
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    sae.input_scale.fill_(1.4)
    sae.output_scale.fill_(0.7)
    sae.train()
    for seed in range(5):
        target = tokens(seed + 50, config["d_out"]) if "d_out" in config else None
        gradient = tokens(seed + 90) if rule.needs_gradient else None
        sae.losses(tokens(seed), target, gradient)
    return sae.eval()


@torch.no_grad()
def reconstruction(sae: SAE, x: Tensor) -> Tensor:
    return sae(x).reconstruction


def assert_same(got: Tensor, expected: Tensor) -> None:
    """At most 1e-5 apart, and neither is nothing."""
    assert got.shape == expected.shape and bool(expected.abs().max() > 0.1)
    assert float((got.detach() - expected.detach()).abs().max()) <= 1e-5
