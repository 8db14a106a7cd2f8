/* nvcc -O3 -arch=native -I. examples/cuda_graph.cu -o cuda_graph
 *
 * One CUDA graph, captured once, replayed over a batch that grows: requests join with a prompt (the
 * first part of which all have in common), get a token a step, and leave. A step is
 *     tree append -> plan update -> upload -> page copies -> replay (every layer: store, run)
 * The first pass compares every row of every step with the reference, which keeps each sequence by
 * itself in host memory, without tree or pages. The second pass never waits for results, as an
 * engine would, and must end with the same bits. */
#define ATTN_CUDA_KERNELS(X) X(1, 0, 64, 64) X(0, 0, 64, 64) /* all that this program needs */
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

enum { LAYERS = 2, HEADS = 8, KV_HEADS = 2, DIM = 64, Q_ROW = HEADS * DIM, KV_ROW = KV_HEADS * DIM,
       PAGE = 16, PAGES = 160, MAX_SEQ = 8, MAX_ROWS = 64, MAX_LEN = 192, TABLE = MAX_LEN / PAGE,
       COMMON = 40, PROMPT = 50, STEPS = 240, JOIN_EVERY = 12, REQUESTS = 2 * MAX_SEQ };

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

/* ---- the script: who is there, and what the model computes */

struct request {
    int32_t seq, joins, leaves; /* tree handle; steps */
    int32_t tokens[MAX_LEN];
};

static void write_script(request *r) {
    for (int i = 0; i < REQUESTS; i++) {
        r[i].seq = -1;
        r[i].joins = i * JOIN_EVERY;
        r[i].leaves = r[i].joins + 40 + 11 * i % 60;
        for (int t = 0; t < MAX_LEN; t++) r[i].tokens[t] = t < COMMON ? t : 1000 * (i + 1) + t;
    }
}

/* The model's stand-in: a row of K (what = 0), V or Q by layer, position and token. */
static void model_row(bf16 *row, int n, int what, int layer, int pos, int32_t token) {
    uint32_t x = (uint32_t)(what + 3 * layer + 7 * pos) * 2654435761u + (uint32_t)token * 40503u;
    for (int i = 0; i < n; i++, x = x * 1664525u + 1013904223u)
        row[i] = (bf16)((what == 2 ? 3 : 1) * ((float)(x >> 8) / 8388608.0f - 1.0f));
}

/* A step's inputs, on the host page-locked, on the device where the graph looks for them. */
struct inputs {
    int64_t slots[MAX_ROWS]; /* -1: no such row in this step */
    bf16 q[LAYERS][MAX_ROWS * Q_ROW], k[LAYERS][MAX_ROWS * KV_ROW], v[LAYERS][MAX_ROWS * KV_ROW];
};

struct engine {
    attn_cuda c;
    attn_tree *tree;
    attn_plan *plan;
    attn_plan_params params;
    attn_cuda_plan g;
    size_t bytes;                 /* of the plan's image and of a staging buffer */
    inputs *in, *host_in[2];      /* two of everything the host writes and the device reads later */
    char *staging[2], *partials;
    cudaEvent_t uploaded[2];
    cudaGraphExec_t graph;
    cudaStream_t s;
    char *kv[LAYERS][2];
    bf16 *o, out[LAYERS][MAX_ROWS * Q_ROW]; /* o: device, (LAYERS, MAX_ROWS, Q_ROW) */
    std::vector<char> tree_mem, plan_mem;
    /* the batch */
    attn_desc d;
    int32_t who[MAX_SEQ], seqs[MAX_SEQ], order[MAX_SEQ], scratch[MAX_SEQ];
    int32_t q_start[MAX_SEQ + 1], kv_len[MAX_SEQ], table[MAX_SEQ * TABLE];
    attn_page_copy copies[MAX_SEQ];
    int32_t n_copies;
    /* report */
    int32_t rebuilt, replays, copied, most;
    int64_t rows;
    double worst;
};

static void *aligned(std::vector<char> *mem, size_t bytes) {
    mem->assign(bytes + 64, 0);
    return (void *)(((uintptr_t)mem->data() + 63) / 64 * 64);
}

