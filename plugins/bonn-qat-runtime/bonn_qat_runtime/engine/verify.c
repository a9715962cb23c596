/* Whether a plan reads and writes only what is there. Each number is bounded first, so that no product overflows. */

#include "bonn_qat_runtime.h"

#define LANES 16
#define LARGEST (1 << 20)           /* of a side, a number of channels, a stride and the like */
#define MOST ((int64_t)1 << 40)     /* bytes of anything */
#define MOST_INPUTS 65535           /* of a binary filter, whose counts have 16 bits */
#define EACH(value, least, most) ((value) >= (least) && (value) <= (most))

typedef bonn_qat_row Row;
typedef bonn_qat_plan Plan;

/* a b, at most MOST + 1; neither is negative. */
static int64_t times(int64_t a, int64_t b) { return b && a > MOST / b ? MOST + 1 : a * b; }
static int64_t times3(int64_t a, int64_t b, int64_t c) { return times(times(a, b), c); }
static int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static int holds(int64_t size, int64_t at, int64_t bytes) {
    return at >= 0 && at % 64 == 0 && bytes <= MOST && bytes <= size && at <= size - bytes;
}
static int in_arena(const Plan *p, int64_t at, int64_t bytes) { return holds(p->arena_bytes, at, bytes); }
static int in_constants(const Plan *p, int64_t at, int64_t bytes) { return holds(p->constant_bytes, at, bytes); }
/* What is copied must not overlap. */
static int is_apart(int64_t a, int64_t a_bytes, int64_t b, int64_t b_bytes) { return a + a_bytes <= b || b + b_bytes <= a; }
static const void *constant(const Plan *p, int64_t at) { return (const char *)p->constants + at; }

static int64_t map_bytes(int64_t height, int64_t width, int64_t pitch) { return times(4, times3(height, width, pitch)); }
static int is_pitch(int64_t pitch, int64_t channels) { return pitch % LANES == 0 && pitch == up(channels, LANES); }

static int verify_input(const Plan *p, const Row *r) {
    if (!EACH(r->height, 1, LARGEST) || !EACH(r->width, 1, LARGEST) || !EACH(r->channels, 1, LARGEST))
        return BONN_QAT_BAD_ROW;
    if (r->operation == BONN_QAT_ARRANGE || r->operation == BONN_QAT_PRODUCT) return BONN_QAT_OK; /* they have tables */
    if (r->operation == BONN_QAT_COPY && r->x == -1)
        return p->inputs == times3(r->channels, r->height, r->width) ? BONN_QAT_OK : BONN_QAT_BAD_ROW;
    /* A convolution of floats may read an image's own channels, without padding. */
    int may_be_tight = r->operation == BONN_QAT_FLOAT && r->pitch == r->channels;
    if (!may_be_tight && !is_pitch(r->pitch, r->channels)) return BONN_QAT_BAD_ROW;
    int has_ring = r->operation == BONN_QAT_POOL || r->operation == BONN_QAT_DEPTHWISE;
    if (!EACH(r->x_ring, 0, has_ring ? r->height : 0)) return BONN_QAT_BAD_ROW;
    int64_t bytes = map_bytes(r->x_ring ? r->x_ring : r->height, r->width, r->pitch);
    return in_arena(p, r->x, r->operation == BONN_QAT_BINARY ? bytes / 32 : bytes) ? BONN_QAT_OK : BONN_QAT_BAD_ARENA;
}

