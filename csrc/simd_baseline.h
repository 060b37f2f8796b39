// The vector vocabulary for any processor: 16-byte compiler vectors and plain loops; see simd_avx512.h.

namespace ragged_exit {
namespace baseline {

typedef float Vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;

constexpr int kGemmRows = 6;
constexpr int kQueryVecs = 2;
constexpr int kTileRows = 4;
constexpr int kLinearRows = 6, kLinearVecs = 0;  // no linears: oneDNN knows more than 16-byte vectors
constexpr int kMeanVecs = 12;

RX_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
RX_INLINE Vec zero() { return set1(0.0f); }
RX_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

template <typename F>
RX_INLINE Vec each(F f) {
    return Vec{f(0), f(1), f(2), f(3)};
}
RX_INLINE Vec max(Vec a, Vec b) {
    return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
RX_INLINE Vec min(Vec a, Vec b) {
    return each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}

RX_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
RX_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
RX_INLINE float widen(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
RX_INLINE Bf16 narrow(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return Bf16{0x7fc0};
    return Bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

RX_INLINE Vec load(const float* p) { return Vec{p[0], p[1], p[2], p[3]}; }
RX_INLINE Vec load(const Bf16* p) {
    return each([&](int i) { return widen(p[i]); });
}
RX_INLINE Vec load_n(const float* p, int64_t n) {
    return each([&](int i) { return i < n ? p[i] : 0.0f; });
}
RX_INLINE Vec load_n(const Bf16* p, int64_t n) {
    return each([&](int i) { return i < n ? widen(p[i]) : 0.0f; });
}
RX_INLINE void store_n(float* p, Vec x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}
RX_INLINE void store_n(Bf16* p, Vec x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = narrow(x[i]);
}
RX_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
RX_INLINE void store(Bf16* p, Vec x) { store_n(p, x, kWidth); }

RX_INLINE Vec first_n(int64_t n, Vec a, Vec b) {
    return each([&](int i) { return i < n ? a[i] : b[i]; });
}
RX_INLINE Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
    return each([&](int i) { return a[i] < b[i] ? yes[i] : no[i]; });
}
RX_INLINE Vec abs(Vec x) {
    return each([&](int i) { return float_of(bits_of(x[i]) & 0x7fffffffu); });
}
RX_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
    return each([&](int i) { return float_of(bits_of(magnitude[i]) | (bits_of(sign[i]) & 0x80000000u)); });
}

RX_INLINE Vec exp2_clamp(Vec x) { return min(set1(129.0f), max(set1(-152.0f), x)); }
RX_INLINE float floor_small(float x) {  // |x| < 2^22, or NaN
    if (x != x) return x;
    const float whole = static_cast<float>(static_cast<int32_t>(x));
    return whole > x ? whole - 1.0f : whole;
}
RX_INLINE Vec floor(Vec x) {
    return each([&](int i) { return floor_small(x[i]); });
}
RX_INLINE Vec fraction(Vec x) { return x - floor(x); }
RX_INLINE Vec scale_by_floor(Vec p, Vec x) {
    return each([&](int i) {
        if (x[i] != x[i]) return x[i];
        const int32_t n = static_cast<int32_t>(floor_small(x[i])), half = n >> 1;
        return p[i] * float_of(static_cast<uint32_t>(half + 127) << 23) *
               float_of(static_cast<uint32_t>(n - half + 127) << 23);
    });
}

RX_INLINE float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
RX_INLINE float largest(Vec x) {
    const float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
    return even > odd ? even : odd;
}

RX_INLINE void transpose(Vec* r) {
    const Vec a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = Vec{a[i], b[i], c[i], d[i]};
}

}  // namespace baseline
}  // namespace ragged_exit
