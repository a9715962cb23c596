/* Tables in memory, for CPUs whose registers do not hold one. Tables lie side by side, one for each lane, and their
   entries one after the other, so that a load from one address, which the signs give, looks up an entry for all lanes.
   For the gradients of inputs, lanes are pixels, which share the signs of weights; for those of weights they are
   outputs, which share the signs of inputs. Part of gradients.h. */

#define WIDTH STRIP       /* lanes */
#define VECTORS 4         /* at most, of a tile of inputs or outputs */
#define CHANNELS 4        /* at most, that are added up at a time */
#define TAPS 3            /* likewise */
#define CACHED (24 << 10) /* bytes of tables at a time */
#define TILE_INPUTS (VECTORS * WIDTH)

typedef float V __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t Offset; /* of an entry, in floats for the gradients of inputs and in Vs for those of weights */

/* Row i becomes column i. */
INLINE void transpose(V x[WIDTH]) {
    V y[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < WIDTH; i += i % 4 == 1 ? 3 : 1) {
        x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < WIDTH / 2; i++) {
        y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    memcpy(x, y, sizeof y);
}

INLINE V load_some(const void *array, int64_t at, int64_t lanes, const int half) {
    F x = lanes < WIDTH ? load(array, at, (int)lanes, half) : load(array, at, WIDTH, half);
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
}

/* Writes the table of ITEMS numbers in each lane, entry e `pitch` Vs after entry e - 1: the sum of all numbers, number
   i with plus where bit i of e is 1, and else with minus. */
INLINE void fill_tables(V *table, int64_t pitch, const V *items) {
    V low[4] = {-items[0] - items[1], items[0] - items[1], items[1] - items[0], items[0] + items[1]};
    V high[4] = {-items[2] - items[3], items[2] - items[3], items[3] - items[2], items[2] + items[3]};
#pragma GCC unroll 16
    for (int e = 0; e < ENTRIES; e++) table[e * pitch] = low[e % 4] + high[e / 4];
}

/* ---- of the input ---- */

typedef struct {
    int64_t blocks, groups; /* of channels, and of outputs */
    int64_t images, across; /* of which a tile has inputs, and vectors of each */
    int64_t before, wide;   /* inputs from `first` on meet outputs from first + before on, and `wide` of them */
    int64_t pitch;          /* Vs from entry to entry */
    int64_t share;          /* groups at a time */
    int64_t depth;          /* rows of inputs that a row of outputs meets */
    Offset *offsets;        /* (rows, channels / CHANNELS, groups, columns, CHANNELS) */
    V *tables;              /* (share, ENTRIES, pitch): of a row of outputs, image after image */
    int64_t size;           /* bytes of them */
    int64_t *taps;          /* (stride): how many columns of the kernel meet inputs of this residue, */
    int64_t *column;        /* (stride, columns): and which */
    V *totals;              /* (depth, stride, channels, VECTORS): the sums so far, of row y of inputs at y % depth */
    F *sums;                /* (blocks, 2): of a row of inputs, as in gradient_sums */
} Input;

static Input input_of(const Gradients *k, char **scratch) {
    int64_t step = k->stride[1], reach = (k->columns - 1) * k->dilation[1], width = up(k->width, step);
    Input n = {.blocks = up(k->channels, LANES), .groups = up(k->outputs, ITEMS)};
    n.across = least(VECTORS, up(width, WIDTH));
    n.images = most(1, least(k->batch, VECTORS / n.across));
    n.before = down(k->padding[1] - reach, step);
    n.wide = least(TILE_INPUTS, width) + down(step - 1 + k->padding[1], step) - n.before;
    n.pitch = up(n.images * n.wide + 2 * WIDTH, WIDTH) | 1; /* what is beyond the last image counts nothing */
    n.share = most(2, CACHED / (ENTRIES * n.images * n.wide * (int64_t)sizeof(float)));
    n.share = up(up(n.groups, up(n.groups, n.share)), 2) * 2;
    n.depth = most((k->rows - 1) * k->dilation[0] + 1, k->stride[0]);
    n.offsets = take(scratch, n.blocks * LANES * k->rows * n.groups * k->columns * (int64_t)sizeof(Offset));
    n.size = n.share * ENTRIES * n.pitch * (int64_t)sizeof(V);
    n.tables = take(scratch, n.size);
    n.taps = take(scratch, step * (int64_t)sizeof *n.taps);
    n.column = take(scratch, step * k->columns * (int64_t)sizeof *n.column);
    n.totals = take(scratch, n.depth * step * n.blocks * LANES * VECTORS * (int64_t)sizeof(V));
    n.sums = take(scratch, n.blocks * 2 * (int64_t)sizeof(F));
    return n;
}

static void find_signs(const Gradients *k, const Input *n) {
    static const U bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    int64_t taps = k->rows * k->columns, step = k->stride[1], block = n->groups * k->columns * CHANNELS;
    memset(n->taps, 0, sizeof *n->taps * (size_t)step);
    for (int64_t tap = 0; tap < taps; tap++) {
        int64_t i = tap / k->columns, j = tap % k->columns, from = k->padding[1] - j * k->dilation[1];
        int64_t residue = down(from, step) * step - from;
        if (residue < 0) residue += step;
        if (i == 0) n->column[residue * k->columns + n->taps[residue]++] = j;
        int64_t shift = (from + residue) / step - n->before;
        for (int64_t g = 0; g < n->groups; g++)
            for (int64_t b = 0; b < n->blocks; b++) {
                U entry = {0};
                for (int64_t item = 0, o = g * ITEMS; item < ITEMS; item++, o++) {
                    int64_t at = ((o / LANES * taps + tap) * k->words + b / 2) * LANES + o % LANES;
                    entry |= (U)(((k->w[at] >> b % 2 * LANES) - (U){0} & bit) != 0) & (1u << item);
                }
                H offsets = __builtin_convertvector(entry * (uint32_t)(n->pitch * WIDTH) + (uint32_t)shift, H);
                Offset *to = n->offsets + (i * n->blocks + b) * (LANES / CHANNELS) * block;
                for (int64_t c = 0; c < LANES; c += CHANNELS, to += block)
                    memcpy(to + (g * k->columns + j) * CHANNELS, (Offset *)&offsets + c, CHANNELS * sizeof(Offset));
            }
    }
}

/* Tables of the outputs in a row that inputs from `first` on meet, for groups [g, end). */
INLINE void fill_row(const Gradients *k, const Input *n, int64_t row, int64_t first, int64_t g, int64_t end,
                     float *tables, const int half) {
    int64_t x = most(0, first + n->before), stop = least(k->out_width, first + n->before + n->wide);
    for (tables += x - first - n->before; x < stop; x += WIDTH, tables += WIDTH)
        for (int64_t o = g * ITEMS; o < least(end * ITEMS, k->outputs); o += WIDTH) {
            V values[WIDTH], scale = load_some(k->scale, o, k->outputs - o, 0);
            int64_t at = (row * k->out_width + x) * k->outputs + o, left = stop - x;
#pragma GCC unroll 8
            for (int i = 0; i < WIDTH; i++, at += k->outputs)
                values[i] = i < left ? load_some(k->grad, at, k->outputs - o, half) * scale : (V){0};
            transpose(values);
            V *table = (V *)tables + (o / ITEMS - g) * ENTRIES * n->pitch;
            fill_tables(table, n->pitch, values);
            fill_tables(table + ENTRIES * n->pitch, n->pitch, values + ITEMS);
        }
}

/* Adds what groups [g, end) give to `channels` channels of inputs, c and the following, by `taps` taps in row i of the
   kernel. */
INLINE void add_groups(const Gradients *k, const Input *n, V *totals, const int64_t *columns, int64_t i, int64_t c,
                       int64_t g, int64_t end, const int vectors, const int channels, const int taps) {
    V sums[CHANNELS][VECTORS];
    const float *tables[VECTORS];
    int64_t column[TAPS], size = ENTRIES * n->pitch * WIDTH;
    for (int t = 0; t < taps; t++) column[t] = columns[t] * CHANNELS;
    for (int v = 0; v < vectors; v++)
        tables[v] = (const float *)(n->tables + v % n->across) + least(v / n->across, n->images - 1) * n->wide;
    for (int d = 0; d < channels; d++)
        for (int v = 0; v < vectors; v++) sums[d][v] = totals[d * VECTORS + v];
    const Offset *offsets = n->offsets + c % CHANNELS;
    offsets += ((i * n->blocks * (LANES / CHANNELS) + c / CHANNELS) * n->groups + g) * k->columns * CHANNELS;
    for (; g < end; g++, offsets += k->columns * CHANNELS) {
#pragma GCC unroll 4
        for (int t = 0; t < taps; t++)
#pragma GCC unroll 4
            for (int d = 0; d < channels; d++) {
                Offset entry = offsets[column[t] + d];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sums[d][v] += *(const V *)(tables[v] + entry);
            }
        for (int v = 0; v < vectors; v++) tables[v] += size;
    }
    for (int d = 0; d < channels; d++)
        for (int v = 0; v < vectors; v++) totals[d * VECTORS + v] = sums[d][v];
}

/* For all channels, as many at a time as have their sums in registers. */
INLINE void add_row(const Gradients *k, const Input *n, int64_t y, int64_t i, int64_t g, int64_t end,
                    const int vectors) {
    const int channels = vectors == VECTORS ? 2 : CHANNELS;
    for (int64_t residue = 0; residue < k->stride[1]; residue++) {
        V *totals = n->totals + (y % n->depth * k->stride[1] + residue) * n->blocks * LANES * VECTORS;
        for (int64_t t = 0, taps = n->taps[residue]; t < taps; t += TAPS) {
            const int64_t *columns = n->column + residue * k->columns + t;
            for (int64_t c = 0; c < k->channels; c += channels)
                if (taps - t >= 3)
                    add_groups(k, n, totals + c * VECTORS, columns, i, c, g, end, vectors, channels, 3);
                else if (taps - t == 2)
                    add_groups(k, n, totals + c * VECTORS, columns, i, c, g, end, vectors, channels, 2);
                else
                    add_groups(k, n, totals + c * VECTORS, columns, i, c, g, end, vectors, channels, 1);
        }
    }
}

/* Adds what a row of outputs gives to rows [from, to) of inputs, in a tile from `first` on of `images` images. */
static void spread_row(const Gradients *k, const Input *n, int64_t image, int64_t images, int64_t row, int64_t first,
                       int64_t from, int64_t to) {
    for (int64_t g = 0; g < n->groups; g += n->share) {
        int64_t end = least(n->groups, g + n->share), vectors = images * n->across;
        for (int64_t m = 0; m < images; m++) {
            float *tables = (float *)n->tables + m * n->wide;
            if (k->half)
                fill_row(k, n, (image + m) * k->out_height + row, first, g, end, tables, 1);
            else
                fill_row(k, n, (image + m) * k->out_height + row, first, g, end, tables, 0);
        }
        for (int64_t i = 0; i < k->rows; i++) {
            int64_t y = row * k->stride[0] - k->padding[0] + i * k->dilation[0];
            if (y < from || y >= to) continue;
            if (vectors == 1)
                add_row(k, n, y, i, g, end, 1);
            else if (vectors == 2)
                add_row(k, n, y, i, g, end, 2);
            else
                add_row(k, n, y, i, g, end, 4);
        }
    }
}

/* A row of inputs has its sums: lanes become channels, and the sums gradients. */
static void finish_row(const Gradients *k, const Input *n, int64_t image, int64_t images, int64_t y, int64_t first) {
    int64_t stride = k->stride[1];
    for (int64_t residue = 0; residue < stride; residue++) {
        int64_t count = least(TILE_INPUTS, up(most(0, k->width - residue), stride) - first);
        V *totals = n->totals + (y % n->depth * stride + residue) * n->blocks * LANES * VECTORS;
        for (int64_t m = 0; m < images; m++)
            for (int64_t b = 0; b < n->blocks && count > 0; b++) {
                F tile[TILE_INPUTS];
                for (int64_t v = 0; v < n->across; v++)
                    for (int half = 0; half < LANES; half += WIDTH) {
                        V values[WIDTH];
                        for (int c = 0; c < WIDTH; c++) {
                            V *total = totals + (b * LANES + half + c) * VECTORS + m * n->across + v;
                            values[c] = *total, *total = (V){0};
                        }
                        transpose(values);
                        for (int i = 0; i < WIDTH; i++)
                            memcpy((float *)(tile + v * WIDTH + i) + half, values + i, sizeof(V));
                    }
                int64_t pixel = ((image + m) * k->height + y) * k->width + first * stride + residue;
                if (k->out_half)
                    finish_tile(k, tile, pixel, count, b * LANES, n->sums + 2 * b, 1);
                else
                    finish_tile(k, tile, pixel, count, b * LANES, n->sums + 2 * b, 0);
            }
    }
}

static void input_gradient_work(const void *task, int thread, int threads) {
    const Gradients *k = task;
    char *scratch = k->scratch + thread * k->scratch_size;
    Input n = input_of(k, &scratch);
    find_signs(k, &n);
    memset(n.totals, 0, sizeof(V) * (size_t)(n.depth * k->stride[1] * n.blocks * LANES * VECTORS));
    double *sums = k->signs->sums + SUMS * k->channels * thread;
    int64_t rows = up(k->batch, n.images) * k->height, end = border(rows, 1, thread + 1, threads);
    for (int64_t first = 0; first < up(k->width, k->stride[1]); first += TILE_INPUTS) {
        memset(n.tables, 0, (size_t)n.size);
        for (int64_t at = border(rows, 1, thread, threads), next; at < end; at = next) {
            int64_t image = at / k->height * n.images, images = least(n.images, k->batch - image);
            int64_t from = at % k->height, to = least(k->height, from + end - at), y = from;
            int64_t row = most(0, up(most(0, from + k->padding[0] - (k->rows - 1) * k->dilation[0]), k->stride[0]));
            next = at + to - from;
            for (; y < to; row++) {
                int is_last = row >= k->out_height;
                if (!is_last) spread_row(k, &n, image, images, row, first, from, to);
                for (; y < to && (is_last || y < (row + 1) * k->stride[0] - k->padding[0]); y++) {
                    memset(n.sums, 0, sizeof(F) * 2 * (size_t)n.blocks);
                    finish_row(k, &n, image, images, y, first);
                    add_sums(k, n.sums, sums);
                }
            }
        }
    }
}

/* ---- of the weights ---- */

typedef struct {
    int64_t blocks, groups;        /* of channels, and of outputs in a row */
    int64_t rows, images, lines;   /* at a time: rows of outputs, images, and rows of inputs that those rows see */
    int64_t vectors, tiles;        /* Vs of outputs in a tile, and tiles */
    int64_t step;                  /* from table to table, in Vs */
    int64_t positions;             /* of inputs in a row, those of the padding included */
    H *bits;                       /* (positions, blocks): the Offset of entry 1 where an input of a row is +1 */
    H *entries;                    /* (images, lines, groups, columns, blocks): Offsets of the entries for the inputs */
    int64_t *read;                 /* (images, lines): the row of inputs that they are of */
    V *tables;                     /* (images, rows, groups, ENTRIES, vectors) */
    V *unseen;                     /* (images, rows, columns, vectors): the sums for which a tap sees the padding */
    V *totals;                     /* (tiles, rows, channels, columns, vectors): the sums so far, with padding as -1 */
    V *outside;                    /* (tiles, rows, columns, vectors): what is too little in them */
    int64_t *threads;              /* that there are */
} Weights;

static Weights weights_of(const Gradients *k, char **scratch) {
    Weights n = {.blocks = up(k->channels, LANES), .groups = up(k->out_width, ITEMS)};
    n.tiles = up(k->outputs, VECTORS * WIDTH);
    n.vectors = up(k->outputs, n.tiles * WIDTH);
    n.step = ENTRIES * n.vectors;
    int64_t rows = CACHED / (n.groups * n.step * (int64_t)sizeof(V));
    n.rows = most(1, least(k->out_height, rows));
    n.images = most(1, least(k->batch, rows / k->out_height));
    n.lines = (n.rows - 1) * k->stride[0] + (k->rows - 1) * k->dilation[0] + 1;
    n.positions = (n.groups * ITEMS - 1) * k->stride[1] + (k->columns - 1) * k->dilation[1] + 1;
    n.bits = take(scratch, n.positions * n.blocks * (int64_t)sizeof(H));
    n.entries = take(scratch, n.images * n.lines * n.groups * k->columns * n.blocks * (int64_t)sizeof(H));
    n.read = take(scratch, n.images * n.lines * (int64_t)sizeof *n.read);
    n.tables = take(scratch, n.images * n.rows * n.groups * n.step * (int64_t)sizeof(V));
    n.unseen = take(scratch, n.images * n.rows * k->columns * n.vectors * (int64_t)sizeof(V));
    int64_t taps = n.tiles * k->rows * k->columns;
    n.totals = take(scratch, taps * n.blocks * LANES * n.vectors * (int64_t)sizeof(V));
    n.outside = take(scratch, taps * n.vectors * (int64_t)sizeof(V));
    n.threads = take(scratch, (int64_t)sizeof *n.threads);
    return n;
}

static void begin_weights(const Gradients *k, const Weights *n) {
    int64_t taps = n->tiles * k->rows * k->columns;
    memset(n->bits, 0, sizeof(H) * (size_t)(n->positions * n->blocks));
    memset(n->read, -1, sizeof *n->read * (size_t)(n->images * n->lines));
    memset(n->totals, 0, sizeof(V) * (size_t)(taps * n->blocks * LANES * n->vectors));
    memset(n->outside, 0, sizeof(V) * (size_t)(taps * n->vectors));
}

/* The entries for row y of image `image`, which is number m of those at a time. */
static void read_line(const Gradients *k, const Weights *n, int64_t image, int64_t m, int64_t y, int64_t l) {
    (void)l;
    static const H bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    int64_t row = image * k->height + y, line = m * n->lines + (y + k->padding[0]) % n->lines;
    if (n->read[line] == row) return;
    n->read[line] = row;
    const uint16_t *halves = (const uint16_t *)(k->x + row * k->width * k->words);
    for (int64_t x = 0; x < least(k->width, n->positions - k->padding[1]); x++)
        for (int64_t b = 0; b < n->blocks; b++)
            n->bits[(x + k->padding[1]) * n->blocks + b] =
                (H)((halves[x * k->words * 2 + b] - (H){0} & bit) != 0) & (uint16_t)n->vectors;
    H *entries = n->entries + line * n->groups * k->columns * n->blocks;
    int64_t step = k->stride[1] * n->blocks;
    for (int64_t g = 0; g < n->groups; g++)
        for (int64_t j = 0; j < k->columns; j++) {
            const H *from = n->bits + (g * ITEMS * k->stride[1] + j * k->dilation[1]) * n->blocks;
            for (int64_t b = 0; b < n->blocks; b++, from++)
                *entries++ = from[0] + from[step] * 2 + from[2 * step] * 4 + from[3 * step] * 8;
        }
}

/* V v of a tile of outputs from o on, of output x of the row that begins there; 0 for what is not there. */
INLINE V gradient_at(const Gradients *k, int64_t at, int64_t x, int64_t o, int64_t v, const int half) {
    int64_t lanes = k->outputs - o - v * WIDTH;
    return x < k->out_width && lanes > 0 ? load_some(k->grad, at + x * k->outputs + v * WIDTH, lanes, half) : (V){0};
}

INLINE void fill_tile(const Gradients *k, const Weights *n, int64_t row, int64_t tile, int64_t to, const int half) {
    int64_t o = tile * n->vectors * WIDTH, at = row * k->out_width * k->outputs + o;
    for (int64_t x = 0; x < k->out_width; x += ITEMS)
        for (int64_t v = 0; v < n->vectors; v++) {
            V values[ITEMS];
#pragma GCC unroll 4
            for (int i = 0; i < ITEMS; i++) values[i] = gradient_at(k, at, x + i, o, v, half);
            fill_tables(n->tables + (to * n->groups + x / ITEMS) * n->step + v, n->vectors, values);
        }
    for (int64_t j = 0; j < k->columns; j++) {
        /* The outputs for which the column sees an input are in [first, last). */
        int64_t from = k->padding[1] - j * k->dilation[1], first = most(0, -down(-from, k->stride[1]));
        int64_t last = most(first, down(from + k->width - 1, k->stride[1]) + 1);
        for (int64_t v = 0; v < n->vectors; v++) {
            V *unseen = n->unseen + (to * k->columns + j) * n->vectors + v;
            *unseen = (V){0};
            for (int64_t x = 0; x < least(first, k->out_width); x++) *unseen += gradient_at(k, at, x, o, v, half);
            for (int64_t x = last; x < k->out_width; x++) *unseen += gradient_at(k, at, x, o, v, half);
        }
    }
}

/* The tables of a row of outputs, for a tile of them. */
static void tables_of_row(const Gradients *k, const Weights *n, int64_t row, int64_t tile, int64_t to) {
    if (k->half)
        fill_tile(k, n, row, tile, to, 1);
    else
        fill_tile(k, n, row, tile, to, 0);
}

/* Adds to the weights of `channels` channels and `taps` columns of the kernel what the images give in `rows` rows. */
INLINE void add_rows(const Gradients *k, const Weights *n, V *to, int64_t images, int64_t rows, int64_t first,
                     int64_t line, int64_t c, int64_t j, const int channels, const int taps, const int vectors) {
    V sums[CHANNELS][TAPS][VECTORS];
    for (int d = 0; d < channels; d++)
        for (int t = 0; t < taps; t++)
            for (int v = 0; v < vectors; v++) sums[d][t][v] = to[(d * k->columns + t) * vectors + v];
    int64_t pixel = n->blocks * LANES, size = n->groups * k->columns * pixel;
    for (int64_t image = 0; image < images; image++) {
        const V *table = n->tables + (image * n->rows + first) * n->groups * n->step;
        const Offset *lines = (const Offset *)n->entries + image * n->lines * size + j * pixel + c;
        for (int64_t row = 0, at = line; row < rows; row++) {
            const Offset *entries = lines + at * size;
            for (int64_t g = 0; g < n->groups; g++, table += n->step, entries += k->columns * pixel)
#pragma GCC unroll 4
                for (int t = 0; t < taps; t++)
#pragma GCC unroll 4
                    for (int d = 0; d < channels; d++)
#pragma GCC unroll 4
                        for (int v = 0; v < vectors; v++) sums[d][t][v] += table[entries[t * pixel + d] + v];
            for (at += k->stride[0]; at >= n->lines;) at -= n->lines;
        }
    }
    for (int d = 0; d < channels; d++)
        for (int t = 0; t < taps; t++)
            for (int v = 0; v < vectors; v++) to[(d * k->columns + t) * vectors + v] = sums[d][t][v];
}

/* For all channels, as many at a time as have their sums in registers. */
INLINE void add_channels(const Gradients *k, const Weights *n, V *to, int64_t images, int64_t rows, int64_t first,
                         int64_t line, const int vectors) {
    const int alone = vectors > 2 ? 2 : CHANNELS, together = vectors > 2 ? 1 : CHANNELS / vectors;
    int64_t j = 0, channel = k->columns * vectors;
    for (; j + TAPS <= k->columns; j += TAPS)
        for (int64_t c = 0; c < k->channels; c += together)
            add_rows(k, n, to + c * channel + j * vectors, images, rows, first, line, c, j, together, TAPS, vectors);
    for (; j < k->columns; j++)
        for (int64_t c = 0; c < k->channels; c += alone)
            add_rows(k, n, to + c * channel + j * vectors, images, rows, first, line, c, j, alone, 1, vectors);
}

/* The weights of a tile of outputs, from the tables of `images` images and their rows from `first` to `last`. */
static void weights_tile(const Gradients *k, const Weights *n, int64_t tile, int64_t images, int64_t first,
                         int64_t last) {
    for (int64_t i = 0; i < k->rows; i++) {
        int64_t a = first, z = last, shift = i * k->dilation[0] - k->padding[0];
        while (a < z && a * k->stride[0] + shift < 0) a++;
        while (a < z && (z - 1) * k->stride[0] + shift >= k->height) z--;
        if (a == z) continue;
        V *to = n->totals + (tile * k->rows + i) * n->blocks * LANES * k->columns * n->vectors;
        int64_t line = (a * k->stride[0] + i * k->dilation[0]) % n->lines, width = k->columns * n->vectors;
        V *outside = n->outside + (tile * k->rows + i) * width;
        for (int64_t image = 0; image < images; image++)
            for (int64_t row = a; row < z; row++)
                for (int64_t l = 0; l < width; l++)
                    outside[l] += n->unseen[(image * n->rows + row - first) * width + l];
        if (n->vectors == 1)
            add_channels(k, n, to, images, z - a, a - first, line, 1);
        else if (n->vectors == 2)
            add_channels(k, n, to, images, z - a, a - first, line, 2);
        else if (n->vectors == 3)
            add_channels(k, n, to, images, z - a, a - first, line, 3);
        else
            add_channels(k, n, to, images, z - a, a - first, line, 4);
    }
}

/* The sums of all threads, for STRIP outputs from o on; n is that of the first thread. Lanes become channels. */
static void sum_weights(const Gradients *k, const Weights *n, int64_t o) {
    int64_t lanes = n->blocks * LANES, channel = k->columns * n->vectors;
    int64_t tile = o / WIDTH / n->vectors, v = o / WIDTH % n->vectors;
    for (int64_t i = 0; i < k->rows; i++)
        for (int64_t j = 0; j < k->columns; j++)
            for (int64_t c = 0; c < lanes; c += WIDTH) {
                int64_t row = tile * k->rows + i, tap = j * n->vectors + v;
                V values[WIDTH] = {{0}};
                for (int64_t t = 0; t < *n->threads; t++) {
                    const V *totals = (const V *)((const char *)n->totals + t * k->scratch_size);
                    const V *outside = (const V *)((const char *)n->outside + t * k->scratch_size);
                    for (int d = 0; d < WIDTH; d++)
                        values[d] += totals[(row * lanes + c + d) * channel + tap] + outside[row * channel + tap];
                }
                transpose(values);
                for (int d = 0; d < WIDTH; d++)
                    memcpy(k->sums + (((o + d) * k->rows + i) * k->columns + j) * lanes + c, values + d, sizeof(V));
            }
}
