/* The rows of a plan, computed. Compiled once for each instruction set; VARIANT names it and is a suffix of `run`.
   WORDS_ONLY: for plans with words, whatever the machine.

   A plan that reaches this file was verified: nothing is checked here. The values of every operation but COPY pass
   through `finish`, 16 channels of a pixel at a time: an epilogue, then the map, its signs, or both are written. */

#include "bonn_qat_runtime.h"
#include "vectors.h"

/* What rows and steps may be, a bit for each code: a program for one network is compiled with no others. */
#ifndef OPERATIONS
#define OPERATIONS ~UINT64_C(0)
#define STEPS ~UINT64_C(0)
#endif
#define IN(set, code) ((set) >> (code) & 1)
#define STEP_CASE(code) case code: if (!IN(STEPS, code)) break;
#define ROW_CASE(code) case code: if (!IN(OPERATIONS, code)) break;

#include "elementwise.h"

#define MOST_PIXELS 8 /* of a tile */
#define STRIP 96 /* pixels of a convolution that are computed for one block of filters after another */
#define JOINED(name, suffix) name##_##suffix
#define SUFFIXED(name, suffix) JOINED(name, suffix)
#define NAME(name) SUFFIXED(name, VARIANT)

/* Operations of a row are functions of their own, whose frames are small: larger ones than a page need help from the
   system's library on Windows. */
#define OPERATION static __attribute__((noinline)) void

typedef bonn_qat_row Row;

typedef struct {
    const int64_t *program;
    const float *vectors, *low, *high, *residual;
    float *y;
    uint16_t *signs;
    int64_t steps, pitch, residual_pitch, gone; /* floats before the first line that is kept of y */
} Finish;

typedef struct {
    const Row *row;
    const char *constants;
    char *arena;
    const float *images;
    Finish finish;
    int64_t from, to; /* lines of the result that are computed now */
} Task;

INLINE const void *constant(const Task *t, int64_t at) { return at < 0 ? 0 : t->constants + at; }
INLINE void *active(const Task *t, int64_t at) { return at < 0 ? 0 : t->arena + at; }

INLINE Finish finish_of(const Task *t) {
    const Row *r = t->row;
    const float *low = constant(t, r->thresholds);
    return (Finish){constant(t, r->program), constant(t, r->vectors), low, low ? low + r->out_pitch : 0,
                    active(t, r->residual),  active(t, r->y),         active(t, r->signs), r->steps, r->out_pitch,
                    r->residual_pitch,       0};
}

/* With `count` pixels, a constant: the loops disappear, and the values stay in registers. */
#define EACH_PIXEL _Pragma("GCC unroll 8") for (int p = 0; p < count; p++)

/* The epilogue of channels o to o + 15 of the pixels from `pixel` on, and what is written of them. */
INLINE void finish(const Finish *all, F *values, int count, int64_t pixel, int64_t o) {
    const Finish f = *all;
    const int64_t at = pixel * f.pitch + o;
    for (int64_t s = 0; s < f.steps; s++) {
        const float *row = f.vectors + f.program[2 * s + 1] * f.pitch + o;
        switch (f.program[2 * s]) {
        STEP_CASE(BONN_QAT_SCALE) {
            F factor = load(row);
            EACH_PIXEL values[p] *= factor;
            break;
        }
        STEP_CASE(BONN_QAT_ADD) {
            F addend = load(row);
            EACH_PIXEL values[p] += addend;
            break;
        }
        STEP_CASE(BONN_QAT_FMA) {
            F factor = load(row), addend = load(row + f.pitch);
            EACH_PIXEL values[p] = fused(values[p], factor, addend);
            break;
        }
        STEP_CASE(BONN_QAT_RESIDUAL) EACH_PIXEL values[p] += load(f.residual + (pixel + p) * f.residual_pitch + o); break;
        STEP_CASE(BONN_QAT_PRELU) {
            F slope = load(row);
            EACH_PIXEL values[p] = pick((I)(values[p] > 0), values[p], values[p] * slope);
            break;
        }
        STEP_CASE(BONN_QAT_CLAMP) { /* comparisons with NaN are false, and it stays */
            F low = load(row), high = load(row + f.pitch);
            EACH_PIXEL {
                F raised = pick((I)(values[p] < low), low, values[p]);
                values[p] = pick((I)(raised > high), high, raised);
            }
            break;
        }
        default: { /* a copy, so that the values themselves stay in registers */
            F moved[MOST_PIXELS];
            EACH_PIXEL moved[p] = values[p];
            if (f.program[2 * s] < BONN_QAT_EXP)
                join(f.program[2 * s], moved, count, f.residual + pixel * f.residual_pitch + o, f.residual_pitch);
            else
                apply(f.program[2 * s], moved, count);
            EACH_PIXEL values[p] = moved[p];
        }
        }
    }
    if (f.y) EACH_PIXEL store(f.y + (at - f.gone + p * f.pitch), values[p]);
    if (f.signs) {
        F low = load(f.low + o), high = load(f.high + o);
        EACH_PIXEL f.signs[(at + p * f.pitch) / LANES] = bits_of((I)(values[p] >= low) & (I)(values[p] <= high));
    }
}

