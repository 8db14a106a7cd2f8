/* bench_cuda.cu - attn_cuda.cuh against the GPU's ceilings and the project's targets, in one table.
   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I. -Itests \
       tests/bench/bench_cuda.cu -o bench_cuda
   bench_cuda [--quick] [--only decode,prefix,prefill,sparse] [--rows SUBSTRING] [--csv FILE]
              [--capacity X] [--share 0|1|2] [--list] [--plant] [--skip N]

   Every time is that of a CUDA graph which runs one plan over several sets of inputs in turn, as
   the layers of a model: together they exceed the L2 cache several times. Replays alternate with
   samples of the streaming read, and medians are compared. Inputs are random normal; KV lies in
   shuffled pages. What the captured graph wrote is compared with an fp64 kernel below on sampled
   rows before anything is timed: a wrong result is never timed.

   A limit is a time that a row is to stay under, from ceilings of the same run:
     read97, read85   bytes (scales included) at 97 or 85 % of the read rate, from 0.5 GB on
     equal            1.05 x the same number of tokens in sequences of one length
     cascade          FlashInfer's cascade as PERFORMANCE.md lists it x 4.5 TB/s / read rate
     floor            1.5 x (2.5 x below 60 us) the larger of bytes / read rate and FLOPs / dense
                      rate
     kept             1.15 x kept share x own dense time
     cuDNN*, FA2*     as PERFORMANCE.md lists them, decode scaled as cascade; for information
   bench_cuda.py adds the limits of its peers (cuDNN, FA2). --capacity X: the plan has room for X
   times the sequences and lengths. --list: makes and validates every problem; needs no GPU.
   --skip: leaves out the first N rows of each section. --plant: the check gets a wrong page table,
   so that every row must come out as WRONG. */
#define ATTN_IMPLEMENTATION
#define ATTN_STATIC
#ifndef ATTN_CUDA_KERNELS // those that the rows below run on: a fraction of the compile time
#define ATTN_CUDA_KERNELS(X) X(1, 0, 64, 64) X(1, 0, 128, 128) X(1, 1, 128, 128)
#endif
#include "test.h"
#include "attn.h"
#include "attn_cuda.cuh"
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <vector>

#define MAX_SETS 128
#define MAX_REPEATS 32
#define N_SAMPLES 12
#define KV_BYTES ((size_t)7680 << 20)
#define OTHER_BYTES ((size_t)6 << 30)
#define READ_BYTES ((size_t)4 << 30)
#define SETS_BYTES 320e6 // of inputs in rotation; the L2 cache has 50 to 60 MB
#define ERROR_BOUND 1e-2 // relative RMS of a row: bf16 rounds O and the weights by 2^-9 each

#define DIE(...) (fprintf(stderr, "bench_cuda: " __VA_ARGS__), fputc('\n', stderr), exit(2))
#define CU(call)                                                                                   \
    do {                                                                                           \
        cudaError_t cu_ = (call);                                                                  \
        if (cu_ != cudaSuccess) DIE("%s: %s: %s", at_row, #call, cudaGetErrorString(cu_));         \
    } while (0)
#define HD __host__ __device__ static inline

enum pattern { DENSE, BLOCKS, STRIDE, SMALL };

typedef struct row {
    const char *kind;        // decode, prefix, prefill, sparse
    int b, ctx, shared;      // sequences, tokens of each, the first `shared` of them common
    int causal;              // 1: as many queries as tokens; 0: one each
    int hq, hkv, dim;
    attn_dtype kv;
    int page;
    attn_layout layout;
    int ragged;              // lengths are lognormal, b * ctx tokens in all
    int pattern, density, lists; // density: % of the blocks below the diagonal
    int block, keep, sink, recent; // SMALL: tokens of a block, tokens kept by list and otherwise
    double listed_us;        // a peer's time in PERFORMANCE.md; 0: none
} row;

typedef struct limit {
    const char *name;
    double us;
    int judged; // 0: for information
} limit;

typedef struct result {
    char key[160], status[48];
    double us, lo, hi, sustained_us, read; // read: bytes per second, sampled between the replays
    int n_iter, repeats;
    limit limits[4];
    int n_limits;
} result;

static attn_cuda cuda;
static cudaStream_t stream;
static cudaEvent_t event[2];
static char *kv_arena, *other_arena;
static size_t other_at;
static int opt_quick, opt_list, opt_plant, opt_share, opt_skip, n_rows, n_bad, n_missed;
static const char *at_row = "set-up"; // for messages
static double opt_capacity = 1, read_rate, dense_rate; // bytes/s, FLOP/s
static const char *opt_only = "decode,prefix,prefill,sparse", *opt_rows = "";
static FILE *csv;

// ---- patterns, from a counter so that bench_cuda.py draws the same ones

HD uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Random 128 x 128 blocks, the diagonal always kept.
HD int keep_block(int density, int list, int i, int j) {
    uint64_t h = mix64((((uint64_t)list << 40) | ((uint64_t)i << 20) | (uint64_t)j) +
                       0x9e3779b97f4a7c15u * (uint64_t)(density + 1));
    return j == i || (j < i && (h >> 32) * 100 < ((uint64_t)density << 32));
}

enum { STRIDE_BLOCK = 64, STRIDE_LOCAL = 16, STRIDE_STEP = 8, BLOCK = 128 };

// Local-stride over 64 x 64 blocks, heads shifted by one block each.
HD int keep_stride(int head, int i, int j) {
    return j <= i && (i - j < STRIDE_LOCAL || (j + head) % STRIDE_STEP == 0);
}

// SMALL: lists as HiP's, of row blocks of 64 queries: of the blocks between sink and window n are
// kept, one in each of n runs of them. The k-th of list `list` in row block i.
HD int small_room(int i, int block, int sink, int recent) {
    int n = (64 * i - recent) / block - sink / block;
    return n > 0 ? n : 0;
}
HD int small_pick(int list, int i, int k, int n, int room, int first) {
    int lo = (int)((int64_t)k * room / n), hi = (int)((int64_t)(k + 1) * room / n);
    uint64_t h = mix64((((uint64_t)list << 40) | ((uint64_t)i << 20) | (uint64_t)k) + 12345);
    return first + lo + (int)(h % (uint64_t)(hi - lo));
}
HD int keep_small(int list, int i, int j, int n, int room, int first) {
    int k;
    if (n > room) n = room;
    if (j < first || j >= first + room) return 0;
    k = (int)(((int64_t)(j - first + 1) * n - 1) / room);
    return small_pick(list, i, k, n, room, first) == j;
}

static double kept_small(const row *r) {
    double kept = 0, all = 0;
    int p, from = r->causal ? 0 : r->ctx - 1;
    for (p = from; p < r->ctx; p++) {
        int room = small_room(p / 64, r->block, r->sink, r->recent) * r->block;
        int n = r->sink + r->recent + (r->keep < room ? r->keep : room);
        kept += n < p + 1 ? n : p + 1;
        all += p + 1;
    }
    return kept / all;
}

static double kept_share(const row *r) { // of the causal pairs; blocks on the diagonal are half
    int size = r->pattern == STRIDE ? STRIDE_BLOCK : BLOCK, n = r->ctx / size, h, i, j;
    int lists = r->pattern == STRIDE ? r->hkv : r->lists;
    double kept = 0;
    if (r->pattern == DENSE) return 1;
    if (r->pattern == SMALL) return kept_small(r);
    for (h = 0; h < lists; h++)
        for (i = 0; i < n; i++)
            for (j = 0; j <= i; j++)
                if (r->pattern == STRIDE ? keep_stride(h, i, j) : keep_block(r->density, h, i, j))
                    kept += j == i ? 0.5 : 1;
    return kept / (0.5 * n * n * lists);
}

// ---- kernels: inputs, ceilings

__device__ static float normal_at(uint64_t seed, uint64_t i) {
    uint64_t z = mix64(seed * 0x9e3779b97f4a7c15u + i);
    float u = ((float)(uint32_t)(z >> 40) + 0.5f) * (1.0f / 16777216.0f);
    float v = (float)(uint32_t)(z & 0xffffff) * (1.0f / 16777216.0f);
    return sqrtf(fmaxf(0, -2 * __logf(u))) * __cosf(6.2831853f * v); // __logf near 1 may exceed 0
}

__global__ void fill_bf16(__nv_bfloat16 *x, size_t n, uint64_t seed) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i < n; i += (size_t)gridDim.x * blockDim.x) x[i] = __float2bfloat16(normal_at(seed, i));
}

