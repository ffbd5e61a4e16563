"""Products of real 8-bit numbers: PyTorch's scaled float8 product and its int8 product, beside their definitions.

The definitions convert the stored 8-bit numbers back and multiply in float32: what the hardware has to meet, up to the
precision of its sums. On a GPU with float8 units (compute capability 8.9 or more) `torch._scaled_mm` computes.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lowrank_ref.core.checks import check_matrix

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def to_float8(
    x: Float[Tensor, "m n"], dtype: torch.dtype = torch.float8_e4m3fn, *, rows: bool = False
) -> tuple[Shaped[Tensor, "m n"], Float[Tensor, "..."]]:
    """Return q in float8 and s in float32 with x ≈ s·q: the largest magnitude of the tensor, or of each row, fills q.

    Values are clamped before the cast: that of E5M2 overflows to infinity.

    Raises:
        ValueError: another dtype, or x is no matrix.
    """
    if dtype not in FLOAT8:
        raise ValueError(f"dtype: got {dtype}, wanted one of {FLOAT8}")
    if x.ndim != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted a matrix (m, n)")
    top = torch.finfo(dtype).max
    peak = x.abs().amax(1, keepdim=True) if rows else x.abs().amax()
    s = (peak.float() / top).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / s).clamp(-top, top).to(dtype), s


def takes_scaled(device: torch.device) -> bool:
    """Tell whether `torch._scaled_mm` multiplies float8 here: a CUDA device of capability 8.9 or more."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_product(
    x: Shaped[Tensor, "t n"],
    x_scale: Float[Tensor, "..."],
    W: Shaped[Tensor, "m n"],
    W_scale: Float[Tensor, "..."],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "t m"]:
    """Return (s_x·x)(s_W·W)ᵀ of float8 matrices; scales one each, or one a row in both.

    The GPU's product wants t, m, n divisible by 16 and at most one factor in E5M2; with a scale a row also W in E4M3
    and a result in bfloat16. For other shapes and pairs, and elsewhere, the definition computes.

    Raises:
        ValueError: no float8 matrices of one width.
    """
    if x.dtype not in FLOAT8 or W.dtype not in FLOAT8 or x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        got = f"{x.dtype} {tuple(x.shape)}, {W.dtype} {tuple(W.shape)}"
        raise ValueError(f"x, W: got {got}, wanted float8 matrices (t, n) and (m, n)")
    fits = not any(size % 16 for size in (*x.shape, W.shape[0]))
    fits &= torch.float8_e4m3fn in (x.dtype, W.dtype)
    fits &= x_scale.ndim == 0 or (W.dtype, out_dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    if fits and takes_scaled(x.device):
        scales = x_scale, W_scale if W_scale.ndim == 0 else W_scale.mT.contiguous()
        return torch._scaled_mm(x.contiguous(), W.contiguous().mT, *scales, out_dtype=out_dtype)
    return scaled_definition(x, x_scale, W, W_scale).to(out_dtype)


def scaled_definition(
    x: Shaped[Tensor, "t n"], x_scale: Float[Tensor, "..."], W: Shaped[Tensor, "m n"], W_scale: Float[Tensor, "..."]
) -> Float[Tensor, "t m"]:
    """Return the same from float32 numbers, in float32."""
    return (x.float() @ W.float().mT) * x_scale * (W_scale if W_scale.ndim == 0 else W_scale.mT)


def float8_product(
    x: Float[Tensor, "t n"],
    W: Float[Tensor, "m n"],
    *,
    x_dtype: torch.dtype = torch.float8_e4m3fn,
    W_dtype: torch.dtype = torch.float8_e4m3fn,
    rows: bool = False,
) -> Float[Tensor, "t m"]:
    """Return x·Wᵀ with both rounded to float8 at their own scales, in x's dtype."""
    return scaled_product(*to_float8(x, x_dtype, rows=rows), *to_float8(W, W_dtype, rows=rows), out_dtype=x.dtype)


def int8_product(x: Float[Tensor, "t n"], W: Float[Tensor, "m n"]) -> Float[Tensor, "t m"]:
    """Return x·Wᵀ with both rounded to int8 at one scale a row; sums are exact whole numbers.

    CUDA wants more than 16 rows in x, and m, n divisible by 8.

    Raises:
        TypeError, ValueError: no finite matrices of floating point.
    """
    found = []
    for name, M in (("x", x), ("W", W)):
        check_matrix(name, M)
        s = (M.abs().amax(1, keepdim=True).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
        found.append(((M.float() / s).round().to(torch.int8), s))
    (q, s), (p, r) = found
    return (torch._int_mm(q, p.mT).float() * s * r.mT).to(x.dtype)
