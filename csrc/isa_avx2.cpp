// The kernels in AVX2 + FMA, chosen at run time by dispatch.cpp.
#include "isa_prelude.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define RX_ISA avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "simd_avx2.h"

#include "isa_kernels.inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
