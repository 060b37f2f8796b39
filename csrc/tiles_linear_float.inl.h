// Linears in float. The tiles multiply bfloat16, so a number comes in three parts of eight bits, high, middle and low, that
// sum to it exactly. Of the nine products of parts the six that matter are summed in float (Henry, Tang and Heinecke,
// ARITH 2019); the others are below a float's rounding, and tiles round their sums less often than a chain of
// multiply-adds does. An input that is infinite or NaN makes its token's outputs NaN.
//
// Weights are split once; x is split one block ahead, beside the products. Two blocks of x and a group of weights are to
// stay in the second-level cache: hence chunks of inputs, between which sums wait in `out`.

namespace ragged_exit {
namespace tiles {

constexpr int64_t kFloatStep = kParts * kStep;

// RX_PRODUCTS for operands in parts [3][32][32]: the six products, the small ones first, BESIDE(0..5) after each. From one
// to the next one operand's part changes: two loads for four products.
#define RX_LEFT_PART(part, left)                             \
    _tile_loadd(4, (left) + (part) * kStep, 64);             \
    _tile_dpbf16ps(0, 4, 6);                                 \
    _tile_dpbf16ps(1, 4, 7);                                 \
    _tile_loadd(5, (left) + (part) * kStep + kStep / 2, 64); \
    _tile_dpbf16ps(2, 5, 6);                                 \
    _tile_dpbf16ps(3, 5, 7);
#define RX_RIGHT_PART(part, right)                            \
    _tile_loadd(6, (right) + (part) * kStep, 64);             \
    _tile_dpbf16ps(0, 4, 6);                                  \
    _tile_loadd(7, (right) + (part) * kStep + kStep / 2, 64); \
    _tile_dpbf16ps(1, 4, 7);                                  \
    _tile_dpbf16ps(2, 5, 6);                                  \
    _tile_dpbf16ps(3, 5, 7);
#define RX_PART_PRODUCTS(FRESH, BESIDE, left, right)                           \
    RX_PRODUCTS(FRESH, (left) + 2 * kStep, kBlock, right, (right) + kStep / 2) \
    BESIDE(0)                                                                  \
    RX_LEFT_PART(1, left)                                                      \
    BESIDE(1)                                                                  \
    RX_RIGHT_PART(1, right)                                                    \
    BESIDE(2)                                                                  \
    RX_LEFT_PART(0, left)                                                      \
    BESIDE(3)                                                                  \
    RX_RIGHT_PART(2, right)                                                    \
    BESIDE(4)                                                                  \
    RX_RIGHT_PART(0, right)                                                    \
    BESIDE(5)

// A block of x: rows of 32 inputs a step -> parts [steps][3][32][32]; rows past the last token are zero.
struct Splitter {
    const float* x;
    int64_t x_stride, rows, steps;
    Bf16* parts;
    int64_t row = 0, step = 0;

    RX_INLINE bool done() const { return row == kBlock; }
    RX_INLINE void next() {
        alignas(64) static constexpr uint16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                                  23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                                  45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        const __m512i upper_halves = _mm512_load_si512(kUpperHalves), upper = _mm512_set1_epi32(-65536);
        const float* source = x + row * x_stride + step * kBlock;
        Bf16* target = parts + step * kFloatStep + row * kBlock;
        Vec left = zero(), right = zero();
        if (row < rows) left = load(source), right = load(source + kTile);
        for (int64_t part = 0; part < kParts; ++part, target += kStep) {  // the upper half is a bfloat16, cut off
            const __m512i l = _mm512_castps_si512(left), r = _mm512_castps_si512(right);
            _mm512_store_si512(target, _mm512_permutex2var_epi16(l, upper_halves, r));
            left = left - _mm512_castsi512_ps(_mm512_and_si512(l, upper));
            right = right - _mm512_castsi512_ps(_mm512_and_si512(r, upper));
        }
        if (++step == steps) step = 0, ++row;
    }
};

// A thread's place in its items: all of those that share a group for one chunk of inputs, then for the next chunk.
struct Place {
    int64_t blocks, chunks, end;
    int64_t first, last, item, chunk = 0;  // items [first, last) share a group

