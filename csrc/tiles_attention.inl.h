// Packed bidirectional attention in bfloat16, for head sizes that are multiples of 32.
//
// One sequence at a time, with as many of its heads as fit the caches: a token's heads lie side by side, and read together
// they stream. Keys and values are laid out as right-hand tiles once; then 32 queries of a head at a time go through
// scores, softmax over the whole row, and output. The weights are rounded to bfloat16 for the second product, and their
// sums are those of the rounded ones: one more product, with a tile of ones, so that a row's sum needs no horizontal
// addition. Queries and keys past the end count as zeros; what a query gets depends on its sequence alone.

namespace ragged_exit {
namespace tiles {

constexpr int64_t kLaidOutBytes = 256 << 10;  // of keys and values: a part of the second-level cache

struct Ones {
    Bf16 row[2 * kTile];
    constexpr Ones() : row() {
        for (Bf16& one : row) one.bits = 0x3f80;
    }
};
alignas(64) constexpr Ones kOnes;  // a row of the tile of ones, loaded with a stride of 0

struct AttentionScratch {
    int64_t keys;   // the longest sequence, in whole blocks
    int64_t width;  // of the heads that are laid out together
    float *scores;  // [keys / 16][32 queries][16]
    float *out;     // [kBlock][dim]
    float *sums;    // [kBlock][kTile], a row's sum in each of its places
    Bf16 *weights;  // [kBlock][keys]
    Bf16 *q;        // [kBlock][width]
    Bf16 *k;        // right-hand tiles [keys / 16][width / 32][16 pairs of dims][16 keys][2]
    Bf16 *v;        // right-hand tiles [keys / 32][width / 16][16 pairs of keys][16 dims][2]

