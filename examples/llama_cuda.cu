/* llama_cuda.cu - see llama_cuda.h. It also holds the implementation of attn_cuda.cuh, so that
 * generate.c stays a C file that the C compiler builds as ever. */
#define ATTN_CUDA_KERNELS(X) /* none for tensor cores: queries are f32 */
#define ATTN_CUDA_IMPLEMENTATION
#include "attn_cuda.cuh"
#include "llama_cuda.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct layer_weights {
    float *attn_norm, *ffn_norm;
    float *bq, *bk, *bv, *bo;                  /* or NULL */
    float *wq, *wk, *wv, *wo, *gate, *up, *down; /* (n_out, n_in) each, as in the file */
} layer_weights;

typedef struct allocation {
    void *at;
    int on_host;
} allocation;

typedef struct llama_cuda_parts {
    cublasHandle_t blas;
    allocation *list;
    size_t n_list, cap_list;
    layer_weights *layers;
    float *embed, *output, *out_norm;
    double *rope_freq;
    float *x, *xn, *gate, *up, *rope;          /* as in llama_state */
    float *logits;                             /* (cap_logits, n_vocab) */
    int32_t *ids, *pos, *rows;                 /* (cap) */
    cudaEvent_t *mark;                         /* (n_marks) */
    int32_t n_marks;
} llama_cuda_parts;

static int failed(char *err, const char *what, const char *why) {
    snprintf(err, LLAMA_ERR_BYTES, "%s: %s", what, why);
    return -1;
}

static int cuda(cudaError_t e, const char *what, char *err) {
    return e == cudaSuccess ? 0 : failed(err, what, cudaGetErrorString(e));
}

static int blas(cublasStatus_t s, char *err) {
    return s == CUBLAS_STATUS_SUCCESS ? 0 : failed(err, "cuBLAS", cublasGetStatusString(s));
}

/* ==== kernels ====
 * One thread per element, numbered over the whole grid, but for the norm. */

enum { BLOCK = 256, LANES = 16 };

static unsigned blocks_of(int64_t n_threads) { return (unsigned)((n_threads + BLOCK - 1) / BLOCK); }

static __device__ int64_t thread_id(void) { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }

static __global__ void embed_rows(int64_t n, int32_t d, const float *embed, const int32_t *ids,
                                  float *x) {
    int64_t i = thread_id();
    if (i < n * d) x[i] = embed[(int64_t)ids[i / d] * d + i % d];
}

/* rope (n, pairs, 2): cos and sin, computed in double as llama.h does */
static __global__ void rope_angles(int64_t n, int32_t pairs, const double *freq, const int32_t *pos,
                                   float *rope) {
    int64_t i = thread_id();
    if (i >= n * pairs) return;
    double angle = (double)pos[i / pairs] * freq[i % pairs];
    rope[2 * i] = (float)cos(angle);
    rope[2 * i + 1] = (float)sin(angle);
}

/* xn = x / rms(x) * weight, 16 threads per token: the lanes and the tree of llama_norm_task. rows:
 * which tokens of x, NULL for all. */
static __global__ void norm_rows(int64_t n, int32_t d, double eps, const float *x,
                                 const int32_t *rows, const float *weight, float *xn) {
    int64_t t = thread_id() / LANES;
    int lane = (int)(threadIdx.x % LANES);
    const float *in = x + (t < n ? rows ? (int64_t)rows[t] : t : 0) * d;
    float sum = 0, scale;
    for (int32_t i = lane; i < d && t < n; i += LANES) sum += in[i] * in[i];
    for (int w = LANES / 2; w; w /= 2) { /* all threads of a warp take part */
        float other = __shfl_down_sync(0xffffffffu, sum, (unsigned)w, LANES);
        if (lane < w) sum += other;
    }
    sum = __shfl_sync(0xffffffffu, sum, 0, LANES);
    scale = (float)(1.0 / sqrt((double)sum / d + eps));
    for (int32_t i = lane; i < d && t < n; i += LANES) xn[t * d + i] = in[i] * scale * weight[i];
}

