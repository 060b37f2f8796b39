// Packed bidirectional attention.
//
// Everything is computed transposed: a lane is a query. Scores^T [key][query] and output^T [dim][query] then need no
// horizontal operation at all: softmax's maximum and sum run lane by lane, both products broadcast one number of K or V
// against vectors of queries, and a query's bits cannot depend on its neighbours. The price is one transposition of Q on
// the way in and one of the output on the way out, and idle lanes when a sequence's length is no multiple of the width.
//
// Work is cut into (sequence, chunk of queries) x head. A chunk walks the keys in blocks that stay in L1, with the
// usual running maximum and sum, so scratch memory is bounded whatever the length.

namespace ragged_exit {
namespace RX_ISA {

constexpr int kGroup = kQueryVecs * kWidth;  // queries in one register tile
constexpr int kChunk = 192;                  // queries that share one copy of a block of keys; a multiple of every kGroup
constexpr int kKeyBlock = 64;
constexpr int kSlice = 8;  // dims of one output tile

struct AttentionScratch {
    int64_t depth;        // dim rounded up to 16: row length of the copied keys and values
    float *q, *out;       // [kChunk / kGroup][depth][kGroup]
    float *maximum, *sum; // [kChunk]
    float* top;           // [kGroup] the maximum with the current block's scores
    float *k, *v;         // [kKeyBlock][depth]
    float* weights;       // [kKeyBlock][kGroup]

    static int64_t floats(int64_t dim) {
        const int64_t depth = round_up(dim, 16);
        return 2 * kChunk * depth + 2 * kChunk + kGroup + 2 * kKeyBlock * depth + kKeyBlock * kGroup;
    }
    AttentionScratch(float* memory, int64_t dim) : depth(round_up(dim, 16)) {
        q = memory;
        out = q + kChunk * depth;
        maximum = out + kChunk * depth;
        sum = maximum + kChunk;
        top = sum + kChunk;
        k = top + kGroup;
        v = k + kKeyBlock * depth;
        weights = v + kKeyBlock * depth;
    }
};

// Rows [n] of `dim` numbers -> target [dim][kGroup], times `factor`; the lanes past n repeat the last row.
template <typename T>
RX_INLINE void load_queries(const T* source, int64_t stride, int64_t n, int64_t dim, float factor, float* target) {
    for (int64_t lane = 0; lane < n; lane += kWidth) {
        for (int64_t d = 0; d < dim; d += kWidth) {
            const int64_t columns = smaller(kWidth, dim - d);
            Vec block[kWidth];
            for (int i = 0; i < kWidth; ++i) {
                block[i] = load_n(source + smaller(lane + i, n - 1) * stride + d, columns) * set1(factor);
            }
            transpose(block);
            for (int64_t i = 0; i < columns; ++i) store(target + (d + i) * kGroup + lane, block[i]);
        }
    }
}

// out^T [dim][kGroup] over the sums -> rows [n] of `dim` numbers.
template <typename T>
RX_INLINE void store_output(const float* source, const float* sum, int64_t n, int64_t dim, T* target, int64_t stride) {
    for (int64_t lane = 0; lane < n; lane += kWidth) {
        const Vec inverse = set1(1.0f) / load(sum + lane);
        const int64_t queries = smaller(kWidth, n - lane);
        for (int64_t d = 0; d < dim; d += kWidth) {
            const int64_t columns = smaller(kWidth, dim - d);
            Vec block[kWidth];
            for (int i = 0; i < kWidth; ++i) block[i] = load(source + (d + i) * kGroup + lane) * inverse;
            transpose(block);
            for (int64_t i = 0; i < queries; ++i) store_n(target + (lane + i) * stride + d, block[i], columns);
        }
    }
}

// Rows [n] of `dim` numbers -> target [n][depth], zero past dim.
template <typename T>
RX_INLINE void copy_rows(const T* source, int64_t stride, int64_t n, int64_t dim, float* target, int64_t depth) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t d = 0;
        for (; d + kWidth <= dim; d += kWidth) store(target + i * depth + d, load(source + i * stride + d));
        for (; d < depth; d += kWidth) {
            const int64_t columns = larger(dim - d, 0);
            store(target + i * depth + d, load_n(source + i * stride + smaller(d, dim), columns));
        }
    }
}

