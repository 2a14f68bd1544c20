/* Products of a few rows with an NF4 weight on CPUs with AVX-512: nothing is decoded to memory.

   Formula
       y[r][o] = sum over i of x[r][i] * w[o][i], with w as nf4_cpu_dequantize.c decodes it: its
       values are the same bits, the sums float32 in an order of their own, the same for any number
       of threads.

   Layout
       x     float32, a row at a time: its in / 2 even elements, then its in / 2 odd ones
       y     float32 [rows, out]
       codes, scales, groups: see nf4_cpu.h; a row of the weight is a whole number of blocks

   How
       A byte holds an even element in its high and an odd one in its low nibble. Sixteen bytes are
       widened to 32 bits each; shifted right by four they index the even elements' values, as they
       are the odd ones' (a permute looks at four bits of its index), so no nibble is ever moved
       into place: 32 weights take one load, one shift, two permutes and, for each row of x, two
       multiply-adds. The sixteen values of a block are computed once for all rows.
       Measured on one core of an AMD EPYC (Zen 4), 4096 x 4096 bfloat16, geometric, blocks of 64:
       1, 2, 3, 4 rows of float32 take 1.9, 2.1, 2.5, 2.9 ms; decoding to a buffer and multiplying
       takes 3.4, 4.1, 5.3, 6.9, a product with the decoded weight 2.9, 6.0, 9.3, 7.0.

   Limits
       1 to MOST_ROWS rows; block_size a multiple of 32 that divides in. Returns 1 and does nothing
       where the compiler's target has no AVX-512. */

#include "nf4_cpu.h"

enum { MOST_ROWS = 4 };

#ifdef HAVE_AVX512

INLINE void dot_rows(const float *x, const uint8_t *codes, const void *scales, const float *groups,
                     const float *scale_codebook, float *y, int64_t out_feature,
                     int64_t out_features, int64_t in_features, int64_t block_size,
                     int64_t scale_block_size, int format, int dtype, int x_dtype, int rows) {
    const int64_t half = in_features / 2, blocks = in_features / block_size;
    const uint8_t *bytes = codes + out_feature * half;
    __m512 even_sums[MOST_ROWS], odd_sums[MOST_ROWS];
    for (int r = 0; r < rows; r++) even_sums[r] = odd_sums[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t block = out_feature * blocks + b;
        const float *group = group_of(groups, block, scale_block_size);
        float scale = block_scale(scales, group, scale_codebook, block, format, dtype);
        const __m512 table = (__m512)block_values(scale, dtype, x_dtype);
        for (int64_t i = b * block_size / 2; i < (b + 1) * block_size / 2; i += 16) {
            __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(bytes + i)));
            __m512 odd = _mm512_permutexvar_ps(low, table);
            __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(low, 4), table);
            for (int r = 0; r < rows; r++) {
                const float *row = x + r * in_features + i;
                even_sums[r] = _mm512_fmadd_ps(even, _mm512_loadu_ps(row), even_sums[r]);
                odd_sums[r] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(row + half), odd_sums[r]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        y[r * out_features + out_feature] =
            _mm512_reduce_add_ps(_mm512_add_ps(even_sums[r], odd_sums[r]));
}

INLINE void matmul_rows(const float *x, const uint8_t *codes, const void *scales,
                        const float *groups, const float *scale_codebook, float *y,
                        int64_t out_features, int64_t in_features, int64_t block_size,
                        int64_t scale_block_size, int format, int dtype, int x_dtype, int threads,
                        int rows) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < out_features; o++)
        dot_rows(x, codes, scales, groups, scale_codebook, y, o, out_features, in_features,
                 block_size, scale_block_size, format, dtype, x_dtype, rows);
}

INLINE void matmul(const float *x, const uint8_t *codes, const void *scales, const float *groups,
                   const float *scale_codebook, float *y, int rows, int64_t out_features,
                   int64_t in_features, int64_t block_size, int64_t scale_block_size, int format,
                   int dtype, int x_dtype, int threads) {
#define CODE_FOR(ROWS)                                                                          \
    matmul_rows(x, codes, scales, groups, scale_codebook, y, out_features, in_features,         \
                block_size, scale_block_size, format, dtype, x_dtype, threads, ROWS)
    if (rows == 1) CODE_FOR(1);
    if (rows == 2) CODE_FOR(2);
    if (rows == 3) CODE_FOR(3);
    if (rows == 4) CODE_FOR(4);
#undef CODE_FOR
}

#endif

int qlora_matmul_nf4_rows(const uint8_t *codes, const void *scales, const float *groups,
                          const float *scale_codebook, int64_t block_size,
                          int64_t scale_block_size, int64_t format, int64_t dtype, const float *x,
                          int64_t x_dtype, float *y, int64_t rows, int64_t out_features,
                          int64_t in_features, int64_t threads) {
#ifdef HAVE_AVX512
#define DISPATCH(D, X)                                                                          \
    matmul(x, codes, scales, groups, scale_codebook, y, (int)rows, out_features, in_features,   \
           block_size, scale_block_size, (int)format, D, X, (int)threads)
#define DISPATCH_X(D)                                       \
    if (x_dtype == BFLOAT16) DISPATCH(D, BFLOAT16);         \
    else if (x_dtype == FLOAT16) DISPATCH(D, FLOAT16);      \
    else DISPATCH(D, FLOAT32)
    if (dtype == BFLOAT16) { DISPATCH_X(BFLOAT16); }
    else if (dtype == FLOAT16) { DISPATCH_X(FLOAT16); }
    else { DISPATCH_X(FLOAT32); }
    return 0;
#else
    (void)x, (void)codes, (void)scales, (void)groups, (void)scale_codebook, (void)y, (void)rows;
    (void)out_features, (void)in_features, (void)block_size, (void)scale_block_size, (void)format;
    (void)dtype, (void)x_dtype, (void)threads;
    return 1;
#endif
}
