// What selectors cost on a CUDA device, by graph replay: selecting, attention over those very
// lists, both in one graph, our own dense attention; then each kernel of the selection on its own.
// One sequence, heads 32/8, head_dim 128, bf16, pages of 64.
// nvcc -O3 -I. -gencode arch=compute_90a,code=sm_90a tests/bench/bench_select.cu -o bench_select
// bench_select [WHAT [KERNELS]], WHAT a part of a row's name; KERNELS 0: without single kernels
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

enum inputs {
    LOCAL, // every head: sinks and some 150 neighbours
    MIXED  // even KV heads: sinks, verticals, thousands of neighbours; odd ones: blocks of 128 have
           // one of five topics, which tells what their queries look for (query-aware)
};

// x: (tokens, heads, DIM) bf16, queries or keys. per: heads of a KV head.
static __global__ void fill(uint16_t *x, int64_t tokens, int heads, int per, int64_t first, int in,
                            int query) {
    int64_t n = tokens * heads * DIM;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int e = (int)(i % DIM), h = (int)(i / DIM % heads) / per;
        const int64_t t = i / DIM / heads + first;
        const uint32_t block = (uint32_t)(t / 128), own = (uint32_t)(h * 4096 + e) * 2654435761u;
        float v = 0.3f * noise((uint32_t)(i * 2654435761u) + 77u * (uint32_t)query);
        if (in == MIXED && h % 2) {
            uint32_t topic = ((block * 2 + (uint32_t)query) * 16 + (uint32_t)h) * 2246822519u;
            topic = (topic ^ topic >> 15) * 3266489917u;
            v += 0.9f * noise(own + (topic >> 8) % 5 * 40503u + 1);
        } else {
            const float sink = noise(own + 2);
            const uint32_t mark = (block * 16 + (uint32_t)h) * 2246822519u;
            const int vertical = in == MIXED && ((mark ^ mark >> 15) * 3266489917u >> 8) % 8 == 0;
            const double w = (double)noise((own - (e % 2) * 2654435761u) + 3) /
                             (in == MIXED ? 4000 : 300) * (double)t;
            const float wave = (float)(e % 2 ? sin(w) : cos(w));
            if (query) v += (in == MIXED ? 2.0f : 2.5f) * wave + 0.7f * sink;
            else if (t < 64) v += 1.5f * sink;
            else if (vertical && t % 128 < 4) v += 1.6f * sink;
            else v += wave;
        }
        x[i] = attni_to_bf16(v);
    }
}

typedef struct shape {
    const char *name;
    int32_t n, q;      // tokens held, queries
    int in;            // enum inputs
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

// A problem with its plan in device memory.
typedef struct problem {
    attn_desc d;
    attn_cuda_plan g;
    void *image, *partials, *staging;
    size_t partial_bytes;
} problem;

static void prepare(problem *p) {
    attn_plan_params params;
    attn_plan *plan;
    attn_cuda_plan_params(&cu, &p->d, &params);
    std::vector<uint8_t> plan_mem(attn_plan_bytes(&p->d, &params) + 64);
    OK(attn_plan_build(&p->d, &params,
                       (void *)(((uintptr_t)plan_mem.data() + 63) & ~(uintptr_t)63),
                       plan_mem.size() - 64, &plan));
    const size_t bytes = attn_cuda_plan_bytes(&cu, &p->d, &params);
    OK(cudaMalloc(&p->image, bytes));
    OK(cudaMallocHost(&p->staging, bytes));
    OK(cudaMalloc(&p->partials, params.partial_bytes + 64));
    p->partial_bytes = params.partial_bytes;
    OK(attn_cuda_plan_init(&cu, &p->d, &params, p->image, bytes, &p->g));
    OK(attn_cuda_upload(&cu, &p->d, plan, &p->g, p->staging, bytes, stream));
    OK(cudaStreamSynchronize(stream));
}

static void release(problem *p) {
    OK(cudaFree(p->image));
    OK(cudaFree(p->partials));
    OK(cudaFreeHost(p->staging));
}

typedef struct selection {
    attn_selection x;
    const attn_select *s;
    void *work;
    size_t room;
} selection;

// Milliseconds of a graph of the selection (NULL: none) and of the attention (0: none).
static float timed(const problem *p, const selection *m, int attention, int single) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    if (m) OK(attn_cuda_select(&cu, &p->d, &p->g, m->s, NULL, &m->x, m->work, m->room, stream));
    if (attention)
        OK(attn_cuda_run(&cu, &p->d, &p->g, p->partials, p->partial_bytes, stream));
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    float ms = replay(exec, 1);
    ms = replay(exec, ms > 20 ? 2 : ms > 1 ? 10 : 50);
    if (single) kernels(graph, ms > 20 ? 2 : 10);
    OK(cudaGraphExecDestroy(exec));
    OK(cudaGraphDestroy(graph));
    return ms;
}

