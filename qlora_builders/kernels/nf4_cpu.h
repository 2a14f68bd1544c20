/* NF4 on CPUs: what the kernels share. They give, bit for bit, what nf4_reference.py gives.

   Layout (n elements, blocks of `block_size`, groups of `scale_block_size` blocks)

       weight   w0 w1 w2 w3 ...                n elements, row-major
       codes    [w0:hi nibble | w1:lo nibble]  one byte per pair, ceil(n / 2) bytes
       scales   one per block: uint8 code (geometric, bnb) or float32 (none)
       groups   two float32 per group: smallest positive and largest scale (geometric);
                largest magnitude of (scale - offset), offset (bnb)

   Limits
       float32, bfloat16, float16; pointers aligned as their type; block_size even. Indices are
       64-bit. No fast-math: the compiler must not contract or reassociate.

   Compiled by nf4_cpu.py at first use; scripts/bench_nf4.py measures them. */

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_AVX512 1
#endif
#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { GEOMETRIC = 0, NONE = 1, BNB = 2 };

static const float CODEBOOK[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* ---- bits and dtypes ---------------------------------------------------------------------- */

INLINE uint32_t to_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
INLINE float from_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

INLINE uint16_t float_to_bfloat16(float x) { /* to nearest, ties to even; x finite */
    uint32_t b = to_bits(x);
    return (uint16_t)((b + 0x7FFF + ((b >> 16) & 1)) >> 16);
}

INLINE float half_to_float(uint16_t h) {
    uint32_t magnitude = h & 0x7FFF, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t special = 0x7F800000u | magnitude << 13; /* infinity and NaN */
    /* 2^112 moves the exponent bias from 15 to 127, exactly, subnormals included */
    uint32_t finite = to_bits(from_bits(magnitude << 13) * from_bits(0x77800000u));
    return from_bits(sign | (magnitude >= 0x7C00 ? special : finite));
}

INLINE uint16_t float_to_half(float x) { /* to nearest, ties to even; overflow is infinity */
    uint32_t b = to_bits(x), sign = (b >> 16) & 0x8000;
    b &= 0x7FFFFFFF;
    if (b >= 0x47800000) return (uint16_t)(sign | 0x7C00); /* 65536 and above */
    if (b < 0x38800000) /* subnormal halves: adding 0.5 rounds at its last bit, 2^-24 */
        return (uint16_t)(sign | (to_bits(from_bits(b) + 0.5f) - to_bits(0.5f)));
    return (uint16_t)(sign | ((b + 0xC8000FFFu + ((b >> 13) & 1)) >> 13));
}

INLINE float round_to(float x, int dtype) {
    if (dtype == BFLOAT16) return from_bits((uint32_t)float_to_bfloat16(x) << 16);
    if (dtype == FLOAT16) return half_to_float(float_to_half(x));
    return x;
}

INLINE float load(const void *data, int64_t i, int dtype) {
    if (dtype == BFLOAT16) return from_bits((uint32_t)((const uint16_t *)data)[i] << 16);
    if (dtype == FLOAT16) return half_to_float(((const uint16_t *)data)[i]);
    return ((const float *)data)[i];
}

INLINE float smallest_normal(int dtype) { return dtype == FLOAT16 ? 0x1p-14f : 0x1p-126f; }

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- scales ------------------------------------------------------------------------------- */

/* Scale of code k = 1..255 before rounding: its bit pattern lies k - 1 of 254 steps from lo. */
INLINE float grid_scale(int k, float lo, float hi) {
    int64_t lo_bits = to_bits(lo), hi_bits = to_bits(hi);
    return from_bits((uint32_t)(lo_bits + ((k - 1) * (hi_bits - lo_bits) + 127) / 254));
}

/* Scale of a block, rounded to the weight's dtype (bnb's is not). scale_codebook[256] is bnb's. */
INLINE float block_scale(const void *scales, const float *group, const float *scale_codebook,
                         int64_t block, int format, int dtype) {
    if (format == NONE) return round_to(((const float *)scales)[block], dtype);
    int k = ((const uint8_t *)scales)[block];
    if (format == BNB) return scale_codebook[k] * group[0] + group[1];
    return k ? round_to(grid_scale(k, group[0], group[1]), dtype) : 0;
}

/* The two scales of a block's group; sizes that are no power of two cost a division. */
INLINE const float *group_of(const float *groups, int64_t block, int64_t scale_block_size) {
    int64_t is_power = !(scale_block_size & (scale_block_size - 1));
    return groups + 2 * (is_power ? block >> __builtin_ctzll((uint64_t)scale_block_size)
                                  : block / scale_block_size);
}

/* Vectors of GCC and Clang: a loop over the constant codebook becomes 16 scalar lines. */
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

INLINE void round_all(Floats *x, int dtype) { /* round_to of each */
    if (dtype == BFLOAT16) {
        Words bits = (Words)*x;
        *x = (Floats)((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u);
    }
    if (dtype == FLOAT16) {
#ifdef HAVE_AVX512
        const int to_nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        *x = (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)*x, to_nearest));
#else
        for (int k = 0; k < 16; k++) (*x)[k] = round_to((*x)[k], FLOAT16);
#endif
    }
}

/* The 16 values a block can hold, rounded to the weight's dtype and then to the output's. */
INLINE Floats block_values(float scale, int dtype, int out_dtype) {
    Floats values;
    memcpy(&values, CODEBOOK, sizeof values);
    values *= scale;
    round_all(&values, dtype);
    if (out_dtype != dtype) round_all(&values, out_dtype);
    return values;
}
