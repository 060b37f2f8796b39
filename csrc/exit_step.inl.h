// The exit step: pool, pooler GEMM + tanh, classifier, score, comparison and row state in one parallel region; the plan
// follows in one pass over the exits.
//
// Rows go through in blocks, so scratch memory is bounded. Within a block the threads first share the rows (gather),
// then the output panels of the GEMMs (each thread keeps its part of the weights in its own cache), then the rows again.

namespace ragged_exit {
namespace RX_ISA {

constexpr int64_t kRowBlock = 512;
constexpr int64_t kDistances = 1 << 22;    // at most so many prototype distances at a time
constexpr int64_t kMacsPerThread = 1 << 18;  // multiply-adds that are worth waking a thread for

// Hands out parts of one buffer, 64-byte aligned. Counts without a buffer first, so that one allocation fits all.
struct Arena {
    float* memory;
    int64_t used = 0;
    float* take(int64_t floats) {
        float* part = memory ? memory + used : nullptr;
        used += round_up(floats, 16);
        return part;
    }
};

RX_INLINE bool packed_pooler(const HeadArgs& h) { return h.pooler && h.pooler_packed; }

struct ExitScratch {
    const float** rows;         // [n] the pooled hidden rows; a pointer takes the room of two floats
    float* pooled_hidden;       // [n][width], where rows cannot be read in place
    float* hidden_tiles;        // what the pooler and the projection multiply
    float* pooled;              // [n][pooled]
    float* pooled_tiles;        // what a wide classifier multiplies
    float* projected;           // [n][projected]
    float* projected_tiles;     // what many prototypes multiply
    float* distances;           // [n][classes]
    float* prototype_norms;     // [classes]
    float* panels;              // [threads][inputs][kPanel]
    int64_t panel_floats;
    int64_t floats;

    ExitScratch(float* memory, const HeadArgs& h, const ExitArgs& a, int64_t n, int64_t threads) {
        const bool measures = a.score == Score::distance_entropy, wide = a.classes > kNarrow;
        Arena arena{memory};
        rows = reinterpret_cast<const float**>(arena.take(n * 2));
        pooled_hidden = arena.take(!h.means && (a.bf16 || h.mean || packed_pooler(h)) ? n * h.width : 0);
        hidden_tiles = arena.take((h.pooler && !packed_pooler(h)) || measures ? Tiles::floats(n, h.width) : 0);
        pooled = arena.take(h.pooler ? n * h.pooled : 0);
        pooled_tiles = arena.take(wide ? Tiles::floats(n, h.pooled) : 0);
        projected = arena.take(measures ? n * h.projected : 0);
        projected_tiles = arena.take(measures && wide ? Tiles::floats(n, h.projected) : 0);
        distances = arena.take(measures ? n * a.classes : 0);
        prototype_norms = arena.take(measures ? a.classes : 0);
        panel_floats = round_up(larger(h.width, larger(h.pooled, h.projected)) * kPanel, 16);
        panels = arena.take(threads * panel_floats);
        floats = arena.used;
    }
};

// The mean of `tokens` tokens, as floats; zeros for none.
template <typename T>
RX_INLINE void mean_row(const T* hidden, int64_t stride, int64_t tokens, int64_t width, float* target) {
    const Vec count = set1(static_cast<float>(larger(1, tokens)));
    int64_t i = 0;
    // as much of a token at a time as registers hold: reading in the order of memory is what the hardware can fetch ahead
    for (; i + kMeanVecs * kWidth <= width; i += kMeanVecs * kWidth) {
        Vec totals[kMeanVecs];
        for (Vec& total : totals) total = zero();
        for (int64_t t = 0; t < tokens; ++t) {
            const T* token = hidden + t * stride + i;
            for (int j = 0; j < kMeanVecs; ++j) totals[j] = totals[j] + load(token + j * kWidth);
        }
        for (int j = 0; j < kMeanVecs; ++j) store(target + i + j * kWidth, totals[j] / count);
    }
    for (; i < width; i += kWidth) {
        const int64_t n = smaller(kWidth, width - i);
        Vec total = zero();
        for (int64_t t = 0; t < tokens; ++t) total = total + load_n(hidden + t * stride + i, n);
        store_n(target + i, total / count, n);
    }
}

template <typename T>
void mean_rows_of(const MeanArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t row = 0; row < a.rows; ++row) {
        const int64_t token = a.cu_seqlens[row], tokens = a.cu_seqlens[row + 1] - token;
        mean_row(static_cast<const T*>(a.hidden) + token * a.width, a.width, tokens, a.width, a.out + row * a.width);
    }
}

void mean_rows(const MeanArgs& a) { a.bf16 ? mean_rows_of<Bf16>(a) : mean_rows_of<float>(a); }

// What the head sees of a row, as floats: its first token, or the mean of its tokens; in `target`, or where it lies.
template <typename T>
RX_INLINE const float* pool_row(const HeadArgs& h, int64_t row, const T* hidden, int64_t tokens, float* target) {
    if (h.means) return h.means + row * h.width;
    if constexpr (std::is_same_v<T, float>) {
        if (!h.mean && !packed_pooler(h)) return hidden;
    }
    mean_row(hidden, h.hidden_stride, h.mean ? tokens : 1, h.width, target);
    return target;
}

// pooled [n][pooled] = tanh(hidden weight^T + bias), hidden [n][width]; each thread its own outputs.
template <typename T>
void pool_packed(const Team& team, const HeadArgs& h, const float* hidden, int64_t n, float* pooled) {
    const int64_t first = team.begin(h.pooled / 32), count = team.end(h.pooled / 32) - first, steps = h.width / 32;
    if (count == 0) return;
    const char* weights = static_cast<const char*>(h.pooler) + first * steps * linear_step_bytes(false);
    const T* bias = static_cast<const T*>(h.pooler_bias);
    float* out = pooled + first * 32;
    linear({hidden, weights, steps, nullptr, nullptr, out, n, h.width, count * 32, h.width, h.pooled, false, false, 1});
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < count * 32; j += kWidth) {
            float* place = out + i * h.pooled + j;
            store(place, tanh(bias ? load(place) + load(bias + first * 32 + j) : load(place)));
        }
    }
}

