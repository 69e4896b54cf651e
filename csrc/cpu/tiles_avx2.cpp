// Compiled with -mavx2 -mfma; only called where cpu_isa() found both.
#define FEDSPINE_TILES tiles_avx2
#define FEDSPINE_ISA_NAME "avx2"
#define FEDSPINE_VECTOR_FLOATS 8
#define FEDSPINE_REGISTERS 16
#include "tiles.inc"
