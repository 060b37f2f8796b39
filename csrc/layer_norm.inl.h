// Residual add and LayerNorm: a row is summed into an L1 buffer as it is read, then normalised from there.

namespace ragged_exit {
namespace RX_ISA {

template <typename T>
void normalise_row(const LayerNormArgs& a, int64_t row, const float* weight, const float* bias, float* buffer) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
    T* out = static_cast<T*>(a.out) + row * a.width;
    const int64_t whole = a.width / kWidth * kWidth, rest = a.width - whole;

    Vec total = zero();
    for (int64_t i = 0; i < whole; i += kWidth) {
        Vec y = load(x + i);
        if (residual) y = y + load(residual + i);
        store(buffer + i, y);
        total = total + y;
        __builtin_prefetch(out + i, 1);
    }
    if (rest) {
        Vec y = load_n(x + whole, rest);
        if (residual) y = y + load_n(residual + whole, rest);
        store(buffer + whole, y);
        total = total + y;
    }
    const float mean = sum(total) / static_cast<float>(a.width);

    Vec squares = zero();
    for (int64_t i = 0; i < whole; i += kWidth) {
        const Vec centred = load(buffer + i) - set1(mean);
        squares = fma(centred, centred, squares);
        __builtin_prefetch(x + a.x_stride + i);  // the next row, while this one keeps to L1
        if (residual) __builtin_prefetch(residual + a.residual_stride + i);
    }
    if (rest) {
        const Vec centred = first_n(rest, load(buffer + whole) - set1(mean), zero());
        squares = fma(centred, centred, squares);
    }
    const float deviations = sum(squares);
    const float factor = a.uer ? 1.0f / (std::sqrt(deviations / static_cast<float>(a.width - 1)) + a.eps)
                               : 1.0f / std::sqrt(deviations / static_cast<float>(a.width) + a.eps);

    for (int64_t i = 0; i < whole; i += kWidth) {
        const Vec normalised = (load(buffer + i) - set1(mean)) * set1(factor);
        store(out + i, fma(normalised, load(weight + i), load(bias + i)));
    }
    if (rest) {
        const Vec normalised = (load(buffer + whole) - set1(mean)) * set1(factor);
        store_n(out + whole, fma(normalised, load_n(weight + whole, rest), load_n(bias + whole, rest)), rest);
    }
}

template <typename T>
void layer_norm_of(const LayerNormArgs& a) {
    const int64_t row_floats = round_up(a.width, 16);
    float* memory = workspace(row_floats * (2 + a.threads));
    float *weight = memory, *bias = memory + row_floats, *buffers = memory + 2 * row_floats;
    for (int64_t i = 0; i < a.width; ++i) {  // widened once: every row reads them
        weight[i] = scalar(static_cast<const T*>(a.weight)[i]);
        bias[i] = scalar(static_cast<const T*>(a.bias)[i]);
    }
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        float* buffer = buffers + row_floats * omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.tokens; ++row) normalise_row<T>(a, row, weight, bias, buffer);
    }
}

void layer_norm(const LayerNormArgs& a) { a.bf16 ? layer_norm_of<Bf16>(a) : layer_norm_of<float>(a); }

}  // namespace RX_ISA
}  // namespace ragged_exit
