// attn.h and attn_cuda.cuh in one file: what `make cuda` compiles for every architecture.
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cuda.cuh"
