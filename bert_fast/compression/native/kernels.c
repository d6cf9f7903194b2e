/* Loops that torch would make several passes of, or index with 64 bits. Called through ctypes by the modules of this folder,
   which say what is expected; each has a twin in torch. Blocks are independent, so that callers can divide them over threads. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* One more with every change of this file, here and in __init__.py: what was built of an older one is not used. */
int64_t kernels_version(void) { return 1; }

enum { STRETCH = 64, CHUNK = 512 };

static inline float of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* To the nearest, ties to even, as torch rounds. */
static inline uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* The place of the number of the largest magnitude in each block of `values` [blocks, block]; NaN is the largest of all. */
FOR_EACH_PROCESSOR void select_largest(const uint32_t *values, int64_t blocks, int64_t block, int64_t *places) {
    for (int64_t b = 0; b < blocks; b++) {
        const uint32_t *own = values + b * block;
        uint32_t largest = 0;
        for (int64_t i = 0; i < block; i++) {
            uint32_t size = own[i] & 0x7fffffffu; /* magnitudes of floating-point numbers are ordered as their bits */
            largest = size > largest ? size : largest;
        }
        int64_t place = 0;
        while ((own[place] & 0x7fffffffu) != largest) place++;
        places[b] = place;
    }
}

/* Error feedback and block Top-1 in one pass: of each block of c = values + residual the largest number, as bf16, and what is
   left of c as the new residual, bf16. The last block of `length` numbers may be shorter. `values` becomes c.

   places, selected: [blocks] */
FOR_EACH_PROCESSOR void feed_back_largest(float *values, uint16_t *residual, int64_t first, int64_t end, int64_t block,
                                          int64_t length, int16_t *places, uint16_t *selected) {
    for (int64_t b = first; b < end; b++) {
        float *own = values + b * block;
        uint16_t *left = residual + b * block;
        int64_t count = length - b * block < block ? length - b * block : block;
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; i++) {
            own[i] += of_bf16(left[i]);
            left[i] = to_bf16(own[i]);
            uint32_t size = bits_of(own[i]) & 0x7fffffffu;
            largest = size > largest ? size : largest;
        }
        int64_t place = 0;
        while ((bits_of(own[place]) & 0x7fffffffu) != largest) place++;
        places[b] = (int16_t)place;
        selected[b] = to_bf16(own[place]);
        left[place] = to_bf16(own[place] - of_bf16(selected[b]));
    }
}

/* sums[j] += the scalar product of row j of a window with its row `newest`; arguments as of `window_products`.

   dense: fp32 [block], zeros, and zeros again afterwards */
FOR_EACH_PROCESSOR void window_products_of_row(const int16_t *places, const uint16_t *stored, int64_t blocks, int64_t selected,
                                               int64_t m, int64_t newest, float *dense, float *scratch, double *sums) {
    int64_t since = 0;
    memset(scratch, 0, (size_t)m * sizeof *scratch);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t low = b * selected, high = low + selected;
        for (int64_t r = low; r < high; r++) dense[places[r * m + newest]] = of_bf16(stored[r * m + newest]);
        for (int64_t r = low; r < high; r++) {
            const int16_t *place = places + r * m;
            const uint16_t *value = stored + r * m;
            for (int64_t j = 0; j < m; j++) scratch[j] += of_bf16(value[j]) * dense[place[j]];
            if (++since == STRETCH || r + 1 == blocks * selected) { /* short sums in fp32, added up in fp64 */
                for (int64_t j = 0; j < m; j++) sums[j] += scratch[j];
                memset(scratch, 0, (size_t)m * sizeof *scratch);
                since = 0;
            }
        }
        for (int64_t r = low; r < high; r++) dense[places[r * m + newest]] = 0.0f;
    }
}

/* sums[j] += the scalar product of row j of a window with `values` [blocks, block].

   places, stored: [blocks, selected, m], as SparseWindow has them; stored is bf16
   scratch:        fp32 [m] */
FOR_EACH_PROCESSOR void window_products(const int16_t *places, const uint16_t *stored, int64_t blocks, int64_t selected,
                                        int64_t m, int64_t block, const float *values, float *scratch, double *sums) {
    int64_t rows = blocks * selected;
    for (int64_t first = 0; first < rows; first += STRETCH) { /* short sums in fp32, added up in fp64 */
        int64_t end = first + STRETCH < rows ? first + STRETCH : rows;
        memset(scratch, 0, (size_t)m * sizeof *scratch);
        for (int64_t r = first; r < end; r++) {
            const float *own = values + r / selected * block;
            const int16_t *place = places + r * m;
            const uint16_t *value = stored + r * m;
            for (int64_t j = 0; j < m; j++) scratch[j] += of_bf16(value[j]) * own[place[j]];
        }
        for (int64_t j = 0; j < m; j++) sums[j] += scratch[j];
    }
}

/* out [blocks, block] = the sum of a window's rows, or of their squares, each times its coefficient [m]. */
FOR_EACH_PROCESSOR void window_combine(const int16_t *places, const uint16_t *stored, int64_t blocks, int64_t selected,
                                       int64_t m, int64_t block, const float *coefficients, int64_t squares, float *out) {
    float terms[CHUNK];
    for (int64_t b = 0; b < blocks; b++) {
        float *own = out + b * block;
        memset(own, 0, (size_t)block * sizeof *own);
        for (int64_t r = b * selected; r < (b + 1) * selected; r++) {
            for (int64_t from = 0; from < m; from += CHUNK) {
                int64_t count = m - from < CHUNK ? m - from : CHUNK;
                const int16_t *place = places + r * m + from;
                const uint16_t *value = stored + r * m + from;
                if (squares) {
                    for (int64_t j = 0; j < count; j++) {
                        float number = of_bf16(value[j]);
                        terms[j] = number * number * coefficients[from + j];
                    }
                } else {
                    for (int64_t j = 0; j < count; j++) terms[j] = of_bf16(value[j]) * coefficients[from + j];
                }
                for (int64_t j = 0; j < count; j++) own[place[j]] += terms[j];
            }
        }
    }
}
