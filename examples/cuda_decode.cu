/* nvcc -O3 -arch=native -I. examples/cuda_decode.cu -o cuda_decode
 *
 * Decode of a small batch on a GPU, over paged KV of which all sequences share the first part: each
 * step stores one token per sequence, plans, uploads, attends. The last step is compared with the
 * reference, which has every sequence's KV in one piece of host memory, shared with nobody.
 *     cuda_decode [f16|bf16] */
#define ATTN_CUDA_KERNELS(X) X(1, 0, 128, 128) X(0, 0, 128, 128) /* all that this program needs */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cuda.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

enum { SEQS = 8, HEADS = 16, KV_HEADS = 4, DIM = 128, PAGE = 32, SHARED = 32 * PAGE, STEPS = 100,
       OWN_PAGES = 8, TABLE = SHARED / PAGE + OWN_PAGES, PAGES = SHARED / PAGE + SEQS * OWN_PAGES,
       ROW = KV_HEADS * DIM, WARM_UP = 10 };

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

template <class T> static void to_device(T *to, const T *from, size_t n, cudaStream_t s) {
    need(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyHostToDevice, s), "copy");
}

/* The model's stand-in: K (what = 0), V or Q of a sequence's token at a position. The shared part
 * is that of sequence 0. */
template <class T> static void token_row(T *row, int n, int what, int seq, int pos) {
    uint32_t x = (uint32_t)(what + 3 * (pos < SHARED ? 0 : seq) + 29 * pos) * 2654435761u;
    for (int i = 0; i < n; i++, x = x * 1664525u + 1013904223u)
        row[i] = (T)((what == 0 ? 2 : 1) * ((float)(x >> 8) / 8388608.0f - 1.0f));
}

struct engine {
    attn_cuda c;
    attn_desc d;
    attn_plan *plan;
    attn_plan_params params;
    attn_cuda_plan g;
    size_t bytes;            /* of the plan's image and of a staging buffer */
    char *staging[2], *partials;
    cudaEvent_t uploaded[2]; /* a staging buffer is free again */
    cudaStream_t s;
    int32_t q_start[SEQS + 1], kv_len[SEQS], table[SEQS * TABLE];
    std::vector<char> plan_mem;
};

/* Shapes, tables and pages. The first pages are everybody's; then each sequence has its own. */
static void describe(engine *e, attn_dtype type) {
    attn_desc *d = &e->d;
    *d = attn_desc();
    for (int i = 0; i <= SEQS; i++) e->q_start[i] = i; /* one new token each */
    for (int i = 0; i < SEQS * TABLE; i++) {
        int seq = i / TABLE, j = i % TABLE;
        e->table[i] = j < SHARED / PAGE ? j : j + seq * OWN_PAGES;
        e->kv_len[seq] = SHARED + 20 * seq; /* held before the first step */
    }
    d->n_seq = SEQS;
    d->n_heads = HEADS;
    d->n_kv_heads = KV_HEADS;
    d->head_dim = DIM;
    d->q_start = e->q_start;
    d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = type;
    d->kv.layout = ATTN_HEAD_MAJOR;
    d->kv.page_tokens = PAGE;
    d->kv.n_pages = PAGES;
    d->kv.page_table = e->table;
    d->kv.page_table_stride = TABLE;
    d->kv.kv_len = e->kv_len;
    d->kv.k.data = buffer<char>(attn_kv_page_bytes(d, 0) * PAGES);
    d->kv.v.data = buffer<char>(attn_kv_page_bytes(d, 1) * PAGES);
}