INLINE void finish_one(const Finish *f, F value, int64_t pixel, int64_t o) { finish(f, &value, 1, pixel, o); }

/* ---- copies ---- */

OPERATION copy(const Task *t) {
    const Row *r = t->row;
    int64_t columns = r->width + r->padding[2] + r->padding[3], pitch = r->out_pitch;
    const float *x = r->x < 0 ? t->images : active(t, r->x);
    int64_t plane = r->height * r->width, around = columns * pitch;
    float *y = (float *)active(t, r->y) + t->from * around;
    for (int64_t i = t->from - r->padding[0]; i < t->to - r->padding[0]; i++, y += around) {
        memset(y, 0, sizeof(float) * (size_t)around);
        if (i < 0 || i >= r->height) continue;
        float *line = y + r->padding[2] * pitch;
        if (r->x >= 0) {
            memcpy(line, x + i * r->width * pitch, sizeof(float) * (size_t)(r->width * pitch));
            continue;
        }
        const float *from = x + i * r->width;
        if (r->channels == 3 && pitch == 3) { /* which compilers do with shuffles of vectors */
            for (int64_t j = 0; j < r->width; j++)
                line[3 * j] = from[j], line[3 * j + 1] = from[plane + j], line[3 * j + 2] = from[2 * plane + j];
            continue;
        }
        for (int64_t c = 0; c < r->channels; c++)
            for (int64_t j = 0; j < r->width; j++) line[j * pitch + c] = from[c * plane + j];
    }
}

OPERATION give_result(const Task *t, float *results) {
    const Row *r = t->row;
    const float *x = active(t, r->x);
    int64_t plane = r->height * r->width;
    results += r->y;
    for (int64_t p = 0; p < plane; p++)
        for (int64_t c = 0; c < r->channels; c++) results[c * plane + p] = x[p * r->pitch + c];
}

OPERATION pointwise(const Task *t) {
    const Row *r = t->row;
    const float *x = active(t, r->x);
    for (int64_t p = t->from * r->width; p < t->to * r->width; p++)
        for (int64_t o = 0; o < r->pitch; o += LANES) finish_one(&t->finish, load(x + p * r->pitch + o), p, o);
}

#include "arrange.h"

/* ---- pools ---- */

/* Where a line of the map x is, and, for the next one that is read, from there on. */
INLINE int64_t line_of(const Row *r, int64_t line) { return r->x_ring && line >= r->x_ring ? line % r->x_ring : line; }

#define EACH_SET _Pragma("GCC unroll 4") for (int s = 0; s < sets; s++)

