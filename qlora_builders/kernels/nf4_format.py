"""NF4's format: its options, the shapes they give, and block scales in 8 bits.

`nf4_reference` describes what the fields mean. The `geometric` and `bnb` formats of scales are
computed here; `dynamic_codebook` defines the 256 values of `bnb`.

Shapes: B blocks, S = scale_block_size, G = ceil(B / S) groups.
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
from qlora_builders.kernels.formats import WEIGHT_DTYPES, Format, Shape
from qlora_builders.names import SCALE_FORMATS

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# as compiled kernels know them
FORMAT_NUMBERS = {"geometric": 0, "none": 1, "bnb": 2}
DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(WEIGHT_DTYPES)}
_CHUNK_GROUPS = 128  # of scales encoded at once: their temporaries stay at about a megabyte


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


def num_blocks(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def pad(x: Tensor, multiple: int) -> Tensor:
    missing = -x.numel() % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


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
        grouped = pad(chunk, scale_block_size).view(-1, scale_block_size)  # [G, S]
        if offset is None:
            codes, groups = _encode_geometric(grouped, dtype)
        else:
            codes, groups = _encode_bnb(grouped, offset)
        scales[blocks] = codes.view(-1)[: chunk.numel()]
        scale_groups[group : group + _CHUNK_GROUPS] = groups
    return scales, scale_groups


def decode_scales(
    scales: Tensor,
    scale_groups: Tensor,
    *,
    format: NF4Format,
    dtype: torch.dtype,
) -> Tensor:
    """What multiplies the codebook: float32 [B], for all but `bnb` rounded to `dtype`.

    `scales` begins at a group's first block and `scale_groups` at that group.
    """
    if format.scale_format == "none":
        return scales.to(dtype).float()
    codes = pad(scales, format.scale_block_size).view(-1, format.scale_block_size)  # [G, S]
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