// Pages of 8-bit codes followed by their f32 scales; code * scale is roughly normal.
__global__ void fill_scaled(char *x, size_t n_pages, int64_t page_bytes, int elements, int n_scales,
                            int dtype, uint64_t seed) {
    size_t page = blockIdx.x;
    for (; page < n_pages; page += gridDim.x) {
        char *p = x + page * (size_t)page_bytes;
        int i;
        for (i = (int)threadIdx.x; i < elements; i += (int)blockDim.x) {
            float f = normal_at(seed, page * (size_t)elements + (size_t)i);
            if (dtype == ATTN_I8) {
                ((signed char *)p)[i] = (signed char)rintf(fminf(fmaxf(32 * f, -127), 127));
            } else {
                __nv_fp8_e4m3 c(64 * f);
                p[i] = (char)c.__x;
            }
        }
        for (i = (int)threadIdx.x; i < n_scales; i += (int)blockDim.x)
            ((float *)(p + elements))[i] =
                (dtype == ATTN_I8 ? 1 / 32.0f : 1 / 64.0f) *
                (0.75f + 0.5f * (float)(mix64(seed + page * 977 + (size_t)i) >> 40) / 16777216.0f);
    }
}

template <int UNROLL> __global__ void read_all(const uint4 *x, size_t n, uint32_t *sink) {
    size_t tile = (size_t)blockDim.x * UNROLL, at = blockIdx.x * tile + threadIdx.x;
    uint32_t sum = 0;
    for (; at < n; at += gridDim.x * tile) { // n is a multiple of every tile
        uint4 v[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) v[i] = __ldcs(x + at + (size_t)i * blockDim.x);
#pragma unroll
        for (int i = 0; i < UNROLL; i++) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (sum == 0x12345678) *sink = sum; // keeps the loads; taken or not, nothing depends on it
}

__global__ void empty_kernel(void) {}

// ---- kernels: the check, in fp64 and straight from the definitions

typedef struct view { // one set of inputs
    const char *k, *v;
    const uint16_t *q, *o;
    const int32_t *table;
    int64_t table_stride, page_bytes;
    int page, layout, dtype, hq, hkv, dim, pattern, density, lists;
    int block, keep, sink, recent;
} view;

typedef struct sample {
    int seq, token, pos, head; // token: of all; pos: in its sequence
} sample;

HD double bf16_value(uint16_t b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

HD double kv_value(const view *w, const char *base, int seq, int head, int j, int e) {
    const char *p = base + w->table[seq * w->table_stride + j / w->page] * w->page_bytes;
    int place = j % w->page;
    int64_t line = w->layout == ATTN_TOKEN_MAJOR ? (int64_t)place * w->hkv + head
                                                 : (int64_t)head * w->page + place;
    int64_t at = line * w->dim + e;
    float scale;
    if (w->dtype == ATTN_BF16) return bf16_value(((const uint16_t *)p)[at]);
    memcpy(&scale, p + (int64_t)w->page * w->hkv * w->dim + 4 * line, 4);
    if (w->dtype == ATTN_I8) return (double)((const signed char *)p)[at] * scale;
    __nv_fp8_e4m3 c;
    c.__x = (__nv_fp8_storage_t)p[at];
    return (double)(float)c * scale;
}

HD int sees(const view *w, int head, int pos, int j) {
    int kv_head = head / (w->hq / w->hkv);
    int list = w->lists == w->hq ? head : w->lists == w->hkv ? kv_head : 0;
    if (j > pos) return 0;
    if (w->pattern == BLOCKS) return keep_block(w->density, list, pos / BLOCK, j / BLOCK);
    if (w->pattern == SMALL && (j < w->sink || pos - j < w->recent)) return 1;
    if (w->pattern == SMALL)
        return keep_small(list, pos / 64, j / w->block, w->keep / w->block,
                          small_room(pos / 64, w->block, w->sink, w->recent), w->sink / w->block);
    if (w->pattern == STRIDE)
        return keep_stride(kv_head, pos / STRIDE_BLOCK, j / STRIDE_BLOCK);
    return 1;
}

HD double score(const view *w, const sample *s, int j) {
    int e, kv_head = s->head / (w->hq / w->hkv);
    double sum = 0;
    if (!sees(w, s->head, s->pos, j)) return -1e300;
    for (e = 0; e < w->dim; e++)
        sum += bf16_value(w->q[((int64_t)s->token * w->hq + s->head) * w->dim + e]) *
               kv_value(w, w->k, s->seq, kv_head, j, e);
    return sum / sqrt((double)w->dim);
}

// scores (N_SAMPLES, stride)
__global__ void check_scores(view w, const sample *s, double *scores, int stride) {
    int j = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    sample one = s[blockIdx.y];
    if (j <= one.pos) scores[(size_t)blockIdx.y * stride + j] = score(&w, &one, j);
}

// pairs (N_SAMPLES, dim, 2): the reference and what lies in O. One thread per output element.
__global__ void check_values(view w, const sample *samples, const double *scores, int stride,
                             double *pairs) {
    sample s = samples[blockIdx.x];
    const double *sc = scores + (size_t)blockIdx.x * stride;
    int e = (int)threadIdx.x, j, kv_head = s.head / (w.hq / w.hkv);
    double m = -1e300, l = 0, sum = 0;
    for (j = 0; j <= s.pos; j++) m = fmax(m, sc[j]);
    for (j = 0; j <= s.pos; j++) {
        double p = sc[j] <= -1e300 ? 0 : exp(sc[j] - m);
        if (p == 0) continue;
        l += p;
        sum += p * kv_value(&w, w.v, s.seq, kv_head, j, e);
    }
    pairs[2 * ((size_t)blockIdx.x * w.dim + e)] = sum / l;
    pairs[2 * ((size_t)blockIdx.x * w.dim + e) + 1] =
        bf16_value(w.o[((int64_t)s.token * w.hq + s.head) * w.dim + e]);
}

__global__ void count_unwritten(const uint16_t *o, size_t n, int *count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i < n; i += (size_t)gridDim.x * blockDim.x)
        if ((o[i] & 0x7f80) == 0x7f80) atomicAdd(count, 1);
}

// ---- memory and clocks

static void *carve(size_t bytes) {
    size_t at = other_at;
    other_at = (at + bytes + 255) & ~(size_t)255;
    if (other_at > OTHER_BYTES) DIE("out of device memory: %zu bytes more", bytes);
    return opt_list ? (void *)(at + 4096) : other_arena + at;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, int n) { // sorts v
    qsort(v, (size_t)n, sizeof *v, by_value);
    return n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

static void start(void) {
    CU(cudaEventRecord(event[0], stream));
}

static double stop(void) { // us since start
    float ms;
    CU(cudaEventRecord(event[1], stream));
    CU(cudaEventSynchronize(event[1]));
    CU(cudaEventElapsedTime(&ms, event[0], event[1]));
    return 1e3 * ms;
}

// ---- ceilings

static int read_blocks, read_threads, read_unroll; // the best shape

static void read_launch(int blocks, int threads, int unroll) {
    const uint4 *x = (const uint4 *)kv_arena;
    uint32_t *sink = (uint32_t *)other_arena;
    size_t n = READ_BYTES / 16;
    if (unroll == 4) read_all<4><<<blocks, threads, 0, stream>>>(x, n, sink);
    else read_all<8><<<blocks, threads, 0, stream>>>(x, n, sink);
}

static double read_sample(void) { // bytes per second
    start();
    read_launch(read_blocks, read_threads, read_unroll);
    return READ_BYTES / stop() * 1e6;
}

static void ceiling_read(void) {
    static const int threads[] = {256, 512, 1024}, waves[] = {1, 2, 4, 16, 64};
    double v[9];
    int t, w, u, i;
    for (t = 0; t < 3; t++)
        for (w = 0; w < 5; w++)
            for (u = 4; u <= 8; u += 4) {
                int shape[3] = {read_blocks, read_threads, read_unroll};
                read_blocks = cuda.n_sm * waves[w] * 2048 / threads[t];
                read_threads = threads[t];
                read_unroll = u;
                for (i = 0; i < 5; i++) v[i] = read_sample();
                v[0] = median(v, 5);
                if (v[0] > read_rate) read_rate = v[0];
                else
                    read_blocks = shape[0], read_threads = shape[1], read_unroll = shape[2];
            }
    for (i = 0; i < 9; i++) v[i] = read_sample();
    read_rate = median(v, 9);
    CU(cudaGetLastError());
}

static double ceiling_copy(void) {
    double v[7];
    int i;
    for (i = 0; i < 7; i++) {
        start();
        CU(cudaMemcpyAsync(kv_arena + (KV_BYTES >> 1), kv_arena, (size_t)3 << 30,
                           cudaMemcpyDeviceToDevice, stream));
        v[i] = 2.0 * ((size_t)3 << 30) / stop() * 1e6;
    }
    return median(v, 7);
}

static double ceiling_launch(void) { // us for an empty kernel within a graph
    cudaGraph_t graph;
    cudaGraphExec_t run;
    double v[9];
    int i;
    CU(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (i = 0; i < 1000; i++) empty_kernel<<<1, 32, 0, stream>>>();
    CU(cudaStreamEndCapture(stream, &graph));
    CU(cudaGraphInstantiate(&run, graph, 0));
    for (i = -2; i < 9; i++) {
        double us;
        start();
        CU(cudaGraphLaunch(run, stream));
        us = stop() / 1000;
        if (i >= 0) v[i] = us;
    }
    CU(cudaGraphExecDestroy(run));
    CU(cudaGraphDestroy(graph));
    return median(v, 9);
}

// ---- one problem in several sets of inputs: the same plan and tables, other Q, K, V and O

typedef struct problem {
    const row *r;
    std::vector<int32_t> q_start, kv_len, table, block, seq_row;
    std::vector<int64_t> row_start;
    attn_desc d[MAX_SETS];
    int sets, n_tokens, longest;
    size_t o_bytes; // of one set
    double bytes, flops, kept;
} problem;

// Inverse of the normal distribution function, by bisection.
static double normal_quantile(double p) {
    double lo = -8, hi = 8;
    int i;
    for (i = 0; i < 60; i++) {
        double z = 0.5 * (lo + hi);
        if (0.5 * erfc(-z / sqrt(2.0)) < p) lo = z;
        else hi = z;
    }
    return lo;
}

static void make_lengths(problem *x, test_rng *rng) {
    const row *r = x->r;
    double sum = 0;
    int s, total = 0;
    std::vector<double> w((size_t)r->b);
    x->kv_len.assign((size_t)r->b, r->ctx);
    x->q_start.assign((size_t)r->b + 1, 0);
    if (r->ragged) { // the quantiles of a lognormal with sigma 1, in random order
        for (s = 0; s < r->b; s++) sum += w[s] = exp(normal_quantile((s + 0.5) / r->b));
        for (s = 0; s < r->b; s++) total += x->kv_len[s] = (int32_t)(w[s] / sum * r->b * r->ctx);
        x->kv_len[r->b - 1] += r->b * r->ctx - total;
        for (s = r->b - 1; s > 0; s--) {
            int t = test_below(rng, s + 1), swap = x->kv_len[s];
            x->kv_len[s] = x->kv_len[t];
            x->kv_len[t] = swap;
        }
    }
    for (x->longest = s = 0; s < r->b; s++) {
        x->q_start[s + 1] = x->q_start[s] + (r->causal ? x->kv_len[s] : 1);
        if (x->kv_len[s] > x->longest) x->longest = x->kv_len[s];
    }
    x->n_tokens = x->q_start[r->b];
}

// Shuffled pages; the pages of the shared prefix have the same ids in every sequence.
static void make_table(problem *x, test_rng *rng) {
    const row *r = x->r;
    attn_kv *kv = &x->d[0].kv;
    int s, j, at, common = r->shared / r->page, stride = (x->longest + r->page - 1) / r->page;
    std::vector<int32_t> deck;
    int total = common;
    for (s = 0; s < r->b; s++) total += (x->kv_len[s] + r->page - 1) / r->page - common;
    for (j = 0; j < total; j++) deck.push_back(j);
    for (j = total - 1; j > 0; j--) {
        int i = test_below(rng, j + 1), swap = deck[j];
        deck[j] = deck[i];
        deck[i] = swap;
    }
    x->table.assign((size_t)r->b * (size_t)stride, 0);
    for (at = common, s = 0; s < r->b; s++)
        for (j = 0; j < (x->kv_len[s] + r->page - 1) / r->page; j++)
            x->table[(size_t)s * stride + j] = deck[j < common ? j : at++];
    kv->page_table = x->table.data();
    kv->page_table_stride = stride;
    kv->n_pages = total;
    kv->page_tokens = r->page;
}

// Lists lie in device memory, as selectors leave them.
static void make_mask(problem *x) {
    const row *r = x->r;
    attn_mask *m = &x->d[0].mask;
    const int size = r->pattern == SMALL ? 64 : BLOCK, n = (r->ctx + size - 1) / size;
    int l, i, j, from = r->causal ? 0 : n - 1;
    attn_block_list *b = &m->blocks;
    if (r->pattern == STRIDE) {
        m->stride.block = STRIDE_BLOCK;
        m->stride.local = STRIDE_LOCAL;
        m->stride.stride = STRIDE_STEP;
        m->stride.head_step = 1;
    }
    m->keep_sink = r->sink;
    m->keep_recent = r->recent;
    if (r->pattern != BLOCKS && r->pattern != SMALL) return;
    for (l = 0; l < r->lists; l++) {
        for (i = from; i < n; i++) {
            int room = small_room(i, r->pattern == SMALL ? r->block : 1, r->sink, r->recent);
            int most = r->pattern == SMALL && room > r->keep / r->block ? r->keep / r->block : room;
            x->row_start.push_back((int64_t)x->block.size());
            for (j = 0; r->pattern == SMALL && j < most; j++)
                x->block.push_back(small_pick(l, i, j, most, room, r->sink / r->block));
            for (j = 0; r->pattern == BLOCKS && j <= i; j++)
                if (keep_block(r->density, l, i, j)) x->block.push_back(j);
        }
        x->row_start.push_back((int64_t)x->block.size());
    }
    x->seq_row.assign((size_t)r->b, -from);
    b->row_block = size;
    b->kv_block = r->pattern == SMALL ? r->block : BLOCK;
    b->n_lists = r->lists;
    b->n_rows = n - from;
    b->seq_row = x->seq_row.data();
    b->row_start = (int64_t *)carve(8 * x->row_start.size());
    b->block = (int32_t *)carve(4 * x->block.size());
    b->device_entries = (int64_t)x->block.size();
    if (opt_list) return;
    CU(cudaMemcpy((void *)b->row_start, x->row_start.data(), 8 * x->row_start.size(),
                  cudaMemcpyHostToDevice));
    CU(cudaMemcpy((void *)b->block, x->block.data(), 4 * x->block.size(), cudaMemcpyHostToDevice));
}

// Random K and V; 16-bit contents serve every shape, so they are written once.
static void fill_kv(const problem *x, size_t bytes) {
    static int filled = 1; // by device_open
    const attn_desc *d = &x->d[0];
    const row *r = x->r;
    int elements = r->page * r->hkv * r->dim, n_scales = r->page * r->hkv;
    size_t page = attn_kv_page_bytes(d, 0);
    if (opt_list || (filled && r->kv == ATTN_BF16)) return;
    filled = r->kv == ATTN_BF16;
    if (filled)
        fill_bf16<<<cuda.n_sm * 8, 256, 0, stream>>>((__nv_bfloat16 *)kv_arena, KV_BYTES / 2, 1);
    else
        fill_scaled<<<cuda.n_sm * 8, 256, 0, stream>>>(kv_arena, bytes / page, (int64_t)page,
                                                       elements, n_scales, r->kv, 2);
    CU(cudaGetLastError());
}

static void problem_make(problem *x, const row *r) {
    test_rng rng = {20251121};
    attn_desc *d = &x->d[0];
    size_t one, q_bytes;
    double set_bytes, seen = 0;
    int s;
    x->r = r;
    memset(x->d, 0, sizeof x->d);
    d->n_seq = r->b;
    d->n_heads = r->hq;
    d->n_kv_heads = r->hkv;
    d->head_dim = r->dim;
    d->kv.layout = r->layout;
    d->kv.k.dtype = d->kv.v.dtype = r->kv;
    d->q.dtype = d->o.dtype = ATTN_BF16;
    make_lengths(x, &rng);
    make_table(x, &rng);
    make_mask(x);
    d->q_start = x->q_start.data();
    d->kv.kv_len = x->kv_len.data();
    one = attn_kv_page_bytes(d, 0) * (size_t)d->kv.n_pages; // K and V are of one size
    q_bytes = (size_t)x->n_tokens * (size_t)(r->hq * r->dim) * 2;
    x->o_bytes = q_bytes;
    set_bytes = 2.0 * (double)(one + q_bytes);
    x->sets = (int)ceil(SETS_BYTES / set_bytes);
    if (x->sets < 2) x->sets = 2;
    if (x->sets > MAX_SETS) x->sets = MAX_SETS;
    if (2 * one * (size_t)x->sets > KV_BYTES)
        DIE("%s b%d ctx%d is too large", r->kind, r->b, r->ctx);
    fill_kv(x, 2 * one * (size_t)x->sets);
    for (s = 0; s < x->sets; s++) {
        char *base = opt_list ? (char *)4096 : kv_arena;
        x->d[s] = x->d[0];
        x->d[s].kv.k.data = base + (size_t)(2 * s) * one;
        x->d[s].kv.v.data = base + (size_t)(2 * s + 1) * one;
        x->d[s].q.data = carve(q_bytes);
        x->d[s].o.data = carve(q_bytes);
        if (!opt_list)
            fill_bf16<<<cuda.n_sm * 8, 256, 0, stream>>>((__nv_bfloat16 *)x->d[s].q.data,
                                                         q_bytes / 2, (uint64_t)(100 + s));
    }
    for (s = 0; s < r->b; s++)
        seen += r->causal ? 0.5 * x->kv_len[s] * (double)x->kv_len[s] : x->kv_len[s];
    x->kept = kept_share(r);
    x->flops = 4.0 * r->hq * r->dim * seen * x->kept;
    x->bytes = -(double)r->shared * (r->b - 1);
    for (s = 0; s < r->b; s++) x->bytes += x->kv_len[s];
    if (!r->causal) x->bytes *= x->kept;
    x->bytes *= 2.0 * r->hkv * (r->dim * attn_dtype_bits(r->kv) / 8 +
                                (attn_dtype_scaled(r->kv) ? 4 : 0));
    x->bytes += 2.0 * (double)q_bytes;
}

// ---- a plan on the device, captured

typedef struct exec {
    attn_cuda_plan g;
    attn_plan *plan;
    void *plan_mem, *staging, *partials;
    size_t partial_bytes;
    cudaGraph_t graph;
    cudaGraphExec_t run;
    int n_iter;
} exec;

static attn_result exec_make(exec *e, problem *x) {
    const attn_desc *d = &x->d[0];
    attn_plan_params p;
    attn_result r;
    size_t bytes;
    void *image;
    int32_t i;
    memset(e, 0, sizeof *e);
    if ((r = attn_cuda_supports(&cuda, d)) != ATTN_OK) return r;
    memset(&p, 0, sizeof p);
    attn_cuda_plan_params(&cuda, d, &p);
    p.share = opt_share;
    if (opt_capacity > 1) {
        p.max_seq = (int32_t)(opt_capacity * d->n_seq);
        p.max_tokens = (int32_t)(opt_capacity * x->n_tokens);
        p.max_kv_len = (int32_t)(opt_capacity * x->longest);
    }
    bytes = (attn_plan_bytes(d, &p) + 63) & ~(size_t)63;
    e->plan_mem = aligned_alloc(64, bytes + 64);
    if (!e->plan_mem) DIE("out of memory");
    if ((r = attn_plan_build(d, &p, e->plan_mem, bytes, &e->plan)) != ATTN_OK) return r;
    if ((bytes = attn_cuda_plan_bytes(&cuda, d, &p)) == 0) return ATTN_ERR_OVERFLOW;
    image = carve(bytes);
    e->partial_bytes = p.partial_bytes;
    e->partials = carve(p.partial_bytes + 64);
    if (opt_list) return ATTN_OK;
    if ((r = attn_cuda_plan_init(&cuda, d, &p, image, bytes, &e->g)) != ATTN_OK) return r;
    for (i = 0; i < d->n_seq; i++) // as an engine knows of a graph that it decodes with
        if (d->q_start[i + 1] - d->q_start[i] > e->g.max_q_len)
            e->g.max_q_len = d->q_start[i + 1] - d->q_start[i];
    CU(cudaMallocHost(&e->staging, bytes));
    return attn_cuda_upload(&cuda, d, e->plan, &e->g, e->staging, bytes, stream);
}

// Whole rounds over the sets, so long that what a replay costs itself (a few us) is lost in it.
static attn_result exec_capture(exec *e, const problem *x, double guess_us, double graph_us) {
    attn_result r = ATTN_OK;
    cudaError_t end;
    int i, rounds = (int)ceil(graph_us / (guess_us * x->sets));
    e->n_iter = x->sets * (rounds < 1 ? 1 : rounds > 512 ? 512 : rounds);
    CU(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (i = 0; i < e->n_iter && r == ATTN_OK; i++)
        r = attn_cuda_run(&cuda, &x->d[i % x->sets], &e->g, e->partials, e->partial_bytes, stream);
    end = cudaStreamEndCapture(stream, &e->graph); // may fail with the run that did
    if (r != ATTN_OK) {
        cudaGetLastError(); // that error is told by r
        return r;
    }
    CU(end);
    CU(cudaGraphInstantiate(&e->run, e->graph, 0));
    return ATTN_OK;
}

static void exec_drop_graph(exec *e) {
    if (e->run) CU(cudaGraphExecDestroy(e->run));
    if (e->graph) CU(cudaGraphDestroy(e->graph));
    e->run = NULL;
    e->graph = NULL;
}

static void exec_free(exec *e) {
    exec_drop_graph(e);
    if (e->staging) CU(cudaFreeHost(e->staging));
    free(e->plan_mem);
}

// ---- a wrong result is never timed

static void make_samples(const problem *x, sample *out) {
    test_rng rng = {7};
    const row *r = x->r;
    int i, s, n;
    for (i = 0; i < N_SAMPLES; i++) {
        s = i == 0 ? 0 : i == 1 ? r->b - 1 : test_below(&rng, r->b);
        n = x->q_start[s + 1] - x->q_start[s];
        out[i].seq = s;
        out[i].pos = i == 0 ? 0 : i == 1 ? n - 1 : test_below(&rng, n);
        out[i].token = x->q_start[s] + out[i].pos;
        out[i].pos += x->kv_len[s] - n;
        out[i].head = i == 1 ? r->hq - 1 : test_below(&rng, r->hq);
    }
}

// The largest relative RMS error of the sampled rows of a set; HUGE_VAL when one is not finite.
static double set_error(const problem *x, int set, const int32_t *table) {
    const row *r = x->r;
    const attn_desc *d = &x->d[set];
    size_t at = other_at;
    view w = {(const char *)d->kv.k.data, (const char *)d->kv.v.data, (const uint16_t *)d->q.data,
              (const uint16_t *)d->o.data, table, d->kv.page_table_stride,
              (int64_t)attn_kv_page_bytes(d, 0), r->page, r->layout, r->kv, r->hq, r->hkv, r->dim,
              r->pattern, r->density, r->lists, r->block, r->keep, r->sink, r->recent};
    sample host[N_SAMPLES], *s = (sample *)carve(sizeof host);
    double *scores = (double *)carve(8 * (size_t)x->longest * N_SAMPLES);
    std::vector<double> pairs((size_t)(2 * N_SAMPLES * r->dim));
    double *out = (double *)carve(8 * pairs.size()), worst = 0;
    int i, e;
    make_samples(x, host);
    CU(cudaMemcpyAsync(s, host, sizeof host, cudaMemcpyHostToDevice, stream));
    check_scores<<<dim3((unsigned)(x->longest + 127) / 128, N_SAMPLES), 128, 0, stream>>>(
        w, s, scores, x->longest);
    check_values<<<N_SAMPLES, r->dim, 0, stream>>>(w, s, scores, x->longest, out);
    CU(cudaGetLastError());
    CU(cudaMemcpyAsync(pairs.data(), out, 8 * pairs.size(), cudaMemcpyDeviceToHost, stream));
    CU(cudaStreamSynchronize(stream));
    for (i = 0; i < N_SAMPLES; i++) {
        double num = 0, den = 0, err;
        for (e = 0; e < r->dim; e++) {
            double ref = pairs[(size_t)(2 * (i * r->dim + e))];
            double got = pairs[(size_t)(2 * (i * r->dim + e) + 1)];
            num += (got - ref) * (got - ref);
            den += ref * ref;
        }
        err = sqrt(num / den);
        if (!(err <= worst)) worst = err <= 1e30 ? err : HUGE_VAL; // NaN too
    }
    other_at = at;
    return worst;
}

// Poisons O, runs the graph once and looks at the first and the last set; 1 when all is well.
static int check(const problem *x, exec *e, result *t) {
    size_t at = other_at, table_bytes = 4 * x->table.size();
    int32_t *table = (int32_t *)carve(table_bytes);
    int *words = (int *)carve(8), host[2] = {0, 0}, i;
    std::vector<int32_t> ids(x->table);
    double worst = 0;
    if (opt_plant) {
        ids.push_back(ids[0]);
        ids.erase(ids.begin());
    }
    CU(cudaMemsetAsync(words, 0, 8, stream));
    CU(cudaMemcpyAsync(table, ids.data(), table_bytes, cudaMemcpyHostToDevice, stream));
    for (i = 0; i < x->sets; i++) CU(cudaMemsetAsync(x->d[i].o.data, 0xff, x->o_bytes, stream));
    cuda.error = words + 1; // attn_cuda_run takes it at the capture, so uncaptured here
    for (i = 0; i < x->sets; i += x->sets - 1)
        if (attn_cuda_run(&cuda, &x->d[i], &e->g, e->partials, e->partial_bytes, stream) != ATTN_OK)
            worst = HUGE_VAL;
    cuda.error = NULL;
    for (i = 0; i < x->sets; i++) CU(cudaMemsetAsync(x->d[i].o.data, 0xff, x->o_bytes, stream));
    CU(cudaGraphLaunch(e->run, stream));
    for (i = 0; i < x->sets; i++)
        count_unwritten<<<cuda.n_sm, 256, 0, stream>>>((const uint16_t *)x->d[i].o.data,
                                                       x->o_bytes / 2, words);
    for (i = 0; i < x->sets; i += x->sets - 1) {
        double err = set_error(x, i, table);
        if (!(err <= worst)) worst = err;
    }
    CU(cudaMemcpy(host, words, 8, cudaMemcpyDeviceToHost));
    other_at = at;
    if (!host[0] && !host[1] && worst <= ERROR_BOUND) return 1;
    snprintf(t->status, sizeof t->status, "WRONG err %.1e nan %d code %d", worst, host[0], host[1]);
    return 0;
}

// ---- timing

static void measure(exec *e, result *t, double budget_us) {
    double v[MAX_REPEATS], rates[MAX_REPEATS], graph_us;
    int i, n;
    start();
    CU(cudaGraphLaunch(e->run, stream));
    graph_us = stop();
    n = (int)(budget_us / (graph_us + 1000));
    n = n < 5 ? 5 : n > MAX_REPEATS - 1 ? MAX_REPEATS - 1 : n;
    for (i = 0; i < n; i++) {
        rates[i] = read_sample();
        start();
        CU(cudaGraphLaunch(e->run, stream));
        v[i] = stop() / e->n_iter;
    }
    t->us = median(v, n);
    t->lo = v[n / 4];
    t->hi = v[n - 1 - n / 4];
    t->read = median(rates, n);
    t->n_iter = e->n_iter;
    t->repeats = n;
}

// What remains under the power limit: replays for a second, the last fifth of them counts.
static void measure_sustained(exec *e, result *t) {
    int n = (int)(1e6 / (t->us * e->n_iter)) + 5, i;
    for (i = 0; i < n; i++) {
        if (i == n - n / 5) start();
        CU(cudaGraphLaunch(e->run, stream));
    }
    t->sustained_us = stop() / (n / 5) / e->n_iter;
}

// ---- limits and the table

static void add_limit(result *t, const char *name, double us, int judged) {
    limit l = {name, us, judged};
    t->limits[t->n_limits++] = l;
}

static int same_shape(const row *a, const row *b) {
    return a->b == b->b && a->ctx == b->ctx && a->hq == b->hq && a->hkv == b->hkv &&
           a->dim == b->dim && a->kv == b->kv && a->page == b->page && a->layout == b->layout;
}

static void limits(const problem *x, result *t, const row *rows, const result *done, int n) {
    const row *r = x->r;
    int i, decode = !strcmp(r->kind, "decode");
    double floor_us = x->bytes / t->read * 1e6;
    if (decode && r->listed_us > 0) add_limit(t, "cuDNN*", r->listed_us * 4.5e12 / t->read, 0);
    if (!strcmp(r->kind, "prefill") && r->listed_us > 0) add_limit(t, "FA2*", r->listed_us, 0);
    if (decode && !r->ragged && x->bytes >= 0.5e9) {
        int wide = r->kv == ATTN_BF16;
        add_limit(t, wide ? "read97" : "read85", floor_us / (wide ? 0.97 : 0.85), 1);
    }
    for (i = 0; i < n; i++) {
        if (done[i].us <= 0 || !same_shape(&rows[i], r)) continue;
        if (r->ragged && !rows[i].ragged && !strcmp(rows[i].kind, "decode"))
            add_limit(t, "equal", 1.05 * done[i].us, 1);
        if (r->pattern != DENSE && rows[i].causal && rows[i].pattern == DENSE) {
            add_limit(t, "kept", 1.15 * x->kept * done[i].us, r->ctx >= 16384);
            break;
        }
    }
    if (!strcmp(r->kind, "prefix")) {
        if (dense_rate > 0 && x->flops / dense_rate * 1e6 > floor_us)
            floor_us = x->flops / dense_rate * 1e6;
        if (r->listed_us > 0) add_limit(t, "cascade", r->listed_us * 4.5e12 / t->read, 1);
        if (floor_us >= 15) add_limit(t, "floor", floor_us * (floor_us >= 60 ? 1.5 : 2.5), 1);
        else
            add_limit(t, "floor", floor_us * 2.5, 0);
    }
}

static void row_key(const row *r, result *t) {
    char shape[64], pattern[32] = "";
    if (r->shared) snprintf(shape, sizeof shape, "%d+%d", r->shared, r->ctx - r->shared);
    else
        snprintf(shape, sizeof shape, "%d", r->ctx);
    if (r->pattern == BLOCKS)
        snprintf(pattern, sizeof pattern, " blocks%d%%/%d", r->density, r->lists);
    if (r->pattern == STRIDE) snprintf(pattern, sizeof pattern, " local-stride");
    if (r->pattern == SMALL)
        snprintf(pattern, sizeof pattern, " small%d*%d+%d/%d", r->keep / r->block, r->block,
                 r->sink + r->recent, r->lists);
    snprintf(t->key, sizeof t->key, "%s b%d %s%s h%d/%d d%d %s p%d %s%s", r->kind, r->b, shape,
             r->ragged ? " lognormal" : "", r->hq, r->hkv, r->dim, attn_dtype_name(r->kv), r->page,
             r->layout == ATTN_TOKEN_MAJOR ? "tm" : "hm", pattern);
}

static void print_head(void) {
    printf("\n%-58s %9s %5s %6s %6s %8s %-7s %s\n", "row", "us", "+-%", "GB/s", "%read",
           "TFLOP/s", "verdict", "us / limit (for information)");
}

static void print_row(const problem *x, const result *t, const exec *e) {
    int i, judged = 0, missed = 0;
    if (strcmp(t->status, "ok")) {
        printf("%-58s %s\n", t->key, t->status);
        return;
    }
    if (opt_list) {
        printf("%-58s %7.1f MB %9.3f GFLOP  kept %.3f  %d sets, %d pages, %d tasks, %d merges, "
               "partials %.1f of %.1f MB\n", t->key, x->bytes * 1e-6, x->flops * 1e-9, x->kept,
               x->sets, x->d[0].kv.n_pages, e->plan->n_tasks, e->plan->n_merges,
               (double)attn_plan_partial_bytes(e->plan) * 1e-6, (double)e->partial_bytes * 1e-6);
        return;
    }
    for (i = 0; i < t->n_limits; i++) {
        judged |= t->limits[i].judged;
        missed |= t->limits[i].judged && t->us > t->limits[i].us;
    }
    n_missed += missed;
    printf("%-58s %9.2f %5.1f %6.0f %6.1f %8.1f %-7s", t->key, t->us,
           50 * (t->hi - t->lo) / t->us, x->bytes / t->us * 1e-3,
           100 * x->bytes / t->us * 1e6 / t->read, x->flops / t->us * 1e-6,
           missed ? "MISSED" : judged ? "ok" : "-");
    for (i = 0; i < t->n_limits; i++)
        printf(t->limits[i].judged ? " %s %.3f" : " (%s %.3f)", t->limits[i].name,
               t->us / t->limits[i].us);
    if (t->sustained_us > 0) printf(" sustained %.1f TFLOP/s", x->flops / t->sustained_us * 1e-6);
    putchar('\n');
    fflush(stdout);
}

static void csv_head(void) {
    fprintf(csv, "key,kind,B,ctx,shared,private,Hq,Hkv,D,dtype,page,layout,N,ragged,pattern,"
                 "density,lists,kept,sets,n_iter,repeats,us,us_lo,us_hi,sustained_us,bytes,flops,"
                 "read,status,limits\n");
}

static void csv_row(const problem *x, const result *t) {
    static const char *const patterns[] = {"dense", "blocks", "stride"};
    const row *r = x->r;
    int i;
    if (!csv) return;
    fprintf(csv, "%s,%s,%d,%d,%d,%d,%d,%d,%d,%s,%d,%s,%d,%d,%s,%d,%d,%.6f,%d,%d,%d,", t->key,
            r->kind, r->b, r->ctx, r->shared, r->ctx - r->shared, r->hq, r->hkv, r->dim,
            attn_dtype_name(r->kv), r->page, r->layout == ATTN_TOKEN_MAJOR ? "tm" : "hm",
            r->causal ? r->ctx : 1, r->ragged, patterns[r->pattern], r->density, r->lists, x->kept,
            x->sets, t->n_iter, t->repeats);
    fprintf(csv, "%.4f,%.4f,%.4f,%.4f,%.0f,%.0f,%.6g,%s,", t->us, t->lo, t->hi, t->sustained_us,
            x->bytes, x->flops, t->read, t->status);
    for (i = 0; i < t->n_limits; i++)
        fprintf(csv, "%s%s:%.4f:%d", i ? "|" : "", t->limits[i].name, t->limits[i].us,
                t->limits[i].judged);
    fputc('\n', csv);
    fflush(csv);
}

// ---- one row

static double guess_us(const problem *x) { // a good kernel's time, for sizing graphs only
    double a = x->bytes / 4e6, b = x->flops / 400e6;
    return 5 + (a > b ? a : b);
}

static attn_result time_row(problem *x, exec *e, result *t) {
    attn_result r = exec_make(e, x);
    double graph_us = opt_quick ? 1500 : 3000;
    if (r != ATTN_OK || opt_list) return r;
    if ((r = exec_capture(e, x, guess_us(x), graph_us)) != ATTN_OK) return r;
    if (!check(x, e, t)) return ATTN_OK;
    measure(e, t, opt_quick ? 6e4 : 2e5);
    return ATTN_OK;
}

static void run_row(const row *rows, result *done, int at) {
    static problem x;
    exec e;
    result *t = &done[at];
    attn_result r;
    memset(t, 0, sizeof *t);
    snprintf(t->status, sizeof t->status, "ok");
    row_key(&rows[at], t);
    at_row = t->key;
    if (!strstr(t->key, opt_rows)) return;
    other_at = 4096; // the sink of the read ceiling lies below
    x.q_start.clear(), x.kv_len.clear(), x.table.clear(), x.block.clear(), x.row_start.clear();
    problem_make(&x, &rows[at]);
    r = time_row(&x, &e, t);
    if (r != ATTN_OK) snprintf(t->status, sizeof t->status, "ERROR %d", (int)r);
    if (r != ATTN_OK) fprintf(stderr, "%s: %s\n", t->key, attn_result_string(r));
    if (t->us > 0 && rows[at].causal && rows[at].ctx == 16384 && !opt_quick)
        measure_sustained(&e, t);
    if (t->us > 0) limits(&x, t, rows, done, at);
    n_rows++;
    n_bad += strcmp(t->status, "ok") != 0;
    print_row(&x, t, &e);
    csv_row(&x, t);
    exec_free(&e);
}

// ---- the rows

#define MAX_ROWS 160
static row table[MAX_ROWS];
static int n_table;

static row *add(const char *kind, int b, int ctx, int hq, int hkv, int dim, int page) {
    row *r = &table[n_table++];
    memset(r, 0, sizeof *r);
    r->kind = kind;
    r->b = b;
    r->ctx = ctx;
    r->hq = hq;
    r->hkv = hkv;
    r->dim = dim;
    r->kv = ATTN_BF16;
    r->page = page;
    r->causal = !strcmp(kind, "prefill") || !strcmp(kind, "sparse");
    return r;
}

static void rows_decode(void) {
    static const struct {
        int b, ctx;
        double cudnn_us;
    } cells[] = {{1, 1024, 7.5},   {1, 4096, 11.6}, {1, 16384, 22.9}, {8, 1024, 0},
                 {8, 4096, 36.6},  {32, 1024, 34.1}, {32, 4096, 122}, {128, 1024, 124},
                 {128, 4096, 476}, {32, 16384, 0}};
    static const int sizes[] = {1, 16, 64, 256};
    static const attn_dtype types[] = {ATTN_F8E4M3, ATTN_I8};
    int i, p;
    for (i = 0; i < 10; i++)
        for (p = 16; p <= 64; p += 48)
            add("decode", cells[i].b, cells[i].ctx, 32, 8, 128, p)->listed_us = cells[i].cudnn_us;
    for (i = 0; i < 2; i++)
        for (p = 16; p <= 64; p += 48) {
            add("decode", 128, 4096, 32, 8, 128, p)->kv = types[i];
            if (!opt_quick) add("decode", 32, 16384, 32, 8, 128, p)->kv = types[i];
            if (!opt_quick) add("decode", 32, 4096, 32, 8, 128, p)->kv = types[i];
        }
    for (i = 0; i < 4; i++) {
        if (sizes[i] == 1 || sizes[i] == 256) add("decode", 32, 4096, 32, 8, 128, sizes[i]);
        if (!opt_quick || sizes[i] == 16)
            add("decode", 32, 4096, 32, 8, 128, sizes[i])->layout = ATTN_HEAD_MAJOR;
    }
    for (i = 0; i < 2; i++) {
        row *r = add("decode", 128, 4096, 32, 8, 128, 64);
        r->kv = types[i];
        r->layout = ATTN_HEAD_MAJOR;
    }
    for (p = 16; p <= 64; p += 48) { // 208,992 tokens
        add("decode", 32, 6531, 32, 8, 128, p);
        add("decode", 32, 6531, 32, 8, 128, p)->ragged = 1;
    }
}

static void add_small(const char *kind, int ctx, int block, int keep, int sink, int recent,
                      int lists, int page) {
    row *r = add(kind, 1, ctx, 32, 8, 128, page);
    r->pattern = SMALL;
    r->block = block;
    r->keep = keep;
    r->sink = sink;
    r->recent = recent;
    r->lists = lists;
}

// A sequence of 128k tokens that decodes over lists: HiP's last two generations, whole blocks.
static void rows_listed(void) {
    int i;
    for (i = 0; i < 2; i++) {
        add_small("decode", 131072, 8, 2048, 256, 1024, 1, i ? 16 : 64);
        add_small("decode", 131072, 2, 512, 16, 256, 32, i ? 16 : 64);
    }
    for (i = 8; i <= 32; i *= 4) {
        row *r = add("decode", 1, 131072, 32, 8, 128, 64);
        r->pattern = BLOCKS;
        r->density = 5;
        r->lists = i;
    }
}

static void rows_prefix(void) {
    static const struct {
        int hkv, b, shared, own;
        double us;
    } cells[] = {{32, 32, 1024, 64, 33},   {32, 32, 2048, 64, 39},    {32, 32, 2048, 512, 97},
                 {32, 32, 4096, 64, 49},   {32, 32, 4096, 2048, 290}, {32, 64, 2048, 512, 156},
                 {32, 96, 2048, 64, 65},   {32, 96, 2048, 2048, 750}, {8, 32, 2048, 64, 34},
                 {8, 32, 4096, 512, 54},   {8, 128, 2048, 512, 124},  {8, 128, 8192, 512, 164}};
    int i, p;
    for (i = 0; i < 12; i++)
        for (p = 16; p <= 64; p += 48) {
            row *r;
            if (opt_quick && p == 64 && i % 4) continue;
            r = add("prefix", cells[i].b, cells[i].shared + cells[i].own, 32, cells[i].hkv, 128, p);
            r->shared = cells[i].shared;
            r->listed_us = cells[i].us;
        }
}

static void rows_prefill(void) {
    static const struct {
        int hq, hkv, dim;
        double fa2[3]; // TFLOP/s at 1k, 4k, 16k
    } families[] = {{16, 16, 128, {246, 308, 304}},
                    {32, 32, 64, {170, 285, 288}},
                    {32, 8, 128, {239, 300, 332}}};
    int f, n, i;
    for (f = 0; f < 3; f++)
        for (n = 1024, i = 0; n <= 32768; n *= 2, i++) {
            int b = n > 16384 ? 1 : 16384 / n;
            row *r;
            if (opt_quick && (i % 2 || i > 4)) continue;
            r = add("prefill", b, n, families[f].hq, families[f].hkv, families[f].dim, 64);
            if (i % 2 == 0)
                r->listed_us = 2e-6 * b * n * (double)n * r->hq * r->dim / families[f].fa2[i / 2];
        }
}

static void rows_sparse(void) { // dense rows first: their times are what the limits refer to
    static const int densities[] = {10, 20, 50};
    int i, n;
    add("sparse", 1, 32768, 32, 8, 128, 64);
    for (i = 0; i < 3; i++) {
        row *r = add("sparse", 1, 32768, 32, 8, 128, 64);
        r->pattern = BLOCKS;
        r->density = densities[i];
        r->lists = 1;
        if (opt_quick || i != 1) continue;
        r = add("sparse", 1, 32768, 32, 8, 128, 64); // a list for every query head
        r->pattern = BLOCKS;
        r->density = densities[i];
        r->lists = 32;
    }
    for (n = 8192; n <= 32768; n *= 4) {
        if (opt_quick && n > 8192) continue;
        add("sparse", 1, n, 32, 32, 128, 64);
        add("sparse", 1, n, 32, 32, 128, 64)->pattern = STRIDE;
    }
    add("sparse", 1, 65536, 32, 8, 128, 64)->pattern = STRIDE;
    for (n = 32768; n <= 131072; n *= 4) { // HiP's first and last generation
        add_small("sparse", n, 2, 512, 16, 256, 32, 64);
        add_small("sparse", n, 8, 2048, 256, 1024, 1, 64);
    }
}

static void rows_make(const char *kind) {
    n_table = 0;
    if (!strcmp(kind, "decode")) rows_decode(), rows_listed();
    if (!strcmp(kind, "prefix")) rows_prefix();
    if (!strcmp(kind, "prefill")) rows_prefill();
    if (!strcmp(kind, "sparse")) rows_sparse();
    if (n_table > MAX_ROWS) DIE("more rows than MAX_ROWS");
}

// ---- main

static void device_open(void) {
    cudaDeviceProp prop;
    attn_result r = attn_cuda_open(&cuda, 0);
    if (r != ATTN_OK) DIE("attn_cuda_open: %s", attn_result_string(r));
    CU(cudaGetDeviceProperties(&prop, 0));
    CU(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CU(cudaEventCreate(&event[0]));
    CU(cudaEventCreate(&event[1]));
    CU(cudaMalloc((void **)&kv_arena, KV_BYTES));
    CU(cudaMalloc((void **)&other_arena, OTHER_BYTES));
    fill_bf16<<<cuda.n_sm * 8, 256, 0, stream>>>((__nv_bfloat16 *)kv_arena, KV_BYTES / 2, 1);
    CU(cudaGetLastError());
    printf("%s, %d SM, L2 %d MB, code for sm_%d\n", prop.name, cuda.n_sm, prop.l2CacheSize >> 20,
           cuda.arch);
}

// The rate that the floor of shared prefixes counts with: dense causal prefill, heads of 128.
static void ceiling_dense(void) {
    static result t;
    static problem x;
    row r;
    exec e;
    n_table = 0;
    r = *add("prefill", 1, 16384, 32, 8, 128, 64);
    other_at = 4096;
    problem_make(&x, &r);
    snprintf(t.status, sizeof t.status, "ok");
    if (time_row(&x, &e, &t) == ATTN_OK && t.us > 0) dense_rate = x.flops / t.us * 1e6;
    else
        printf("dense prefill for the floor of shared prefixes: none (%s)\n", t.status);
    exec_free(&e);
}

static void ceilings(void) {
    double copy, launch;
    ceiling_read();
    copy = ceiling_copy();
    launch = ceiling_launch();
    if (strstr(opt_only, "prefix")) ceiling_dense();
    printf("ceilings: read %.0f GB/s (%d x %d threads, %d x 16 bytes), copy %.0f GB/s, empty "
           "kernel in a graph %.2f us", read_rate * 1e-9, read_blocks, read_threads, read_unroll,
           copy * 1e-9, launch);
    if (dense_rate > 0) printf(", own dense prefill %.0f TFLOP/s", dense_rate * 1e-12);
    putchar('\n');
    if (!csv) return;
    fprintf(csv, "# read %.6g copy %.6g launch_us %.4f dense %.6g\n", read_rate, copy, launch,
            dense_rate);
    csv_head();
}

static void options(int argc, char **argv) {
    int i;
    for (i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(a, "--quick")) opt_quick = 1;
        else if (!strcmp(a, "--list")) opt_list = 1;
        else if (!strcmp(a, "--plant")) opt_plant = 1;
        else if (!strcmp(a, "--only") && v) opt_only = v, i++;
        else if (!strcmp(a, "--rows") && v) opt_rows = v, i++;
        else if (!strcmp(a, "--share") && v) opt_share = atoi(v), i++;
        else if (!strcmp(a, "--skip") && v) opt_skip = atoi(v), i++;
        else if (!strcmp(a, "--capacity") && v) opt_capacity = atof(v), i++;
        else if (!strcmp(a, "--csv") && v) {
            if (!(csv = fopen(v, "w"))) DIE("cannot write %s", v);
            i++;
        } else
            DIE("usage: bench_cuda [--quick] [--only decode,prefix,prefill,sparse] [--rows "
                "SUBSTRING] [--csv FILE] [--capacity X] [--share 0|1|2] [--list] [--plant] "
                "[--skip N]");
    }
}

int main(int argc, char **argv) {
    static const char *const kinds[] = {"decode", "prefix", "prefill", "sparse"};
    static result done[MAX_ROWS];
    int k, i;
    options(argc, argv);
    if (opt_list) { // for the plans' parameters: an H200
        cuda.arch = 90;
        cuda.n_sm = 132;
        cuda.smem_bytes = 227 << 10;
    } else {
        device_open();
        ceilings();
    }
    for (k = 0; k < 4; k++) {
        if (!strstr(opt_only, kinds[k])) continue;
        rows_make(kinds[k]);
        if (!opt_list) print_head();
        memset(done, 0, sizeof done);
        for (i = opt_skip; i < n_table; i++) run_row(table, done, i);
    }
    printf("\n%d rows, %d wrong or failed, %d over a limit\n", n_rows, n_bad, n_missed);
    if (csv) fclose(csv);
    return n_bad != 0;
}