/* Maxima start at -inf, and a NaN stays. Several vectors of channels at once, because each waits for its last maximum. */
INLINE void pooled(const Task *t, const float *x, int64_t line, const int32_t *rows, const int32_t *columns,
                   int64_t pixel, int64_t o, int sets, int is_mean) {
    const Row *r = t->row;
    int64_t step = r->dilation[1] * r->pitch;
    F values[4];
    EACH_SET values[s] = is_mean ? (F){0} : fill(-__builtin_inff());
    for (int64_t i = rows[0]; i < rows[1]; i += r->dilation[0], line = line_of(r, line + r->dilation[0])) {
        const float *from = x + (line * r->width + columns[0]) * r->pitch + o;
        for (int64_t j = columns[0]; j < columns[1]; j += r->dilation[1], from += step)
            EACH_SET {
                F next = load(from + s * LANES);
                values[s] = is_mean ? values[s] + next : pick((I)(next > values[s]) | (I)(next != next), next, values[s]);
            }
    }
    F divisor = fill((float)rows[2] * (float)columns[2]);
    EACH_SET finish_one(&t->finish, is_mean ? values[s] / divisor : values[s], pixel, o + s * LANES);
}

INLINE void pool_lines(const Task *t, int is_mean) {
    const Row *r = t->row;
    const float *x = active(t, r->x);
    const int32_t *rows = (const int32_t *)constant(t, r->windows) + 3 * t->from;
    for (int64_t i = t->from; i < t->to; i++, rows += 3) {
        const int32_t *columns = (const int32_t *)constant(t, r->windows) + 3 * r->out_height;
        int64_t line = line_of(r, rows[0]), o;
        for (int64_t pixel = i * r->out_width; pixel < (i + 1) * r->out_width; pixel++, columns += 3) {
            for (o = 0; o + 4 * LANES <= r->pitch; o += 4 * LANES) pooled(t, x, line, rows, columns, pixel, o, 4, is_mean);
            for (; o < r->pitch; o += LANES) pooled(t, x, line, rows, columns, pixel, o, 1, is_mean);
        }
    }
}

OPERATION pool(const Task *t) {
    if (t->row->is_mean)
        pool_lines(t, 1);
    else
        pool_lines(t, 0);
}

/* ---- convolutions ---- */

/* Where the window of each of `count` pixels from `pixel` on begins, in pixels of an input of `columns`. */
INLINE void window_starts(const Row *r, int64_t pixel, int count, int64_t columns, int64_t *starts) {
    int32_t i = (int32_t)pixel / (int32_t)r->out_width, j = (int32_t)pixel % (int32_t)r->out_width;
    for (int p = 0; p < count; p++) {
        starts[p] = i * r->stride[0] * columns + j * r->stride[1];
        if (++j == r->out_width) j = 0, i++;
    }
}

/* Filters of a group that are not a multiple of 16 are written one by one; what follows is a row of its own. */
INLINE void put(const Task *t, F *values, int count, int64_t pixel, int64_t group, int64_t filters, int64_t f) {
    if (t->row->groups == 1 || filters % LANES == 0) {
        finish(&t->finish, values, count, pixel, group * filters + f);
        return;
    }
    float *y = t->finish.y + (pixel * t->finish.pitch - t->finish.gone + group * filters + f);
    for (int p = 0; p < count; p++, y += t->finish.pitch)
        for (int64_t l = 0; l < LANES && f + l < filters; l++) y[l] = values[p][l];
}

/* Accumulators: FLOAT_TILE(sets) pixels by `sets` vectors of filters, 4, 2 or 1 of them up to FLOAT_SETS: as many as fit
   into the registers and need few loads. */
#if defined(__AVX512F__)
#define FLOAT_TILE(sets) ((sets) == 4 ? 4 : 8)
#define FLOAT_SETS 4
#elif defined(__FMA__) || defined(__aarch64__)
#define FLOAT_TILE(sets) 6
#define FLOAT_SETS 1
#else
#define FLOAT_TILE(sets) 2
#define FLOAT_SETS 1
#endif