static void open_engine(engine *e) {
    attn_tree_desc t = {PAGES, PAGE, MAX_SEQ, 0};
    attn_desc *d = &e->d;
    *d = attn_desc();
    e->c = attn_cuda();
    need(attn_cuda_open(&e->c, 0), "opening the device");
    need(cudaStreamCreate(&e->s), "stream");
    e->c.error = buffer<int32_t>(1);
    need(cudaMemset(e->c.error, 0, sizeof(int32_t)), "memory");
    size_t bytes = attn_tree_bytes(&t);
    need(attn_tree_init(&t, aligned(&e->tree_mem, bytes), bytes, &e->tree), "tree");
    d->n_heads = HEADS;
    d->n_kv_heads = KV_HEADS;
    d->head_dim = DIM;
    d->q_start = e->q_start;
    d->seq_order = e->order;
    d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = ATTN_BF16;
    d->kv.layout = ATTN_HEAD_MAJOR;
    d->kv.page_tokens = PAGE;
    d->kv.n_pages = PAGES;
    d->kv.page_table = e->table;
    d->kv.page_table_stride = TABLE;
    d->kv.kv_len = e->kv_len;
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < 2; i++)
            e->kv[l][i] = buffer<char>(attn_kv_page_bytes(d, i) * PAGES);
    e->in = buffer<inputs>(1);
    e->o = buffer<bf16>(LAYERS * MAX_ROWS * Q_ROW);
    for (int i = 0; i < 2; i++) {
        e->host_in[i] = buffer<inputs>(1, true);
        need(cudaEventCreate(&e->uploaded[i]), "event");
        need(cudaEventRecord(e->uploaded[i], e->s), "event");
    }
}

/* What the layer reads and writes; the same addresses in every step. */
static void set_layer(engine *e, int layer) {
    e->d.q.data = e->in->q[layer];
    e->d.o.data = e->o + layer * MAX_ROWS * Q_ROW;
    e->d.kv.k.data = e->kv[layer][0];
    e->d.kv.v.data = e->kv[layer][1];
}

/* Sized by the capacities, whatever the first batch is. */
static void open_plan(engine *e) {
    attn_cuda_plan_params(&e->c, &e->d, &e->params);
    e->params.max_seq = MAX_SEQ;
    e->params.max_tokens = MAX_ROWS;
    e->params.max_kv_len = MAX_LEN;
    size_t bytes = attn_plan_bytes(&e->d, &e->params);
    need(attn_plan_build(&e->d, &e->params, aligned(&e->plan_mem, bytes), bytes, &e->plan), "plan");
    e->bytes = attn_cuda_plan_bytes(&e->c, &e->d, &e->params);
    need(attn_cuda_plan_init(&e->c, &e->d, &e->params, buffer<char>(e->bytes), e->bytes, &e->g),
         "plan");
    e->partials = buffer<char>(e->params.partial_bytes + 64);
    for (int i = 0; i < 2; i++) e->staging[i] = buffer<char>(e->bytes, true);
}

/* The work of a step, as one graph. Nothing in it depends on the batch. */
static void capture(engine *e) {
    cudaGraph_t graph;
    need(cudaStreamBeginCapture(e->s, cudaStreamCaptureModeThreadLocal), "capture");
    for (int l = 0; l < LAYERS; l++) {
        attn_tensor k = {e->in->k[l], ATTN_BF16, 0, 0}, v = {e->in->v[l], ATTN_BF16, 0, 0};
        set_layer(e, l);
        need(attn_cuda_store(&e->c, &e->d, &e->g, &k, &v, e->in->slots, 0, MAX_ROWS, e->s),
             "store");
        need(attn_cuda_run(&e->c, &e->d, &e->g, e->partials, e->params.partial_bytes, e->s),
             "run");
    }
    need(cudaStreamEndCapture(e->s, &graph), "capture");
    need(cudaGraphInstantiate(&e->graph, graph, 0), "graph");
    need(cudaGraphDestroy(graph), "graph");
}

