/* The passes over activations and latent weights in a training step of a binary network, and its binary convolutions.

   Activations are (pixels, channels), the channels of a pixel next to each other, in float32 or bfloat16; `half` says
   which. Signs are bits of 32-bit words, and each pixel starts a word: bit i of word j is 1 where channel 32 j + i is
   +1, and 0 beyond the last channel. Sums over pixels are kept in float32 for a block of pixels and added up in double,
   by each thread for itself. Vectors have 16 numbers, which the compiler spreads over the registers of the machine.

   This file is compiled once for each set of instructions. VARIANT names it, and is a suffix of what is exported. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define BLOCK 64 /* pixels */
#define SUMS 3   /* at most, of a pass over pixels */
/* TILE output pixels of a convolution share a load of weights: as many as have their counts in registers. Where bits
   are counted by byte, counts are widened after WORDS words, before a byte overflows. */
#if defined(__AVX512VPOPCNTDQ__) && __has_builtin(__builtin_elementwise_popcount)
#define TILE 6
#define WORDS 0
#else
#define TILE 4
#define WORDS 31
#endif
#define INLINE static inline __attribute__((always_inline))
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define JOINED(name, suffix) name##_##suffix
#define SUFFIXED(name, suffix) JOINED(name, suffix)
#define NAME(name) SUFFIXED(name, VARIANT)

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

/* ---- vectors ---- */

INLINE F fill(float x) { return x - (F){0}; }
INLINE F pick(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }
INLINE F magnitude(F x) { return (F)((I)x & 0x7fffffff); }

INLINE F load(const void *array, int64_t at, int lanes, int half) {
    if (half) {
        H bits = {0};
        memcpy(&bits, (const uint16_t *)array + at, 2 * (size_t)lanes);
        return (F)(__builtin_convertvector(bits, U) << 16);
    }
    F x = {0};
    memcpy(&x, (const float *)array + at, 4 * (size_t)lanes);
    return x;
}

INLINE void store(void *array, int64_t at, F x, int lanes, int half) {
    if (half) {
        U bits = (U)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
        H result = __builtin_convertvector((U)pick((I)(x == x), (F)rounded, (F)((U){0} + 0x7fc0)), H);
        memcpy((uint16_t *)array + at, &result, 2 * (size_t)lanes);
    } else {
        memcpy((float *)array + at, &x, 4 * (size_t)lanes);
    }
}

/* Bit l is that of lane l of a mask. */
INLINE uint16_t bits_of(I mask) {
#if defined(__clang__)
    typedef _Bool Lanes __attribute__((ext_vector_type(LANES)));
    return __builtin_bit_cast(uint16_t, __builtin_convertvector(mask, Lanes));
#else
    uint16_t bits = 0;
    for (int l = 0; l < LANES; l++) bits |= (uint16_t)((mask[l] & 1) << l);
    return bits;
#endif
}