// Pairs that the lists hold, of those that are causal; every row has its own block.
static double listed(const shape *w, const attn_selection *x) {
    std::vector<int64_t> a((size_t)x->n_lists * (x->max_rows + 1)), b(a.size());
    std::vector<int32_t> block((size_t)x->n_lists * x->max_rows * x->row_capacity);
    const int64_t rb = x->list.row_block, kb = x->list.kv_block, first = w->n - w->q;
    double kept = 0, all = 0;
    OK(cudaMemcpy(a.data(), x->row_start, a.size() * 8, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(b.data(), x->row_end, b.size() * 8, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(block.data(), x->block, block.size() * 4, cudaMemcpyDeviceToHost));
    for (int l = 0; l < x->n_lists; l++)
        for (int64_t r = first / rb; r <= (w->n - 1) / rb; r++) {
            const size_t at = (size_t)l * (x->max_rows + 1) + (size_t)(r - first / rb);
            const int64_t p0 = std::max(r * rb, first), p1 = std::min((r + 1) * rb, (int64_t)w->n);
            for (int64_t p = p0; p < p1; p++) all += (double)(p + 1);
            for (int64_t i = a[at]; i < b[at]; i++) {
                const int64_t k = block[(size_t)i] * kb;
                if (i > a[at] && block[(size_t)i] <= block[(size_t)i - 1]) OK(1);
                for (int64_t p = p0; p < p1 && k + kb > p0; p++)
                    kept += (double)std::max((int64_t)0, std::min(kb, p + 1 - k));
                if (k + kb <= p0) kept += (double)(kb * (p1 - p0));
            }
            if (w->s.kind == ATTN_SELECT_FLEX && (b[at] <= a[at] || block[(size_t)b[at] - 1] != r))
                OK(2);
        }
    return kept / all;
}

static void run(const shape *w, int single) {
    problem dense, sparse;
    selection m;
    attn_desc d;
    int32_t q_start[2] = {0, w->q}, kv_len[1] = {w->n}, seq_row[1];
    int32_t pages = (w->n + PAGE - 1) / PAGE;
    std::vector<int32_t> table(pages);
    uint16_t *k, *v, *q, *o;
    void *mem;
    memset(&d, 0, sizeof d);
    d.n_seq = 1, d.n_heads = HEADS, d.n_kv_heads = KV_HEADS, d.head_dim = DIM;
    d.q_start = q_start, d.kv.kv_len = kv_len;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_BF16;
    d.kv.page_tokens = PAGE, d.kv.n_pages = pages;
    for (int i = 0; i < pages; i++) table[i] = i;
    d.kv.page_table = table.data(), d.kv.page_table_stride = pages;
    OK(cudaMalloc(&k, (size_t)pages * PAGE * KV_HEADS * DIM * 2));
    OK(cudaMalloc(&v, (size_t)pages * PAGE * KV_HEADS * DIM * 2));
    OK(cudaMalloc(&q, (size_t)w->q * HEADS * DIM * 2));
    OK(cudaMalloc(&o, (size_t)w->q * HEADS * DIM * 2));
    fill<<<1024, 256, 0, stream>>>(k, (int64_t)pages * PAGE, KV_HEADS, 1, 0, w->in, 0);
    OK(cudaMemcpyAsync(v, k, (size_t)pages * PAGE * KV_HEADS * DIM * 2, cudaMemcpyDeviceToDevice,
                       stream)); // memory of its own: decode is bound by it
    fill<<<1024, 256, 0, stream>>>(q, w->q, HEADS, HEADS / KV_HEADS, w->n - w->q, w->in, 1);
    d.q.data = q, d.o.data = o, d.kv.k.data = k, d.kv.v.data = v;
    const size_t need = attn_select_bytes(&d, &w->s);
    m.s = &w->s;
    m.room = attn_cuda_select_bytes(&cu, &d, &w->s);
    OK(cudaMalloc(&mem, need));
    OK(cudaMalloc(&m.work, m.room));
    OK(attn_selection_init(&d, &w->s, mem, need, seq_row, 1, &m.x));
    for (int i = 0; i < w->s.n_slots; i++) OK(attn_cuda_select_forget(&cu, &m.x, i, stream));
    dense.d = sparse.d = d;
    attn_selection_mask(&m.x, &sparse.d.mask);
    prepare(&dense);
    prepare(&sparse);
    OK(attn_cuda_select(&cu, &sparse.d, &sparse.g, &w->s, NULL, &m.x, m.work, m.room, stream));
    OK(cudaStreamSynchronize(stream));
    const double kept = m.x.keeps_all ? 1 : listed(w, &m.x);
    const float all = timed(&dense, NULL, 1, 0), some = timed(&sparse, NULL, 1, 0);
    const float both = timed(&sparse, &m, 1, 0), own = timed(&sparse, &m, 0, 0);
    printf("%-24s %6.2f %% %9.1f %9.1f %9.1f %9.1f   %5.3f  %5.2f\n", w->name, 100 * kept,
           1e3 * own, 1e3 * some, 1e3 * both, 1e3 * all, both / all, some / (kept * all));
    if (single) timed(&sparse, &m, 0, 1);
    OK(cudaStreamSynchronize(stream));
    release(&dense);
    release(&sparse);
    void *all_mem[] = {k, v, q, o, mem, m.work};
    for (void *x : all_mem) OK(cudaFree(x));
}

static shape flex(const char *name, int in, int32_t n, int compatible, float gamma, float tau,
                  int32_t least) {
    shape w;
    memset(&w, 0, sizeof w);
    w.name = name, w.n = w.q = n, w.in = in;
    w.s.kind = ATTN_SELECT_FLEX;
    w.s.flex.compatible = compatible, w.s.flex.gamma = gamma, w.s.flex.tau = tau;
    if (tau < 0) w.s.flex.tau = 0, w.s.dense_below = -1; // where dense attention is faster
    w.s.flex.min_budget = least;
    return w;
}

static shape hip(const char *name, attn_select_kind kind, int32_t n, int32_t q) {
    shape w;
    memset(&w, 0, sizeof w);
    w.name = name, w.n = n, w.q = q, w.in = MIXED;
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
    w.name = name, w.n = n, w.q = q, w.in = MIXED;
    w.s.kind = ATTN_SELECT_EXACT;
    w.s.exact.share = 0.05f;
    return w;
}

int main(int argc, char **argv) {
    const int32_t k = 1024;
    const shape all[] = {
        flex("flex mixed 1k", MIXED, k, 0, .9f, .1f, 0),
        flex("flex mixed 2k", MIXED, 2 * k, 0, .9f, .1f, 0),
        flex("flex mixed 4k", MIXED, 4 * k, 0, .9f, .1f, 0),
        flex("flex mixed 8k", MIXED, 8 * k, 0, .9f, .1f, 0),
        flex("flex mixed 16k", MIXED, 16 * k, 0, .9f, .1f, 0),
        flex("flex mixed 32k", MIXED, 32 * k, 0, .9f, .1f, 0),
        flex("flex mixed 64k", MIXED, 64 * k, 0, .9f, .1f, 0),
        flex("flex mixed 128k", MIXED, 128 * k, 0, .9f, .1f, 0),
        flex("flex auto 1k", MIXED, k, 0, .9f, -1, 0),
        flex("flex auto 2k", MIXED, 2 * k, 0, .9f, -1, 0),
        flex("flex auto 4k", MIXED, 4 * k, 0, .9f, -1, 0),
        flex("flex compatible 64k", MIXED, 64 * k, 1, .9f, .1f, 0),
        flex("flex local 1k", LOCAL, k, 0, .9f, 0, 256),
        flex("flex local 2k", LOCAL, 2 * k, 0, .9f, 0, 256),
        flex("flex local 4k", LOCAL, 4 * k, 0, .9f, 0, 1024),
        flex("flex local 8k", LOCAL, 8 * k, 0, .9f, 0, 1024),
        flex("flex local 16k", LOCAL, 16 * k, 0, .9f, 0, 1024),
        flex("flex local 64k", LOCAL, 64 * k, 0, .9f, 0, 1024),
        flex("flex local 128k", LOCAL, 128 * k, 0, .9f, 0, 1024),
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
    printf("%-24s %8s %9s %9s %9s %9s   %5s  %5s\n", "us", "listed", "select", "attention", "both",
           "dense", "ratio", "x kept");
    for (const shape &w : all)
        if (argc < 2 || strstr(w.name, argv[1])) run(&w, argc < 3 || atoi(argv[2]));
    return 0;
}
