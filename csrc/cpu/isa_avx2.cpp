// The AVX2 table. Compiled with -mavx2 -mfma; called only if the CPU supports both.
#define FEDSPINE_ISA_TABLE isa_avx2
#define FEDSPINE_ISA_NAME "avx2"
#define FEDSPINE_VECTOR_FLOATS 8
#define FEDSPINE_REGISTERS 16
#include "isa_table.inc"
