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
               group and coded with the 256 values of `dynamic_codebook`. Codes of scales may
               differ between CPU and GPU, as bitsandbytes' own do.

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
    lo = hi = 0. `_search_scales` describes the scale search.

Shapes: n elements, B = ceil(n / block_size) blocks, G = ceil(B / scale_block_size) groups.
    codes        uint8   [ceil(n / 2)]
    scales       uint8   [B]      (float32 for `none`)
    scale_groups float32 [G, 2]   columns lo, hi; for `bnb` largest magnitude, offset; `none` [0, 2]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora_builders.errors import did_you_mean
from qlora_builders.kernels.formats import (
    NOT_FINITE,
    WEIGHT_DTYPES,
    Format,
    Shape,
    decoded_matmul,
)
from qlora_builders.names import SCALE_FORMATS

_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
NF4_CODEBOOK = torch.tensor(_VALUES, dtype=torch.float32, device="cpu")
MIDPOINTS = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / 2
# both values of a byte [256, 2]: one gather instead of two gathers, a shift, a mask and a stack
_BYTE_VALUES = torch.stack([NF4_CODEBOOK.repeat_interleave(16), NF4_CODEBOOK.repeat(16)], dim=1)
SEARCHED_FACTORS = tuple(float(torch.tensor(1 - 0.02 * k, device="cpu")) for k in range(16))
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# as compiled kernels know them
FORMAT_NUMBERS = {"geometric": 0, "none": 1, "bnb": 2}
DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(WEIGHT_DTYPES)}

# worked on at once: bounds the float32 and int32 temporaries to about 16 MiB and to a megabyte
_CHUNK_ELEMENTS = 1 << 20
_CHUNK_GROUPS = 128


