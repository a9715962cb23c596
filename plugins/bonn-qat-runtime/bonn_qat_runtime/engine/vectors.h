/* Vectors of 16 numbers, which the compiler spreads over the registers of the machine. */

#ifndef VECTORS_H
#define VECTORS_H

#include <stddef.h>
#include <stdint.h>

#define memcpy __builtin_memcpy /* there may be no C library */
#define memset __builtin_memset

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

#include "builtins.h"

INLINE F load(const float *from) {
    F x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, F x) { memcpy(to, &x, sizeof x); }

INLINE F fill(float x) { return x - (F){0}; }

INLINE F pick(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }

/* a b + c, rounded once on every machine. */
#if defined(__FMA__) || defined(__aarch64__)
INLINE F fused(F a, F b, F c) { return __builtin_elementwise_fma(a, b, c); }
#else
typedef double D __attribute__((vector_size(8 * LANES)));
typedef uint64_t L __attribute__((vector_size(8 * LANES)));

INLINE float fused_one(float a, float b, float c) {
    /* The product is exact in double. A sum that is not is rounded to an odd last bit, so that rounding it once more
       gives what a single rounding would. */
    double product = (double)a * (double)b, sum = product + (double)c, back = sum - product;
    double error = (product - (sum - back)) + ((double)c - back);
    int64_t bits = __builtin_bit_cast(int64_t, sum);
    int is_finite = (bits >> 52 & 0x7ff) != 0x7ff;
    if (is_finite && error != 0 && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
    return (float)__builtin_bit_cast(double, bits);
}

static __attribute__((noinline, cold)) F fused_apart(F a, F b, F c) {
    F result;
    for (int l = 0; l < LANES; l++) result[l] = fused_one(a[l], b[l], c[l]);
    return result;
}

INLINE F fused(F a, F b, F c) {
    D sum = __builtin_convertvector(a, D) * __builtin_convertvector(b, D) + __builtin_convertvector(c, D);
    /* Rounding twice is wrong only if the first result lies halfway between two floats, or below the normal ones. */
    L bits = (L)sum & 0x7fffffffffffffff;
    L odd = (L)((bits & 0x1fffffff) == 0x10000000) | (L)((bits - 1) < 0x380fffffffffffff);
    uint64_t any = 0;
    for (int l = 0; l < LANES; l++) any |= odd[l];
    return __builtin_expect(any != 0, 0) ? fused_apart(a, b, c) : __builtin_convertvector(sum, F);
}
#endif

#endif
