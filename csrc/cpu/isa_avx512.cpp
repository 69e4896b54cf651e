// The AVX-512 table. Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl; called only if the CPU supports all
// four.
#define FEDSPINE_ISA_TABLE isa_avx512
#define FEDSPINE_ISA_NAME "avx512"
#define FEDSPINE_VECTOR_FLOATS 16
#define FEDSPINE_REGISTERS 32
#include "isa_table.inc"