/* The epilogue, and what is written. */
static int verify_finish(const Plan *p, const Row *r) {
    if (!EACH(r->out_height, 1, LARGEST) || !EACH(r->out_width, 1, LARGEST) || !EACH(r->outputs, 1, LARGEST))
        return BONN_QAT_BAD_ROW;
    if (!is_pitch(r->out_pitch, r->outputs) || !EACH(r->steps, 0, 1024) || !EACH(r->rows, 0, 4096))
        return BONN_QAT_BAD_ROW;
    int64_t bytes = map_bytes(r->out_height, r->out_width, r->out_pitch);
    if (r->y == -1 && r->signs == -1) return BONN_QAT_BAD_ROW;
    if (!EACH(r->ring, 0, r->out_height)) return BONN_QAT_BAD_ROW;
    int64_t kept = r->ring ? map_bytes(r->ring, r->out_width, r->out_pitch) : bytes;
    if (r->y != -1 && !in_arena(p, r->y, kept)) return BONN_QAT_BAD_ARENA;
    if (r->signs != -1 && !in_arena(p, r->signs, bytes / 32)) return BONN_QAT_BAD_ARENA;
    if (r->residual_pitch != 0 && r->residual_pitch != r->out_pitch) return BONN_QAT_BAD_ROW;
    if (r->residual != -1 && !in_arena(p, r->residual, r->residual_pitch ? bytes : 4 * r->out_pitch))
        return BONN_QAT_BAD_ARENA;
    if ((r->thresholds == -1) != (r->signs == -1)) return BONN_QAT_BAD_ROW;
    if (r->signs != -1 && !in_constants(p, r->thresholds, 8 * r->out_pitch)) return BONN_QAT_BAD_CONSTANT;
    if (r->steps == 0) return BONN_QAT_OK;
    if (!in_constants(p, r->program, 16 * r->steps)) return BONN_QAT_BAD_CONSTANT;
    if (!in_constants(p, r->vectors, map_bytes(1, r->rows, r->out_pitch))) return BONN_QAT_BAD_CONSTANT;
    const int64_t *program = constant(p, r->program);
    for (int64_t s = 0; s < r->steps; s++) {
        int64_t step = program[2 * s], row = program[2 * s + 1];
        if (!EACH(step, BONN_QAT_SCALE, BONN_QAT_ABS)) return BONN_QAT_BAD_CONSTANT;
        int is_joint = step == BONN_QAT_RESIDUAL || EACH(step, BONN_QAT_TIMES, BONN_QAT_BELOW);
        int64_t taken = step == BONN_QAT_FMA || step == BONN_QAT_CLAMP ? 2 : is_joint || step > BONN_QAT_CLAMP ? 0 : 1;
        if (!EACH(row, 0, r->rows - taken)) return BONN_QAT_BAD_CONSTANT;
        if (is_joint && r->residual == -1) return BONN_QAT_BAD_CONSTANT;
    }
    return BONN_QAT_OK;
}

static int is_padding(const Row *r) {
    for (int i = 0; i < 4; i++)
        if (!EACH(r->padding[i], 0, LARGEST)) return 0;
    return 1;
}

static int verify_copy(const Plan *p, const Row *r) {
    if (!is_padding(r) || (r->out_pitch != r->channels && !is_pitch(r->out_pitch, r->channels))) return BONN_QAT_BAD_ROW;
    if ((r->x >= 0 && r->out_pitch != r->pitch) || r->ring) return BONN_QAT_BAD_ROW;
    int64_t height = r->height + r->padding[0] + r->padding[1], width = r->width + r->padding[2] + r->padding[3];
    int64_t bytes = map_bytes(height, width, r->out_pitch);
    if (!in_arena(p, r->y, bytes)) return BONN_QAT_BAD_ARENA;
    int is_free = r->x < 0 || is_apart(r->x, map_bytes(r->height, r->width, r->pitch), r->y, bytes);
    return is_free ? BONN_QAT_OK : BONN_QAT_BAD_ARENA;
}

static int verify_pool(const Plan *p, const Row *r) {
    if (r->out_pitch != r->pitch || !EACH(r->dilation[0], 1, LARGEST) || !EACH(r->dilation[1], 1, LARGEST))
        return BONN_QAT_BAD_ROW;
    int64_t count = r->out_height + r->out_width;
    if (!in_constants(p, r->windows, 12 * count)) return BONN_QAT_BAD_CONSTANT;
    const int32_t *windows = constant(p, r->windows);
    for (int64_t i = 0; i < count; i++) {
        int64_t size = i < r->out_height ? r->height : r->width;
        if (!EACH(windows[3 * i], 0, size) || !EACH(windows[3 * i + 1], 0, size)) return BONN_QAT_BAD_CONSTANT;
    }
    return BONN_QAT_OK;
}

