"""Where in a model activations are taken, and how they are replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

Site = Literal["residual", "mlp", "attention"]

# Where a block keeps a part: Llama, GPT-2, DistilBERT, GPT-NeoX or BERT, whose attention and MLP
# end in a module that also adds the residual and normalises, so its product is taken.
_PARTS = {
    "attention": ("self_attn", "attn", "attention.output.dense", "attention"),
    "mlp": ("mlp", "ffn", "output.dense"),
}

# The edits of each module that has some, in order, and the handle of the one hook that makes them.
_EDITS: WeakKeyDictionary[nn.Module, tuple[list[Callable[[object], object]], Any]] = (
    WeakKeyDictionary()
)


def find_module(net: nn.Module, site: Site, layer: int) -> nn.Module:
    """The module whose output is the site's activation."""
    lists = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(_part(block, part) is not None for block in module for part in _PARTS)
    }
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise ValueError(
            "expected a model with one list of blocks, each with an attention "
            f"({' or '.join(_PARTS['attention'])}) and an MLP ({' or '.join(_PARTS['mlp'])}); "
            f"found in {type(net).__name__}: {found}"
        )
    (blocks,) = lists.values()
    if layer < 1:
        raise ValueError(f"layer: expected at least 1, got {layer}")
    if layer > len(blocks):
        raise ValueError(f"layer: expected at most {len(blocks)}, got {layer}")
    block = blocks[layer - 1]
    module = block if site == "residual" else _part(block, site)
    assert module is not None
    return module


def _part(block: nn.Module, part: str) -> nn.Module | None:
    for path in _PARTS[part]:
        with contextlib.suppress(AttributeError):
            return block.get_submodule(path)
    return None


@contextlib.contextmanager
def edited(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, change(x) takes the place of what the module returns: of x, or of the first part
    of a tuple (a block's hidden states).

    Edits of one module are made in the order in which they were entered, and before all other
    forward hooks: those by which transformers keeps hidden_states see what takes x's place.
    TypeError: the module returns neither.
    """

    def edit(output: object) -> object:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        got = type(output).__name__
        raise TypeError(
            f"{type(module).__name__}: expected a module that returns a tensor, or a tuple that "
            f"begins with one, got {got}"
        )

    if module not in _EDITS:
        edits: list[Callable[[object], object]] = []

        def hook(_module: nn.Module, _args: object, output: object) -> object:
            for made in edits:
                output = made(output)
            return output

        _EDITS[module] = edits, module.register_forward_hook(hook, prepend=True)
    edits, handle = _EDITS[module]
    edits.append(edit)
    try:
        yield
    finally:
        edits.remove(edit)
        if not edits:
            handle.remove()
            del _EDITS[module]


class Reached(Exception):
    """Ends a forward pass behind the module that was wanted."""


def output_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What the module returns within run(), or the first part of a tuple; the rest is not run.

    ValueError: run() does not run the module.
    """
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        raise Reached

    with edited(module, keep), contextlib.suppress(Reached):
        run()
    if not found:
        raise ValueError(f"expected a model that runs its {type(module).__name__}, got none")
    return found[0]