// Rows that will be needed soon, fetched into the second-level cache a few at a time between tiles: a head's rows are a
// few lines each, a whole token apart, which no hardware prefetcher follows.
struct Upcoming {
    struct Stream {
        const char* rows;
        int64_t stride;  // bytes
    };
    Stream streams[4];
    int count;
    int64_t rows, row_bytes;

    RX_INLINE void fetch(int64_t first, int64_t n) const {
        const int64_t last = smaller(first + n, rows);
        for (int s = 0; s < count; ++s)
            for (int64_t i = first; i < last; ++i)
                for (int64_t byte = 0; byte < row_bytes; byte += 64)
                    __builtin_prefetch(streams[s].rows + i * streams[s].stride + byte, 0, 2);
    }
};

// Scores^T of QV vectors of queries and KEYS keys -> weights; they join the maximum in `top`, which stays in memory
// because the tile needs the registers.
template <int QV, int KEYS>
RX_INLINE void score_tile(const float* q, const float* k, int64_t depth, int64_t dim, float* weights, float* top) {
    Vec acc[QV][KEYS];
    for (int i = 0; i < QV; ++i)
        for (int j = 0; j < KEYS; ++j) acc[i][j] = zero();
    for (int64_t d = 0; d < dim; ++d) {
        Vec queries[QV];
        for (int i = 0; i < QV; ++i) queries[i] = load(q + d * kGroup + i * kWidth);
        for (int j = 0; j < KEYS; ++j) {
            const Vec key = set1(k[j * depth + d]);
            for (int i = 0; i < QV; ++i) acc[i][j] = fma(queries[i], key, acc[i][j]);
        }
    }
    for (int i = 0; i < QV; ++i) {
        Vec largest_score = load(top + i * kWidth);
        for (int j = 0; j < KEYS; ++j) {
            store(weights + j * kGroup + i * kWidth, acc[i][j]);
            largest_score = max(acc[i][j], largest_score);
        }
        store(top + i * kWidth, largest_score);
    }
}

template <int QV>
RX_INLINE void score_block(const float* q, const float* k, int64_t depth, int64_t dim, int64_t keys, float* weights,
                           float* top, const Upcoming& upcoming) {
    int64_t j = 0;
    for (; j + kTileRows <= keys; j += kTileRows) {
        upcoming.fetch(j, kTileRows);
        score_tile<QV, kTileRows>(q, k + j * depth, depth, dim, weights + j * kGroup, top);
    }
    upcoming.fetch(j, keys - j);
    if (kTileRows > 4 && keys - j >= 4) {
        score_tile<QV, 4>(q, k + j * depth, depth, dim, weights + j * kGroup, top);
        j += 4;
    }
    if (keys - j >= 2) {
        score_tile<QV, 2>(q, k + j * depth, depth, dim, weights + j * kGroup, top);
        j += 2;
    }
    if (keys - j >= 1) score_tile<QV, 1>(q, k + j * depth, depth, dim, weights + j * kGroup, top);
}