INLINE void float_tile(const Task *t, const float *x, const float *w, int64_t pixel, int64_t group, int64_t f,
                       int count, int sets) {
    const Row *r = t->row;
    int64_t inputs = r->channels / r->groups, filters = r->outputs / r->groups;
    int64_t length = inputs, taps = r->kernel[1], set = r->kernel[0] * r->kernel[1] * inputs * LANES;
    if (r->pitch == inputs && r->dilation[1] == 1) length *= taps, taps = 1; /* a row of a window in one run */
    int64_t starts[MOST_PIXELS];
    window_starts(r, pixel, count, r->width, starts);
    F sums[MOST_PIXELS][FLOAT_SETS] = {0};
    for (int64_t i = 0; i < r->kernel[0]; i++)
        for (int64_t j = 0; j < taps; j++) {
            const float *from[MOST_PIXELS];
            for (int p = 0; p < count; p++)
                from[p] = x + (starts[p] + i * r->dilation[0] * r->width + j * r->dilation[1]) * r->pitch + group * inputs;
            for (int64_t c = 0; c < length; c++, w += LANES) {
                F weights[FLOAT_SETS];
#pragma GCC unroll 4
                for (int s = 0; s < sets; s++) weights[s] = load(w + s * set);
#pragma GCC unroll 8
                for (int p = 0; p < count; p++)
#pragma GCC unroll 4
                    for (int s = 0; s < sets; s++) sums[p][s] = fused(fill(from[p][c]), weights[s], sums[p][s]);
            }
        }
#pragma GCC unroll 4
    for (int s = 0; s < sets; s++) {
        F values[MOST_PIXELS];
        EACH_PIXEL values[p] = sums[p][s];
        put(t, values, count, pixel, group, filters, f + s * LANES);
    }
}

INLINE void float_pixels(const Task *t, const float *x, const float *w, int64_t from, int64_t to, int64_t group,
                         int64_t f, int sets) {
    int64_t p = from;
    for (; p + FLOAT_TILE(sets) <= to; p += FLOAT_TILE(sets)) float_tile(t, x, w, p, group, f, FLOAT_TILE(sets), sets);
    for (; p < to; p++) float_tile(t, x, w, p, group, f, 1, sets);
}

OPERATION convolve_floats(const Task *t) {
    const Row *r = t->row;
    const float *x = active(t, r->x), *weights = constant(t, r->weight);
    int64_t filters = r->outputs / r->groups, pixels = t->to * r->out_width;
    int64_t set = r->kernel[0] * r->kernel[1] * (r->channels / r->groups) * LANES;
    for (int64_t from = t->from * r->out_width; from < pixels; from += STRIP) {
        int64_t to = from + STRIP < pixels ? from + STRIP : pixels;
        const float *w = weights;
        for (int64_t group = 0; group < r->groups; group++)
            for (int64_t f = 0; f < filters;) {
                int64_t left = (filters - f + LANES - 1) / LANES;
                int sets = left >= 4 && FLOAT_SETS >= 4 ? 4 : left >= 2 && FLOAT_SETS >= 2 ? 2 : 1;
                if (sets == 4)
                    float_pixels(t, x, w, from, to, group, f, FLOAT_SETS >= 4 ? 4 : 1);
                else if (sets == 2)
                    float_pixels(t, x, w, from, to, group, f, FLOAT_SETS >= 2 ? 2 : 1);
                else
                    float_pixels(t, x, w, from, to, group, f, 1);
                f += sets * LANES, w += sets * set;
            }
    }
}

#include "depthwise.h"

#if defined(__AVX2__) && !defined(__AVX512VPOPCNTDQ__) && !defined(WORDS_ONLY)
#include "nibbles.h"
#else
#include "words.h"
#endif

/* Bits first to first + 15 of the signs of a pixel, at most `count` of them. */
INLINE uint32_t sixteen(const uint16_t *signs, int64_t first, int64_t count) {
    uint32_t bits = signs[first / 16];
    if (first % 16) {
        bits >>= first % 16;
        if (count > 16 - first % 16) bits |= (uint32_t)signs[first / 16 + 1] << (16 - first % 16);
    }
    return count < 16 ? bits & ((1u << count) - 1) : bits & 0xffff;
}

