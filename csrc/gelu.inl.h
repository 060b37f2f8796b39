// Activations for every lane: GELU to the precision of the type that follows, its tanh form, and SiLU.

namespace ragged_exit {
namespace RX_ISA {

// x times the normal distribution's share below x, within 5e-5: half of bfloat16's rounding at .02 already. The share is
// 1/2 + x p(x^2), minimax on |x| <= 4.5 with the value 1 at 4.5; NaN stays NaN.
RX_INLINE Vec gelu(Vec x, Bf16) {
    const Vec limit = set1(4.5f), above = max(set1(-4.5f), x);
    const Vec clamped = min(limit, above), square = clamped * clamped;
    Vec p = fma(set1(-8.368017087e-13f), square, set1(1.144406837e-10f));
    p = fma(p, square, set1(-6.896994952e-09f));
    p = fma(p, square, set1(2.433508731e-07f));
    p = fma(p, square, set1(-5.644015807e-06f));
    p = fma(p, square, set1(9.180126363e-05f));
    p = fma(p, square, set1(-1.092003137e-03f));
    p = fma(p, square, set1(9.746115772e-03f));
    p = fma(p, square, set1(-6.621696724e-02f));
    p = fma(p, square, set1(3.988274015e-01f));
    return above * fma(clamped, p, set1(0.5f));
}

// The same to float's precision, as max(x, 0) - |x| tail(|x|). The tail over exp(-x^2 / 2) is a polynomial in
// 1 / (1 + .295 |x|), minimax on [0, 14] with a relative error of 4e-8.
RX_INLINE Vec gelu(Vec x, float) {
    const Vec size = min(set1(14.0f), abs(x)), t = set1(1.0f) / fma(set1(0.295f), size, set1(1.0f));
    Vec p = fma(set1(3.942114003e-02f), t, set1(-1.834061424e-01f));
    p = fma(p, t, set1(2.710165875e-01f));
    p = fma(p, t, set1(-1.170710786e-01f));
    p = fma(p, t, set1(1.662889497e-01f));
    p = fma(p, t, set1(8.474481283e-02f));
    p = fma(p, t, set1(1.216993815e-01f));
    p = fma(p, t, set1(1.172893383e-01f));
    p = fma(p, t, set1(1.700691595e-05f));
    return max(zero(), x) - size * (p * exp(size * size * set1(-0.5f)));
}

// The tanh form, x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + .044715 x^3), as x / (1 + exp(-2 u)).
RX_INLINE Vec tanh_gelu(Vec x) {
    const Vec twice = x * fma(x * x, set1(7.135481283e-02f), set1(1.595769122f));
    return x / (set1(1.0f) + exp(zero() - twice));
}

RX_INLINE Vec silu(Vec x) { return x / (set1(1.0f) + exp(zero() - x)); }

}  // namespace RX_ISA
}  // namespace ragged_exit
