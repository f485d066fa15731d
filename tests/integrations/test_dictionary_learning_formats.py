"""Our files in dictionary_learning, and its files here: the same reconstruction."""

import json
from pathlib import Path

import pytest
import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from formats_cases import RULES, D, F, K, assert_same, example, reconstruction, tokens

import fastsae
from fastsae import formats

REFUSED = {"abs-topk", "group-topk"} | {name for name in RULES if name.startswith("transcoder")}


@pytest.mark.parametrize("name", [name for name in RULES if name not in REFUSED])
def test_ours_in_theirs(name: str, tmp_path: Path) -> None:
    sae, x = example(name), tokens()
    formats.write(sae, tmp_path / "out", "dictionary_learning")
    theirs, config = load_dictionary(str(tmp_path / "out"), "cpu")
    assert type(theirs).__name__ == config["trainer"]["dict_class"]
    assert_same(theirs(x), reconstruction(sae, x))
    assert_same(reconstruction(fastsae.load(tmp_path / "out"), x), reconstruction(sae, x))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_they_cannot_express(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected what dictionary_learning can express"):
        formats.write(example(name), tmp_path / "out", "dictionary_learning")
    assert not (tmp_path / "out").exists()


THEIRS = {
    "AutoEncoder": lambda: AutoEncoder(D, F),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, F),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, F),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, F, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, F, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, F, K, [12, 12, 24]),
}


@torch.no_grad()
def randomized(name: str) -> torch.nn.Module:
    theirs, generator = THEIRS[name](), torch.Generator().manual_seed(3)
    for key, p in theirs.named_parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        if key == "threshold":
            p.abs_()
    return theirs


def save(theirs: torch.nn.Module, folder: Path, **config: object) -> Path:
    torch.save(theirs.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": type(theirs).__name__, **config}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@pytest.mark.parametrize("threshold", [-1.0, 0.5])
@pytest.mark.parametrize("name", THEIRS)
def test_theirs_here(name: str, threshold: float, tmp_path: Path) -> None:
    theirs, x = randomized(name), tokens()
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        theirs.threshold.fill_(threshold)
    ours = fastsae.load(save(theirs, tmp_path, activation_dim=D, dict_size=F, k=K))
    assert_same(reconstruction(ours, x), theirs(x))
    formats.write(ours, tmp_path / "again", "dictionary_learning")
    again, _ = load_dictionary(str(tmp_path / "again"), "cpu")
    assert_same(again(x), theirs(x))
    if name not in ("AutoEncoderTopK", "BatchTopKSAE"):  # whose keys are the same
        (tmp_path / "config.json").unlink()
        assert_same(reconstruction(fastsae.load(tmp_path / "ae.pt"), x), theirs(x))


def test_a_run_of_theirs_here(tmp_path: Path) -> None:
    """Final weights and checkpoints of their training, config.json as they write it."""
    common = dict(activation_dim=D, dict_size=F, layer=1, lm_name="a-model", device="cpu", seed=0)
    config = dict(trainer=BatchTopKTrainer, k=K, steps=12, threshold_start_step=3, **common)
    config |= dict(warmup_steps=2, dict_class=BatchTopKSAE)
    data = (tokens(seed) for seed in range(12))
    trainSAE(
        data,
        [config],
        steps=12,
        save_dir=str(tmp_path),
        save_steps=[6],
        use_wandb=False,
        verbose=False,
        device="cpu",
        autocast_dtype=torch.float32,
    )
    folder, x = tmp_path / "trainer_0", tokens()
    theirs, _ = load_dictionary(str(folder), "cpu")
    assert float(theirs.threshold) > 0
    assert_same(reconstruction(fastsae.load(folder), x), theirs(x))
    (checkpoint,) = (folder / "checkpoints").iterdir()
    theirs = BatchTopKSAE.from_pretrained(str(checkpoint))
    assert_same(reconstruction(fastsae.load(checkpoint), x), theirs(x))
