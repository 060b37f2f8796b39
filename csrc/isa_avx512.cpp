// The kernels in AVX-512, chosen at run time by dispatch.cpp.
#include "isa_prelude.h"

#if defined(__x86_64__)
#include "intrinsics.h"

#define RX_ISA avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "simd_avx512.h"

#include "isa_kernels.inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