/* The signs with zeros around them, each group of channels for itself, in units of the layout. */
static void spread(const Task *t, Unit *to) {
    const Row *r = t->row;
    const uint16_t *signs = active(t, r->x);
    int64_t own = r->channels / r->groups, pixel = r->groups * units_of(own);
    int64_t left = r->padding[2] * pixel, right = r->padding[3] * pixel, around = left + right + r->width * pixel;
    memset(to, 0, sizeof(Unit) * (size_t)(r->padding[0] * around));
    to += r->padding[0] * around;
    for (int64_t i = 0; i < r->height; i++) {
        memset(to, 0, sizeof(Unit) * (size_t)left);
        to += left;
        if (r->groups == 1) {
            spread_pixels(signs, r->width, r->pitch / LANES, to);
            signs += r->width * r->pitch / LANES, to += r->width * pixel;
        }
        for (int64_t j = 0; r->groups > 1 && j < r->width; j++, signs += r->pitch / LANES)
            for (int64_t group = 0; group < r->groups; group++, to += units_of(own)) {
                if (own % LANES == 0)
                    spread_pixels(signs + group * own / LANES, 1, own / LANES, to);
                else
                    for (int64_t c = 0; c < own; c += LANES)
                        spread_half(sixteen(signs, group * own + c, own - c), c / LANES, to);
            }
        memset(to, 0, sizeof(Unit) * (size_t)right);
        to += right;
    }
    memset(to, 0, sizeof(Unit) * (size_t)(r->padding[1] * around));
}

/* The sums of `count` pixels, from their counts of signs that differ. */
INLINE void binary_tile(const Task *t, const Unit *x, const Weight *w, int64_t pixel, int64_t group, int64_t f,
                        int count, int block) {
    const Row *r = t->row;
    int64_t filters = r->outputs / r->groups, padded = (filters + LANES - 1) / LANES * LANES;
    int64_t columns = r->width + r->padding[2] + r->padding[3], starts[TILE];
    const int32_t *rows = constant(t, r->tables), *class_sums = constant(t, r->sums), *most[TILE];
    window_starts(r, pixel, count, columns, starts);
    Counts counts;
    count_differing(r, x, w, starts, group, columns, count, block, &counts);
    int32_t i = (int32_t)pixel / (int32_t)r->out_width, j = (int32_t)pixel % (int32_t)r->out_width;
    for (int p = 0; p < count; p++) {
        int64_t class = rows[i] + rows[r->out_height + j];
        most[p] = class_sums + (class * r->groups + group) * padded + f;
        if (++j == r->out_width) j = 0, i++;
    }
#pragma GCC unroll 4
    for (int64_t l = 0; l < block; l += LANES) {
        if (f + l >= filters) break;
        F values[TILE];
        EACH_PIXEL {
            I sum;
            memcpy(&sum, most[p] + l, sizeof sum);
            values[p] = __builtin_convertvector(sum - 2 * count_of(&counts, p, block, l), F);
        }
        put(t, values, count, pixel, group, filters, f + l);
    }
}

INLINE void binary_pixels(const Task *t, const Unit *x, const Weight *w, int64_t from, int64_t to, int64_t group,
                          int64_t f, int block) {
    int64_t p = from;
    for (; p + TILE <= to; p += TILE) binary_tile(t, x, w, p, group, f, TILE, block);
    for (; p < to; p++) binary_tile(t, x, w, p, group, f, 1, block);
}

/* Functions of their own, for the same reason as operations. */
OPERATION whole_block(const Task *t, const Unit *x, const Weight *w, int64_t from, int64_t to, int64_t group, int64_t f) {
    binary_pixels(t, x, w, from, to, group, f, BLOCK);
}

OPERATION half_block(const Task *t, const Unit *x, const Weight *w, int64_t from, int64_t to, int64_t group, int64_t f) {
    binary_pixels(t, x, w, from, to, group, f, BLOCK / 2);
}

OPERATION convolve_signs(const Task *t) {
    const Row *r = t->row;
    Unit *x = active(t, r->scratch);
    int64_t filters = r->outputs / r->groups, pixels = t->to * r->out_width;
    if (r->groups == 1 && IS_SPREAD(r->pitch / LANES) && !(r->padding[0] | r->padding[1] | r->padding[2] | r->padding[3]))
        x = active(t, r->x);
    else if (t->from == 0) /* the signs are complete: in a row of turns, this one is the first */
        spread(t, x);
    for (int64_t from = t->from * r->out_width; from < pixels; from += STRIP) {
        int64_t to = from + STRIP < pixels ? from + STRIP : pixels;
        const Weight *w = constant(t, r->weight);
        for (int64_t group = 0; group < r->groups; group++)
            for (int64_t f = 0; f < filters; f += BLOCK) {
                int block = filters - f > BLOCK / 2 ? BLOCK : BLOCK / 2;
                if (block == BLOCK)
                    whole_block(t, x, w, from, to, group, f);
                else
                    half_block(t, x, w, from, to, group, f);
                w += r->kernel[0] * r->kernel[1] * weights_of(r->channels / r->groups) * block;
            }
    }
}

