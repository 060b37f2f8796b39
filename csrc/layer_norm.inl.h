// Residual add and LayerNorm: a row is summed into an L1 buffer as it is read, then normalised from there.

namespace ragged_exit {
namespace RX_ISA {

constexpr int kSums = 4;  // independent sums: one would wait for its own last addition

template <typename T>
void normalise_row(const LayerNormArgs& a, int64_t row, const float* weight, const float* bias, float* buffer) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
    T* out = static_cast<T*>(a.out) + row * a.width;
    const int64_t whole = a.width / kWidth * kWidth, rest = a.width - whole;

    Vec totals[kSums] = {};
    const auto add = [&](int64_t i, Vec& total) {
        Vec y = load(x + i);
        if (residual) y = y + load(residual + i);
        store(buffer + i, y);
        total = total + y;
        __builtin_prefetch(out + i, 1);
    };
    int64_t i = 0;
    for (; i + kSums * kWidth <= whole; i += kSums * kWidth)
        for (int n = 0; n < kSums; ++n) add(i + n * kWidth, totals[n]);
    for (; i < whole; i += kWidth) add(i, totals[0]);
    if (rest) {
        Vec y = load_n(x + whole, rest);
        if (residual) y = y + load_n(residual + whole, rest);
        store(buffer + whole, y);
        totals[0] = totals[0] + y;
    }
    const Vec mean = set1(sum((totals[0] + totals[1]) + (totals[2] + totals[3])) / static_cast<float>(a.width));

    Vec squares[kSums] = {};
    const auto square = [&](int64_t i, Vec& total) {
        const Vec centred = load(buffer + i) - mean;
        total = fma(centred, centred, total);
        __builtin_prefetch(x + a.x_stride + i);  // the next row, while this one keeps to L1
        if (residual) __builtin_prefetch(residual + a.residual_stride + i);
    };
    for (i = 0; i + kSums * kWidth <= whole; i += kSums * kWidth)
        for (int n = 0; n < kSums; ++n) square(i + n * kWidth, squares[n]);
    for (; i < whole; i += kWidth) square(i, squares[0]);
    if (rest) {
        const Vec centred = first_n(rest, load(buffer + whole) - mean, zero());
        squares[0] = fma(centred, centred, squares[0]);
    }
    const float deviations = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const float factor = a.uer ? 1.0f / (std::sqrt(deviations / static_cast<float>(a.width - 1)) + a.eps)
                               : 1.0f / std::sqrt(deviations / static_cast<float>(a.width) + a.eps);

    for (i = 0; i < whole; i += kWidth) {
        const Vec normalised = (load(buffer + i) - mean) * set1(factor);
        store(out + i, fma(normalised, load(weight + i), load(bias + i)));
    }
    if (rest) {
        const Vec normalised = (load(buffer + whole) - mean) * set1(factor);
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