/* How many bits of each word are 1, or of each byte of it. */
INLINE U count_ones(U x) {
#if WORDS == 0
    return __builtin_elementwise_popcount(x);
#elif __has_builtin(__builtin_elementwise_popcount)
    typedef uint8_t B __attribute__((vector_size(4 * LANES)));
    return (U)__builtin_elementwise_popcount((B)x);
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

/* ---- threads ---- */

/* The threads are torch's own, those of the OpenMP library that comes with it: for some milliseconds they wait for work
   in a loop, in which others would be in their way. */
typedef void (*Fork)(void (*)(void *), void *, unsigned, unsigned);
static Fork fork_threads;
static int (*thread_number)(void), (*thread_count)(void);

EXPORT void NAME(use_threads)(Fork fork, int (*number)(void), int (*count)(void)) {
    fork_threads = fork, thread_number = number, thread_count = count;
}

typedef void Work(const void *task, int thread, int threads);
typedef struct {
    Work *work;
    const void *task;
} Job;

static void join_in(void *job) { ((Job *)job)->work(((Job *)job)->task, thread_number(), thread_count()); }

static void in_threads(Work *work, const void *task, int threads) {
    Job job = {work, task};
    if (threads > 1 && fork_threads)
        fork_threads(join_in, &job, (unsigned)threads, 0);
    else
        work(task, 0, 1);
}

/* Where the share of a thread begins, and that of the thread before it ends. */
INLINE int64_t border(int64_t items, int64_t step, int thread, int threads) {
    int64_t at = (items + step - 1) / step * thread / threads * step;
    return at < items ? at : items;
}

/* ---- passes over maps ---- */

typedef struct {
    const void *a, *c;                                      /* maps that are read */
    void *out;                                              /* and written */
    const float *alpha, *beta, *threshold, *mean, *factor;  /* a number for each channel */
    float *totals;                                          /* (SUMS, channels): the sums over all pixels */
    double *sums;                                           /* (threads, SUMS, channels): those of each thread */
    uint32_t *words;
    int64_t pixels, channels, taps;
    float clip;
    int32_t half, parabola;
} Task;

/* Maps of 4 MiB and more do not stay in a cache until the next pass. */
INLINE int is_large(const Task *k) { return k->pixels * k->channels >= 1 << 20; }

/* Stores to `out`, of a large map past the caches, which saves reading what is overwritten. */
INLINE void put(const Task *k, int64_t at, F x, int lanes, int half) {
#if __has_builtin(__builtin_nontemporal_store)
    F *place = (F *)((float *)k->out + at);
    if (is_large(k) && !half && lanes == LANES && (uintptr_t)place % sizeof x == 0) {
        __builtin_nontemporal_store(x, place);
        return;
    }
#endif
    store(k->out, at, x, lanes, half);
}

/* After this other threads see what was stored. */
INLINE void publish(void) {
#if defined(__x86_64__) && defined(__SSE__)
    __builtin_ia32_sfence();
#endif
}

INLINE double total(const Task *k, int64_t i, int threads) {
    double sum = 0;
    for (int t = 0; t < threads; t++) sum += k->sums[t * SUMS * k->channels + i];
    return sum;
}

static void add_threads(const Task *k, int threads) {
    for (int64_t i = 0; i < SUMS * k->channels; i++) k->totals[i] = (float)total(k, i, threads);
}

/* Defines name_work, which calls name_part for every block of pixels and of channels. The number of lanes is a constant
   for multiples of 8 channels, where loads and stores are then single instructions. */
#define WORK(name)                                                                                        \
    INLINE void name##_share(const Task *k, int thread, int threads, int half) {                          \
        int64_t end = border(k->pixels, BLOCK, thread + 1, threads);                                      \
        for (int64_t p = border(k->pixels, BLOCK, thread, threads); p < end; p += BLOCK) {                \
            int64_t stop = p + BLOCK < end ? p + BLOCK : end, c = 0;                                      \
            double *sums = k->sums ? k->sums + SUMS * k->channels * thread : 0;                           \
            for (; c + LANES <= k->channels; c += LANES) name##_part(k, p, stop, c, LANES, half, sums);   \
            if (k->channels - c == 8)                                                                     \
                name##_part(k, p, stop, c, 8, half, sums);                                                \
            else if (c < k->channels)                                                                     \
                name##_part(k, p, stop, c, (int)(k->channels - c), half, sums);                           \
        }                                                                                                 \
        publish();                                                                                        \
    }                                                                                                     \
    static void name##_work(const void *task, int thread, int threads) {                                  \
        if (((const Task *)task)->half)                                                                   \
            name##_share(task, thread, threads, 1);                                                       \
        else                                                                                              \
            name##_share(task, thread, threads, 0);                                                       \
    }

/* A pass over all pixels, with its sums if it has some. */
static void sum_up(Work *work, const Task *k, int threads) {
    if (k->sums) memset(k->sums, 0, sizeof *k->sums * SUMS * (size_t)(k->channels * threads));
    in_threads(work, k, threads);
}

/* And with their totals. */
static void pass(Work *work, const Task *k, int threads) {
    sum_up(work, k, threads);
    if (k->sums) add_threads(k, threads);
}

