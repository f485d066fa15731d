"""bench/lora.py through peft: on SmolLM2, what is trained, what the splice does, what is undone."""

import sys
from pathlib import Path

import pytest
import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.generation import states
from fastsae.models import LanguageModel, load_model
from fastsae.sites import find_module

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from lora import adapted, divergence, figures, log_probabilities, spliced, training

LAYER = 27


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model("smollm2", tmp_path_factory.mktemp("cache"))


def test_adapters_behind_the_sae_learn_and_nothing_else_changes(model: LanguageModel) -> None:
    ids = torch.tensor(
        [model.tokenizer("the whale and the sea, the ship and its sails")["input_ids"]]
    )
    module = find_module(model.net, "residual", LAYER)
    sae = SAE(SAEConfig(576, 1152, TopK(8)))
    sae.initialize_from_(states(model, module, ids)[0, 1:], fit_encoder=True)
    sae.eval().requires_grad_(False)
    with torch.no_grad():
        base = log_probabilities(model.net, ids)
        with spliced(module, sae):
            before = log_probabilities(model.net, ids)
        assert torch.equal(before[:, 0], base[:, 0]) and not torch.equal(before[:, 1], base[:, 1])
        expected = (base.exp() * (base - before)).sum(-1).mean()
    torch.testing.assert_close(divergence(base, before), expected)

    torch.manual_seed(0)
    weights = {name: p.clone() for name, p in model.net.named_parameters()}
    net = adapted(model.net, LAYER, rank=4, alpha=8, dropout=0.0)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    blocks = {int(name.partition("layers.")[2].partition(".")[0]) for name in trained}
    assert blocks == set(range(LAYER, 30))  # counted from 0: those behind block 27, from 1
    first = figures(net, module, sae, ids)
    torch.testing.assert_close(first["kl"], float(expected), rtol=1e-3, atol=1e-5)
    losses = [loss for _, loss in training(net, module, sae, ids.expand(12, -1), 1, lr=3e-3)]
    last = figures(net, module, sae, ids)
    assert last["kl"] < 0.7 * first["kl"] and losses[-1] < losses[0]
    assert last["ce_model"] == pytest.approx(first["ce_model"], abs=1e-6)
    assert first["gap"] == first["ce_spliced"] - first["ce_model"]
    with torch.no_grad(), net.disable_adapter():
        torch.testing.assert_close(log_probabilities(net, ids), base)
    same = dict(net.get_base_model().named_parameters())
    for name, value in weights.items():
        kept = same.get(name, same.get(name.replace(".weight", ".base_layer.weight")))
        assert kept is not None and torch.equal(kept, value)
    assert not module._forward_hooks
