// The kernels for any processor.
#include "isa_prelude.h"

#define RX_ISA baseline

#include "simd_baseline.h"

#include "isa_kernels.inl.h"
