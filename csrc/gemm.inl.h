// out = rows weight^T + bias for a few hundred rows, and dot products where there are only a few outputs.
//
// Rows are packed into tiles of kGemmRows, weights into panels of kPanel outputs, both k-major, so that the inner loop
// reads two forward streams and broadcasts. Every output is one chain of multiply-adds over k from zero, whatever the
// tile's height: a row's bits do not depend on which rows share its tile.

namespace ragged_exit {
namespace RX_ISA {

constexpr int kPanel = 32;                                      // outputs in a panel
constexpr int kTileStride = (kGemmRows + kWidth - 1) / kWidth * kWidth;  // floats per k in a packed tile
constexpr int64_t kNarrow = 16;                                 // up to so many outputs, dot products win

constexpr int64_t kAhead = 12;  // k by which the streams are prefetched into L1; the hardware does it less well here

// The calling thread's place among those that share a loop; split() gives each a contiguous part.
struct Team {
    int64_t id, size;
    int64_t begin(int64_t count) const { return count * id / size; }
    int64_t end(int64_t count) const { return count * (id + 1) / size; }
};

template <typename T>
struct Linear {
    const T* weight;  // [outputs, inputs]
    const T* bias;    // [outputs], or null
    int64_t outputs, inputs;
};

struct Tiles {
    float* data;  // [count][inputs][kTileStride]
    int64_t rows, count, inputs;

    Tiles(float* memory, int64_t row_count, int64_t width)
        : data(memory), rows(row_count), count((row_count + kGemmRows - 1) / kGemmRows), inputs(width) {}
    static int64_t floats(int64_t row_count, int64_t width) { return Tiles(nullptr, row_count, width).count * width * kTileStride; }
    int64_t first_row(int64_t tile) const { return rows * tile / count; }  // tiles differ by at most one row
    float* tile(int64_t index) const { return data + index * inputs * kTileStride; }
};

// n <= stride rows of `width` numbers -> target [width][stride]; row(i) points at the i-th. Lanes past n repeat
// the last row.
template <typename RowOf>
RX_INLINE void transpose_rows(RowOf row, int64_t n, int64_t width, float* target, int64_t stride) {
    for (int64_t lane = 0; lane < stride; lane += kWidth) {
        for (int64_t k = 0; k < width; k += kWidth) {
            const int64_t columns = smaller(kWidth, width - k);
            Vec block[kWidth];
            for (int i = 0; i < kWidth; ++i) block[i] = load_n(row(smaller(lane + i, n - 1)) + k, columns);
            transpose(block);
            for (int64_t i = 0; i < columns; ++i) store(target + (k + i) * stride + lane, block[i]);
        }
    }
}

// ROWS rows of a tile times one panel -> out rows `stride` apart, the first `columns` outputs of the panel.
template <int ROWS>
void gemm_tile(const float* tile, const float* panel, const float* bias, int64_t inputs, int64_t columns, bool squash,
               float* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2 * kWidth) {
        Vec acc[ROWS][2];
        for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = zero();
        for (int64_t k = 0; k < inputs; ++k) {
            const float *weights = panel + k * kPanel + column, *rows = tile + k * kTileStride;
            __builtin_prefetch(weights + kAhead * kPanel);
            __builtin_prefetch(weights + kAhead * kPanel + kWidth);
            __builtin_prefetch(rows + kAhead * kTileStride);
            const Vec left = load(weights), right = load(weights + kWidth);
            for (int r = 0; r < ROWS; ++r) {
                acc[r][0] = fma(set1(rows[r]), left, acc[r][0]);
                acc[r][1] = fma(set1(rows[r]), right, acc[r][1]);
            }
        }
        const int64_t in_left = smaller(kWidth, columns - column), in_right = smaller(kWidth, columns - column - kWidth);
        const Vec left_bias = load(bias + column), right_bias = load(bias + column + kWidth);
        for (int r = 0; r < ROWS; ++r) {
            const Vec left = acc[r][0] + left_bias, right = acc[r][1] + right_bias;
            float* target = out + r * stride + column;
            store_n(target, squash ? tanh(left) : left, in_left);
            if (in_right > 0) store_n(target + kWidth, squash ? tanh(right) : right, in_right);
        }
    }
}

using GemmTile = void (*)(const float*, const float*, const float*, int64_t, int64_t, bool, float*, int64_t);

template <int ROWS = kGemmRows>
RX_INLINE GemmTile gemm_tile_of(int64_t rows) {
    if constexpr (ROWS == 1) {
        return gemm_tile<1>;
    } else {
        return rows == ROWS ? gemm_tile<ROWS> : gemm_tile_of<ROWS - 1>(rows);
    }
}

// out [rows][stride] = rows weight^T + bias, tanh of it where `squash`. `scratch` [inputs][kPanel] is this thread's own.
template <typename T>
void gemm(const Team& team, const Tiles& tiles, const Linear<T>& linear, bool squash, float* out, int64_t stride,
          float* scratch) {
    const int64_t panels = (linear.outputs + kPanel - 1) / kPanel, work = panels * tiles.count;
    bool fresh = true;
    float bias[kPanel];
    for (int64_t item = team.begin(work); item < team.end(work); ++item) {
        const int64_t first = item / tiles.count * kPanel, tile = item % tiles.count;
        const int64_t columns = smaller(kPanel, linear.outputs - first);
        if (tile == 0 || fresh) {
            fresh = false;
            const T* weight = linear.weight + first * linear.inputs;
            transpose_rows([&](int64_t i) { return weight + i * linear.inputs; }, columns, linear.inputs, scratch, kPanel);
            for (int64_t i = 0; i < kPanel; ++i) bias[i] = linear.bias && i < columns ? scalar(linear.bias[first + i]) : 0.0f;
        }
        const int64_t row = tiles.first_row(tile), rows = tiles.first_row(tile + 1) - row;
        gemm_tile_of(rows)(tiles.tile(tile), scratch, bias, linear.inputs, columns, squash, out + row * stride + first,
                           stride);
    }
}

template <typename A, typename B>
RX_INLINE float dot(const A* a, const B* b, int64_t n) {
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
        for (int j = 0; j < 4; ++j) acc[j] = fma(load(a + i + j * kWidth), load(b + i + j * kWidth), acc[j]);
    for (; i < n; i += kWidth) {
        const int64_t rest = smaller(kWidth, n - i);
        acc[0] = fma(load_n(a + i, rest), load_n(b + i, rest), acc[0]);
    }
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <typename T>
void dots(const float* row, const Linear<T>& linear, float* out) {
    for (int64_t i = 0; i < linear.outputs; ++i) {
        const float value = dot(row, linear.weight + i * linear.inputs, linear.inputs);
        out[i] = linear.bias ? value + scalar(linear.bias[i]) : value;
    }
}

}  // namespace RX_ISA
}  // namespace ragged_exit
