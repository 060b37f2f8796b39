// Linears in bfloat16: a step loads two tiles of x, where it lies, and two of weights for four products.

namespace ragged_exit {
namespace tiles {

// Products of one block, and the finish of the one before, whose sums are still in the tiles on entry.
template <bool Gelu>
RX_INLINE void bf16_block(const Bf16* x, int64_t x_stride, const Bf16* weights, int64_t steps, float* sums,
                          Finish<Bf16>& before, const char*& ahead, int64_t lines_ahead) {
    const int64_t rows_per_step = steps > 1 ? (before.rows + steps - 2) / (steps - 1) : before.rows;
    RX_PRODUCTS(RX_STORE_AND_ZERO, x, x_stride, weights, weights + kStep / 2)
    for (int64_t step = 1; step < steps; ++step) {
        x += kBlock, weights += kStep;
        RX_PRODUCTS(RX_NOTHING, x, x_stride, weights, weights + kStep / 2)
        for (int64_t line = 0; line < lines_ahead; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        const int64_t upto = smaller(before.done + rows_per_step, before.rows);
        while (before.done < upto) before.row(Gelu);
    }
    while (before.done < before.rows) before.row(Gelu);
}

template <bool Gelu>
void run_bf16(const LinearArgs& a, const Plan& plan, const Bf16* last_block, int64_t begin, int64_t end) {
    alignas(64) float sums[kStep];
    _tile_loadconfig(&kTileConfig);
    RX_ZERO(0) RX_ZERO(1) RX_ZERO(2) RX_ZERO(3)
    const Bf16* residual = static_cast<const Bf16*>(a.residual);
    Finish<Bf16> before{};
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = plan.first_panel(item), last = plan.last_panel(item), token = plan.token(item);
        const bool whole = token + kBlock <= a.tokens;
        const Bf16* x = whole ? static_cast<const Bf16*>(a.x) + token * a.x_stride : last_block;
        const int64_t x_stride = whole ? a.x_stride : a.inputs;
        // the next block of x, its cache lines spread over this one's steps
        const int64_t block_lines = kBlock * a.x_stride * 2 / 64, steps = (last - first) * plan.steps;
        const int64_t lines_ahead = token + 2 * kBlock <= a.tokens ? (block_lines + steps - 1) / steps : 0;
        const char* ahead = reinterpret_cast<const char*>(x + kBlock * x_stride);
        for (int64_t panel = first; panel < last; ++panel) {
            const Bf16* weights = static_cast<const Bf16*>(a.weights) + panel * a.panel_steps * kStep;
            bf16_block<Gelu>(x, x_stride, weights, plan.steps, sums, before, ahead, lines_ahead);
            const int64_t at = token * a.out_stride + panel * kBlock;
            before = {sums, a.bias ? a.bias + panel * kBlock : kNoBias, residual ? residual + at : nullptr,
                      static_cast<Bf16*>(a.out) + at, a.out_stride, whole ? kBlock : a.tokens - token, 0};
        }
    }
    RX_STORE_AND_ZERO(0) RX_STORE_AND_ZERO(1) RX_STORE_AND_ZERO(2) RX_STORE_AND_ZERO(3)
    while (before.done < before.rows) before.row(Gelu);
    _tile_release();
}

void bf16_linear_of(const LinearArgs& a) {
    const Plan plan(a);
    const int64_t rest = a.tokens % kBlock;
    Bf16* last_block = nullptr;
    if (rest) {  // tiles are loaded whole: the last tokens, and zeros after them
        last_block = reinterpret_cast<Bf16*>(workspace(kBlock * a.inputs / 2));
        const Bf16* source = static_cast<const Bf16*>(a.x) + (a.tokens - rest) * a.x_stride;
        for (int64_t i = 0; i < rest; ++i) std::memcpy(last_block + i * a.inputs, source + i * a.x_stride, a.inputs * 2);
        std::memset(last_block + rest * a.inputs, 0, (kBlock - rest) * a.inputs * 2);
    }
    const auto run = a.gelu ? run_bf16<true> : run_bf16<false>;
    share(plan, a.threads, [&](int64_t, int64_t begin, int64_t end) { run(a, plan, last_block, begin, end); });
}

}  // namespace tiles
}  // namespace ragged_exit
