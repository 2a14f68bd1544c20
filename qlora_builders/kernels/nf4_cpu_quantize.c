/* Quantize to NF4 on CPUs; nf4_cpu.h has the layout.

   Formula
       a = max |w| of the block; scale code = the entry of the group's grid that is nearest to a
       when rounded to the weight's dtype; s = that rounded scale
       code = number of midpoints below w / s, but 0 or 15 where |w| = a
       (bnb: midpoints below w * (1 / a))
       a block with s below 16 times the smallest normal number is coded twice, see nf4_reference;
       with `search`, s is nearest to the scale found instead of to a

   How
       Two passes over a group (32 KiB of bfloat16 at the default sizes), so the second finds the
       weights in cache. The block maximum is an integer maximum of the bit patterns without their
       sign: it vectorizes, and NaN and infinity come out on top, which makes the check for them
       free. Counting midpoints is 15 compares without a branch. Threads split whole groups.
       Measured on two cores of an AMD EPYC with AVX-512, 4096 x 4096 bfloat16, geometric, blocks
       of 64 in groups of 256: 16 ms (bitsandbytes 0.50.2: 348).

       With `search`, 16 scales a (1 - 0.02 k), rounded to the dtype, are tried for every block and
       the first with the least squared error is kept; errors are relative to a and added up by
       halves, as the reference adds them.
       The offset of bnb is a mean over all blocks: there the block maxima are returned as float32
       scales, and nf4_cpu.py has the reference encode them.

   Limits
       With `search`, block_size is a power of two from 32 (to_nf4 allows powers of two from 32 to
       4096). */

#include "nf4_cpu.h"

#include <stdlib.h>

/* ---- scales ------------------------------------------------------------------------------- */

/* First index in ascending grid[255] whose value is not below x; 254 if there is none. */
INLINE int first_not_below(const float *grid, float x) {
    int low = 0, high = 254;
    while (low < high) {
        int middle = (low + high) / 2;
        if (grid[middle] < x) low = middle + 1; else high = middle;
    }
    return low;
}

/* Codes of the block maxima of one group; of equal rounded scales the first is meant. */
static void encode_scales(const float *absmax, int64_t blocks, uint8_t *codes, float *group,
                          int dtype) {
    float lo = 0, hi = 0, grid[255];
    for (int64_t b = 0; b < blocks; b++) {
        float a = absmax[b];
        if (a > 0 && (lo == 0 || a < lo)) lo = a;
        if (a > hi) hi = a;
    }
    group[0] = lo;
    group[1] = hi;
    for (int k = 1; k <= 255; k++) grid[k - 1] = round_to(grid_scale(k, lo, hi), dtype);
    for (int64_t b = 0; b < blocks; b++) {
        int above = first_not_below(grid, absmax[b]);
        float upper = grid[above], lower = grid[above > 0 ? above - 1 : 0];
        float up = upper - absmax[b], down = absmax[b] - lower;
        int nearest = (down < 0 ? -down : down) <= (up < 0 ? -up : up)
                          ? first_not_below(grid, lower) : above;
        codes[b] = absmax[b] > 0 ? (uint8_t)(nearest + 1) : 0;
    }
}

/* ---- quantize ----------------------------------------------------------------------------- */

INLINE float block_absmax(const void *weight, int64_t start, int64_t length, int dtype) {
    int32_t largest = 0; /* bit patterns of non-negative floats are ordered like integers */
    for (int64_t i = 0; i < length; i++) {
        int32_t magnitude = (int32_t)(to_bits(load(weight, start + i, dtype)) & 0x7FFFFFFF);
        largest = magnitude > largest ? magnitude : largest;
    }
    return from_bits((uint32_t)largest);
}

enum { STRIP = 32 }; /* elements coded at once; every block size is a multiple of it */

/* Codes of one strip; missing elements of the weight's tail are zero. */
INLINE void code_strip(const float *x, float absmax, float scale, int format, uint8_t *out) {
    const float infinity = from_bits(0x7F800000);
    float normalized[STRIP];
    int32_t code[STRIP] = {0};
    if (!(scale > 0)) absmax = scale = infinity; /* a zero block codes as 0.0 */
    float factor = 1 / scale;
    for (int i = 0; i < STRIP; i++) {
        float extreme = x[i] >= absmax ? 1.0f : -1.0f;
        float inner = format == BNB ? x[i] * factor : x[i] / scale;
        int is_extreme = format != BNB && (x[i] >= absmax || -x[i] >= absmax);
        normalized[i] = is_extreme ? extreme : inner;
    }
    for (int k = 0; k < 15; k++) {
        float midpoint = (CODEBOOK[k] + CODEBOOK[k + 1]) / 2;
        for (int i = 0; i < STRIP; i++) code[i] += normalized[i] > midpoint;
    }
    for (int i = 0; i < STRIP; i++) out[i] = (uint8_t)code[i];
}

