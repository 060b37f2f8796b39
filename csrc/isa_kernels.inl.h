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

template <int VECS>
constexpr LinearKernel float_linear() {
    if constexpr (VECS > 0) return linear_of<float, VECS>;
    return nullptr;
}

extern const Kernels table;
const Kernels table = {attention,   layer_norm,                  embed_layer_norm, mean_rows,  exit_step,
                       exit_decide, float_linear<kLinearVecs>(), exp_array,        exp2_array, tanh_array};

}  // namespace RX_ISA
}  // namespace ragged_exit
