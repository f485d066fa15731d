"""fastsae: sparse autoencoders that do only the work that is there.

    from fastsae import SAE, SAEConfig, TopK
    sae = SAE(SAEConfig(d_in=384, d_sae=3072, selection=TopK(32)))
    out = sae(x)                 # out.codes, out.reconstruction, out.loss
    sae.encode(x), sae.decode(codes)
    sae = fastsae.load(path)     # also other libraries' files

`ops` holds the differentiable operations, `reference` says what each computes, `train` the trainer,
`data` the activation sources, `metrics` what is reported.
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, version

from fastsae import cpu
from fastsae.codes import Codes
from fastsae.config import SAEConfig
from fastsae.sae import SAE, SAEOutput
from fastsae.selection import Selection, TopK

try:
    __version__ = version("fastsae-engine")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "unknown"

__all__ = ["SAE", "Codes", "SAEConfig", "SAEOutput", "Selection", "TopK", "__version__", "load"]


def load(path: str | os.PathLike[str]) -> SAE:
    """The SAE in a file or folder of any format that `fastsae.formats` reads, on the CPU."""
    from fastsae import formats

    return formats.read(os.fspath(path))


if not cpu.available():
    warnings.warn(
        f"fastsae runs without its C++ extension fastsae._C ({cpu.missing}), so CPU tensors take "
        "the slow reference path. Install a C++ compiler (gcc or clang) and reinstall "
        "fastsae-engine.",
        stacklevel=2,
    )
