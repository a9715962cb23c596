/* Tables in registers, for AVX-512: the 16 entries of a table fill one, and an instruction looks up an entry for each
   lane by the lowest bits of that lane. Lanes are channels. Part of gradients.h. */

#include <immintrin.h>

#define SPAN 32 /* numbers for whose signs a word has bits */
#define TAPS 3  /* at most, that share a load of a table */
#define TILE_INPUTS 8
#define TILE_OUTPUTS STRIP
#define TABLES 64 /* for each output of a tile, at a time */

/* Entry e is the sum of ITEMS numbers, number i with plus where bit i of e is 1, and else with minus. */
INLINE F table_of(const float *items, int64_t step) {
    static const F sign[ITEMS] = {
        {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
        {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
        {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
        {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
    };
    return sign[0] * items[0] + sign[1] * items[step] + sign[2] * items[2 * step] + sign[3] * items[3 * step];
}

/* In each lane the entry that its lowest bits name. */
INLINE F look_up(const F *table, U bits) { return (F)_mm512_permutexvar_ps((__m512i)bits, (__m512)*table); }

/* ---- of the input ---- */

typedef struct {
    int64_t blocks, groups, spans; /* of channels, and of outputs */
    int64_t left, wide, depth;     /* tables of a row: the first that is not 0, and all; and rows of tables */
    U *signs;                      /* (blocks, rows, spans, columns): lane i has the bits of channel i, SPAN outputs */
    float *values;                 /* (out_width, outputs in whole LANES): a row of gradients, times scale */
    F *tables;                     /* (depth, groups, wide): those of row y are at y % depth */
    const F **lines;               /* (rows): where the tables of the rows begin that a tile of inputs adds up, */
    const U **words;               /* (rows): and the signs */
    F *sums;                       /* (blocks, 2): of a row of inputs, as in gradient_sums */
} Input;

static Input input_of(const Gradients *k, char **scratch) {
    int64_t step = k->stride[1], reach = (k->columns - 1) * k->dilation[1];
    int64_t width = up(up(k->width, step), TILE_INPUTS) * TILE_INPUTS;
    Input n = {.blocks = up(k->channels, LANES), .groups = up(k->outputs, ITEMS), .spans = up(k->outputs, SPAN)};
    n.left = most(0, -down(k->padding[1] - reach, step));
    n.wide = n.left + most(k->out_width, width + down(step - 1 + k->padding[1], step));
    n.depth = (k->rows - 1) * k->dilation[0] / k->stride[0] + 2;
    n.signs = take(scratch, n.blocks * k->rows * n.spans * k->columns * (int64_t)sizeof(U));
    n.values = take(scratch, k->out_width * up(k->outputs, LANES) * (int64_t)sizeof(F));
    n.tables = take(scratch, n.depth * n.groups * n.wide * (int64_t)sizeof(F));
    n.lines = take(scratch, k->rows * (int64_t)sizeof *n.lines);
    n.words = take(scratch, k->rows * (int64_t)sizeof *n.words);
    n.sums = take(scratch, n.blocks * 2 * (int64_t)sizeof(F));
    return n;
}

static void find_signs(const Gradients *k, const Input *n) {
    static const U lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int64_t taps = k->rows * k->columns;
    memset(n->signs, 0, sizeof(U) * (size_t)(n->blocks * taps * n->spans));
    for (int64_t o = 0; o < k->outputs; o++)
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t b = 0; b < n->blocks; b++) {
                int64_t at = ((o / LANES * taps + tap) * k->words + b / 2) * LANES + o % LANES;
                uint32_t word = k->w[at] >> b % 2 * LANES;
                int64_t line = (b * k->rows + tap / k->columns) * n->spans + o / SPAN;
                n->signs[line * k->columns + tap % k->columns] |= ((word - (U){0}) >> lane & 1) << (uint32_t)(o % SPAN);
            }
}

static void row_of_tables(const Gradients *k, const Input *n, int64_t row, F *tables) {
    int64_t padded = up(k->outputs, LANES) * LANES;
    for (int64_t x = 0; x < k->out_width; x++)
        for (int64_t o = 0; o < k->outputs; o += LANES) {
            int64_t lanes = k->outputs - o, at = (row * k->out_width + x) * k->outputs + o;
            F scaled = load_any(k->grad, at, lanes, k->half) * load_any(k->scale, o, lanes, 0);
            memcpy(n->values + x * padded + o, &scaled, sizeof scaled);
        }
    for (int64_t x = 0; x < k->out_width; x++)
        for (int64_t g = 0; g < n->groups; g++)
            tables[g * n->wide + n->left + x] = table_of(n->values + x * padded + g * ITEMS, 1);
}

/* Adds to a tile of inputs what `taps` taps of `rows` rows give, `step` columns apart; the first table is that of the
   last tap and the first input. */
INLINE void add_taps(const Gradients *k, const Input *n, F *sums, int64_t rows, int64_t step, const int taps) {
    /* Half of the sums are products with a 1 that the compiler does not know: look-ups and additions wait for the same
       unit of a Zen 4, multiplications have another, and the results are the same. */
    F sum[TILE_INPUTS], one = fill(1);
    __asm__("" : "+v"(one));
    memcpy(sum, sums, sizeof sum);
    for (int64_t i = 0; i < rows; i++) {
        const F *table = n->lines[i];
        const U *words = n->words[i];
        for (int64_t g = 0; g < n->groups; words += k->columns) {
            U word[TAPS];
            for (int t = 0; t < taps; t++) word[t] = words[t * step];
            for (int64_t end = least(n->groups, g + SPAN / ITEMS); g < end; g++, table += n->wide) {
#pragma GCC unroll 16
                for (int c = 0; c < TILE_INPUTS + taps - 1; c++) {
#pragma GCC unroll 4
                    for (int t = 0; t < taps; t++) {
                        int p = c + t - (taps - 1);
                        if (p < 0 || p >= TILE_INPUTS) continue;
                        F found = look_up(table + c, word[t]);
                        sum[p] = p % 2 ? found * one + sum[p] : sum[p] + found;
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < taps; t++) word[t] >>= ITEMS;
            }
        }
    }
    memcpy(sums, sum, sizeof sum);
}

/* The tile of inputs in row y whose columns are `residue` modulo the stride, the first at `first` times that. */
INLINE void input_tile(const Gradients *k, const Input *n, int64_t y, int64_t residue, int64_t first, int64_t b,
                       F *sums) {
    /* Taps in a row read neighbouring tables where `step` columns of the kernel are a stride of the image. */
    int64_t stride = k->stride[1], dilation = k->dilation[1], step = dilation == 1 ? stride : 1;
    int64_t j = 0;
    while (j < k->columns) {
        int64_t from = residue + k->padding[1] - j * dilation, taps = 1, rows = 0;
        if (down(from, stride) * stride != from) {
            j++;
            continue;
        }
        while (dilation == 1 && taps < TAPS && j + taps * step < k->columns) taps++;
        for (int64_t i = 0; i < k->rows; i++) {
            int64_t at = y + k->padding[0] - i * k->dilation[0], row = at / k->stride[0];
            if (at < 0 || at % k->stride[0] || row >= k->out_height) continue;
            n->lines[rows] = n->tables + row % n->depth * n->groups * n->wide;
            n->lines[rows] += n->left + first + down(from, stride) - (taps - 1);
            n->words[rows++] = n->signs + (b * k->rows + i) * n->spans * k->columns + j;
        }
        if (taps == 3)
            add_taps(k, n, sums, rows, step, 3);
        else if (taps == 2)
            add_taps(k, n, sums, rows, step, 2);
        else
            add_taps(k, n, sums, rows, step, 1);
        j += taps * step;
    }
}

static void input_gradient_work(const void *task, int thread, int threads) {
    const Gradients *k = task;
    char *scratch = k->scratch + thread * k->scratch_size;
    Input n = input_of(k, &scratch);
    find_signs(k, &n);
    memset(n.tables, 0, sizeof(F) * (size_t)(n.depth * n.groups * n.wide));
    double *sums = k->signs->sums + SUMS * k->channels * thread;
    int64_t rows = k->batch * k->height, stride = k->stride[1], image = -1, made = 0; /* tables of the rows before it */
    for (int64_t row = border(rows, 1, thread, threads); row < border(rows, 1, thread + 1, threads); row++) {
        int64_t y = row % k->height, top = y + k->padding[0] - (k->rows - 1) * k->dilation[0];
        if (row / k->height != image) image = row / k->height, made = most(0, down(top, k->stride[0]));
        for (; made <= least(k->out_height - 1, (y + k->padding[0]) / k->stride[0]); made++)
            row_of_tables(k, &n, image * k->out_height + made, n.tables + made % n.depth * n.groups * n.wide);
        memset(n.sums, 0, sizeof(F) * 2 * (size_t)n.blocks);
        for (int64_t residue = 0; residue < stride; residue++) {
            int64_t count = up(most(0, k->width - residue), stride);
            for (int64_t first = 0; first < count; first += TILE_INPUTS)
                for (int64_t b = 0; b < n.blocks; b++) {
                    F tile[TILE_INPUTS] = {{0}};
                    input_tile(k, &n, y, residue, first, b, tile);
                    int64_t pixel = row * k->width + first * stride + residue;
                    int64_t filled = least(TILE_INPUTS, count - first);
                    if (k->out_half)
                        finish_tile(k, tile, pixel, filled, b * LANES, n.sums + 2 * b, 1);
                    else
                        finish_tile(k, tile, pixel, filled, b * LANES, n.sums + 2 * b, 0);
                }
        }
        add_sums(k, n.sums, sums);
    }
}

/* ---- of the weights ---- */

typedef struct {
    int64_t blocks, groups, spans; /* of channels, and of outputs in a row */
    int64_t tables;                /* of a row: one for each group, then those of groups that see the padding */
    int64_t rows, images, lines;   /* at a time: rows of outputs, images, and rows of inputs that those rows see */
    int64_t tiles, step;           /* of outputs; from table to table */
    int64_t segments;              /* words for the inputs of a row that are a stride apart */
    int32_t *places;               /* (columns, groups): the table for a tap */
    int32_t *group, *seen;         /* (tables): its group, and the mask of outputs for which the tap sees an input */
    U *bits;                       /* (segments + 2): lane i has the bits of channel i; first and last 0 */
    U *words;                      /* (images, lines, blocks, spans, columns): those of the inputs of SPAN outputs */
    float *values;                 /* (groups, ITEMS, TILE_OUTPUTS): a row of gradients, 0 beyond the last */
    F *sums;                       /* (images, rows, tables, TILE_OUTPUTS): the tables */
    float *totals;                 /* as the sums of Gradients, of this thread */
    int64_t *threads;              /* that there are */
} Weights;

/* The outputs of a group for which a tap sees an input, or that are beyond the last one. */
static int32_t seen_by(const Gradients *k, int64_t column, int64_t group) {
    int32_t mask = 0;
    for (int i = 0; i < ITEMS; i++) {
        int64_t output = group * ITEMS + i, x = output * k->stride[1] + column * k->dilation[1] - k->padding[1];
        mask |= (int32_t)(output >= k->out_width || (x >= 0 && x < k->width)) << i;
    }
    return mask;
}

static Weights weights_of(const Gradients *k, char **scratch) {
    Weights n = {.blocks = up(k->channels, LANES), .groups = up(k->out_width, ITEMS), .spans = up(k->out_width, SPAN)};
    n.tiles = up(k->outputs, TILE_OUTPUTS), n.step = TILE_OUTPUTS;
    n.tables = n.groups;
    for (int64_t j = 0; j < k->columns; j++)
        for (int64_t g = 0; g < n.groups; g++) n.tables += seen_by(k, j, g) != ENTRIES - 1;
    n.rows = most(1, least(k->out_height, TABLES / n.tables));
    n.images = most(1, least(k->batch, TABLES / (n.tables * k->out_height)));
    n.lines = (n.rows - 1) * k->stride[0] + (k->rows - 1) * k->dilation[0] + 1;
    n.segments = up(up(k->width, k->stride[1]), SPAN);
    n.places = take(scratch, k->columns * n.groups * (int64_t)sizeof *n.places);
    n.group = take(scratch, n.tables * (int64_t)sizeof *n.group);
    n.seen = take(scratch, n.tables * (int64_t)sizeof *n.seen);
    n.bits = take(scratch, (n.segments + 2) * (int64_t)sizeof(U));
    n.words = take(scratch, n.images * n.lines * n.blocks * n.spans * k->columns * (int64_t)sizeof(U));
    n.values = take(scratch, n.groups * ITEMS * TILE_OUTPUTS * (int64_t)sizeof(float));
    n.sums = take(scratch, n.images * n.rows * n.tables * TILE_OUTPUTS * (int64_t)sizeof(F));
    n.totals = take(scratch, n.tiles * TILE_OUTPUTS * k->rows * k->columns * n.blocks * (int64_t)sizeof(F));
    n.threads = take(scratch, (int64_t)sizeof *n.threads);
    return n;
}

static void find_places(const Gradients *k, const Weights *n) {
    int32_t next = (int32_t)n->groups;
    for (int64_t g = 0; g < n->groups; g++) n->group[g] = (int32_t)g, n->seen[g] = ENTRIES - 1;
    for (int64_t j = 0; j < k->columns; j++)
        for (int64_t g = 0; g < n->groups; g++) {
            int32_t seen = seen_by(k, j, g), place = seen == n->seen[g] ? (int32_t)g : next++;
            n->group[place] = (int32_t)g, n->seen[place] = seen;
            n->places[j * n->groups + g] = place * (int32_t)n->step;
        }
}

static void begin_weights(const Gradients *k, const Weights *n) {
    find_places(k, n);
    memset(n->totals, 0, sizeof(F) * (size_t)(n->tiles * TILE_OUTPUTS * k->rows * k->columns * n->blocks));
    memset(n->values, 0, sizeof(float) * (size_t)(n->groups * ITEMS * TILE_OUTPUTS));
    memset(n->bits, 0, sizeof(U) * (size_t)(n->segments + 2));
}

/* The words of a row of inputs. */
static void read_line(const Gradients *k, const Weights *n, int64_t image, int64_t m, int64_t y, int64_t l) {
    U *words = n->words + (m * n->lines + l) * n->blocks * n->spans * k->columns;
    static const U bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    int64_t stride = k->stride[1];
    const uint32_t *pixels = k->x + (image * k->height + y) * k->width * k->words;
    for (int64_t b = 0; b < n->blocks; b++)
        for (int64_t residue = 0; residue < stride; residue++) {
            for (int64_t s = 0; s < n->segments; s++) {
                U word = {0};
                for (int64_t i = 0, x = s * SPAN * stride + residue; i < SPAN && x < k->width; i++, x += stride) {
                    uint32_t half = pixels[x * k->words + b / 2] >> b % 2 * LANES;
                    word |= (U)(((half - (U){0}) & bit) != 0) & (1u << i);
                }
                n->bits[1 + s] = word;
            }
            for (int64_t j = 0; j < k->columns; j++) {
                int64_t from = j * k->dilation[1] - k->padding[1], shift = down(from, stride);
                if (from - shift * stride != residue) continue;
                for (int64_t s = 0; s < n->spans; s++) {
                    /* What is out of the image is not read, or counts nothing. */
                    int64_t at = s * SPAN + shift, segment = down(at, SPAN), bits = at - segment * SPAN;
                    U low = n->bits[most(0, least(n->segments, segment) + 1)];
                    U high = n->bits[most(0, least(n->segments, segment + 1) + 1)];
                    words[(b * n->spans + s) * k->columns + j] =
                        bits ? low >> (uint32_t)bits | high << (uint32_t)(SPAN - bits) : low;
                }
            }
        }
}

/* The tables of a row of outputs, for a tile of them. */
static void tables_of_row(const Gradients *k, const Weights *n, int64_t row, int64_t tile, int64_t to) {
    F *tables = n->sums + to * n->tables * TILE_OUTPUTS;
    for (int64_t x = 0; x < k->out_width; x++) {
        int64_t o = tile * TILE_OUTPUTS, at = (row * k->out_width + x) * k->outputs + o;
        F y = load_any(k->grad, at, least(TILE_OUTPUTS, k->outputs - o), k->half);
        memcpy(n->values + x * TILE_OUTPUTS, &y, TILE_OUTPUTS * sizeof(float));
    }
    for (int64_t t = 0; t < n->tables; t++) {
        const float *values = n->values + n->group[t] * ITEMS * TILE_OUTPUTS;
        float counted[ITEMS * TILE_OUTPUTS];
        if (t >= n->groups) {
            for (int i = 0; i < ITEMS * TILE_OUTPUTS; i++)
                counted[i] = n->seen[t] >> i / TILE_OUTPUTS & 1 ? values[i] : 0;
            values = counted;
        }
        for (int o = 0; o < TILE_OUTPUTS; o++) tables[t * TILE_OUTPUTS + o] = table_of(values + o, TILE_OUTPUTS);
    }
}

/* Adds to the weights of a tile of outputs, for `taps` columns of the kernel, what the images give in `rows` rows. */
INLINE void add_rows(const Gradients *k, const Weights *n, float *to, int64_t images, int64_t rows, const F *tables,
                     const U *words, const int32_t *places, const int taps) {
    F sum[TILE_OUTPUTS][TAPS];
    for (int o = 0; o < TILE_OUTPUTS; o++)
        for (int t = 0; t < taps; t++) sum[o][t] = (F){0};
    int64_t line = n->blocks * n->spans * k->columns;
    for (int64_t image = 0; image < images; image++)
        for (int64_t row = 0; row < rows; row++) {
            const F *table = tables + (image * n->rows + row) * n->tables * TILE_OUTPUTS;
            const U *from = words + (image * n->lines + row * k->stride[0]) * line;
            for (int64_t g = 0; g < n->groups; from += k->columns) {
                U word[TAPS];
                for (int t = 0; t < taps; t++) word[t] = from[t];
                for (int64_t end = least(n->groups, g + SPAN / ITEMS); g < end; g++) {
#pragma GCC unroll 4
                    for (int t = 0; t < taps; t++) {
                        const F *place = table + places[t * n->groups + g];
#pragma GCC unroll 8
                        for (int o = 0; o < TILE_OUTPUTS; o++) sum[o][t] += look_up(place + o, word[t]);
                        word[t] >>= ITEMS;
                    }
                }
            }
        }
    int64_t lanes = n->blocks * LANES;
    for (int o = 0; o < TILE_OUTPUTS; o++, to += k->rows * k->columns * lanes)
        for (int t = 0; t < taps; t++) store(to, t * lanes, load(to, t * lanes, LANES, 0) + sum[o][t], LANES, 0);
}

/* The weights of a tile of outputs, from the tables of `images` images and their rows from `first` to `last`. */
static void weights_tile(const Gradients *k, const Weights *n, int64_t tile, int64_t images, int64_t first,
                         int64_t last) {
    int64_t lanes = n->blocks * LANES;
    float *to = n->totals + tile * TILE_OUTPUTS * k->rows * k->columns * lanes;
    for (int64_t i = 0; i < k->rows; i++) {
        int64_t a = first, z = last, shift = i * k->dilation[0] - k->padding[0];
        while (a < z && a * k->stride[0] + shift < 0) a++;
        while (a < z && (z - 1) * k->stride[0] + shift >= k->height) z--;
        const F *tables = n->sums + (a - first) * n->tables * TILE_OUTPUTS;
        int64_t line = (a - first) * k->stride[0] + i * k->dilation[0];
        for (int64_t b = 0; a < z && b < n->blocks; b++) {
            const U *words = n->words + (line * n->blocks + b) * n->spans * k->columns;
            float *row = to + i * k->columns * lanes + b * LANES;
            int64_t j = 0;
            for (; j + TAPS <= k->columns; j += TAPS)
                add_rows(k, n, row + j * lanes, images, z - a, tables, words + j, n->places + j * n->groups, TAPS);
            for (; j < k->columns; j++)
                add_rows(k, n, row + j * lanes, images, z - a, tables, words + j, n->places + j * n->groups, 1);
        }
    }
}

/* The sums of all threads, for STRIP outputs from o on; n is that of the first thread. */
static void sum_weights(const Gradients *k, const Weights *n, int64_t o) {
    int64_t size = k->rows * k->columns * n->blocks * LANES;
    for (int64_t at = o * size; at < (o + STRIP) * size; at += LANES) {
        F sum = {0};
        for (int64_t t = 0; t < *n->threads; t++)
            sum += load((const char *)n->totals + t * k->scratch_size, at, LANES, 0);
        store(k->sums, at, sum, LANES, 0);
    }
}
