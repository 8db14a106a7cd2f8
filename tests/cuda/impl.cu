// The kernels, for the test programs in C beside it.
#if defined(TEST_PTX) && TEST_PTX < 80 // the driver compiles all of them at the start: some of each
#define ATTN_CUDA_KERNELS(X) X(0, 0, 64, 64) X(0, 1, 128, 128) X(0, 0, 256, 256)
#elif defined(TEST_PTX)
#define ATTN_CUDA_KERNELS(X) X(1, 0, 128, 128) X(0, 1, 64, 64) X(1, 0, 256, 256) X(1, 0, 576, 512)
#endif
#define ATTN_CUDA_IMPLEMENTATION
#include "attn_cuda.cuh"