// out^T [DIMS][QV vectors] = out^T * rescale + V^T weights
template <int QV, int DIMS>
RX_INLINE void output_tile(const float* weights, const float* v, int64_t depth, int64_t keys, const Vec* rescale,
                           bool first_block, float* out) {
    Vec acc[QV][DIMS];
    for (int j = 0; j < DIMS; ++j)
        for (int i = 0; i < QV; ++i)
            acc[i][j] = first_block ? zero() : load(out + j * kGroup + i * kWidth) * rescale[i];
    for (int64_t key = 0; key < keys; ++key) {
        Vec weight[QV];
        for (int i = 0; i < QV; ++i) weight[i] = load(weights + key * kGroup + i * kWidth);
        for (int j = 0; j < DIMS; ++j) {
            const Vec value = set1(v[key * depth + j]);
            for (int i = 0; i < QV; ++i) acc[i][j] = fma(weight[i], value, acc[i][j]);
        }
    }
    for (int j = 0; j < DIMS; ++j)
        for (int i = 0; i < QV; ++i) store(out + j * kGroup + i * kWidth, acc[i][j]);
}

// One block of keys for one group of queries (QV vectors).
template <int QV>
void attend(const AttentionScratch& s, const float* q, int64_t dim, int64_t keys, bool first_block, float* maximum,
            float* sum, float* out, const Upcoming& upcoming) {
    // The lowest finite number instead of -inf: subtracting it from a score of -inf is no NaN.
    for (int i = 0; i < QV; ++i) {
        if (first_block) store(maximum + i * kWidth, set1(-3.40282347e38f));
        store(s.top + i * kWidth, load(maximum + i * kWidth));
    }
    score_block<QV>(q, s.k, s.depth, dim, keys, s.weights, s.top, upcoming);
    Vec top[QV], rescale[QV], total[QV];
    for (int i = 0; i < QV; ++i) {
        top[i] = load(s.top + i * kWidth);
        rescale[i] = exp2(load(maximum + i * kWidth) - top[i]);
        total[i] = zero();
    }
    for (int64_t key = 0; key < keys; ++key) {
        for (int i = 0; i < QV; ++i) {
            float* place = s.weights + key * kGroup + i * kWidth;
            const Vec weight = exp2(load(place) - top[i]);
            store(place, weight);
            total[i] = total[i] + weight;
        }
    }
    for (int i = 0; i < QV; ++i) {
        store(maximum + i * kWidth, top[i]);
        store(sum + i * kWidth, first_block ? total[i] : fma(load(sum + i * kWidth), rescale[i], total[i]));
    }
    for (int64_t d = 0; d < dim; d += kSlice) {
        for (int64_t slice = d; slice < d + kSlice; slice += kTileRows) {
            output_tile<QV, kTileRows>(s.weights, s.v + slice, s.depth, keys, rescale, first_block,
                                       out + slice * kGroup);
        }
    }
}

struct AttentionTask {
    int64_t start;           // the sequence's first token
    int32_t length, query;   // its tokens, and the chunk's first query
};

// The first rows of an item: what it reads of q, k and v, and where it writes.
template <typename T>
Upcoming first_rows(const AttentionArgs& a, const AttentionTask& task, int64_t head) {
    constexpr int64_t kSize = sizeof(T);
    const int64_t query = task.start + task.query;
    const auto row = [&](const void* base, int64_t token, int64_t token_stride, int64_t head_stride) {
        return Upcoming::Stream{static_cast<const char*>(base) + (token * token_stride + head * head_stride) * kSize,
                                token_stride * kSize};
    };
    return {{row(a.q, query, a.q_token, a.q_head), row(a.k, task.start, a.k_token, a.k_head),
             row(a.v, task.start, a.v_token, a.v_head), row(a.out, query, a.heads * a.dim, a.dim)},
            4,
            smaller(kKeyBlock, task.length - task.query),
            a.dim * kSize};
}

