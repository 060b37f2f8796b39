// The vector vocabulary in AVX2 + FMA; see simd_avx512.h for what each name means.

namespace ragged_exit {
namespace avx2 {

using Vec = __m256;
constexpr int kWidth = 8;

// Register tiles for 16 registers; see simd_avx512.h.
constexpr int kGemmRows = 6;
constexpr int kQueryVecs = 2;
constexpr int kTileRows = 4;
constexpr int kLinearRows = 6, kLinearVecs = 2;
constexpr int kMeanVecs = 12;

RX_INLINE Vec zero() { return _mm256_setzero_ps(); }
RX_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
RX_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
RX_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
RX_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

RX_INLINE __m256i lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RX_INLINE Vec widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
RX_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
RX_INLINE Vec load(const Bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
RX_INLINE Vec load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, lanes(n)); }
RX_INLINE Vec load_n(const Bf16* p, int64_t n) {
    Bf16 all[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) all[i] = p[i];
    return load(all);
}

RX_INLINE __m128i narrow(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
RX_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
RX_INLINE void store(Bf16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
RX_INLINE void store_n(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, lanes(n), x); }
RX_INLINE void store_n(Bf16* p, Vec x, int64_t n) {
    Bf16 all[kWidth];
    store(all, x);
    for (int64_t i = 0; i < n; ++i) p[i] = all[i];
}

RX_INLINE Vec first_n(int64_t n, Vec a, Vec b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(lanes(n))); }
RX_INLINE Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
RX_INLINE Vec abs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
RX_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}

RX_INLINE Vec exp2_clamp(Vec x) { return min(set1(129.0f), max(set1(-152.0f), x)); }  // 2^129 and 2^-152: inf and 0
RX_INLINE Vec floor(Vec x) { return _mm256_floor_ps(x); }
RX_INLINE Vec fraction(Vec x) { return x - floor(x); }
RX_INLINE Vec scale_by_floor(Vec p, Vec x) {
    // In two steps: neither a subnormal result nor an overflowing one has its power of two as a float.
    const __m256i n = _mm256_cvtps_epi32(floor(x));
    const __m256i half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
    const Vec first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const Vec second = _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23));
    return p * first * second;
}

RX_INLINE float sum(Vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
RX_INLINE float largest(Vec x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

RX_INLINE void transpose(Vec* r) {
    Vec t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

}  // namespace avx2
}  // namespace ragged_exit
