#define ISA plain
#include "vec_plain.h"

#include "kernels.inc"
