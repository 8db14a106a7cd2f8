/* nvcc -O3 -arch=native -I. examples/cuda_prefill.cu -o cuda_prefill
 *
 * Prefill of one prompt on a GPU in chunks, over paged KV, under a causal mask and two sparse ones.
 * The last queries of every chunk are compared with the reference, which has the KV in one piece of
 * host memory.
 *     cuda_prefill [causal|stride|slash]... */
#define ATTN_CUDA_KERNELS(X) X(1, 0, 128, 128) X(0, 0, 128, 128) /* all that this program needs */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cuda.cuh"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

enum { HEADS = 16, KV_HEADS = 4, DIM = 128, PAGE = 64, LEN = 2048, CHUNK = 512, CHECKED = 32,
       PAGES = LEN / PAGE, Q_ROW = HEADS * DIM, KV_ROW = KV_HEADS * DIM };

typedef __nv_bfloat16 bf16;

static void need(attn_result r, const char *what) {
    if (r == ATTN_OK) return;
    fprintf(stderr, "%s: %s\n", what, attn_result_string(r));
    exit(2);
}

static void need(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    exit(2);
}

/* Of the device, or of the host where copies to the device are asynchronous. */
template <class T> static T *buffer(size_t n, bool on_host = false) {
    void *p = NULL;
    need(on_host ? cudaMallocHost(&p, n * sizeof(T)) : cudaMalloc(&p, n * sizeof(T)), "memory");
    return (T *)p;
}

static std::vector<bf16> noise(size_t n, uint32_t state, float largest) {
    std::vector<bf16> x(n);
    for (bf16 &y : x) {
        state = state * 1664525u + 1013904223u;
        y = (bf16)(largest * ((float)(state >> 8) / 8388608.0f - 1.0f));
    }
    return x;
}

/* The prompt's projections, host and device. */
struct prompt {
    std::vector<bf16> q = noise(LEN * Q_ROW, 1, 1), k = noise(LEN * KV_ROW, 2, 2),
                      v = noise(LEN * KV_ROW, 3, 1);
    bf16 *dq, *dk, *dv;
};

static bf16 *to_device(const std::vector<bf16> &x) {
    bf16 *p = buffer<bf16>(x.size());
    need(cudaMemcpy(p, x.data(), x.size() * sizeof(bf16), cudaMemcpyHostToDevice), "copy");
    return p;
}

struct engine {
    attn_cuda c;
    attn_desc d;
    attn_plan *plan;
    attn_plan_params params;
    attn_cuda_plan g;
    size_t bytes;
    char *staging[2], *partials;
    cudaEvent_t uploaded[2];
    cudaStream_t s;
    int32_t q_start[2], kv_len, table[PAGES];
    std::vector<char> plan_mem;
};

/* The plan is sized for the largest chunk at the full length, then updated chunk by chunk. */
static void open_engine(engine *e, const attn_mask *mask) {
    attn_desc *d = &e->d;
    e->c = attn_cuda();
    need(attn_cuda_open(&e->c, 0), "opening the device");
    need(cudaStreamCreate(&e->s), "stream");
    e->c.error = buffer<int32_t>(1);
    need(cudaMemset(e->c.error, 0, sizeof(int32_t)), "memory");
    for (int j = 0; j < PAGES; j++) e->table[j] = (7 * j + 3) % PAGES; /* any pages, any order */
    e->q_start[0] = 0;
    e->q_start[1] = CHUNK;
    e->kv_len = LEN;
    *d = attn_desc();
    d->n_seq = 1;
    d->n_heads = HEADS;
    d->n_kv_heads = KV_HEADS;
    d->head_dim = DIM;
    d->q_start = e->q_start;
    d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = ATTN_BF16;
    d->kv.layout = ATTN_HEAD_MAJOR;
    d->kv.page_tokens = PAGE;
    d->kv.n_pages = PAGES;
    d->kv.page_table = e->table;
    d->kv.page_table_stride = PAGES;
    d->kv.kv_len = &e->kv_len;
    d->kv.k.data = buffer<char>(attn_kv_page_bytes(d, 0) * PAGES);
    d->kv.v.data = buffer<char>(attn_kv_page_bytes(d, 1) * PAGES);
    d->q.data = buffer<bf16>(CHUNK * Q_ROW);
    d->o.data = buffer<bf16>(CHUNK * Q_ROW);
    d->mask = *mask;
    attn_cuda_plan_params(&e->c, d, &e->params);
    size_t bytes = attn_plan_bytes(d, &e->params);
    e->plan_mem.resize(bytes + 64);
    uintptr_t at = ((uintptr_t)e->plan_mem.data() + 63) / 64 * 64;
    need(attn_plan_build(d, &e->params, (void *)at, bytes, &e->plan), "plan");
    e->bytes = attn_cuda_plan_bytes(&e->c, d, &e->params);
    need(attn_cuda_plan_init(&e->c, d, &e->params, buffer<char>(e->bytes), e->bytes, &e->g),
         "plan");
    e->partials = buffer<char>(e->params.partial_bytes + 64);
    for (int i = 0; i < 2; i++) {
        e->staging[i] = buffer<char>(e->bytes, true);
        need(cudaEventCreate(&e->uploaded[i]), "event");
        need(cudaEventRecord(e->uploaded[i], e->s), "event");
    }
}

