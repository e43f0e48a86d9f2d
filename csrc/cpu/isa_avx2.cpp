#define ARL_ISA avx2
#define ARL_ISA_NAME "avx2"
#define ARL_VECTOR_BYTES 32
#include "isa.inc"
