/* Functions of each number, from sums, products, quotients and roots alone, so that every machine gives the same bits.
   The polynomials were fitted for this file, for the largest error to be the least; errors are those of exact sums. */

#define POLYNOMIAL(x, ...) polynomial(x, (const float[]){__VA_ARGS__}, sizeof((const float[]){__VA_ARGS__}) / 4)

/* The coefficient of the highest power comes first. */
INLINE F polynomial(F x, const float *coefficients, size_t count) {
    F y = fill(coefficients[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < count; i++) y = fused(y, x, fill(coefficients[i]));
    return y;
}

INLINE F least(F a, F b) { return pick((I)(b < a) | (I)(b != b), b, a); } /* a NaN stays */
INLINE F most(F a, F b) { return pick((I)(b > a) | (I)(b != b), b, a); }
INLINE F absolute(F x) { return (F)((I)x & 0x7fffffff); }
INLINE F with_sign_of(F x, F sign) { return (F)((I)x | ((I)sign & (int32_t)0x80000000)); }

INLINE F chosen(I mask) { return pick(mask, fill(1.0f), fill(0.0f)); }

INLINE F rounded(F x) {
    const float whole = 8388608.0f; /* 2^23: floats from here on have no fractions */
    F a = absolute(x);
    return pick((I)(a < whole), with_sign_of((a + whole) - whole, x), x);
}

INLINE F root(F x) { return __builtin_elementwise_sqrt(x); }

INLINE F power_of_two(I exponent) { return (F)((exponent + 127) << 23); }

INLINE F exponential(F x) {
    /* Beyond these all is 0 or infinite. */
    x = pick((I)(x < -105.0f), fill(-105.0f), pick((I)(x > 89.0f), fill(89.0f), x));
    const float shift = 12582912.0f; /* 1.5 * 2^23: what is added to it becomes a whole number */
    F shifted = fused(x, fill(1.44269504f), fill(shift)), n = shifted - shift;
    F r = fused(n, fill(2.12194440e-4f), fused(n, fill(-0.693359375f), x)); /* x - n log 2 */
    F p = POLYNOMIAL(r, 1.990747268e-04f, 1.393364328e-03f, 8.333286172e-03f, 4.166646498e-02f, 1.666666676e-01f, 0.5f);
    F y = fused(r * r, p, r) + 1.0f;
    /* In two factors, because one may be too large or too small for a float. */
    I exponent = (I)shifted - (I)fill(shift), half = exponent >> 1;
    return y * power_of_two(half) * power_of_two(exponent - half);
}

INLINE F sigmoid(F x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE F hyperbolic_tangent(F x) {
    F a = absolute(x), s = a * a;
    F small = fused(a * s, POLYNOMIAL(s, -6.621265013e-03f, 2.131607773e-02f, -5.391069654e-02f, 1.333312143e-01f,
                                      -3.333333208e-01f), a);
    F large = 1.0f - 2.0f / (exponential(a + a) + 1.0f);
    return with_sign_of(pick((I)(a < 0.55f), small, large), x);
}

INLINE F error_function(F x) {
    F a = absolute(x), s = a * a;
    F small = fused(a, POLYNOMIAL(s, -6.111237662e-04f, 5.016216924e-03f, -2.678194838e-02f, 1.128222970e-01f,
                                  -3.761253242e-01f, 1.283791553e-01f), a);
    /* 1 - exp(-q(a)), and 1 from 4 on */
    F q = POLYNOMIAL(a, -1.602820655e-06f, 4.536126264e-05f, -5.907726066e-04f, 4.730554580e-03f, -2.633632155e-02f,
                     1.099265641e-01f, 6.319938661e-01f, 1.130132343e+00f, -2.944798855e-04f);
    F large = pick((I)(a >= 4.0f), fill(1.0f), 1.0f - exponential(-q));
    return with_sign_of(pick((I)(a < 0.9f), small, large), x);
}

INLINE F raised_to_six(F x) { return least(most(x + 3.0f, fill(0.0f)), fill(6.0f)); }

INLINE F function(int64_t code, F x) {
    switch (code) {
    case BONN_QAT_EXP: return exponential(x);
    case BONN_QAT_SIGMOID: return sigmoid(x);
    case BONN_QAT_SILU: return x / (1.0f + exponential(-x));
    case BONN_QAT_TANH: return hyperbolic_tangent(x);
    case BONN_QAT_GELU: return x * 0.5f * (1.0f + error_function(x * 0.707106781f));
    case BONN_QAT_GELU_TANH:
        return x * 0.5f * (1.0f + hyperbolic_tangent(0.797884561f * (x + 0.044715f * (x * x * x))));
    case BONN_QAT_ERF: return error_function(x);
    case BONN_QAT_HARDSIGMOID: return raised_to_six(x) / 6.0f;
    case BONN_QAT_HARDSWISH: return x * raised_to_six(x) / 6.0f;
    case BONN_QAT_SQRT: return root(x);
    case BONN_QAT_RECIPROCAL: return 1.0f / x;
    case BONN_QAT_SQUARE: return x * x;
    case BONN_QAT_ROUND: return rounded(x);
    case BONN_QAT_FLOOR: return rounded(x) - chosen((I)(rounded(x) > x));
    case BONN_QAT_SIGN: return chosen((I)(x > 0.0f)) - chosen((I)(x < 0.0f));
    default: return absolute(x);
    }
}

/* Functions are not inlined where an epilogue is: they are many, and epilogues are in every kernel. */
static __attribute__((noinline)) void apply(int64_t code, F *values, int count) {
    switch (code) {
#define EACH_VALUE(name) STEP_CASE(name) for (int p = 0; p < count; p++) values[p] = function(name, values[p]); break;
        EACH_VALUE(BONN_QAT_EXP)
        EACH_VALUE(BONN_QAT_SIGMOID)
        EACH_VALUE(BONN_QAT_SILU)
        EACH_VALUE(BONN_QAT_TANH)
        EACH_VALUE(BONN_QAT_GELU)
        EACH_VALUE(BONN_QAT_GELU_TANH)
        EACH_VALUE(BONN_QAT_ERF)
        EACH_VALUE(BONN_QAT_HARDSIGMOID)
        EACH_VALUE(BONN_QAT_HARDSWISH)
        EACH_VALUE(BONN_QAT_SQRT)
        EACH_VALUE(BONN_QAT_RECIPROCAL)
        EACH_VALUE(BONN_QAT_SQUARE)
        EACH_VALUE(BONN_QAT_ROUND)
        EACH_VALUE(BONN_QAT_FLOOR)
        EACH_VALUE(BONN_QAT_SIGN)
        EACH_VALUE(BONN_QAT_ABS)
#undef EACH_VALUE
    }
}

/* Values and the residual's. */
static __attribute__((noinline)) void join(int64_t code, F *values, int count, const float *residual, int64_t pitch) {
    for (int p = 0; p < count; p++, residual += pitch) {
        F x = values[p], other = load(residual);
        switch (code) {
        case BONN_QAT_TIMES: values[p] = x * other; break;
        case BONN_QAT_MINUS: values[p] = x - other; break;
        case BONN_QAT_OVER: values[p] = x / other; break;
        case BONN_QAT_MAXIMUM: values[p] = most(x, other); break;
        case BONN_QAT_MINIMUM: values[p] = least(x, other); break;
        case BONN_QAT_AT_LEAST: values[p] = chosen((I)(x >= other)); break;
        case BONN_QAT_ABOVE: values[p] = chosen((I)(x > other)); break;
        case BONN_QAT_AT_MOST: values[p] = chosen((I)(x <= other)); break;
        default: values[p] = chosen((I)(x < other));
        }
    }
}
