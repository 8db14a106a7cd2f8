// The CPU backend in a file that nvcc compiles, as in a program that has both.
#define ATTN_CORE_IMPLEMENTATION
#define ATTN_CPU_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"
#include "attn_cuda.cuh"