#include "products.h"

/* ---- plans ---- */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t lines_of(const Row *r) {
    return r->operation == BONN_QAT_COPY ? r->height + r->padding[0] + r->padding[1] : r->out_height;
}

/* How many lines of x the lines before `to` read. */
static int64_t lines_read(const Task *t, int64_t to) {
    const Row *r = t->row;
    int64_t last = to - 1;
    switch (r->operation) {
    case BONN_QAT_POOL: return ((const int32_t *)constant(t, r->windows))[3 * last + 1];
    case BONN_QAT_FLOAT: return last * r->stride[0] + (r->kernel[0] - 1) * r->dilation[0] + 1;
    case BONN_QAT_DEPTHWISE: return last * r->stride[0] + (r->kernel[0] - 1) * r->dilation[0] + 1 - r->padding[0];
    default: return to;
    }
}

static void compute(Task *t, int64_t from, int64_t to) {
    const Row *r = t->row;
    t->from = from, t->to = to;
    t->finish.gone = r->ring ? (from - from % r->ring) * r->out_width * r->out_pitch : 0;
    switch (r->operation) {
    ROW_CASE(BONN_QAT_COPY) copy(t); break;
    ROW_CASE(BONN_QAT_POINTWISE) pointwise(t); break;
    ROW_CASE(BONN_QAT_POOL) pool(t); break;
    ROW_CASE(BONN_QAT_FLOAT) convolve_floats(t); break;
    ROW_CASE(BONN_QAT_DEPTHWISE) convolve_depthwise(t); break;
    ROW_CASE(BONN_QAT_BINARY) convolve_signs(t); break;
    ROW_CASE(BONN_QAT_NORMALIZE) normalize(t); break;
    ROW_CASE(BONN_QAT_PRODUCT) multiply_matrices(t); break;
    }
}

/* The lines of a row's result before `to` that are not computed yet; those that a ring holds lie next to each other. */
static void advance(Task *t, int64_t to) {
    while (t->to < to) {
        int64_t ring = t->row->ring, end = ring ? smaller(to, (t->to / ring + 1) * ring) : to;
        compute(t, t->to, end);
    }
}

/* Rows in turns: each band of the last one, and before it what it needs of the others. */
static void take_turns(Task *tasks, int count, int64_t band) {
    int64_t height = lines_of(tasks[count - 1].row), needed[BONN_QAT_MOST_TURNS + 1];
    for (int64_t to = 0; to < height;) {
        needed[count - 1] = to = smaller(to + band, height);
        for (int k = count - 1; k > 0; k--)
            needed[k - 1] = needed[k] > 0 ? smaller(lines_read(tasks + k, needed[k]), lines_of(tasks[k - 1].row)) : 0;
        for (int k = 0; k < count; k++) advance(tasks + k, needed[k]);
    }
}

void NAME(run)(const bonn_qat_plan *plan, const float *images, float *results, void *arena);
void NAME(run)(const bonn_qat_plan *plan, const float *images, float *results, void *arena) {
    for (int64_t i = 0; i < plan->row_count;) {
        const Row *first = plan->rows + i;
        Task tasks[BONN_QAT_MOST_TURNS + 1];
        int count = (int)first->turns + 1;
        for (int k = 0; k < count; k++) {
            tasks[k] = (Task){first + k, plan->constants, arena, images, {0}, 0, 0};
            tasks[k].finish = finish_of(tasks + k);
        }
        if (first->operation == BONN_QAT_RESULT)
            give_result(tasks, results);
        else if (first->operation == BONN_QAT_ARRANGE)
            arrange(tasks);
        else
            take_turns(tasks, count, first->turns ? first->band : lines_of(first));
        i += count;
    }
}