    Place(const Plan& plan, int64_t begin, int64_t stop) : blocks(plan.blocks), chunks(plan.chunks), end(stop) {
        enter(begin);
    }
    void enter(int64_t begin) { item = first = begin, last = smaller(end, (begin / blocks + 1) * blocks); }
    bool exists() const { return item < end; }
    void advance() {
        if (++item < last) return;
        if (++chunk < chunks) {
            item = first;
        } else {
            chunk = 0;
            enter(last);
        }
    }
};

// Products of one block and one chunk; beside them, the finish of the one before, whose sums are still in the tiles on
// entry, and a part of the split, `units` after each of a step's six products of parts.
RX_INLINE void float_block(const Bf16* x, const Bf16* weights, int64_t steps, float* sums, Finish<float>& before,
                           bool gelu, Splitter& ahead, int64_t units) {
    const int64_t slots = 3 * (steps - 1), rows = steps > 1 ? (before.rows + slots - 1) / slots : 0;
#define RX_SPLIT(product) \
    for (int64_t unit = 0; unit < units && !ahead.done(); ++unit) ahead.next();
#define RX_SPLIT_AND_FINISH(product)                                                            \
    RX_SPLIT(product)                                                                           \
    if (product % 2 == 0) {                                                                     \
        for (int64_t row = 0; row < rows && before.done < before.rows; ++row) before.row(gelu); \
    }
    RX_PART_PRODUCTS(RX_STORE_AND_ZERO, RX_SPLIT, x, weights)
    for (int64_t step = 1; step < steps; ++step) {
        weights += kFloatStep;
        RX_PART_PRODUCTS(RX_NOTHING, RX_SPLIT_AND_FINISH, x + step * kFloatStep, weights)
    }
    while (before.done < before.rows) before.row(gelu);
}

void run_float(const LinearArgs& a, const Plan& plan, Bf16* parts, int64_t begin, int64_t end) {
    alignas(64) float sums[kStep];
    _tile_loadconfig(&kTileConfig);
    RX_ZERO(0) RX_ZERO(1) RX_ZERO(2) RX_ZERO(3)
    const auto split = [&](const Place& place, Bf16* target) {
        const int64_t token = plan.token(place.item), step = place.chunk * plan.chunk_steps;
        const float* x = static_cast<const float*>(a.x) + token * a.x_stride + step * kBlock;
        const int64_t rows = smaller(kBlock, a.tokens - token), steps = smaller(plan.chunk_steps, plan.steps - step);
        return Splitter{x, a.x_stride, rows, steps, target};
    };
    Bf16* spare = parts + plan.chunk_steps * kFloatStep;
    Place place(plan, begin, end);
    Splitter x = split(place, parts);
    while (!x.done()) x.next();
    Finish<float> before{};
    bool gelu = false;  // of the block before
    while (place.exists()) {
        const Place here = place;
        place.advance();
        Splitter ahead{};
        ahead.row = kBlock;
        if (place.exists()) ahead = split(place, spare);
        const int64_t token = plan.token(here.item), rows = smaller(kBlock, a.tokens - token);
        const int64_t first = plan.first_panel(here.item), last = plan.last_panel(here.item);
        const int64_t step = here.chunk * plan.chunk_steps, slots = 6 * (last - first) * x.steps;
        written();
        for (int64_t panel = first; panel < last; ++panel) {
            const Bf16* weights = static_cast<const Bf16*>(a.weights) + (panel * a.panel_steps + step) * kFloatStep;
            float_block(x.parts, weights, x.steps, sums, before, gelu, ahead, (kBlock * ahead.steps + slots - 1) / slots);
            const int64_t at = token * a.out_stride + panel * kBlock;
            float* out = static_cast<float*>(a.out) + at;
            const float* residual = a.residual ? static_cast<const float*>(a.residual) + at : nullptr;
            before = {sums, a.bias ? a.bias + panel * kBlock : kNoBias, residual, out, a.out_stride, rows, 0};
            if (here.chunk > 0) before.bias = kNoBias, before.residual = out;
            gelu = a.gelu && here.chunk + 1 == plan.chunks;
        }
        while (!ahead.done()) ahead.next();
        spare = x.parts;
        x = ahead;
    }
    RX_STORE_AND_ZERO(0) RX_STORE_AND_ZERO(1) RX_STORE_AND_ZERO(2) RX_STORE_AND_ZERO(3)
    while (before.done < before.rows) before.row(gelu);
    _tile_release();
}

void float_linear_of(const LinearArgs& a) {
    const Plan plan(a);
    const int64_t numbers = 2 * plan.chunk_steps * kFloatStep;  // this block of x and the next
    Bf16* memory = reinterpret_cast<Bf16*>(workspace(numbers / 2 * a.threads));
    share(plan, a.threads,
          [&](int64_t thread, int64_t begin, int64_t end) { run_float(a, plan, memory + numbers * thread, begin, end); });
}

}  // namespace tiles
}  // namespace ragged_exit