// dots [classes] with the prototypes -> 1 - cosine, at least 0; 1 where a norm is 0.
RX_INLINE void cosine_distances(const float* vector, int64_t width, const float* norms, int64_t classes, float* dots) {
    const float size = std::sqrt(dot(vector, vector, width));
    for (int64_t i = 0; i < classes; ++i) {
        const float norm = size * norms[i], distance = 1.0f - dots[i] / norm;
        dots[i] = norm == 0.0f ? 1.0f : distance < 0.0f ? 0.0f : distance;
    }
}

// Rows [first, first + n) of the batch.
template <typename T>
void exit_block(const Team& team, const HeadArgs& h, const ExitArgs& a, int64_t first, int64_t n, const ExitScratch& s,
                OutOfMemory& out_of_memory) {
    const T* hidden = static_cast<const T*>(h.hidden);
    const bool measures = a.score == Score::distance_entropy, wide = a.classes > kNarrow;
    const Linear<T> pooler{static_cast<const T*>(h.pooler), static_cast<const T*>(h.pooler_bias), h.pooled, h.width};
    const Linear<T> projection{static_cast<const T*>(h.projection), static_cast<const T*>(h.projection_bias),
                               h.projected, h.width};
    const Linear<T> classifier{static_cast<const T*>(h.classifier), static_cast<const T*>(h.classifier_bias), a.classes,
                               h.pooled};
    const Linear<T> prototypes{static_cast<const T*>(h.prototypes), nullptr, a.classes, h.projected};
    const Linear<T> uncertainty{static_cast<const T*>(h.uncertainty), static_cast<const T*>(h.uncertainty_bias), 1,
                                h.pooled};
    float* panel = s.panels + team.id * s.panel_floats;
    float* logits = a.logits + first * a.classes;

    const Tiles hidden_tiles(s.hidden_tiles, n, h.width);
    for (int64_t tile = team.begin(hidden_tiles.count); tile < team.end(hidden_tiles.count); ++tile) {
        const int64_t begin = hidden_tiles.first_row(tile), end = hidden_tiles.first_row(tile + 1);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t token = a.cu_seqlens[first + i], tokens = a.cu_seqlens[first + i + 1] - token;
            s.rows[i] = pool_row(h, first + i, hidden + token * h.hidden_stride, tokens, s.pooled_hidden + i * h.width);
        }
        if ((h.pooler && !packed_pooler(h)) || measures) {
            transpose_rows([&](int64_t i) { return s.rows[begin + i]; }, end - begin, h.width, hidden_tiles.tile(tile),
                           kTileStride);
        }
    }
    if (measures) {
        for (int64_t i = team.begin(a.classes); i < team.end(a.classes); ++i) {
            const T* prototype = prototypes.weight + i * h.projected;
            s.prototype_norms[i] = std::sqrt(dot(prototype, prototype, h.projected));
        }
    }
#pragma omp barrier
    if (packed_pooler(h)) {
        // the rows lie one after the other; a thread without memory goes on with garbage, since the others wait for it
        out_of_memory.attempt([&] { pool_packed<T>(team, h, s.rows[0], n, s.pooled); });
    } else if (h.pooler) {
        gemm(team, hidden_tiles, pooler, true, s.pooled, h.pooled, panel);
    }
    if (measures) gemm(team, hidden_tiles, projection, false, s.projected, h.projected, panel);