/* All chunks; out (LEN, HEADS, DIM): device. */
static void prefill(engine *e, const prompt *p, bf16 *out) {
    for (int at = 0, turn = 0; at < LEN; at += CHUNK, turn = !turn) {
        attn_tensor k = {p->dk + at * KV_ROW, ATTN_BF16, 0, 0};
        attn_tensor v = {p->dv + at * KV_ROW, ATTN_BF16, 0, 0};
        e->kv_len = at + CHUNK;
        e->d.q.data = p->dq + at * Q_ROW;
        e->d.o.data = out + at * Q_ROW;
        need(attn_plan_update(e->plan, &e->d, NULL), "plan");
        need(cudaEventSynchronize(e->uploaded[turn]), "upload"); /* staging is free again */
        need(attn_cuda_upload(&e->c, &e->d, e->plan, &e->g, e->staging[turn], e->bytes, e->s),
             "upload");
        need(cudaEventRecord(e->uploaded[turn], e->s), "event");
        need(attn_cuda_store(&e->c, &e->d, &e->g, &k, &v, NULL, 0, CHUNK, e->s), "store");
        need(attn_cuda_run(&e->c, &e->d, &e->g, e->partials, e->params.partial_bytes, e->s),
             "run");
    }
}

/* Root of the mean square of the error, relative to that of the reference. */
static double error_of(const engine *e, prompt *p, const bf16 *out) {
    int32_t q_start[2] = {0, CHECKED}, kv_len;
    std::vector<double> want(CHECKED * Q_ROW);
    double wrong = 0, sum = 0;
    attn_desc d = e->d;
    d.q_start = q_start;
    d.kv.kv_len = &kv_len;
    d.kv.layout = ATTN_TOKEN_MAJOR; /* one long page */
    d.kv.page_table = NULL;
    d.kv.page_tokens = LEN;
    d.kv.n_pages = 1;
    d.kv.k.data = p->k.data();
    d.kv.v.data = p->v.data();
    for (kv_len = CHUNK; kv_len <= LEN; kv_len += CHUNK) {
        d.q.data = &p->q[(kv_len - CHECKED) * Q_ROW];
        need(attn_ref_forward(&d, want.data(), NULL), "reference");
        for (size_t i = 0; i < want.size(); i++) {
            double x = (double)(float)out[(kv_len - CHECKED) * Q_ROW + i] - want[i];
            wrong += x * x;
            sum += want[i] * want[i];
        }
    }
    return sqrt(wrong / sum);
}

static int check(const char *name, const attn_mask *mask, prompt *p) {
    const double bound = ldexp(1, -8); /* weights and output are rounded to bf16: its spacing */
    engine e;
    cudaEvent_t begin, end;
    std::vector<bf16> host(LEN * Q_ROW);
    int32_t error = 0;
    float ms = 0;
    bf16 *out = buffer<bf16>(LEN * Q_ROW);
    open_engine(&e, mask);
    need(cudaEventCreate(&begin), "event");
    need(cudaEventCreate(&end), "event");
    prefill(&e, p, out); /* warms up */
    need(cudaMemsetAsync(out, 0xff, host.size() * sizeof(bf16), e.s), "memory");
    need(cudaEventRecord(begin, e.s), "event");
    prefill(&e, p, out);
    need(cudaEventRecord(end, e.s), "event");
    need(cudaMemcpyAsync(host.data(), out, host.size() * sizeof(bf16), cudaMemcpyDeviceToHost, e.s),
         "copy");
    need(cudaMemcpyAsync(&error, e.c.error, sizeof error, cudaMemcpyDeviceToHost, e.s), "copy");
    need(cudaStreamSynchronize(e.s), "the device");
    need((attn_result)error, "the kernels");
    need(cudaEventElapsedTime(&ms, begin, end), "event");
    double wrong = error_of(&e, p, host.data());
    printf("%s, %s: %d tokens in chunks of %d, %.1f us a chunk; error %.1e, %.1e allowed: %s\n",
           attn_cuda_executor(&e.c, &e.d), name, LEN, CHUNK, 1e3 * ms / (LEN / CHUNK), wrong, bound,
           wrong <= bound ? "ok" : "WRONG");
    return wrong <= bound ? 0 : 1;
}

int main(int argc, char **argv) {
    static const char *const names[] = {"causal", "stride", "slash"};
    /* columns and diagonals in blocks of 64 tokens, the same for all heads */
    static const int64_t col_start[] = {0, 2}, diag_start[] = {0, 4};
    static const int32_t col[] = {0, 9}, diag[] = {0, 1, 5, 20};
    attn_mask masks[3] = {attn_mask(), attn_mask(), attn_mask()};
    prompt p;
    int wrong = 0;
    masks[1].stride.block = 64; /* the last 4 blocks and every 8th, by head */
    masks[1].stride.local = 4;
    masks[1].stride.stride = 8;
    masks[2].vslash.block = 64;
    masks[2].vslash.n_lists = 1;
    masks[2].vslash.col_start = col_start;
    masks[2].vslash.col = col;
    masks[2].vslash.diag_start = diag_start;
    masks[2].vslash.diag = diag;
    for (int a = 1; a < argc; a++) {
        int known = 0;
        for (const char *name : names) known |= !strcmp(argv[a], name);
        if (!known) {
            fprintf(stderr, "usage: cuda_prefill [causal|stride|slash]...\n");
            return 2;
        }
    }
    p.dq = to_device(p.q);
    p.dk = to_device(p.k);
    p.dv = to_device(p.v);
    for (int i = 0; i < 3; i++) {
        int wanted = argc == 1;
        for (int a = 1; a < argc; a++) wanted |= !strcmp(argv[a], names[i]);
        if (wanted) wrong |= check(names[i], &masks[i], &p);
    }
    need(cudaDeviceReset(), "closing the device"); /* gives back all that it has */
    return wrong;
}
