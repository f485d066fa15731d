"""Dead latents start anew where the reconstruction is worst (Bricken et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.sae import SAE


@torch.no_grad()
def resample_dead_(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor | None = None,
    *,
    seed: int = 0,
    parts: int = 1,
) -> int:
    """Gives each dead latent the direction of a badly reconstructed token; returns how many.

    A latent is dead as for the AuxK loss: tokens_since_fired ≥ config.dead_after. Tokens of x
    (n, D) are drawn, each at most once while there are enough, with probability proportional to
    ‖x - x̂‖ (as in dictionary_learning; the report squares it). The row of W_enc becomes the token,
    centred as the encoder sees it, at 0.2 times the mean norm of the rows of live latents; that of
    W_dec its direction, at norm 1 (for a transcoder that of the target); b_enc 0, and what the rule
    holds of the latent as at the start. The optimiser's moments of all these become 0. Errors are
    taken of one of `parts` parts of the tokens after the other, as a step does with its batch.
    """
    dead = (sae.tokens_since_fired >= sae.config.dead_after).nonzero()[:, 0]
    if len(dead) == 0 or len(x) == 0:
        return 0
    was_training = sae.training
    sae.eval()
    y = x if target is None else target
    lengths = []
    for some, wanted in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        output = sae.losses(some, None if target is None else wanted, reconstruct=True)
        assert output.reconstruction is not None
        lengths.append((wanted - output.reconstruction).float().norm(dim=1))
    errors = torch.cat(lengths).double().cpu()
    sae.train(was_training)
    if not bool(errors.sum() > 0):
        return 0
    generator = torch.Generator().manual_seed(seed)
    enough = int((errors > 0).sum()) >= len(dead)
    drawn = torch.multinomial(errors, len(dead), replacement=not enough, generator=generator)
    drawn = drawn.to(x.device)

    is_live = torch.ones(sae.config.d_sae, dtype=torch.bool, device=dead.device)
    is_live[dead] = False
    norms = sae.W_enc.float().norm(dim=1)
    live_norm = norms[is_live].mean() if bool(is_live.any()) else norms.new_ones(())
    tokens = x[drawn].float() * sae.input_scale
    outputs = y[drawn].float() * sae._out_scale - sae.b_dec.float()
    if sae.config.apply_b_dec_to_input:
        tokens = tokens - sae.b_dec.float()
    encoder = torch.nn.functional.normalize(tokens, dim=1) * (0.2 * live_norm)
    sae.W_enc[dead] = encoder.to(sae.W_enc.dtype)
    sae.W_dec[dead] = torch.nn.functional.normalize(outputs, dim=1).to(sae.W_dec.dtype)
    if sae.b_enc is not None:
        sae.b_enc[dead] = 0
    sae.config.selection.restart_(sae.selection_state, dead)
    own = [p for p in sae.selection_state.parameters() if p.ndim == 1]
    for p in (sae.W_enc, sae.W_dec, sae.b_enc, *own):
        state = {} if p is None else optimizer.state.get(p, {})
        for name, moment in state.items():
            if name.startswith("exp_avg"):
                moment[dead] = 0
    sae.tokens_since_fired[dead] = 0
    return len(dead)
