#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifndef BONN_QAT_FORMAT
#define BONN_QAT_FORMAT 2

typedef struct { int32_t channels, height, width; } bonn_qat_size;
typedef struct { int32_t y, x; } bonn_qat_pair;
typedef struct { int32_t top, bottom, left, right; } bonn_qat_padding;

/* Operations of an epilogue on a value; `row` is a row of its vectors (rows, channels). */
enum {
    BONN_QAT_SCALE = 0, /* value * row */
    BONN_QAT_ADD = 1, /* value + row */
    BONN_QAT_FMA = 2, /* value * row + next row, rounded once */
    BONN_QAT_RESIDUAL = 3, /* value + residual; uses no row */
    BONN_QAT_PRELU = 4, /* value if it is above 0, else value * row */
    BONN_QAT_CLAMP = 5 /* value limited to [row, next row] */
};
typedef struct { int32_t operation, row; } bonn_qat_step;

typedef struct {
    int32_t channels, steps;
    const bonn_qat_step *program; /* (steps) */
    const float *vectors; /* (rows, channels) */
} bonn_qat_epilogue;

typedef struct {
    bonn_qat_size input, output;
    bonn_qat_pair kernel, stride;
    bonn_qat_padding padding; /* zeros, neither +1 nor -1 */
    bonn_qat_pair dilation;
    int32_t groups;
    const uint64_t *words; /* the weights: bits (out, in / groups, kernel height, kernel width) */
    const float *thresholds; /* (2, in): an input is +1 if low <= its value <= high, else -1, also if it is NaN */
    bonn_qat_epilogue epilogue;
} bonn_qat_convolution;

#elif BONN_QAT_FORMAT != 2
#error "two headers of different formats; write both with the same version of bonn-qat"
#endif
