#define ISA neonbf16
#include "vec_neon.h"

#include "kernels.inc"
