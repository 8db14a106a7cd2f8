// What selectors cost on a CUDA device: per call (graph replay) and per kernel. One sequence, heads
// 32/8, head_dim 128, bf16, pages of 64. Half of the KV heads have scores of sinks and neighbours,
// half of noise.
// nvcc -O3 -I. -gencode arch=compute_90a,code=sm_90a tests/bench/bench_select.cu -o bench_select
// bench_select [WHAT], WHAT a part of a row's name
#define ATTN_CORE_IMPLEMENTATION
#define ATTN_CUDA_IMPLEMENTATION
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

#define OK(x)                                                                                      \
    do {                                                                                           \
        int e_ = (int)(x);                                                                         \
        if (e_) {                                                                                  \
            printf("%s:%d: %s is %d\n", __FILE__, __LINE__, #x, e_);                               \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum { HEADS = 32, KV_HEADS = 8, DIM = 128, PAGE = 64 };

static __device__ float noise(uint32_t x) { // about normal
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        x = x * 747796405u + 2891336453u;
        uint32_t y = (x >> ((x >> 28) + 4) ^ x) * 277803737u;
        sum += (float)((y >> 22) ^ y) * 2.3283064e-10f - 0.5f;
    }
    return sum * 1.732f;
}

// x: (tokens, heads, DIM) bf16. per: heads of a KV head.
static __global__ void fill(uint16_t *x, int64_t tokens, int heads, int per, float size,
                            uint32_t seed, int64_t first) {
    int64_t n = tokens * heads * DIM;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        int e = (int)(i % DIM), h = (int)(i / DIM % heads) / per;
        int64_t t = i / DIM / heads + first;
        float v = size * noise((uint32_t)(i * 2654435761u) + seed);
        if (h % 2 == 0) { // a wave of positions, and a direction that the first tokens have
            double w = pow(10000.0, -2.0 * (e / 2) / DIM) * (double)t;
            v = 0.3f * v + (float)(e % 2 ? sin(w) : cos(w)) * (per > 1 ? 2.0f : 1.0f);
            if (per > 1 || t < 64) v += noise((uint32_t)e * 977u + 5u) * (per > 1 ? 1.0f : 3.0f);
        }
        x[i] = attni_to_bf16(v);
    }
}

typedef struct shape {
    const char *name;
    int32_t n, q;      // tokens held, queries
    attn_select s;
} shape;

static attn_cuda cu;
static cudaStream_t stream;

static float replay(cudaGraphExec_t g, int turns) {
    cudaEvent_t e[2];
    float ms;
    OK(cudaEventCreate(&e[0]));
    OK(cudaEventCreate(&e[1]));
    OK(cudaGraphLaunch(g, stream));
    OK(cudaEventRecord(e[0], stream));
    for (int i = 0; i < turns; i++) OK(cudaGraphLaunch(g, stream));
    OK(cudaEventRecord(e[1], stream));
    OK(cudaEventSynchronize(e[1]));
    OK(cudaEventElapsedTime(&ms, e[0], e[1]));
    return ms / (float)turns;
}

// Each node of a captured call on its own.
static void kernels(cudaGraph_t all, int turns) {
    size_t n = 64;
    cudaGraphNode_t node[64], copy;
    OK(cudaGraphGetNodes(all, node, &n));
    for (size_t i = 0; i < n; i++) {
        cudaGraphNodeType type;
        cudaKernelNodeParams p;
        cudaGraph_t one;
        cudaGraphExec_t run;
        const char *name = "?";
        OK(cudaGraphNodeGetType(node[i], &type));
        if (type != cudaGraphNodeTypeKernel) continue;
        OK(cudaGraphKernelNodeGetParams(node[i], &p));
        OK(cudaGraphCreate(&one, 0));
        OK(cudaGraphAddKernelNode(&copy, one, NULL, 0, &p));
        OK(cudaGraphInstantiate(&run, one, 0));
        cudaFuncGetName(&name, p.func);
        printf("    %9.1f us  %.44s (%u %u %u)\n", 1e3 * replay(run, turns), name, p.gridDim.x,
               p.gridDim.y, p.gridDim.z);
        OK(cudaGraphExecDestroy(run));
        OK(cudaGraphDestroy(one));
    }
}

static void run(const shape *w) {
    attn_desc d;
    attn_plan_params params;
    attn_plan *plan;
    attn_cuda_plan g;
    attn_selection x;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    int32_t q_start[2] = {0, w->q}, kv_len[1] = {w->n}, seq_row[1];
    int32_t pages = (w->n + PAGE - 1) / PAGE;
    std::vector<int32_t> table(pages);
    uint16_t *k, *q, *o;
    void *image, *mem, *work, *staging;
    memset(&d, 0, sizeof d);
    d.n_seq = 1, d.n_heads = HEADS, d.n_kv_heads = KV_HEADS, d.head_dim = DIM;
    d.q_start = q_start, d.kv.kv_len = kv_len;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_BF16;
    d.kv.page_tokens = PAGE, d.kv.n_pages = pages;
    for (int i = 0; i < pages; i++) table[i] = i;
    d.kv.page_table = table.data(), d.kv.page_table_stride = pages;
    OK(cudaMalloc(&k, (size_t)pages * PAGE * KV_HEADS * DIM * 2));
    OK(cudaMalloc(&q, (size_t)w->q * HEADS * DIM * 2));
    OK(cudaMalloc(&o, (size_t)w->q * HEADS * DIM * 2));
    fill<<<1024, 256, 0, stream>>>(k, (int64_t)pages * PAGE, KV_HEADS, 1, 1, 1, 0);
    fill<<<1024, 256, 0, stream>>>(q, w->q, HEADS, HEADS / KV_HEADS, 1, 77, w->n - w->q);
    d.q.data = q, d.o.data = o, d.kv.k.data = k, d.kv.v.data = k;
    attn_cuda_plan_params(&cu, &d, &params);
    std::vector<uint8_t> plan_mem(attn_plan_bytes(&d, &params) + 64);
    OK(attn_plan_build(&d, &params, (void *)(((uintptr_t)plan_mem.data() + 63) & ~(uintptr_t)63),
                       plan_mem.size() - 64, &plan));
    size_t bytes = attn_cuda_plan_bytes(&cu, &d, &params);
    OK(cudaMalloc(&image, bytes));
    OK(cudaMallocHost(&staging, bytes));
    OK(attn_cuda_plan_init(&cu, &d, &params, image, bytes, &g));
    OK(attn_cuda_upload(&cu, &d, plan, &g, staging, bytes, stream));
    size_t need = attn_select_bytes(&d, &w->s), room = attn_cuda_select_bytes(&cu, &d, &w->s);
    OK(cudaMalloc(&mem, need));
    OK(cudaMalloc(&work, room));
    OK(cudaMemsetAsync(mem, 0, need, stream));
    OK(attn_selection_init(&d, &w->s, mem, need, seq_row, 1, &x));
    OK(attn_cuda_select(&cu, &d, &g, &w->s, NULL, &x, work, room, stream));
    OK(cudaStreamSynchronize(stream));
    std::vector<int64_t> a((size_t)x.n_lists * (x.max_rows + 1)), b(a.size());
    OK(cudaMemcpy(a.data(), x.row_start, a.size() * 8, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(b.data(), x.row_end, b.size() * 8, cudaMemcpyDeviceToHost));
    double kept = 0, all = 0;
    for (int l = 0; l < x.n_lists; l++)
        for (int r = 0; r < x.max_rows; r++) {
            size_t at = (size_t)l * (x.max_rows + 1) + r;
            double p = (double)w->n - w->q + ((double)r + 0.5) * w->q / x.max_rows;
            kept += (double)(b[at] - a[at]) * x.list.kv_block;
            all += p;
        }
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    OK(attn_cuda_select(&cu, &d, &g, &w->s, NULL, &x, work, room, stream));
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    float ms = replay(exec, 3);
    ms = replay(exec, ms > 20 ? 3 : ms > 1 ? 10 : 50);
    printf("%-26s %9.1f us, %5.2f %% listed, workspace %.1f MB\n", w->name, 1e3 * ms,
           100 * kept / all, (double)room / 1e6);
    kernels(graph, ms > 20 ? 2 : 10);
    OK(cudaGraphExecDestroy(exec));
    OK(cudaGraphDestroy(graph));
    OK(cudaStreamSynchronize(stream));
    void *all_mem[] = {k, q, o, image, mem, work};
    for (void *m : all_mem) OK(cudaFree(m));
    OK(cudaFreeHost(staging));
}

static shape flex(const char *name, int32_t n, int compatible, float gamma, float tau,
                  int32_t least) {
    shape w;
    memset(&w, 0, sizeof w);
    w.name = name, w.n = w.q = n;
    w.s.kind = ATTN_SELECT_FLEX;
    w.s.flex.compatible = compatible, w.s.flex.gamma = gamma, w.s.flex.tau = tau;
    w.s.flex.min_budget = least;
    return w;
}

static shape hip(const char *name, attn_select_kind kind, int32_t n, int32_t q) {
    shape w;
    memset(&w, 0, sizeof w);
    w.name = name, w.n = n, w.q = q;
    w.s.kind = kind;
    w.s.n_slots = q == 1;
    return w;
}

static shape vertical(const char *name, int32_t n, int32_t q) {
    shape w = hip(name, ATTN_SELECT_HIP2, n, q);
    w.s.hip.keep = 1024, w.s.hip.vertical = 32;
    return w;
}

static shape exact(const char *name, int32_t n, int32_t q) {
    shape w;
    memset(&w, 0, sizeof w);
    w.name = name, w.n = n, w.q = q;
    w.s.kind = ATTN_SELECT_EXACT;
    w.s.exact.share = 0.05f;
    return w;
}

int main(int argc, char **argv) {
    const int32_t k = 1024;
    const shape all[] = {
        flex("flex 16k", 16 * k, 0, .9f, .1f, 0),
        flex("flex 64k", 64 * k, 0, .9f, .1f, 0),
        flex("flex 64k compatible", 64 * k, 1, .9f, .1f, 0),
        flex("flex 128k min 1024", 128 * k, 0, .9f, 0, 1024),
        flex("flex 128k", 128 * k, 0, .9f, .1f, 0),
        exact("exact 16k", 16 * k, 16 * k),
        exact("exact 128k decode", 128 * k, 1),
        hip("hip2 32k", ATTN_SELECT_HIP2, 32 * k, 32 * k),
        hip("hip2 128k", ATTN_SELECT_HIP2, 128 * k, 128 * k),
        hip("hip2 128k decode", ATTN_SELECT_HIP2, 128 * k, 1),
        vertical("hip2 16k vertical", 16 * k, 16 * k),
        vertical("hip2 32k vertical", 32 * k, 32 * k),
        vertical("hip2 128k vertical decode", 128 * k, 1),
        hip("hip3 32k", ATTN_SELECT_HIP3, 32 * k, 32 * k),
        hip("hip3 128k", ATTN_SELECT_HIP3, 128 * k, 128 * k),
        hip("hip3 128k decode", ATTN_SELECT_HIP3, 128 * k, 1),
    };
    OK(attn_cuda_open(&cu, 0));
    OK(cudaStreamCreate(&stream));
    for (const shape &w : all)
        if (argc < 2 || strstr(w.name, argv[1])) run(&w);
    return 0;
}
