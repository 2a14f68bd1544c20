"""NF4 on CUDA devices: the Triton kernels that `nf4_triton` launches; formulas and layout are those
of `nf4_reference`.

    A program works on a tile of ROWS whole blocks, one block to a row of the tile:

                BLOCK_SIZE / 2 bytes
              +-------+-------+-----+-------+
       block  | hi lo | hi lo | ... | hi lo |   its scale is decoded once per row
       block  | hi lo | hi lo | ... | hi lo |
              +-------+-------+-----+-------+

Kernels
    quantizing is absmax, search (optional), encode_scales and codes; then dequantize and matvec.
    Groups of more than 4096 scales, and the scales of bnb, are encoded by the PyTorch reference.
    Arguments: `codebook` float32 [31], 16 values and 15 midpoints; `scale_codebook` float32 [256]
    for bnb; `factors` float32 [16] for search; `absmax` and `wanted` float32, one per block; and
    the fields of `nf4_reference`.

How
    Memory bounds all of it. Decoding reads every byte once. Quantizing reads the weight twice, for
    block maxima and for codes (search: three times), and the scales, 1/64 of the data, in between.
    Dequantizing decodes the 8-bit scales in the same pass as the codes. The codebook is 64 bytes
    that stay in L1: one load an element, where a tree of selects would cost fifteen operations.
    The matrix-vector product multiplies by the scale after the sum over a block, so an element
    costs a lookup and a multiply-add. Its weights are therefore not rounded to their dtype; the
    result is within the rounding of the product with the dequantized weight.
    Bits: division is `div_rn`, because Triton's `/` is approximate. Products are not contracted
    with the sums after them (enable_fp_fusion=False) but in matvec. bfloat16 travels as int16 and
    is rounded with integers, since the interpreter that tests these kernels cuts it off.

Limits
    float32, bfloat16, float16. BLOCK_SIZE a power of two, as `to_nf4` demands. Block numbers are
    32-bit, element and byte offsets in the weight 64-bit. matvec needs rows of whole blocks
    (in_features a multiple of BLOCK_SIZE) and BATCH a power of two, of which the launcher sends at
    most 8; its offsets into x and y are 32-bit.

Measured: not yet, no GPU was at hand. The tests run every kernel under Triton's interpreter, bit
for bit against `nf4_reference`, and compile it for sm_80 and sm_90; there, at the default sizes in
bfloat16 (sm_90, Triton 3.7), dequantize takes 48 registers and 16 instructions an element. Nothing
spills while sizes are multiples of 16 below 2^31; with others search and matvec can.
`scripts/bench_nf4.py --device cuda` measures.
"""

from __future__ import annotations

import triton
import triton.language as tl

_BFLOAT16, _FLOAT16 = tl.constexpr(1), tl.constexpr(2)
_GEOMETRIC, _NONE, _BNB = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# ---- dtypes: bfloat16 comes and goes as the bits of an int16 ------------------------------------