@dataclass(frozen=True, kw_only=True)
class NF4Format(Format):
    """
    Attributes:
        block_size: elements per scale.
        scale_block_size: scales per group; unused by `scale_format="none"`.
        scale_format: "geometric", "none" or "bnb".
        scale_search: how plain weights get their scales: the best of 16 for each block.

    Raises:
        ValueError: for a block size that is not a power of two from 32 to 4096, a scale block
            size that is not positive, an unknown scale format, or scale_search with "bnb".
    """

    name: ClassVar[str] = "nf4"
    tensor_fields: ClassVar[tuple[str, ...]] = ("codes", "scales", "scale_groups")
    stored_options: ClassVar[tuple[str, ...]] = ("block_size", "scale_block_size", "scale_format")

    block_size: int = 64
    scale_block_size: int = 256
    scale_format: str = "geometric"
    scale_search: bool = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"block_size is {self.block_size!r}; allowed: {allowed}")
        if not isinstance(self.scale_block_size, int) or self.scale_block_size < 1:
            raise ValueError(
                f"scale_block_size is {self.scale_block_size!r}; it must be an integer >= 1"
            )
        if self.scale_format not in SCALE_FORMATS:
            near = did_you_mean(str(self.scale_format), SCALE_FORMATS)
            raise ValueError(f"scale_format is {self.scale_format!r}{near}")
        if self.scale_search and self.scale_format == "bnb":
            raise ValueError("scale_search cannot be combined with scale_format 'bnb'")

    def field_shapes(self, shape: Sequence[int]) -> tuple[Shape, ...]:
        numel = math.prod(shape)
        blocks = num_blocks(numel, self.block_size)
        groups = 0 if self.scale_format == "none" else num_blocks(blocks, self.scale_block_size)
        return (-(-numel // 2),), (blocks,), (groups, 2)

    def field_dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.uint8, self.scale_dtype, torch.float32

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.scale_format == "none" else torch.uint8

    def unit(self, shape: Sequence[int]) -> Shape:
        """A group of blocks of the flattened weight."""
        blocks = 1 if self.scale_format == "none" else self.scale_block_size
        return (blocks * self.block_size,)

    @property
    def needs_whole(self) -> bool:
        """The offset of `bnb` is the mean over all scales."""
        return self.scale_format == "bnb"

    @property
    def identity(self) -> str:
        return str(self.stored)  # as hashes have had it before there were other formats


def quantize(weight: Tensor, *, format: NF4Format) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, scale_groups) of a weight of any shape.

    Raises:
        ValueError: if the weight has NaN or infinite elements.
    """
    flat, dtype = weight.reshape(-1), weight.dtype
    chunks = [_blocks(chunk, format.block_size) for chunk in flat.split(_chunk_elements(format))]
    absmax = torch.cat([blocks.abs().amax(dim=1) for blocks in chunks]).float()  # NaN if one is
    if not torch.isfinite(absmax).all():
        raise ValueError(NOT_FINITE)
    peaks = absmax.split(max(1, len(chunks[0])))
    wanted = absmax
    if format.scale_search:
        wanted = torch.cat([_search_scales(*each) for each in zip(chunks, peaks, strict=True)])
    scales, groups = encode_scales(wanted, format=format, dtype=dtype)
    codes, first = [], 0
    for blocks, peak in zip(chunks, peaks, strict=True):
        some = slice(first, first + len(blocks))
        group = first // format.scale_block_size
        decoded = decode_scales(scales[some], groups[group:], format=format, dtype=dtype)
        codes.append(_packed_codes(blocks, peak, decoded, format.scale_format == "bnb"))
        first = some.stop
    return torch.cat(codes)[: -(-flat.numel() // 2)], scales, groups


def dequantize(
    fields: Sequence[Tensor],
    *,
    format: NF4Format,
    shape: Sequence[int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Decoded to `shape`: rounded to the weight's own `dtype`, cast to `out_dtype`."""
    codes, scales, groups = fields
    block_size, numel = format.block_size, math.prod(shape)
    out = torch.empty(numel, dtype=out_dtype, device=codes.device)
    table = _BYTE_VALUES.to(codes.device)
    step = _chunk_elements(format)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        some = slice(start // block_size, num_blocks(stop, block_size))
        group = some.start // format.scale_block_size
        scale = decode_scales(scales[some], groups[group:], format=format, dtype=dtype)
        values = table.index_select(0, codes[start // 2 : (stop + 1) // 2].int()).view(-1)
        values = _blocks(values[: stop - start], block_size) * scale[:, None]
        out[start:stop] = values.to(dtype).view(-1)[: stop - start]
    return out.view(*shape)


matmul = decoded_matmul(dequantize)


def num_blocks(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def _blocks(flat: Tensor, block_size: int) -> Tensor:
    """[n] -> [B, block_size], with zeros at the end."""
    missing = -flat.numel() % block_size
    padded = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
    return padded.view(-1, block_size)


def _chunk_elements(format: NF4Format) -> int:
    """Whole groups of blocks (so that no chunk splits one), at least one."""
    group = format.block_size * format.scale_block_size
    return max(1, _CHUNK_ELEMENTS // group) * group


# ---- codes --------------------------------------------------------------------------------------


def _packed_codes(blocks: Tensor, absmax: Tensor, scale: Tensor, is_bnb: bool) -> Tensor:
    """Codes of blocks [B, block_size] with these largest magnitudes and decoded scales, packed."""
    if is_bnb:
        codes = _bnb_codes(blocks.float(), absmax)
    else:
        codes = _canonical(_nearest_codes(blocks.float(), absmax, scale), scale, blocks.dtype)
    pairs = codes.view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def _nearest_codes(blocks: Tensor, absmax: Tensor, scale: Tensor) -> Tensor:
    """Codes uint8 nearest to blocks [B, block_size] / scale [B], with the block maxima at +-1.

    A zero block gets the code of 0.0.
    """
    positive = scale > 0
    absmax = torch.where(positive, absmax, torch.inf)[:, None]
    scale = torch.where(positive, scale, torch.inf)[:, None]
    return _bucketize(torch.where(blocks.abs() >= absmax, blocks.sign(), blocks / scale))


def _bnb_codes(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Times the reciprocal, as bitsandbytes has it; for subnormals that is infinite, 0 * inf -1."""
    absmax = torch.where(absmax > 0, absmax, torch.inf)[:, None]
    return _bucketize((blocks * (1 / absmax)).nan_to_num(nan=-torch.inf))


def _bucketize(normalized: Tensor) -> Tensor:
    """Number of midpoints strictly below; a tie goes to the lower code."""
    midpoints = MIDPOINTS.to(normalized.device)
    return torch.bucketize(normalized, midpoints, out_int32=True).to(torch.uint8)


def _decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, block_size], rounded to the weight's dtype, as float32."""
    return (NF4_CODEBOOK.to(codes.device)[codes.int()] * scale[:, None]).to(dtype).float()


def _canonical(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes that quantizing the decoded block gives again.

    Only blocks with products below the dtype's normal range can differ; the smallest non-zero
    codebook magnitude is 0.0796, so a scale of 16x the smallest normal number is safe.
    """
    tiny = scale < 16 * torch.finfo(dtype).tiny
    again = _nearest_codes(_decoded(codes, scale, dtype), scale, scale)
    return torch.where(tiny[:, None], again, codes)


def _search_scales(blocks: Tensor, absmax: Tensor) -> Tensor:
    """For every block the scale, of 16 from 1.0 to 0.7 of its maximum, of least squared error.

    Clipping the extremes a little serves the many: on normal weights the error falls by 6 %. The
    first of equal scales is taken, so a weight that was decoded before keeps its scale, where its
    error is zero. Errors are relative to the maximum (no overflow) and added up by halves, in an
    order that every backend can repeat.
    """
    dtype, blocks = blocks.dtype, blocks.float()
    divisor = torch.where(absmax > 0, absmax, torch.inf)[:, None]
    least, best = torch.full_like(absmax, torch.inf), absmax
    for factor in SEARCHED_FACTORS:
        scale = (absmax * factor).to(dtype).float()
        codes = _nearest_codes(blocks, absmax, scale)
        error = ((blocks - _decoded(codes, scale, dtype)) / divisor).square()
        while error.shape[1] > 1:
            error = error[:, : error.shape[1] // 2] + error[:, error.shape[1] // 2 :]
        better = error[:, 0] < least
        least = torch.where(better, error[:, 0], least)
        best = torch.where(better, scale, best)
    return best


# ---- scales -------------------------------------------------------------------------------------


def encode_scales(
    absmax: Tensor, *, format: NF4Format, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Block maxima float32 [B] of a weight of `dtype` -> (scales, scale_groups)."""
    if format.scale_format == "none":
        return absmax, absmax.new_empty(0, 2)
    scale_block_size = format.scale_block_size
    offset = _bnb_offset(absmax) if format.scale_format == "bnb" else None
    scales = torch.empty(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    scale_groups = absmax.new_empty(num_blocks(absmax.numel(), scale_block_size), 2)
    for group in range(0, scale_groups.shape[0], _CHUNK_GROUPS):
        blocks = slice(group * scale_block_size, (group + _CHUNK_GROUPS) * scale_block_size)
        chunk = absmax[blocks] if offset is None else absmax[blocks] - offset
        grouped = _blocks(chunk, scale_block_size)  # [G, S]
        if offset is None:
            codes, groups = _encode_geometric(grouped, dtype)
        else:
            codes, groups = _encode_bnb(grouped, offset)
        scales[blocks] = codes.view(-1)[: chunk.numel()]
        scale_groups[group : group + _CHUNK_GROUPS] = groups
    return scales, scale_groups


def decode_scales(
    scales: Tensor, scale_groups: Tensor, *, format: NF4Format, dtype: torch.dtype
) -> Tensor:
    """What multiplies the codebook: float32 [B], for all but `bnb` rounded to `dtype`.

    `scales` begins at a group's first block and `scale_groups` at that group.
    """
    if format.scale_format == "none":
        return scales.to(dtype).float()
    codes = _blocks(scales, format.scale_block_size)  # [G, S]
    first, second = scale_groups[: codes.shape[0], :1], scale_groups[: codes.shape[0], 1:]
    if format.scale_format == "bnb":
        decoded = dynamic_codebook().to(codes.device)[codes.int()] * first + second
        return decoded.view(-1)[: scales.numel()]
    bits = _grid_bits(codes.long(), _bits(first), _bits(second))
    bits = torch.where(codes > 0, bits, 0)
    decoded = bits.to(torch.int32).view(torch.float32).view(-1)[: scales.numel()]
    return decoded.to(dtype).float()


def _encode_geometric(grouped: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes uint8 [G, S] and (lo, hi) float32 [G, 2] of groups [G, S]."""
    hi = grouped.amax(dim=1)
    lo = grouped.masked_fill(grouped == 0, torch.inf).amin(dim=1)
    lo = torch.minimum(lo, hi)  # a group of zero blocks has no positive scale: lo = hi = 0
    grid = _grid_bits(
        torch.arange(1, 256, device=grouped.device)[None, :], _bits(lo)[:, None], _bits(hi)[:, None]
    )
    grid = grid.to(torch.int32).view(torch.float32).to(dtype).float()  # [G, 255], ascending

    above = torch.searchsorted(grid, grouped).clamp_(max=254)  # first code not below the maximum
    upper = grid.gather(1, above)
    lower = grid.gather(1, (above - 1).clamp_(min=0))
    # of equal rounded scales the first is meant, so that a second pass finds the same code
    below = torch.searchsorted(grid, lower)
    nearest = torch.where((grouped - lower).abs() <= (upper - grouped).abs(), below, above)
    codes = torch.where(grouped > 0, nearest + 1, 0).to(torch.uint8)
    return codes, torch.stack([lo, hi], dim=1)


def _bnb_offset(absmax: Tensor) -> Tensor:
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    if not torch.isfinite(offset):
        raise ValueError("the weight is too large for scale_format 'bnb': its mean scale overflows")
    return offset


def _encode_bnb(grouped: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [G, S] and (largest magnitude, offset) float32 [G, 2]; offset is taken off.

    bitsandbytes looks codes up in 65,536 bins on CPUs and searches on GPUs, and so do we: next to
    zero, where the codebook is finer than a bin, that makes up to four codes of difference.
    """
    largest = grouped.abs().amax(dim=1, keepdim=True)
    normalized = grouped * (1 / largest)
    if grouped.device.type == "cpu":
        bins = ((normalized + 1) * 32767.5 + 0.5).floor_().clamp_(0, 65535)
        normalized = bins / 32767.5 - 1
    codebook = dynamic_codebook().to(grouped.device)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    codes = torch.bucketize(normalized, midpoints, out_int32=True)
    codes = torch.where(largest > 0, codes, 0).to(torch.uint8)  # equal scales are all offset
    return codes, torch.cat([largest, offset.expand_as(largest)], dim=1)


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


def _grid_bits(codes: Tensor, lo_bits: Tensor, hi_bits: Tensor) -> Tensor:
    """Bit pattern of scale code k = 1..255, int64; +127 makes the integer division round."""
    return lo_bits + ((codes - 1) * (hi_bits - lo_bits) + 127).div(254, rounding_mode="floor")


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).long()
