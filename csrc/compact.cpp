// Gather by plan: copies of whole runs, split evenly over the threads by target position.
#include <algorithm>
#include <cstring>

#include <omp.h>

#include "kernels.h"

namespace ragged_exit {

namespace {

constexpr int64_t kBytesPerThread = 128 * 1024;  // waking a thread costs about as much as copying this

// Target tokens [begin, end) of one tensor; neighbours that both survive are copied as one run.
void gather_tokens(const CompactArgs& args, const GatherTensor& tensor, int64_t begin, int64_t end) {
    const int64_t live = args.new_cu_seqlens[args.live_rows];
    const int64_t last = std::min(end, live);
    int64_t token = begin;
    int64_t row = std::upper_bound(args.new_cu_seqlens, args.new_cu_seqlens + args.live_rows + 1, token) -
                  args.new_cu_seqlens - 1;
    while (token < last) {
        const int64_t source = args.cu_seqlens[args.survivors[row]] + (token - args.new_cu_seqlens[row]);
        while (row + 1 < args.live_rows && args.survivors[row + 1] == args.survivors[row] + 1 &&
               args.new_cu_seqlens[row + 1] < last) {
            ++row;
        }
        const int64_t run_end = std::min<int64_t>(args.new_cu_seqlens[row + 1], last);
        std::memcpy(tensor.target + token * tensor.item_bytes, tensor.source + source * tensor.item_bytes,
                    (run_end - token) * tensor.item_bytes);
        token = run_end;
        ++row;
    }
    if (token < end) std::memset(tensor.target + token * tensor.item_bytes, 0, (end - token) * tensor.item_bytes);
}

void gather_rows(const CompactArgs& args, const GatherTensor& tensor, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        char* target = tensor.target + row * tensor.item_bytes;
        if (row < args.live_rows) {
            std::memcpy(target, tensor.source + args.survivors[row] * tensor.item_bytes, tensor.item_bytes);
        } else {
            std::memset(target, 0, tensor.item_bytes);
        }
    }
}

}  // namespace

void compact(const CompactArgs& args, const GatherTensor* tokens, int64_t token_count, const GatherTensor* rows,
             int64_t row_count) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < token_count; ++i) bytes += tokens[i].item_bytes * args.token_capacity;
    for (int64_t i = 0; i < row_count; ++i) bytes += rows[i].item_bytes * args.row_capacity;
    const int threads = static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, args.threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t id = omp_get_thread_num(), size = omp_get_num_threads();
        for (int64_t i = 0; i < token_count; ++i) {
            gather_tokens(args, tokens[i], args.token_capacity * id / size, args.token_capacity * (id + 1) / size);
        }
        for (int64_t i = 0; i < row_count; ++i) {
            gather_rows(args, rows[i], args.row_capacity * id / size, args.row_capacity * (id + 1) / size);
        }
    }
}

void plan_survivors(const ExitArgs& args) {
    int32_t count = 0, token = 0;
    args.new_cu_seqlens[0] = 0;
    for (int64_t row = 0; row < args.live_rows; ++row) {
        if (args.exits[row]) continue;
        token += args.cu_seqlens[row + 1] - args.cu_seqlens[row];
        args.survivors[count] = static_cast<int32_t>(row);
        args.new_cu_seqlens[++count] = token;
    }
    std::fill(args.survivors + count, args.survivors + args.rows, -1);
    std::fill(args.new_cu_seqlens + count + 1, args.new_cu_seqlens + args.rows + 1, token);
    args.new_live[0] = count;
    args.new_live[1] = token;
}

}  // namespace ragged_exit
