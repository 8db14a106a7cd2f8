/* A program in C beside the kernels' object: only public headers, no CUDA header. Runs with and
   without a device, up to where device memory is needed. */
#include "attn_cuda.cuh"
#include "test.h"

int main(void) {
    static const int32_t q_start[2] = {0, 1}, kv_len[1] = {5};
    static float word[2];
    attn_cuda c;
    attn_desc d;
    attn_plan_params p;
    attn_result r;
    memset(&c, 0, sizeof c);
    memset(&d, 0, sizeof d);
    d.n_seq = d.n_heads = d.n_kv_heads = d.kv.n_pages = 1;
    d.head_dim = 64;
    d.q_start = q_start;
    d.kv.kv_len = kv_len;
    d.kv.page_tokens = 8;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_BF16;
    d.q.data = d.o.data = d.kv.k.data = d.kv.v.data = word; // looked at by nobody here
    CHECK_EQ(attn_validate(&d), ATTN_OK);
    CHECK_EQ(attn_cuda_open(NULL, 0), ATTN_ERR_ARGUMENT);
    CHECK_EQ(attn_cuda_supports(NULL, &d), ATTN_ERR_ARGUMENT);
    CHECK(strlen(attn_result_string(ATTN_ERR_DEVICE)) > 0);
    r = attn_cuda_open(&c, 0);
    printf("attn_cuda_open: %s\n", attn_result_string(r));
    CHECK(r == ATTN_OK || r == ATTN_ERR_ARGUMENT || r == ATTN_ERR_DEVICE ||
          r == ATTN_ERR_UNSUPPORTED);
    if (r != ATTN_OK) return TEST_END();
    CHECK_EQ(attn_cuda_supports(&c, &d), ATTN_OK);
    memset(&p, 0, sizeof p);
    attn_cuda_plan_params(&c, &d, &p);
    CHECK(attn_cuda_plan_bytes(&c, &d, &p) > 0);
    printf("executor: %s\n", attn_cuda_executor(&c, &d));
    d.kv.layout = ATTN_K16, d.kv.page_tokens = 16;
    CHECK_EQ(attn_cuda_supports(&c, &d), ATTN_ERR_UNSUPPORTED);
    return TEST_END();
}
