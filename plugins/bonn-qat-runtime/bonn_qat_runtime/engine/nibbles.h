/* Counting with a byte shuffle, for CPUs with AVX2 and no count of bits in vectors.

   How a nibble of four signs differs from each of the 16 nibbles of weights is a row of 16 bytes. One shuffle looks it up
   for 32 filters: 128 products. A byte holds the counts of 63 nibbles. */

#define TILE 4
#define BLOCK 64
#define LOOKUPS 62 /* even: nibbles of weights come in pairs */

typedef uint8_t Unit;
typedef uint8_t Weight;
typedef int8_t B __attribute__((vector_size(32)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef uint8_t O __attribute__((vector_size(32)));
typedef uint16_t W32 __attribute__((vector_size(64)));

/* Rows for each number that a byte can hold, although a plan that was compiled has none above 30. */
#define D(a, w) __builtin_popcount((a) ^ (w))
#define ROW(a) {D(a, 0), D(a, 1), D(a, 2), D(a, 3), D(a, 4), D(a, 5), D(a, 6), D(a, 7), D(a, 8), D(a, 9), D(a, 10), \
                D(a, 11), D(a, 12), D(a, 13), D(a, 14), D(a, 15)}
static const uint8_t differing[129][16] __attribute__((aligned(64))) = {
    ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7), ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13),
    ROW(14), ROW(15)};

INLINE int64_t units_of(int64_t channels) { return (channels + 15) / 16 * 4; }
INLINE int64_t weights_of(int64_t channels) { return (channels + 15) / 16 * 2; } /* bytes of a tap and filter */

/* 16 signs -> the four bytes of their nibbles. */
INLINE void spread_half(uint32_t bits, int64_t half, Unit *to) {
    bits = (bits | bits << 8) & 0x00ff00ff;
    bits = ((bits | bits << 4) & 0x0f0f0f0f) << 1;
    memcpy(to + 4 * half, &bits, sizeof bits);
}

#define IS_SPREAD(halves) 0

INLINE void spread_pixels(const uint16_t *signs, int64_t pixels, int64_t halves, Unit *to) {
    for (int64_t half = 0; half < pixels * halves; half++) spread_half(signs[half], half, to);
}

INLINE B look_up(Unit nibble, B weights) {
    B16 row;
    memcpy(&row, (const uint8_t *)differing + 8 * (size_t)nibble, sizeof row);
    B both = __builtin_shufflevector(row, row, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5,
                                     6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (B)__builtin_ia32_pshufb256((__attribute__((vector_size(32))) char)both,
                                       (__attribute__((vector_size(32))) char)weights);
}

/* Move the counts of bytes to `counts`, 16 bits each. */
INLINE void empty(O sums[TILE][BLOCK / 32], int tile, int block, int is_first, uint16_t *counts) {
#pragma GCC unroll 4
    for (int p = 0; p < tile; p++)
#pragma GCC unroll 2
        for (int s = 0; s < block / 32; s++) {
            W32 total = __builtin_convertvector(sums[p][s], W32), before;
            memcpy(&before, counts + p * block + 32 * s, sizeof before);
            if (!is_first) total += before;
            memcpy(counts + p * block + 32 * s, &total, sizeof total);
            sums[p][s] = (O){0};
        }
}

typedef struct {
    uint16_t of[TILE * BLOCK];
} Counts;

INLINE I count_of(const Counts *counts, int p, int block, int64_t l) {
    H sixteen;
    memcpy(&sixteen, counts->of + p * block + l, sizeof sixteen);
    return __builtin_convertvector(sixteen, I);
}

/* The signs that differ in the windows of `tile` pixels from the weights of a block of filters. */
INLINE void count_differing(const Row *r, const Unit *x, const Weight *w, const int64_t *starts, int64_t group,
                            int64_t columns, int tile, int block, Counts *counts) {
    int64_t units = units_of(r->channels / r->groups), pixel = r->groups * units;
    int64_t length = units, taps = r->kernel[1], left = LOOKUPS;
    if (r->groups == 1 && r->dilation[1] == 1) length *= taps, taps = 1; /* a row of a window in one run */
    int sets = block / 32, is_first = 1;
    O sums[TILE][BLOCK / 32] = {0};
    for (int64_t i = 0; i < r->kernel[0]; i++)
        for (int64_t j = 0; j < taps; j++) {
            const Unit *from[TILE];
            for (int p = 0; p < tile; p++)
                from[p] = x + (starts[p] + i * r->dilation[0] * columns + j * r->dilation[1]) * pixel + group * units;
            for (int64_t k = 0; k < length;) {
                int64_t stop = k + left < length ? k + left : length;
                left -= stop - k;
                for (; k < stop; k += 2, w += block) {
                    B low[BLOCK / 32], high[BLOCK / 32];
#pragma GCC unroll 2
                    for (int s = 0; s < sets; s++) {
                        O pair;
                        memcpy(&pair, w + 32 * s, sizeof pair);
                        low[s] = (B)(pair & 15), high[s] = (B)(pair >> 4);
                    }
#pragma GCC unroll 4
                    for (int p = 0; p < tile; p++)
#pragma GCC unroll 2
                        for (int s = 0; s < sets; s++) {
                            sums[p][s] += (O)look_up(from[p][k], low[s]);
                            sums[p][s] += (O)look_up(from[p][k + 1], high[s]);
                        }
                }
                if (left == 0) {
                    empty(sums, tile, block, is_first, counts->of);
                    is_first = 0, left = LOOKUPS;
                }
            }
        }
    if (is_first || left < LOOKUPS) empty(sums, tile, block, is_first, counts->of);
}
