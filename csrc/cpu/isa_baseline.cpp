// The table for every CPU of the platform: SSE2 on x86-64, NEON on aarch64.
#define FEDSPINE_ISA_TABLE isa_baseline
#define FEDSPINE_VECTOR_FLOATS 4
#if defined(__aarch64__)
#define FEDSPINE_ISA_NAME "neon"
#define FEDSPINE_REGISTERS 32
#else
#define FEDSPINE_ISA_NAME "baseline"
#define FEDSPINE_REGISTERS 16
#endif
#include "isa_table.inc"