@triton.jit
def _round_to(x, DTYPE: tl.constexpr):
    """The nearest value of the dtype, ties to even, as float32."""
    if DTYPE == _BFLOAT16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    elif DTYPE == _FLOAT16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _load(pointer, mask, DTYPE: tl.constexpr):
    x = tl.load(pointer, mask=mask, other=0)
    if DTYPE == _BFLOAT16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, x, mask, DTYPE: tl.constexpr):
    """Of a float32 that `_round_to` has rounded."""
    if DTYPE == _BFLOAT16:
        tl.store(pointer, (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)
    elif DTYPE == _FLOAT16:
        tl.store(pointer, x.to(tl.float16), mask=mask)
    else:
        tl.store(pointer, x, mask=mask)


# ---- scales -------------------------------------------------------------------------------------


@triton.jit
def _grid_scale(k, lo, hi):
    """Scale of code k = 1..255 before rounding: its bit pattern lies k - 1 of 254 steps from lo.

    (k - 1) * span needs 39 bits; span = 254 * quotient + remainder keeps all in 32.
    """
    lo_bits = lo.to(tl.int32, bitcast=True)
    span = hi.to(tl.int32, bitcast=True) - lo_bits
    quotient, remainder = span // 254, span % 254
    bits = lo_bits + (k - 1) * quotient + ((k - 1) * remainder + 127) // 254
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _decode_scale(
    scales, groups, scale_codebook, block, mask,
    SCALE_BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What multiplies the codebook in each block."""
    stored = tl.load(scales + block, mask=mask, other=0)
    if FORMAT == _NONE:
        scale = _round_to(stored, DTYPE)
    else:
        group = groups + 2 * (block // SCALE_BLOCK_SIZE)
        first = tl.load(group, mask=mask, other=0)
        second = tl.load(group + 1, mask=mask, other=0)
        k = stored.to(tl.int32)
        if FORMAT == _BNB:
            scale = tl.load(scale_codebook + k) * first + second
        else:
            scale = tl.where(k > 0, _round_to(_grid_scale(k, first, second), DTYPE), 0.0)
    return scale


@triton.jit
def _first_not_below(x, lo, hi, DTYPE: tl.constexpr):
    """Smallest k - 1 whose rounded grid scale is not below x; 254 if there is none."""
    low = tl.zeros_like(x).to(tl.int32)
    high = low + 254
    for _ in range(8):
        middle = (low + high) // 2
        below = (_round_to(_grid_scale(middle + 1, lo, hi), DTYPE) < x) & (low < high)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def encode_scales_kernel(
    absmax, scales, groups, num_blocks,
    SCALE_BLOCK_SIZE: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One group; of equal rounded scales the first is meant, so that a second pass finds it."""
    lane = tl.arange(0, LANES)
    block = tl.program_id(0) * SCALE_BLOCK_SIZE + lane
    mask = (lane < SCALE_BLOCK_SIZE) & (block < num_blocks)
    a = tl.load(absmax + block, mask=mask, other=0.0)
    hi = tl.max(a, axis=0)
    lo = tl.minimum(tl.min(tl.where(a > 0, a, float("inf")), axis=0), hi)
    above = _first_not_below(a, lo, hi, DTYPE)
    upper = _round_to(_grid_scale(above + 1, lo, hi), DTYPE)
    lower = _round_to(_grid_scale(tl.maximum(above, 1), lo, hi), DTYPE)
    first = _first_not_below(lower, lo, hi, DTYPE)
    nearest = tl.where(tl.abs(a - lower) <= tl.abs(upper - a), first, above)
    code = tl.where(a > 0, nearest + 1, 0)
    tl.store(scales + block, code.to(tl.uint8), mask=mask)
    group = groups + 2 * tl.program_id(0)
    tl.store(group, lo)
    tl.store(group + 1, hi)


# ---- quantize -----------------------------------------------------------------------------------


@triton.jit
def _tile(numel, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """(block numbers [ROWS], element offsets [ROWS, BLOCK_SIZE], mask) of this program."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = block.to(tl.int64)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    return block, offsets, offsets < numel


@triton.jit
def absmax_kernel(
    weight, absmax, numel, num_blocks,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Magnitudes are compared as integers, where NaN and infinity come out on top."""
    block, offsets, mask = _tile(numel, BLOCK_SIZE, ROWS)
    x = _load(weight + offsets, mask, DTYPE)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, largest, mask=block < num_blocks)


@triton.jit
def _nearest_codes(x, absmax, scale, codebook, FORMAT: tl.constexpr):
    """Codes of x [ROWS, BLOCK_SIZE]: the number of midpoints strictly below x / scale."""
    infinity = float("inf")
    if FORMAT == _BNB:
        divisor = tl.where(absmax > 0, absmax, infinity)
        x = x * tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), divisor)[:, None]
    else:
        peak = tl.where(scale > 0, absmax, infinity)[:, None]
        divisor = tl.where(scale > 0, scale, infinity)[:, None]
        inner = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
        x = tl.where(tl.abs(x) >= peak, tl.where(x > 0, 1.0, -1.0), inner)
    code = tl.zeros(x.shape, tl.int32)
    for shift in tl.static_range(4):  # binary search among the 15 midpoints after the codebook
        step = 8 >> shift
        midpoint = tl.load(codebook + 16 + code + (step - 1))
        code += tl.where(x > midpoint, step, 0)
    return code


