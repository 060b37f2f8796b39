// All kernels of one instruction set. Included once by each isa_*.cpp, after its simd_*.h and inside its target pragma.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of those for the whole
// extension, and it could be the one compiled for AVX-512. Hence the few helpers below.

namespace ragged_exit {
namespace RX_ISA {

RX_INLINE float scalar(float x) { return x; }
RX_INLINE float scalar(Bf16 x) { return load_n(&x, 1)[0]; }

}  // namespace RX_ISA
}  // namespace ragged_exit

#include "math.inl.h"

#include "attention.inl.h"
#include "gelu.inl.h"
#include "gemm.inl.h"
#include "layer_norm.inl.h"
#include "scores.inl.h"

#include "exit_step.inl.h"
#include "linear.inl.h"

namespace ragged_exit {
namespace RX_ISA {

template <typename F>
RX_INLINE void apply(const float* x, float* y, int64_t n, F f) {
    each_vector(x, n, [&](Vec value, int64_t count) {
        store_n(y, f(value), count);
        y += count;
    });
}
void exp_array(const float* x, float* y, int64_t n) {
    apply(x, y, n, [&](Vec value) { return exp(value); });
}
void exp2_array(const float* x, float* y, int64_t n) {
    apply(x, y, n, [&](Vec value) { return exp2(value); });
}
void tanh_array(const float* x, float* y, int64_t n) {
    apply(x, y, n, [&](Vec value) { return tanh(value); });
}

// In blocks that are whole vectors on every instruction set: a number's bits depend neither on its place nor on the threads.
template <typename T, typename F>
RX_INLINE void activate_each(T* x, int64_t blocks, int threads, F f) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        T* here = x + 32 * block;
        for (int i = 0; i < 32; i += kWidth) store(here + i, f(load(here + i)));
    }
}
template <typename T>
void activate_of(T* x, int64_t blocks, Activation activation, int threads) {
    switch (activation) {
        case Activation::tanh_gelu: activate_each(x, blocks, threads, [&](Vec v) { return tanh_gelu(v); }); break;
        case Activation::silu: activate_each(x, blocks, threads, [&](Vec v) { return silu(v); }); break;
        case Activation::tanh: activate_each(x, blocks, threads, [&](Vec v) { return tanh(v); }); break;
    }
}
void activate(void* x, int64_t n, Activation activation, bool bf16, int threads) {
    if (bf16) {
        activate_of(static_cast<Bf16*>(x), n / 32, activation, threads);
    } else {
        activate_of(static_cast<float*>(x), n / 32, activation, threads);
    }
}

template <int VECS>
constexpr LinearKernel float_linear() {
    if constexpr (VECS > 0) return linear_of<float, VECS>;
    return nullptr;
}

extern const Kernels table;
const Kernels table = {attention,   layer_norm,                  embed_layer_norm, mean_rows, exit_step,
                       exit_decide, float_linear<kLinearVecs>(), activate,         exp_array, exp2_array,
                       tanh_array};

}  // namespace RX_ISA
}  // namespace ragged_exit
