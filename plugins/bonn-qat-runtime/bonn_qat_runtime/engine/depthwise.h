/* Convolutions with one filter for each channel: a channel is a lane. */

#define CHANNEL_TILE 4

INLINE void channel_tile(const Task *t, const float *x, const float *weights, int64_t pixel, int64_t o, int count) {
    const Row *r = t->row;
    int64_t starts[CHANNEL_TILE];
    window_starts(r, pixel, count, r->width, starts);
    F sums[CHANNEL_TILE] = {0};
    const float *w = weights + o;
    for (int64_t i = 0; i < r->kernel[0]; i++)
        for (int64_t j = 0; j < r->kernel[1]; j++, w += r->pitch) {
            const float *from = x + (i * r->dilation[0] * r->width + j * r->dilation[1]) * r->pitch + o;
            F weight = load(w);
            EACH_PIXEL sums[p] = fused(load(from + starts[p] * r->pitch), weight, sums[p]);
        }
    finish(&t->finish, sums, count, pixel, o);
}

OPERATION convolve_channels(const Task *t) {
    const Row *r = t->row;
    const float *x = active(t, r->x), *weights = constant(t, r->weight);
    int64_t pixels = r->out_height * r->out_width, p = 0;
    for (; p + CHANNEL_TILE <= pixels; p += CHANNEL_TILE)
        for (int64_t o = 0; o < r->pitch; o += LANES) channel_tile(t, x, weights, p, o, CHANNEL_TILE);
    for (; p < pixels; p++)
        for (int64_t o = 0; o < r->pitch; o += LANES) channel_tile(t, x, weights, p, o, 1);
}
