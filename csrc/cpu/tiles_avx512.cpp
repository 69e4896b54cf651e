// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl; only called where cpu_isa() found all four.
#define FEDSPINE_TILES tiles_avx512
#define FEDSPINE_ISA_NAME "avx512"
#define FEDSPINE_VECTOR_FLOATS 16
#define FEDSPINE_REGISTERS 32
#include "tiles.inc"
