/* Raw float32 images from a file or the standard input -> the class of each, or with --logits all its outputs. */

#include "net_name.h"

#include <stdio.h>
#include <string.h>

static float image[NET_NAME_INPUTS], result[NET_NAME_OUTPUTS];
static _Alignas(64) unsigned char arena[NET_NAME_ARENA_BYTES];
#ifdef NET_NAME_LABELS
static const char *const labels[] = NET_NAME_LABELS;
#endif

static void print_logits(void) {
    for (long i = 0; i < NET_NAME_OUTPUTS; i++) printf("%s%.9g", i ? " " : "", (double)result[i]);
    printf("\n");
}

static void print_class(void) {
    long best = 0;
    for (long i = 1; i < NET_NAME_OUTPUTS; i++)
        if (result[i] > result[best]) best = i;
#ifdef NET_NAME_LABELS
    printf("%s\n", labels[best]);
#else
    printf("%ld\n", best);
#endif
}

int main(int argc, char **argv) {
    int wants_logits = argc > 1 && !strcmp(argv[1], "--logits");
    if (argc > 2 + wants_logits) {
        fprintf(stderr, "usage: %s [--logits] [FILE]\n", argv[0]);
        return 2;
    }
    FILE *file = argc > 1 + wants_logits ? fopen(argv[1 + wants_logits], "rb") : stdin;
    if (!file) {
        perror(argv[1 + wants_logits]);
        return 1;
    }
    size_t got;
    while ((got = fread(image, 1, sizeof image, file)) == sizeof image) {
        net_name_run(image, result, arena);
        wants_logits ? print_logits() : print_class();
    }
    if (got || ferror(file)) {
        fprintf(stderr, "the input does not end after an image of %zu bytes\n", sizeof image);
        return 1;
    }
    return fclose(stdout) != 0;
}
