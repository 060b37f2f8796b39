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
    const Kernels* table;
    bool runs_here;
};

const Kernels& choose() {
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const Choice choices[] = {{&avx512::table, has_avx512}, {&avx2::table, has_avx2}, {&baseline::table, true}};
#else
    const Choice choices[] = {{&baseline::table, true}};
#endif
    const char* wanted = std::getenv("RAGGED_EXIT_ISA");
    for (const Choice& choice : choices) {
        const bool named = wanted != nullptr && std::string(wanted) == choice.table->isa;
        if (named && !choice.runs_here) {
            throw std::runtime_error(std::string("RAGGED_EXIT_ISA: this processor cannot run ") + wanted);
        }
        if (named || (wanted == nullptr && choice.runs_here)) return *choice.table;
    }
    throw std::runtime_error(std::string("RAGGED_EXIT_ISA: expected baseline, avx2 or avx512, got ") + wanted);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

void attention(const AttentionArgs& args) {
    const bool on_tiles = args.bf16 && args.dim % 32 == 0 && tiles_available();
    (on_tiles ? tile_attention : kernels().attention)(args);
}

}  // namespace ragged_exit
