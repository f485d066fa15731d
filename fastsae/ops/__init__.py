"""The differentiable operations: thin autograd Functions over the backends.

`encode` and `decode` (and `reconstruction_error`, decode fused with the squared error) accept any
subset of inputs that require gradients. Indices are not differentiable, and neither are gradients:
a second backward raises. Each backend call is a registered custom op with a fake kernel, so
torch.compile traces through.

Backends are "reference" (torch, any device and dtype), "cpu" (C++; float32 and bfloat16 on a CPU)
and "triton" (float32, bfloat16 and float16 on a GPU). `backend=None` takes "cpu" or "triton" where
they can and else "reference".

    encoding.py   encode, encode_batch, encode_columns, encode_threshold, encode_groups
    decoding.py   decode, reconstruction_error, pair_dots
    gradients.py  row gradients as pairs, blocks, or dense; of_latents, latent_sums, column_sum
    updating.py   adam_, gradient_square_norm, project_rows_, normalize_rows_, inverse_index
    backend.py    the choice of backend
"""

from fastsae.ops.backend import BACKENDS, PRECISIONS, TRITON_DTYPES, Precision, choose_backend
from fastsae.ops.decoding import decode, pair_dots, reconstruction_error
from fastsae.ops.encoding import (
    encode,
    encode_batch,
    encode_columns,
    encode_groups,
    encode_threshold,
)
from fastsae.ops.gradients import (
    BlockGradient,
    RowGradient,
    RowGradientReceiver,
    collect_row_gradients,
    column_sum,
    hand_over,
    latent_sums,
    of_latents,
    set_sparse_gradient,
)
from fastsae.ops.updating import (
    adam_,
    gradient_square_norm,
    inverse_index,
    normalize_rows_,
    project_rows_,
)

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "TRITON_DTYPES",
    "BlockGradient",
    "Precision",
    "RowGradient",
    "RowGradientReceiver",
    "adam_",
    "choose_backend",
    "collect_row_gradients",
    "column_sum",
    "decode",
    "encode",
    "encode_batch",
    "encode_columns",
    "encode_groups",
    "encode_threshold",
    "gradient_square_norm",
    "hand_over",
    "inverse_index",
    "latent_sums",
    "normalize_rows_",
    "of_latents",
    "pair_dots",
    "project_rows_",
    "reconstruction_error",
    "set_sparse_gradient",
]
