// The vector vocabulary in AVX-512 (F, BW, DQ, VL). Each simd_*.h offers the same names; Vec is a compiler vector, so
// + - * / come with it. "n" is a count of leading lanes in 0..kWidth: the others load as zero and are not stored.
// Where an operand is NaN, max and min return the second one.

namespace ragged_exit {
namespace avx512 {

using Vec = __m512;
constexpr int kWidth = 16;

// Register tiles: rows x vectors of accumulators must leave room for their operands in 32 registers.
constexpr int kGemmRows = 14;  // x 2 vectors
constexpr int kQueryVecs = 3;  // x kTileRows
constexpr int kTileRows = 8;
constexpr int kLinearRows = 6, kLinearVecs = 4;
constexpr int kMeanVecs = 24;  // sums of one token's vectors

RX_INLINE Vec zero() { return _mm512_setzero_ps(); }
RX_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
RX_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
RX_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
RX_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

RX_INLINE __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
RX_INLINE Vec widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
RX_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
RX_INLINE Vec load(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
RX_INLINE Vec load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
RX_INLINE Vec load_n(const Bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }

// Round to nearest even; every NaN becomes the quiet one.
RX_INLINE __m256i narrow(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(high);
}
RX_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
RX_INLINE void store(Bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
RX_INLINE void store_n(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
RX_INLINE void store_n(Bf16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(x)); }

// The first n lanes of a, the rest of b.
RX_INLINE Vec first_n(int64_t n, Vec a, Vec b) { return _mm512_mask_mov_ps(b, lanes(n), a); }
// Lane by lane a < b ? yes : no.
RX_INLINE Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}
RX_INLINE Vec abs(Vec x) { return _mm512_abs_ps(x); }
RX_INLINE Vec with_sign_of(Vec magnitude, Vec sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}

// exp2's range reduction: x - floor(x), 0 for an infinite x; and p * 2^floor(x) with gradual underflow.
RX_INLINE Vec exp2_clamp(Vec x) { return x; }
RX_INLINE Vec floor(Vec x) { return _mm512_roundscale_ps(x, 0x9); }
RX_INLINE Vec fraction(Vec x) { return _mm512_reduce_ps(x, 0x9); }
RX_INLINE Vec scale_by_floor(Vec p, Vec x) { return _mm512_scalef_ps(p, x); }

RX_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }
RX_INLINE float largest(Vec x) { return _mm512_reduce_max_ps(x); }

RX_INLINE void transpose(Vec* r) {
    Vec t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + 2 + j]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace avx512
}  // namespace ragged_exit
