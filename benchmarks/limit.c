/* What a core can do at most, without loads: for runtime.py. */

#include <stdint.h>

#define TIMES8(line) line line line line line line line line

/* 8 `count` additions that wait for each other: a cycle each. */
void cycles(uint64_t count) {
    uint64_t x = 0;
    for (uint64_t i = 0; i < count; i++) __asm__ volatile(TIMES8("add $1, %0\n") : "+r"(x));
}

#if defined(__AVX512VPOPCNTDQ__)
#define PRODUCTS(sum) "vpxord %%zmm30, %%zmm31, %%zmm29\n vpopcntd %%zmm29, %%zmm29\n vpaddd %%zmm29, " sum ", " sum "\n"
#define SUMS PRODUCTS("%%zmm0") PRODUCTS("%%zmm1") PRODUCTS("%%zmm2") PRODUCTS("%%zmm3") PRODUCTS("%%zmm4") \
             PRODUCTS("%%zmm5") PRODUCTS("%%zmm6") PRODUCTS("%%zmm7")
#define USED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm29"
const uint64_t products = 8 * 512;
#else
#define PRODUCTS(sum) "vpshufb %%ymm14, %%ymm15, %%ymm13\n vpaddb %%ymm13, " sum ", " sum "\n"
#define SUMS PRODUCTS("%%ymm0") PRODUCTS("%%ymm1") PRODUCTS("%%ymm2") PRODUCTS("%%ymm3") PRODUCTS("%%ymm4") \
             PRODUCTS("%%ymm5") PRODUCTS("%%ymm6") PRODUCTS("%%ymm7")
#define USED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm13"
const uint64_t products = 8 * 128;
#endif

/* `count` times `products` products of signs, as words.h or nibbles.h computes them, in registers. */
void multiply(uint64_t count) {
    for (uint64_t i = 0; i < count; i++) __asm__ volatile(SUMS : : : USED);
}
