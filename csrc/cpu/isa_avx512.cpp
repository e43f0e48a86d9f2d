#define ARL_ISA avx512
#define ARL_ISA_NAME "avx512"
#define ARL_VECTOR_BYTES 64
#include "isa.inc"
