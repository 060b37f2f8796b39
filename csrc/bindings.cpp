// Python's view of the kernels: addresses and shapes in, outputs written in place. ops/native.py has checked dtypes,
// shapes and layouts; what is checked here is what only the tensors' contents can tell.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace ragged_exit {
namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// A plan that points outside its buffers would crash, or read another's memory.
void check_cu_seqlens(const char* name, const int32_t* cu_seqlens, int64_t rows, int64_t tokens) {
    bool ascending = cu_seqlens[0] == 0;
    for (int64_t row = 0; row < rows; ++row) ascending &= cu_seqlens[row] <= cu_seqlens[row + 1];
    if (!ascending || cu_seqlens[rows] > tokens) {
        throw std::invalid_argument(std::string(name) + ": expected to rise from 0 to at most " + std::to_string(tokens) +
                                    " (the tokens)");
    }
}

void check_live(const int32_t* live, int64_t rows) {
    if (live[0] < 0 || live[0] > rows) {
        throw std::invalid_argument("live: expected 0 to " + std::to_string(rows) + " rows, got " +
                                    std::to_string(live[0]));
    }
}

void bind_attention(Address q, Address k, Address v, Address out, Address cu_seqlens, int64_t rows, int64_t tokens,
                    int64_t heads, int64_t dim, std::tuple<int64_t, int64_t> q_strides,
                    std::tuple<int64_t, int64_t> k_strides, std::tuple<int64_t, int64_t> v_strides, float scale, bool bf16,
                    int threads) {
    AttentionArgs a{};
    a.q = at<void>(q), a.k = at<void>(k), a.v = at<void>(v), a.out = at<void>(out);
    a.cu_seqlens = at<int32_t>(cu_seqlens);
    a.rows = rows, a.tokens = tokens, a.heads = heads, a.dim = dim;
    std::tie(a.q_token, a.q_head) = q_strides;
    std::tie(a.k_token, a.k_head) = k_strides;
    std::tie(a.v_token, a.v_head) = v_strides;
    a.scale = scale, a.bf16 = bf16, a.threads = threads;
    check_cu_seqlens("cu_seqlens", a.cu_seqlens, rows, tokens);
    attention(a);
}

void bind_layer_norm(Address x, Address residual, Address weight, Address bias, Address out, int64_t tokens,
                     int64_t width, int64_t x_stride, int64_t residual_stride, float eps, bool uer, bool bf16,
                     int threads) {
    LayerNormArgs a{};
    a.x = at<void>(x), a.residual = at<void>(residual), a.weight = at<void>(weight), a.bias = at<void>(bias);
    a.out = at<void>(out);
    a.tokens = tokens, a.width = width, a.x_stride = x_stride, a.residual_stride = residual_stride;
    a.eps = eps, a.uer = uer, a.bf16 = bf16, a.threads = threads;
    kernels().layer_norm(a);
}

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t rows) {
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= rows) {
            throw std::invalid_argument(std::string(name) + ": expected 0 to " + std::to_string(rows - 1) + ", got " +
                                        std::to_string(ids[i]));
        }
    }
}

// ids: of words, positions, token types (or null); tables: the same, and their rows.
void bind_embed_layer_norm(const std::array<Address, 3>& ids, const std::array<Address, 3>& tables,
                           const std::array<int64_t, 3>& rows, Address weight, Address bias, Address out, int64_t tokens,
                           int64_t width, float eps, bool uer, bool bf16, int threads) {
    const char* names[] = {"input_ids", "position_ids", "token_type_ids"};
    for (int i = 0; i < 3; ++i) {
        if (ids[i]) check_ids(names[i], at<int64_t>(ids[i]), tokens, rows[i]);
    }
    kernels().embed_layer_norm({at<int64_t>(ids[0]), at<int64_t>(ids[1]), at<int64_t>(ids[2]), at<void>(tables[0]),
                                at<void>(tables[1]), at<void>(tables[2]), at<void>(weight), at<void>(bias), at<void>(out),
                                tokens, width, eps, uer, bf16, threads});
}

void bind_linear(Address x, Address weights, Address bias, Address residual, Address out, int64_t tokens, int64_t inputs,
                 int64_t outputs, int64_t x_stride, bool gelu, bool bf16, int threads) {
    linear({at<void>(x), at<void>(weights), inputs / 32, at<float>(bias), at<void>(residual), at<void>(out), tokens, inputs,
            outputs, x_stride, outputs, gelu, bf16, threads});
}

