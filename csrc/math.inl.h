// exp2, exp, tanh and sigmoid for every lane, to one or two units in the last place; NaN, infinities and underflow as in libm.

namespace ragged_exit {
namespace RX_ISA {

// 2^f for f in [0, 1]: minimax with p(0) = 1, relative error 2e-9 before rounding.
RX_INLINE Vec exp2_fraction(Vec f) {
    Vec p = fma(set1(2.16129189e-4f), f, set1(1.24678453e-3f));
    p = fma(p, f, set1(9.67545167e-3f));
    p = fma(p, f, set1(5.54852806e-2f));
    p = fma(p, f, set1(2.40229306e-1f));
    p = fma(p, f, set1(6.93147044e-1f));
    return fma(p, f, set1(1.0f));
}

RX_INLINE Vec exp2(Vec x) {
    x = exp2_clamp(x);
    return scale_by_floor(exp2_fraction(fraction(x)), x);
}

RX_INLINE Vec exp(Vec x) {
    x = min(set1(120.0f), max(set1(-120.0f), x));  // the remainder of an infinity would be NaN
    const Vec log2e = set1(1.44269504f), ln2_high = set1(0.693359375f), ln2_low = set1(-2.12194440e-4f);
    const Vec n = floor(x * log2e);
    const Vec remainder = fma(n, set1(0.0f) - ln2_low, fma(n, set1(0.0f) - ln2_high, x));  // n ln2_high is exact
    return scale_by_floor(exp2_fraction(remainder * log2e), exp2_clamp(n));
}

RX_INLINE Vec tanh(Vec x) {
    const Vec size = abs(x), square = x * x;
    Vec p = fma(set1(-5.70498873e-3f), square, set1(2.06390888e-2f));  // Cephes tanhf
    p = fma(p, square, set1(-5.37397156e-2f));
    p = fma(p, square, set1(1.33314422e-1f));
    p = fma(p, square, set1(-3.33332819e-1f));
    const Vec small = fma(p * square, x, x);
    const Vec large = set1(1.0f) - set1(2.0f) / (exp(size + size) + set1(1.0f));
    return if_less(size, set1(0.625f), small, with_sign_of(large, x));
}

RX_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(set1(-x))[0]); }

}  // namespace RX_ISA
}  // namespace ragged_exit
