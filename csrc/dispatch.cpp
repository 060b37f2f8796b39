// Which instruction set runs. A wheel is built without -march, so nothing beyond the baseline may execute before the
// processor has been asked.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ragged_exit {

namespace baseline { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#endif

namespace {

struct Choice {
    const char* name;
    const Kernels* table;
    bool runs_here;
};

const Choice& choose() {
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const Choice choices[] = {{"amx", &avx512::table, has_avx512 && tiles_granted()},
                                     {"avx512", &avx512::table, has_avx512},
                                     {"avx2", &avx2::table, has_avx2},
                                     {"baseline", &baseline::table, true}};
#else
    static const Choice choices[] = {{"baseline", &baseline::table, true}};
#endif
    const char* wanted = std::getenv("RAGGED_EXIT_ISA");
    for (const Choice& choice : choices) {
        const bool named = wanted != nullptr && std::string(wanted) == choice.name;
        if (named && !choice.runs_here) {
            throw std::runtime_error(std::string("RAGGED_EXIT_ISA: this processor cannot run ") + wanted);
        }
        if (named || (wanted == nullptr && choice.runs_here)) return choice;
    }
    throw std::runtime_error(std::string("RAGGED_EXIT_ISA: expected baseline, avx2, avx512 or amx, got ") + wanted);
}

const Choice& chosen() {
    static const Choice& choice = choose();
    return choice;
}

}  // namespace

const char* isa() { return chosen().name; }
const Kernels& kernels() { return *chosen().table; }

bool tiles_available() {
    static const bool available = std::string(isa()) == "amx";
    return available;
}

bool linears_available(bool bf16) {
    return tiles_available() || (bf16 ? bf16_vectors_available() : kernels().linear != nullptr);
}

void linear(const LinearArgs& args) {
    if (args.tokens == 0) return;  // nothing to divide among threads
    (tiles_available() ? tile_linear : args.bf16 ? bf16_linear : kernels().linear)(args);
}

int64_t linear_step_bytes(bool bf16) { return 32 * 32 * (bf16 ? 2 : tiles_available() ? 3 * 2 : 4); }

void attention(const AttentionArgs& args) {
    if (args.tokens == 0 || args.heads == 0 || args.dim == 0) return;  // nothing to divide among threads, or by
    const bool on_tiles = args.bf16 && args.dim % 32 == 0 && tiles_available();
    (on_tiles ? tile_attention : kernels().attention)(args);
}

}  // namespace ragged_exit