void bind_activate(Address x, int64_t n, int activation, bool bf16, int threads) {
    kernels().activate(at<void>(x), n, static_cast<Activation>(activation), bf16, threads);
}

// weights: of qkv, attention_output, attention_norm, feed_forward_up, feed_forward_down, output_norm, with a bias each.
void bind_layer(Address hidden, Address means, Address cu_seqlens, const std::array<Address, 12>& weights, int64_t rows,
                int64_t tokens, int64_t width, int64_t heads, int64_t inner, float eps, bool uer, bool bf16, int threads) {
    const auto linear = [&](int i) { return LayerArgs::Linear{at<void>(weights[i]), at<float>(weights[i + 1])}; };
    const auto norm = [&](int i) { return LayerArgs::Norm{at<void>(weights[i]), at<void>(weights[i + 1])}; };
    check_cu_seqlens("cu_seqlens", at<int32_t>(cu_seqlens), rows, tokens);
    layer({at<void>(hidden), at<float>(means), at<int32_t>(cu_seqlens), rows, width, heads, inner, linear(0), linear(2),
           linear(6), linear(8), norm(4), norm(10), eps, uer, bf16, threads});
}

// The tensors of ExitArgs: (cu_seqlens, live, counter, previous, threshold) and the outputs in the order of ExitTensors.
using ExitInputs = std::array<Address, 5>;
using ExitOutputs = std::array<Address, 8>;

ExitArgs exit_args(const ExitInputs& in, const ExitOutputs& out, int64_t rows, int64_t tokens, int64_t classes, int score,
                   int compare, float tolerance, float temperature, float lam, bool dr_by_distance, bool final,
                   bool per_row_threshold, bool bf16, int threads) {
    ExitArgs a{};
    a.cu_seqlens = at<int32_t>(in[0]);
    const int32_t* live = at<int32_t>(in[1]);
    check_live(live, rows);
    check_cu_seqlens("cu_seqlens", a.cu_seqlens, rows, tokens);
    a.rows = rows, a.live_rows = live[0], a.classes = classes;
    a.score = static_cast<Score>(score), a.compare = static_cast<Compare>(compare);
    a.tolerance = tolerance, a.temperature = temperature, a.lam = lam;
    a.dr_by_distance = dr_by_distance, a.final = final;
    a.counter = at<int32_t>(in[2]), a.previous = at<float>(in[3]), a.threshold = at<float>(in[4]);
    a.per_row_threshold = per_row_threshold;
    a.logits = at<float>(out[0]), a.out_score = at<float>(out[1]), a.exits = at<bool>(out[2]);
    a.survivors = at<int32_t>(out[3]), a.new_cu_seqlens = at<int32_t>(out[4]), a.new_live = at<int32_t>(out[5]);
    a.new_counter = at<int32_t>(out[6]), a.new_previous = at<float>(out[7]);
    a.bf16 = bf16, a.threads = threads;
    return a;
}

void bind_exit_step(Address hidden, int64_t hidden_stride, int64_t width, bool mean, Address means,
                    // the tensors of HeadWeights, in their order
                    const std::array<Address, 10>& head, int64_t pooled, int64_t projected, const ExitInputs& in,
                    const ExitOutputs& out, int64_t rows, int64_t tokens, int64_t classes, int score, int compare,
                    float tolerance, float temperature, float lam, bool dr_by_distance, bool final,
                    bool per_row_threshold, bool bf16, int threads) {
    const ExitArgs a = exit_args(in, out, rows, tokens, classes, score, compare, tolerance, temperature, lam,
                                 dr_by_distance, final, per_row_threshold, bf16, threads);
    for (int64_t row = 0; row < a.live_rows; ++row) {
        if (a.cu_seqlens[row] == a.cu_seqlens[row + 1]) {
            throw std::invalid_argument("cu_seqlens: live row " + std::to_string(row) + " has no tokens");
        }
    }
    HeadArgs h{};
    h.hidden = at<void>(hidden), h.hidden_stride = hidden_stride, h.width = width, h.mean = mean;
    h.means = at<float>(means);
    h.classifier = at<void>(head[0]), h.classifier_bias = at<void>(head[1]);
    h.pooler_packed = head[9] != 0;
    h.pooler = at<void>(h.pooler_packed ? head[9] : head[2]), h.pooler_bias = at<void>(head[3]);
    h.uncertainty = at<void>(head[4]), h.uncertainty_bias = at<void>(head[5]);
    h.projection = at<void>(head[6]), h.projection_bias = at<void>(head[7]), h.prototypes = at<void>(head[8]);
    h.pooled = pooled, h.projected = projected;
    kernels().exit_step(h, a);
}

