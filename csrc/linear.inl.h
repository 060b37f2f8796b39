// out = x weight^T + bias, then GELU or a residual, on vectors: what has no matrix tiles.
//
// A strip of kLinearVecs vectors of outputs times kLinearRows tokens lives in registers. x is read where it lies, a number
// (of bfloat16 a pair) broadcast at a time; weights come in steps of 32 inputs (LinearArgs). An output is a chain of
// multiply-adds, in float over kChunkSteps steps at a time: one over thousands of inputs would lose precision. The order
// is one, whatever the number of tokens or threads, so that a token's bits depend on that token alone.

namespace ragged_exit {
namespace RX_ISA {

constexpr int64_t kLineBytes = 64;          // of 16 outputs' weights for one broadcast number
constexpr int64_t kChunkSteps = 12;         // of 32 inputs, in one chain of float
constexpr int64_t kGroupBytes = 256 << 10;  // of weights that serve many tokens in turn: a part of the second-level cache
constexpr int64_t kItemsPerThread = 4;      // at least, so that an uneven share costs little

RX_INLINE Vec broadcast(const float* x, int i) { return set1(x[i]); }
RX_INLINE Vec multiply_add(float, Vec number, Vec weights, Vec sums) { return fma(number, weights, sums); }

// ROWS tokens times VECS vectors of outputs, whose weights begin at `weights`; from one panel of 32 outputs to the next
// there are `panel_bytes`.
template <typename T, int ROWS, int VECS>
void linear_strip(const LinearArgs& a, const T* x, const char* weights, int64_t panel_bytes, const float* bias,
                  const T* residual, T* out) {
    constexpr int kNumbers = 32 * sizeof(T) / 4;  // to broadcast in a step
    constexpr int kHalfVecs = 16 / kWidth;        // vectors of 16 outputs
    Vec total[ROWS * VECS];
    for (int v = 0; v < VECS; ++v) {
        const Vec first = bias ? load(bias + v * kWidth) : zero();
        for (int r = 0; r < ROWS; ++r)
            total[r * VECS + v] = residual ? first + load(residual + r * a.out_stride + v * kWidth) : first;
    }
    const int64_t steps = a.inputs / 32, chunk = sizeof(T) == 4 ? kChunkSteps : steps;
    for (int64_t left = steps; left > 0; left -= chunk) {
        Vec sums[ROWS][VECS];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECS; ++v) sums[r][v] = zero();
        for (int64_t step = smaller(left, chunk); step > 0; --step) {
            for (int i = 0; i < kNumbers; ++i) {
                Vec w[VECS];
#pragma GCC unroll 4
                for (int v = 0; v < VECS; ++v) {
                    const int half = v / kHalfVecs;
                    const char* line = weights + half / 2 * panel_bytes + (half % 2 * kNumbers + i) * kLineBytes;
                    w[v] = load(reinterpret_cast<const float*>(line) + v % kHalfVecs * kWidth);
                    if (v % kHalfVecs == 0) __builtin_prefetch(line + 2 * kNumbers * kLineBytes);
                }
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const Vec number = broadcast(x + r * a.x_stride, i);
#pragma GCC unroll 4
                    for (int v = 0; v < VECS; ++v) sums[r][v] = multiply_add(T(), number, w[v], sums[r][v]);
                }
            }
            x += 32, weights += 2 * kNumbers * kLineBytes;
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECS; ++v) total[r * VECS + v] = total[r * VECS + v] + sums[r][v];
    }
    if (a.gelu) {
#pragma GCC unroll 2
        for (int i = 0; i < ROWS * VECS; ++i) store(out + i / VECS * a.out_stride + i % VECS * kWidth, gelu(total[i], T()));
    } else {
        for (int i = 0; i < ROWS * VECS; ++i) store(out + i / VECS * a.out_stride + i % VECS * kWidth, total[i]);
    }
}

template <typename T, int VECS, int ROWS = kLinearRows>
RX_INLINE auto linear_strip_of(int64_t rows) {
    if constexpr (ROWS == 1) {
        return linear_strip<T, 1, VECS>;
    } else {
        return rows == ROWS ? linear_strip<T, ROWS, VECS> : linear_strip_of<T, VECS, ROWS - 1>(rows);
    }
}

// The threads share items: blocks of tokens, which differ by at most one, times groups of strips. A thread takes a run.
template <typename T, int VECS = kLinearVecs>
void linear_of(const LinearArgs& a) {
    constexpr int64_t kStrip = VECS * kWidth;  // outputs
    const int64_t strips = (a.outputs + kStrip - 1) / kStrip, blocks = (a.tokens + kLinearRows - 1) / kLinearRows;
    const int64_t to_fit = (a.outputs * a.inputs * static_cast<int64_t>(sizeof(T)) + kGroupBytes - 1) / kGroupBytes;
    const int64_t to_share = a.threads > 1 ? (kItemsPerThread * a.threads + blocks - 1) / blocks : 1;
    const int64_t groups = smaller(strips, larger(to_fit, to_share)), items = blocks * groups;
    const int64_t panel_bytes = a.panel_steps * 32 * 32 * static_cast<int64_t>(sizeof(T));
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; ++item) {
            const int64_t group = item / blocks, block = item % blocks;
            const int64_t token = a.tokens * block / blocks, rows = a.tokens * (block + 1) / blocks - token;
            const auto whole = linear_strip_of<T, VECS>(rows);
            for (int64_t strip = strips * group / groups; strip < strips * (group + 1) / groups; ++strip) {
                const int64_t output = strip * kStrip, half = output / 16;
                const char* weights = static_cast<const char*>(a.weights) + half / 2 * panel_bytes +
                                      half % 2 * (32 * 16 * static_cast<int64_t>(sizeof(T)));
                const T* x = static_cast<const T*>(a.x) + token * a.x_stride;
                const int64_t at = token * a.out_stride + output;
                const auto run = a.outputs - output < kStrip ? linear_strip_of<T, VECS / 2>(rows) : whole;
                run(a, x, weights, panel_bytes, a.bias ? a.bias + output : nullptr,
                    a.residual ? static_cast<const T*>(a.residual) + at : nullptr, static_cast<T*>(a.out) + at);
            }
        }
    }
}

}  // namespace RX_ISA
}  // namespace ragged_exit
