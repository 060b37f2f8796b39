// Residual add or embeddings, and LayerNorm: a row is summed into an L1 buffer as it is read, then normalised from there.

namespace ragged_exit {
namespace RX_ISA {

constexpr int kSums = 4;  // independent sums: one would wait for its own last addition
constexpr float kLittleSpread = 1.0f / 256;  // of a variance beside the mean's square: the mean's rounding shows

// How a row is normalised: what layer_norm and embed_layer_norm share. weight and bias are widened, buffer holds a row.
struct Norm {
    int64_t width;
    float eps;
    bool uer;
    const float *weight, *bias;
    float* buffer;
};

// The sum over a row of what step(i, n, total) adds to its total for numbers i to i + n.
template <typename Step>
RX_INLINE float sum_row(int64_t width, Step step) {
    const int64_t whole = width / kWidth * kWidth;
    Vec totals[kSums] = {};
    int64_t i = 0;
    for (; i + kSums * kWidth <= whole; i += kSums * kWidth)
        for (int n = 0; n < kSums; ++n) totals[n] = step(i + n * kWidth, kWidth, totals[n]);
    for (; i < whole; i += kWidth) totals[0] = step(i, kWidth, totals[0]);
    if (whole < width) totals[0] = step(whole, width - whole, totals[0]);
    return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// Row of `norm.width` numbers -> out: read(i, n) gives numbers i to i + n as a Vec, ahead(i) fetches the next row's.
template <typename T, typename Read, typename Ahead>
RX_INLINE void normalise_row(const Norm& norm, Read read, Ahead ahead, T* out) {
    const float width = static_cast<float>(norm.width);
    float* buffer = norm.buffer;

    float mean = sum_row(norm.width, [&](int64_t i, int64_t n, Vec total) {
        const Vec y = read(i, n);
        store(buffer + i, y);
        __builtin_prefetch(out + i, 1);
        return total + y;
    }) / width;
    const auto centred = [&](int64_t i, int64_t n) {
        const Vec y = load(buffer + i) - set1(mean);
        return n == kWidth ? y : first_n(n, y, zero());
    };
    float squares = sum_row(norm.width, [&](int64_t i, int64_t n, Vec total) {
        ahead(i);  // the next row, while this one keeps to L1
        const Vec y = centred(i, n);
        return fma(y, y, total);
    });
    if (squares < width * mean * mean * kLittleSpread) {  // rare; a correction of every row costs 3 to 11 %
        mean += sum_row(norm.width, [&](int64_t i, int64_t n, Vec total) { return total + centred(i, n); }) / width;
        squares = sum_row(norm.width, [&](int64_t i, int64_t n, Vec total) {
            const Vec y = centred(i, n);
            return fma(y, y, total);
        });
    }
    const float factor = norm.uer ? 1.0f / (std::sqrt(squares / static_cast<float>(norm.width - 1)) + norm.eps)
                                  : 1.0f / std::sqrt(squares / width + norm.eps);

    const int64_t whole = norm.width / kWidth * kWidth, rest = norm.width - whole;
    for (int64_t i = 0; i < whole; i += kWidth) {
        const Vec normalised = centred(i, kWidth) * set1(factor);
        store(out + i, fma(normalised, load(norm.weight + i), load(norm.bias + i)));
    }
    if (rest) {
        const Vec normalised = centred(whole, rest) * set1(factor);
        store_n(out + whole, fma(normalised, load_n(norm.weight + whole, rest), load_n(norm.bias + whole, rest)), rest);
    }
}

// Calls row(norm, index) for every row, on all threads.
template <typename T, typename Row>
RX_INLINE void normalise_rows(const void* weight, const void* bias, int64_t rows, int64_t width, float eps, bool uer,
                              int threads, Row row) {
    const int64_t row_floats = round_up(width, 16);
    float* memory = workspace(row_floats * (2 + threads));
    for (int64_t i = 0; i < width; ++i) {  // widened once: every row reads them
        memory[i] = scalar(static_cast<const T*>(weight)[i]);
        memory[row_floats + i] = scalar(static_cast<const T*>(bias)[i]);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* buffer = memory + row_floats * (2 + omp_get_thread_num());
        const Norm norm{width, eps, uer, memory, memory + row_floats, buffer};
#pragma omp for schedule(static)
        for (int64_t index = 0; index < rows; ++index) row(norm, index);
    }
}

template <typename T>
RX_INLINE Vec load_some(const T* source, int64_t n) {
    return n == kWidth ? load(source) : load_n(source, n);
}

template <typename T>
void layer_norm_of(const LayerNormArgs& a) {
    normalise_rows<T>(a.weight, a.bias, a.tokens, a.width, a.eps, a.uer, a.threads, [&](const Norm& norm, int64_t row) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
        const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
        const auto read = [&](int64_t i, int64_t n) {
            const Vec y = load_some(x + i, n);
            return residual ? y + load_some(residual + i, n) : y;
        };
        const auto ahead = [&](int64_t i) {
            __builtin_prefetch(x + a.x_stride + i);
            if (residual) __builtin_prefetch(residual + a.residual_stride + i);
        };
        normalise_row(norm, read, ahead, static_cast<T*>(a.out) + row * a.width);
    });
}

void layer_norm(const LayerNormArgs& a) { a.bf16 ? layer_norm_of<Bf16>(a) : layer_norm_of<float>(a); }

template <typename T>
void embed_layer_norm_of(const EmbedArgs& a) {
    const T *words = static_cast<const T*>(a.word), *positions = static_cast<const T*>(a.position);
    const T* types = static_cast<const T*>(a.token_type);
    normalise_rows<T>(a.weight, a.bias, a.tokens, a.width, a.eps, a.uer, a.threads, [&](const Norm& norm, int64_t token) {
        const T* word = words + a.input_ids[token] * a.width;
        const T* next = words + a.input_ids[smaller(token + 1, a.tokens - 1)] * a.width;
        const T* position = positions + a.position_ids[token] * a.width;
        const T* type = types ? types + (a.token_type_ids ? a.token_type_ids[token] : 0) * a.width : nullptr;
        const auto read = [&](int64_t i, int64_t n) {
            const Vec y = load_some(word + i, n) + load_some(position + i, n);
            return type ? y + load_some(type + i, n) : y;
        };
        normalise_row(norm, read, [&](int64_t i) { __builtin_prefetch(next + i); }, static_cast<T*>(a.out) + token * a.width);
    });
}

void embed_layer_norm(const EmbedArgs& a) { a.bf16 ? embed_layer_norm_of<Bf16>(a) : embed_layer_norm_of<float>(a); }

}  // namespace RX_ISA
}  // namespace ragged_exit
