/* Decode NF4 on CPUs; nf4_cpu.h has the layout.

   Formula
       w = round(codebook[code] * round(scale)); for bnb the scale is not rounded

   How
       The 16 values that a block can hold are computed, rounded to the weight's dtype and then to
       the output's, and then only looked up: with AVX-512 by one permute for 16 elements, with
       SSE 4.1 by one shuffle for a byte of each of 16. Threads split blocks. Outputs of 4 MiB and
       more ask Linux for large pages.
       Measured on one core of an AMD EPYC (Zen 4), 4096 x 4096 bfloat16, geometric, blocks of 64 in
       groups of 256, into a buffer: 2.6 ms, to float32 3.2 ms; without AVX-512 7.2 and 9.7 ms. */

#include "nf4_cpu.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

INLINE void store(void *out, int64_t i, float x, int dtype) {
    if (dtype == BFLOAT16) ((uint16_t *)out)[i] = (uint16_t)(to_bits(x) >> 16);
    else if (dtype == FLOAT16) ((uint16_t *)out)[i] = float_to_half(x);
    else ((float *)out)[i] = x;
}

#ifdef __SSE4_1__

/* The high and low nibbles of 16 bytes in the order of their elements. */
INLINE void unpack_nibbles(const uint8_t *bytes, __m128i *first, __m128i *second) {
    __m128i packed = _mm_loadu_si128((const __m128i *)bytes), mask = _mm_set1_epi8(15);
    __m128i high = _mm_and_si128(_mm_srli_epi16(packed, 4), mask);
    __m128i low = _mm_and_si128(packed, mask);
    *first = _mm_unpacklo_epi8(high, low);
    *second = _mm_unpackhi_epi8(high, low);
}

#endif

#if defined(HAVE_AVX512)

/* 32 elements at a time: permute, narrow. Returns how many are done. */
INLINE int64_t look_up_vectors(Floats values, const uint8_t *bytes, char *out,
                               int64_t length, int out_dtype) {
    int64_t i = 0;
    const __m512 table = (__m512)values;
    for (; i + 32 <= length; i += 32) {
        __m128i codes[2];
        unpack_nibbles(bytes + i / 2, codes, codes + 1);
        for (int h = 0; h < 2; h++) {
            __m512 x = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes[h]), table);
            if (out_dtype == FLOAT32) {
                _mm512_storeu_ps((float *)out + i + 16 * h, x);
            } else {
                __m256i narrow = out_dtype == FLOAT16
                    ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)
                    : _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16));
                _mm256_storeu_si256((__m256i *)((uint16_t *)out + i + 16 * h), narrow);
            }
        }
    }
    return i;
}

#elif defined(__SSE4_1__)

/* Sixteen 16-bit words as two tables, of their low and of their high bytes. */
INLINE void split_bytes(__m128i first, __m128i second, __m128i *tables) {
    __m128i mask = _mm_set1_epi16(255);
    tables[0] = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
    tables[1] = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
}

/* A table for every byte of an output; returns how many these are. */
INLINE int byte_tables(Floats values, __m128i *tables, int out_dtype) {
    if (out_dtype == FLOAT16) {
        uint16_t halves[16];
        for (int k = 0; k < 16; k++) halves[k] = float_to_half(values[k]);
        split_bytes(_mm_loadu_si128((const __m128i *)halves),
                    _mm_loadu_si128((const __m128i *)(halves + 8)), tables);
        return 2;
    }
    __m128i low[4], high[4], mask = _mm_set1_epi32(0xFFFF);
    for (int j = 0; j < 4; j++) {
        __m128i bits;
        memcpy(&bits, (const float *)&values + 4 * j, sizeof bits);
        low[j] = _mm_and_si128(bits, mask);
        high[j] = _mm_srli_epi32(bits, 16);
    }
    if (out_dtype == FLOAT32)
        split_bytes(_mm_packus_epi32(low[0], low[1]), _mm_packus_epi32(low[2], low[3]), tables);
    split_bytes(_mm_packus_epi32(high[0], high[1]), _mm_packus_epi32(high[2], high[3]),
                tables + (out_dtype == FLOAT32 ? 2 : 0));
    return out_dtype == FLOAT32 ? 4 : 2;
}

