r"""Products with packed ternary weights in Triton: two bits a weight come from memory, the tensor cores do the rest.

| function         | computes                                              | definition in `lowbit.ternary`    |
|------------------|-------------------------------------------------------|-----------------------------------|
| `quantise`       | int8 codes and scale s of every token                 | `int8_codes`, `absmax_scale`      |
| `ternary_matmul` | (x Tᵀ)·β, or (x_q Tᵀ)·β/s; with factors plus tBᵀ      | `packed_matmul`, `packed_linear`  |
| `unpacked`       | βT as a matrix                                        | `unpack`                          |

**How.** A byte holds one weight of each of four planes: columns j, j+P, j+2P, j+3P of a row, P = ⌈n/4⌉. So one loaded
byte meets four pieces of x that each lie side by side in memory, and the four products share one accumulator. Weights
are the *left* operand of the matrix instruction: there Hopper takes registers, so the unpacked weights never touch
shared memory again. Unpacking costs two instructions for four int8 weights, six for four bfloat16 ones.

- Few rows (`_decode`): the time is that of reading the packed bytes. A block keeps `BM` rows of weights to itself and
  its warps split the columns, so that nothing is summed across blocks and the result does not depend on timing.
- Many rows (`_prefill`): the usual tiling; a tile of weights is unpacked once for `ROWS` rows of x.
- Very many rows in 16 bits: unpacking is done once, into a temporary βT in x's dtype, and cuBLAS multiplies.

Sums of int8 products are int32, exact, and scaled in float32 exactly as in the definition: the same bits. Sums of
bfloat16 and float16 products are float32. Works on any shape; rows of x need contiguous entries, else they are copied.
Kernels are launched on the GPU that holds x, whichever is the current one. They run on NVIDIA's cards from compute
capability 8.0 on (`kernels.takes_card`). Triton's interpreter (`TRITON_INTERPRET=1`) runs all of it on a CPU; there the
unpacking is written in plain operations instead of inline PTX.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_ref.kernels import EPS, INTERPRETED, launch_options, runs_on

PTX = tl.constexpr(not INTERPRETED)
#: Rows of x from which a 16-bit product unpacks the weights once for cuBLAS.
UNPACK_FROM = 1024

# The same three steps for four bytes in one register.
_NEXT = tl.constexpr("shr.b32 $0, $1, 2;")
_TO_INT8 = tl.constexpr("and.b32 $0, $1, 0x03030303;")
# A code c becomes the 16-bit number 128 + c (its lowest mantissa bits are c) by moving bytes; then 129 is subtracted.
# 1·x - 129 is exact, and as fast as a subtraction, which for bfloat16 only Hopper and later cards have.
_TO_BF16 = tl.constexpr(
    "{.reg .b32 t, u, v, o, q; mov.b32 o, 0x3F803F80; mov.b32 q, 0xC301C301; and.b32 t, $2, 0x03030303;"
    "prmt.b32 u, t, 0x43434343, 0x4140; prmt.b32 v, t, 0x43434343, 0x4342;"
    "fma.rn.bf16x2 $0, u, o, q; fma.rn.bf16x2 $1, v, o, q;}"
)
_TO_FP16 = tl.constexpr(  # 1024 + c, minus 1025
    "{.reg .b32 t, u, v, q; mov.b32 q, 0x64016401; and.b32 t, $2, 0x03030303;"
    "prmt.b32 u, t, 0x64646464, 0x4140; prmt.b32 v, t, 0x64646464, 0x4342; sub.f16x2 $0, u, q; sub.f16x2 $1, v, q;}"
)


@triton.jit
def _next_plane(w):
    """Bring the next plane's codes to the lowest two bits of every byte."""
    if PTX:
        return tl.inline_asm_elementwise(_NEXT, "=r,r", [w], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return w >> 2


@triton.jit
def _add_product(acc, w, part):
    """Add the product of the lowest two bits of w, a tile of weights, with a piece of x.

    For int8 the weights go in as w + 1; the sum of x is subtracted in the end.
    """
    if part.dtype == tl.int8:
        if PTX:
            T = tl.inline_asm_elementwise(_TO_INT8, "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
        else:
            T = (w & 3).to(tl.int8)
    elif not PTX:  # the interpreter multiplies no bfloat16
        T = (w & 3).to(tl.float32) - 1
        part = part.to(tl.float32)
    elif part.dtype == tl.bfloat16:
        T = tl.inline_asm_elementwise(_TO_BF16, "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        T = tl.inline_asm_elementwise(_TO_FP16, "=r,=r,r", [w], dtype=tl.float16, is_pure=True, pack=4)
    return tl.dot(T, part, acc, out_dtype=acc.dtype)


@triton.jit
def _finish(
    acc,
    x_sum,
    beta,
    scale,
    B,
    t,
    y,
    i,
    r,
    rows,
    m,
    stride_y,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """Scale the sums, add tBᵀ and store: y[r, i] for the rows r of x and the rows i of weights."""
    inside = (i[:, None] < m) & (r[None, :] < rows)
    b = tl.load(beta + i * PER_ROW, mask=i < m, other=0.0)[:, None]
    if WIDE:  # int8: the codes were w + 1, so the sum of x is in the way; it is int32 and exact
        acc = acc - tl.load(x_sum + r, mask=r < rows, other=0)[None, :]
        s = tl.load(scale + r, mask=r < rows, other=1.0)[None, :]
        if PER_ROW:
            b = tl.div_rn(tl.broadcast_to(b, acc.shape), tl.broadcast_to(s, acc.shape))
        else:
            b = tl.div_rn(tl.load(beta) + tl.zeros_like(s), s)
    out = acc.to(tl.float32) * b
    if RANK:
        CHUNK: tl.constexpr = min(RANK, 32)  # a tile of all ranks would not fit into shared memory
        for start in tl.range(0, RANK, CHUNK, num_stages=1):
            k = start + tl.arange(0, CHUNK)
            left = tl.load(B + i[:, None] * RANK + k[None, :], mask=i[:, None] < m, other=0.0).to(tl.float32)
            right = tl.load(t + r[None, :] * RANK + k[:, None], mask=r[None, :] < rows, other=0.0).to(tl.float32)
            out = tl.dot(left, right, out, input_precision="ieee")
    at = y + r[None, :].to(tl.int64) * stride_y + i[:, None]
    tl.store(at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _decode(
    x, packed, beta, scale, x_sum, B, t, y, rows, m, n, planes, stride_x, stride_p, stride_y,
    ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    RANK: tl.constexpr, WIDE: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """A block computes y[:, i] for BM rows i of weights; slice s of the accumulator takes every SPLIT-th piece."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, SPLIT)[:, None] * BK + tl.arange(0, BK)[None, :]
    r = tl.arange(0, ROWS)
    row = packed + i.to(tl.int64)[None, :, None] * stride_p
    token = x + r.to(tl.int64)[None, None, :] * stride_x
    acc = tl.zeros([SPLIT, BM, ROWS], dtype=tl.int32 if WIDE else tl.float32)
    for start in range(0, planes, SPLIT * BK):
        j = start + k
        if EVEN:
            w = tl.load(row + j[:, None, :])
        else:  # what is read as code 0 beyond the edge meets zeros of x
            w = tl.load(row + j[:, None, :], mask=(i[None, :, None] < m) & (j[:, None, :] < planes), other=0)
        for p in tl.static_range(4):
            c = j + p * planes
            mask = r[None, None, :] < rows
            if not EVEN:
                mask = mask & (c[:, :, None] < n) & (j[:, :, None] < planes)
            part = tl.load(token + c[:, :, None], mask=mask, other=0)
            acc = _add_product(acc, w, part)
            w = _next_plane(w)
    total = tl.sum(acc, axis=0)
    _finish(total, x_sum, beta, scale, B, t, y, i, r, rows, m, stride_y, RANK, WIDE, PER_ROW)


@triton.jit(do_not_specialize=["rows"])
def _prefill(
    x, packed, beta, scale, x_sum, B, t, y, rows, m, n, planes, stride_x, stride_p, stride_y,
    ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    RANK: tl.constexpr, WIDE: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """A block computes a (ROWS, BM) tile of y."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BK)
    row = packed + i.to(tl.int64)[:, None] * stride_p
    token = x + r.to(tl.int64)[None, :] * stride_x
    acc = tl.zeros([BM, ROWS], dtype=tl.int32 if WIDE else tl.float32)
    for start in range(0, planes, BK):
        j = start + k
        if EVEN:
            w = tl.load(row + j[None, :])
        else:
            w = tl.load(row + j[None, :], mask=(i[:, None] < m) & (j[None, :] < planes), other=0)
        for p in tl.static_range(4):
            c = j + p * planes
            if EVEN:
                part = tl.load(token + c[:, None])
            else:
                mask = (r[None, :] < rows) & (c[:, None] < n) & (j[:, None] < planes)
                part = tl.load(token + c[:, None], mask=mask, other=0)
            acc = _add_product(acc, w, part)
            w = _next_plane(w)
    _finish(acc, x_sum, beta, scale, B, t, y, i, r, rows, m, stride_y, RANK, WIDE, PER_ROW)


@triton.jit
def _quantise(x, codes, scale, x_sum, n, stride_x, eps, BLOCK: tl.constexpr):
    """One block a token: s = 127/max abs x, round(s·x) to even, and the sum of the codes.

    The maximum is that of the bits of abs x, whole numbers in the order of the values, infinity and NaN above all. Both
    make s, and with it all results of the token, NaN, as in the definition.
    """
    token = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    row = x + token.to(tl.int64) * stride_x
    peak = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, n, BLOCK):
        v = tl.load(row + start + k, mask=start + k < n, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    top = tl.max(peak, axis=0).to(tl.float32, bitcast=True)
    s = 127.0 * tl.div_rn(1.0, tl.maximum(top, eps)) + (top - top)  # how PyTorch divides a number by a tensor
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, n, BLOCK):
        v = tl.load(row + start + k, mask=start + k < n, other=0.0).to(tl.float32) * s
        q = (v + 12582912.0) - 12582912.0  # 1.5·2²³: the sum has no bits left for a fraction, and rounds half to even
        q = tl.minimum(tl.maximum(tl.where(q == q, q, 0.0), -128.0), 127.0).to(tl.int32)
        tl.store(codes + token.to(tl.int64) * n + start + k, q.to(tl.int8), mask=start + k < n)
        total += q
    tl.store(scale + token, s)
    tl.store(x_sum + token, tl.sum(total, axis=0))


@triton.jit
def _unpack(packed, beta, W, m, n, planes, stride_p, beta_stride, BM: tl.constexpr, BK: tl.constexpr):
    """Write W = βT, a tile of BM rows and four pieces of BK columns a block."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (i[:, None] < m) & (j[None, :] < planes)
    w = tl.load(packed + i.to(tl.int64)[:, None] * stride_p + j[None, :], mask=inside, other=0)
    b = tl.load(beta + i * beta_stride, mask=i < m, other=0.0)[:, None]
    for p in tl.static_range(4):
        c = j + p * planes
        value = ((w >> (2 * p)) & 3).to(tl.float32) - 1
        at = W + i.to(tl.int64)[:, None] * n + c[None, :]
        tl.store(at, (value * b).to(W.dtype.element_ty), mask=inside & (c[None, :] < n))


def quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the int8 codes (rows, n), the scale s (rows,) and the sum of the codes (rows,) of every token.

    Args:
        x: (rows, n), floating point of at most 32 bits.
    """
    x = _rows_contiguous(x)
    rows, n = x.shape
    codes = torch.empty(rows, n, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    x_sum = torch.empty(rows, dtype=torch.int32, device=x.device)
    block = min(triton.next_power_of_2(n), 8192)
    warps = max(1, min(8, block // 512))
    # Without fusion into one multiply-add: the product is rounded to float32 before it is rounded to a whole number.
    options = launch_options({"num_warps": warps, "enable_fp_fusion": False})
    with torch.cuda.device_of(x):
        _quantise[(rows,)](x, codes, scale, x_sum, n, x.stride(0), EPS, BLOCK=block, **options)
    return codes, scale, x_sum


def unpacked(packed: Tensor, n: int, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return βT (m, n) in a dtype; β of 1 gives T. A β in 16 bits is rounded, as it would be in a dense weight."""
    m, planes = packed.shape
    W = torch.empty(m, n, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(m, 16), triton.cdiv(planes, 256))
    with torch.cuda.device_of(packed):
        _unpack[grid](packed, beta, W, m, n, planes, packed.stride(0), int(beta.numel() > 1), BM=16, BK=256)
    return W


def ternary_matmul(
    x: Tensor,
    packed: Tensor,
    beta: Tensor,
    *,
    scale: Tensor | None = None,
    x_sum: Tensor | None = None,
    B: Tensor | None = None,
    t: Tensor | None = None,
    dtype: torch.dtype | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:
    """Return (x Tᵀ)·β of shape (rows, m), for int8 codes x divided by s, and with factors plus t Bᵀ in the same pass.

    Args:
        x: (rows, n) bfloat16 or float16 activations, or int8 codes from `quantise`.
        packed: (m, ⌈n/4⌉) bytes of `lowbit.ternary.pack`.
        beta: β, one float32 number, or one for each of the m rows.
        scale: s (rows,) of int8 codes; x_sum: their sums (rows,).
        B, t: (m, r) and (rows, r), floating point, added as t Bᵀ in float32; t carries the gate.
        dtype: of the result; x's, or float32 for int8 codes, unless given.
        config: block sizes instead of the tuned ones.

    Raises:
        TypeError: x of another dtype. ValueError: shapes that do not fit, int8 codes without s and sums, one factor,
            tensors of different devices, or a card that runs no kernel.
    """
    _check(x, packed, beta, scale, x_sum, B, t)
    x = _rows_contiguous(x)
    (rows, n), (m, planes) = x.shape, packed.shape
    dtype = dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype)
    if config is None and B is None and rows >= UNPACK_FROM and dtype == x.dtype != torch.int8:
        return x @ unpacked(packed, n, beta, x.dtype).T
    y = torch.empty(rows, m, dtype=dtype, device=x.device)
    rank = 0
    if B is not None and t is not None and B.shape[1]:
        rank = max(16, triton.next_power_of_2(B.shape[1]))
        B, t = (torch.nn.functional.pad(f, (0, rank - f.shape[1])).contiguous() for f in (B, t))
    config = config or tuned(rows, m, x.dtype == torch.int8)
    tile, block, split = config["BM"], config["BK"], config.get("SPLIT", 1)
    even = m % tile == 0 and planes % (block * split) == 0 and n == 4 * planes
    grid: tuple[int, ...] = (triton.cdiv(m, tile),)
    kernel: Any = _decode
    if "SPLIT" not in config:
        kernel, grid = _prefill, (*grid, triton.cdiv(rows, config["ROWS"]))
        even = even and rows % config["ROWS"] == 0
    with torch.cuda.device_of(x):
        kernel[grid](
            *(x, packed, beta, scale, x_sum, B, t, y, rows, m, n, planes),
            *(x.stride(0), packed.stride(0), y.stride(0)),
            **launch_options(config), EVEN=even, RANK=rank, WIDE=x.dtype == torch.int8, PER_ROW=int(beta.numel() > 1),
        )  # fmt: skip
    return y


def tuned(rows: int, m: int, int8: bool) -> dict[str, int]:
    """Return the block sizes that were fastest, or next to it, on an H100 for such a shape."""
    if rows <= 16:
        sizes = {"ROWS": 8 if rows <= 8 else 16, "SPLIT": 2, "num_warps": 2, "num_stages": 3}
        if int8:
            return {**sizes, "BM": 16 if m < 12288 or rows == 1 else 32, "BK": 128}
        return {**sizes, "BM": 16, "BK": 64} if m < 8192 else {**sizes, "BM": 32, "BK": 128 if rows <= 8 else 64}
    if rows <= 128:
        return {"ROWS": 64, "BM": 64, "BK": 64, "num_warps": 4, "num_stages": 4 if int8 else 3}
    if not int8:
        return {"ROWS": 128, "BM": 128, "BK": 32, "num_warps": 8, "num_stages": 3}
    if m * rows < 132 * 128 * 128:  # too few large tiles for all multiprocessors
        return {"ROWS": 64, "BM": 128, "BK": 64, "num_warps": 8, "num_stages": 4}
    return {"ROWS": 128, "BM": 128, "BK": 64, "num_warps": 4, "num_stages": 3}


def _rows_contiguous(x: Tensor) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (rows, n)")
    return x if x.stride(1) == 1 else x.contiguous()


def _check(x: Tensor, packed: Tensor, beta: Tensor, scale: Any, x_sum: Any, B: Any, t: Any) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.int8):
        raise TypeError(f"x: got dtype {x.dtype}, wanted bfloat16, float16 or int8 codes")
    if packed.dtype != torch.uint8 or packed.ndim != 2 or x.ndim != 2 or packed.shape[1] != (x.shape[1] + 3) // 4:
        raise ValueError(
            f"packed: got {packed.dtype} of shape {tuple(packed.shape)} for x of shape {tuple(x.shape)}, "
            "wanted uint8 (m, ⌈n/4⌉) for (rows, n)"
        )
    if packed.stride(1) != 1 or 0 in x.shape:
        raise ValueError(f"packed, x: got strides {packed.stride()}, rows {len(x)}, wanted contiguous bytes, rows >= 1")
    if beta.dtype != torch.float32 or beta.numel() not in (1, len(packed)):
        raise ValueError(f"beta: got {beta.numel()} numbers of {beta.dtype}, wanted 1 or {len(packed)} of float32")
    if (x.dtype == torch.int8) != (scale is not None and x_sum is not None):
        raise ValueError("scale, x_sum: wanted both for int8 codes, and none for 16-bit activations")
    for name, tensor in {"packed": packed, "beta": beta, "scale": scale, "x_sum": x_sum, "B": B, "t": t}.items():
        if tensor is not None and tensor.device != x.device:  # an address means nothing elsewhere
            raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted {x.device}, where x is")
    if not runs_on(x.device):
        raise ValueError(f"x: got one on {x.device}, wanted a card of compute capability 8.0 or more, from NVIDIA")
    if (B is None) != (t is None):
        raise ValueError("B, t: got one of the two, wanted both or none")
    if B is not None and (B.shape[0], *t.shape) != (len(packed), len(x), B.shape[1]):
        raise ValueError(f"B, t: got shapes {tuple(B.shape)} and {tuple(t.shape)}, wanted (m, r) and (rows, r)")
