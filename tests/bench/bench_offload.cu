/* bench_offload.cu - KV offload: pages in host memory behind a cache, against the same pages in
   device memory. bf16, GQA 32/8, D = 128, pages of 64 tokens in shuffled order.
   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I. -Itests \
       tests/bench/bench_offload.cu -o bench_offload
   bench_offload [TOKENS of each of 8 sequences, default 16384]

   A time is that of a CUDA graph of several runs. Bits are compared with those of the plain run
   before anything is timed. bus: bytes without a copy, over the time. */
#define ATTN_IMPLEMENTATION
#define ATTN_STATIC
#ifndef ATTN_CUDA_KERNELS
#define ATTN_CUDA_KERNELS(X) X(1, 0, 128, 128)
#endif
#include "attn.h"
#include "attn_cuda.cuh"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <vector>

enum { SEQS = 8, HEADS = 32, KV_HEADS = 8, DIM = 128, PAGE = 64, BLOCK = 64, LISTED = 2048 };

static attn_cuda cuda;
static cudaStream_t stream;
static cudaEvent_t event[2];
static uint64_t rng = 1;

#define CU(call)                                                                                   \
    do {                                                                                           \
        cudaError_t cu_ = (call);                                                                  \
        if (cu_ != cudaSuccess) {                                                                  \
            fprintf(stderr, "bench_offload: %s: %s\n", #call, cudaGetErrorString(cu_));            \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)
#define OK(call)                                                                                   \
    do {                                                                                           \
        attn_result ok_ = (call);                                                                  \
        if (ok_ != ATTN_OK) {                                                                      \
            fprintf(stderr, "bench_offload: %s: %s\n", #call, attn_result_string(ok_));            \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)

static uint32_t draw(uint32_t below) {
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((rng >> 33) % below);
}

__global__ void fill(uint16_t *x, size_t n, uint32_t seed) { // bf16 in (-2, 2)
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = ((uint32_t)i ^ seed) * 2654435761u;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
        x[i] = (uint16_t)((h & 0x80ff) | 0x3f00);
    }
}

static double elapsed_us(void) {
    float ms;
    CU(cudaEventRecord(event[1], stream));
    CU(cudaEventSynchronize(event[1]));
    CU(cudaEventElapsedTime(&ms, event[0], event[1]));
    return 1e3 * ms;
}

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

typedef struct bench {
    attn_desc d;
    std::vector<int32_t> q_start, kv_len, table, block, seq_row;
    std::vector<int64_t> row_start;
    attn_plan_params params;
    attn_plan *plan;
    attn_cuda_plan g;
    void *mem, *image, *staging, *partials;
    size_t bytes;
} bench;

// what: 0 decode, 1 decode over lists, 2 a chunk of a prefill
static void bench_make(bench *b, int what, int32_t tokens, const attn_kv_cache *laid_out) {
    attn_desc *d = &b->d;
    const int32_t n = what == 2 ? 1 : SEQS, per = tokens / PAGE, q = what == 2 ? 2048 : 1;
    void *p;
    memset(d, 0, sizeof *d);
    for (int32_t s = 0; s <= n; s++) b->q_start.push_back(s * q);
    for (int32_t s = 0; s < n; s++) b->kv_len.push_back(tokens);
    for (int32_t i = 0; i < SEQS * per; i++) b->table.push_back(i);
    for (int32_t i = SEQS * per - 1; i > 0; i--)
        std::swap(b->table[(size_t)i], b->table[draw((uint32_t)i + 1)]);
    d->n_seq = n, d->q_start = b->q_start.data(), d->kv.kv_len = b->kv_len.data();
    d->n_heads = HEADS, d->n_kv_heads = KV_HEADS, d->head_dim = DIM;
    d->kv.layout = ATTN_HEAD_MAJOR, d->kv.page_tokens = PAGE, d->kv.n_pages = SEQS * per;
    d->kv.page_table = b->table.data(), d->kv.page_table_stride = per;
    d->kv.k.dtype = d->kv.v.dtype = d->q.dtype = d->o.dtype = ATTN_BF16;
    CU(cudaMalloc(&p, (size_t)n * (size_t)q * HEADS * DIM * 2));
    d->q.data = p;
    fill<<<64, 256, 0, stream>>>((uint16_t *)p, (size_t)n * (size_t)q * HEADS * DIM, 7);
    CU(cudaMalloc(&p, (size_t)n * (size_t)q * HEADS * DIM * 2));
    d->o.data = p;
    if (what == 1) { // a row for each sequence, its blocks drawn from runs of equal length
        const int32_t keep = LISTED / BLOCK, run = tokens / BLOCK / keep;
        b->row_start.push_back(0);
        for (int32_t s = 0; s < n; s++) {
            for (int32_t i = 0; i < keep; i++)
                b->block.push_back(i == keep - 1 ? tokens / BLOCK - 1
                                                 : i * run + (int32_t)draw((uint32_t)run));
            b->row_start.push_back((int64_t)b->block.size());
            b->seq_row.push_back(s - (tokens - 1) / BLOCK);
        }
        d->mask.blocks.row_block = d->mask.blocks.kv_block = BLOCK;
        d->mask.blocks.n_lists = 1, d->mask.blocks.n_rows = n;
        d->mask.blocks.row_start = b->row_start.data(), d->mask.blocks.block = b->block.data();
        d->mask.blocks.seq_row = b->seq_row.data();
    }
    d->kv.k.data = d->kv.v.data = (void *)256; // not looked at
    d->kv.v.data = (void *)512;
    d->kv.cache = laid_out;
    attn_cuda_plan_params(&cuda, d, &b->params);
    b->bytes = attn_plan_bytes(d, &b->params);
    CU(cudaMallocHost(&b->mem, b->bytes));
    OK(attn_plan_build(d, &b->params, b->mem, b->bytes, &b->plan));
    b->bytes = attn_cuda_plan_bytes(&cuda, d, &b->params);
    CU(cudaMalloc(&b->image, b->bytes));
    CU(cudaMallocHost(&b->staging, b->bytes));
    CU(cudaMalloc(&b->partials, b->params.partial_bytes));
    OK(attn_cuda_plan_init(&cuda, d, &b->params, b->image, b->bytes, &b->g));
    OK(attn_cuda_upload(&cuda, d, b->plan, &b->g, b->staging, b->bytes, stream));
    CU(cudaStreamSynchronize(stream));
}

static double time_runs(const bench *b, const attn_desc *d, int n) {
    cudaGraph_t graph;
    cudaGraphExec_t run;
    std::vector<double> v;
    CU(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n; i++)
        OK(attn_cuda_run(&cuda, d, &b->g, b->partials, b->params.partial_bytes, stream));
    CU(cudaStreamEndCapture(stream, &graph));
    CU(cudaGraphInstantiate(&run, graph, 0));
    for (int i = -1; i < 7; i++) {
        CU(cudaEventRecord(event[0], stream));
        CU(cudaGraphLaunch(run, stream));
        const double us = elapsed_us() / n;
        if (i >= 0) v.push_back(us);
    }
    CU(cudaGraphExecDestroy(run));
    CU(cudaGraphDestroy(graph));
    return median(v);
}

// Bytes of K and V that a run reads from pages without a copy.
static double bus_bytes(const bench *b, const std::vector<int32_t> &slot) {
    const int32_t per = (int32_t)b->d.kv.page_table_stride;
    double n = 0;
    if (b->d.mask.blocks.row_start) {
        for (int32_t s = 0; s < b->d.n_seq; s++)
            for (int64_t e = b->row_start[(size_t)s]; e < b->row_start[(size_t)s + 1]; e++)
                n += slot[(size_t)b->table[(size_t)(s * per + b->block[(size_t)e])]] < 0;
    } else
        for (int32_t i = 0; i < b->d.n_seq * per; i++)
            n += slot[(size_t)b->table[(size_t)i]] < 0;
    return n * PAGE * KV_HEADS * DIM * 2 * 2;
}

static void compare(const char *name, bench *b, const attn_desc *plain, attn_desc d,
                    std::vector<int32_t> &slot, attn_kv_cache *cache, int n, int n_shares,
                    const double *shares) {
    const size_t o_bytes = (size_t)b->q_start.back() * HEADS * DIM * 2;
    std::vector<uint8_t> want(o_bytes), got(o_bytes);
    const int32_t n_pages = d.kv.n_pages;
    const double base = time_runs(b, plain, n);
    printf("%-14s %-28s %10.1f us\n", name, "in device memory", base);
    CU(cudaMemcpy(want.data(), plain->o.data, o_bytes, cudaMemcpyDeviceToHost));
    for (int i = 0; i < n_shares; i++) {
        char text[64];
        for (int32_t p = 0; p < n_pages; p++) // each in a slot of its own
            slot[(size_t)p] = draw(1000) < (uint32_t)(shares[i] * 1000) ? p : -1;
        CU(cudaMemcpy((void *)(uintptr_t)cache->slot, slot.data(), 4 * (size_t)n_pages,
                      cudaMemcpyHostToDevice));
        CU(cudaMemset(d.o.data, 0xff, o_bytes));
        OK(attn_cuda_run(&cuda, &d, &b->g, b->partials, b->params.partial_bytes, stream));
        CU(cudaStreamSynchronize(stream));
        CU(cudaMemcpy(got.data(), d.o.data, o_bytes, cudaMemcpyDeviceToHost));
        const int same = want == got;
        const int runs = shares[i] < 0.9 ? 1 : n;
        const double us = same ? time_runs(b, &d, runs) : 0, bus = bus_bytes(b, slot);
        attn_kv_cache counting = *cache;
        attn_desc e = d;
        e.kv.cache = &counting;
        snprintf(text, sizeof text, "%5.1f %% of pages cached", 100 * shares[i]);
        printf("%-14s %-28s %10.1f us  x %.3f  bus %.1f GB/s%s", name, text, us, us / base,
               us > 0 ? bus / us / 1e3 : 0, same ? "" : "  WRONG");
        counting.reads = (uint32_t *)(uintptr_t)cache->slot + n_pages;
        if (shares[i] > 0.9 && same) printf("  with counts %.1f us", time_runs(b, &e, runs));
        printf("\n");
    }
}

// Copies of pages: by the kernel, and by the copy engine one page at a time.
static void loads(attn_desc d, int32_t n) {
    std::vector<attn_cache_load> l;
    std::vector<double> v, w;
    const size_t page = (size_t)PAGE * KV_HEADS * DIM * 2;
    for (int32_t i = 0; i < n; i++) {
        attn_cache_load one;
        one.page = (int32_t)draw((uint32_t)d.kv.n_pages), one.slot = i;
        l.push_back(one);
    }
    for (int i = -1; i < 7; i++) {
        CU(cudaEventRecord(event[0], stream));
        OK(attn_cuda_cache_load(&cuda, &d, l.data(), n, stream));
        const double us = elapsed_us();
        if (i >= 0) v.push_back(us);
        CU(cudaEventRecord(event[0], stream));
        for (int32_t k = 0; k < 2 * n; k++)
            CU(cudaMemcpyAsync(
                (uint8_t *)(k & 1 ? d.kv.cache->v : d.kv.cache->k) + (size_t)(k / 2) * page,
                (uint8_t *)(k & 1 ? d.kv.v.data : d.kv.k.data) +
                    (size_t)l[(size_t)(k / 2)].page * page,
                page, cudaMemcpyHostToDevice, stream));
        const double engine = elapsed_us();
        if (i >= 0) w.push_back(engine);
    }
    printf("loads          %4d pages: attn_cuda_cache_load %8.1f us, %5.1f GB/s; cudaMemcpyAsync "
           "%8.1f us, %5.1f GB/s\n",
           n, median(v), 2e-3 * (double)page * n / median(v), median(w),
           2e-3 * (double)page * n / median(w));
}

// One decode step's rows, and 2048 tokens, into device pages and into host pages.
static void stores(const attn_desc *plain, const attn_desc *d) {
    static const int32_t counts[] = {8, 2048};
    for (int i = 0; i < 2; i++) {
        const int32_t n = counts[i];
        std::vector<int64_t> slots;
        std::vector<double> v[2];
        attn_tensor k;
        int64_t *there;
        memset(&k, 0, sizeof k);
        k.dtype = ATTN_BF16;
        CU(cudaMalloc(&k.data, (size_t)n * KV_HEADS * DIM * 2));
        CU(cudaMemset(k.data, 0, (size_t)n * KV_HEADS * DIM * 2));
        for (int32_t t = 0; t < n; t++)
            slots.push_back(n == 8 ? (int64_t)t * PAGE + 5 : t); // whole pages in prefill
        CU(cudaMalloc(&there, 8 * (size_t)n));
        CU(cudaMemcpy(there, slots.data(), 8 * (size_t)n, cudaMemcpyHostToDevice));
        for (int r = -1; r < 7; r++)
            for (int w = 0; w < 2; w++) {
                CU(cudaEventRecord(event[0], stream));
                OK(attn_cuda_store(&cuda, w ? d : plain, NULL, &k, &k, there, 0, n, stream));
                const double us = elapsed_us();
                if (r >= 0) v[w].push_back(us);
            }
        printf("store          %4d tokens: device %.1f us, host and copies %.1f us (%.1f GB/s)\n",
               n, median(v[0]), median(v[1]), 4e-3 * n * KV_HEADS * DIM / median(v[1]));
        CU(cudaFree(there));
        CU(cudaFree(k.data));
    }
}

int main(int argc, char **argv) {
    static const double decode[] = {1, .99, .95, 0}, prefill[] = {1};
    const int32_t tokens = argc > 1 ? atoi(argv[1]) : 16384, n_pages = SEQS * tokens / PAGE;
    const size_t side = (size_t)n_pages * PAGE * KV_HEADS * DIM * 2;
    attn_kv_cache cache;
    std::vector<int32_t> slot((size_t)n_pages, -1);
    void *host[2], *device[2], *words;
    cudaDeviceProp prop;
    OK(attn_cuda_open(&cuda, 0));
    CU(cudaGetDeviceProperties(&prop, 0));
    CU(cudaStreamCreate(&stream));
    CU(cudaEventCreate(&event[0]));
    CU(cudaEventCreate(&event[1]));
    memset(&cache, 0, sizeof cache);
    for (int v = 0; v < 2; v++) {
        CU(cudaMallocHost(&host[v], side));
        CU(cudaMalloc(&device[v], side));
        fill<<<1024, 256, 0, stream>>>((uint16_t *)device[v], side / 2, (uint32_t)(v + 1) << 20);
        CU(cudaMemcpyAsync(host[v], device[v], side, cudaMemcpyDeviceToHost, stream));
        *(v ? &cache.v : &cache.k) = device[v]; // page p in slot p: the plain pages are the copies
    }
    CU(cudaMalloc(&words, 8 * (size_t)n_pages)); // slots, reads
    CU(cudaMemset(words, 0, 8 * (size_t)n_pages));
    CU(cudaStreamSynchronize(stream));
    cache.n_slots = n_pages;
    cache.slot = (const int32_t *)words;
    printf("%s: %d sequences of %d tokens, %.0f MB of K and V\n", prop.name, SEQS, tokens,
           2e-6 * (double)side);
    for (int what = 0; what < 3; what++) {
        static const char *const names[] = {"decode", "decode, lists", "prefill 2048"};
        bench b;
        attn_desc plain, off;
        bench_make(&b, what, tokens, &cache);
        plain = off = b.d;
        plain.kv.cache = NULL;
        plain.kv.k.data = device[0], plain.kv.v.data = device[1];
        off.kv.k.data = host[0], off.kv.v.data = host[1];
        compare(names[what], &b, &plain, off, slot, &cache, what == 2 ? 3 : 10,
                what == 2 ? 1 : 4, what == 2 ? prefill : decode);
        if (what < 2) continue;
        loads(off, 16);
        loads(off, 256);
        loads(off, attni_min32(n_pages, 1024));
        stores(&plain, &off);
    }
    return 0;
}
