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
               and integer arithmetic gives the same bits on every backend.
    bnb        8 bits each, as bitsandbytes' nested ("double") quantization stores them: the mean of
               all scales is the offset; what is left is divided by its largest magnitude in the
               group and coded with the 256 values of `dynamic_codebook`.

Round trip
    The decoded scale is rounded to the weight's dtype before it multiplies, and the quantizer
    picks the code whose *rounded* scale is nearest to the block's (the lowest such code). Elements
    are divided by that scale, but the block's largest always gets code 0 or 15, so it decodes to
    the rounded scale exactly; quantizing a dequantized weight then finds the same `lo`, `hi`,
    scale codes and element codes again. Where products leave the normal range of the dtype
    two codes may decode alike; `_canonical` then picks the one that a second pass would pick.
    `bnb` promises none of this: its scales move when it quantizes its own output.

Shapes: n elements, B = ceil(n / block_size) blocks, G = ceil(B / scale_block_size) groups.
    codes        uint8   [ceil(n / 2)]
    scales       uint8   [B]      (float32 for `none`)
    scale_groups float32 [G, 2]   columns lo, hi; for `bnb` largest magnitude, offset; `none` [0, 2]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

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
_MIDPOINTS = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / 2
# Both values of a byte at once: one gather instead of two gathers, a shift, a mask and a stack.
_BYTE_VALUES = torch.stack(
    [NF4_CODEBOOK.repeat_interleave(16), NF4_CODEBOOK.repeat(16)], dim=1
)  # [256, 2]

SCALE_FORMATS = ("geometric", "none", "bnb")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOT_FINITE = "the weight has NaN or infinite elements; repair the checkpoint"

# Elements worked on at once; bounds the float32 and int32 temporaries to about 16 MiB.
_CHUNK_ELEMENTS = 1 << 20


