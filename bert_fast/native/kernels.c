/* Loops that torch would make several passes of, or index with 64 bits. Called through ctypes by the modules of this folder,
   which say what is expected; each has a twin in torch. Blocks are independent, so that callers can divide them over threads. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum { STRETCH = 64, CHUNK = 512 };

static inline float of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
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