INLINE void code_block(const void *weight, int64_t start, int64_t length, float absmax,
                       float decoded, uint8_t *codes, int format, int dtype) {
    int tiny = format != BNB && decoded < 16 * smallest_normal(dtype);
    for (int64_t at = 0; at < length; at += STRIP) {
        int64_t count = min64(STRIP, length - at);
        float x[STRIP] = {0};
        uint8_t code[STRIP];
        for (int64_t i = 0; i < count; i++) x[i] = load(weight, start + at + i, dtype);
        code_strip(x, absmax, decoded, format, code);
        if (tiny) { /* products leave the normal range: take the codes of a second pass */
            for (int i = 0; i < STRIP; i++) x[i] = round_to(CODEBOOK[code[i]] * decoded, dtype);
            code_strip(x, decoded, decoded, format, code);
        }
        uint8_t *out = codes + (start + at) / 2;
        for (int64_t i = 0; i < (count + 1) / 2; i++)
            out[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
    }
}

/* Best of 16 scales for one block; the first of equals. Elements past the tail are zero. */
INLINE float search_scale(const void *weight, int64_t start, int64_t length, int64_t block_size,
                          float absmax, float *error, int dtype) {
    float best = absmax, least = from_bits(0x7F800000);
    if (!(absmax > 0)) return absmax;
    for (int k = 0; k < 16; k++) {
        float scale = round_to(absmax * (float)(1 - 0.02 * k), dtype);
        for (int64_t at = 0; at < block_size; at += STRIP) {
            int64_t count = length - at < STRIP ? (length > at ? length - at : 0) : STRIP;
            float x[STRIP] = {0};
            uint8_t code[STRIP];
            for (int64_t i = 0; i < count; i++) x[i] = load(weight, start + at + i, dtype);
            code_strip(x, absmax, scale, GEOMETRIC, code);
            for (int i = 0; i < STRIP; i++) {
                float e = (x[i] - round_to(CODEBOOK[code[i]] * scale, dtype)) / absmax;
                error[at + i] = e * e;
            }
        }
        for (int64_t half = block_size / 2; half > 0; half /= 2)
            for (int64_t i = 0; i < half; i++) error[i] += error[i + half];
        if (error[0] < least) {
            least = error[0];
            best = scale;
        }
    }
    return best;
}

INLINE int quantize(const void *weight, uint8_t *codes, void *scales, float *groups, int64_t numel,
                    int64_t block_size, int64_t scale_block_size, int format, int search,
                    int threads, int dtype) {
    int64_t blocks = ceil_div(numel, block_size), group_count = ceil_div(blocks, scale_block_size);
    int64_t buffer_size = min64(scale_block_size, blocks);
    int failed = 0; /* 1: NaN or infinity, 2: out of memory */
#pragma omp parallel num_threads(threads) reduction(max : failed)
    {
        float *absmax = malloc((size_t)(2 * buffer_size + block_size) * sizeof(float));
        float *wanted = absmax + buffer_size, *error = wanted + buffer_size;
        if (!absmax) failed = 2;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < group_count; g++) {
            if (!absmax) continue;
            int64_t first = g * scale_block_size, count = min64(scale_block_size, blocks - first);
            int finite = 1;
            for (int64_t b = 0; b < count; b++) {
                int64_t start = (first + b) * block_size;
                int64_t length = min64(block_size, numel - start);
                absmax[b] = wanted[b] = block_absmax(weight, start, length, dtype);
                finite &= to_bits(absmax[b]) < 0x7F800000;
                if (search && finite)
                    wanted[b] = search_scale(weight, start, length, block_size, absmax[b], error,
                                             dtype);
            }
            if (!finite) {
                failed = 1;
                continue;
            }
            uint8_t *scale_codes = (uint8_t *)scales + first;
            if (format == GEOMETRIC)
                encode_scales(wanted, count, scale_codes, groups + 2 * g, dtype);
            else
                memcpy((float *)scales + first, wanted, (size_t)count * sizeof(float));
            for (int64_t b = 0; b < count; b++) {
                float decoded = wanted[b];
                if (format == GEOMETRIC)
                    decoded = !scale_codes[b] ? 0 : round_to(
                        grid_scale(scale_codes[b], groups[2 * g], groups[2 * g + 1]), dtype);
                int64_t start = (first + b) * block_size;
                code_block(weight, start, min64(block_size, numel - start), absmax[b], decoded,
                           codes, format, dtype);
            }
        }
        free(absmax);
    }
    return failed;
}

int qlora_quantize_nf4(const void *weight, uint8_t *codes, void *scales, float *groups,
                       int64_t numel, int64_t block_size, int64_t scale_block_size, int64_t format,
                       int64_t dtype, int64_t search, int64_t threads) {
#define ARGS                                                                                  \
    weight, codes, scales, groups, numel, block_size, scale_block_size, (int)format,          \
        (int)search, (int)threads
    if (dtype == BFLOAT16) return quantize(ARGS, BFLOAT16);
    if (dtype == FLOAT16) return quantize(ARGS, FLOAT16);
    return quantize(ARGS, FLOAT32);
#undef ARGS
}