static __global__ void add_bias(int64_t n, int64_t width, const float *bias, float *y) {
    int64_t i = thread_id();
    if (i < n * width) y[i] += bias[i % width];
}

/* Turns the first pairs of x (n, heads, dim). */
static __global__ void rotate(int64_t n, int32_t heads, int32_t dim, int32_t pairs,
                              const float *rope, float *x) {
    int64_t i = thread_id(), row = i / pairs, pair = i % pairs;
    if (row >= n * heads) return;
    const float *r = rope + (row / heads * pairs + pair) * 2;
    float *y = x + row * dim + 2 * pair, a = y[0], b = y[1];
    y[0] = a * r[0] - b * r[1];
    y[1] = a * r[1] + b * r[0];
}

static __global__ void swiglu(int64_t n, const float *up, float *gate) {
    int64_t i = thread_id();
    if (i >= n) return;
    float a = gate[i];
    gate[i] = a / (1.0f + expf(-a)) * up[i];
}

/* ==== memory ==== */

void *llama_cuda_alloc(llama_cuda *c, size_t bytes, int on_host, char *err) {
    llama_cuda_parts *p = c->parts;
    void *at = NULL;
    if (p->n_list == p->cap_list) {
        size_t cap = 2 * p->cap_list + 64;
        allocation *list = (allocation *)realloc(p->list, cap * sizeof *list);
        if (!list) {
            failed(err, "memory", "out of memory");
            return NULL;
        }
        p->list = list;
        p->cap_list = cap;
    }
    bytes += bytes == 0;
    if (cuda(on_host ? cudaMallocHost(&at, bytes) : cudaMalloc(&at, bytes),
             on_host ? "page-locked memory" : "device memory", err))
        return NULL;
    p->list[p->n_list].at = at;
    p->list[p->n_list++].on_host = on_host;
    if (on_host) memset(at, 0, bytes);
    else if (cuda(cudaMemset(at, 0, bytes), "device memory", err)) return NULL;
    return at;
}

int llama_cuda_upload(llama_cuda *c, void *device, const void *host, size_t bytes, char *err) {
    return cuda(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, c->stream), "upload",
                err);
}

int llama_cuda_download(llama_cuda *c, void *host, const void *device, size_t bytes, char *err) {
    if (cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, c->stream), "download",
             err))
        return -1;
    return cuda(cudaStreamSynchronize(c->stream), "the device", err);
}

/* ==== weights ==== */

typedef struct convert {
    const llama_weight *w;
    int64_t row0;
    float *out;
} convert;

static void convert_row(void *ctx, int64_t task, int32_t thread) {
    const convert *v = (const convert *)ctx;
    (void)thread;
    llama_weight_row(v->w, v->row0 + task, v->out + task * v->w->n_in);
}

/* A matrix as f32 in device memory, converted piece by piece. */
static float *load_matrix(llama_cuda *c, llama_pool *pool, const llama_weight *w, char *err) {
    int64_t step = ((int64_t)1 << 22) / w->n_in + 1, n;
    size_t row = (size_t)w->n_in * sizeof(float);
    float *at = (float *)llama_cuda_alloc(c, (size_t)w->n_out * row, 0, err);
    convert v = {w, 0, at ? (float *)malloc((size_t)step * row) : NULL};
    int bad = !v.out;
    if (at && bad) failed(err, "weights", "out of memory");
    for (; !bad && v.row0 < w->n_out; v.row0 += n) {
        n = w->n_out - v.row0 < step ? w->n_out - v.row0 : step;
        llama_pool_run(pool, convert_row, &v, n);
        bad = cuda(cudaMemcpy(at + v.row0 * w->n_in, v.out, (size_t)n * row,
                              cudaMemcpyHostToDevice),
                   "weights", err);
    }
    free(v.out);
    return bad ? NULL : at;
}

