/* What new versions of clang have built in and other compilers lack, for the types of vectors.h, which includes this. */

#if !__has_builtin(__builtin_bit_cast)
#define __builtin_bit_cast(type, value) (((union { __typeof__(value) from; type to; }){value}).to)
#endif

#if !__has_builtin(__builtin_elementwise_fma)
#if defined(__AVX512F__) && !defined(__clang__)
#define __builtin_elementwise_fma(a, b, c) __builtin_ia32_vfmaddps512_mask(a, b, c, 0xffff, 4)
#elif defined(__FMA__) && !defined(__clang__)
typedef float F8 __attribute__((vector_size(32)));
typedef union {
    F whole;
    F8 half[2];
} Halves;
INLINE F __builtin_elementwise_fma(F a, F b, F c) {
    Halves x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.half[i] = __builtin_ia32_vfmaddps256(x.half[i], y.half[i], z.half[i]);
    return z.whole;
}
#else
INLINE F __builtin_elementwise_fma(F a, F b, F c) {
    F result;
    for (int l = 0; l < LANES; l++) result[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return result;
}
#endif
#endif

#if !__has_builtin(__builtin_elementwise_sqrt)
#if defined(__SSE__)
typedef float F4 __attribute__((vector_size(16)));
INLINE F __builtin_elementwise_sqrt(F x) {
    union {
        F whole;
        F4 quarter[4];
    } all = {x};
    for (int i = 0; i < 4; i++) all.quarter[i] = __builtin_ia32_sqrtps(all.quarter[i]);
    return all.whole;
}
#else
INLINE F __builtin_elementwise_sqrt(F x) {
    for (int l = 0; l < LANES; l++) x[l] = __builtin_sqrtf(x[l]);
    return x;
}
#endif
#endif

#if !__has_builtin(__builtin_elementwise_popcount)
#if defined(__AVX512VPOPCNTDQ__) && !defined(__clang__)
#define __builtin_elementwise_popcount(x) ((U)__builtin_ia32_vpopcountd_v16si((I)(x)))
#elif defined(__AVX512VPOPCNTDQ__)
INLINE U __builtin_elementwise_popcount(U x) {
    for (int l = 0; l < LANES; l++) x[l] = (uint32_t)__builtin_popcount(x[l]);
    return x;
}
#else
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
INLINE Bytes __builtin_elementwise_popcount(Bytes x) {
    for (int l = 0; l < 4 * LANES; l++) x[l] = (uint8_t)__builtin_popcount(x[l]);
    return x;
}
#endif
#endif

/* Bit l is that of lane l of a mask. */
#if defined(__clang__) && __clang_major__ >= 16
INLINE uint16_t bits_of(I mask) {
    typedef _Bool Lanes __attribute__((ext_vector_type(LANES)));
    return __builtin_bit_cast(uint16_t, __builtin_convertvector(mask, Lanes));
}
#else
INLINE uint16_t bits_of(I mask) {
    I own = {1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12,
             1 << 13, 1 << 14, 1 << 15};
    int32_t all = 0;
    for (int l = 0; l < LANES; l++) all |= (mask & own)[l];
    return (uint16_t)all;
}
#endif
