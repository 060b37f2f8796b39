// out = x weight^T + bias in bfloat16, then GELU or a residual.
//
// A block of 32 tokens x 32 outputs lives in four tiles of 16 x 16 floats; every step of 32 inputs loads two tiles of x and
// two of weights for four products. While a block is computed, the one before it is finished by vector instructions in
// between: bias, GELU and rounding cost little beside the products. Each output is one chain over the inputs from the
// first to the last, whatever the number of tokens or threads, so that a token's bits depend on that token alone.

namespace ragged_exit {
namespace tiles {

constexpr int64_t kStep = kBlock * kBlock;  // weights of a step
constexpr int64_t kWholeBytes = 5 << 18;    // up to here the weights are one group: they fit a second-level cache of 2 MiB
constexpr int64_t kGroupBytes = 1 << 20;    // of larger weights; 3/4 MiB is as fast, 1/2 and 5/4 are slower
constexpr int64_t kItemsPerThread = 4;      // at least, so that an uneven share costs little

// x times the normal distribution's share below x, within 5e-5: half of bfloat16's rounding at .02 already. The share is
// 1/2 + x p(x^2), minimax on |x| <= 4.5 with the value 1 at 4.5; NaN stays NaN.
RX_INLINE Vec gelu(Vec x) {
    const Vec limit = set1(4.5f), above = max(set1(-4.5f), x);
    const Vec clamped = min(limit, above), square = clamped * clamped;
    Vec p = fma(set1(-8.368017087e-13f), square, set1(1.144406837e-10f));
    p = fma(p, square, set1(-6.896994952e-09f));
    p = fma(p, square, set1(2.433508731e-07f));
    p = fma(p, square, set1(-5.644015807e-06f));
    p = fma(p, square, set1(9.180126363e-05f));
    p = fma(p, square, set1(-1.092003137e-03f));
    p = fma(p, square, set1(9.746115772e-03f));
    p = fma(p, square, set1(-6.621696724e-02f));
    p = fma(p, square, set1(3.988274015e-01f));
    return above * fma(clamped, p, set1(0.5f));
}

// The block whose products are done: sums [4 tiles][16][16] wait for their finish.
struct Finish {
    const float* sums;
    const float* bias;  // [32]
    const Bf16* residual;
    Bf16* out;
    int64_t stride;  // of residual and out
    int64_t rows = 0, done = 0;