#define PASS(name) \
    WORK(name)     \
    EXPORT void NAME(name)(const Task *task, int threads) { pass(name##_work, task, threads); }

#define PART(name) \
    INLINE void name##_part(const Task *k, int64_t p, int64_t stop, int64_t c, int lanes, int half, double *sums)

INLINE void add_up(double *sums, F x, int lanes) {
    for (int l = 0; l < lanes; l++) sums[l] += x[l];
}

/* The normed value, rounded once. */
INLINE F normed(const Task *k, int64_t p, F alpha, F beta, int64_t c, int lanes, int half) {
    return load(k->a, p * k->channels + c, lanes, half) * alpha + beta;
}

/* The mean of a block, into the last row of totals. */
PART(origin) {
    F sum = {0}, count = fill((float)(stop - p));
    (void)sums;
    for (; p < stop; p++) sum += load(k->a, p * k->channels + c, lanes, half);
    store(k->totals, 2 * k->channels + c, sum / count, lanes, 0);
}
WORK(origin)

/* The sums of a - mean and of its square, for a mean that need not be exact: squares of differences stay small. */
PART(moments) {
    F origin = load(k->mean, c, lanes, 0), sum = {0}, square = {0};
    for (; p < stop; p++) {
        F x = load(k->a, p * k->channels + c, lanes, half) - origin;
        sum += x;
        square += x * x;
    }
    add_up(sums + c, sum, lanes);
    add_up(sums + k->channels + c, square, lanes);
}
WORK(moments)

/* The totals are the mean and the biased variance. */
EXPORT void NAME(moments)(const Task *task, int threads) {
    Task first = *task, all = *task;
    float *mean = task->totals, *variance = mean + task->channels, *origin = variance + task->channels;
    if (first.pixels > BLOCK) first.pixels = BLOCK;
    origin_work(&first, 0, 1);
    all.mean = origin;
    sum_up(moments_work, &all, threads);
    for (int64_t c = 0; c < task->channels; c++) {
        double distance = total(task, c, threads) / (double)task->pixels;
        double square = total(task, task->channels + c, threads) / (double)task->pixels - distance * distance;
        mean[c] = (float)(origin[c] + distance);
        variance[c] = (float)(square < 0 ? 0 : square);
    }
}

/* Bits of alpha a + beta >= threshold, which is false for NaN. */
PART(signs) {
    (void)sums;
    F alpha = load(k->alpha, c, lanes, 0), beta = load(k->beta, c, lanes, 0);
    F threshold = load(k->threshold, c, lanes, 0);
    int64_t width = (k->channels + 31) / 32 * 2; /* of a pixel, in halves of words */
    uint16_t *halves = (uint16_t *)k->words + c / 16;
    uint16_t present = (uint16_t)((1u << lanes) - 1);
    for (; p < stop; p++) {
        I mask = (I)(normed(k, p, alpha, beta, c, lanes, half) >= threshold);
        halves[p * width] = bits_of(mask) & present;
        if (c + lanes == k->channels && (c / 16) % 2 == 0) halves[p * width + 1] = 0;
    }
}
PASS(signs)

/* Bits of a >= 0 of kernels (outputs, taps, channels) as a Convolution reads them; words are 0 before. */
PART(kernel_words) {
    int64_t words = (k->channels + 31) / 32;
    uint16_t present = (uint16_t)((1u << lanes) - 1);
    (void)sums;
    for (; p < stop; p++) {
        int64_t o = p / k->taps, tap = o / LANES * k->taps + p % k->taps;
        uint16_t *halves = (uint16_t *)(k->words + (tap * words + c / 32) * LANES + o % LANES);
        halves[c / 16 % 2] = bits_of((I)(load(k->a, p * k->channels + c, lanes, half) >= 0)) & present;
    }
}
PASS(kernel_words)

/* Bits to -1 and +1. */
PART(spread) {
    static const U bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    int64_t width = (k->channels + 31) / 32 * 2;
    const uint16_t *halves = (const uint16_t *)k->words + c / 16;
    (void)sums;
    for (; p < stop; p++) {
        U set = ((U){0} + halves[p * width]) & bit;
        F value = pick((I)(set == 0), fill(-1), fill(1));
        store(k->out, p * k->channels + c, value, lanes, half);
    }
}
PASS(spread)

/* The gradient of a sign becomes that of its input u: times max(0, 2 - 2|u|) for the parabola, else itself where
   |u| < clip; itself where u is NaN, as torch has it. */
INLINE F estimated(const Task *k, F u, F gradient) {
    F size = magnitude(u);
    if (k->parabola) return (fill(1) - pick((I)(size > 1), fill(1), size)) * 2 * gradient;
    return pick((I)(size >= k->clip), fill(0), gradient);
}

/* That of c, for u = alpha a + beta - threshold. */
INLINE F estimated_at(const Task *k, int64_t p, F alpha, F beta, F threshold, int64_t c, int lanes, int half) {
    F u = normed(k, p, alpha, beta, c, lanes, half) - threshold;
    return estimated(k, u, load(k->c, p * k->channels + c, lanes, half));
}

/* The sums of this gradient and of its product with a - mean. */
PART(gradient_sums) {
    F alpha = load(k->alpha, c, lanes, 0), beta = load(k->beta, c, lanes, 0), mean = load(k->mean, c, lanes, 0);
    F threshold = load(k->threshold, c, lanes, 0), sum = {0}, product = {0};
    for (; p < stop; p++) {
        F gradient = estimated_at(k, p, alpha, beta, threshold, c, lanes, half);
        sum += gradient;
        product += gradient * (load(k->a, p * k->channels + c, lanes, half) - mean);
    }
    add_up(sums + c, sum, lanes);
    add_up(sums + k->channels + c, product, lanes);
}
WORK(gradient_sums)

/* And the norm's: out = (gradient - k1 - (a - mean) k2) alpha, where k1 and k2 are the sums' means, k2 times the square
   of factor, 1 / std. Without a factor the statistics are constant, and an a that is not finite must not count. */
PART(gradient) {
    F alpha = load(k->alpha, c, lanes, 0), beta = load(k->beta, c, lanes, 0), mean = load(k->mean, c, lanes, 0);
    F threshold = load(k->threshold, c, lanes, 0), k1 = {0}, k2 = {0}, count = fill((float)k->pixels);
    (void)sums;
    if (k->factor) {
        F invstd = load(k->factor, c, lanes, 0);
        k1 = load(k->totals, c, lanes, 0) / count;
        k2 = load(k->totals, k->channels + c, lanes, 0) / count * (invstd * invstd);
    }
    for (; p < stop; p++) {
        F gradient = estimated_at(k, p, alpha, beta, threshold, c, lanes, half);
        if (k->factor) gradient = gradient - k1 - (load(k->a, p * k->channels + c, lanes, half) - mean) * k2;
        put(k, p * k->channels + c, gradient * alpha, lanes, half);
    }
}
WORK(gradient)

/* Without sums, the totals are there already. */
EXPORT void NAME(gradient)(const Task *task, int threads) {
    if (task->sums) pass(gradient_sums_work, task, threads);
    in_threads(gradient_work, task, threads);
}

/* out = alpha a + beta, plus a map c if there is one. */
PART(affine) {
    F alpha = load(k->alpha, c, lanes, 0), beta = load(k->beta, c, lanes, 0);
    const void *addend = k->c;
    (void)sums;
    for (; p < stop; p++) {
        int64_t at = p * k->channels + c;
        F y = normed(k, p, alpha, beta, c, lanes, half);
        put(k, at, addend ? y + load(addend, at, lanes, half) : y, lanes, half);
    }
}
PASS(affine)

/* out = PReLU(a - threshold) + beta, each rounded; alpha is the slope, and without threshold or beta they are 0. */
PART(prelu) {
#pragma clang fp contract(off)
    F slope = load(k->alpha, c, lanes, 0), before = {0}, after = {0};
    if (k->threshold) before = load(k->threshold, c, lanes, 0);
    if (k->beta) after = load(k->beta, c, lanes, 0);
    (void)sums;
    for (; p < stop; p++) {
        int64_t at = p * k->channels + c;
        F x = load(k->a, at, lanes, half) - before;
        put(k, at, pick((I)(x > 0), x, x * slope) + after, lanes, half);
    }
}
PASS(prelu)

/* Its gradient c becomes that of a. The sums are those of c (a - threshold) where that is not above 0, of the gradient
   of a, and of c. */
PART(prelu_gradient) {
    F slope = load(k->alpha, c, lanes, 0), before = {0}, sum = {0}, passed = {0}, given = {0};
    if (k->threshold) before = load(k->threshold, c, lanes, 0);
    for (; p < stop; p++) {
        int64_t at = p * k->channels + c;
        F x = load(k->a, at, lanes, half) - before, gradient = load(k->c, at, lanes, half);
        I above = (I)(x > 0);
        F result = pick(above, gradient, gradient * slope);
        put(k, at, result, lanes, half);
        sum += pick(above, fill(0), gradient * x);
        passed += result;
        given += gradient;
    }
    add_up(sums + c, sum, lanes);
    add_up(sums + k->channels + c, passed, lanes);
    add_up(sums + 2 * k->channels + c, given, lanes);
}
PASS(prelu_gradient)

/* ---- passes over latent weights: maps whose pixels are filters, and whose channels are the elements of a filter ---- */

/* BONN's (12): the gradient c of the binary weights becomes that of the latents a, c alpha where |alpha a| <= 1. The sums
   are those of c a there, (15). */
PART(latent_gradient) {
    F w = load(k->alpha, c, lanes, 0), sum = {0};
    for (; p < stop; p++) {
        int64_t at = p * k->channels + c;
        F x = load(k->a, at, lanes, half);
        F gradient = pick((I)(magnitude(x * w) > 1), fill(0), load(k->c, at, lanes, half));
        put(k, at, gradient * w, lanes, half);
        sum += gradient * x;
    }
    add_up(sums + c, sum, lanes);
}
PASS(latent_gradient)

/* Of BONN's kernel loss, with a number for each filter in threshold (its scale), mean (mu) and factor (of the
   second part): clip times the gradient of a, (13), and the sums of |a| (alpha |a| - threshold), (16). */
PART(kernel_gradient) {
    F w = load(k->alpha, c, lanes, 0), sum = {0};
    for (; p < stop; p++) {
        int64_t at = p * k->channels + c;
        F x = load(k->a, at, lanes, half), size = magnitude(x), error = w * size - k->threshold[p];
        F gradient = (error * w + (size - k->mean[p]) * k->factor[p]) * k->clip;
        put(k, at, pick((I)(x >= 0), gradient, -gradient), lanes, half);
        sum += size * error;
    }
    add_up(sums + c, sum, lanes);
}
PASS(kernel_gradient)

/* The sums over each filter of (alpha |a| - threshold)^2, |a| - mean and its square, into sums: (filters, 3). */
static void kernel_sums_work(const void *task, int thread, int threads) {
    const Task *k = task;
    int64_t end = border(k->pixels, 1, thread + 1, threads);
    for (int64_t p = border(k->pixels, 1, thread, threads); p < end; p++) {
        F error = {0}, spread = {0}, square = {0};
        for (int64_t c = 0; c < k->channels; c += LANES) {
            int lanes = k->channels - c < LANES ? (int)(k->channels - c) : LANES;
            F size = magnitude(load(k->a, p * k->channels + c, lanes, 0)), w = load(k->alpha, c, lanes, 0);
            F wrong = w * size - k->threshold[p], far = size - k->mean[p];
            if (lanes < LANES)
                for (int l = lanes; l < LANES; l++) wrong[l] = far[l] = 0;
            error += wrong * wrong;
            spread += far;
            square += far * far;
        }
        double *sums = k->sums + 3 * p;
        sums[0] = sums[1] = sums[2] = 0;
        for (int l = 0; l < LANES; l++) sums[0] += error[l], sums[1] += spread[l], sums[2] += square[l];
    }
}
EXPORT void NAME(kernel_sums)(const Task *task, int threads) { in_threads(kernel_sums_work, task, threads); }

/* ---- convolution ---- */

typedef struct {
    const uint32_t *x;  /* (batch, height, width, words) */
    const uint32_t *w;  /* (ceil(outputs / LANES), rows, columns, words, LANES) */
    const float *scale; /* one for each output */
    const float *bias;  /* likewise, or NULL */
    const void *addend; /* a map like out, or NULL */
    void *out;          /* (batch, out_height, out_width, outputs) */
    int64_t batch, height, width, words, channels, out_height, out_width, outputs, rows, columns;
    int64_t stride[2], padding[2], dilation[2];
    int64_t half;
} Convolution;

/* The first and the last + 1 of `taps` that lie in the image, for an output at `at`; equal where none does. */
INLINE void inside(int64_t at, int64_t taps, int64_t dilation, int64_t size, int64_t *first, int64_t *last) {
    *first = 0, *last = taps;
    while (*first < taps && at + *first * dilation < 0) ++*first;
    while (*last > *first && at + (*last - 1) * dilation >= size) --*last;
}

/* `count` outputs that have all taps in columns [left, right) in the image: scale (products - 2 mismatches), plus bias
   and addend, each rounded, as in a convolution that two sums follow. */
INLINE void convolve_tile(const Convolution *k, const uint32_t *x, const uint32_t *w, int64_t top, int64_t bottom,
                          int64_t left, int64_t right, F scale, F bias, int64_t at, int lanes, int count,
                          int half) {
#pragma clang fp contract(off)
    U wrong[TILE] = {{0}}, counts[TILE] = {{0}};
    int64_t words = k->words, step = k->stride[1] * words, counted = 0;
    for (int64_t i = top; i < bottom; i++) {
        for (int64_t j = left; j < right; j++) {
            const uint32_t *pixel = x + (i * k->dilation[0] * k->width + j * k->dilation[1]) * words;
            const uint32_t *kernel = w + (i * k->columns + j) * words * LANES;
            for (int64_t word = 0; word < words; word++) {
                U weights;
                memcpy(&weights, kernel + word * LANES, sizeof weights);
#pragma GCC unroll 8
                for (int p = 0; p < count; p++) counts[p] += count_ones(weights ^ pixel[p * step + word]);
                if (WORDS && ++counted == WORDS) {
                    for (int p = 0; p < count; p++) wrong[p] += widened(counts[p]), counts[p] = (U){0};
                    counted = 0;
                }
            }
        }
    }
    int32_t products = (int32_t)((bottom - top) * (right - left) * k->channels);
#pragma GCC unroll 8
    for (int p = 0; p < count; p++) {
        int64_t to = at + p * k->outputs;
        F y = __builtin_convertvector(products - 2 * (I)(wrong[p] + widened(counts[p])), F) * scale;
        if (k->bias) y += bias;
        if (k->addend) y += load(k->addend, to, lanes, half);
        store(k->out, to, y, lanes, half);
    }
}

/* The outputs from `column` on, `count` of them at a time, up to `stop`. */
INLINE void convolve_columns(const Convolution *k, int64_t row, int64_t o, int64_t column, int64_t stop, int lanes,
                             int count, int half) {
    int64_t image = row / k->out_height, y = row % k->out_height * k->stride[0] - k->padding[0];
    const uint32_t *w = k->w + o / LANES * k->rows * k->columns * k->words * LANES;
    F scale = load(k->scale, o, lanes, 0), bias = k->bias ? load(k->bias, o, lanes, 0) : scale;
    int64_t top, bottom, left = 0, right = k->columns;
    inside(y, k->rows, k->dilation[0], k->height, &top, &bottom);
    for (; column < stop; column += count) {
        if (column + count > stop) column = stop - count; /* some outputs twice */
        int64_t x = column * k->stride[1] - k->padding[1];
        if (count == 1) inside(x, k->columns, k->dilation[1], k->width, &left, &right);
        const uint32_t *pixel = k->x + ((image * k->height + y) * k->width + x) * k->words;
        convolve_tile(k, pixel, w, top, bottom, left, right, scale, bias,
                      (row * k->out_width + column) * k->outputs + o, lanes, count, half);
    }
}

INLINE void convolve_row(const Convolution *k, int64_t row, int64_t o, int lanes, int half) {
    /* The columns whose taps are all in the image. */
    int64_t first = 0, last = k->out_width, extent = (k->columns - 1) * k->dilation[1];
    while (first < last && first * k->stride[1] < k->padding[1]) first++;
    while (last > first && (last - 1) * k->stride[1] - k->padding[1] + extent >= k->width) last--;
    if (last - first < TILE / 2) first = last;
    int64_t rest = last - (last - first) % TILE;
    convolve_columns(k, row, o, 0, first, lanes, 1, half);
    convolve_columns(k, row, o, first, rest, lanes, TILE, half);
    convolve_columns(k, row, o, rest, last, lanes, TILE / 2, half);
    convolve_columns(k, row, o, last, k->out_width, lanes, 1, half);
}

INLINE void convolve_rows(const Convolution *k, int64_t from, int64_t to, int half) {
    for (int64_t row = from; row < to; row++) {
        int64_t o = 0;
        for (; o + LANES <= k->outputs; o += LANES) convolve_row(k, row, o, LANES, half);
        if (o < k->outputs) convolve_row(k, row, o, (int)(k->outputs - o), half);
    }
}

static void convolve_work(const void *task, int thread, int threads) {
    const Convolution *k = task;
    int64_t rows = k->batch * k->out_height;
    int64_t from = border(rows, 1, thread, threads), to = border(rows, 1, thread + 1, threads);
    if (k->half)
        convolve_rows(k, from, to, 1);
    else
        convolve_rows(k, from, to, 0);
}

EXPORT void NAME(convolve)(const Convolution *task, int threads) { in_threads(convolve_work, task, threads); }

#if defined(__x86_64__)
#include "gradients.h"
EXPORT int64_t NAME(gradients_size)(void) { return sizeof(Gradients); }
#endif

/* For the test that the caller has the same structures. */
EXPORT int64_t NAME(task_size)(void) { return sizeof(Task); }
EXPORT int64_t NAME(convolution_size)(void) { return sizeof(Convolution); }