/* The windows of a convolution, on an input with padding. */
static int verify_windows(const Row *r, int64_t height, int64_t width) {
    /* Pixels are counted in 32 bits. */
    if (times(r->out_height, r->out_width) > INT32_MAX) return BONN_QAT_BAD_ROW;
    int64_t sizes[2] = {height, width}, outs[2] = {r->out_height, r->out_width};
    if (!EACH(r->groups, 1, LARGEST) || r->channels % r->groups || r->outputs % r->groups) return BONN_QAT_BAD_ROW;
    for (int i = 0; i < 2; i++) {
        int64_t k = r->kernel[i], s = r->stride[i], d = r->dilation[i];
        if (!EACH(k, 1, LARGEST) || !EACH(s, 1, LARGEST) || !EACH(d, 1, LARGEST)) return BONN_QAT_BAD_ROW;
        if ((outs[i] - 1) * s + (k - 1) * d >= sizes[i]) return BONN_QAT_BAD_ROW;
    }
    return BONN_QAT_OK;
}

/* Groups that do not begin at whole vectors are written filter by filter, and no more is done with them. */
static int is_written(const Row *r) {
    return r->groups == 1 || r->outputs / r->groups % LANES == 0 || (r->y != -1 && r->signs == -1 && !r->steps);
}

static int verify_depthwise(const Plan *p, const Row *r) {
    if (!is_padding(r) || r->channels != r->outputs || r->groups != r->channels) return BONN_QAT_BAD_ROW;
    int64_t height = r->height + r->padding[0] + r->padding[1], width = r->width + r->padding[2] + r->padding[3];
    int status = verify_windows(r, height, width);
    if (status) return status;
    return in_constants(p, r->weight, map_bytes(r->kernel[0], r->kernel[1], r->pitch)) ? BONN_QAT_OK : BONN_QAT_BAD_CONSTANT;
}

static int verify_float(const Plan *p, const Row *r) {
    int status = verify_windows(r, r->height, r->width);
    if (status) return status;
    if (!is_written(r)) return BONN_QAT_BAD_ROW;
    int64_t filters = up(r->outputs / r->groups, LANES), inputs = r->channels / r->groups;
    int64_t numbers = times3(times(r->groups, filters), times(r->kernel[0], r->kernel[1]), inputs);
    return in_constants(p, r->weight, times(4, numbers)) ? BONN_QAT_OK : BONN_QAT_BAD_CONSTANT;
}

