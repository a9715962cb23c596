/* Plans from a file -> a line for each: "ran", or the number for which it was refused. In memory of exactly their sizes,
   so that the address sanitizer sees what is read or written beside it.

   A plan: int64 rows, constant_bytes, arena_bytes, inputs, outputs, layout; the rows; the constants. */

#include "bonn_qat_runtime.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LARGEST = 1 << 26, SECONDS = 60 };

static void *filled(size_t size, FILE *file) {
    void *memory;
    if (posix_memalign(&memory, 64, size) || (file && fread(memory, 1, size, file) != size)) exit(3);
    return memory;
}

static void run(const bonn_qat_plan *plan) {
    char names[100], *name = strcpy(names, bonn_qat_cpus());
    float *images = filled(4 * (size_t)plan->inputs, 0), *results = filled(4 * (size_t)plan->outputs, 0);
    char *arena = filled((size_t)plan->arena_bytes, 0);
    for (int64_t i = 0; i < plan->inputs; i++) images[i] = i % 97 == 96 ? NAN : i % 89 == 88 ? INFINITY : sinf((float)i);
    for (name = strtok(name, " "); name; name = strtok(0, " ")) {
        memset(arena, 255, (size_t)plan->arena_bytes);
        bonn_qat_run(plan, bonn_qat_find_cpu(name), images, 1, results, arena);
    }
    free(images), free(results), free(arena);
}

int main(int argc, char **argv) {
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : 0;
    if (!file) return 2;
    int64_t sizes[6];
    for (long skipped = atol(argv[2]); fread(sizes, sizeof sizes, 1, file) == 1; skipped--) {
        bonn_qat_row *rows = filled(sizeof *rows * (size_t)sizes[0], file);
        void *constants = filled((size_t)sizes[1], file);
        bonn_qat_plan plan = {rows, sizes[0], constants, sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
        int64_t row;
        if (skipped <= 0) {
            alarm(SECONDS);
            int status = bonn_qat_verify(&plan, &row);
            int fits = sizes[2] <= LARGEST && sizes[3] <= LARGEST && sizes[4] <= LARGEST;
            if (!status && fits) run(&plan);
            puts(status ? (char[]){(char)('0' + status), 0} : fits ? "ran" : "large");
            fflush(stdout);
        }
        free(rows), free(constants);
    }
    return 0;
}