@triton.jit
def codes_kernel(
    weight, codes, absmax, scales, groups, codebook, numel, num_blocks,
    BLOCK_SIZE: tl.constexpr, SCALE_BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, SMALLEST_NORMAL: tl.constexpr,
):  # fmt: skip
    block, offsets, mask = _tile(numel, BLOCK_SIZE, ROWS)
    x = _load(weight + offsets, mask, DTYPE)
    peak = tl.load(absmax + block, mask=block < num_blocks, other=0.0)
    if FORMAT == _BNB:
        code = _nearest_codes(x, peak, peak, codebook, FORMAT)
    else:
        scale = _decode_scale(
            scales, groups, codebook, block, block < num_blocks, SCALE_BLOCK_SIZE, FORMAT, DTYPE
        )
        code = _nearest_codes(x, peak, scale, codebook, FORMAT)
        tiny = scale < 16 * SMALLEST_NORMAL
        if tl.max(tiny.to(tl.int32), axis=0) > 0:
            # products leave the normal range: take the codes of a second pass
            decoded = _round_to(tl.load(codebook + code) * scale[:, None], DTYPE)
            again = _nearest_codes(decoded, scale, scale, codebook, FORMAT)
            code = tl.where(tiny[:, None], again, code)
    high, low = tl.split(tl.reshape(code, [ROWS, BLOCK_SIZE // 2, 2]))
    byte = block.to(tl.int64)[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(codes + byte, (high << 4 | low).to(tl.uint8), mask=2 * byte < numel)


@triton.jit
def search_kernel(
    weight, absmax, wanted, codebook, factors, numel, num_blocks,
    BLOCK_SIZE: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Best of 16 scales for each block, the first of equals; errors are added up by halves."""
    block, offsets, mask = _tile(numel, BLOCK_SIZE, ROWS)
    x = _load(weight + offsets, mask, DTYPE)
    peak = tl.load(absmax + block, mask=block < num_blocks, other=0.0)
    divisor = tl.where(peak > 0, peak, float("inf"))[:, None]
    least = tl.full([ROWS], float("inf"), tl.float32)
    best = peak
    for k in range(16):
        scale = _round_to(peak * tl.load(factors + k), DTYPE)
        code = _nearest_codes(x, peak, scale, codebook, _GEOMETRIC)
        decoded = _round_to(tl.load(codebook + code) * scale[:, None], DTYPE)
        error = tl.div_rn(x - decoded, tl.broadcast_to(divisor, x.shape))
        error = error * error
        for level in tl.static_range(LEVELS):
            halves = tl.reshape(error, [ROWS, 2, BLOCK_SIZE >> (level + 1)])
            first, second = tl.split(tl.permute(halves, [0, 2, 1]))
            error = first + second
        total = tl.reshape(error, [ROWS])
        best = tl.where(total < least, scale, best)
        least = tl.minimum(total, least)
    tl.store(wanted + block, best, mask=block < num_blocks)


# ---- dequantize and multiply --------------------------------------------------------------------


@triton.jit
def dequantize_kernel(
    codes, scales, groups, codebook, scale_codebook, out, first_block, count, num_bytes,
    BLOCK_SIZE: tl.constexpr, SCALE_BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr,
):  # fmt: skip
    """`count` elements (`num_bytes` of codes), from that block's first on, go to out[0 ..]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row.to(tl.int64) * BLOCK_SIZE < count
    block = first_block + row
    scale = _decode_scale(
        scales, groups, scale_codebook, block, exists, SCALE_BLOCK_SIZE, FORMAT, DTYPE
    )
    pair = row.to(tl.int64)[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    first_byte = tl.full([1, 1], first_block, tl.int64) * (BLOCK_SIZE // 2)
    packed = tl.load(codes + first_byte + pair, mask=pair < num_bytes, other=0).to(tl.int32)
    high = tl.load(codebook + (packed >> 4)) * scale[:, None]
    low = tl.load(codebook + (packed & 15)) * scale[:, None]
    value = _round_to(tl.interleave(high, low), DTYPE)
    if OUT_DTYPE != DTYPE:
        value = _round_to(value, OUT_DTYPE)
    element = row.to(tl.int64)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    _store(out + element, value, element < count, OUT_DTYPE)


@triton.jit
def matvec_kernel(
    x, codes, scales, groups, codebook, scale_codebook, bias, out,
    rows_in, in_features, out_features,
    BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out [BATCH, ROWS of the weight]; a step takes BLOCKS blocks of each row.

    The four bytes that a thread may load at once become eight weights, as many as the inputs that
    it loads at once: without the hint weights would change threads through shared memory.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.arange(0, BATCH)
    per_row = in_features // BLOCK_SIZE  # blocks
    pair = tl.arange(0, BLOCK_SIZE // 2)[None, None, :]
    element = tl.arange(0, BLOCK_SIZE)[None, None, None, :]
    total = tl.zeros([BATCH, ROWS, BLOCKS], tl.float32)
    for start in range(0, per_row, BLOCKS):
        number = start + tl.arange(0, BLOCKS)
        in_row = number < per_row
        exists = (row < out_features)[:, None] & in_row[None, :]  # [ROWS, BLOCKS]
        block = row[:, None] * per_row + number[None, :]
        byte = block.to(tl.int64)[:, :, None] * (BLOCK_SIZE // 2) + pair
        byte = tl.max_contiguous(byte, [1, 1, 4])
        packed = tl.load(codes + byte, mask=exists[:, :, None], other=0).to(tl.int32)
        high = tl.load(codebook + (packed >> 4))
        low = tl.load(codebook + (packed & 15))
        value = tl.interleave(high, low)[None, :, :, :]  # [1, ROWS, BLOCKS, BLOCK_SIZE]
        at = batch[:, None, None, None] * in_features + number[None, None, :, None] * BLOCK_SIZE
        at = (
            at + element + tl.zeros([1, ROWS, 1, 1], tl.int32)
        )  # the shape, so the threads, of value
        there = (batch < rows_in)[:, None, None, None] & in_row[None, None, :, None]
        sums = tl.sum(value * _load(x + at, there, OUT_DTYPE), axis=3)
        scale = _decode_scale(
            scales, groups, scale_codebook, block, exists, SCALE_BLOCK_SIZE, FORMAT, DTYPE
        )
        total += sums * scale[None, :, :]
    result = tl.sum(total, axis=2)  # [BATCH, ROWS]
    if HAS_BIAS:
        result += _load(bias + row, row < out_features, OUT_DTYPE)[None, :]
    at = batch[:, None] * out_features + row[None, :]
    mask = (batch < rows_in)[:, None] & (row < out_features)[None, :]
    _store(out + at, _round_to(result, OUT_DTYPE), mask, OUT_DTYPE)
