"""What the tests of the Triton encoders share: what the oracle reads, and budgets of resources."""

from types import ModuleType

import torch
from aot import TARGETS, compiled
from encoders import Case, pre_activations
from torch import Tensor


def for_reference(case: Case, precision: str = "screened") -> tuple[Tensor, Tensor, None]:
    """x, W and b of which the reference makes all values of a case in the promised order.

    They are tokens of pre-activations, and latents that read one each.
    """
    if precision == "bf16":
        case = case._replace(x=case.x.bfloat16(), W_enc=case.W_enc.bfloat16())
    h = torch.from_numpy(pre_activations(case))
    return h, torch.eye(h.shape[1]), None


def few(case: Case, n_tokens: int = 3, n_latents: int = 110) -> Case:
    """Its last tokens and first latents: the interpreter takes long for each."""
    b = None if case.b_enc is None else case.b_enc[:n_latents]
    return case._replace(x=case.x[-n_tokens:], W_enc=case.W_enc[:n_latents], b_enc=b)


def shipped(modules: dict[str, ModuleType]) -> list[tuple[str, str, str]]:
    """Of all variants those that are launched: not wide tiles on an MI300."""
    every = [(m, v, t) for m, of in modules.items() for v in of.variants() for t in TARGETS]
    return [(m, v, t) for m, v, t in every if not (t == "MI300" and v.endswith("-wide"))]


def check_compiled(module: str, variant: str, target: str) -> None:
    used = compiled(f"fastsae.kernels.{module}", variant, TARGETS[target])
    assert used["registers"] <= 255
    # Bytes of a thread, where tiles fill the registers of what they were not tuned for.
    spills = {"screen": 240, "select": 240, "rescan": 240, "keys": 160, "stream_columns": 16}
    spills["encode_threshold"] = 160 if variant.startswith("bits") else 0
    assert used["spills"] <= (0 if target == "H100" else spills.get(module, 0))
    assert used["shared"] <= {"A100": 163, "MI300": 64}.get(target, 227) << 10
    two_on_an_sm = ("bf16-32", "bf16-32-bias", "bf16-32-latents", "bits-bf16")
    if target == "H100" and variant in two_on_an_sm:
        assert used["registers"] <= 128 and used["shared"] <= 113 << 10
    # Integers of histograms, in memory of the program or of all.
    assert used["atomics"] == 0 or variant.startswith(("histogram", "bound", "latent"))
