/* Numbers moved to other places: changes of axes, parts, repetitions, joins, padding. */

static void arrange_axis(const float *x, float *y, const int32_t *table, int64_t axes, int64_t run) {
    int64_t length = table[0];
    const int32_t *from = table + 1, *to = from + length;
    if (axes > 1)
        for (int64_t i = 0; i < length; i++) arrange_axis(x + from[i], y + to[i], to + length, axes - 1, run);
    else if (run == 1)
        for (int64_t i = 0; i < length; i++) y[to[i]] = x[from[i]];
    else
        for (int64_t i = 0; i < length; i++) memcpy(y + to[i], x + from[i], sizeof(float) * (size_t)run);
}

OPERATION arrange(const Task *t) {
    const Row *r = t->row;
    const float *x = r->x < 0 ? constant(t, r->weight) : active(t, r->x);
    arrange_axis(x, active(t, r->y), constant(t, r->windows), r->axes, r->run);
}