template <typename T>
void attention_task(const AttentionArgs& a, const AttentionTask& task, int64_t head, const Upcoming& next_item,
                    const AttentionScratch& s) {
    const int64_t queries = smaller(kChunk, task.length - task.query);
    const int64_t vectors = round_up(queries, kWidth) / kWidth;
    const int64_t groups = round_up(vectors, kQueryVecs) / kQueryVecs;
    const T* q = static_cast<const T*>(a.q) + (task.start + task.query) * a.q_token + head * a.q_head;
    const T* k = static_cast<const T*>(a.k) + task.start * a.k_token + head * a.k_head;
    const T* v = static_cast<const T*>(a.v) + task.start * a.v_token + head * a.v_head;
    T* out = static_cast<T*>(a.out) + ((task.start + task.query) * a.heads + head) * a.dim;
    const float factor = a.scale * 1.44269504f;  // log2(e): softmax in powers of two
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = vectors * g / groups * kWidth, last = vectors * (g + 1) / groups * kWidth;
        load_queries(q + first * a.q_token, a.q_token, smaller(last, queries) - first, a.dim, factor,
                     s.q + g * s.depth * kGroup);
    }
    constexpr int64_t kSize = sizeof(T);
    for (int64_t key = 0; key < task.length; key += kKeyBlock) {
        const int64_t keys = smaller(kKeyBlock, task.length - key);
        copy_rows(k + key * a.k_token, a.k_token, keys, a.dim, s.k, s.depth);
        copy_rows(v + key * a.v_token, a.v_token, keys, a.dim, s.v, s.depth);
        const T *next_k = k + (key + keys) * a.k_token, *next_v = v + (key + keys) * a.v_token;
        const Upcoming next_block{{{reinterpret_cast<const char*>(next_k), a.k_token * kSize},
                                   {reinterpret_cast<const char*>(next_v), a.v_token * kSize}},
                                  2,
                                  smaller(kKeyBlock, task.length - key - keys),
                                  a.dim * kSize};
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t size = vectors * (g + 1) / groups - vectors * g / groups;
            const auto run = size == 1 ? attend<1> : size == 2 ? attend<2> : attend<kQueryVecs>;
            run(s, s.q + g * s.depth * kGroup, a.dim, keys, key == 0, s.maximum + g * kGroup, s.sum + g * kGroup,
                s.out + g * s.depth * kGroup, g > 0 ? Upcoming{} : next_block.rows > 0 ? next_block : next_item);
        }
    }
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = vectors * g / groups * kWidth, last = vectors * (g + 1) / groups * kWidth;
        store_output(s.out + g * s.depth * kGroup, s.sum + g * kGroup, smaller(last, queries) - first, a.dim,
                     out + first * a.heads * a.dim, a.heads * a.dim);
    }
}

template <typename T>
void attention_of(const AttentionArgs& a) {
    int64_t task_count = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
        task_count += round_up(a.cu_seqlens[row + 1] - a.cu_seqlens[row], kChunk) / kChunk;
    }
    const int64_t scratch = round_up(AttentionScratch::floats(a.dim), 16);
    const int64_t task_floats = round_up(task_count * static_cast<int64_t>(sizeof(AttentionTask) / sizeof(float)), 16);
    float* memory = workspace(task_floats + scratch * a.threads);
    AttentionTask* tasks = reinterpret_cast<AttentionTask*>(memory);
    int64_t filled = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
        const int32_t start = a.cu_seqlens[row], length = a.cu_seqlens[row + 1] - start;
        for (int32_t query = 0; query < length; query += kChunk) tasks[filled++] = {start, length, query};
    }
    const int64_t live = a.cu_seqlens[a.rows], row_bytes = a.heads * a.dim * static_cast<int64_t>(sizeof(T));
    std::memset(static_cast<char*>(a.out) + live * row_bytes, 0, (a.tokens - live) * row_bytes);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        const AttentionScratch s(memory + task_floats + scratch * omp_get_thread_num(), a.dim);
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < task_count * a.heads; ++item) {
            const int64_t next = smaller(item + 1, task_count * a.heads - 1);
            attention_task<T>(a, tasks[item / a.heads], item % a.heads,
                              first_rows<T>(a, tasks[next / a.heads], next % a.heads), s);
        }
    }
}

void attention(const AttentionArgs& a) { a.bf16 ? attention_of<Bf16>(a) : attention_of<float>(a); }

}  // namespace RX_ISA
}  // namespace ragged_exit
