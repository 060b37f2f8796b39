// What every isa_*.cpp includes before its target pragma, so that no header is compiled for a special processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <omp.h>

#include "kernels.h"

#define RX_INLINE inline __attribute__((always_inline))
