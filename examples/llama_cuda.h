/* llama_cuda.h - the layers of llama.h on a CUDA device: what examples/generate.c --device cuda
 * needs beside attention. Plain C; llama_cuda.cu implements it and is compiled by nvcc, with cuBLAS
 * for the matrix products.
 *
 * The order of calls is that of llama.h: embed, then for each layer qkv, attention over q, k, v
 * into att, out; then logits. Everything is queued on one stream; download and logits wait for it.
 * Memory: close gives back all that open and alloc took.
 * Errors: -1 or NULL, and a sentence in err (LLAMA_ERR_BYTES).
 * Numerics: f32 (no TF32), the formulas of llama.h; a norm has its order of additions, a matrix
 *   product that of cuBLAS, which may depend on the number of tokens. Packed weights are converted
 *   to f32 at open. */
#ifndef LLAMA_CUDA_H
#define LLAMA_CUDA_H

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct llama_cuda {
    const llama_model *m;
    int32_t cap, n;              /* tokens: at most, in this batch */
    int32_t cap_logits;          /* rows of logits at most */
    struct CUstream_st *stream;  /* a cudaStream_t */
    float *q, *k, *v, *att;      /* device: (cap, heads * dim of each) */
    struct llama_cuda_parts *parts;
} llama_cuda;

/* On the current device. pool: threads that convert the weights. On failure nothing is left. */
int llama_cuda_open(llama_cuda *c, const llama_model *m, llama_pool *pool, int32_t cap,
                    int32_t cap_logits, char *err);
void llama_cuda_close(llama_cuda *c); /* a zeroed one is allowed */

/* Zeroed memory of the device, or page-locked memory of the host. */
void *llama_cuda_alloc(llama_cuda *c, size_t bytes, int on_host, char *err);
/* host is free again on return; download waits for all that was queued. */
int llama_cuda_upload(llama_cuda *c, void *device, const void *host, size_t bytes, char *err);
int llama_cuda_download(llama_cuda *c, void *host, const void *device, size_t bytes, char *err);

int llama_cuda_embed(llama_cuda *c, const int32_t *ids, const int32_t *pos, int32_t n, char *err);
int llama_cuda_qkv(llama_cuda *c, int32_t layer, char *err);
int llama_cuda_out(llama_cuda *c, int32_t layer, char *err);
/* rows: which tokens; logits (n_rows, n_vocab): host. */
int llama_cuda_logits(llama_cuda *c, const int32_t *rows, int32_t n_rows, float *logits, char *err);

/* A clock on the stream: LLAMA_CUDA_MARKS marks for every layer, from 0 on, and the seconds from
 * mark a to mark b summed over all layers. Call seconds after the stream was waited for. */
enum { LLAMA_CUDA_MARKS = 4 };
int llama_cuda_mark(llama_cuda *c, int32_t layer, int i, char *err);
int llama_cuda_seconds(llama_cuda *c, int a, int b, double *sum, char *err);

#ifdef __cplusplus
}
#endif
#endif
