// The kernels, for the test programs in C beside it.
#define ATTN_CUDA_IMPLEMENTATION
#include "attn_cuda.cuh"