static int verify_binary(const Plan *p, const Row *r) {
    if (!is_padding(r)) return BONN_QAT_BAD_ROW;
    int64_t height = r->height + r->padding[0] + r->padding[1], width = r->width + r->padding[2] + r->padding[3];
    int status = verify_windows(r, height, width);
    if (status) return status;
    if (!is_written(r)) return BONN_QAT_BAD_ROW;
    int is_nibbles = p->layout == BONN_QAT_NIBBLES;
    int64_t inputs = r->channels / r->groups, filters = r->outputs / r->groups;
    int64_t taps = times(r->kernel[0], r->kernel[1]);
    if (times(taps, inputs) > MOST_INPUTS) return BONN_QAT_BAD_ROW;
    int64_t spread = is_nibbles ? up(inputs, 16) / 4 : up(inputs, 32) / 8;
    int64_t bytes = times3(times(height, width), r->groups, spread);
    if (!in_arena(p, r->scratch, bytes)) return BONN_QAT_BAD_ARENA;
    if (!is_apart(r->x, map_bytes(r->height, r->width, r->pitch) / 32, r->scratch, bytes)) return BONN_QAT_BAD_ARENA;
    int64_t whole = is_nibbles ? 64 : 32, rest = filters % whole;
    int64_t blocks = filters - rest + (rest > whole / 2 ? whole : rest ? whole / 2 : 0);
    int64_t weight = is_nibbles ? up(inputs, 16) / 8 : up(inputs, 32) / 8;
    if (!in_constants(p, r->weight, times3(times(r->groups, blocks), taps, weight))) return BONN_QAT_BAD_CONSTANT;
    if (!EACH(r->classes, 1, LARGEST)) return BONN_QAT_BAD_ROW;
    if (!in_constants(p, r->tables, 4 * (r->out_height + r->out_width))) return BONN_QAT_BAD_CONSTANT;
    int64_t count = times3(r->classes, r->groups, up(filters, LANES));
    if (!in_constants(p, r->sums, times(4, count))) return BONN_QAT_BAD_CONSTANT;
    const int32_t *tables = constant(p, r->tables), *sums = constant(p, r->sums);
    int64_t most[2] = {0, 0};
    for (int64_t i = 0; i < r->out_height + r->out_width; i++) {
        int64_t *of = most + (i >= r->out_height);
        if (!EACH(tables[i], 0, LARGEST)) return BONN_QAT_BAD_CONSTANT;
        if (tables[i] > *of) *of = tables[i];
    }
    if (most[0] + most[1] >= r->classes) return BONN_QAT_BAD_CONSTANT;
    for (int64_t i = 0; i < count; i++)
        if (!EACH(sums[i], -3 * MOST_INPUTS, 3 * MOST_INPUTS)) return BONN_QAT_BAD_CONSTANT;
    return BONN_QAT_OK;
}

/* Whatever is computed when, a row stays inside what is checked for it. */
static int verify_turns(const Plan *p, const Row *r) {
    if (!EACH(r->turns, 0, BONN_QAT_MOST_TURNS) || r->turns >= p->row_count - (r - p->rows)) return BONN_QAT_BAD_ROW;
    if (r->turns && !EACH(r->band, 1, LARGEST)) return BONN_QAT_BAD_ROW;
    for (int64_t i = 0; r->turns && i <= r->turns; i++) {
        int64_t own = r[i].operation;
        int is_by_line = EACH(own, BONN_QAT_COPY, BONN_QAT_FLOAT) || own == BONN_QAT_DEPTHWISE;
        if (!is_by_line && (own != BONN_QAT_BINARY || i)) return BONN_QAT_BAD_ROW;
    }
    return BONN_QAT_OK;
}

/* The largest of some places, -1 if one is negative. */
static int64_t largest(const int32_t *places, int64_t count) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        if (places[i] < 0) return -1;
        if (places[i] > most) most = places[i];
    }
    return most;
}

static int verify_arrange(const Plan *p, const Row *r) {
    if (!EACH(r->axes, 1, 16) || !EACH(r->run, 1, INT32_MAX)) return BONN_QAT_BAD_ROW;
    int64_t at = r->windows, x = 0, y = 0; /* floats beyond the first run */
    if (!in_constants(p, at, 4)) return BONN_QAT_BAD_CONSTANT;
    for (int64_t axis = 0; axis < r->axes; axis++) {
        if (at > p->constant_bytes - 4) return BONN_QAT_BAD_CONSTANT;
        const int32_t *table = constant(p, at);
        if (!EACH(table[0], 1, LARGEST * 64) || 8 * (int64_t)table[0] > p->constant_bytes - 4 - at)
            return BONN_QAT_BAD_CONSTANT;
        int64_t from = largest(table + 1, table[0]), to = largest(table + 1 + table[0], table[0]);
        if (from < 0 || to < 0) return BONN_QAT_BAD_CONSTANT;
        x += from, y += to, at += 4 + 8 * (int64_t)table[0];
    }
    int64_t read = 4 * (x + r->run);
    if (r->x == -1 && !in_constants(p, r->weight, read)) return BONN_QAT_BAD_CONSTANT;
    if (r->x != -1 && !in_arena(p, r->x, read)) return BONN_QAT_BAD_ARENA;
    return in_arena(p, r->y, 4 * (y + r->run)) ? BONN_QAT_OK : BONN_QAT_BAD_ARENA;
}