/* 32 elements at a time, a byte of each by one shuffle. Returns how many are done. */
INLINE int64_t look_up_vectors(Floats values, const uint8_t *bytes, char *out,
                               int64_t length, int out_dtype) {
    int64_t i = 0;
    __m128i tables[4];
    const int size = byte_tables(values, tables, out_dtype);
    for (; i + 32 <= length; i += 32) {
        __m128i codes[2];
        unpack_nibbles(bytes + i / 2, codes, codes + 1);
        for (int h = 0; h < 2; h++) {
            __m128i *to = (__m128i *)(out + (i + 16 * h) * size);
            __m128i b0 = _mm_shuffle_epi8(tables[0], codes[h]);
            __m128i b1 = _mm_shuffle_epi8(tables[1], codes[h]);
            __m128i low0 = _mm_unpacklo_epi8(b0, b1), low1 = _mm_unpackhi_epi8(b0, b1);
            if (size == 2) {
                _mm_storeu_si128(to, low0);
                _mm_storeu_si128(to + 1, low1);
                continue;
            }
            __m128i b2 = _mm_shuffle_epi8(tables[2], codes[h]);
            __m128i b3 = _mm_shuffle_epi8(tables[3], codes[h]);
            __m128i high0 = _mm_unpacklo_epi8(b2, b3), high1 = _mm_unpackhi_epi8(b2, b3);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(low0, high0));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low0, high0));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(low1, high1));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(low1, high1));
        }
    }
    return i;
}

#else

INLINE int64_t look_up_vectors(Floats values, const uint8_t *bytes, char *out,
                               int64_t length, int out_dtype) {
    (void)values, (void)bytes, (void)out, (void)length, (void)out_dtype;
    return 0;
}

#endif

INLINE void look_up_block(Floats values, const uint8_t *bytes, char *out, int64_t length,
                          int out_dtype) {
    for (int64_t i = look_up_vectors(values, bytes, out, length, out_dtype); i < length; i++)
        store(out, i, values[i & 1 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4], out_dtype);
}

/* A fresh 32 MiB result costs more in page faults than in decoding: large pages halve the time. */
static void ask_for_large_pages(void *out, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, start = ((uintptr_t)out + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)out + (uintptr_t)bytes) / page * page;
    if (bytes >= 1 << 22) (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)out, (void)bytes;
#endif
}

/* `rows` pieces of `count` elements, the first at element `first` and each `stride` after the one
   before, go to out[0 ..] without gaps. first and stride are multiples of block_size, and so is
   count where there are several pieces. scale_codebook[256] is read by bnb only. */
INLINE void dequantize(const uint8_t *codes, const void *scales, const float *groups,
                       const float *scale_codebook, void *out, int64_t first, int64_t count,
                       int64_t rows, int64_t stride, int64_t block_size, int64_t scale_block_size,
                       int format, int dtype, int threads, int out_dtype) {
    const int64_t blocks = ceil_div(count, block_size), out_size = out_dtype == FLOAT32 ? 4 : 2;
    ask_for_large_pages(out, rows * count * out_size);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t start = first + r * stride, block = start / block_size + b;
            const float *group = group_of(groups, block, scale_block_size);
            float scale = block_scale(scales, group, scale_codebook, block, format, dtype);
            const Floats values = block_values(scale, dtype, out_dtype);
            const int64_t at = b * block_size;
            look_up_block(values, codes + (start + at) / 2,
                          (char *)out + (r * count + at) * out_size,
                          min64(block_size, count - at), out_dtype);
        }
    }
}

int qlora_dequantize_nf4(const uint8_t *codes, const void *scales, const float *groups,
                         const float *scale_codebook, int64_t block_size, int64_t scale_block_size,
                         int64_t format, int64_t dtype, void *out, int64_t out_dtype,
                         int64_t first, int64_t count, int64_t rows, int64_t stride,
                         int64_t threads) {
#define ARGS                                                                                  \
    codes, scales, groups, scale_codebook, out, first, count, rows, stride, block_size,       \
        scale_block_size, (int)format
#define DISPATCH(D)                                                             \
    if (out_dtype == BFLOAT16) dequantize(ARGS, D, (int)threads, BFLOAT16);     \
    else if (out_dtype == FLOAT16) dequantize(ARGS, D, (int)threads, FLOAT16);  \
    else dequantize(ARGS, D, (int)threads, FLOAT32)
    if (dtype == BFLOAT16) { DISPATCH(BFLOAT16); }
    else if (dtype == FLOAT16) { DISPATCH(FLOAT16); }
    else { DISPATCH(FLOAT32); }
    return 0;
}
