#define ISA neondot
#include "vec_neon.h"

#include "kernels.inc"