    static int64_t floats(int64_t keys, int64_t width, int64_t dim) {
        return kBlock * (keys + dim + kTile) + kBlock * (keys + width) / 2 + keys * width;
    }
    AttentionScratch(float* memory, int64_t longest, int64_t heads_width, int64_t dim) : keys(longest), width(heads_width) {
        scores = memory;
        out = scores + kBlock * keys;
        sums = out + kBlock * dim;
        weights = reinterpret_cast<Bf16*>(sums + kBlock * kTile);
        q = weights + kBlock * keys;
        k = q + kBlock * width;
        v = k + keys * width;
    }
};

// Rows [n] of 32 numbers a step -> tiles of pairs of numbers; rows past n, up to a whole block, are zero.
RX_INLINE void pack_keys(const Bf16* source, int64_t stride, int64_t n, int64_t width, Bf16* target) {
    for (int64_t key = 0; key < n; key += kBlock) {
        for (int64_t first = key; first < key + kBlock; first += kTile) {
            for (int64_t d = 0; d < width; d += kBlock, target += kBlock * kTile) {
                Vec pairs[kTile];
                for (int i = 0; i < kTile; ++i) {
                    const Bf16* row = source + (first + i) * stride + d;
                    pairs[i] = first + i < n ? load(reinterpret_cast<const float*>(row)) : zero();
                }
                transpose(pairs);
                for (int i = 0; i < kTile; ++i) store(reinterpret_cast<float*>(target + i * kBlock), pairs[i]);
            }
        }
    }
}

// Rows [n] of numbers -> tiles of pairs of rows; rows past n, up to a whole block, are zero.
RX_INLINE void pack_values(const Bf16* source, int64_t stride, int64_t n, int64_t width, Bf16* target) {
    alignas(64) static constexpr uint16_t kFirstHalf[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                            37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                            11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kFirstHalf), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t key = 0; key < round_up(n, kBlock); key += 2) {
        Bf16* pair = target + key / kBlock * (kBlock * width) + key % kBlock / 2 * kBlock;
        for (int64_t d = 0; d < width; d += kBlock, pair += 2 * kBlock * kTile) {
            const Bf16* row = source + key * stride + d;
            const __m512i first = key < n ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
            const __m512i second = key + 1 < n ? _mm512_loadu_si512(row + stride) : _mm512_setzero_si512();
            _mm512_store_si512(pair, _mm512_permutex2var_epi16(first, low, second));
            _mm512_store_si512(pair + kBlock * kTile, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

// q [32][dim] and a head's laid out keys -> scores [keys / 16][32][16], unscaled.
RX_INLINE void score(const Bf16* q, int64_t q_stride, const Bf16* k, int64_t keys, int64_t dim, const AttentionScratch& s) {
    written();
    const int64_t second = kTile * s.width;
    float* done = s.scores;  // where the block in the tiles belongs
#define RX_STORE_SCORES(tile) _tile_stored(tile, done + (tile % 2 * kBlock + tile / 2 * kTile) * kTile, 64);
#define RX_STORE_AND_ZERO_SCORES(tile) \
    RX_STORE_SCORES(tile)              \
    RX_ZERO(tile)
    RX_ZERO(0) RX_ZERO(1) RX_ZERO(2) RX_ZERO(3)
    for (int64_t d = 0; d < dim; d += kBlock) {
        RX_PRODUCTS(RX_NOTHING, q + d, q_stride, k + d * kTile, k + d * kTile + second)
    }
    for (int64_t key = kBlock; key < keys; key += kBlock, done += kBlock * kBlock) {
        k += kBlock * s.width;
        RX_PRODUCTS(RX_STORE_AND_ZERO_SCORES, q, q_stride, k, k + second)
        for (int64_t d = kBlock; d < dim; d += kBlock) {
            RX_PRODUCTS(RX_NOTHING, q + d, q_stride, k + d * kTile, k + d * kTile + second)
        }
    }
    RX_STORE_SCORES(0) RX_STORE_SCORES(1) RX_STORE_SCORES(2) RX_STORE_SCORES(3)
}

// 2^x within 1e-4, a tenth of bfloat16's rounding; 0 for -inf.
RX_INLINE Vec rough_exp2(Vec x) {
    const Vec f = fraction(x);
    Vec p = fma(set1(7.80256702e-2f), f, set1(2.26065593e-1f));
    p = fma(p, f, set1(6.95833979e-1f));
    return scale_by_floor(fma(p, f, set1(9.99925241e-1f)), x);
}

// One query's scores [n / 16][32][16] -> 2^(score * factor - maximum), rounded; zero past n up to a whole block.
RX_INLINE void weigh(const float* scores, int64_t n, float factor, Bf16* weights) {
    const Vec scale = set1(factor), nothing = set1(-__builtin_inff());
    const auto scaled = [&](int64_t j) {
        const int64_t left = smaller(larger(n - j, 0), kWidth);
        const Vec x = load(scores + j * kBlock) * scale;
        return left == kWidth ? x : first_n(left, x, nothing);
    };
    // The lowest finite number instead of -inf: subtracting it from a score of -inf is no NaN.
    Vec top = set1(-3.40282347e38f);
    for (int64_t j = 0; j < n; j += kWidth) top = max(scaled(j), top);
    const Vec maximum = set1(largest(top));
    for (int64_t j = 0; j < n; j += kBlock) {
        store_row(weights + j, rough_exp2(scaled(j) - maximum), rough_exp2(scaled(j + kTile) - maximum));
    }
}

// weights [32][keys] and a head's laid out values -> out [32][dim] and the weights' sums.
RX_INLINE void mix(const Bf16* v, int64_t keys, int64_t dim, const AttentionScratch& s) {
    written();
    const int64_t row_bytes = s.keys * 2;
    for (int64_t d = 0; d < dim; d += kBlock) {
        RX_ZERO(0) RX_ZERO(1) RX_ZERO(2) RX_ZERO(3) RX_ZERO(4) RX_ZERO(5)
        for (int64_t key = 0; key < keys; key += kBlock) {
            const Bf16 *left = s.weights + key, *right = v + key * s.width + d * kBlock;
            _tile_loadd(6, left, row_bytes);
            _tile_loadd(7, right, 64);
            _tile_dpbf16ps(0, 6, 7);
            _tile_loadd(7, right + kBlock * kTile, 64);
            _tile_dpbf16ps(1, 6, 7);
            if (d == 0) {
                _tile_loadd(7, kOnes.row, 0);
                _tile_dpbf16ps(4, 6, 7);
            }
            _tile_loadd(6, left + kTile * s.keys, row_bytes);
            if (d == 0) _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(7, right, 64);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(7, right + kBlock * kTile, 64);
            _tile_dpbf16ps(3, 6, 7);
        }
        float* out = s.out + d;
        _tile_stored(0, out, dim * 4);
        _tile_stored(1, out + kTile, dim * 4);
        _tile_stored(2, out + kTile * dim, dim * 4);
        _tile_stored(3, out + kTile * dim + kTile, dim * 4);
        if (d == 0) {
            _tile_stored(4, s.sums, 64);
            _tile_stored(5, s.sums + kTile * kTile, 64);
        }
    }
}

// The output of `queries` rows from `query` on, for one head of the heads that are laid out.
RX_INLINE void finish(const AttentionScratch& s, int64_t queries, int64_t dim, Bf16* out, int64_t stride) {
    for (int64_t i = 0; i < queries; ++i) {
        const Vec inverse = set1(1.0f / s.sums[i * kTile]);
        for (int64_t d = 0; d < dim; d += kBlock) {
            const float* row = s.out + i * dim + d;
            store_row(out + i * stride + d, load(row) * inverse, load(row + kTile) * inverse);
        }
    }
}

// `heads` heads from `head` on of one sequence.
void attend(const AttentionArgs& a, int64_t row, int64_t head, int64_t heads, AttentionScratch s) {
    const int64_t start = a.cu_seqlens[row], length = a.cu_seqlens[row + 1] - start, keys = round_up(length, kBlock);
    const Bf16* k = static_cast<const Bf16*>(a.k) + start * a.k_token + head * a.k_head;
    const Bf16* v = static_cast<const Bf16*>(a.v) + start * a.v_token + head * a.v_head;
    const int64_t width = s.width = heads * a.dim;  // the last group may have fewer heads
    pack_keys(k, a.k_token, length, width, s.k);
    pack_values(v, a.v_token, length, width, s.v);
    for (int64_t query = 0; query < length; query += kBlock) {
        const int64_t queries = smaller(kBlock, length - query);
        const Bf16* q = static_cast<const Bf16*>(a.q) + (start + query) * a.q_token + head * a.q_head;
        Bf16* out = static_cast<Bf16*>(a.out) + ((start + query) * a.heads + head) * a.dim;
        const bool whole = queries == kBlock;
        if (!whole) {  // tiles are loaded whole
            for (int64_t i = 0; i < queries; ++i) std::memcpy(s.q + i * width, q + i * a.q_token, width * 2);
            std::memset(s.q + queries * width, 0, (kBlock - queries) * width * 2);
        }
        for (int64_t d = 0; d < width; d += a.dim) {
            score(whole ? q + d : s.q + d, whole ? a.q_token : width, s.k + d * kTile, keys, a.dim, s);
            for (int64_t i = 0; i < queries; ++i) {
                weigh(s.scores + i * kTile, length, a.scale * 1.44269504f, s.weights + i * s.keys);
            }
            mix(s.v + d * kBlock, keys, a.dim, s);
            finish(s, queries, a.dim, out + d, a.heads * a.dim);
        }
    }
}

void attention_of(const AttentionArgs& a) {
    int64_t longest = 0;
    for (int64_t row = 0; row < a.rows; ++row) longest = larger(longest, a.cu_seqlens[row + 1] - a.cu_seqlens[row]);
    longest = round_up(larger(longest, 1), kBlock);
    // heads side by side in q, k and v alike can be laid out together
    const bool side_by_side = a.q_head == a.dim && a.k_head == a.dim && a.v_head == a.dim;
    const int64_t fitting = larger(1, kLaidOutBytes / (2 * longest * a.dim * 2));
    const int64_t together = side_by_side ? smaller(a.heads, fitting) : 1;
    const int64_t groups = (a.heads + together - 1) / together, width = together * a.dim;
    const int64_t floats = round_up(AttentionScratch::floats(longest, width, a.dim), 16);
    float* memory = workspace(floats * a.threads);
    const int64_t live = a.cu_seqlens[a.rows], row_bytes = a.heads * a.dim * 2;
    std::memset(static_cast<char*>(a.out) + live * row_bytes, 0, (a.tokens - live) * row_bytes);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        const AttentionScratch s(memory + floats * omp_get_thread_num(), longest, width, a.dim);
        std::memset(s.weights, 0, kBlock * longest * 2);  // rows of no query: never read, but a stray NaN is slow
        _tile_loadconfig(&kTileConfig);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < a.rows * groups; ++item) {
            const int64_t head = item % groups * together;
            attend(a, item / groups, head, smaller(together, a.heads - head), s);
        }
        _tile_release();
    }
}

}  // namespace tiles
}  // namespace ragged_exit