/* One plan for all steps: lengths change, and now and then a span of KV begins. */
static void open_plan(engine *e) {
    attn_cuda_plan_params(&e->c, &e->d, &e->params);
    e->params.max_kv_len = TABLE * PAGE;
    size_t bytes = attn_plan_bytes(&e->d, &e->params);
    e->plan_mem.resize(bytes + 64);
    uintptr_t at = ((uintptr_t)e->plan_mem.data() + 63) / 64 * 64;
    need(attn_plan_build(&e->d, &e->params, (void *)at, bytes, &e->plan), "plan");
    e->bytes = attn_cuda_plan_bytes(&e->c, &e->d, &e->params);
    need(attn_cuda_plan_init(&e->c, &e->d, &e->params, buffer<char>(e->bytes), e->bytes, &e->g),
         "plan");
    e->partials = buffer<char>(e->params.partial_bytes + 64);
    for (int i = 0; i < 2; i++) {
        e->staging[i] = buffer<char>(e->bytes, true);
        need(cudaEventCreate(&e->uploaded[i]), "event");
    }
}

/* Prompts: the shared part is stored once, with sequence 0. */
template <class T> static void store_prompts(engine *e, attn_dtype type) {
    const int most = TABLE * PAGE;
    std::vector<T> rows(2 * most * ROW);
    std::vector<int64_t> places(most);
    attn_tensor k = {buffer<T>(most * ROW), type, 0, 0}, v = {buffer<T>(most * ROW), type, 0, 0};
    int64_t *slots = buffer<int64_t>(most);
    for (int i = 0; i < SEQS; i++) {
        int from = i ? SHARED : 0, n = e->kv_len[i] - from;
        for (int t = 0; t < n; t++) {
            int at = from + t;
            places[t] = (int64_t)e->table[i * TABLE + at / PAGE] * PAGE + at % PAGE;
            token_row(&rows[t * ROW], ROW, 0, i, at);
            token_row(&rows[(most + t) * ROW], ROW, 1, i, at);
        }
        to_device((T *)k.data, rows.data(), n * ROW, e->s);
        to_device((T *)v.data, rows.data() + most * ROW, n * ROW, e->s);
        to_device(slots, places.data(), n, e->s);
        need(attn_cuda_store(&e->c, &e->d, NULL, &k, &v, slots, 0, n, e->s), "store");
    }
}

/* q, k, v: device, a row for each sequence. An engine runs store and run once per layer. */
static void decode_step(engine *e, int step, void *q, attn_tensor k, attn_tensor v) {
    for (int i = 0; i < SEQS; i++) e->kv_len[i]++;
    e->d.q.data = q;
    need(attn_plan_update(e->plan, &e->d, NULL), "plan");
    if (step >= 2) need(cudaEventSynchronize(e->uploaded[step % 2]), "upload");
    need(attn_cuda_upload(&e->c, &e->d, e->plan, &e->g, e->staging[step % 2], e->bytes, e->s),
         "upload");
    need(cudaEventRecord(e->uploaded[step % 2], e->s), "event");
    need(attn_cuda_store(&e->c, &e->d, &e->g, &k, &v, NULL, 0, SEQS, e->s), "store");
    need(attn_cuda_run(&e->c, &e->d, &e->g, e->partials, e->params.partial_bytes, e->s), "run");
}

/* Root of the mean square of the error relative to that of the reference, which finds the KV of
 * sequence i in page i of host memory. q, out: host. */
template <class T> static double error_of(const engine *e, T *q, T *out) {
    const int most = TABLE * PAGE;
    std::vector<T> k((size_t)SEQS * most * ROW), v(k.size());
    std::vector<double> want(SEQS * HEADS * DIM);
    double wrong = 0, sum = 0;
    for (int i = 0; i < SEQS; i++)
        for (int t = 0; t < e->kv_len[i]; t++) {
            token_row(&k[((size_t)i * most + t) * ROW], ROW, 0, i, t);
            token_row(&v[((size_t)i * most + t) * ROW], ROW, 1, i, t);
        }
    attn_desc d = e->d;
    d.q.data = q;
    d.o.data = out;
    d.kv.layout = ATTN_TOKEN_MAJOR;
    d.kv.page_table = NULL;
    d.kv.page_tokens = most;
    d.kv.n_pages = SEQS;
    d.kv.k.data = k.data();
    d.kv.v.data = v.data();
    need(attn_ref_forward(&d, want.data(), NULL), "reference");
    for (size_t i = 0; i < want.size(); i++) {
        double x = (double)(float)out[i] - want[i];
        wrong += x * x;
        sum += want[i] * want[i];
    }
    return sqrt(wrong / sum);
}

