// Linears in bfloat16 on vectors, where the processor multiplies pairs of bfloat16 (AVX512-BF16) and has no tiles.
#include "isa_prelude.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)

#include <cpuid.h>

#include "intrinsics.h"

namespace ragged_exit {

bool bf16_vectors_available() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return std::strcmp(isa(), "avx512") == 0 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}

}  // namespace ragged_exit

#define RX_ISA avx512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#include "simd_avx512.h"

#include "math.inl.h"

#include "gelu.inl.h"

// What linear.inl.h needs for pairs. What it compiles is templates over the type: none that the AVX-512 kernels have too.
namespace ragged_exit {
namespace avx512 {

RX_INLINE Vec broadcast(const Bf16* x, int i) {
    int pair;
    std::memcpy(&pair, x + 2 * i, sizeof(pair));
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}
RX_INLINE Vec multiply_add(Bf16, Vec numbers, Vec weights, Vec sums) {
    __m512bh left, right;
    std::memcpy(&left, &numbers, sizeof(left)), std::memcpy(&right, &weights, sizeof(right));
    return _mm512_dpbf16_ps(sums, left, right);
}

}  // namespace avx512
}  // namespace ragged_exit

#include "linear.inl.h"

namespace ragged_exit {
void bf16_linear(const LinearArgs& a) { avx512::linear_of<Bf16>(a); }
}  // namespace ragged_exit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

#include <stdexcept>

namespace ragged_exit {

bool bf16_vectors_available() { return false; }
void bf16_linear(const LinearArgs&) { throw std::logic_error("bf16_linear: built without AVX512-BF16"); }

}  // namespace ragged_exit

#endif
