/* Counting bits of words: in one instruction on CPUs that have it for vectors, by byte on ARM, else with shifts. */

/* Accumulators: TILE pixels by a block of filters, as many as fit into the registers. */
#if defined(__AVX512VPOPCNTDQ__)
#define TILE 8
#elif defined(__aarch64__)
#define TILE 4
#else
#define TILE 2
#endif
#define BLOCK 32
/* Where bits are counted by byte, counts are widened after this many words, before a byte overflows. */
#if defined(__AVX512VPOPCNTDQ__)
#define WORDS 0
#else
#define WORDS 31
#endif

typedef uint32_t Unit __attribute__((may_alias)); /* signs are written as halves */
typedef uint32_t Weight;

INLINE int64_t units_of(int64_t channels) { return (channels + 31) / 32; }
INLINE int64_t weights_of(int64_t channels) { return (channels + 31) / 32; } /* words of a tap and filter */

/* The first half of a word clears the second, which may not follow. */
INLINE void spread_half(uint32_t bits, int64_t half, Unit *to) {
    if (half % 2)
        to[half / 2] |= bits << 16;
    else
        to[half / 2] = bits;
}

/* The signs of a row of pixels, which are whole words already where their halves are even. */
#define IS_SPREAD(halves) ((halves) % 2 == 0)

INLINE void spread_pixels(const uint16_t *signs, int64_t pixels, int64_t halves, Unit *to) {
    if (IS_SPREAD(halves))
        memcpy(to, signs, sizeof(uint16_t) * (size_t)(pixels * halves));
    else
        for (int64_t p = 0; p < pixels; p++, signs += halves, to += (halves + 1) / 2)
            for (int64_t half = 0; half < halves; half++) spread_half(signs[half], half, to);
}

INLINE U count_ones(U x) {
#if WORDS == 0
    return __builtin_elementwise_popcount(x);
#elif defined(__aarch64__) || defined(__wasm_simd128__)
    typedef uint8_t O __attribute__((vector_size(4 * LANES)));
    return (U)__builtin_elementwise_popcount((O)x);
#else
    x = x - ((x >> 1) & 0x55555555);
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333);
    return (x + (x >> 4)) & 0x0f0f0f0f;
#endif
}

/* The counts of whole words. */
INLINE U widened(U counts) {
    if (WORDS == 0) return counts;
    counts = (counts & 0x00ff00ff) + ((counts >> 8) & 0x00ff00ff);
    return (counts & 0xffff) + (counts >> 16);
}

typedef struct {
    U of[TILE][BLOCK / LANES];
} Counts;

INLINE I count_of(const Counts *counts, int p, int block, int64_t l) {
    (void)block;
    return (I)counts->of[p][l / LANES];
}

/* The signs that differ in the windows of `tile` pixels from the weights of a block of filters. */
INLINE void count_differing(const Row *r, const Unit *x, const Weight *w, const int64_t *starts, int64_t group,
                            int64_t columns, int tile, int block, Counts *counts) {
    int64_t units = units_of(r->channels / r->groups), pixel = r->groups * units;
    int64_t length = units, taps = r->kernel[1], counted = 0;
    if (r->groups == 1 && r->dilation[1] == 1) length *= taps, taps = 1; /* a row of a window in one run */
    int sets = block / LANES;
    U sums[TILE][BLOCK / LANES] = {0}, bytes[TILE][BLOCK / LANES] = {0};
    for (int64_t i = 0; i < r->kernel[0]; i++)
        for (int64_t j = 0; j < taps; j++) {
            const Unit *from[TILE];
            for (int p = 0; p < tile; p++)
                from[p] = x + (starts[p] + i * r->dilation[0] * columns + j * r->dilation[1]) * pixel + group * units;
            for (int64_t k = 0; k < length; k++, w += block) {
                U weights[BLOCK / LANES];
#pragma GCC unroll 2
                for (int s = 0; s < sets; s++) memcpy(weights + s, w + s * LANES, sizeof *weights);
#pragma GCC unroll 8
                for (int p = 0; p < tile; p++)
#pragma GCC unroll 2
                    for (int s = 0; s < sets; s++) bytes[p][s] += count_ones(weights[s] ^ from[p][k]);
                if (WORDS && ++counted == WORDS) {
                    for (int p = 0; p < tile; p++)
                        for (int s = 0; s < sets; s++) sums[p][s] += widened(bytes[p][s]), bytes[p][s] = (U){0};
                    counted = 0;
                }
            }
        }
#pragma GCC unroll 8
    for (int p = 0; p < tile; p++)
#pragma GCC unroll 2
        for (int s = 0; s < sets; s++) counts->of[p][s] = sums[p][s] + widened(bytes[p][s]);
}
