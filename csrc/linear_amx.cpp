// out = x weight^T + bias in bfloat16 on the processor's matrix tiles (AMX), then GELU or a residual.
//
// A block of 32 tokens x 32 outputs lives in four tiles of 16 x 16 floats; every step of 32 inputs loads two tiles of x and
// two of weights for four products. While a block is computed, the one before it is finished by vector instructions in
// between: bias, GELU and rounding cost little beside the products. Each output is one chain over the inputs from the
// first to the last, whatever the number of tokens or threads, so that a token's bits depend on that token alone.
#include "isa_prelude.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define RX_HAS_AMX 1
#endif

#ifdef RX_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in GCC 12's own header (its bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace ragged_exit {
namespace {

constexpr int kTile = 16;                 // rows of a tile, and floats in one of its rows
constexpr int kBlock = 2 * kTile;         // tokens and outputs of a block, inputs of a step
constexpr int64_t kStep = kBlock * kBlock;  // weights of a step
constexpr int64_t kWeightBytes = 1 << 20;   // that a thread keeps in its second-level cache
constexpr int64_t kItemsPerThread = 4;      // at least, so that an uneven share costs little

// The layout of ldtilecfg's operand, palette 1: all eight tiles have 16 rows of 64 bytes. Constant memory: the compiler
// does not know that the instruction reads more than its first bytes, and would drop stores to the rest.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
const TileConfig kTileConfig;

bool processor_has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d & (1u << 24)) && (d & (1u << 22));  // AMX-TILE and AMX-BF16
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    const bool rounds_to_bf16 = a & (1u << 5);  // AVX512-BF16
    return tiles && rounds_to_bf16;
}

// Linux hands out the tiles' state on request only, once for all threads of the process.
bool kernel_allows_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool tiles_available() {
    static const bool available =
        std::strcmp(kernels().isa, "avx512") == 0 && processor_has_tiles() && kernel_allows_tiles();
    return available;
}

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#endif

}  // namespace ragged_exit

#include "simd_avx512.h"

namespace ragged_exit {
namespace {

using avx512::Vec;

// x times the normal distribution's share below x, within 5e-5: half of bfloat16's rounding at .02 already. The share is
// 1/2 + x p(x^2), minimax on |x| <= 4.5 with the value 1 at 4.5; NaN stays NaN.
RX_INLINE Vec gelu(Vec x) {
    const Vec limit = avx512::set1(4.5f), above = avx512::max(avx512::set1(-4.5f), x);
    const Vec clamped = avx512::min(limit, above), square = clamped * clamped;
    Vec p = avx512::fma(avx512::set1(-8.368017087e-13f), square, avx512::set1(1.144406837e-10f));
    p = avx512::fma(p, square, avx512::set1(-6.896994952e-09f));
    p = avx512::fma(p, square, avx512::set1(2.433508731e-07f));
    p = avx512::fma(p, square, avx512::set1(-5.644015807e-06f));
    p = avx512::fma(p, square, avx512::set1(9.180126363e-05f));
    p = avx512::fma(p, square, avx512::set1(-1.092003137e-03f));
    p = avx512::fma(p, square, avx512::set1(9.746115772e-03f));
    p = avx512::fma(p, square, avx512::set1(-6.621696724e-02f));
    p = avx512::fma(p, square, avx512::set1(3.988274015e-01f));
    return above * avx512::fma(clamped, p, avx512::set1(0.5f));
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
        Vec left = avx512::load(row) + avx512::load(bias);
        Vec right = avx512::load(row + kTile * kTile) + avx512::load(bias + kTile);
        if (Residual) {
            left = left + avx512::load(residual + done * stride);
            right = right + avx512::load(residual + done * stride + kTile);
        }
        if (Gelu) left = gelu(left), right = gelu(right);
        const __m512bh both = _mm512_cvtne2ps_pbh(right, left);
        std::memcpy(out + done * stride, &both, sizeof(both));
        ++done;
    }
};

#define RX_PRODUCTS(FRESH)                                                              \
    _tile_loadd(4, x, x_bytes);                                                         \
    _tile_loadd(6, weights, 64);                                                        \
    FRESH(0)                                                                            \
    _tile_dpbf16ps(0, 4, 6);                                                            \
    _tile_loadd(7, weights + kStep / 2, 64);                                            \
    FRESH(1)                                                                            \
    _tile_dpbf16ps(1, 4, 7);                                                            \
    _tile_loadd(5, x + kTile * x_stride, x_bytes);                                      \
    FRESH(2)                                                                            \
    _tile_dpbf16ps(2, 5, 6);                                                            \
    FRESH(3)                                                                            \
    _tile_dpbf16ps(3, 5, 7);
#define RX_NOTHING(tile)
#define RX_ZERO(tile) _tile_zero(tile);
// A tile's last sums are stored right before its first product of the next block: four stores in a row would halt both.
#define RX_STORE_AND_ZERO(tile)                                \
    _tile_stored(tile, sums + tile * (kTile * kTile), 64);     \
    RX_ZERO(tile)

// Products of one block, and the finish of the one before, whose sums are still in the tiles on entry.
template <bool Gelu, bool Residual>
RX_INLINE void block(const Bf16* x, int64_t x_stride, const Bf16* weights, int64_t steps, float* sums, Finish& before,
                     const char*& ahead, int64_t lines_ahead) {
    const int64_t x_bytes = x_stride * 2, rows_per_step = steps > 1 ? (before.rows + steps - 2) / (steps - 1) : before.rows;
    RX_PRODUCTS(RX_STORE_AND_ZERO)
    for (int64_t step = 1; step < steps; ++step) {
        x += kBlock, weights += kStep;
        RX_PRODUCTS(RX_NOTHING)
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
        const int64_t to_fit = (weight_bytes + kWeightBytes - 1) / kWeightBytes, to_share = (wanted + blocks - 1) / blocks;
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

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace

void linear(const LinearArgs& a) {
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

}  // namespace ragged_exit

#else

#include <stdexcept>

namespace ragged_exit {

bool tiles_available() { return false; }
void linear(const LinearArgs&) { throw std::logic_error("linear: built without AMX"); }

}  // namespace ragged_exit

#endif
