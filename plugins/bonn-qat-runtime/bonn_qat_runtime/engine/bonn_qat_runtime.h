/* Runs plans: networks as rows of numbers, over one buffer of constants and one of activations.

   A plan is verified once and may then be run any number of times, by several threads at once if each has an arena of
   its own. Nothing here allocates memory, keeps state or prints. Numbers are those of the machine, little-endian.

   All offsets and sizes in a row are in bytes from the start of the arena or of the constants, and multiples of 64; -1
   where there is none. A map is (height, width, pitch) floats: the channels of a pixel lie next to each other, padded to
   `pitch`, a multiple of 16. The signs of a map are (height, width, pitch / 16) halves of words, bit i of half j for
   channel 16 j + i, 1 for +1, and 0 beyond the last channel. */

#ifndef BONN_QAT_RUNTIME_H
#define BONN_QAT_RUNTIME_H

#include <stdint.h>

#if defined(_WIN32)
#define BONN_QAT_API __declspec(dllexport)
#else
#define BONN_QAT_API __attribute__((visibility("default")))
#endif

enum { /* operations of rows */
    BONN_QAT_COPY = 1, /* an image (channels, height, width), or a map if x >= 0, into a map with zeros around it */
    BONN_QAT_POINTWISE, /* the epilogue alone, of the map x */
    BONN_QAT_POOL,      /* the maxima or means of windows of the map x */
    BONN_QAT_FLOAT,     /* a convolution of the map x, which has its padding */
    BONN_QAT_BINARY,    /* a convolution of the signs x */
    BONN_QAT_RESULT,    /* the map x as (channels, height, width): outputs for an image, from output y on */
    BONN_QAT_ARRANGE,   /* numbers of the arena, or of the constants if x is -1, moved to other places */
    BONN_QAT_DEPTHWISE, /* a convolution of the map x with one filter for each channel */
    BONN_QAT_NORMALIZE, /* each pixel's channels with a mean of 0 and a variance of 1, or their softmax */
    BONN_QAT_PRODUCT,   /* out_height products of matrices: (out_width, axes) of x and (axes, outputs) of other */
};

enum { /* steps of an epilogue, with the row of `vectors` that they take, or the first of two */
    BONN_QAT_SCALE = 0, /* value * row */
    BONN_QAT_ADD,       /* value + row */
    BONN_QAT_FMA,       /* value * row + next row, rounded once */
    BONN_QAT_RESIDUAL,  /* value + residual */
    BONN_QAT_PRELU,     /* value where it is above 0, else value * row */
    BONN_QAT_CLAMP,     /* value, at least row and at most next row */
    BONN_QAT_TIMES,     /* value * residual, value - residual, value / residual, the larger, the smaller */
    BONN_QAT_MINUS,
    BONN_QAT_OVER,
    BONN_QAT_MAXIMUM,
    BONN_QAT_MINIMUM,
    BONN_QAT_AT_LEAST, /* 1 where value >= residual, value > residual, value <= residual, value < residual, else 0 */
    BONN_QAT_ABOVE,
    BONN_QAT_AT_MOST,
    BONN_QAT_BELOW,
    BONN_QAT_EXP, /* functions of the value; GELU is with erf, GELU_TANH the approximation */
    BONN_QAT_SIGMOID,
    BONN_QAT_SILU,
    BONN_QAT_TANH,
    BONN_QAT_GELU,
    BONN_QAT_GELU_TANH,
    BONN_QAT_ERF,
    BONN_QAT_HARDSIGMOID,
    BONN_QAT_HARDSWISH,
    BONN_QAT_SQRT,
    BONN_QAT_RECIPROCAL,
    BONN_QAT_SQUARE,
    BONN_QAT_ROUND, /* halves to even numbers */
    BONN_QAT_FLOOR,
    BONN_QAT_SIGN,
    BONN_QAT_ABS,
};

enum { /* layouts of binary weights, and of the signs that a convolution has spread into its scratch */
    BONN_QAT_WORDS = 0, /* 32 channels are a word; blocks of 32 filters, and of 16 at the end if that is enough,
                           (taps, words, filters) words each */
    BONN_QAT_NIBBLES,   /* 4 channels are a byte, twice their bits; blocks of 64 filters, and of 32 at the end if that
                           is enough, (taps, channels / 8, filters) bytes each, of two nibbles */
};

