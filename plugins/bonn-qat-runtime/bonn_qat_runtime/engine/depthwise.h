/* Convolutions with one filter for each channel: a channel is a lane, and the padding is left out of the sums. */

/* Pixels whose sums are in registers. */
#if defined(__AVX512F__)
#define DEPTHWISE_TILE 8
#elif defined(__FMA__) || defined(__aarch64__)
#define DEPTHWISE_TILE 4
#else
#define DEPTHWISE_TILE 2
#endif

/* Of `taps` that begin at `begin` and are `gap` apart, the first and the last + 1 that lie in `size` pixels. */
INLINE void inside(int64_t begin, int64_t taps, int64_t gap, int64_t size, int64_t *first, int64_t *last) {
    int64_t stop = begin < size ? (size - begin + gap - 1) / gap : 0;
    *first = begin < 0 ? (gap - 1 - begin) / gap : 0;
    *last = stop < taps ? stop : taps;
}

/* A pixel's neighbours share its weights; the taps of all of them are in the image. */
INLINE void depthwise_tile(const Task *t, int64_t i, int64_t j, const int64_t *rows, int count) {
    const Row *r = t->row;
    const float *x = active(t, r->x), *weights = constant(t, r->weight);
    int64_t top = i * r->stride[0] - r->padding[0], left = j * r->stride[1] - r->padding[2];
    int64_t step = r->stride[1] * r->pitch, first = line_of(r, top + rows[0] * r->dilation[0]), begin, end;
    inside(left, r->kernel[1], r->dilation[1], r->width, &begin, &end);
    for (int64_t o = 0; o < r->pitch; o += LANES) {
        F sums[DEPTHWISE_TILE] = {0};
        int64_t line = first;
        for (int64_t k = rows[0]; k < rows[1]; k++, line = line_of(r, line + r->dilation[0])) {
            for (int64_t l = begin; l < end; l++) {
                F weight = load(weights + (k * r->kernel[1] + l) * r->pitch + o);
                const float *from = x + (line * r->width + left + l * r->dilation[1]) * r->pitch + o;
                EACH_PIXEL sums[p] = fused(load(from + p * step), weight, sums[p]);
            }
        }
        finish(&t->finish, sums, count, i * r->out_width + j, o);
    }
}

/* Every channel has a filter of its own. */
OPERATION convolve_depthwise(const Task *t) {
    const Row *r = t->row;
    int64_t reach = (r->kernel[1] - 1) * r->dilation[1], rows[2];
    /* Columns from `begin` to `end` have all their taps in the image. */
    int64_t begin = (r->padding[2] + r->stride[1] - 1) / r->stride[1];
    int64_t room = r->width + r->padding[2] - reach, end = room > 0 ? (room - 1) / r->stride[1] + 1 : 0;
    if (end > r->out_width) end = r->out_width;
    for (int64_t i = t->from; i < t->to; i++) {
        inside(i * r->stride[0] - r->padding[0], r->kernel[0], r->dilation[0], r->height, rows, rows + 1);
        int64_t j = 0;
        for (; j < begin && j < r->out_width; j++) depthwise_tile(t, i, j, rows, 1);
        for (; j + DEPTHWISE_TILE <= end; j += DEPTHWISE_TILE) depthwise_tile(t, i, j, rows, DEPTHWISE_TILE);
        for (; j + DEPTHWISE_TILE / 2 <= end; j += DEPTHWISE_TILE / 2) depthwise_tile(t, i, j, rows, DEPTHWISE_TILE / 2);
        for (; j < r->out_width; j++) depthwise_tile(t, i, j, rows, 1);
    }
}