/* *at stays NULL when there is no such vector. */
static int load_vector(llama_cuda *c, const void *host, size_t bytes, void **at, char *err) {
    if (!host) return 0;
    *at = llama_cuda_alloc(c, bytes, 0, err);
    return *at ? cuda(cudaMemcpy(*at, host, bytes, cudaMemcpyHostToDevice), "weights", err) : -1;
}

static int load_layer(llama_cuda *c, llama_pool *pool, const llama_layer *l, layer_weights *g,
                      char *err) {
    const struct { const llama_weight *w; float **at; } matrix[] = {
        {&l->wq, &g->wq}, {&l->wk, &g->wk}, {&l->wv, &g->wv}, {&l->wo, &g->wo},
        {&l->gate, &g->gate}, {&l->up, &g->up}, {&l->down, &g->down}};
    const struct { const float *from; int64_t n; float **at; } vector[] = {
        {l->attn_norm, c->m->d_model, &g->attn_norm}, {l->ffn_norm, c->m->d_model, &g->ffn_norm},
        {l->bq, l->wq.n_out, &g->bq}, {l->bk, l->wk.n_out, &g->bk},
        {l->bv, l->wv.n_out, &g->bv}, {l->bo, l->wo.n_out, &g->bo}};
    for (size_t i = 0; i < sizeof matrix / sizeof *matrix; i++)
        if (!(*matrix[i].at = load_matrix(c, pool, matrix[i].w, err))) return -1;
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++)
        if (load_vector(c, vector[i].from, (size_t)vector[i].n * sizeof(float),
                        (void **)vector[i].at, err))
            return -1;
    return 0;
}

static int load_weights(llama_cuda *c, llama_pool *pool, char *err) {
    const llama_model *m = c->m;
    llama_cuda_parts *p = c->parts;
    p->layers = (layer_weights *)calloc((size_t)m->n_layers, sizeof *p->layers);
    if (!p->layers) return failed(err, "weights", "out of memory");
    if (!(p->embed = load_matrix(c, pool, &m->embed, err))) return -1;
    p->output = m->output.data == m->embed.data ? p->embed
                                                : load_matrix(c, pool, &m->output, err);
    if (!p->output || load_vector(c, m->out_norm, (size_t)m->d_model * sizeof(float),
                                  (void **)&p->out_norm, err) ||
        load_vector(c, m->rope_freq, (size_t)(m->rope_dim / 2) * sizeof(double),
                    (void **)&p->rope_freq, err))
        return -1;
    for (int32_t i = 0; i < m->n_layers; i++)
        if (load_layer(c, pool, &m->layers[i], &p->layers[i], err)) return -1;
    return 0;
}

/* ==== open and close ==== */

static int open_buffers(llama_cuda *c, char *err) {
    const llama_model *m = c->m;
    llama_cuda_parts *p = c->parts;
    const struct { void *at; int64_t width; } part[] = {
        {&p->x, m->d_model}, {&p->xn, m->d_model}, {&c->q, (int64_t)m->n_heads * m->head_dim},
        {&c->k, (int64_t)m->n_kv_heads * m->head_dim},
        {&c->v, (int64_t)m->n_kv_heads * m->v_head_dim},
        {&c->att, (int64_t)m->n_heads * m->v_head_dim}, {&p->gate, m->d_ff}, {&p->up, m->d_ff},
        {&p->rope, m->rope_dim}, {&p->ids, 1}, {&p->pos, 1}, {&p->rows, 1}};
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        void *at = llama_cuda_alloc(c, (size_t)c->cap * (size_t)part[i].width * 4, 0, err);
        if (!at) return -1;
        memcpy(part[i].at, &at, sizeof at);
    }
    p->logits = (float *)llama_cuda_alloc(
        c, (size_t)c->cap_logits * (size_t)m->n_vocab * sizeof(float), 0, err);
    if (!p->logits) return -1;
    p->mark = (cudaEvent_t *)calloc(LLAMA_CUDA_MARKS * (size_t)m->n_layers, sizeof *p->mark);
    if (!p->mark) return failed(err, "marks", "out of memory");
    for (; p->n_marks < LLAMA_CUDA_MARKS * m->n_layers; p->n_marks++)
        if (cuda(cudaEventCreate(&p->mark[p->n_marks]), "marks", err)) return -1;
    return 0;
}

