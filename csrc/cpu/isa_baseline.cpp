#define ARL_ISA baseline
#define ARL_ISA_NAME "baseline"
#define ARL_VECTOR_BYTES 16
#include "isa.inc"