enum { /* what a function returns */
    BONN_QAT_OK = 0,
    BONN_QAT_BAD_PLAN,     /* sizes of the plan itself */
    BONN_QAT_BAD_ROW,      /* an unknown operation, or a number outside its range */
    BONN_QAT_BAD_ARENA,    /* something that does not lie in the arena */
    BONN_QAT_BAD_CONSTANT, /* something that does not lie in the constants, or a table with a wrong number */
    BONN_QAT_BAD_CPU,      /* an instruction set that the plan was not made for */
    BONN_QAT_BAD_POINTER,  /* an arena or constants that do not begin at a multiple of 64 */
};

enum { BONN_QAT_MOST_TURNS = 7 };

/* One row. Which fields an operation reads: verify.c. */
typedef struct {
    int64_t operation;
    int64_t x, height, width, channels, pitch; /* the input, in the arena; for BINARY its signs, without the padding */
    int64_t out_height, out_width, outputs, out_pitch;
    int64_t y, signs, residual; /* in the arena: the map and the signs that are written, the map that is added */
    int64_t program, steps;     /* constants: pairs (step, row) */
    int64_t vectors, rows;      /* constants: (rows, out_pitch) floats */
    int64_t thresholds;         /* constants: (2, out_pitch) floats, +1 where low <= value <= high */
    int64_t kernel[2], stride[2], dilation[2], groups;
    int64_t padding[4]; /* top, bottom, left, right: of COPY, BINARY and DEPTHWISE */
    int64_t weight;     /* constants: for each group and block of filters; of FLOAT (taps, channels, 16) floats, of
                           DEPTHWISE (taps, pitch); the numbers that ARRANGE moves; of NORMALIZE what is added to the
                           variance, -1 for a softmax */
    int64_t scratch;    /* arena: for BINARY, the signs with padding, in the layout of the plan */
    int64_t windows;    /* constants, int32. Of POOL (out_height + out_width, 3): first, last + 1, divisor. Of ARRANGE, for
                           each of its axes: the length, then for each index along it a place in x, then those in y,
                           in floats; the sum over the axes is where `run` floats lie. Of PRODUCT places in floats: of
                           each product's matrices, (2, out_height); of rows in x (out_width); of columns in x and of
                           rows in other (2, axes) */
    int64_t is_mean;    /* of POOL, whose windows' elements are dilation apart */
    int64_t turns;   /* so many of the rows after this one are computed in turn with it, each as far as the next one needs
                        it, and the last of them `band` lines at a time: their maps stay in the caches */
    int64_t band;
    int64_t ring, x_ring; /* the lines that are kept of y, line i at i % ring, and of x; 0 for all */
    int64_t classes, tables, sums; /* of BINARY: constants (out_height + out_width) int32, a row's and a column's class,
                                      whose sum is that of a pixel, and (classes, groups, filters in 16s) int32: the sum
                                      of a pixel of this class if no sign differs */
    int64_t other;          /* arena: the second factor of PRODUCT */
    int64_t residual_pitch; /* floats between the pixels of the residual: out_pitch, or 0 if it has only one */
    int64_t axes, run;
} bonn_qat_row;

typedef struct {
    const bonn_qat_row *rows;
    int64_t row_count;
    const void *constants;
    int64_t constant_bytes, arena_bytes;
    int64_t inputs, outputs; /* floats of an image and of its result */
    int64_t layout;
} bonn_qat_plan;

/* An instruction set, with the functions that are compiled for it. */
typedef struct bonn_qat_cpu bonn_qat_cpu;

/* The instruction sets that this machine runs, the fastest first, with a space between them. */
BONN_QAT_API const char *bonn_qat_cpus(void);

/* One of bonn_qat_cpus(); NULL for another. In a virtual machine this may take as long as a small network. */
BONN_QAT_API const bonn_qat_cpu *bonn_qat_find_cpu(const char *name);

/* The layout of binary weights that an instruction set takes. */
BONN_QAT_API int64_t bonn_qat_layout(const bonn_qat_cpu *cpu);

/* Whether every row reads and writes only what is there. `row` becomes the number of the first that does not. */
BONN_QAT_API int bonn_qat_verify(const bonn_qat_plan *plan, int64_t *row);

/* images (count, inputs) -> results (count, outputs), for a plan that was verified and has not changed since. */
BONN_QAT_API int bonn_qat_run(const bonn_qat_plan *plan, const bonn_qat_cpu *cpu, const float *images, int64_t count,
                              float *results, void *arena);

/* A checksum of the sources that this library was compiled from, and the size of a row. */
BONN_QAT_API uint32_t bonn_qat_sources(void);
BONN_QAT_API int64_t bonn_qat_row_size(void);

#endif
