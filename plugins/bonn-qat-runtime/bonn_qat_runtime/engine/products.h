/* Products of matrices that depend on the image, and norms and softmax over the channels of a pixel: attention. */

/* `x` in the lanes of channels o to o + 15 that there are, `rest` in others. */
INLINE F within(F x, int64_t o, int64_t channels, float rest) {
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int64_t left = channels - o;
    return left >= LANES ? x : pick((I)(lane < (int32_t)left), x, fill(rest));
}

/* In the order of a tree, which is the same on every machine. */
INLINE float sum_of(F x) {
    float lanes[LANES];
    store(lanes, x);
    for (int step = LANES / 2; step; step /= 2)
        for (int l = 0; l < step; l++) lanes[l] += lanes[l + step];
    return lanes[0];
}

INLINE float most_of(F x) {
    float lanes[LANES];
    store(lanes, x);
    for (int l = 1; l < LANES; l++)
        if (lanes[l] > lanes[0] || lanes[l] != lanes[l]) lanes[0] = lanes[l];
    return lanes[0];
}

INLINE void normalize_pixel(const Task *t, const float *x, int64_t p, float eps) {
    int64_t channels = t->row->channels;
    F sums = {0}, squares = {0};
    for (int64_t o = 0; o < channels; o += LANES) sums += within(load(x + o), o, channels, 0);
    float mean = sum_of(sums) / (float)channels;
    for (int64_t o = 0; o < channels; o += LANES) {
        F apart = within(load(x + o) - mean, o, channels, 0);
        squares += apart * apart;
    }
    F factor = 1.0f / root(fill(sum_of(squares) / (float)channels + eps));
    for (int64_t o = 0; o < channels; o += LANES) finish_one(&t->finish, (load(x + o) - mean) * factor, p, o);
}

/* The exponentials are computed twice: rows of attention are short, and there is no place for them. */
INLINE void softmax_pixel(const Task *t, const float *x, int64_t p) {
    int64_t channels = t->row->channels;
    F maxima = fill(-__builtin_inff()), sums = {0};
    for (int64_t o = 0; o < channels; o += LANES) maxima = most(maxima, within(load(x + o), o, channels, -__builtin_inff()));
    float high = most_of(maxima);
    for (int64_t o = 0; o < channels; o += LANES) sums += within(exponential(load(x + o) - high), o, channels, 0);
    float sum = sum_of(sums);
    for (int64_t o = 0; o < channels; o += LANES) finish_one(&t->finish, exponential(load(x + o) - high) / sum, p, o);
}

OPERATION normalize(const Task *t) {
    const Row *r = t->row;
    const float *x = active(t, r->x), *eps = constant(t, r->weight);
    for (int64_t p = 0; p < r->height * r->width; p++)
        if (eps)
            normalize_pixel(t, x + p * r->pitch, p, *eps);
        else
            softmax_pixel(t, x + p * r->pitch, p);
}

#define PRODUCT_TILE FLOAT_TILE(1)

INLINE void product_tile(const Task *t, const float *x, const float *other, const int32_t *rows, const int32_t *depth,
                         int64_t pixel, int64_t o, int count) {
    const Row *r = t->row;
    const int32_t *across = depth + r->axes;
    F sums[PRODUCT_TILE] = {0};
    for (int64_t k = 0; k < r->axes; k++) {
        F factor = load(other + across[k] + o);
        EACH_PIXEL sums[p] = fused(fill(x[rows[p] + depth[k]]), factor, sums[p]);
    }
    finish(&t->finish, sums, count, pixel, o);
}

OPERATION multiply_matrices(const Task *t) {
    const Row *r = t->row;
    const float *x = active(t, r->x), *other = active(t, r->other);
    const int32_t *first = constant(t, r->windows), *second = first + r->out_height;
    const int32_t *rows = second + r->out_height, *depth = rows + r->out_width;
    for (int64_t b = 0; b < r->out_height; b++)
        for (int64_t o = 0; o < r->outputs; o += LANES) {
            int64_t i = 0, pixel = b * r->out_width;
            for (; i + PRODUCT_TILE <= r->out_width; i += PRODUCT_TILE)
                product_tile(t, x + first[b], other + second[b], rows + i, depth, pixel + i, o, PRODUCT_TILE);
            for (; i < r->out_width; i++)
                product_tile(t, x + first[b], other + second[b], rows + i, depth, pixel + i, o, 1);
        }
}