/* Who leaves, who joins, who goes on; appends to the tree and fills in the batch's tables. */
static void build_batch(engine *e, request *r, int step) {
    int32_t n = 0, cached, rows = 0;
    e->n_copies = 0;
    for (int i = 0; i < REQUESTS; i++) {
        if (r[i].seq >= 0 && step == r[i].leaves) {
            need(attn_tree_release(e->tree, r[i].seq, 0), "release");
            r[i].seq = -1;
        }
        if (step < r[i].joins || step >= r[i].leaves) continue;
        int32_t end = PROMPT + step - r[i].joins;
        if (step == r[i].joins)
            need(attn_tree_open(e->tree, 0, r[i].tokens, PROMPT, &r[i].seq, &cached), "open");
        int32_t begin = attn_tree_length(e->tree, r[i].seq);
        need(attn_tree_append(e->tree, r[i].seq, r[i].tokens + begin, end - begin, &cached,
                              e->copies, MAX_SEQ, &e->n_copies), "append");
        if (n == MAX_SEQ || attn_tree_pages(e->tree, r[i].seq, e->table + n * TABLE, TABLE) < 0)
            need(ATTN_ERR_BUFFER, "batch");
        e->who[n] = i;
        e->seqs[n] = r[i].seq;
        e->kv_len[n] = end;
        e->q_start[n++] = rows;
        rows += end - begin - cached;
    }
    e->q_start[n] = rows;
    e->d.n_seq = n;
    e->rows += rows;
    if (n > e->most) e->most = n;
    need(rows > MAX_ROWS ? ATTN_ERR_BUFFER : ATTN_OK, "batch");
    need(attn_tree_order(e->tree, e->seqs, n, e->order, e->scratch), "order");
}

/* Slots and rows of the new tokens into the staging buffer of this turn. */
static void fill_inputs(engine *e, const request *r, inputs *in) {
    need(attn_kv_slots(&e->d, in->slots), "slots");
    for (int row = e->q_start[e->d.n_seq]; row < MAX_ROWS; row++) in->slots[row] = -1;
    for (int i = 0; i < e->d.n_seq; i++)
        for (int row = e->q_start[i]; row < e->q_start[i + 1]; row++) {
            int pos = e->kv_len[i] - (e->q_start[i + 1] - row);
            int32_t token = r[e->who[i]].tokens[pos];
            for (int l = 0; l < LAYERS; l++) {
                model_row(in->k[l] + row * KV_ROW, KV_ROW, 0, l, pos, token);
                model_row(in->v[l] + row * KV_ROW, KV_ROW, 1, l, pos, token);
                model_row(in->q[l] + row * Q_ROW, Q_ROW, 2, l, pos, token);
            }
        }
}

static void step_once(engine *e, request *r, int step) {
    int turn = step % 2, rebuilt = 1;
    need(cudaEventSynchronize(e->uploaded[turn]), "upload"); /* two steps ago: hardly ever waits */
    build_batch(e, r, step);
    set_layer(e, 0); /* validation wants pointers; the plan serves all layers */
    if (!e->plan) open_plan(e);
    else need(attn_plan_update(e->plan, &e->d, &rebuilt), "plan");
    e->rebuilt += rebuilt;
    fill_inputs(e, r, e->host_in[turn]);
    need(cudaMemcpyAsync(e->in, e->host_in[turn], sizeof(inputs), cudaMemcpyHostToDevice, e->s),
         "inputs");
    need(attn_cuda_upload(&e->c, &e->d, e->plan, &e->g, e->staging[turn], e->bytes, e->s),
         "upload");
    need(cudaEventRecord(e->uploaded[turn], e->s), "event");
    if (!e->graph) capture(e);
    for (int l = 0; l < LAYERS && e->n_copies; l++) {
        set_layer(e, l);
        need(attn_cuda_copy_pages(&e->c, &e->d, e->copies, e->n_copies, e->s), "copies");
    }
    need(cudaGraphLaunch(e->graph, e->s), "replay");
    e->replays++;
    e->copied += e->n_copies;
    /* queued before anything that could reuse the pages, which is all that the tree asks for */
    need(attn_tree_ack(e->tree, e->copies, e->n_copies), "copies");
}

static void fetch(engine *e) {
    int32_t error = 0;
    need(cudaMemcpyAsync(e->out, e->o, sizeof e->out, cudaMemcpyDeviceToHost, e->s), "copy");
    need(cudaMemcpyAsync(&error, e->c.error, sizeof error, cudaMemcpyDeviceToHost, e->s), "copy");
    need(cudaStreamSynchronize(e->s), "the device");
    need((attn_result)error, "the kernels");
}