template <class T> static int decode(attn_dtype type, double bound) {
    engine e;
    cudaEvent_t begin, end;
    float ms = 0;
    int32_t error = 0;
    e.c = attn_cuda();
    need(attn_cuda_open(&e.c, 0), "opening the device");
    need(cudaStreamCreate(&e.s), "stream");
    need(cudaEventCreate(&begin), "event");
    need(cudaEventCreate(&end), "event");
    e.c.error = buffer<int32_t>(1);
    need(cudaMemset(e.c.error, 0, sizeof error), "memory");
    describe(&e, type);
    const size_t n_q = SEQS * HEADS * DIM, n_kv = SEQS * ROW;
    std::vector<T> all_q(STEPS * n_q), all_k(STEPS * n_kv), all_v(STEPS * n_kv), out(n_q);
    for (int i = 0; i < STEPS * SEQS; i++) {
        int seq = i % SEQS, pos = e.kv_len[seq] + i / SEQS;
        token_row(&all_k[i * ROW], ROW, 0, seq, pos);
        token_row(&all_v[i * ROW], ROW, 1, seq, pos);
        token_row(&all_q[i * HEADS * DIM], HEADS * DIM, 2, seq, pos);
    }
    T *q = buffer<T>(STEPS * n_q), *k = buffer<T>(STEPS * n_kv), *v = buffer<T>(STEPS * n_kv);
    to_device(q, all_q.data(), STEPS * n_q, e.s);
    to_device(k, all_k.data(), STEPS * n_kv, e.s);
    to_device(v, all_v.data(), STEPS * n_kv, e.s);
    e.d.q.data = q;
    e.d.o.data = buffer<T>(n_q);
    open_plan(&e);
    store_prompts<T>(&e, type);

    for (int step = 0; step < STEPS; step++) {
        if (step == WARM_UP) need(cudaEventRecord(begin, e.s), "event");
        attn_tensor new_k = {k + step * n_kv, type, 0, 0}, new_v = {v + step * n_kv, type, 0, 0};
        decode_step(&e, step, q + step * n_q, new_k, new_v);
    }
    need(cudaEventRecord(end, e.s), "event");
    need(cudaMemcpyAsync(out.data(), e.d.o.data, n_q * sizeof(T), cudaMemcpyDeviceToHost, e.s),
         "copy");
    need(cudaMemcpyAsync(&error, e.c.error, sizeof error, cudaMemcpyDeviceToHost, e.s), "copy");
    need(cudaStreamSynchronize(e.s), "the device");
    need((attn_result)error, "the kernels");
    need(cudaEventElapsedTime(&ms, begin, end), "event");
    double wrong = error_of(&e, &all_q[(STEPS - 1) * n_q], out.data());
    printf("%s: %d sequences of %d to %d tokens, the first %d shared, %.1f us a step; error %.1e, "
           "%.1e allowed: %s\n",
           attn_cuda_executor(&e.c, &e.d), SEQS, e.kv_len[0], e.kv_len[SEQS - 1], SHARED,
           1e3 * ms / (STEPS - WARM_UP), wrong, bound, wrong <= bound ? "ok" : "WRONG");
    need(cudaDeviceReset(), "closing the device"); /* gives back all that it has */
    return wrong <= bound ? 0 : 1;
}

int main(int argc, char **argv) {
    bool f16 = argc == 2 && !strcmp(argv[1], "f16");
    if (argc > 2 || (argc == 2 && !f16 && strcmp(argv[1], "bf16"))) {
        fprintf(stderr, "usage: cuda_decode [f16|bf16]\n");
        return 2;
    }
    /* the weights and the output are rounded to the type: its spacing bounds the error */
    if (f16) return decode<__half>(ATTN_F16, ldexp(1, -11));
    return decode<__nv_bfloat16>(ATTN_BF16, ldexp(1, -8));
}
