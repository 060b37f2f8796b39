// What every isa_*.cpp includes before its target pragma, so that no header is compiled for a special processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <omp.h>

#include "kernels.h"

#define RX_INLINE inline __attribute__((always_inline))

namespace ragged_exit {

RX_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RX_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
RX_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace ragged_exit