#pragma omp barrier
    const auto pooled_row = [&](int64_t i) { return h.pooler ? s.pooled + i * h.pooled : s.rows[i]; };
    const auto projected_row = [&](int64_t i) { return s.projected + i * h.projected; };
    if (wide) {
        const Tiles pooled_tiles(s.pooled_tiles, n, h.pooled), projected_tiles(s.projected_tiles, n, h.projected);
        for (int64_t tile = team.begin(pooled_tiles.count); tile < team.end(pooled_tiles.count); ++tile) {
            const int64_t begin = pooled_tiles.first_row(tile), rows = pooled_tiles.first_row(tile + 1) - begin;
            transpose_rows([&](int64_t i) { return pooled_row(begin + i); }, rows, h.pooled, pooled_tiles.tile(tile),
                           kTileStride);
            if (measures) {
                transpose_rows([&](int64_t i) { return projected_row(begin + i); }, rows, h.projected,
                               projected_tiles.tile(tile), kTileStride);
            }
        }
#pragma omp barrier
        gemm(team, pooled_tiles, classifier, false, logits, a.classes, panel);
        if (measures) gemm(team, projected_tiles, prototypes, false, s.distances, a.classes, panel);
#pragma omp barrier
    }
    for (int64_t i = team.begin(n); i < team.end(n); ++i) {
        float* distances = s.distances + i * a.classes;
        if (!wide) dots(pooled_row(i), classifier, logits + i * a.classes);
        if (a.score == Score::uncertainty) {
            float u;
            dots(pooled_row(i), uncertainty, &u);
            u = sigmoid(u);
            decide_row(a, first + i, &u);
        } else if (measures) {
            if (!wide) dots(projected_row(i), prototypes, distances);
            cosine_distances(projected_row(i), h.projected, s.prototype_norms, a.classes, distances);
            decide_row(a, first + i, distances);
        } else {
            decide_row(a, first + i, nullptr);
        }
    }
#pragma omp barrier
}

template <typename T>
void exit_step_of(const HeadArgs& h, const ExitArgs& a) {
    const bool measures = a.score == Score::distance_entropy;
    const int64_t block = measures ? larger(1, smaller(kRowBlock, kDistances / a.classes)) : kRowBlock;
    const int64_t macs = a.live_rows * ((h.pooler ? h.width * h.pooled : 0) + h.pooled * a.classes +
                                        (measures ? h.width * h.projected + h.projected * a.classes : 0));
    const int threads = static_cast<int>(larger(1, smaller(a.threads, macs / kMacsPerThread)));
    const int64_t rows = smaller(block, a.live_rows);
    const int64_t floats = ExitScratch(nullptr, h, a, rows, threads).floats;
    const ExitScratch scratch(workspace(floats, Use::caller), h, a, rows, threads);
    OutOfMemory out_of_memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
        for (int64_t first = 0; first < a.live_rows; first += block) {
            exit_block<T>(team, h, a, first, smaller(block, a.live_rows - first), scratch, out_of_memory);
        }
    }
    out_of_memory.rethrow();
    for (int64_t row = a.live_rows; row < a.rows; ++row) decide_dead_row(a, row);
    plan_survivors(a);
}

void exit_step(const HeadArgs& h, const ExitArgs& a) { a.bf16 ? exit_step_of<Bf16>(h, a) : exit_step_of<float>(h, a); }

template <typename T>
RX_INLINE void copy_logits(const T* source, float* target, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) {
        const int64_t rest = smaller(kWidth, n - i);
        store_n(target + i, load_n(source + i, rest), rest);
    }
}

void exit_decide(const DecideArgs& d, const ExitArgs& a) {
    constexpr int64_t kLogitsPerThread = 4096;
    const int threads = static_cast<int>(larger(1, smaller(a.threads, a.live_rows * a.classes / kLogitsPerThread)));
    const int64_t signal_width = a.score == Score::distance_entropy ? a.classes : 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a.live_rows; ++row) {
        const int64_t place = row * a.classes;
        a.bf16 ? copy_logits(static_cast<const Bf16*>(d.logits) + place, a.logits + place, a.classes)
               : copy_logits(static_cast<const float*>(d.logits) + place, a.logits + place, a.classes);
        decide_row(a, row, d.signal ? d.signal + row * signal_width : nullptr);
    }
    for (int64_t row = a.live_rows; row < a.rows; ++row) decide_dead_row(a, row);
    plan_survivors(a);
}

}  // namespace RX_ISA
}  // namespace ragged_exit