def num_blocks(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def field_shapes(
    numel: int, *, block_size: int, scale_block_size: int, scale_format: str
) -> tuple[tuple[int], tuple[int], tuple[int, int]]:
    """Shapes of (codes, scales, scale_groups) for a weight of `numel` elements."""
    blocks = num_blocks(numel, block_size)
    groups = 0 if scale_format == "none" else num_blocks(blocks, scale_block_size)
    return (-(-numel // 2),), (blocks,), (groups, 2)


def field_dtypes(scale_format: str) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Dtypes of (codes, scales, scale_groups)."""
    scales = torch.float32 if scale_format == "none" else torch.uint8
    return torch.uint8, scales, torch.float32


def quantize_nf4(
    weight: Tensor, *, block_size: int, scale_block_size: int, scale_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight of any shape; returns (codes, scales, scale_groups).

    Raises:
        ValueError: if the weight has NaN or infinite elements.
    """
    flat = weight.reshape(-1)
    absmax = _block_absmax(flat, block_size)
    if not torch.isfinite(absmax).all():
        raise ValueError(NOT_FINITE)
    scales, scale_groups = encode_scales(
        absmax, scale_block_size=scale_block_size, scale_format=scale_format, dtype=weight.dtype
    )
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    step = _chunk_elements(block_size, scale_block_size)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        blocks = _pad(chunk.float(), block_size).view(-1, block_size)
        in_chunk = slice(start // block_size, start // block_size + blocks.shape[0])
        group = start // (block_size * scale_block_size)
        decoded = decode_scales(
            scales[in_chunk],
            scale_groups[group:],
            scale_block_size=scale_block_size,
            scale_format=scale_format,
            dtype=weight.dtype,
        )
        if scale_format == "bnb":
            element_codes = _bnb_codes(blocks, absmax[in_chunk])
        else:
            element_codes = _nearest_codes(blocks, absmax[in_chunk], decoded)
            element_codes = _canonical(element_codes, decoded, weight.dtype)
        pairs = element_codes.view(-1, 2)[: -(-chunk.numel() // 2)]
        codes[start // 2 : start // 2 + pairs.shape[0]] = pairs[:, 0] << 4 | pairs[:, 1]
    return codes, scales, scale_groups


def dequantize_nf4(
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    *,
    numel: int,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Decode to a flat [numel] tensor: rounded to the weight's own `dtype`, cast to `out_dtype`."""
    out = torch.empty(numel, dtype=out_dtype, device=codes.device)
    table = _BYTE_VALUES.to(codes.device)
    step = _chunk_elements(block_size, scale_block_size)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        block = start // block_size
        chunk_scales = decode_scales(
            scales[block : num_blocks(stop, block_size)],
            scale_groups[block // scale_block_size :],
            scale_block_size=scale_block_size,
            scale_format=scale_format,
            dtype=dtype,
        )
        values = table.index_select(0, codes[start // 2 : (stop + 1) // 2].int()).view(-1)
        values = _pad(values[: stop - start], block_size).view(-1, block_size)
        values = (values * chunk_scales[:, None]).to(dtype).view(-1)
        out[start:stop] = values[: stop - start]
    return out


def matmul_nf4(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    transposed: bool,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """`input @ W.T + bias` (transposed) or `input @ W`, in the input's dtype.

    Args:
        input: [m, in] if transposed, else [m, out].
        bias: [out] in the input's dtype, or None; only if transposed.
        shape: (out, in) of the weight.
    """
    weight = dequantize_nf4(
        codes,
        scales,
        scale_groups,
        numel=shape[0] * shape[1],
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
        dtype=dtype,
        out_dtype=input.dtype,
    ).view(*shape)
    return torch.nn.functional.linear(input, weight, bias) if transposed else input @ weight


def encode_scales(
    absmax: Tensor, *, scale_block_size: int, scale_format: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Block maxima float32 [B] of a weight of `dtype` -> (scales, scale_groups)."""
    if scale_format == "none":
        return absmax, absmax.new_empty(0, 2)
    if scale_format == "bnb":
        return _encode_bnb(absmax, scale_block_size)
    scales = torch.empty(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    scale_groups = absmax.new_empty(num_blocks(absmax.numel(), scale_block_size), 2)
    step = max(1, _CHUNK_ELEMENTS // 2048)  # groups; their grids take 2 KiB each
    for group in range(0, scale_groups.shape[0], step):
        blocks = slice(group * scale_block_size, (group + step) * scale_block_size)
        codes, groups = _encode_geometric(absmax[blocks], scale_block_size, dtype)
        scales[blocks] = codes
        scale_groups[group : group + step] = groups
    return scales, scale_groups


def decode_scales(
    scales: Tensor,
    scale_groups: Tensor,
    *,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """What multiplies the codebook: float32 [B], for all but `bnb` rounded to `dtype`.

    `scales` begins at a group's first block and `scale_groups` at that group.
    """
    if scale_format == "none":
        return scales.to(dtype).float()
    codes = _pad(scales, scale_block_size).view(-1, scale_block_size)  # [G, S]
    first, second = scale_groups[: codes.shape[0], :1], scale_groups[: codes.shape[0], 1:]
    if scale_format == "bnb":
        decoded = dynamic_codebook().to(codes.device)[codes.int()] * first + second
        return decoded.view(-1)[: scales.numel()]
    bits = _grid_bits(codes.long(), _bits(first), _bits(second))
    bits = torch.where(codes > 0, bits, 0)
    decoded = bits.to(torch.int32).view(torch.float32).view(-1)[: scales.numel()]
    return decoded.to(dtype).float()


def _encode_geometric(
    absmax: Tensor, scale_block_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B] and (lo, hi) float32 [G, 2] of whole groups."""
    grouped = _pad(absmax, scale_block_size).view(-1, scale_block_size)  # [G, S]
    hi = grouped.amax(dim=1)
    lo = grouped.masked_fill(grouped == 0, torch.inf).amin(dim=1)
    lo = torch.minimum(lo, hi)  # a group of zero blocks has no positive scale: lo = hi = 0
    grid = _grid_bits(
        torch.arange(1, 256, device=absmax.device)[None, :], _bits(lo)[:, None], _bits(hi)[:, None]
    )
    grid = grid.to(torch.int32).view(torch.float32).to(dtype).float()  # [G, 255], ascending

    above = torch.searchsorted(grid, grouped).clamp_(max=254)  # first code not below the maximum
    upper = grid.gather(1, above)
    lower = grid.gather(1, (above - 1).clamp_(min=0))
    # of equal rounded scales the first is meant, so that a second pass finds the same code
    below = torch.searchsorted(grid, lower)
    nearest = torch.where((grouped - lower).abs() <= (upper - grouped).abs(), below, above)
    codes = torch.where(grouped > 0, nearest + 1, 0).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()], torch.stack([lo, hi], dim=1)


def _encode_bnb(absmax: Tensor, scale_block_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B] and (largest magnitude, offset) float32 [G, 2]."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    if not torch.isfinite(offset):
        raise ValueError("the weight is too large for scale_format 'bnb': its mean scale overflows")
    grouped = _pad(absmax - offset, scale_block_size).view(-1, scale_block_size)  # [G, S]
    largest = grouped.abs().amax(dim=1, keepdim=True)
    divisor = torch.where(largest > 0, largest, 1.0)  # a group of equal scales is all offset
    codebook = dynamic_codebook().to(absmax.device)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    codes = torch.bucketize(grouped * (1 / divisor), midpoints, out_int32=True).to(torch.uint8)
    groups = torch.cat([largest, offset.expand_as(largest)], dim=1)
    return codes.view(-1)[: absmax.numel()], groups


@functools.cache
def dynamic_codebook() -> Tensor:
    """The 256 values, ascending, of signed dynamic 8-bit quantization, on the CPU.

    Seven decades below 1, the decade 10^(e-6) .. 10^(e-7) cut into 2^e cells whose middles are the
    values, with both signs; and 0 and 1 (Dettmers et al., https://arxiv.org/abs/2110.02861).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """Largest magnitude of every block, float32 [B]; NaN where a block has one."""
    absmax = torch.empty(
        num_blocks(flat.numel(), block_size), dtype=torch.float32, device=flat.device
    )
    step = _chunk_elements(block_size, 1)
    for start in range(0, flat.numel(), step):
        blocks = _pad(flat[start : start + step], block_size).view(-1, block_size)
        block = start // block_size
        absmax[block : block + blocks.shape[0]] = blocks.abs().amax(dim=1)
    return absmax


def _grid_bits(codes: Tensor, lo_bits: Tensor, hi_bits: Tensor) -> Tensor:
    """Bit pattern of scale code k = 1..255, int64; +127 makes the integer division round."""
    return lo_bits + ((codes - 1) * (hi_bits - lo_bits) + 127).div(254, rounding_mode="floor")


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).long()


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
    midpoints = _MIDPOINTS.to(normalized.device)
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


def _pad(x: Tensor, multiple: int) -> Tensor:
    missing = -x.numel() % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x