int llama_cuda_open(llama_cuda *c, const llama_model *m, llama_pool *pool, int32_t cap,
                    int32_t cap_logits, char *err) {
    memset(c, 0, sizeof *c);
    c->m = m;
    c->cap = cap;
    c->cap_logits = cap_logits;
    c->parts = (llama_cuda_parts *)calloc(1, sizeof *c->parts);
    if (!c->parts) return failed(err, "opening the device", "out of memory");
    if (cuda(cudaStreamCreate(&c->stream), "stream", err) ||
        blas(cublasCreate(&c->parts->blas), err) ||
        blas(cublasSetStream(c->parts->blas, c->stream), err) ||
        /* f32 all the way: no TF32, no emulation, whatever the environment says */
        blas(cublasSetMathMode(c->parts->blas, CUBLAS_PEDANTIC_MATH), err) ||
        load_weights(c, pool, err) || open_buffers(c, err)) {
        llama_cuda_close(c);
        return -1;
    }
    return 0;
}

void llama_cuda_close(llama_cuda *c) {
    llama_cuda_parts *p = c->parts;
    if (!p) return;
    /* results are with the caller already, so an error here has nobody to act on it */
    if (c->stream) (void)cudaStreamSynchronize(c->stream);
    for (int32_t i = 0; i < p->n_marks; i++) (void)cudaEventDestroy(p->mark[i]);
    for (size_t i = 0; i < p->n_list; i++)
        (void)(p->list[i].on_host ? cudaFreeHost(p->list[i].at) : cudaFree(p->list[i].at));
    if (p->blas) (void)cublasDestroy(p->blas);
    if (c->stream) (void)cudaStreamDestroy(c->stream);
    free(p->mark);
    free(p->layers);
    free(p->list);
    free(p);
    memset(c, 0, sizeof *c);
}

/* ==== layers ==== */

static int launched(const char *what, char *err) { return cuda(cudaGetLastError(), what, err); }

/* y (n, n_out) = x (n, n_in) times the transposed weight, plus y if add, plus bias unless NULL.
 * Row-major arrays are what cuBLAS calls transposed: y^T = w x^T. */
static int linear(llama_cuda *c, const llama_weight *w, const float *f32, const float *bias,
                  const float *x, int32_t n, int add, float *y, char *err) {
    const float one = 1, beta = add ? 1.0f : 0.0f;
    int n_in = (int)w->n_in, n_out = (int)w->n_out;
    if (blas(cublasSgemm(c->parts->blas, CUBLAS_OP_T, CUBLAS_OP_N, n_out, n, n_in, &one, f32, n_in,
                         x, n_in, &beta, y, n_out),
             err))
        return -1;
    if (!bias) return 0;
    add_bias<<<blocks_of((int64_t)n * n_out), BLOCK, 0, c->stream>>>(n, n_out, bias, y);
    return launched("bias", err);
}

static int norm(llama_cuda *c, const float *weight, const int32_t *rows, int32_t n, char *err) {
    llama_cuda_parts *p = c->parts;
    norm_rows<<<blocks_of((int64_t)n * LANES), BLOCK, 0, c->stream>>>(
        n, c->m->d_model, c->m->rms_eps, p->x, rows, weight, p->xn);
    return launched("norm", err);
}

int llama_cuda_embed(llama_cuda *c, const int32_t *ids, const int32_t *pos, int32_t n, char *err) {
    llama_cuda_parts *p = c->parts;
    int32_t d = c->m->d_model, pairs = c->m->rope_dim / 2;
    c->n = n;
    if (llama_cuda_upload(c, p->ids, ids, (size_t)n * sizeof *ids, err) ||
        llama_cuda_upload(c, p->pos, pos, (size_t)n * sizeof *pos, err))
        return -1;
    embed_rows<<<blocks_of((int64_t)n * d), BLOCK, 0, c->stream>>>(n, d, p->embed, p->ids, p->x);
    if (launched("embedding", err)) return -1;
    if (!pairs) return 0;
    rope_angles<<<blocks_of((int64_t)n * pairs), BLOCK, 0, c->stream>>>(n, pairs, p->rope_freq,
                                                                        p->pos, p->rope);
    return launched("rope", err);
}

