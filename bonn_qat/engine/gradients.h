/* The gradients of a convolution of signs, from tables; part of kernels.c. Where the signs are known, a sum of 4
   numbers with signs is one of 16. So all of them are computed once, and adding an entry stands for 4 products and
   their sum. The gradients of inputs are sums over outputs, looked up by the signs of weights; those of weights are
   sums over outputs that are neighbours in a row, looked up by the signs of inputs. All sums are float32.

   tables_in_registers.h and tables_in_memory.h each define the work of a thread on the gradient of inputs, and Weights
   with the steps of the work on that of weights. */

#define ITEMS 4 /* numbers of a table */
#define ENTRIES (1 << ITEMS)
#define STRIP 8 /* outputs, whose weights are written as a whole */

typedef struct {
    const void *grad;      /* (batch, out_height, out_width, outputs) */
    const uint32_t *x, *w; /* signs of inputs and weights, as in a Convolution */
    const float *scale;    /* of the weights, one for each output */
    const Task *signs;     /* how the inputs became signs: their map a, norm and estimator */
    void *out;             /* (batch, height, width, channels) */
    float *sums;           /* (outputs in whole STRIPs, rows, columns, channels in whole LANES) */
    char *scratch;         /* (threads, scratch_size) */
    int64_t scratch_size, batch, height, width, words, channels, out_height, out_width, outputs, rows, columns;
    int64_t stride[2], padding[2], dilation[2];
    int64_t half, out_half, scaled; /* `scaled` by the factor of the norm */
} Gradients;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; } /* a >= 0 */
INLINE int64_t down(int64_t a, int64_t b) { return a < 0 ? -up(-a, b) : a / b; }

/* The next `size` bytes of scratch, in whole cache lines. */
INLINE void *take(char **scratch, int64_t size) {
    char *start = *scratch;
    *scratch += up(size, 64) * 64;
    return start;
}

INLINE F load_any(const void *array, int64_t at, int64_t lanes, int64_t half) {
    if (lanes >= LANES) return half ? load(array, at, LANES, 1) : load(array, at, LANES, 0);
    if (lanes == 8) return half ? load(array, at, 8, 1) : load(array, at, 8, 0);
    return load(array, at, (int)lanes, (int)half);
}

/* A tile of `count` sums for signs, the first of them at `pixel` and the next a stride apart, becomes the gradient of
   the inputs. */
INLINE void finish_lanes(const Gradients *k, const F *tile, int64_t pixel, int64_t count, int64_t c, F *sums,
                         int lanes, int half) {
    const Task *s = k->signs;
    int64_t at = pixel * k->channels + c, step = k->stride[1] * k->channels;
    F alpha = load(s->alpha, c, lanes, 0), beta = load(s->beta, c, lanes, 0), factor = k->scaled ? alpha : fill(1);
    F threshold = load(s->threshold, c, lanes, 0), mean = load(s->mean, c, lanes, 0), sum = {0}, product = {0};
    for (int64_t p = 0; p < count; p++, at += step) {
        F a = load(s->a, at, lanes, half), gradient = estimated(s, a * alpha + beta - threshold, tile[p]);
        sum += gradient;
        product += gradient * (a - mean);
        store(k->out, at, gradient * factor, lanes, half);
    }
    sums[0] += sum, sums[1] += product;
}

INLINE void finish_tile(const Gradients *k, const F *tile, int64_t pixel, int64_t count, int64_t c, F *sums,
                        int half) {
    int64_t lanes = k->channels - c;
    if (lanes >= LANES)
        finish_lanes(k, tile, pixel, count, c, sums, LANES, half);
    else if (lanes == 8)
        finish_lanes(k, tile, pixel, count, c, sums, 8, half);
    else
        finish_lanes(k, tile, pixel, count, c, sums, (int)lanes, half);
}

/* Adds the sums of a row of inputs, (blocks of channels, 2), to those of the thread. */
INLINE void add_sums(const Gradients *k, const F *row, double *sums) {
    for (int64_t c = 0; c < k->channels; c += LANES) {
        int lanes = (int)least(LANES, k->channels - c);
        add_up(sums + c, row[c / LANES * 2], lanes);
        add_up(sums + k->channels + c, row[c / LANES * 2 + 1], lanes);
    }
}

#if defined(__AVX512F__)
#include "tables_in_registers.h"
#else
#include "tables_in_memory.h"
#endif

/* The sums that the gradients for signs have so far stay, and their totals are made. */
EXPORT void NAME(input_gradient)(const Gradients *task, int threads) {
    in_threads(input_gradient_work, task, threads);
    add_threads(task->signs, threads);
}

/* ---- of the weights ---- */

static void weight_gradient_work(const void *task, int thread, int threads) {
    const Gradients *k = task;
    char *scratch = k->scratch + thread * k->scratch_size;
    Weights n = weights_of(k, &scratch);
    begin_weights(k, &n);
    *n.threads = threads; /* there may be fewer than were asked for */
    int64_t parts = up(k->out_height, n.rows), end = border(k->batch, n.images, thread + 1, threads);
    for (int64_t image = border(k->batch, n.images, thread, threads); image < end; image += n.images)
        for (int64_t part = 0; part < parts; part++) {
            int64_t images = least(n.images, end - image), first = part * n.rows;
            int64_t last = least(k->out_height, first + n.rows);
            for (int64_t m = 0; m < images; m++)
                for (int64_t l = 0; l < n.lines; l++) {
                    int64_t y = first * k->stride[0] - k->padding[0] + l;
                    if (y >= 0 && y < k->height) read_line(k, &n, image + m, m, y, l);
                }
            for (int64_t tile = 0; tile < n.tiles; tile++) {
                for (int64_t m = 0; m < images; m++)
                    for (int64_t y = first; y < last; y++)
                        tables_of_row(k, &n, (image + m) * k->out_height + y, tile, m * n.rows + y - first);
                weights_tile(k, &n, tile, images, first, last);
            }
        }
}

static void weight_sums_work(const void *task, int thread, int threads) {
    const Gradients *k = task;
    char *scratch = k->scratch; /* of the first thread */
    Weights n = weights_of(k, &scratch);
    int64_t end = border(k->outputs, STRIP, thread + 1, threads);
    for (int64_t o = border(k->outputs, STRIP, thread, threads); o < end; o += STRIP) sum_weights(k, &n, o);
}

EXPORT void NAME(weight_gradient)(const Gradients *task, int threads) {
    in_threads(weight_gradient_work, task, threads);
    in_threads(weight_sums_work, task, threads);
}

/* The bytes of scratch for each thread. */
EXPORT int64_t NAME(scratch_size)(const Gradients *task) {
    char *input = 0, *weights = 0;
    input_of(task, &input);
    weights_of(task, &weights);
    return most((int64_t)input, (int64_t)weights);
}