/* Sequence i is page i, MAX_LEN tokens long, of arrays that are filled from the tokens alone. */
static void compare(engine *e, const request *r) {
    static std::vector<bf16> k(MAX_SEQ * MAX_LEN * KV_ROW), v(k.size()), q(MAX_ROWS * Q_ROW);
    std::vector<double> want(MAX_ROWS * Q_ROW);
    attn_desc d = e->d;
    d.q.data = q.data();
    d.seq_order = NULL;
    d.kv.layout = ATTN_TOKEN_MAJOR;
    d.kv.page_table = NULL;
    d.kv.page_tokens = MAX_LEN;
    d.kv.n_pages = MAX_SEQ;
    d.kv.k.data = k.data();
    d.kv.v.data = v.data();
    for (int l = 0; l < LAYERS; l++) {
        double wrong = 0, sum = 0;
        for (int i = 0; i < d.n_seq; i++)
            for (int t = 0; t < e->kv_len[i]; t++) {
                int row = e->q_start[i + 1] - (e->kv_len[i] - t);
                int64_t at = ((int64_t)i * MAX_LEN + t) * KV_ROW;
                int32_t token = r[e->who[i]].tokens[t];
                model_row(&k[at], KV_ROW, 0, l, t, token);
                model_row(&v[at], KV_ROW, 1, l, t, token);
                if (row >= e->q_start[i]) model_row(&q[row * Q_ROW], Q_ROW, 2, l, t, token);
            }
        need(attn_ref_forward(&d, want.data(), NULL), "reference");
        for (int i = 0; i < e->q_start[d.n_seq] * Q_ROW; i++) {
            double x = (double)(float)e->out[l][i] - want[i];
            wrong += x * x;
            sum += want[i] * want[i];
        }
        if (!(sqrt(wrong / sum) <= e->worst)) e->worst = sqrt(wrong / sum); /* NaN must not pass */
    }
}

int main(void) {
    static engine e;
    static request r[REQUESTS];
    static bf16 first[LAYERS][MAX_ROWS * Q_ROW];
    const double bound = ldexp(1, -8); /* weights and output are rounded to bf16: its spacing */
    cudaEvent_t begin, end;
    float ms = 0;
    open_engine(&e);
    need(cudaEventCreate(&begin), "event");
    need(cudaEventCreate(&end), "event");
    write_script(r);
    for (int step = 0; step < STEPS; step++) {
        step_once(&e, r, step);
        fetch(&e);
        compare(&e, r);
    }
    int n_out = e.q_start[e.d.n_seq] * Q_ROW;
    memcpy(first, e.out, sizeof first);
    printf("%s: %d steps, %d requests, up to %d at a time, %lld rows; %d replays of 1 graph, %d "
           "plans built, %d pages copied; largest error of a step %.1e, %.1e allowed: %s\n",
           attn_cuda_executor(&e.c, &e.d), STEPS, REQUESTS, e.most, (long long)e.rows, e.replays,
           e.rebuilt, e.copied, e.worst, bound, e.worst <= bound ? "ok" : "WRONG");

    for (request &x : r) /* those that are still there */
        if (x.seq >= 0) need(attn_tree_release(e.tree, x.seq, 0), "release");
    write_script(r);
    need(cudaEventRecord(begin, e.s), "event");
    for (int step = 0; step < STEPS; step++) step_once(&e, r, step);
    need(cudaEventRecord(end, e.s), "event");
    fetch(&e);
    need(cudaEventElapsedTime(&ms, begin, end), "event");
    int same = 1;
    for (int l = 0; l < LAYERS; l++) same &= !memcmp(first[l], e.out[l], n_out * sizeof(bf16));
    printf("without waiting: %.1f us a step of %d layers, %s\n", 1e3 * ms / STEPS, LAYERS,
           same ? "the same bits" : "OTHER BITS");
    need(cudaGraphExecDestroy(e.graph), "graph");
    need(cudaDeviceReset(), "closing the device"); /* gives back all that it has */
    return e.worst <= bound && same ? 0 : 1;
}
