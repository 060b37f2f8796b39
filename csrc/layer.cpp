// A whole layer: its kernels one after the other, on buffers that stay. (Memory that the allocator gave back
// to the system returns page by page, at a tenth of the layer's time.)
//
// Where there are tokens enough, each thread takes rows of its own through the whole layer: what one kernel writes, the next
// finds in the thread's own caches, and nobody waits for the others. Fewer tokens go through together, the threads sharing
// each kernel, since every weight that is read must serve as many tokens as it can.
#include <algorithm>
#include <cmath>
#include <vector>

#include <omp.h>

#include "kernels.h"

namespace ragged_exit {

namespace {

constexpr int64_t kAloneTokens = 512;  // for each thread, that are worth rows of its own
constexpr int64_t kMostTokens = 1024, kLeastTokens = 256;  // that a thread takes at a time
constexpr int64_t kMeanBytes = 1 << 19;  // of tokens: still in a core's own caches when their means are taken

LayerSeconds spent{};

// Adds the time from its making to its end.
struct Stopwatch {
    double& total;
    double share, start = omp_get_wtime();
    ~Stopwatch() {
        const double seconds = (omp_get_wtime() - start) * share;
#pragma omp atomic
        total += seconds;
    }
};

struct Layer {
    const LayerArgs& a;
    int threads;  // that share a kernel
    double share = static_cast<double>(threads) / a.threads;  // of the time that passes
    int64_t size = a.bf16 ? 2 : 4, dim = a.width / a.heads;
    int64_t chunk = tiles_available() && threads == 1 ? tile_chunk(a.inner, a.bf16) : a.inner;  // of inner activations

    // Rows [first, last).
    void run(int64_t first, int64_t last) const {
        const int64_t start = a.cu_seqlens[first], tokens = a.cu_seqlens[last] - start, row_bytes = a.width * size;
        if (tokens == 0) {
            if (a.means) std::fill_n(a.means + first * a.width, (last - first) * a.width, 0.0f);
            return;
        }
        const int64_t wide_bytes = tokens * std::max(3 * a.width, chunk) * size, offset_bytes = (last - first + 16) / 16 * 64;
        const int64_t bytes = offset_bytes + wide_bytes + 2 * tokens * row_bytes;
        char* memory = reinterpret_cast<char*>(workspace((bytes + 3) / 4, Use::caller));
        int32_t* offsets = reinterpret_cast<int32_t*>(memory);
        char* wide = memory + offset_bytes;    // queries, keys and values, then a chunk of inner activations
        char* context = wide + wide_bytes;     // then the feed-forward's outcome
        char* attended = context + tokens * row_bytes;
        char* hidden = static_cast<char*>(a.hidden) + start * row_bytes;
        for (int64_t row = first; row <= last; ++row) offsets[row - first] = a.cu_seqlens[row] - static_cast<int32_t>(start);

        linear(a.qkv, hidden, tokens, a.width, 3 * a.width, nullptr, wide);
        attend(wide, offsets, last - first, tokens, context);
        linear(a.attention_output, context, tokens, a.width, a.width, hidden, attended);
        norm(a.attention_norm, attended, tokens, attended);
        feed_forward(attended, tokens, wide, context);
        if (a.means) {
            norm_and_means(context, offsets, first, last - first, hidden);
        } else {
            norm(a.output_norm, context, tokens, hidden);
        }
    }

    // The last LayerNorm, a few rows at a time, and the means of each row after it.
    void norm_and_means(const char* x, const int32_t* offsets, int64_t first, int64_t rows, char* hidden) const {
        const int64_t row_bytes = a.width * size;
        for (int64_t row = 0, next; row < rows; row = next) {
            const int64_t start = offsets[row];
            const auto fits = [&](int64_t end) { return threads > 1 || (offsets[end] - start) * row_bytes <= kMeanBytes; };
            for (next = row + 1; next < rows && fits(next + 1);) ++next;
            norm(a.output_norm, x + start * row_bytes, offsets[next] - start, hidden + start * row_bytes);
            float* means = a.means + (first + row) * a.width;
            kernels().mean_rows({hidden, offsets + row, means, next - row, a.width, a.bf16, threads});
        }
    }