void bind_exit_decide(Address logits, Address signal, const ExitInputs& in, const ExitOutputs& out, int64_t rows,
                      int64_t tokens, int64_t classes, int score, int compare, float tolerance, float temperature,
                      float lam, bool dr_by_distance, bool final, bool per_row_threshold, bool bf16, int threads) {
    const ExitArgs a = exit_args(in, out, rows, tokens, classes, score, compare, tolerance, temperature, lam,
                                 dr_by_distance, final, per_row_threshold, bf16, threads);
    kernels().exit_decide(DecideArgs{at<void>(logits), at<float>(signal)}, a);
}

using Gather = std::tuple<Address, Address, int64_t>;  // source, target, bytes of a token or row

std::vector<GatherTensor> gather_tensors(const std::vector<Gather>& tensors) {
    std::vector<GatherTensor> result;
    result.reserve(tensors.size());
    for (const auto& [source, target, bytes] : tensors) result.push_back({at<char>(source), at<char>(target), bytes});
    return result;
}

void bind_compact(const std::vector<Gather>& tokens, const std::vector<Gather>& rows, Address survivors,
                  Address cu_seqlens, Address new_cu_seqlens, Address live, int64_t old_rows, int64_t old_tokens,
                  int64_t token_capacity, int64_t row_capacity, int threads) {
    CompactArgs a{};
    a.survivors = at<int32_t>(survivors), a.cu_seqlens = at<int32_t>(cu_seqlens);
    a.new_cu_seqlens = at<int32_t>(new_cu_seqlens);
    check_live(at<int32_t>(live), old_rows);
    a.live_rows = at<int32_t>(live)[0];
    a.token_capacity = token_capacity, a.row_capacity = row_capacity, a.threads = threads;
    check_cu_seqlens("cu_seqlens", a.cu_seqlens, old_rows, old_tokens);
    check_cu_seqlens("new_cu_seqlens", a.new_cu_seqlens, a.live_rows, token_capacity);
    if (a.live_rows > row_capacity) {
        throw std::invalid_argument("row_capacity: expected at least " + std::to_string(a.live_rows) + ", got " +
                                    std::to_string(row_capacity));
    }
    for (int64_t i = 0; i < a.live_rows; ++i) {
        const int32_t row = a.survivors[i];
        if (row < 0 || row >= old_rows ||
            a.cu_seqlens[row + 1] - a.cu_seqlens[row] != a.new_cu_seqlens[i + 1] - a.new_cu_seqlens[i]) {
            throw std::invalid_argument("survivors: entry " + std::to_string(i) + " does not fit the plan");
        }
    }
    const std::vector<GatherTensor> token_tensors = gather_tensors(tokens), row_tensors = gather_tensors(rows);
    compact(a, token_tensors.data(), static_cast<int64_t>(token_tensors.size()), row_tensors.data(),
            static_cast<int64_t>(row_tensors.size()));
}

void bind_elementwise(const std::string& function, Address x, Address y, int64_t n) {
    const Kernels& set = kernels();
    (function == "exp" ? set.exp : function == "exp2" ? set.exp2 : set.tanh)(at<float>(x), at<float>(y), n);
}

}  // namespace
}  // namespace ragged_exit

PYBIND11_MODULE(_native, module) {
    using namespace ragged_exit;
    const py::call_guard<py::gil_scoped_release> without_gil;
    module.attr("isa") = isa();
    module.attr("sources") = RAGGED_EXIT_SOURCES;  // setup.py's digest of this folder
    module.def("varlen_attention", bind_attention, without_gil);
    module.def("add_layer_norm", bind_layer_norm, without_gil);
    module.def("embed_layer_norm", bind_embed_layer_norm, without_gil);
    module.attr("tiles_available") = tiles_available();
    module.attr("linears_available") = std::make_tuple(linears_available(false), linears_available(true));
    module.def("linear", bind_linear, without_gil);
    module.def("activate", bind_activate, without_gil);
    module.def("layer", bind_layer, without_gil);
    module.def("take_layer_seconds", [] {
        const LayerSeconds taken = take_layer_seconds();
        return std::array<double, 3>{taken.linears, taken.attention, taken.norms};
    });
    module.def("exit_step", bind_exit_step, without_gil);
    module.def("exit_decide", bind_exit_decide, without_gil);
    module.def("compact", bind_compact, without_gil);
    module.def("elementwise", bind_elementwise, without_gil);  // exp, exp2 or tanh: for accuracy tests
}
