// out = x weight^T + bias, then GELU or a residual: what bfloat16 and float share.
//
// A block of 32 tokens x 32 outputs lives in four tiles of 16 x 16 floats; a step is 32 of its inputs. While a block is
// computed, the one before it is finished by vector instructions in between: bias, GELU and rounding cost little beside
// the products. Each output is summed over the inputs in one order, whatever the number of tokens or threads, so that a
// token's bits depend on that token alone.

namespace ragged_exit {
namespace tiles {

constexpr int64_t kParts = 3;  // of a float, see tiles_linear_float.inl.h
constexpr int64_t kWholeBytes = 5 << 18;  // of a chunk's weights are one group: they fit a second-level cache of 2 MiB
constexpr int64_t kGroupBytes = 1 << 20;  // of larger ones; 3/4 (float), 1/2 (bfloat16) and 3/2 of it are slower
constexpr int64_t kItemsPerThread = 4;    // at least, so that an uneven share costs little

// What the threads share: items, `blocks` of 32 tokens times `groups` of panels, of which a thread takes a run.
struct Plan {
    int64_t blocks, panels, panels_per_group, groups, steps, chunk_steps, chunks;

    explicit Plan(const LinearArgs& a) {
        blocks = (a.tokens + kBlock - 1) / kBlock, panels = a.outputs / kBlock, steps = a.inputs / kBlock;
        chunk_steps = tile_chunk(a.inputs, a.bf16) / kBlock;
        chunks = (steps + chunk_steps - 1) / chunk_steps;
        const int64_t weight_bytes = panels * chunk_steps * kStep * 2 * (a.bf16 ? 1 : kParts);
        const int64_t to_fit = weight_bytes <= kWholeBytes ? 1 : (weight_bytes + kGroupBytes - 1) / kGroupBytes;
        const int64_t to_share = (kItemsPerThread * a.threads + blocks - 1) / blocks;
        panels_per_group = (panels + larger(to_fit, to_share) - 1) / larger(to_fit, to_share);
        groups = (panels + panels_per_group - 1) / panels_per_group;
    }
    int64_t first_panel(int64_t item) const { return item / blocks * panels_per_group; }
    int64_t last_panel(int64_t item) const { return smaller(panels, first_panel(item) + panels_per_group); }
    int64_t token(int64_t item) const { return item % blocks * kBlock; }
};

// The block whose products are done: sums [4 tiles][16][16] wait for their finish.
template <typename T>
struct Finish {
    const float* sums;
    const float* bias;  // [32]
    const T* residual;  // or null
    T* out;
    int64_t stride;  // of residual and out
    int64_t rows, done;

    RX_INLINE void row(bool gelu) {
        const float* row = sums + done / kTile * (2 * kTile * kTile) + done % kTile * kTile;
        Vec left = load(row) + load(bias), right = load(row + kTile * kTile) + load(bias + kTile);
        if (residual) {
            left = left + load(residual + done * stride);
            right = right + load(residual + done * stride + kTile);
        }
        if (gelu) left = avx512::gelu(left, T()), right = avx512::gelu(right, T());
        store_row(out + done * stride, left, right);
        ++done;
    }
};

alignas(64) constexpr float kNoBias[kBlock] = {};

#define RX_STORE_AND_ZERO(tile)                            \
    _tile_stored(tile, sums + tile * (kTile * kTile), 64); \
    RX_ZERO(tile)

// body(thread, begin, end) on every thread that has items.
template <typename Body>
void share(const Plan& plan, int team, const Body& body) {
    const int64_t items = plan.blocks * plan.groups;
#pragma omp parallel num_threads(team) if (team > 1)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t begin = items * thread / threads, end = items * (thread + 1) / threads;
        if (begin < end) body(thread, begin, end);
    }
}

}  // namespace tiles
}  // namespace ragged_exit
