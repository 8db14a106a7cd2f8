/* The public part of attn_cuda.cuh, twice and with no CUDA header: C and C++. */
#include "attn_cuda.cuh"
#include "attn.h"
#include "attn_cuda.cuh"

attn_result cuda_part(const attn_cuda *c, const attn_desc *d, attn_cuda_stream stream);
attn_result cuda_part(const attn_cuda *c, const attn_desc *d, attn_cuda_stream stream) {
    attn_plan_params p;
    attn_cuda_plan g;
    attn_result r = attn_cuda_supports(c, d);
    if (r != ATTN_OK) return r;
    attn_cuda_plan_params(c, d, &p);
    r = attn_cuda_plan_init(c, d, &p, NULL, attn_cuda_plan_bytes(c, d, &p), &g);
    return r == ATTN_OK ? attn_cuda_run(c, d, &g, NULL, 0, stream) : r;
}