    void linear(const LayerArgs::Linear& of, const void* x, int64_t tokens, int64_t inputs, int64_t outputs,
                const void* residual, void* out) const {
        const Stopwatch watch{spent.linears, share};
        ragged_exit::linear({x, of.weights, inputs / 32, of.bias, residual, out, tokens, inputs, outputs, inputs, outputs, false,
                     a.bf16, threads});
    }

    void attend(const char* qkv, const int32_t* offsets, int64_t rows, int64_t tokens, void* out) const {
        const Stopwatch watch{spent.attention, share};
        const int64_t stride = 3 * a.width;
        const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
        attention({qkv, qkv + a.width * size, qkv + 2 * a.width * size, out, offsets, rows, tokens, a.heads, dim, stride, dim,
                   stride, dim, stride, dim, scale, a.bf16, threads});
    }

    void norm(const LayerArgs::Norm& of, const void* x, int64_t tokens, void* out) const {
        const Stopwatch watch{spent.norms, share};
        kernels().layer_norm({x, nullptr, of.weight, of.bias, out, tokens, a.width, a.width, 0, a.eps, a.uer, a.bf16, threads});
    }

    // A chunk of inner activations is multiplied further before the next is made, and so does not leave the caches. The
    // sums are those of whole linears, to the bit.
    void feed_forward(const void* x, int64_t tokens, void* inner, void* out) const {
        const Stopwatch watch{spent.linears, share};
        const LayerArgs::Linear &up = a.feed_forward_up, &down = a.feed_forward_down;
        const auto from = [&](const LayerArgs::Linear& of, int64_t panel_steps, int64_t panel, int64_t step) {
            return static_cast<const char*>(of.weights) + (panel * panel_steps + step) * linear_step_bytes(a.bf16);
        };
        const int64_t up_steps = a.width / 32, down_steps = a.inner / 32;
        for (int64_t at = 0; at < a.inner; at += chunk) {
            const int64_t n = std::min(chunk, a.inner - at);
            ragged_exit::linear({x, from(up, up_steps, at / 32, 0), up_steps, up.bias + at, nullptr, inner, tokens, a.width, n,
                                 a.width, n, true, a.bf16, threads});
            ragged_exit::linear({inner, from(down, down_steps, 0, at / 32), down_steps, at == 0 ? down.bias : nullptr,
                                 at == 0 ? x : out, out, tokens, n, a.width, n, a.width, false, a.bf16, threads});
        }
    }
};

// Rows at which parts begin, and the last one's end. Threads take a part whenever they are free, and parts become smaller
// towards the end: a virtual machine's processors are not always equally fast, and nobody is to wait long for the last one.
std::vector<int64_t> part_rows(const LayerArgs& a, int64_t tokens) {
    std::vector<int64_t> rows{0};
    while (rows.back() < a.rows) {
        const int32_t* start = a.cu_seqlens + rows.back();
        const int64_t left = tokens - *start, share = a.threads > 1 ? left / (2 * a.threads) : left;
        const int64_t size = std::min(kMostTokens, std::max(kLeastTokens, share));
        int64_t end = std::lower_bound(start + 1, a.cu_seqlens + a.rows, *start + size) - a.cu_seqlens;
        if (tokens - a.cu_seqlens[end] < kLeastTokens / 2) end = a.rows;
        rows.push_back(end);
    }
    return rows;
}

}  // namespace

void layer(const LayerArgs& a) {
    const int64_t tokens = a.cu_seqlens[a.rows];
    if (tokens < kAloneTokens * a.threads) {
        Layer{a, a.threads}.run(0, a.rows);
        return;
    }
    const std::vector<int64_t> rows = part_rows(a, tokens);
    const int64_t parts = static_cast<int64_t>(rows.size()) - 1;
    const Layer alone{a, 1};
    OutOfMemory out_of_memory;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads) if (a.threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
        out_of_memory.attempt([&] { alone.run(rows[part], rows[part + 1]); });
    }
    out_of_memory.rethrow();
}

LayerSeconds take_layer_seconds() {
    const LayerSeconds taken = spent;
    spent = {};
    return taken;
}

}  // namespace ragged_exit
