/* TITLE. Compile this file alone: it includes the kernels. */

#define VARIANT net_name
#define WORDS_ONLY
NEEDS
#include "kernels.c"
#include "net_name.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "the numbers are little-endian"
#endif

static const bonn_qat_row rows[] = {
ROWS
};

static const _Alignas(64) uint32_t constants[] = {
CONSTANTS
};

static const bonn_qat_plan plan = {
    .rows = rows,
    .row_count = sizeof rows / sizeof *rows,
    .constants = constants,
    .constant_bytes = sizeof constants,
    .arena_bytes = NET_NAME_ARENA_BYTES,
    .inputs = NET_NAME_INPUTS,
    .outputs = NET_NAME_OUTPUTS,
    .layout = BONN_QAT_WORDS,
};

int net_name_run(const float *image, float *result, void *arena) {
    if ((uintptr_t)arena % 64) return BONN_QAT_BAD_POINTER;
    NAME(run)(&plan, image, result, arena);
    return BONN_QAT_OK;
}