    template <bool Gelu, bool Residual>
    RX_INLINE void row() {
        const float* row = sums + done / kTile * (2 * kTile * kTile) + done % kTile * kTile;
        Vec left = load(row) + load(bias);
        Vec right = load(row + kTile * kTile) + load(bias + kTile);
        if (Residual) {
            left = left + load(residual + done * stride);
            right = right + load(residual + done * stride + kTile);
        }
        if (Gelu) left = gelu(left), right = gelu(right);
        const __m512bh both = _mm512_cvtne2ps_pbh(right, left);
        std::memcpy(out + done * stride, &both, sizeof(both));
        ++done;
    }
};

#define RX_STORE_AND_ZERO(tile)                            \
    _tile_stored(tile, sums + tile * (kTile * kTile), 64); \
    RX_ZERO(tile)

// Products of one block, and the finish of the one before, whose sums are still in the tiles on entry.
template <bool Gelu, bool Residual>
RX_INLINE void block(const Bf16* x, int64_t x_stride, const Bf16* weights, int64_t steps, float* sums, Finish& before,
                     const char*& ahead, int64_t lines_ahead) {
    const int64_t rows_per_step = steps > 1 ? (before.rows + steps - 2) / (steps - 1) : before.rows;
    RX_PRODUCTS(RX_STORE_AND_ZERO, x, x_stride, weights, weights + kStep / 2)
    for (int64_t step = 1; step < steps; ++step) {
        x += kBlock, weights += kStep;
        RX_PRODUCTS(RX_NOTHING, x, x_stride, weights, weights + kStep / 2)
        for (int64_t line = 0; line < lines_ahead; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        const int64_t upto = before.done + rows_per_step < before.rows ? before.done + rows_per_step : before.rows;
        while (before.done < upto) before.row<Gelu, Residual>();
    }
    while (before.done < before.rows) before.row<Gelu, Residual>();
}

// What the threads share: `blocks` of 32 tokens times `groups` of panels, of which a thread takes a run.
struct Plan {
    int64_t blocks, panels, panels_per_group, groups, steps;

    explicit Plan(const LinearArgs& a) {
        blocks = (a.tokens + kBlock - 1) / kBlock, panels = a.outputs / kBlock, steps = a.inputs / kBlock;
        const int64_t weight_bytes = a.outputs * a.inputs * 2, wanted = kItemsPerThread * a.threads;
        const int64_t to_fit = weight_bytes <= kWholeBytes ? 1 : (weight_bytes + kGroupBytes - 1) / kGroupBytes;
        const int64_t to_share = (wanted + blocks - 1) / blocks;
        const int64_t least = to_fit > to_share ? to_fit : to_share;
        panels_per_group = (panels + least - 1) / least;
        groups = (panels + panels_per_group - 1) / panels_per_group;
    }
};

template <bool Gelu, bool Residual>
void run(const LinearArgs& a, const Plan& plan, const Bf16* last_block, int64_t begin, int64_t end) {
    alignas(64) float sums[kStep];
    _tile_loadconfig(&kTileConfig);
    RX_ZERO(0) RX_ZERO(1) RX_ZERO(2) RX_ZERO(3)
    const Bf16* weights = static_cast<const Bf16*>(a.weights);
    const Bf16* residual = static_cast<const Bf16*>(a.residual);
    Finish before{};
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item / plan.blocks * plan.panels_per_group, token = item % plan.blocks * kBlock;
        const int64_t last = first + plan.panels_per_group < plan.panels ? first + plan.panels_per_group : plan.panels;
        const bool whole = token + kBlock <= a.tokens;
        const Bf16* x = whole ? static_cast<const Bf16*>(a.x) + token * a.x_stride : last_block;
        const int64_t x_stride = whole ? a.x_stride : a.inputs;
        // the next block of x, its cache lines spread over this one's steps
        const int64_t block_lines = kBlock * a.x_stride * 2 / 64, steps = (last - first) * plan.steps;
        const int64_t lines_ahead = token + 2 * kBlock <= a.tokens ? (block_lines + steps - 1) / steps : 0;
        const char* ahead = reinterpret_cast<const char*>(x + kBlock * x_stride);
        for (int64_t panel = first; panel < last; ++panel) {
            block<Gelu, Residual>(x, x_stride, weights + panel * plan.steps * kStep, plan.steps, sums, before, ahead,
                                  lines_ahead);
            const int64_t at = token * a.outputs + panel * kBlock;
            before = {sums, a.bias + panel * kBlock, Residual ? residual + at : nullptr,
                      static_cast<Bf16*>(a.out) + at, a.outputs, whole ? kBlock : a.tokens - token, 0};
        }
    }
    RX_STORE_AND_ZERO(0) RX_STORE_AND_ZERO(1) RX_STORE_AND_ZERO(2) RX_STORE_AND_ZERO(3)
    while (before.done < before.rows) before.row<Gelu, Residual>();
    _tile_release();
}

void linear_of(const LinearArgs& a) {
    const Plan plan(a);
    const int64_t rest = a.tokens % kBlock;
    Bf16* last_block = nullptr;
    if (rest) {  // tiles are loaded whole: the last tokens, and zeros after them
        last_block = reinterpret_cast<Bf16*>(workspace(kBlock * a.inputs / 2));
        const Bf16* source = static_cast<const Bf16*>(a.x) + (a.tokens - rest) * a.x_stride;
        for (int64_t i = 0; i < rest; ++i) std::memcpy(last_block + i * a.inputs, source + i * a.x_stride, a.inputs * 2);
        std::memset(last_block + rest * a.inputs, 0, (kBlock - rest) * a.inputs * 2);
    }
    const auto body = a.gelu ? run<true, false> : a.residual ? run<false, true> : run<false, false>;
    const int64_t items = plan.blocks * plan.groups;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t begin = items * thread / threads, end = items * (thread + 1) / threads;
        if (begin < end) body(a, plan, last_block, begin, end);
    }
}

}  // namespace tiles
}  // namespace ragged_exit
