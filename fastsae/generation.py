"""What a causal language model makes of text: its states at a module, and how it goes on.

Nothing is cached between passes: in every one position 0 is the text's first, so a change of a
module's output (`fastsae.sites.edited`) at chosen positions means the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastsae.models import LanguageModel, check_causal
from fastsae.sites import output_of
from fastsae.windows import special_tokens


@torch.no_grad()
def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    """Of every position: ids (n, L) → (n, L, vocabulary), float32."""
    return model.net(input_ids=ids.to(_device(model)), use_cache=False).logits.float()


@torch.no_grad()
def states(model: LanguageModel, module: nn.Module, ids: Tensor) -> Tensor:
    """What the module returns for ids (n, L): (n, L, D); what comes behind it is not run."""
    ids = ids.to(_device(model))
    return output_of(module, lambda: model.net(input_ids=ids, use_cache=False))


def states_of_texts(model: LanguageModel, module: nn.Module, texts: Sequence[str]) -> Tensor:
    """The states of all tokens of some texts but the first of each, as harvested: (N, D).

    ValueError: a text of fewer than two tokens.
    """
    check_causal(model)
    found = []
    for text in texts:
        ids = _ids(model, text)
        if len(ids) < 2:
            raise ValueError(f"text: expected at least two tokens, got {text!r:.80}")
        found.append(states(model, module, torch.tensor([ids]))[0, 1:])
    if not found:
        raise ValueError("texts: expected at least one, got none")
    return torch.cat(found)


def continued(
    model: LanguageModel, prompt: str, tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> str:
    """What the model writes after the prompt: at most so many tokens, fewer where it ends.

    temperature 0: the most likely token each time; else drawn, with a generator of that seed.
    """
    check_causal(model)
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    ids = _ids(model, prompt)
    if not ids:
        raise ValueError("prompt: expected at least one token, got none")
    generator, n_prompt = torch.Generator().manual_seed(seed), len(ids)
    end = getattr(model.tokenizer, "eos_token_id", None)
    while len(ids) < n_prompt + tokens:
        last = logits(model, torch.tensor([ids]))[0, -1].cpu()
        if temperature:
            chances = torch.softmax(last / temperature, 0)
            token = int(torch.multinomial(chances, 1, generator=generator))
        else:
            token = int(last.argmax())
        if token == end:
            break
        ids.append(token)
    return model.tokenizer.decode(ids[n_prompt:])


def _ids(model: LanguageModel, text: str) -> list[int]:
    """Behind the special tokens that begin a text; those that end it would end what goes on."""
    ids = list(model.tokenizer(text)["input_ids"])
    return ids[: len(ids) - len(special_tokens(model.tokenizer)[1])]


def _device(model: LanguageModel) -> torch.device:
    return next(model.net.parameters()).device
