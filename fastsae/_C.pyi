from collections.abc import Callable

from torch import Tensor

def isas() -> list[str]: ...
def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    guide: Tensor | None,
    W_dec: Tensor | None,
    vals: Tensor,
    idx: Tensor,
    screen: str,
    rounded: bool,
    threads: int,
    block_tokens: int = 0,
    isa: str = "",
) -> None: ...
def encode_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    vals: Tensor,
    idx: Tensor,
    row_ptr: Tensor,
    screen: str,
    rounded: bool,
    threads: int,
    block_tokens: int = 0,
    isa: str = "",
) -> None: ...
def encode_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budgets: Tensor,
    vals: Tensor,
    idx: Tensor,
    row_ptr: Tensor,
    screen: str,
    rounded: bool,
    threads: int,
    block_tokens: int = 0,
    isa: str = "",
) -> None: ...
def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    thresholds: Tensor,
    limit: int | None,
    allocate: Callable[[int], tuple[Tensor, Tensor]],
    row_ptr: Tensor,
    screen: str,
    rounded: bool,
    threads: int,
    block_tokens: int = 0,
    isa: str = "",
) -> tuple[Tensor, Tensor] | None: ...
def decode_fwd(
    vals: Tensor,
    idx: Tensor,
    row_ptr: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    out: Tensor,
    threads: int,
    isa: str = "",
) -> None: ...
def decode_error(
    vals: Tensor,
    idx: Tensor,
    row_ptr: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    error: Tensor,
    reconstruction: Tensor | None,
    dvals: Tensor | None,
    threads: int,
    isa: str = "",
) -> float: ...
def decode_bwd_vals(
    g: Tensor,
    idx: Tensor,
    row_ptr: Tensor | None,
    W_dec: Tensor,
    dvals: Tensor,
    threads: int,
    isa: str = "",
) -> None: ...
def auction(
    values: Tensor, columns: Tensor, step: float, partners: Tensor, prices: Tensor
) -> None: ...
def build_index(
    idx: Tensor,
    row_ptr: Tensor | None,
    n_tokens: int,
    latent_ptr: Tensor,
    token: Tensor,
    entry: Tensor,
    threads: int,
    isa: str = "",
) -> None: ...
def row_gradients(
    latent_ptr: Tensor,
    token: Tensor,
    entry: Tensor,
    coef: Tensor,
    src: Tensor,
    rows: Tensor | None,
    coef_sums: Tensor | None,
    threads: int,
    isa: str = "",
) -> None: ...
def column_sum(
    m: Tensor, coef: Tensor | None, out: Tensor, threads: int, isa: str = ""
) -> None: ...
def project_rows(grad: Tensor, W_dec: Tensor, threads: int, isa: str = "") -> None: ...
def normalize_rows(W_dec: Tensor, threads: int, isa: str = "") -> None: ...
def gradient_square_norm(
    p: Tensor,
    dense: Tensor | None,
    segments: list[tuple[Tensor, ...]],
    project: bool,
    threads: int,
    isa: str = "",
) -> float: ...
def adam(
    p: Tensor,
    m: Tensor | None,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    last: Tensor,
    dense: Tensor | None,
    segments: list[tuple[Tensor, ...]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    step: int,
    first_row: int,
    lazy: bool,
    project: bool,
    normalize: bool,
    stochastic_rounding: bool,
    threads: int,
    isa: str = "",
) -> None: ...