static int verify_product(const Plan *p, const Row *r) {
    if (!EACH(r->axes, 1, LARGEST)) return BONN_QAT_BAD_ROW;
    if (!in_constants(p, r->windows, 4 * (2 * r->out_height + r->out_width + 2 * r->axes))) return BONN_QAT_BAD_CONSTANT;
    const int32_t *first = constant(p, r->windows), *rows = first + 2 * r->out_height, *depth = rows + r->out_width;
    int64_t places[] = {largest(first, r->out_height), largest(first + r->out_height, r->out_height),
                        largest(rows, r->out_width), largest(depth, r->axes), largest(depth + r->axes, r->axes)};
    for (int i = 0; i < 5; i++)
        if (places[i] < 0) return BONN_QAT_BAD_CONSTANT;
    if (!in_arena(p, r->x, 4 * (places[0] + places[2] + places[3] + 1))) return BONN_QAT_BAD_ARENA;
    return in_arena(p, r->other, 4 * (places[1] + places[4] + r->out_pitch)) ? BONN_QAT_OK : BONN_QAT_BAD_ARENA;
}

static int verify_row(const Plan *p, const Row *r) {
    if (!EACH(r->operation, BONN_QAT_COPY, BONN_QAT_PRODUCT)) return BONN_QAT_BAD_ROW;
    int status = verify_turns(p, r);
    if (!status) status = verify_input(p, r);
    if (status) return status;
    if (r->operation == BONN_QAT_COPY) return verify_copy(p, r);
    if (r->operation == BONN_QAT_ARRANGE) return verify_arrange(p, r);
    if (r->operation == BONN_QAT_RESULT)
        return EACH(r->y, 0, p->outputs - times3(r->channels, r->height, r->width)) ? BONN_QAT_OK : BONN_QAT_BAD_ROW;
    status = verify_finish(p, r);
    if (status) return status;
    if (r->operation == BONN_QAT_FLOAT) return verify_float(p, r);
    if (r->operation == BONN_QAT_BINARY) return verify_binary(p, r);
    if (r->operation == BONN_QAT_DEPTHWISE) return verify_depthwise(p, r);
    if (r->operation == BONN_QAT_POOL) return verify_pool(p, r);
    if (r->operation == BONN_QAT_PRODUCT) return verify_product(p, r);
    if (r->operation == BONN_QAT_NORMALIZE && r->weight != -1 && !in_constants(p, r->weight, 4))
        return BONN_QAT_BAD_CONSTANT;
    int is_alike = r->out_height == r->height && r->out_width == r->width && r->out_pitch == r->pitch;
    return is_alike ? BONN_QAT_OK : BONN_QAT_BAD_ROW;
}

int bonn_qat_verify(const Plan *p, int64_t *row) {
    *row = -1;
    if (!p->rows || !p->constants || !EACH(p->row_count, 1, LARGEST) || !EACH(p->constant_bytes, 0, MOST) ||
        !EACH(p->arena_bytes, 0, MOST) || !EACH(p->layout, BONN_QAT_WORDS, BONN_QAT_NIBBLES) ||
        !EACH(p->inputs, 1, MOST / 4) || !EACH(p->outputs, 1, MOST / 4))
        return BONN_QAT_BAD_PLAN;
    if ((uintptr_t)p->constants % 64) return BONN_QAT_BAD_POINTER;
    for (*row = 0; *row < p->row_count; ++*row) {
        int status = verify_row(p, p->rows + *row);
        if (status) return status;
    }
    *row = -1;
    return BONN_QAT_OK;
}
