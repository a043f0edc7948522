#define ISA neon
#include "vec_neon.h"

#include "kernels.inc"
