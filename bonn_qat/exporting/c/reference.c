#if defined(BONN_QAT_REFERENCE) && !defined(BONN_QAT_REFERENCE_DEFINED)
#define BONN_QAT_REFERENCE_DEFINED

#ifdef __FAST_MATH__
#error "the reference needs IEEE arithmetic: infinite thresholds, NaN, and sums in the order of the source"
#endif

static inline int32_t bonn_qat_popcount(uint64_t bits)
{
#if defined(__GNUC__) && !defined(BONN_QAT_PORTABLE)
    return __builtin_popcountll(bits);
#else
    int32_t count = 0;
    for (; bits != 0; bits &= bits - 1)
        count++;
    return count;
#endif
}

/* Bit i. */
static inline uint64_t bonn_qat_bit(const uint64_t *words, int32_t i)
{
    return words[i / 64] >> (i % 64) & 1;
}

/* `count` bits, at most 64, from bit `start` on; the bits above them are undefined. */
static inline uint64_t bonn_qat_bits(const uint64_t *words, int32_t start, int32_t count)
{
    const int32_t shift = start % 64;
    uint64_t bits = words[start / 64] >> shift;
    if (shift + count > 64)
        bits |= words[start / 64 + 1] << (64 - shift);
    return bits;
}

/* The value of a channel after an epilogue. It is volatile, so that each step is rounded to float32 before the next: in
   wider registers, or fused into one instruction, two steps would give another number. fmaf must round once, as C99
   requires; in some small C libraries it rounds twice. */
static inline float bonn_qat_run(const bonn_qat_epilogue *epilogue, int32_t channel, float start, float residual)
{
    volatile float value = start;
    int32_t step;
    for (step = 0; step < epilogue->steps; step++) {
        const float *row = epilogue->vectors + epilogue->program[step].row * epilogue->channels + channel;
        switch (epilogue->program[step].operation) {
        case BONN_QAT_SCALE:
            value = value * row[0];
            break;
        case BONN_QAT_ADD:
            value = value + row[0];
            break;
        case BONN_QAT_FMA:
            value = fmaf(value, row[0], row[epilogue->channels]);
            break;
        case BONN_QAT_RESIDUAL:
            value = value + residual;
            break;
        case BONN_QAT_PRELU:
            if (!(value > 0.0f))
                value = value * row[0];
            break;
        case BONN_QAT_CLAMP:
            if (value < row[0])
                value = row[0];
            if (value > row[epilogue->channels])
                value = row[epilogue->channels];
            break;
        }
    }
    return value;
}

/* An epilogue without a convolution, on a map of `pixels`. `output` may be the map itself; `residual` is NULL or as
   large. */
static inline void bonn_qat_elementwise(
    const bonn_qat_epilogue *epilogue, const float *map, int32_t pixels, const float *residual, float *output)
{
    int32_t i;
    for (i = 0; i < pixels * epilogue->channels; i++)
        output[i] = bonn_qat_run(epilogue, i % epilogue->channels, map[i], residual ? residual[i] : 0.0f);
}

/* The signs of a layer's input: `signs` gets one bit for each element of the map, in its order. */
static inline void bonn_qat_sign(const bonn_qat_convolution *layer, const float *map, uint64_t *signs)
{
    const int32_t channels = layer->input.channels;
    const int32_t size = layer->input.height * layer->input.width * channels;
    int32_t i;
    for (i = 0; i < size; i++) {
        const float *low = layer->thresholds + i % channels;
        const uint64_t bit = map[i] >= low[0] && map[i] <= low[channels];
        signs[i / 64] = (i % 64 ? signs[i / 64] : 0) | bit << (i % 64);
    }
}

/* The window of the kernel at output (y, x): bits in the order of a filter's weights, and which of them are valid, that
   is, inside the image. */
static inline void bonn_qat_window(
    const bonn_qat_convolution *layer, const uint64_t *signs, int32_t group, int32_t y, int32_t x, uint64_t *bits,
    uint64_t *valid)
{
    const bonn_qat_size in = layer->input;
    const int32_t channels = in.channels / layer->groups;
    int32_t count = 0, channel, tap_y, tap_x;
    for (channel = group * channels; channel < (group + 1) * channels; channel++)
        for (tap_y = 0; tap_y < layer->kernel.y; tap_y++)
            for (tap_x = 0; tap_x < layer->kernel.x; tap_x++) {
                const int32_t row = y * layer->stride.y + tap_y * layer->dilation.y - layer->padding.top;
                const int32_t column = x * layer->stride.x + tap_x * layer->dilation.x - layer->padding.left;
                if (count % 64 == 0)
                    bits[count / 64] = valid[count / 64] = 0;
                if (row >= 0 && row < in.height && column >= 0 && column < in.width) {
                    const int32_t at = (row * in.width + column) * in.channels + channel;
                    bits[count / 64] |= bonn_qat_bit(signs, at) << (count % 64);
                    valid[count / 64] |= (uint64_t)1 << (count % 64);
                }
                count++;
            }
}

/* The product of a window with the weights from bit `start` on: how many signs are equal minus how many differ. */
static inline int32_t bonn_qat_product(
    const uint64_t *words, int32_t start, int32_t count, const uint64_t *bits, const uint64_t *valid)
{
    int32_t sum = 0, i;
    for (i = 0; i < count; i += 64) {
        const uint64_t weights = bonn_qat_bits(words, start + i, count - i < 64 ? count - i : 64);
        const uint64_t equal = ~(bits[i / 64] ^ weights) & valid[i / 64];
        sum += 2 * bonn_qat_popcount(equal) - bonn_qat_popcount(valid[i / 64]);
    }
    return sum;
}

/* Convolve `signs` into the map `output`. `residual` is NULL or as large as `output`, and may be the same array.
   `window` is scratch memory: twice the words of one filter, at most NAME_WINDOW_WORDS. */
static inline void bonn_qat_convolve(
    const bonn_qat_convolution *layer, const uint64_t *signs, const float *residual, float *output, uint64_t *window)
{
    const bonn_qat_size out = layer->output;
    const int32_t filters = out.channels / layer->groups;
    const int32_t inputs = layer->input.channels / layer->groups * layer->kernel.y * layer->kernel.x;
    uint64_t *valid = window + (inputs + 63) / 64;
    int32_t y, x, filter;
    for (y = 0; y < out.height; y++)
        for (x = 0; x < out.width; x++)
            for (filter = 0; filter < out.channels; filter++) {
                const int32_t at = (y * out.width + x) * out.channels + filter;
                int32_t sum;
                if (filter % filters == 0)
                    bonn_qat_window(layer, signs, filter / filters, y, x, window, valid);
                sum = bonn_qat_product(layer->words, filter * inputs, inputs, window, valid);
                output[at] = bonn_qat_run(&layer->epilogue, filter, (float)sum, residual ? residual[at] : 0.0f);
            }
}

#endif /* BONN_QAT_REFERENCE */
