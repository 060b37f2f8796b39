// Kernels for the processor's matrix tiles (AMX).
#include "isa_prelude.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "intrinsics.h"

namespace ragged_exit {
namespace {

bool processor_has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d & (1u << 24)) && (d & (1u << 22));  // AMX-TILE and AMX-BF16
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    return tiles && (a & (1u << 5));  // AVX512-BF16
}

// Linux hands out the tiles' state on request only, once for all threads of the process.
bool kernel_allows_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool tiles_granted() { return processor_has_tiles() && kernel_allows_tiles(); }

}  // namespace ragged_exit

#define RX_ISA avx512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#endif

#include "simd_avx512.h"

#include "math.inl.h"

#include "gelu.inl.h"

// Nothing but always-inlined functions may come from the headers above: the linker keeps one copy of any other, and it
// could be the one compiled here.
namespace ragged_exit {
namespace tiles {

using namespace avx512;

constexpr int kTile = 16;           // rows of a tile, and floats in one of them
constexpr int kBlock = 2 * kTile;   // rows and columns of a product of two by two tiles; bfloat16 in a tile's row

// The layout of ldtilecfg's operand, palette 1: all eight tiles have 16 rows of 64 bytes. Constant memory: the compiler
// does not know that the instruction reads more than its first bytes, and would drop stores to the rest.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
constexpr TileConfig kTileConfig;

constexpr int64_t kStep = kBlock * kBlock;  // numbers of one operand in a step of the products

// 32 numbers, rounded to the type of `out`.
RX_INLINE void store_row(float* out, Vec left, Vec right) { store(out, left), store(out + kTile, right); }
RX_INLINE void store_row(Bf16* out, Vec left, Vec right) {
    const __m512bh both = _mm512_cvtne2ps_pbh(right, left);
    std::memcpy(out, &both, sizeof(both));
}

// Before tiles are loaded from memory just written: GCC's intrinsic does not tell the compiler that it reads any.
RX_INLINE void written() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 [32][32] += left [32][32] right, whose 16 columns each are two tiles. FRESH(tile) comes before a tile's
// product: a finished block is best stored there, one tile at a time, since four stores in a row halt the products.
#define RX_PRODUCTS(FRESH, left, left_stride, right, right_second)       \
    _tile_loadd(4, left, (left_stride) * 2);                             \
    _tile_loadd(6, right, 64);                                           \
    FRESH(0)                                                             \
    _tile_dpbf16ps(0, 4, 6);                                             \
    _tile_loadd(7, right_second, 64);                                    \
    FRESH(1)                                                             \
    _tile_dpbf16ps(1, 4, 7);                                             \
    _tile_loadd(5, (left) + kTile * (left_stride), (left_stride) * 2);   \
    FRESH(2)                                                             \
    _tile_dpbf16ps(2, 5, 6);                                             \
    FRESH(3)                                                             \
    _tile_dpbf16ps(3, 5, 7);
#define RX_NOTHING(tile)
#define RX_ZERO(tile) _tile_zero(tile);

}  // namespace tiles
}  // namespace ragged_exit

#include "tiles_attention.inl.h"
#include "tiles_linear.inl.h"
// built on tiles_linear.inl.h
#include "tiles_linear_bf16.inl.h"
#include "tiles_linear_float.inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ragged_exit {

void tile_linear(const LinearArgs& a) { a.bf16 ? tiles::bf16_linear_of(a) : tiles::float_linear_of(a); }
void tile_attention(const AttentionArgs& a) { tiles::attention_of(a); }

}  // namespace ragged_exit

#else

#include <stdexcept>

namespace ragged_exit {

bool tiles_granted() { return false; }
void tile_linear(const LinearArgs&) { throw std::logic_error("tile_linear: built without AMX"); }
void tile_attention(const AttentionArgs&) { throw std::logic_error("tile_attention: built without AMX"); }

}  // namespace ragged_exit

#endif
