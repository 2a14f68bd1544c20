"""NF4 quantization in plain PyTorch: the definition that faster backends must equal bit for bit.

Format (codebook: Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314, appendix E)
    The weight is flattened and cut into blocks of `block_size` elements; the last block may be
    short. A block is stored as one scale (about its largest magnitude) and one 4-bit code per
    element, the index of the codebook value nearest to element / scale (a tie: the lower code).
    Two codes make a byte, the first element in the high nibble; a missing last one counts as 0.0.

Scales (`scale_format`)
    none       float32, as they are.
    geometric  8 bits each. A group of `scale_block_size` blocks keeps its smallest positive scale
               `lo` and its largest `hi`. Code 0 is a zero block; code k = 1..255 is the float32
               whose bit pattern is
                   bits(lo) + round((k - 1) * (bits(hi) - bits(lo)) / 254).
               Bit patterns of positive floats are ordered and piecewise linear in the logarithm,
               so the grid is nearly geometric: an outlier costs its neighbours next to nothing,
               and integer arithmetic gives the same bits on every backend. round(x) is
               floor(x + 1/2): ((k - 1) * span + 127) // 254.
    bnb        8 bits each, as bitsandbytes' nested ("double") quantization stores them: the mean of
               all scales is the offset; what is left is divided by its largest magnitude in the
               group and coded with the 256 values of `nf4_format.dynamic_codebook`. Codes
               of scales may differ between CPU and GPU, as bitsandbytes' own do.

Round trip
    The decoded scale is rounded to the weight's dtype before it multiplies, and the quantizer
    picks the code whose *rounded* scale is nearest to the block's (the lowest such code). Elements
    are divided by that scale, but the block's largest always gets code 0 or 15, so it decodes to
    the rounded scale exactly; quantizing a dequantized weight then finds the same `lo`, `hi`,
    scale codes and element codes again. Where products leave the normal range of the dtype
    two codes may decode alike, so a block whose rounded scale is below 16 times the smallest normal
    number is decoded and coded a second time, with that scale for its maximum (`_canonical`).
    `bnb` promises none of this: its scales move when it quantizes its own output.

Limits
    Weights are float32, bfloat16 or float16; NaN and infinity raise ValueError. A midpoint is the
    float32 (c[k] + c[k + 1]) / 2. A zero block has code 7 (0.0) throughout, a group of zero blocks
    lo = hi = 0. `search_scales` describes the scale search.

Shapes: n elements, B = ceil(n / block_size) blocks, G = ceil(B / scale_block_size) groups.
    codes        uint8   [ceil(n / 2)]
    scales       uint8   [B]      (float32 for `none`)
    scale_groups float32 [G, 2]   columns lo, hi; for `bnb` largest magnitude, offset; `none` [0, 2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_builders.kernels.formats import NOT_FINITE
from qlora_builders.kernels.nf4_format import (
    NF4Format,
    decode_scales,
    encode_scales,
    num_blocks,
    pad,
)

NF4_CODEBOOK = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
MIDPOINTS = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / 2
# Both values of a byte at once: one gather instead of two gathers, a shift, a mask and a stack.
_BYTE_VALUES = torch.stack(
    [NF4_CODEBOOK.repeat_interleave(16), NF4_CODEBOOK.repeat(16)], dim=1
)  # [256, 2]

SEARCHED_FACTORS = tuple(float(torch.tensor(1 - 0.02 * k, device="cpu")) for k in range(16))

# Elements worked on at once; bounds the float32 and int32 temporaries to about 16 MiB.
_CHUNK_ELEMENTS = 1 << 20


def quantize(weight: Tensor, *, format: NF4Format) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, scale_groups) of a weight of any shape.

    Raises:
        ValueError: if the weight has NaN or infinite elements.
    """
    block_size, dtype = format.block_size, weight.dtype
    flat = weight.reshape(-1)
    absmax = _block_absmax(flat, block_size)
    if not torch.isfinite(absmax).all():
        raise ValueError(NOT_FINITE)
    wanted = search_scales(flat, absmax, block_size) if format.scale_search else absmax
    scales, scale_groups = encode_scales(wanted, format=format, dtype=dtype)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    step = _chunk_elements(block_size, format.scale_block_size)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        blocks = pad(chunk.float(), block_size).view(-1, block_size)
        in_chunk = slice(start // block_size, start // block_size + blocks.shape[0])
        group = start // (block_size * format.scale_block_size)
        decoded = decode_scales(scales[in_chunk], scale_groups[group:], format=format, dtype=dtype)
        if format.scale_format == "bnb":
            element_codes = _bnb_codes(blocks, absmax[in_chunk])
        else:
            element_codes = _nearest_codes(blocks, absmax[in_chunk], decoded)
            element_codes = _canonical(element_codes, decoded, dtype)
        pairs = element_codes.view(-1, 2)[: -(-chunk.numel() // 2)]
        codes[start // 2 : start // 2 + pairs.shape[0]] = pairs[:, 0] << 4 | pairs[:, 1]
    return codes, scales, scale_groups


def dequantize(
    fields: Sequence[Tensor],
    *,
    format: NF4Format,
    shape: Sequence[int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Decoded to `shape`: rounded to the weight's own `dtype`, cast to `out_dtype`."""
    codes, scales, scale_groups = fields
    block_size, numel = format.block_size, math.prod(shape)
    out = torch.empty(numel, dtype=out_dtype, device=codes.device)
    table = _BYTE_VALUES.to(codes.device)
    step = _chunk_elements(block_size, format.scale_block_size)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        block = start // block_size
        chunk_scales = decode_scales(
            scales[block : num_blocks(stop, block_size)],
            scale_groups[block // format.scale_block_size :],
            format=format,
            dtype=dtype,
        )
        values = table.index_select(0, codes[start // 2 : (stop + 1) // 2].int()).view(-1)
        values = pad(values[: stop - start], block_size).view(-1, block_size)
        values = (values * chunk_scales[:, None]).to(dtype).view(-1)
        out[start:stop] = values[: stop - start]
    return out.view(*shape)


def matmul(
    input: Tensor,
    fields: Sequence[Tensor],
    bias: Tensor | None,
    *,
    format: NF4Format,
    shape: Sequence[int],
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`input @ W.T + bias` (transposed) or `input @ W`, in the input's dtype.

    Args:
        input: [m, in] if transposed, else [m, out].
        bias: [out] in the input's dtype, or None; only if transposed.
        shape: (out, in) of the weight.
    """
    weight = dequantize(fields, format=format, shape=shape, dtype=dtype, out_dtype=input.dtype)
    return torch.nn.functional.linear(input, weight, bias) if transposed else input @ weight


def search_scales(flat: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """For every block the scale, of 16 from 1.0 to 0.7 of its maximum, of least squared error.

    Clipping the extremes a little serves the many: on normal weights the error falls by 6 %. The
    first of equal scales is taken, so a weight that was decoded before keeps its scale, where its
    error is zero. Errors are relative to the maximum (no overflow) and added up by halves, in an
    order that every backend can repeat.
    """
    best = absmax.clone()
    step = _chunk_elements(block_size, 1)
    for start in range(0, flat.numel(), step):
        blocks = pad(flat[start : start + step].float(), block_size).view(-1, block_size)
        in_chunk = slice(start // block_size, start // block_size + blocks.shape[0])
        peak = absmax[in_chunk]
        divisor = torch.where(peak > 0, peak, torch.inf)[:, None]
        least = torch.full_like(peak, torch.inf)
        for factor in SEARCHED_FACTORS:
            scale = (peak * factor).to(flat.dtype).float()
            codes = _nearest_codes(blocks, peak, scale)
            decoded = NF4_CODEBOOK.to(codes.device)[codes.int()] * scale[:, None]
            error = ((blocks - decoded.to(flat.dtype).float()) / divisor).square()
            while error.shape[1] > 1:
                error = error[:, : error.shape[1] // 2] + error[:, error.shape[1] // 2 :]
            better = error[:, 0] < least
            least = torch.where(better, error[:, 0], least)
            best[in_chunk] = torch.where(better, scale, best[in_chunk])
    return best


def _block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """Largest magnitude of every block, float32 [B]; NaN where a block has one."""
    absmax = torch.empty(
        num_blocks(flat.numel(), block_size), dtype=torch.float32, device=flat.device
    )
    step = _chunk_elements(block_size, 1)
    for start in range(0, flat.numel(), step):
        blocks = pad(flat[start : start + step], block_size).view(-1, block_size)
        block = start // block_size
        absmax[block : block + blocks.shape[0]] = blocks.abs().amax(dim=1)
    return absmax


def _nearest_codes(blocks: Tensor, absmax: Tensor, scale: Tensor) -> Tensor:
    """Codes uint8 nearest to blocks [B, block_size] / scale [B], with the block maxima at +-1.

    A zero block gets the code of 0.0.
    """
    positive = scale > 0
    absmax = torch.where(positive, absmax, torch.inf)[:, None]
    scale = torch.where(positive, scale, torch.inf)[:, None]
    normalized = torch.where(blocks.abs() >= absmax, blocks.sign(), blocks / scale)
    return _bucketize(normalized)


def _bnb_codes(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Times the reciprocal, as bitsandbytes has it; for subnormals that is infinite, 0 * inf -1."""
    absmax = torch.where(absmax > 0, absmax, torch.inf)[:, None]
    return _bucketize((blocks * (1 / absmax)).nan_to_num(nan=-torch.inf))


def _bucketize(normalized: Tensor) -> Tensor:
    """Number of midpoints strictly below; a tie goes to the lower code."""
    midpoints = MIDPOINTS.to(normalized.device)
    return torch.bucketize(normalized, midpoints, out_int32=True).to(torch.uint8)


def _canonical(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes that quantizing the decoded block gives again.

    Only blocks with products below the dtype's normal range can differ; the smallest non-zero
    codebook magnitude is 0.0796, so a scale of 16x the smallest normal number is safe.
    """
    tiny = scale < 16 * torch.finfo(dtype).tiny
    decoded = (NF4_CODEBOOK.to(codes.device)[codes.int()] * scale[:, None]).to(dtype).float()
    return torch.where(tiny[:, None], _nearest_codes(decoded, scale, scale), codes)


def _chunk_elements(block_size: int, scale_block_size: int) -> int:
    """Whole groups of blocks (so that no chunk splits one), at least one, and an even number."""
    group = 2 * block_size * scale_block_size
    return max(1, _CHUNK_ELEMENTS // group) * group