static int turn(llama_cuda *c, int32_t heads, float *x, char *err) {
    int32_t pairs = c->m->rope_dim / 2;
    if (!pairs) return 0;
    rotate<<<blocks_of((int64_t)c->n * heads * pairs), BLOCK, 0, c->stream>>>(
        c->n, heads, c->m->head_dim, pairs, c->parts->rope, x);
    return launched("rope", err);
}

int llama_cuda_qkv(llama_cuda *c, int32_t layer, char *err) {
    const llama_layer *l = &c->m->layers[layer];
    llama_cuda_parts *p = c->parts;
    const layer_weights *g = &p->layers[layer];
    return norm(c, g->attn_norm, NULL, c->n, err) ||
                   linear(c, &l->wq, g->wq, g->bq, p->xn, c->n, 0, c->q, err) ||
                   linear(c, &l->wk, g->wk, g->bk, p->xn, c->n, 0, c->k, err) ||
                   linear(c, &l->wv, g->wv, g->bv, p->xn, c->n, 0, c->v, err) ||
                   turn(c, c->m->n_heads, c->q, err) || turn(c, c->m->n_kv_heads, c->k, err)
               ? -1
               : 0;
}

int llama_cuda_out(llama_cuda *c, int32_t layer, char *err) {
    const llama_layer *l = &c->m->layers[layer];
    llama_cuda_parts *p = c->parts;
    const layer_weights *g = &p->layers[layer];
    int64_t n_ff = (int64_t)c->n * c->m->d_ff;
    if (linear(c, &l->wo, g->wo, g->bo, c->att, c->n, 1, p->x, err) ||
        norm(c, g->ffn_norm, NULL, c->n, err) ||
        linear(c, &l->gate, g->gate, NULL, p->xn, c->n, 0, p->gate, err) ||
        linear(c, &l->up, g->up, NULL, p->xn, c->n, 0, p->up, err))
        return -1;
    swiglu<<<blocks_of(n_ff), BLOCK, 0, c->stream>>>(n_ff, p->up, p->gate);
    if (launched("swiglu", err)) return -1;
    return linear(c, &l->down, g->down, NULL, p->gate, c->n, 1, p->x, err);
}

int llama_cuda_logits(llama_cuda *c, const int32_t *rows, int32_t n_rows, float *logits,
                      char *err) {
    llama_cuda_parts *p = c->parts;
    if (llama_cuda_upload(c, p->rows, rows, (size_t)n_rows * sizeof *rows, err) ||
        norm(c, p->out_norm, p->rows, n_rows, err) ||
        linear(c, &c->m->output, p->output, NULL, p->xn, n_rows, 0, p->logits, err))
        return -1;
    return llama_cuda_download(c, logits, p->logits,
                               (size_t)n_rows * (size_t)c->m->n_vocab * sizeof *logits, err);
}

int llama_cuda_mark(llama_cuda *c, int32_t layer, int i, char *err) {
    cudaEvent_t mark = c->parts->mark[LLAMA_CUDA_MARKS * layer + i];
    return cuda(cudaEventRecord(mark, c->stream), "marks", err);
}

int llama_cuda_seconds(llama_cuda *c, int a, int b, double *sum, char *err) {
    *sum = 0;
    for (int32_t i = 0; i < c->parts->n_marks; i += LLAMA_CUDA_MARKS) {
        float ms = 0;
        if (cuda(cudaEventElapsedTime(&ms, c->parts->mark[i + a], c->parts->mark[i + b]), "marks",
                 err))
            return -1;
        *sum += 1e-3 * (double)ms;
    }
    return 0;
}
